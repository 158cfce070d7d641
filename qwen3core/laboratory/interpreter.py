"""Triton's interpreter made right: bfloat16, products that no BLAS decides, and a GPU's arithmetic as a mode.

    use_exact_arithmetic()       # from now on, for every kernel that is interpreted; launchers then take bfloat16
    with gpu_arithmetic(seed=0): # within, approximations and tensor cores as gpu.py models them

**bfloat16.** The interpreter keeps its values as their bits, in numpy.uint16, and computes with those as if they were
whole numbers. Here every operation that computes gets them as float32, and its result is rounded to nearest, ties to
even, as a GPU does; what only moves values is left alone; any other operation that meets bfloat16 raises
NotImplementedError. The second rounding of a sum, difference, product or cast changes nothing, since float32 has more
than twice the digits of bfloat16 and the same exponents; fma, where it would, is summed exactly.

**Products.** ``tl.dot(a, b, d)`` is interpreted by numpy.matmul in d's dtype: the order of its sums, and so the error,
is that of the BLAS that numpy brings and of the kernel that it picks for the CPU. Here it is d + a b, summed in float64
and rounded once to d's dtype: a product of two numbers of at most 24 bits is exact in float64, and a float64 sum of
some hundred of them, in any order, is 2^-29 times finer than float32. So numpy.einsum serves, which calls no BLAS,
though the order of its sums is its own: another order would change the last bit of a float32 result about once in 10^8.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import numpy
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from ..kernels import launch
from . import gpu

BUILT: dict[type, dict[str, list[str]]] = {
    InterpreterBuilder: {
        "create_dot": ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"],
        "create_fma": ["self", "x", "y", "z"],
        "create_fp_trunc": ["self", "src", "dst_type"],
        "create_fp_to_fp": ["self", "src", "dst_type", "rounding_mode"],
        "create_print": ["self", "prefix", "hex", "values", "isSigned"],
    },
    ReduceOps: {"apply_impl": ["self", "input"], "generic_reduce": ["self", "input"]},
    ScanOps: {"cumsum": ["self", "input"], "cumprod": ["self", "input"], "generic_scan": ["self", "input"]},
}
"""What the patch relies on, with its arguments; so it is in triton 3.4 to 3.9."""

COMPUTE = {"fadd", "fsub", "fmul", "fneg", "minimumf", "minnumf", "maximumf", "maxnumf", "clampf"} | {
    f"fcmp{order}{relation}" for order in "OU" for relation in ("EQ", "NE", "LT", "LE", "GT", "GE")
}
"""Operations of floats that Triton lets bfloat16 into, by the builder's names after "create_"; division and functions
are float32 by its rules."""

CASTS = {"fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp"}  # to whole numbers Triton casts by way of float32

PAD = {"make_tensor_descriptor", "tensor_pointer_load"}
"""Where loads beyond a tensor's end may be asked to give NaN, which the interpreter makes a 0 of bfloat16."""

MOVE = {
    "load", "store", "masked_load", "masked_store", "atomic_load", "atomic_store",
    "descriptor_load", "descriptor_store", "descriptor_gather", "descriptor_scatter", "bitcast", "fabs", "select",
    "reshape", "trans", "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat", "gather",
}  # fmt: skip
"""Operations that are right on the bits: they move values, choose between them, or drop the sign."""


def to_float32(bits: numpy.ndarray) -> numpy.ndarray:
    """bfloat16, as its bits in uint16, to float32, exactly."""
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def to_bfloat16(x: numpy.ndarray) -> numpy.ndarray:
    """float32 to the bits of bfloat16, uint16, rounded to nearest, ties to even; NaN to the quiet NaN."""
    bits = x.view(numpy.uint32)
    return numpy.where(numpy.isnan(x), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)


def to_e4m3(x: numpy.ndarray) -> numpy.ndarray:
    """float32 to the bits of e4m3, uint8, to nearest, ties to even, at most 448, as cvt.rn.satfinite; NaN stays NaN."""
    rounded = torch.from_numpy(numpy.ascontiguousarray(x)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).numpy()


