"""QK-norm and RoPE in one pass over q and k, forward and backward.

    y = w * cast(x * r)                     r = 1 / sqrt(mean(x^2) + eps), per token and head
    out = (y1 * cos1 - y2 * sin1, y2 * cos2 + y1 * sin2)           1, 2: the halves of D, which RoPE pairs

y is rounded to x's dtype before and after the weight, as the specification does; the rotation is float32 and rounded
once, where the specification rounds three times. The gradient rotates back, then is that of RMSNorm:

    dy = (d1 * cos1 + d2 * sin2, d2 * cos2 - d1 * sin1)            dw = sum over tokens and heads of dy * cast(x * r)
    dx = r * (dy * w - n * mean(dy * w * n)), n = x * r

One program takes all heads of a few tokens. dw is summed by program, then over programs: deterministic. Bytes, in
b-byte elements: forward 2 T (Hq + Hkv) D b, backward 3 T (Hq + Hkv) D b, and 2 T D b of cos and sin; about 10 and 25
FLOPs per element: memory decides. Sources: RoPE, arXiv:2104.09864; both in one pass as in vLLM's fused_qk_norm_rope.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core.errors import InputError
from qwen3core.reference import declare, rope

from .launch import check, launch
from .rms_norm import rms_norm

# (tokens of a program, warps); the first is the default
CONFIGS = ((4, 8), (2, 4), (1, 4), (4, 4))


@declare(row_wise=True, parts={"rms_norm": rms_norm, "rope": rope})
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
    *, config: Sequence[int] = CONFIGS[0],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [T, Hq, D] and k [T, Hkv, D], strided but along D, weights [D], cos and sin [T, D], one dtype: both rotated.

    New contiguous tensors. cos and sin get no gradient: InputError where one is asked.
    """
    if cos.requires_grad or sin.requires_grad:
        raise InputError("qk_norm_rope: cos, sin: expected constants, found requires_grad")
    return _forward(q, k, q_weight, k_weight, eps, cos, sin, config)


