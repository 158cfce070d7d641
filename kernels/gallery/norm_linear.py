"""RMSNorm fused into the load of the projection that follows it. Forward only.

    y = cast(w * cast(x * r)) W^T            r = 1 / sqrt(mean(x^2) + eps), per row

``cast`` rounds to x's dtype, as the specification does twice before it multiplies; r and the product's sums are
float32, and y is rounded once. A program computes BLOCK_M rows by BLOCK_N columns of y. It walks over its rows of x
twice: once for r, once for the product, where each tile is normed between its load and ``tl.dot``. The normed rows are
never written. (The product of x and w W, times r afterwards, would need one walk, but rounds elsewhere.)

FLOPs: 2 T H O. Bytes: (T H + O H + T O) b at least, 2 T H b less than in two kernels. To be expected: for up to BLOCK_M
rows, where the bytes of W decide, what a product alone takes, and a launch less. For many rows, slower than two
kernels: the norm's 6 operations per element of x are repeated for each of O / BLOCK_N tiles, about half the time of the
tensor cores' 2 BLOCK_N at the rates of an H100 (31 T instructions and 990 TFLOP/s), to save a tenth of both kernels'
time at most (0.6B, O = 4096). Source: tiles of the product as in Triton's tutorial on matrix multiplication.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core import reference
from qwen3core.config import Qwen3Config
from qwen3core.laboratory.operations import Operation

from ..launch import check, forward_only, launch

# (BLOCK_M, BLOCK_N, bytes of a row that are loaded at once, warps, stages); the first is the default
CONFIGS = ((128, 128, 128, 8, 3), (128, 64, 128, 4, 3), (64, 128, 128, 4, 3), (64, 64, 128, 4, 4))


def norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, *, config: Sequence[int] = CONFIGS[0]
) -> Tensor:
    """x [T, H], norm_weight [H] and weight [O, H], rows strided at will, one dtype: [T, O]. Raises InputError."""
    forward_only("norm_linear", x, norm_weight, weight)
    check("norm_linear", eps=eps, x=(x, "T H"), norm_weight=(norm_weight, "H"), weight=(weight, "O H"))
    (T, H), width = x.shape, len(weight)
    y = x.new_empty(T, width)
    block_m, block_n, row_bytes, warps, stages = config
    grid = (triton.cdiv(T, block_m), triton.cdiv(width, block_n))
    launch(norm_linear_kernel, grid, x, x.stride(0), norm_weight, weight, weight.stride(0), y, T, width, eps, H,
           block_m, block_n, row_bytes // x.element_size(), num_warps=warps, num_stages=stages)  # fmt: skip
    return y


@triton.jit(do_not_specialize=["T"])
def norm_linear_kernel(x_ptr, x_stride, norm_weight_ptr, weight_ptr, weight_stride, y_ptr, T, width, eps,
                       H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.range(0, H, BLOCK_K):
        wide = load_tile(x_ptr, x_stride, row, T, k, H, BLOCK_K).to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    r = tl.rsqrt(squares / H + eps)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, H, BLOCK_K):
        x = load_tile(x_ptr, x_stride, row, T, k, H, BLOCK_K)
        at = k + tl.arange(0, BLOCK_K)
        norm_weight = tl.load(norm_weight_ptr + at, mask=at < H, other=0.0).to(tl.float32)
        normed = (x.to(tl.float32) * r).to(x.dtype).to(tl.float32) * norm_weight[None, :]
        weight = load_tile(weight_ptr, weight_stride, column, width, k, H, BLOCK_K)
        acc = tl.dot(normed.to(x.dtype), weight.T, acc, input_precision="ieee")
    store_tile(y_ptr, acc, row, T, column, width)


@triton.jit
def load_tile(ptr, stride, row, rows, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k : k + BLOCK_K of some rows of a matrix [rows, K], zero outside of it."""
    column = k + tl.arange(0, BLOCK_K)
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(ptr + at, mask=(row < rows)[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, tile, row, rows, column, columns):
    """Write what lies within a contiguous matrix [rows, columns]."""
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(ptr + at, tile, mask=(row < rows)[:, None] & (column < columns)[None, :])


def specification(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
    return reference.linear(reference.rms_norm(x, norm_weight, eps), weight)


def arguments(T: int, H: int, width: int) -> tuple:
    randn = partial(torch.randn, dtype=torch.float64)
    return randn(T, H) * 3, randn(H), 1e-6, randn(width, H) * H**-0.5


def cases() -> Iterator[tuple[str, tuple]]:
    for T, H, width in ((1, 64, 1), (3, 100, 130), (129, 64, 65), (70, 257, 40)):
        yield f"[{T}, {H}] to {width}", arguments(T, H, width)
    x, *rest = arguments(5, 64, 40)
    yield "small rows, to which eps matters", (3e-4 * x, *rest)
    yield "no rows", arguments(0, 64, 40)


def large(config: Qwen3Config, tokens: int) -> tuple:
    """Queries, keys and values in one product."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return arguments(tokens, config.hidden_size, heads * config.head_dim)


def work(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> tuple[int, int]:
    width = len(weight)
    written = len(x) * width * x.element_size()
    return x.nbytes + norm_weight.nbytes + weight.nbytes + written, 2 * x.numel() * width


OPERATION = Operation(specification, cases, large, work)
