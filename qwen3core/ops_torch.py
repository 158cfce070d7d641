"""The fast set in stock PyTorch: the reference's formulas with fewer passes over memory, which decide on a CPU."""

from bisect import bisect_left, bisect_right
from itertools import groupby

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference
from .errors import InputError
from .reference import declare

ONEDNN_ROWS = 512
"""Rows up to which oneDNN's float32 product is faster on a CPU: 1.7 times at 16, 1.3 at 128 (bench/README.md)."""

FIRST_NUMBERS = 10
"""oneDNN holds on to 0.6 MB of code for each number of rows and shape of weight that it meets. So the first numbers
of rows are multiplied as they are, which are all where few lengths recur, and later ones are filled up."""

MET: set[int] = set()
"""Those first numbers."""

ONEDNN_SIZES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Numbers of rows that later ones are filled up to, with zeros; of float32, what is more is MKL's."""

PACKED_SIZES = (*ONEDNN_SIZES, 256, 512, 1024)
"""The same of weights in oneDNN's own layout, which multiply more rows in parts of these sizes."""

LONG_KEYS = 512
"""Keys from which a copy that puts those of a head side by side pays on a CPU: 1.15 times as fast at 512 to 4096 keys,
1.5 times at 8192 (bench/README.md)."""

PACKED = WeakTensorKeyDictionary()
"""Each weight's version and dtype, and what oneDNN made of it."""


@declare(row_wise=True)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``reference.linear`` through oneDNN where that is faster."""
    fast = _may_overwrite(x) and x.dim() == 2 and mkldnn.is_available()
    if fast and len(x) <= ONEDNN_ROWS and (len(x) <= ONEDNN_SIZES[-1] or _as_it_is(len(x))):
        return _onednn(x, weight.to(x.dtype))
    return reference.linear(x, weight)


@declare(row_wise=True)
def prepacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``linear`` on a copy of the weight in oneDNN's own layout, made at its first use and when it has changed."""
    if x.dim() != 2 or not _onednn_packs(x) or torch.is_grad_enabled() or weight.is_inference():
        return linear(x, weight)
    now = (weight._version, x.dtype)
    made, packed = PACKED.get(weight, (None, None))
    if made != now:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(x.dtype))
        PACKED[weight] = now, packed
    return _onednn(x, packed)


@declare(row_wise=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = reference.at_least_float32(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale if wide is x else wide.mul_(scale)).to(x.dtype).mul_(weight)


@declare(row_wise=True)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin.unsqueeze(1)
    out = x * cos.unsqueeze(1)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@declare(row_wise=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up) if _may_overwrite(gate) else reference.swiglu(gate, up)


@declare(causal=True)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True,
) -> Tensor:  # fmt: skip
    """PyTorch's SDPA, one call for neighbours of equal lengths, which sorted batches are full of.

    Raises InputError under forward-mode differentiation (``torch.func.jvp``, ``jacfwd``), which SDPA does not have.
    """
    lengths = ((x.stop - x.start for x in rows) for rows in reference.sequences(cu_seqlens_q, cu_seqlens_k, causal))
    runs = [(*pair, len(list(run))) for pair, run in groupby(map(tuple, lengths))]
    # split, not slices: the gradient of each slice would be a tensor of all rows.
    q_runs = q.split([n * len_q for len_q, _, n in runs])
    k_runs, v_runs = (x.split([n * len_k for _, len_k, n in runs]) for x in (k, v))
    out = []
    for (len_q, len_k, n), *rows in zip(runs, q_runs, k_runs, v_runs, strict=True):
        queries, keys, values = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in rows)
        if len_k >= LONG_KEYS and k.device.type == "cpu":
            keys, values = keys.contiguous(), values.contiguous()
        aligned = causal and len_q == len_k  # SDPA's own mask is aligned at the top left; one query sees all
        mask = reference.visible(queries[0], keys[0]) if causal and not aligned and len_q > 1 else None
        try:
            z = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=aligned, enable_gqa=True)
        except NotImplementedError as error:
            message = f"ops 'torch': attention: expected ops='reference' for forward-mode AD ({error})"
            raise InputError(message) from error
        out.append(z.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)  # torch.cat would copy a single one


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of rows x [T, in] and a weight, packed or not: [T, out]. No row depends on what is filled in."""
    if _as_it_is(len(x)):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    sizes = _sizes(len(x))
    *parts, last = x.split([*sizes[:-1], len(x) - sum(sizes[:-1])])
    filled = torch.cat((last, last.new_zeros(sizes[-1] - len(last), x.shape[1])))
    products = [_onednn(part, weight) for part in (*parts, filled)]
    return (products[0] if len(sizes) == 1 else torch.cat(products))[: len(x)]


def _as_it_is(rows: int) -> bool:
    """Whether this number of rows is multiplied as it is: one of the sizes, or of the first numbers."""
    if rows in MET or rows in PACKED_SIZES:
        return True
    if rows <= ONEDNN_ROWS and len(MET) < FIRST_NUMBERS:
        MET.add(rows)
    return rows in MET


def _sizes(rows: int) -> list[int]:
    """Numbers of ``PACKED_SIZES`` that add up to ``rows``, or a few more."""
    if rows <= ONEDNN_SIZES[-1]:
        return [ONEDNN_SIZES[bisect_left(ONEDNN_SIZES, rows)]]
    size = PACKED_SIZES[bisect_right(PACKED_SIZES, rows) - 1]
    return [size, *(_sizes(rows - size) if rows > size else [])]


def _onednn_packs(x: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for weights of x's dtype; for bfloat16, not on every CPU."""
    if x.device.type != "cpu":
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _may_overwrite(x: Tensor) -> bool:
    """Whether x is float32 on a CPU and no gradient will need what an operation in place overwrites."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
