"""Other implementations of the operations, where they are installed: what a kernel is timed beside."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Ops
from .operations import Operation


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)  # False: not in place


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    options |= {"enable_gqa": True} if "enable_gqa" in accepted else {}
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True)


OTHERS: dict[str, dict[str, Callable[..., Any]]] = {
    "rms_norm": {"Liger": liger_rms_norm},
    "swiglu": {"Liger": liger_swiglu},
    "attention": {"torch varlen": varlen_attention, "flash_attn": flash_attention},
}
"""By operation and name; each raises ImportError where it is not installed."""


def contenders(op: str, operation: Operation) -> dict[str, Callable[..., Any]]:
    """All that computes the operation, by name: plain torch, compiled, this project's own sets, and others'."""
    found: dict[str, Callable[..., Any]] = {
        "torch eager": operation.specification,
        "torch.compile": torch.compile(operation.specification),
    }
    for name, ops in (("ops torch", Ops.torch()), ("ops triton", Ops.triton())):
        if function := getattr(ops, op, None):
            found[name] = function
    return found | OTHERS.get(op, {})
