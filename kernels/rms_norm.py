"""RMSNorm, alone and after a residual add, forward and backward, one pass over the rows each.

    rms_norm      y = w * cast(x * r)                   r = 1 / sqrt(mean(x^2) + eps), per row
    add_rms_norm  s = x + residual, y = rms_norm(s)     returns (y, s)

``cast`` rounds to x's dtype before the weight, as the specification does, and s is rounded to it before the norm; all
else is float32. With n = x * r and g = dy * w, the gradients are

    dx = r * (g - n * mean(g * n)) (+ ds)               dw = sum over rows of dy * cast(n)

r is computed again from x, which the backward reads anyway. dw is summed by each program over its rows, then over
programs, both in a fixed order: deterministic.

Bytes for [R, H] in b-byte elements: forward 2 R H b, with the add 4 R H b; backward 3 R H b and 4 R H b. FLOPs: about
4 R H and 10 R H, so memory decides. Source: arXiv:1910.07467; r computed again and dw by program as in Liger-Kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core.errors import InputError
from qwen3core.reference import declare

from .launch import check, launch

# (elements of a tile, warps); the first is the default
CONFIGS = ((4096, 4), (4096, 8), (8192, 8), (2048, 4))


@declare(row_wise=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, config: Sequence[int] = CONFIGS[0]) -> Tensor:
    """x [H], [T, H] or [T, heads, H], strided but along H, and weight [H], same dtype: y like x, contiguous."""
    return _forward(x, weight, eps, None, config)[0]


@declare(row_wise=True, parts={"rms_norm": rms_norm})
def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, *, config: Sequence[int] = CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both like x; residual has x's shape and dtype."""
    return _forward(x, weight, eps, residual, config)


@torch.library.custom_op("qwen3core::rms_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, config: Sequence[int]
) -> tuple[Tensor, Tensor]:
    if not 1 <= x.dim() <= 3:
        raise InputError(f"rms_norm: x: expected one to three dimensions, found {list(x.shape)}")
    names = "A B H"[6 - 2 * x.dim() :]
    tensors = {"x": (x, names), "weight": (weight, "H")} | ({} if residual is None else {"residual": (residual, names)})
    check("rms_norm", eps=eps, **tensors)
    y, s = _forward_fake(x, weight, eps, residual, config)
    sizes = _sizes(x, config)
    other = x if residual is None else residual
    grid = (triton.cdiv(sizes["R"], sizes["ROWS"]),)
    launch(rms_norm_kernel, grid, x, _strides(x), other, _strides(other), weight, y, s, eps=eps,
           ADD=residual is not None, **sizes)  # fmt: skip
    return y, s


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, config: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)  # a custom op always returns both


def _sizes(x: Tensor, config: Sequence[int]) -> dict[str, int]:
    H, (elements, warps) = x.shape[-1], config
    block = triton.next_power_of_2(H)
    inner = x.shape[1] if x.dim() == 3 else 1
    rows = x.numel() // max(H, 1)
    return {"R": rows, "B": inner, "H": H, "ROWS": max(elements // block, 1), "BLOCK_H": block, "num_warps": warps}


def _strides(x: Tensor) -> tuple[int, ...]:
    return (*x.stride()[:-1], 0, 0)[:2]


@triton.jit(do_not_specialize=["R"])
def rms_norm_kernel(x_ptr, strides, residual_ptr, residual_strides, weight_ptr, y_ptr, s_ptr, R, B, eps,
                    ADD: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    offsets, packed, mask = tile_of(tl.program_id(0), R, B, strides, H, ROWS, BLOCK_H)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if ADD:
        offsets, packed, mask = tile_of(tl.program_id(0), R, B, residual_strides, H, ROWS, BLOCK_H)
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(s_ptr + packed, x, mask=mask)
    column = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    tl.store(y_ptr + packed, normed(x, weight, eps, H)[0], mask=mask)


@triton.jit
def tile_of(tile, R, B, strides, H: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """A tile of [A, B, H], rows counted over R = A * B: (offsets by strides, offsets if contiguous, mask)."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_H)[None, :]
    return row // B * strides[0] + row % B * strides[1] + column, row * H + column, (row < R) & (column < H)


@triton.jit
def normed(x, weight, eps, H: tl.constexpr):
    """Rows x [ROWS, BLOCK_H], zero beyond H, and weight [BLOCK_H]: (y, n = x * r, r), all float32, y rounded."""
    wide = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / H + eps)[:, None]
    n = wide * r
    y = n.to(x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
    return y.to(x.dtype).to(tl.float32), n, r


# Backward

# (elements of a tile, warps, programs at most); the first is the default. Each program writes one partial sum of dw.
# Predicted: 256 programs are two of 4 warps on each of 132 multiprocessors, too few loads in flight at T >= 16k; 1024
# fill the card, +20 to 60 %, and lose at T = 1024, whose 4 MB (8B: 17 MB) of partial sums are as much as x.
BACKWARD_CONFIGS = ((4096, 4, 256), (4096, 4, 528), (4096, 4, 1056), (4096, 8, 528), (2048, 4, 1056))


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, residual, _ = inputs
    ctx.add = residual is not None
    ctx.save_for_backward(output[1] if ctx.add else x, weight)


def _autograd(ctx: Any, dy: Tensor, ds: Tensor) -> tuple:
    dx, dw = rms_norm_backward(dy, ds if ctx.add else None, *ctx.saved_tensors, ctx.eps, [])
    return dx, dw, None, dx if ctx.add else None, None


_forward.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("qwen3core::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, eps: float, config: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(dx, dw) for y = rms_norm(x); ds [like x] is added to dx. Gradients that come in may be float32.

    config: one of ``BACKWARD_CONFIGS``; empty is the default.
    """
    dx, dw = _backward_fake(dy, ds, x, weight, eps, config)
    *tile, programs = config or BACKWARD_CONFIGS[0]
    sizes = _sizes(x, tile)
    grid = (min(triton.cdiv(sizes["R"], sizes["ROWS"]), programs),)
    partial = x.new_empty(*grid, sizes["H"], dtype=torch.float32)
    dy = dy.contiguous()
    launch(rms_norm_backward_kernel, grid, dy, dy if ds is None else ds.contiguous(), x, _strides(x), weight, dx,
           partial, eps=eps, ADD=ds is not None, **sizes)  # fmt: skip
    return dx, dw.copy_(partial.sum(0))


@rms_norm_backward.register_fake
def _backward_fake(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor, eps: float, config: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


@triton.jit(do_not_specialize=["R"])
def rms_norm_backward_kernel(dy_ptr, ds_ptr, x_ptr, strides, weight_ptr, dx_ptr, dw_ptr, R, B, eps,
                             ADD: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                             BLOCK_H: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    dw = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        offsets, packed, mask = tile_of(tile, R, B, strides, H, ROWS, BLOCK_H)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + packed, mask=mask, other=0.0).to(tl.float32)
        _, n, r = normed(x, weight, eps, H)
        g = dy * weight.to(tl.float32)[None, :]
        dx = r * (g - n * (tl.sum(g * n, axis=1) / H)[:, None])
        if ADD:
            dx += tl.load(ds_ptr + packed, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + packed, dx, mask=mask)
        dw += tl.sum(dy * n.to(x.dtype).to(tl.float32), axis=0)
    tl.store(dw_ptr + tl.program_id(0) * H + column, dw, mask=column < H)
