"""interpreter.py: exact products, rounded once, in every kernel that is interpreted."""

import math

import numpy
import pytest
import torch
import triton
import triton.language as tl
from tolerances import OPS_RATIO

from qwen3core.kernels import launch
from qwen3core.laboratory.interpreter import exact_dot, use_exact_dot

if launch.INTERPRETED:
    use_exact_dot()

INTERPRETED = pytest.mark.skipif(not launch.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")


def operands(dtype, *batch):
    """(a, b, d) whose sums round on the way in any float32 order, and their exact result, rounded once."""
    generator = numpy.random.default_rng(0)
    limit = 2**11 if dtype == numpy.float16 else 2**20  # whole numbers that the dtype holds
    a, b = (generator.integers(-limit, limit, (*batch, *shape)).astype(dtype) for shape in ((16, 64), (64, 32)))
    d = generator.integers(-(2**24), 2**24, (*batch, 16, 32)).astype(numpy.float32)
    sums = numpy.empty(d.shape)
    for *n, i, j in numpy.ndindex(d.shape):
        products = a[(*n, i)].astype(float) * b[(*n, slice(None), j)].astype(float)
        sums[(*n, i, j)] = math.fsum([*products, float(d[(*n, i, j)])])
    return (a, b, d), sums.astype(numpy.float32)


def in_order(dtype):
    """A product that rounds every sum to a dtype, in ascending order."""

    def dot(a, b, d):
        total = d.astype(dtype)
        for k in range(a.shape[-1]):
            total = total + (a[..., :, k, None].astype(dtype) * b[..., k, None, :].astype(dtype))
        return total.astype(d.dtype)

    return dot


def truncated(a, b, d):
    """The exact sum, cut to float32 in place of rounded."""
    wide = exact_dot(a, b, d.astype(numpy.float64))
    near = wide.astype(numpy.float32)
    return numpy.where(abs(near) > abs(wide), numpy.nextafter(near, numpy.float32(0)), near)


def rounded_twice(a, b, d):
    return exact_dot(a, b, numpy.zeros_like(d)) + d


@pytest.mark.parametrize("batch", [(), (3,)], ids=["2-d", "3-d"])
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16])
def test_products_are_exact_and_rounded_once(dtype, batch):
    (a, b, d), expected = operands(dtype, *batch)
    found = exact_dot(a, b, d)
    assert found.dtype == numpy.float32
    assert numpy.array_equal(found, expected)
    assert numpy.array_equal(exact_dot(a[..., ::-1], b[..., ::-1, :], d), expected)  # whatever the order


@pytest.mark.parametrize("wrong", [in_order(numpy.float32), in_order(numpy.float16), truncated, rounded_twice])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_other_arithmetic_is_told_apart(wrong):
    arguments, expected = operands(numpy.float32)
    assert not numpy.array_equal(wrong(*arguments), expected)


def test_float16_accumulator_is_rounded_to_float16():
    a, b, d = numpy.full((1, 2), 1, numpy.float16), numpy.full((2, 1), 2**-12, numpy.float16), numpy.ones((1, 1))
    assert exact_dot(a, b, d.astype(numpy.float16)) == 1  # half of the last bit, to even
    assert exact_dot(a, b, d.astype(numpy.float32)) == 1 + 2**-11


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SHAPE_A: tl.constexpr, SHAPE_B: tl.constexpr, SHAPE_OUT: tl.constexpr,
               SIZE_A: tl.constexpr, SIZE_B: tl.constexpr, SIZE_OUT: tl.constexpr):  # fmt: skip
    a = tl.load(a_ptr + tl.arange(0, SIZE_A)).reshape(SHAPE_A)
    b = tl.load(b_ptr + tl.arange(0, SIZE_B)).reshape(SHAPE_B)
    d = tl.load(out_ptr + tl.arange(0, SIZE_OUT)).reshape(SHAPE_OUT)
    d = tl.dot(a, b, d, input_precision="ieee")
    tl.store(out_ptr + tl.arange(0, SIZE_OUT), d.reshape([SIZE_OUT]))


@INTERPRETED
@pytest.mark.parametrize("batch", [(), (2,)], ids=["2-d", "3-d"])
@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16])
def test_kernels_multiply_by_it(dtype, batch):
    arrays, expected = operands(dtype, *batch)
    tensors = [torch.from_numpy(x.copy()) for x in arrays]
    dot_kernel[(1,)](*tensors, *(tuple(x.shape) for x in tensors), *(x.numel() for x in tensors))
    assert numpy.array_equal(tensors[2].numpy(), expected)


@triton.jit
def long_product(a_ptr, b_ptr, out_ptr, K, ACCUMULATOR: tl.constexpr):
    """[16, K] by [K, 16] in steps of 16."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    acc = tl.zeros((16, 16), ACCUMULATOR)
    for k in range(0, K, 16):
        a = tl.load(a_ptr + row * K + k + column)
        b = tl.load(b_ptr + (k + row) * 16 + column)
        acc = tl.dot(a, b, acc, out_dtype=ACCUMULATOR, input_precision="ieee")
    tl.store(out_ptr + row * 16 + column, acc)


@INTERPRETED
@pytest.mark.parametrize(("accumulator", "right"), [(tl.float32, True), (tl.float16, False)])
def test_the_rule_for_kernels_sees_a_float16_accumulator(accumulator, right):
    torch.manual_seed(0)
    a, b = torch.randn(16, 512).half(), torch.randn(512, 16).half()
    found = torch.empty(16, 16, dtype=torch.float16)
    long_product[(1,)](a, b, found, 512, accumulator)
    exact = a.double() @ b.double()
    error, plain = ((x.double() - exact).norm() for x in (found, exact.half()))
    assert (error <= OPS_RATIO * plain) == right


@pytest.mark.parametrize("builder", [type("Renamed", (), {}), type("Other", (), {"create_dot": lambda self, a, b: a})])
def test_another_interpreter_is_refused(builder):
    with pytest.raises(RuntimeError, match="Triton's interpreter has no create_dot"):
        use_exact_dot(builder)
