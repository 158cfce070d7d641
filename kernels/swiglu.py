"""SwiGLU's product, forward and backward, one pass each.

    y = cast(silu(gate)) * up             silu(g) = g * s, s = 1 / (1 + exp(-g))
    dup = dy * cast(silu(gate))           dgate = dy * up * s * (1 + g * (1 - s))

``cast`` rounds to gate's dtype, as the specification does; all else is float32. Bytes for [T, I] in b-byte elements:
forward 3 T I b, backward 5 T I b; FLOPs about 5 and 10 per element: memory decides. gate and up may be the two halves
of one matmul's output. Source: arXiv:2002.05202.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core.reference import declare

from .launch import check, launch

# (rows and columns of a tile, warps); the first is the default
CONFIGS = ((8, 512, 8), (4, 512, 4), (8, 512, 4), (2, 1024, 4))


@declare(row_wise=True)
def swiglu(gate: Tensor, up: Tensor, *, config: Sequence[int] = CONFIGS[0]) -> Tensor:
    """gate, up [T, I], rows strided at will, same dtype: silu(gate) * up [T, I], contiguous."""
    return _forward(gate, up, config)


@torch.library.custom_op("qwen3core::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor, config: Sequence[int]) -> Tensor:
    check("swiglu", gate=(gate, "T I"), up=(up, "T I"))
    y = _forward_fake(gate, up, config)
    grid, sizes = _sizes(gate, up, config)
    launch(swiglu_kernel, grid, gate, up, y, **sizes)
    return y


@_forward.register_fake
def _forward_fake(gate: Tensor, up: Tensor, config: Sequence[int]) -> Tensor:
    return gate.new_empty(gate.shape)


def _sizes(gate: Tensor, up: Tensor, config: Sequence[int]) -> tuple[tuple[int], dict[str, int]]:
    (T, width), (rows, columns, warps) = gate.shape, config
    tiles = triton.cdiv(T, rows) * triton.cdiv(width, columns)
    sizes = {"T": T, "width": width, "stride_gate": gate.stride(0), "stride_up": up.stride(0)}
    return (tiles,), sizes | {"ROWS": rows, "BLOCK_I": columns, "num_warps": warps}


@triton.jit(do_not_specialize=["T"])
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, T, width, stride_gate, stride_up, ROWS: tl.constexpr, BLOCK_I: tl.constexpr):
    at_gate, at_up, packed, mask = tile_of(T, width, stride_gate, stride_up, ROWS, BLOCK_I)
    g = tl.load(gate_ptr + at_gate, mask=mask).to(tl.float32)
    u = tl.load(up_ptr + at_up, mask=mask).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + packed, silu * u, mask=mask)


@triton.jit
def tile_of(T, width, stride_gate, stride_up, ROWS: tl.constexpr, BLOCK_I: tl.constexpr):
    """This program's tile: offsets into gate, up and a contiguous tensor, and the mask, [ROWS, BLOCK_I] each."""
    blocks = tl.cdiv(width, BLOCK_I)
    row = (tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (row < T) & (column < width)
    return row * stride_gate + column, row * stride_up + column, row * width + column, mask


# Backward


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    return *swiglu_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_autograd, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


@torch.library.custom_op("qwen3core::swiglu_backward", mutates_args=())
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), contiguous, for y = swiglu(gate, up)."""
    dgate, dup = _backward_fake(dy, gate, up)
    grid, sizes = _sizes(gate, up, CONFIGS[0])
    launch(swiglu_backward_kernel, grid, dy.contiguous(), gate, up, dgate, dup, **sizes)
    return dgate, dup


@swiglu_backward.register_fake
def _backward_fake(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@triton.jit(do_not_specialize=["T"])
def swiglu_backward_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, T, width, stride_gate, stride_up,
                           ROWS: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    at_gate, at_up, packed, mask = tile_of(T, width, stride_gate, stride_up, ROWS, BLOCK_I)
    d = tl.load(dy_ptr + packed, mask=mask).to(tl.float32)
    g = tl.load(gate_ptr + at_gate, mask=mask).to(tl.float32)
    u = tl.load(up_ptr + at_up, mask=mask).to(tl.float32)
    s = tl.sigmoid(g)
    silu = (g * s).to(dup_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dgate_ptr + packed, d * u * s * (1 + g * (1 - s)), mask=mask)
    tl.store(dup_ptr + packed, d * silu, mask=mask)
