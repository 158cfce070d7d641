"""A GPU's arithmetic, modelled in numpy by what its makers document and others measured: sm_90, float32 results.

Functions and division err within their documented bounds, by how much is drawn from a seed and the operands' bits: the
same operands err the same way everywhere, as on a GPU; how errors spread within a bound is documented nowhere. Which
instruction a function becomes was read from the PTX of Triton 3.9 for sm_90. Bounds are those of the PTX ISA 9.1
(sections 9.7.3.8 div, 9.7.3.15 sqrt, 9.7.3.16 rsqrt, 9.7.3.21 ex2), and for log, sin and cos, which are libdevice's,
of the CUDA C++ programming guide, "Mathematical Functions", which found them by tests and does not guarantee them.

Products of float16, bfloat16 and TF32 numbers are summed as Hopper's tensor cores were found to do it (MMA-Sim,
arXiv:2511.10909, and its simulator of wgmma: 25 bits, TF32 by truncation): those of one instruction along K (16, of
TF32 8) and the accumulator are aligned to the largest exponent among them, a subnormal operand's being that of its
format's smallest normal number, cut two bits below float32's last, added exactly, and the sum is cut to float32.
Products of float32 with input_precision="ieee" are fused multiply-adds, one after another along K: for that order no
source was found.

Not modelled: the order of sums in tl.sum, multiplications and additions that the compiler fuses, other cards; that a
product with 0 may have an exponent above the others'.
"""

from collections.abc import Callable
from typing import Any

import numpy
from numpy import ndarray

LEAST = -126
"""The exponent of the smallest normal number of float32, and of bfloat16 and TF32."""

SMALLEST = 2.0**LEAST
"""That number; instructions with .ftz take and give 0 for what is smaller."""

FRACTION_BITS = 25
"""Bits below the largest exponent that survive the alignment in a tensor core."""


def ulps(n: float) -> Callable[[ndarray], ndarray]:
    """n from the correctly rounded result, as both documents count: half of one more from the exact one."""
    return lambda near: (n + 0.5) * numpy.spacing(abs(near))


def relative(bound: float) -> Callable[[ndarray], ndarray]:
    return lambda near: bound * abs(near.astype(numpy.float64))


def exp(x: ndarray) -> ndarray:
    """Triton's: the power of two of a product that is rounded to float32."""
    return numpy.exp2((x * numpy.float32(numpy.log2(numpy.e))).astype(numpy.float32).astype(numpy.float64))


APPROXIMATE: dict[str, tuple[Callable[..., ndarray], Callable[[ndarray], ndarray], bool]] = {
    "create_exp2": (numpy.exp2, ulps(2), True),  # ex2.approx.ftz.f32
    "create_exp": (exp, ulps(2), False),  # mul.f32, ex2.approx.f32
    "create_rsqrt": (lambda x: 1 / numpy.sqrt(x), relative(2**-22.9), True),  # rsqrt.approx.ftz.f32
    "create_sqrt": (numpy.sqrt, relative(2**-23), True),  # sqrt.approx.ftz.f32
    "create_fdiv": (numpy.divide, ulps(2), False),  # div.full.f32
    "create_log2": (numpy.log2, ulps(1), False),  # libdevice, as those below
    "create_log": (numpy.log, ulps(1), False),
    "create_sin": (numpy.sin, ulps(2), False),
    "create_cos": (numpy.cos, ulps(2), False),
}
"""By the interpreter's name: the result in float64, how far from it a GPU's may be, given that in float32, and .ftz."""


def noise(seed: int, *operands: ndarray) -> ndarray:
    """Numbers in [-1, 1) that depend on the seed and the float32 operands' bits (MurmurHash3's finalizer)."""
    state: Any = numpy.uint32(seed)
    for x in operands:
        state = state ^ x.view(numpy.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            state = (state ^ state >> shift) * numpy.uint32(factor)
        state = state ^ state >> 16
    return state / 2.0**31 - 1


def approximate(name: str, seed: int, *operands: ndarray) -> ndarray:
    """The operation of a name in APPROXIMATE on float32 operands of one shape, float32, within its bound.

    Of operands that are 0, and where the result is 0, infinite or NaN, there is no error.
    """
    function, bound, ftz = APPROXIMATE[name]
    operands = tuple(map(flush, operands)) if ftz else operands
    with numpy.errstate(all="ignore"):
        exact = function(*(x.astype(numpy.float64) for x in operands))
        near = exact.astype(numpy.float32)
        rounding = numpy.spacing(abs(near)) / 2  # which the bound includes
        off = exact + noise(seed, *operands) * numpy.maximum(bound(near) - rounding, 0)
        special = (operands[0] == 0) | (near == 0) | ~numpy.isfinite(near)
        result = numpy.where(special, near, off).astype(numpy.float32)
    return flush(result) if ftz else result


def flush(x: ndarray) -> ndarray:
    """Subnormal numbers to 0."""
    return numpy.where(abs(x) < SMALLEST, numpy.copysign(numpy.float32(0), x), x)


def fma_dot(a: ndarray, b: ndarray, d: ndarray) -> ndarray:
    """d + a b in float32, [..., M, K], [..., K, N] and [..., M, N]: fused multiply-adds, one after another along K."""
    a, b = a.astype(numpy.float64), b.astype(numpy.float64)
    for k in range(a.shape[-1]):
        d = (d + a[..., k, None] * b[..., k, None, :]).astype(numpy.float32)
    return d


def tensor_core_dot(a: ndarray, b: ndarray, d: ndarray, length: int, least: int = LEAST) -> ndarray:
    """d + a b, [..., M, K], [..., K, N] and float32 [..., M, N], ``length`` products along K at a time, to float32.

    least: the exponent of the smallest normal number of a's and b's format.
    """
    for k in range(0, a.shape[-1], length):
        d = fused_sum(a[..., k : k + length], b[..., k : k + length, :], d, least)
    return d


def fused_sum(a: ndarray, b: ndarray, d: ndarray, least: int) -> ndarray:
    """d + a b to float32 as one instruction of a tensor core: aligned, cut, added, cut."""
    exponents = exponent(a, least)[..., :, :, None] + exponent(b, least)[..., None, :, :]
    largest = numpy.maximum(exponents.max(-2), exponent(d))
    unit = numpy.ldexp(1.0, numpy.maximum(largest, -300) - FRACTION_BITS)
    with numpy.errstate(invalid="ignore", over="ignore"):
        products = a.astype(numpy.float64)[..., :, :, None] * b.astype(numpy.float64)[..., None, :, :]
        total = numpy.trunc(products / unit[..., None, :]).sum(-2) + numpy.trunc(d / unit)
        return cut(total * unit)


def exponent(x: ndarray, least: int = LEAST) -> ndarray:
    """e of x = m 2^e, 1 <= |m| < 2, at least ``least``; of 0 less than any other's."""
    return numpy.where(x == 0, -1000, numpy.maximum(numpy.frexp(x)[1] - 1, least))


def cut(x: ndarray) -> ndarray:
    """float64 to float32, towards 0."""
    near = x.astype(numpy.float32)
    return numpy.where(abs(near) > abs(x), numpy.nextafter(near, numpy.float32(0)), near)


def to_tf32(x: ndarray) -> ndarray:
    """float32 without its last 13 bits, as tensor cores read it; Triton passes it to them as it is."""
    return (x.view(numpy.uint32) & numpy.uint32(0xFFFFE000)).view(numpy.float32)
