"""interpreter.py: exact products and bfloat16 in every kernel that is interpreted; gpu.py: a GPU's arithmetic."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy
import pytest
import torch
import triton
import triton.language as tl
from tolerances import OPS_RATIO
from triton.runtime.interpreter import InterpreterBuilder

from qwen3core.kernels import launch
from qwen3core.laboratory import gpu, interpreter
from qwen3core.laboratory.interpreter import exact_dot, gpu_arithmetic, use_exact_arithmetic

if launch.INTERPRETED:
    use_exact_arithmetic()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinite and NaN are meant
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


@pytest.mark.parametrize("other", [{}, {"create_dot": lambda self, a, b: a}])
def test_another_interpreter_is_refused(other, monkeypatch):
    monkeypatch.delattr(InterpreterBuilder, "create_dot")
    for name, method in other.items():
        monkeypatch.setattr(InterpreterBuilder, name, method, raising=False)
    with pytest.raises(RuntimeError, match=r"Triton's InterpreterBuilder has no create_dot\(self, a, b, d, "):
        use_exact_arithmetic()


def test_twice_is_once():
    use_exact_arithmetic()
    before = dict(vars(InterpreterBuilder))
    use_exact_arithmetic()
    assert dict(vars(InterpreterBuilder)) == before


# bfloat16

SIZE = 4096


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def numbers(seed, dtype=torch.bfloat16):
    """Half of them normal random numbers, half random bits: all exponents, subnormal, infinite, NaN; one tie in 256."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (SIZE // 2,), generator=generator).short().view(torch.bfloat16)
    return torch.cat((torch.randn(SIZE // 2, generator=generator), bits.float())).to(dtype)


def same(found, expected):
    """Bit for bit; any NaN for NaN."""
    if found.dtype != expected.dtype or not expected.is_floating_point():
        return torch.equal(found, expected)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    return bool(((found.view(integer) == expected.view(integer)) | (found.isnan() & expected.isnan())).all())


@triton.jit
def elementwise(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "subtract":
        z = x - y
    elif OP == "multiply":
        z = x * y
    elif OP == "divide":
        z = x / y
    elif OP == "add a number":
        z = x + 0.1
    elif OP == "negative":
        z = -x
    elif OP == "absolute":
        z = tl.abs(x)
    elif OP == "less":
        z = (x < y).to(tl.bfloat16)
    elif OP == "less or equal":
        z = (x <= y).to(tl.bfloat16)
    elif OP == "greater":
        z = (x > y).to(tl.bfloat16)
    elif OP == "greater or equal":
        z = (x >= y).to(tl.bfloat16)
    elif OP == "equal":
        z = (x == y).to(tl.bfloat16)
    elif OP == "not equal":
        z = (x != y).to(tl.bfloat16)
    elif OP == "both":
        z = ((x < y) & (y > 0)).to(tl.bfloat16)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "maximum":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "minimum":
        z = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        z = tl.clamp(x, -0.5, 1.5, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "masked":
        z = tl.load(x_ptr + i, mask=i % 2 == 0, other=0.1)
    elif OP == "bits":
        z = (x.to(tl.int16, bitcast=True) ^ 1).to(tl.bfloat16, bitcast=True)
    elif OP == "moved":
        z = tl.trans(tl.join(x, y).reshape(64, SIZE // 32)).reshape(2 * SIZE).reshape(SIZE, 2)
        first, second = tl.split(z)
        first = tl.broadcast_to(first.reshape(1, SIZE), 1, SIZE).reshape(SIZE)
        z, _ = tl.split(tl.join(second, first).reshape(2, SIZE).trans())
    tl.store(out_ptr + i, z)


def moved(x, y):
    z = torch.stack((x, y), -1).reshape(64, -1).T.reshape(-1, 2)
    return z.flip(1).reshape(-1)[:SIZE]


ELEMENTWISE: dict[str, Callable] = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "add a number": lambda x, y: x + torch.tensor(0.1, dtype=x.dtype),
    "negative": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "less": torch.lt,
    "less or equal": torch.le,
    "greater": torch.gt,
    "greater or equal": torch.ge,
    "equal": torch.eq,
    "not equal": torch.ne,
    "both": lambda x, y: (x < y) & (y > 0),
    "where": lambda x, y: torch.where(x < y, x, y),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda x, y: x.clamp(-0.5, 1.5),
    "masked": lambda x, y: torch.where(torch.arange(SIZE) % 2 == 0, x, 0.1).to(x.dtype),
    "bits": lambda x, y: (x.view(torch.int16) ^ 1).view(x.dtype),
    "moved": moved,
}


def right(op):
    """Whether a bfloat16 kernel gives torch's bits."""
    x, y = numbers(0), numbers(1)
    y[::16] = x[::16]
    found = torch.empty_like(x)
    elementwise[(1,)](x, y, found, op, SIZE)
    return same(found, ELEMENTWISE[op](x, y).to(x.dtype))


@INTERPRETED
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_bfloat16_is_that_of_torch(op):
    assert right(op)


def cut(x):
    return (x.view(numpy.uint32) >> 16).astype(numpy.uint16)


def half_up(x):
    return ((x.view(numpy.uint32) + 0x8000) >> 16).astype(numpy.uint16)


@INTERPRETED
@pytest.mark.parametrize(
    ("op", "rounding"),
    [*itertools.product(("add", "subtract", "multiply", "add a number"), (cut, half_up)), ("divide", cut)],
)
def test_other_roundings_are_told_apart(op, rounding, monkeypatch):
    monkeypatch.setattr(interpreter, "to_bfloat16", rounding)
    assert not right(op)


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32, torch.int8, torch.uint8])
def test_casts_are_those_of_torch(dtype):
    narrow = numbers(0)
    if dtype.is_floating_point:
        wide = torch.randn(SIZE, dtype=torch.float64).mul(100).to(dtype)
        wide[:256] = 1 + torch.arange(256) * 2.0**-8  # ties
        wide[256:260] = torch.tensor([math.inf, -math.inf, math.nan, 0])
        wide[260:].view(torch.int8)[: wide.itemsize] = torch.tensor([*[-1] * (wide.itemsize - 1), 127])  # a NaN, too
    else:
        narrow = narrow.nan_to_num(0).clamp(*((0, 255) if dtype == torch.uint8 else (-128, 127)))
        info = torch.iinfo(dtype)
        wide = torch.randint(info.min, info.max, (SIZE,), dtype=dtype)
    found = torch.empty_like(wide), torch.empty_like(narrow)
    for x, out in zip((narrow, wide), found, strict=True):
        cast_kernel[(1,)](x, out, SIZE)
    assert same(found[0], narrow.to(dtype))
    assert same(found[1], wide.bfloat16())


@INTERPRETED
@pytest.mark.parametrize("patched", [True, False])
def test_casts_to_e4m3_round_as_a_gpu(patched, monkeypatch):
    """As torch, where it is finite; larger numbers to 448, the largest. Without the patch they do not."""
    x = torch.randn(SIZE) * 2.0 ** torch.randint(-12, 9, (SIZE,))
    x[:256] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * (1 + 2.0**-4)  # ties among them
    x[256:260] = torch.tensor([math.inf, -math.inf, math.nan, 460])
    if not patched:
        monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", InterpreterBuilder.create_fp_to_fp.__wrapped__)
    found = torch.empty(SIZE, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x, found, SIZE)
    expected = x.clamp(-448, 448).to(found.dtype)
    assert same(found.float(), expected.float()) == patched


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(z_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


def rounded(x):
    """A fraction rounded once to bfloat16, in the range of its normal numbers."""
    exponent = math.frexp(float(x))[1] - 8  # eight bits
    return math.ldexp(round(x / Fraction(2) ** exponent), exponent)


@INTERPRETED
def test_fma_rounds_once():
    x, y, z = (torch.randn(SIZE).bfloat16() for _ in range(3))
    x[:4] = y[:4] = 1 + 2**-4  # the product is half way between two bfloat16 numbers: what is added decides
    z[:4] = torch.tensor([2.0**-60, -(2.0**-60), 2.0**-30, 0])
    triples = zip(*(t.tolist() for t in (x, y, z)), strict=True)
    expected = [rounded(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in triples]
    fma_kernel[(1,)](x, y, z, SIZE)
    assert z.tolist() == expected
    x, y, z = (numbers(seed) for seed in range(3))
    exact = x.double() * y.double() + z.double()
    fma_kernel[(1,)](x, y, z, SIZE)
    assert torch.equal(z.isnan(), exact.isnan())
    assert torch.equal(z.isinf(), exact.bfloat16().isinf())


@triton.jit
def add_half(a, b):
    return a + b * 0.5


@triton.jit
def along_rows(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + at)
    if OP == "sum":
        tl.store(out_ptr + row, tl.sum(x, axis=1))
    elif OP == "max":
        tl.store(out_ptr + row, tl.max(x, axis=1))
    elif OP == "argmax":
        tl.store(out_ptr + row, tl.argmax(x, axis=1))
    elif OP == "own":
        tl.store(out_ptr + row, tl.reduce(x, 1, add_half))
    elif OP == "cumsum":
        tl.store(out_ptr + at, tl.cumsum(x, axis=1))
    elif OP == "reversed":
        tl.store(out_ptr + at, tl.cumsum(x, axis=1, reverse=True))
    elif OP == "cumprod":
        tl.store(out_ptr + at, tl.cumprod(x, axis=1))


def one_by_one(combine):
    """Columns combined from left to right, all intermediate results."""

    def run(x):
        results = [x[:, 0]]
        for column in x.unbind(1)[1:]:
            results.append(combine(results[-1], column))
        return torch.stack(results, 1)

    return run


ALONG_ROWS = {
    "sum": lambda x: one_by_one(torch.add)(x)[:, -1],
    "max": lambda x: x.amax(1),
    "argmax": lambda x: x.argmax(1).bfloat16(),
    "own": lambda x: one_by_one(lambda a, b: a + b * 0.5)(x)[:, -1],
    "cumsum": one_by_one(torch.add),
    "reversed": lambda x: one_by_one(torch.add)(x.flip(1)).flip(1),
    "cumprod": one_by_one(torch.mul),
}


@INTERPRETED
@pytest.mark.parametrize("op", ALONG_ROWS)
def test_reductions_and_scans_round_each_step(op):
    x = numbers(2)[:64].reshape(4, 16)
    expected = ALONG_ROWS[op](x)
    found = torch.empty_like(expected)
    along_rows[(1,)](x, found, op, *x.shape)
    assert same(found, expected)


@INTERPRETED
def test_products_of_bfloat16_are_exact_and_rounded_once():
    (a, b, _), _ = operands(numpy.float16)
    a, b = (torch.from_numpy(x).clamp(-256, 256).bfloat16() for x in (a, b))
    d = torch.randint(-(2**24), 2**24, (16, 32)).float()
    expected = (a.double() @ b.double() + d).float()
    dot_kernel[(1,)](a, b, d, a.shape, b.shape, d.shape, a.numel(), b.numel(), d.numel())
    assert torch.equal(d, expected)


@triton.jit
def uncovered(x_ptr, out_ptr, OP: tl.constexpr):
    i = tl.arange(0, 16)
    x = tl.load(x_ptr + i)
    if OP == "atomic_rmw":
        tl.atomic_add(out_ptr + i, x)
    elif OP == "cast of bf16 to fp8e5":
        tl.store(out_ptr + i, x.to(tl.float8e5).to(tl.float32))
    elif OP == "cast of fp32 to bf16":
        tl.store(out_ptr + i, x.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz"))
    elif OP == "make_tensor_descriptor with padding by NaN":
        block = tl.make_tensor_descriptor(x_ptr, [1, 15], [16, 1], [1, 16], padding_option="nan")
        tl.store(out_ptr + i, block.load([0, 0]).reshape(16))


@INTERPRETED
@pytest.mark.parametrize(
    "op", ["atomic_rmw", "cast of bf16 to fp8e5", "cast of fp32 to bf16", "make_tensor_descriptor with padding by NaN"]
)
def test_what_is_not_covered_is_refused(op):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=f"{op}.*: expected no bfloat16"):
        uncovered[(1,)](x, torch.zeros_like(x), op)


@triton.jit
def printing(x_ptr):
    tl.device_print("x", tl.load(x_ptr + tl.arange(0, 2)))


@INTERPRETED
def test_bfloat16_is_printed_as_numbers(capsys):
    printing[(1,)](torch.tensor([1.5, -2.0]).bfloat16())
    assert "[ 1.5 -2. ]" in capsys.readouterr().out


# A GPU's arithmetic


@triton.jit
def function(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    if OP == "exp2":
        z = tl.exp2(x)
    elif OP == "exp":
        z = tl.exp(x)
    elif OP == "log2":
        z = tl.log2(x)
    elif OP == "log":
        z = tl.log(x)
    elif OP == "sqrt":
        z = tl.sqrt(x)
    elif OP == "rsqrt":
        z = tl.rsqrt(x)
    elif OP == "sin":
        z = tl.sin(x)
    elif OP == "cos":
        z = tl.cos(x)
    elif OP == "divide":
        z = x / tl.load(y_ptr + i)
    tl.store(out_ptr + i, z)


def on_gpu(op, x, y, seed=0):
    """An operation of ``function`` in a GPU's arithmetic."""
    out = torch.empty_like(x)
    with gpu_arithmetic(seed):
        function[(1,)](x, y, out, op, len(x))
    return out


def ulps(n):
    """From the correctly rounded result."""
    return lambda x: (n + 0.5) * numpy.spacing(abs(x.float().numpy()))


FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "exp2": (torch.exp2, ulps(2)),
    "exp": (lambda x: torch.exp2((x.float() * math.log2(math.e)).double()), ulps(2)),
    "log2": (torch.log2, ulps(1)),
    "log": (torch.log, ulps(1)),
    "sqrt": (torch.sqrt, lambda x: 2**-23 * x.numpy()),
    "rsqrt": (torch.rsqrt, lambda x: 2**-22.9 * x.numpy()),
    "sin": (torch.sin, ulps(2)),
    "cos": (torch.cos, ulps(2)),
    "divide": (torch.divide, ulps(2)),
}


@INTERPRETED
@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions_err_up_to_their_bounds(op):
    x, y = torch.randn(2, SIZE).exp()
    exact, bound = FUNCTIONS[op]
    exact = exact(*(t.double() for t in ((x, y) if op == "divide" else (x,))))
    found = on_gpu(op, x, y)
    share = abs((found.double() - exact).numpy()) / bound(exact)
    assert 0.9 < share.max() <= 1
    if op not in ("sqrt", "rsqrt"):  # documented in units in the last place, all of which are reached
        off = abs((found.double() - exact.float().double()).numpy()) / numpy.spacing(abs(exact.float().numpy()))
        assert off.max() == bound(exact.new_ones(1)) / 2**-23 - 0.5
    assert (found != exact.float()).float().mean() > 0.1
    assert torch.equal(on_gpu(op, x, y), found)
    assert torch.equal(on_gpu(op, x.flip(0), y.flip(0)).flip(0), found)  # an error belongs to its operands
    assert not torch.equal(on_gpu(op, x, y, seed=1), found)


@INTERPRETED
@pytest.mark.parametrize(
    ("op", "special"),
    {
        "exp2": {0: 1, -math.inf: 0, math.inf: math.inf, -130: 0, 2.0**-130: 1},
        "exp": {0: 1, -math.inf: 0, math.inf: math.inf},
        "log2": {1: 0, 0: -math.inf},
        "rsqrt": {0: math.inf, math.inf: 0, 2.0**-130: math.inf},
        "sqrt": {0: 0, math.inf: math.inf},
        "divide": {0: 0, math.inf: math.inf},
    }.items(),
)
def test_special_values_have_no_error(op, special):
    x = torch.tensor([*special, *[math.nan] * (8 - len(special))])
    found = on_gpu(op, x, torch.full((8,), 3.0))
    assert found[: len(special)].tolist() == [*special.values()]
    assert found[len(special) :].isnan().all()


@triton.jit
def product(a_ptr, b_ptr, d_ptr, PRECISION: tl.constexpr, K: tl.constexpr):
    """d += a b; [16, K], [K, 16] and [16, 16], K a power of two."""
    row, column, k = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :], tl.arange(0, K)
    d = tl.load(d_ptr + row * 16 + column)
    a, b = tl.load(a_ptr + row * K + k[None, :]), tl.load(b_ptr + k[:, None] * 16 + column)
    tl.store(d_ptr + row * 16 + column, tl.dot(a, b, d, input_precision=PRECISION))


LENGTHS = [(torch.float16, 16), (torch.bfloat16, 16), (torch.float32, 8)]


def multiply(a, b, d, precision="ieee"):
    d = d.clone()
    with gpu_arithmetic(0):
        product[(1,)](a, b, d, precision, a.shape[1])
    return d


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("small", "expected"), [(2.0**-25, 1 + 3 * 2.0**-23), (2.0**-26, 1), (-(2.0**-26), 1), (-(2.0**-25), 1 - 2.0**-21)]
)
def test_a_tensor_core_cuts_what_is_far_below_the_largest(small, expected, dtype):
    """1 and 15 small products: of each only what reaches 2^-25 is added, and the sum is cut to float32."""
    a, b = torch.full((16, 16), 2.0**-12, dtype=dtype), torch.full((16, 16), small * 2.0**12, dtype=dtype)
    a[:, 0] = b[0] = 1
    assert (multiply(a, b, torch.zeros(16, 16)) == expected).all()
    a[:, 0] = 0
    assert (multiply(a, b, torch.ones(16, 16)) == expected).all()  # the accumulator is one of them


@INTERPRETED
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-24 + 2.0**-37)])
def test_a_subnormal_number_is_as_large_as_the_smallest_normal_one(dtype, expected):
    """Beside 2^-24, in float16 of the exponent -14, eight products of 2^-40 are cut; in bfloat16 it is normal."""
    a, b = torch.zeros(2, 16, 16, dtype=dtype)
    a[:, 0], b[0] = 2.0**-24, 1
    a[:, 1:9] = b[1:9] = 2.0**-20
    assert (multiply(a, b, torch.zeros(16, 16)) == expected).all()


@INTERPRETED
def test_a_tensor_core_cuts_the_accumulator_and_not_what_is_small_beside_zero():
    a, b = torch.zeros(2, 16, 16).half()
    a[:, 0] = b[0] = 1
    assert (multiply(a, b, torch.full((16, 16), -(2.0**-26))) == 1).all()
    assert (multiply(a * 2.0**-20, b * 2.0**-20, torch.zeros(16, 16)) == 2.0**-40).all()


@INTERPRETED
@pytest.mark.parametrize(("dtype", "length"), LENGTHS)
def test_a_tensor_core_cuts_after_so_many_products(dtype, length):
    """1, length - 1 times 2^-25, cut to less than the sum, and one more 2^-25, lost: together they would count."""
    a, b = torch.full((16, 2 * length), 2.0**-12, dtype=dtype), torch.full((2 * length, 16), 2.0**-13, dtype=dtype)
    a[:, 0] = b[0] = 1
    b[length + 1 :] = 0
    expected = 1 + length // 4 * 2.0**-23 - 2.0**-23
    assert (multiply(a, b, torch.zeros(16, 16), "tf32") == expected).all()


@INTERPRETED
@pytest.mark.parametrize(("dtype", "length"), LENGTHS)
def test_tensor_cores_err_within_their_bound(dtype, length):
    """Each instruction along K: length + 1 addends cut at 2^-25 of the largest, and a sum cut at 2^-23 of itself."""
    a, b, d = torch.randn(16, 64), torch.randn(64, 16), torch.randn(16, 16)
    if dtype == torch.float32:
        a, b = (torch.from_numpy(gpu.to_tf32(x.numpy())) for x in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    exact, bound = d.double(), 0.0
    for k in range(0, 64, length):
        parts = torch.cat((a.double()[:, k : k + length, None] * b.double()[k : k + length], exact[:, None]), 1)
        exact = parts.sum(1)
        bound = bound + (length + 1) * 2**-25 * parts.abs().amax(1) + 2**-23 * exact.abs() + 2**-40
    error = (multiply(a, b, d, "tf32").double() - exact).abs()
    assert (error <= bound).all()
    assert (error > 2**-25 * exact.abs()).float().mean() > 0.2  # more than a rounding would give


@INTERPRETED
def test_tf32_only_where_it_is_allowed():
    a, b, d = torch.full((16, 16), 1 + 2.0**-11), torch.ones(16, 16), torch.zeros(16, 16)
    assert (multiply(a, b, d, "tf32") == 16).all()
    assert (multiply(b, a, d, "tf32") == 16).all()
    assert (multiply(a, b, d, "ieee") == 16 + 2.0**-7).all()
    product[(1,)](a, b, d, "tf32", 16)
    assert (d == 16 + 2.0**-7).all()  # the interpreter alone does not round
    with pytest.raises(Exception, match=r"gpu_arithmetic: tl.dot of fp32 to fp32, .*TF32x3"):
        multiply(a, b, d, "tf32x3")


@INTERPRETED
def test_float32_products_are_added_in_order():
    (a, b, _), _ = operands(numpy.float16)
    a, b, d = a.astype(numpy.float32), b[:, :16].astype(numpy.float32), numpy.ones((16, 16), numpy.float32)
    a[:, :32] *= 2.0**12  # sums round; products do not
    found = multiply(*map(torch.from_numpy, (a, b, d))).numpy()
    assert numpy.array_equal(found, in_order(numpy.float32)(a, b, d))
    assert not numpy.array_equal(found, exact_dot(a, b, d))


@INTERPRETED
def test_the_mode_ends_and_is_not_undone_within():
    a, b, d = torch.randn(16, 64).half(), torch.randn(64, 16).half(), torch.zeros(16, 16)
    found, within = multiply(a, b, d), d.clone()
    with gpu_arithmetic(0):
        use_exact_arithmetic()
        product[(1,)](a, b, within, "ieee", 64)
    product[(1,)](a, b, d, "ieee", 64)
    assert torch.equal(within, found)
    assert not torch.equal(d, found)
