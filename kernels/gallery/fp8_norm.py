"""RMSNorm whose rows come out in fp8 (e4m3), each with its scale, as a product of fp8 wants them. Forward only.

    y = cast(w * cast(x * r))            r = 1 / sqrt(mean(x^2) + eps), per row
    s = max |y| / 448                    q = e4m3(y / s)                         448: e4m3's largest number

The kernel and its bytes are those of int8_norm.py; q is rounded to nearest, ties to even. It has 4 bits of small
numbers as of large ones, where int8 has fewer of small ones. From sm_89 on: sm_80 has no e4m3, gfx942 another one.
Sources: the format, arXiv:2209.05433; a scale per token as in DeepSeek-V3, arXiv:2412.19437, there per 128 numbers.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen3core import reference
from qwen3core.laboratory.operations import Operation

from .int8_norm import CONFIGS, large, quantized_norm, small_arguments, work


def fp8_norm(x: Tensor, weight: Tensor, eps: float, *, config: Sequence[int] = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """x [T, H], rows strided at will, and weight [H], one dtype: (q [T, H] float8_e4m3fn, s [T] float32).

    Raises InputError.
    """
    return quantized_norm("fp8_norm", x, weight, eps, torch.float8_e4m3fn, 448, config)


def specification(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = reference.rms_norm(x, weight, eps)
    scale = (y.abs().amax(-1).float() / 448).clamp(min=1e-30)
    return (y.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def arguments(T: int, H: int) -> tuple:
    """Rows whose y / s is nowhere near a tie, which a last bit of float32 would decide."""
    bits = torch.randint(0, 127, (T, H), dtype=torch.uint8) + 128 * torch.randint(0, 2, (T, H), dtype=torch.uint8)
    y = bits.view(torch.float8_e4m3fn).double() * (1 + 0.02 * torch.rand(T, H, dtype=torch.float64) - 0.01)
    y = y.clamp(-448, 448)
    y[:, H // 2] = 448
    weight = 0.5 + torch.rand(H, dtype=torch.float64)
    return y / weight * (0.1 + torch.rand(T, 1, dtype=torch.float64)) / 448, weight, 1e-6


def cases() -> Iterator[tuple[str, tuple]]:
    for T, H in ((1, 64), (33, 100), (5, 1), (3, 5000)):
        yield f"[{T}, {H}]", arguments(T, H)
    yield "no rows", arguments(0, 64)
    yield "small rows and one of zeros", small_arguments(9, 100)


OPERATION = Operation(specification, cases, large, work)
