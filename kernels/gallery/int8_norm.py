"""RMSNorm whose rows come out in int8, each with its scale, as a product of int8 wants them. Forward only.

    y = cast(w * cast(x * r))            r = 1 / sqrt(mean(x^2) + eps), per row
    s = max |y| / 127                    q = round(y / s)                        y is q * s, to within s / 2

``cast`` rounds to x's dtype, as the specification (``reference.int8_rows`` of ``reference.rms_norm``) does; all else is
float32, s too: in float16 it would be subnormal for small rows. q is rounded to nearest, ties to even. A program has
whole rows in registers, so that y, its largest value and q take one pass.

Bytes: (b + 1) T H and 4 T, in place of (3 b + 1) T H in two kernels; about 8 FLOPs per element: memory decides. To be
expected: 3/7 of the time of two kernels in bfloat16, at the bandwidth of ../rms_norm.py. Source: quantisation by token
as in SmoothQuant, arXiv:2211.10438.
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
from ..rms_norm import CONFIGS, _sizes, _strides, normed, tile_of


def int8_norm(x: Tensor, weight: Tensor, eps: float, *, config: Sequence[int] = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """x [T, H], rows strided at will, and weight [H], one dtype: (q [T, H] int8, s [T] float32). InputError."""
    return quantized_norm("int8_norm", x, weight, eps, torch.int8, 127, config)


def quantized_norm(
    op: str, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, largest: int, config: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The launch, for rows of a dtype whose largest number is ``largest``."""
    forward_only(op, x, weight)
    check(op, eps=eps, x=(x, "T H"), weight=(weight, "H"))
    q, scale = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    sizes = _sizes(x, config)
    grid = (triton.cdiv(sizes["R"], sizes["ROWS"]),)
    launch(quantized_norm_kernel, grid, x, _strides(x), weight, q, scale, eps=eps, LARGEST=largest, **sizes)
    return q, scale


@triton.jit(do_not_specialize=["R"])
def quantized_norm_kernel(x_ptr, strides, weight_ptr, q_ptr, scale_ptr, R, B, eps, LARGEST: tl.constexpr,
                          H: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    offsets, packed, mask = tile_of(tl.program_id(0), R, B, strides, H, ROWS, BLOCK_H)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    column = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    y = normed(x, weight, eps, H)[0]
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(y), axis=1), LARGEST * 1.0), 1e-30)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scale_ptr + row, scale, mask=row < R)
    q = tl.div_rn(y, scale[:, None])
    if q_ptr.dtype.element_ty == tl.int8:
        # To nearest, ties to even, as every float32 sum is rounded: 1.5 * 2^23 leaves no bits for a fraction.
        q = q + 12582912.0 - 12582912.0
    tl.store(q_ptr + packed, q.to(q_ptr.dtype.element_ty), mask=mask)


def specification(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return reference.int8_rows(reference.rms_norm(x, weight, eps))


def arguments(T: int, H: int) -> tuple:
    """Rows whose y / s is nowhere near a tie, which a last bit of float32 would decide."""
    y = torch.randint(-126, 127, (T, H)) + 0.6 * torch.rand(T, H, dtype=torch.float64) - 0.3
    y[:, H // 2] = 127
    weight = 0.5 + torch.rand(H, dtype=torch.float64)
    return y / weight * (0.1 + torch.rand(T, 1, dtype=torch.float64)), weight, 1e-6


def small_arguments(T: int, H: int) -> tuple:
    """Rows to which eps matters, whose scale is below what float16 has, and one whose scale is 0."""
    x = 1e-3 * torch.randn(T, H, dtype=torch.float64)
    x[1] = 0
    return x, torch.full((H,), 2.0**-14, dtype=torch.float64), 1e-6


def cases() -> Iterator[tuple[str, tuple]]:
    for T, H in ((1, 64), (33, 100), (5, 1), (3, 5000)):
        yield f"[{T}, {H}]", arguments(T, H)
    yield "no rows", arguments(0, 64)
    yield "small rows and one of zeros", small_arguments(9, 100)


def large(config: Qwen3Config, tokens: int) -> tuple:
    randn = partial(torch.randn, dtype=torch.float64)
    return randn(tokens, config.hidden_size), randn(config.hidden_size), 1e-6


def work(x: Tensor, weight: Tensor, eps: float) -> tuple[int, int]:
    return x.nbytes + weight.nbytes + 4 * len(x) + x.numel(), 8 * x.numel()


OPERATION = Operation(specification, cases, large, work)