def to_odd(x: numpy.ndarray, lost: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """x + lost to a dtype, inexact results to the neighbour whose last bit is 1: rounding that once more is right.

    lost is less than half of x's last bit. Source: Boldo and Melquiond, "When double rounding is odd", 2004.
    """
    near = x.astype(dtype)
    rest = (x - near) + lost
    even = near.view(numpy.dtype(f"u{near.itemsize}")) & 1 == 0
    return numpy.where((rest != 0) & even, numpy.nextafter(near, numpy.copysign(numpy.inf, rest).astype(dtype)), near)


def exact_fma(x: numpy.ndarray, y: numpy.ndarray, z: numpy.ndarray) -> numpy.ndarray:
    """x y + z of bfloat16 numbers in float32, to float32 such that rounding it to bfloat16 rounds once."""
    product, z = x.astype(numpy.float64) * y, z.astype(numpy.float64)  # exact: 16 bits
    total = product + z
    lost = (product - (total - (total - product))) + (z - (total - product))  # exact: Knuth's TwoSum
    return to_odd(to_odd(total, lost, numpy.float64), numpy.zeros(()), numpy.float32)


def exact_dot(a: numpy.ndarray, b: numpy.ndarray, d: numpy.ndarray) -> numpy.ndarray:
    """d + a b; [..., M, K], [..., K, N] and [..., M, N] floats to [..., M, N] in d's dtype."""
    product = numpy.einsum("...mk,...kn->...mn", a.astype(numpy.float64), b.astype(numpy.float64), optimize=False)
    return (product + d).astype(d.dtype)


def is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def widen(x: Any) -> Any:
    """Handles of bfloat16 as handles of float32; anything else as it is."""
    return TensorHandle(to_float32(x.data), tl.float32) if is_bfloat16(x) else x


def narrow(data: numpy.ndarray) -> TensorHandle:
    return TensorHandle(to_bfloat16(data.astype(numpy.float32, copy=False)), tl.bfloat16)


def unsupported(name: str) -> NotImplementedError:
    return NotImplementedError(f"{name}: expected no bfloat16: not among what laboratory/interpreter.py makes right")


def compute(original: Callable) -> Callable:
    """A builder's operation, computed in float32 where it gets bfloat16; comparisons give int1."""

    def operation(self: Any, *args: Any) -> TensorHandle:
        if not any(map(is_bfloat16, args)):
            return original(self, *args)
        data = original(self, *map(widen, args)).data
        return TensorHandle(data, tl.int1) if data.dtype == numpy.bool_ else narrow(data)

    return operation


def cast(original: Callable) -> Callable:
    """A builder's cast, from and to bfloat16 by way of float32, as torch casts."""

    def operation(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return narrow(widen(src).data)
        return original(self, widen(src), dst_type)

    return operation


def refuse(name: str, original: Callable) -> Callable:
    """A builder's operation that must not meet bfloat16."""

    def operation(self: Any, *args: Any, **options: Any) -> Any:
        if any(map(is_bfloat16, args)):
            raise unsupported(name)
        return original(self, *args, **options)

    return operation


def pad(name: str, original: Callable) -> Callable:
    """A builder's operation that must not fill up bfloat16 with NaN."""

    def operation(self: Any, base: Any, *args: Any, **options: Any) -> Any:
        pointer = getattr(base, "base", base)
        if ir.PADDING_OPTION.PAD_NAN in (*args, *options.values()) and pointer.get_element_ty() == tl.bfloat16:
            raise unsupported(f"{name} with padding by NaN")
        return original(self, base, *args, **options)

    return operation


def fma(original: Callable) -> Callable:
    def operation(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not is_bfloat16(z):
            return original(self, x, y, z)
        return narrow(exact_fma(*(widen(handle).data for handle in (x, y, z))))

    return operation


def fp_to_fp(original: Callable) -> Callable:
    """Between float16 and bfloat16; float32 to e4m3, for which the interpreter rounds halves up and drops carries.

    Other 8-bit formats, and roundings but to nearest, are refused with bfloat16.
    """

    def operation(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        types = {src.dtype.scalar, dst_type.scalar}
        found = src.dtype.scalar, dst_type.scalar, rounding_mode
        if found == (tl.float32, tl.float8e4nv, ir.ROUNDING_MODE.RTNE):
            return TensorHandle(to_e4m3(src.data), tl.float8e4nv)
        if tl.bfloat16 not in types:
            return original(self, src, dst_type, rounding_mode)
        if types != {tl.bfloat16, tl.float16}:
            raise unsupported(f"cast of {src.dtype.scalar} to {dst_type.scalar}, {rounding_mode}")
        return self.create_fp_trunc(self.create_fp_ext(src, tl.float32), dst_type)

    return operation


def print_(original: Callable) -> Callable:
    def operation(self: Any, prefix: str, hex: bool, values: list, isSigned: Any) -> None:
        original(self, prefix, hex, [*map(widen, values)], isSigned)

    return operation


def dot(original: Callable) -> Callable:
    """Products by ``exact_dot``. Integers, and formats that are stored as integers, stay as they were."""

    def operation(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
        a, b = widen(a), widen(b)
        if not all(numpy.issubdtype(x.data.dtype, numpy.floating) for x in (a, b, d)):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(exact_dot(a.data, b.data, d.data), d.dtype.scalar)

    return operation


def reduce(original: Callable) -> Callable:
    """Reductions with bfloat16 go from element to element and round each time; a GPU does so in another order."""

    def apply_impl(self: Any, input: Any) -> Any:
        return self.generic_reduce(input) if any(is_bfloat16(x.handle) for x in input) else original(self, input)

    return apply_impl


def scan(original: Callable) -> Callable:
    """The same for scans."""

    def cumulate(self: Any, input: Any) -> Any:
        return self.generic_scan([input]) if is_bfloat16(input.handle) else original(self, input)

    return cumulate


REPLACED: dict[str, Callable] = {
    "dot": dot, "fma": fma, "fp_to_fp": fp_to_fp, "print": print_,
    **dict.fromkeys(COMPUTE, compute), **dict.fromkeys(CASTS, cast), **{name: partial(pad, name) for name in PAD},
}  # fmt: skip


def use_exact_arithmetic() -> None:
    """Let the interpreter be right in bfloat16 and multiply by ``exact_dot`` from now on; launchers take bfloat16.

    Called again, it does nothing. Raises RuntimeError where triton is built otherwise.
    """
    for owner, methods in BUILT.items():
        for name, arguments in methods.items():
            if [*inspect.signature(getattr(owner, name, lambda: None)).parameters] != arguments:
                found = f"{owner.__name__} has no {name}({', '.join(arguments)})"
                raise RuntimeError(f"Triton's {found}: adapt qwen3core/laboratory/interpreter.py")
    for method in dir(InterpreterBuilder):
        name = method.removeprefix("create_")
        if name != method and name not in MOVE:
            replace(InterpreterBuilder, method, REPLACED.get(name, partial(refuse, name)))
    if not hasattr(InterpreterBuilder, "get_bf16"):  # of constants beside bfloat16, in triton 3.4 to 3.6
        InterpreterBuilder.get_bf16 = lambda self, value: self.create_fp_trunc(self.get_fp32(value), tl.bfloat16)
    replace(ReduceOps, "apply_impl", reduce)
    replace(ScanOps, "cumsum", scan)
    replace(ScanOps, "cumprod", scan)
    launch.BFLOAT16_INTERPRETED = True


def replace(owner: type, name: str, replacement: Callable[[Callable], Callable]) -> None:
    """Replace a method, once."""
    original = getattr(owner, name)
    if not hasattr(original, "__wrapped__"):
        setattr(owner, name, wraps(original)(replacement(original)))


@contextmanager
def gpu_arithmetic(seed: int) -> Iterator[None]:
    """Within, interpreted kernels compute as gpu.py models a GPU; another seed errs otherwise within the same bounds.

    Products that are not modelled (8-bit floats, other accumulators than float32, tf32x3) raise NotImplementedError.
    """
    use_exact_arithmetic()
    before = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", *gpu.APPROXIMATE)}
    for name in gpu.APPROXIMATE:
        setattr(InterpreterBuilder, name, approximate(name, seed, before[name]))
    InterpreterBuilder.create_dot = modelled_dot(before["create_dot"])
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(InterpreterBuilder, name, method)


def approximate(name: str, seed: int, original: Callable) -> Callable:
    def operation(self: Any, *operands: TensorHandle) -> TensorHandle:
        if any(x.data.dtype != numpy.float32 for x in operands):
            return original(self, *operands)
        return TensorHandle(gpu.approximate(name, seed, *(x.data for x in operands)), tl.float32)

    return operation


def modelled_dot(original: Callable) -> Callable:
    @wraps(original)  # so that use_exact_arithmetic leaves it alone
    def operation(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> TensorHandle:
        dtype, x, y, z = a.dtype.scalar, widen(a).data, widen(b).data, d.data
        if dtype.is_int():
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        if d.dtype.scalar == tl.float32 and dtype in (tl.float16, tl.bfloat16):
            data = gpu.tensor_core_dot(x, y, z, 16, -14 if dtype == tl.float16 else gpu.LEAST)
        elif dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.IEEE:
            data = gpu.fma_dot(x, y, z)
        elif dtype == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            data = gpu.tensor_core_dot(gpu.to_tf32(x), gpu.to_tf32(y), z, 8)
        else:
            raise NotImplementedError(f"gpu_arithmetic: tl.dot of {dtype} to {d.dtype.scalar}, {input_precision}")
        return TensorHandle(data, tl.float32)

    return operation
