"""``Ops``: every operation that a kernel may replace, as one value.

    model.ops = dataclasses.replace(model.ops, rms_norm=mine)     # swaps it everywhere, q_norm and k_norm included

Some kernels do several of them at once; such a fused operation is used in their place wherever it is set, and dropped
where one of its parts is replaced. An operation that cannot serve an input raises and says why; nothing falls back in
silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference
from .errors import InputError

FUSED = {
    "add_rms_norm": ("rms_norm",),
    "qk_norm_rope": ("rms_norm", "rope"),
    "norm_pool": ("rms_norm", "pool"),
    "norm_score": ("rms_norm", "pool"),
}
"""The parts of each fused operation."""


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation. Signatures, shapes and precision: ``reference.py``, same names."""

    linear: Callable[[Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    pool: Callable[[Tensor, Tensor, int, bool], Tensor]

    add_rms_norm: Callable[[Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]] | None = None
    """(x, weight, eps, residual) to (rms_norm(x + residual), x + residual)"""
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(q, k, q_weight, k_weight, eps, cos, sin) to rope(rms_norm(q)), rope(rms_norm(k))"""
    norm_pool: Callable[[Tensor, Tensor, float, Tensor, int, bool], Tensor] | None = None
    """(x, weight, eps, cu_seqlens, dim, normalize) to pool(rms_norm(x))"""
    norm_score: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor] | None = None
    """(x, weight, eps, cu_seqlens, w_yes - w_no [H] float32) to P(yes) [N] from pool(rms_norm(x))"""

    _before: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        now = {name: getattr(self, name) for name in _names()}
        for name, parts in FUSED.items():
            replaced = self._before and any(now[part] is not self._before[part] for part in parts)
            if replaced and now[name] is self._before[name]:
                object.__setattr__(self, name, None)
        object.__setattr__(self, "_before", now)  # dataclasses.replace hands it on

    @staticmethod
    def reference() -> "Ops":
        """The specification."""
        return Ops(**{name: getattr(reference, name) for name in _names() if name not in FUSED})

    @staticmethod
    def torch() -> "Ops":
        """Fast with stock PyTorch: what it ships fused, and in place where no gradient is recorded."""
        return Ops(linear=_linear, rms_norm=_rms_norm, rope=_rope, attention=_sdpa, swiglu=_swiglu, pool=reference.pool)

    @staticmethod
    def prepacked() -> "Ops":
        """``torch()`` with each weight laid out for oneDNN at its first use: faster on a CPU, most for one short text.

        It takes a second copy of every linear weight, in the dtype of the arithmetic. A weight changed in place is laid
        out anew, but not one changed through ``.data``. It is ``torch()`` while gradients are recorded, on a GPU, and
        for weights made in inference mode, whose changes are not counted.
        Raises InputError where torch is built without oneDNN.
        """
        if not mkldnn.is_available():
            raise InputError("ops 'prepacked': expected a torch built with oneDNN, found one without (use 'torch')")
        return replace(Ops.torch(), linear=_packed_linear)

    @staticmethod
    def triton() -> "Ops":
        """The Triton kernels of ``qwen3core.kernels``, forward and backward; rope and pool alone are the reference.

        They run on a GPU in float32, bfloat16 and float16, and on the CPU, slowly, with TRITON_INTERPRET=1 in the
        environment. Raises InputError where triton is not installed.
        """
        try:
            from .kernels import attention, pooling, qk_norm_rope, rms_norm, swiglu
        except ImportError as error:
            raise InputError(f"ops 'triton': expected the package triton, found that {error}") from error
        return Ops(
            linear=reference.linear,
            rms_norm=rms_norm.rms_norm,
            rope=reference.rope,
            attention=attention.attention,
            swiglu=swiglu.swiglu,
            pool=reference.pool,
            add_rms_norm=rms_norm.add_rms_norm,
            qk_norm_rope=qk_norm_rope.qk_norm_rope,
            norm_pool=pooling.norm_pool,
            norm_score=pooling.norm_score,
        )

    def __repr__(self) -> str:
        functions = {name: f for name in _names() if (f := getattr(self, name))}
        names = (f"{name}={f.__module__}.{getattr(f, '__qualname__', repr(f))}" for name, f in functions.items())
        return f"Ops({', '.join(names)})"


def _names() -> list[str]:
    return [field.name for field in fields(Ops) if not field.name.startswith("_")]


def resolve(ops: "Ops | str", device: torch.device | None = None) -> Ops:
    """An Ops, or the name of one; ``"auto"`` is triton for a GPU, else torch."""
    if isinstance(ops, Ops):
        return ops
    auto = Ops.triton if device is not None and device.type == "cuda" else Ops.torch
    sets = {
        "auto": auto,
        "reference": Ops.reference,
        "torch": Ops.torch,
        "prepacked": Ops.prepacked,
        "triton": Ops.triton,
    }
    if not isinstance(ops, str) or ops not in sets:
        raise InputError(f"ops: expected one of {', '.join(sets)}, or an Ops, found {ops!r}")
    return sets[ops]()


# Ops.torch(): the reference's formulas with fewer passes over memory, which is what they cost on a CPU.

ONEDNN_ROWS = 512
"""Rows up to which oneDNN's float32 product is faster on a CPU: 1.7 times at 16, 1.3 at 128 (bench/NOTES.md)."""


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    if _lean(x) and len(x) <= ONEDNN_ROWS and mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight.to(x.dtype), None, "none", [], "")
    return reference.linear(x, weight)


PACKED = WeakTensorKeyDictionary()
"""Each weight's version and dtype, and what oneDNN made of it."""


def _packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    served = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if not served or torch.is_grad_enabled() or weight.is_inference():
        return _linear(x, weight)
    now = (weight._version, x.dtype)
    made, packed = PACKED.get(weight, (None, None))
    if made != now:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(x.dtype))
        PACKED[weight] = now, packed
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not _lean(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin.unsqueeze(1)
    out = x * cos.unsqueeze(1)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up) if _lean(gate) else reference.swiglu(gate, up)


def _lean(x: Tensor) -> bool:
    """float32 on a CPU, and no gradient that would need what is overwritten."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()


LONG = 512
"""Keys from which a copy that lays those of a head side by side pays on a CPU: 1.15 times as fast at 512 to 4096 keys,
1.5 times at 8192 (bench/NOTES.md)."""


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    """One call for neighbours of equal lengths, which sorted batches are full of."""
    lengths = ((x.stop - x.start for x in rows) for rows in reference.sequences(cu_seqlens_q, cu_seqlens_k))
    runs = [(*pair, len(list(run))) for pair, run in groupby(map(tuple, lengths))]
    # split, not slices: the gradient of each slice would be a tensor of all rows.
    of_queries = q.split([n * len_q for len_q, _, n in runs])
    of_keys, of_values = (x.split([n * len_k for _, len_k, n in runs]) for x in (k, v))
    out = []
    for (len_q, len_k, n), *rows in zip(runs, of_queries, of_keys, of_values, strict=True):
        queries, keys, values = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in rows)
        if len_k >= LONG and k.device.type == "cpu":
            keys, values = keys.contiguous(), values.contiguous()
        causal = len_q == len_k  # SDPA's own is aligned at the top left; one query sees all
        mask = None if causal or len_q == 1 else reference.visible(queries[0], keys[0])
        z = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, enable_gqa=True)
        out.append(z.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)  # of one, cat would copy