@torch.library.custom_op("qwen3core::qk_norm_rope_", mutates_args=("q", "k"))
def qk_norm_rope_(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> None:
    """``qk_norm_rope`` in place, without gradient."""
    _launch(q, k, q_weight, k_weight, eps, cos, sin, q, k, CONFIGS[0])


@torch.library.custom_op("qwen3core::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_out, k_out = _forward_fake(q, k)
    _launch(q, k, q_weight, k_weight, eps, cos, sin, q_out, k_out, config)
    return q_out, k_out


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _launch(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
    q_out: Tensor, k_out: Tensor, config: Sequence[int],
) -> None:  # fmt: skip
    check("qk_norm_rope", eps=eps, q=(q, "T Hq D"), k=(k, "T Hkv D"), q_weight=(q_weight, "D"),
          k_weight=(k_weight, "D"), cos=(cos, "T D"), sin=(sin, "T D"))  # fmt: skip
    if q.shape[2] & (q.shape[2] - 1) or q.shape[2] < 2:
        raise InputError(f"qk_norm_rope: D: expected a power of two, found {q.shape[2]}")
    tokens, warps = config
    launch(qk_norm_rope_kernel, (triton.cdiv(len(q), tokens),), q, q.stride(), q_out, q_out.stride(), q_weight, k,
           k.stride(), k_out, k_out.stride(), k_weight, cos.contiguous(), sin.contiguous(), len(q), eps, TOKENS=tokens,
           num_warps=warps, **_sizes(q, k))  # fmt: skip


def _sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    _, hq, D = q.shape
    blocks = {"BLOCK_HQ": triton.next_power_of_2(hq), "BLOCK_HKV": triton.next_power_of_2(k.shape[1])}
    return {"HQ": hq, "HKV": k.shape[1], "D": D, **blocks}


@triton.jit(do_not_specialize=["T"])
def qk_norm_rope_kernel(q_ptr, q_strides, q_out_ptr, q_out_strides, q_weight_ptr,
                        k_ptr, k_strides, k_out_ptr, k_out_strides, k_weight_ptr, cos_ptr, sin_ptr, T, eps,
                        HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
                        BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr):  # fmt: skip
    half: tl.constexpr = D // 2
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    at = token * D + tl.arange(0, half)[None, None, :]
    cos1 = tl.load(cos_ptr + at, mask=token < T, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + at + half, mask=token < T, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + at, mask=token < T, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + at + half, mask=token < T, other=0.0).to(tl.float32)
    rotate(q_ptr, q_strides, q_out_ptr, q_out_strides, q_weight_ptr, token, cos1, cos2, sin1, sin2, T, eps,
           HQ, D, BLOCK_HQ)  # fmt: skip
    rotate(k_ptr, k_strides, k_out_ptr, k_out_strides, k_weight_ptr, token, cos1, cos2, sin1, sin2, T, eps,
           HKV, D, BLOCK_HKV)  # fmt: skip


@triton.jit
def rotate(x_ptr, strides, out_ptr, out_strides, weight_ptr, token, cos1, cos2, sin1, sin2, T, eps,
           HEADS: tl.constexpr, D: tl.constexpr, BLOCK_HEADS: tl.constexpr):  # fmt: skip
    """Norm and rotate all heads of some tokens, [TOKENS, HEADS, D / 2] at a time.

    Both halves are read before either is written, so that out may be x.
    """
    half: tl.constexpr = D // 2
    head = tl.arange(0, BLOCK_HEADS)[None, :, None]
    column = tl.arange(0, half)[None, None, :]
    mask = (token < T) & (head < HEADS)
    at = token * strides[0] + head * strides[1] + column
    x1 = tl.load(x_ptr + at, mask=mask, other=0.0)
    x2 = tl.load(x_ptr + at + half, mask=mask, other=0.0)
    n1, n2 = x1.to(tl.float32), x2.to(tl.float32)
    r = tl.rsqrt((tl.sum(n1 * n1, axis=2) + tl.sum(n2 * n2, axis=2)) / D + eps)[:, :, None]
    y1 = (n1 * r).to(x1.dtype).to(tl.float32) * tl.load(weight_ptr + column).to(tl.float32)
    y2 = (n2 * r).to(x2.dtype).to(tl.float32) * tl.load(weight_ptr + half + column).to(tl.float32)
    y1 = y1.to(x1.dtype).to(tl.float32)
    y2 = y2.to(x2.dtype).to(tl.float32)
    at = token * out_strides[0] + head * out_strides[1] + column
    tl.store(out_ptr + at, y1 * cos1 - y2 * sin1, mask=mask)
    tl.store(out_ptr + at + half, y2 * cos2 + y1 * sin2, mask=mask)


# Backward

# (programs at most, warps); the first is the default. Each program writes one partial sum of dw, 1 KB.
# Predicted: its 128 registers allow 4 programs of 4 warps on a multiprocessor, 528 on 132: the sweep gains less than
# 5 % but for 1056, which may hide the last programs' tail; 8 warps halve a thread's loads and lose.
BACKWARD_CONFIGS = ((512, 4), (528, 4), (1056, 4), (264, 8))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, q_weight, k_weight, ctx.eps, cos, sin, _ = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _autograd(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple:
    *tensors, cos, sin = ctx.saved_tensors
    return *qk_norm_rope_backward(dq_out, dk_out, *tensors, ctx.eps, cos, sin, []), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("qwen3core::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor,
    sin: Tensor, config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dq_weight, dk_weight), contiguous, from what ``qk_norm_rope`` got and its outputs' gradients.

    config: one of ``BACKWARD_CONFIGS``; empty is the default.
    """
    dq, dk, dq_weight, dk_weight = _backward_fake(dq_out, dk_out, q, k, q_weight, k_weight)
    T, _, D = q.shape
    most, warps = config or BACKWARD_CONFIGS[0]
    programs = min(T, most)
    partial = q.new_empty(programs, 2, D, dtype=torch.float32)
    launch(qk_norm_rope_backward_kernel, (programs,), dq_out.contiguous(), q, q.stride(), dq, q_weight,
           dk_out.contiguous(), k, k.stride(), dk, k_weight, cos.contiguous(), sin.contiguous(), partial, T, eps=eps,
           num_warps=warps, **_sizes(q, k))  # fmt: skip
    weights = partial.sum(0)
    return dq, dk, dq_weight.copy_(weights[0]), dk_weight.copy_(weights[1])


@qk_norm_rope_backward.register_fake
def _backward_fake(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)


@triton.jit(do_not_specialize=["T"])
def qk_norm_rope_backward_kernel(dq_out_ptr, q_ptr, q_strides, dq_ptr, q_weight_ptr,
                                 dk_out_ptr, k_ptr, k_strides, dk_ptr, k_weight_ptr, cos_ptr, sin_ptr, dw_ptr, T, eps,
                                 HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                                 BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr):  # fmt: skip
    half: tl.constexpr = D // 2
    column = tl.arange(0, half)
    q1 = tl.zeros((half,), tl.float32)
    q2, k1, k2 = q1, q1, q1
    for step in tl.range(0, tl.cdiv(T - tl.program_id(0), tl.num_programs(0))):
        token = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        at = token * D + column[None, :]
        cos1 = tl.load(cos_ptr + at).to(tl.float32)
        cos2 = tl.load(cos_ptr + at + half).to(tl.float32)
        sin1 = tl.load(sin_ptr + at).to(tl.float32)
        sin2 = tl.load(sin_ptr + at + half).to(tl.float32)
        dw1, dw2 = rotate_back(dq_out_ptr, q_ptr, q_strides, dq_ptr, q_weight_ptr, token, cos1, cos2, sin1, sin2, eps,
                               HQ, D, BLOCK_HQ)  # fmt: skip
        q1 += dw1
        q2 += dw2
        dw1, dw2 = rotate_back(dk_out_ptr, k_ptr, k_strides, dk_ptr, k_weight_ptr, token, cos1, cos2, sin1, sin2, eps,
                               HKV, D, BLOCK_HKV)  # fmt: skip
        k1 += dw1
        k2 += dw2
    dw_ptr += tl.program_id(0) * 2 * D + column
    tl.store(dw_ptr, q1)
    tl.store(dw_ptr + half, q2)
    tl.store(dw_ptr + D, k1)
    tl.store(dw_ptr + D + half, k2)


@triton.jit
def rotate_back(dout_ptr, x_ptr, strides, dx_ptr, weight_ptr, token, cos1, cos2, sin1, sin2, eps,
                HEADS: tl.constexpr, D: tl.constexpr, BLOCK_HEADS: tl.constexpr):  # fmt: skip
    """Write dx of one token's heads, from contiguous dout; return this token's part of dw, by halves [D / 2]."""
    half: tl.constexpr = D // 2
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, half)[None, :]
    at = token * strides[0] + head * strides[1] + column
    x1 = tl.load(x_ptr + at, mask=head < HEADS, other=0.0)
    x2 = tl.load(x_ptr + at + half, mask=head < HEADS, other=0.0)
    n1, n2 = x1.to(tl.float32), x2.to(tl.float32)
    r = tl.rsqrt((tl.sum(n1 * n1, axis=1) + tl.sum(n2 * n2, axis=1)) / D + eps)[:, None]
    n1 *= r
    n2 *= r
    at = (token * HEADS + head) * D + column
    d1 = tl.load(dout_ptr + at, mask=head < HEADS, other=0.0).to(tl.float32)
    d2 = tl.load(dout_ptr + at + half, mask=head < HEADS, other=0.0).to(tl.float32)
    dy1 = d1 * cos1 + d2 * sin2
    dy2 = d2 * cos2 - d1 * sin1
    g1 = dy1 * tl.load(weight_ptr + column).to(tl.float32)
    g2 = dy2 * tl.load(weight_ptr + half + column).to(tl.float32)
    mean = ((tl.sum(g1 * n1, axis=1) + tl.sum(g2 * n2, axis=1)) / D)[:, None]
    tl.store(dx_ptr + at, r * (g1 - n1 * mean), mask=head < HEADS)
    tl.store(dx_ptr + at + half, r * (g2 - n2 * mean), mask=head < HEADS)
    dw1 = tl.sum(dy1 * n1.to(x1.dtype).to(tl.float32), axis=0)
    return dw1, tl.sum(dy2 * n2.to(x2.dtype).to(tl.float32), axis=0)
