"""Other implementations of the operations, where they are installed: what a kernel is timed beside."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.utils.weak import WeakIdKeyDictionary

from .. import reference
from ..errors import InputError
from ..ops import Ops
from .operations import Operation


def formulas(norm: Callable[[Tensor, Tensor, float], Tensor]) -> dict[str, Callable[..., Any]]:
    """Operations by an RMSNorm, as a model without fused ones computes them: only last rows are normed to be pooled."""

    def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, weight, eps), total

    def qk_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, *angles: Tensor) -> Any:
        return tuple(reference.rope(norm(x, w, eps), *angles) for x, w in ((q, q_weight), (k, k_weight)))

    def norm_pool(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool) -> Tensor:
        last = norm(x[cu_seqlens[1:].long() - 1], weight, eps)
        return reference.cut(reference.at_least_float32(last), dim, normalize)

    def norm_score(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, direction: Tensor) -> Tensor:
        return torch.sigmoid(norm_pool(x, weight, eps, cu_seqlens, x.shape[1], False) @ direction)

    functions = (add_rms_norm, qk_norm_rope, norm_pool, norm_score)
    return {"rms_norm": norm} | {function.__name__: function for function in functions}


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile; without a GPU no C++ compiler, since there is nothing to be fast for."""
    return torch.compile(function, backend="inductor" if torch.cuda.is_available() else "aot_eager", **options)


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)  # False: not in place


def liger_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (liger_rms_norm(x, w, eps).transpose(0, 1)[None] for x, w in ((q, q_weight), (k, k_weight)))
    return [x[0].transpose(0, 1) for x in LigerRopeFunction.apply(q, k, cos[None], sin[None])]


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


def sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """One of SDPA's backends, which take sequences of one length alone; views, since they take packed strides."""
    if len(q) != len(k) or len(q) != max_q * (len(cu_q) - 1):
        raise InputError("SDPA: expected sequences of one length, found several")
    q, k, v = (x.unflatten(0, (-1, max_q)).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


MASKED: Any = WeakIdKeyDictionary()
PLANNED: Any = WeakIdKeyDictionary()
"""What FlexAttention and FlashInfer make of a batch's cu_seqlens, by that tensor: at the first call, never timed."""


def flex_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, *_: Any) -> Tensor:
    """FlexAttention, queries as many as keys: a row of all tokens and a block mask, compiled once for each T."""
    T = len(q)
    if cu_q not in MASKED:
        document = torch.bucketize(torch.arange(T, dtype=cu_q.dtype, device=q.device), cu_q, right=True)
        visible = lambda b, h, i, j: (document[i] == document[j]) & (i >= j)  # noqa: E731
        mask = flex.create_block_mask(visible, None, None, T, T, device=str(q.device))
        MASKED[cu_q] = partial(compiled(flex.flex_attention, dynamic=False), block_mask=mask, enable_gqa=True)
    return MASKED[cu_q](*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)


def flashinfer_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: Any) -> Tensor:
    """Forward only."""
    import flashinfer

    if cu_q not in PLANNED:
        workspace = torch.empty(2**28, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        ends = (cu_q.clone(), cu_k.clone())  # it holds them, and an entry lasts as long as its key
        wrapper.plan(*ends, q.shape[1], k.shape[1], q.shape[2], causal=True, q_data_type=q.dtype)
        PLANNED[cu_q] = wrapper
    return PLANNED[cu_q].run(q, k, v)


OTHERS: dict[str, dict[str, Callable[..., Any]]] = {
    "rms_norm": {"Liger": liger_rms_norm},
    "qk_norm_rope": {"Liger": liger_qk_norm_rope},
    "swiglu": {"Liger": liger_swiglu},
    "attention": {
        "torch varlen": varlen_attention,
        "flash_attn": flash_attention,
        "FlexAttention": flex_attention,
        "FlashInfer": flashinfer_attention,
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    },
}
"""By operation and name; each raises ImportError where it is not installed."""


def contenders(op: str, operation: Operation) -> dict[str, Callable[..., Any]]:
    """All that computes the operation, by name: plain torch, compiled, this project's own sets, and others'."""
    eager = formulas(reference.rms_norm).get(op, operation.specification)
    found = {"torch eager": eager, "torch.compile": compiled(eager)}
    if faster := formulas(Ops.torch().rms_norm).get(op):
        found["torch F.rms_norm"] = faster
    for name, ops in (("ops torch", Ops.torch()), ("ops triton", Ops.triton())):
        function = getattr(ops, op, None)
        if function and function not in found.values():
            found[name] = function
    return found | OTHERS.get(op, {})
