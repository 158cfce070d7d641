"""Products of Triton's interpreter as these tests define them, so that no BLAS decides what a kernel test proves.

``tl.dot(a, b, d)`` is interpreted by numpy.matmul in d's dtype: the order of its sums, and so the error, is that of the
BLAS that numpy brings and of the kernel that it picks for the CPU. Here it is d + a b, summed in float64 and rounded
once to d's dtype: a product of two float32 or float16 numbers is exact in float64, and a float64 sum of some hundred of
them, in any order, is 2^-29 times finer than float32. So numpy.einsum serves, which calls no BLAS, though the order of
its sums is its own: another order would change the last bit of a float32 result about once in 10^8.
"""

import inspect
from typing import Any

import numpy
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

ARGUMENTS = ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"]
"""The arguments of InterpreterBuilder.create_dot in triton 3.4 to 3.9."""


def exact_dot(a: numpy.ndarray, b: numpy.ndarray, d: numpy.ndarray) -> numpy.ndarray:
    """d + a b; [..., M, K], [..., K, N] and [..., M, N] floats to [..., M, N] in d's dtype."""
    product = numpy.einsum("...mk,...kn->...mn", a.astype(numpy.float64), b.astype(numpy.float64), optimize=False)
    return (product + d).astype(d.dtype)


def use_exact_dot(builder: Any = InterpreterBuilder) -> None:
    """Let the interpreter multiply by ``exact_dot`` from now on. Raises RuntimeError where triton is built otherwise.

    Integers (and with them the formats that numpy does not know, which are stored as integers) stay as they were.
    """
    original = getattr(builder, "create_dot", None)
    if original is None or [*inspect.signature(original).parameters] != ARGUMENTS:
        raise RuntimeError(
            f"Triton's interpreter has no create_dot({', '.join(ARGUMENTS)}): adapt qwen3core/laboratory/interpreter.py"
        )

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if not all(numpy.issubdtype(x.data.dtype, numpy.floating) for x in (a, b, d)):
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(exact_dot(a.data, b.data, d.data), d.dtype.scalar)

    builder.create_dot = create_dot
