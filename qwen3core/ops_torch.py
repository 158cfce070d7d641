"""The fast set in stock PyTorch: the reference's formulas with fewer passes over memory, which decide on a CPU."""

from bisect import bisect_left, bisect_right
from itertools import groupby

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference
from .reference import declare

ONEDNN_SIZES = (*range(1, 9), *range(10, 24, 2), *range(24, 48, 4), *range(48, 96, 8), 96, 112, 128)
"""Rows of one product of oneDNN, which holds on to 0.6 MB of code for each number of rows and each shape of weight: few
enough for memory, close enough that filling up with zeros takes little time. Up to the last its float32 product is
faster on a CPU: 1.7 times at 16 rows, 1.3 at 128 (bench/README.md)."""

PACKED_SIZES = (*ONEDNN_SIZES, 256, 512, 1024)
"""The same of weights in oneDNN's own layout, of which any number of rows is multiplied, in parts of these sizes."""

LONG_KEYS = 512
"""Keys from which a copy that puts those of a head side by side pays on a CPU: 1.15 times as fast at 512 to 4096 keys,
1.5 times at 8192 (bench/README.md)."""

PACKED = WeakTensorKeyDictionary()
"""Each weight's version and dtype, and what oneDNN made of it."""


@declare(row_wise=True)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``reference.linear`` through oneDNN where that is faster."""
    if _may_overwrite(x) and x.dim() == 2 and len(x) <= ONEDNN_SIZES[-1] and mkldnn.is_available():
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
    if not _may_overwrite(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """PyTorch's SDPA, one call for neighbours of equal lengths, which sorted batches are full of."""
    lengths = ((x.stop - x.start for x in rows) for rows in reference.sequences(cu_seqlens_q, cu_seqlens_k))
    runs = [(*pair, len(list(run))) for pair, run in groupby(map(tuple, lengths))]
    # split, not slices: the gradient of each slice would be a tensor of all rows.
    q_runs = q.split([n * len_q for len_q, _, n in runs])
    k_runs, v_runs = (x.split([n * len_k for _, len_k, n in runs]) for x in (k, v))
    out = []
    for (len_q, len_k, n), *rows in zip(runs, q_runs, k_runs, v_runs, strict=True):
        queries, keys, values = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in rows)
        if len_k >= LONG_KEYS and k.device.type == "cpu":
            keys, values = keys.contiguous(), values.contiguous()
        causal = len_q == len_k  # SDPA's own mask is aligned at the top left; one query sees all
        mask = None if causal or len_q == 1 else reference.visible(queries[0], keys[0])
        z = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, enable_gqa=True)
        out.append(z.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)  # torch.cat would copy a single one


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of rows x [T, in] and a weight, packed or not: [T, out]. No row depends on what is filled in."""
    if len(x) in PACKED_SIZES:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if len(x) > ONEDNN_SIZES[-1]:
        return torch.cat([_onednn(rows, weight) for rows in x.split(_parts(len(x)))])
    filling = ONEDNN_SIZES[bisect_left(ONEDNN_SIZES, len(x))] - len(x)
    return _onednn(torch.cat((x, x.new_zeros(filling, x.shape[1]))), weight)[: len(x)]


def _parts(rows: int) -> list[int]:
    """Numbers that add up to ``rows``: the largest of ``PACKED_SIZES``, and last one that is to be filled up."""
    parts = []
    while rows > ONEDNN_SIZES[-1]:
        parts.append(PACKED_SIZES[bisect_right(PACKED_SIZES, rows) - 1])
        rows -= parts[-1]
    return [*parts, rows] if rows else parts


def _onednn_packs(x: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for weights of x's dtype; for bfloat16, not on every CPU."""
    if x.device.type != "cpu":
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _may_overwrite(x: Tensor) -> bool:
    """Whether x is float32 on a CPU and no gradient will need what an operation in place overwrites."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
