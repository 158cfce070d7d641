"""``Ops``: every operation that a kernel may replace, as one value.

    model.ops = dataclasses.replace(model.ops, rms_norm=mine)     # swaps it everywhere, q_norm and k_norm included

An operation that cannot serve an input raises and says why; nothing falls back in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .errors import InputError


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation. Signatures, shapes and precision: ``reference.py``, same names."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    pool: Callable[[Tensor, Tensor, int, bool], Tensor]

    @staticmethod
    def reference() -> "Ops":
        """The specification."""
        return Ops(**{field.name: getattr(reference, field.name) for field in fields(Ops)})

    @staticmethod
    def torch() -> "Ops":
        """What stock PyTorch ships fused: ``rms_norm`` and ``scaled_dot_product_attention``; else the reference."""
        return Ops(
            rms_norm=_rms_norm, rope=reference.rope, attention=_sdpa, swiglu=reference.swiglu, pool=reference.pool
        )

    def __repr__(self) -> str:
        functions = {field.name: getattr(self, field.name) for field in fields(self)}
        names = (f"{name}={f.__module__}.{getattr(f, '__qualname__', repr(f))}" for name, f in functions.items())
        return f"Ops({', '.join(names)})"


def resolve(ops: "Ops | str") -> Ops:
    """``"auto"`` (now ``torch``), ``"reference"``, ``"torch"``, or an Ops, to an Ops."""
    if isinstance(ops, Ops):
        return ops
    sets = {"auto": Ops.torch, "reference": Ops.reference, "torch": Ops.torch}
    if not isinstance(ops, str) or ops not in sets:
        raise InputError(f"ops: expected one of {', '.join(sets)}, or an Ops, found {ops!r}")
    return sets[ops]()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    out = []
    for rows_q, rows_k in reference.sequences(cu_seqlens_q, cu_seqlens_k):
        queries, keys, values = (x.transpose(0, 1) for x in (q[rows_q], k[rows_k], v[rows_k]))
        # SDPA's own is_causal is aligned at the top left.
        mask = None if len(q[rows_q]) == len(k[rows_k]) else reference.visible(queries, keys)
        z = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], mask, is_causal=mask is None, enable_gqa=True
        )
        out.append(z[0].transpose(0, 1))
    return torch.cat(out)
