"""Offsets beyond 2^31, which 32 bits do not hold, in every kernel: tensors of more numbers than that.

They are sparse files, of which only the programs of the last rows are run, in Triton's interpreter. Every address that
these read or write must lie in one of the tensors, and what they give must be what the last rows give alone, bit for
bit.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from triton.runtime import interpreter

from qwen3core.kernels import launch, qk_norm_rope, rms_norm
from qwen3core.kernels.attention import attention, attention_backward
from qwen3core.kernels.pooling import norm_pool, norm_score
from qwen3core.kernels.swiglu import swiglu, swiglu_backward
from qwen3core.laboratory.interpreter import use_exact_arithmetic

if launch.INTERPRETED:
    use_exact_arithmetic()

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")

EPS, DTYPE, BEYOND = 1e-6, torch.float16, 2**31


class Case(NamedTuple):
    run: Callable[..., Any]
    """(cu_seqlens, tensors of T rows, tensors of one size) to what is compared."""
    rows: list[tuple[int, ...]]
    """The shape of a row of each tensor of T rows."""
    other: list[tuple[int, ...]]
    ends: Callable[[int, int], torch.Tensor]
    """(T, tail) to cu_seqlens."""
    tail: int = 5
    """As many last rows are compared."""


def cu(*ends: int) -> torch.Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def two(T: int, tail: int) -> torch.Tensor:
    return cu(T - tail, T) if tail < T else cu(T)


def one(T: int, tail: int) -> torch.Tensor:
    return cu(T)


def single_rows(T: int, tail: int) -> torch.Tensor:
    return torch.arange(T + 1, dtype=torch.int32)


def rotate(_: Any, q: Any, k: Any, cos: Any, sin: Any, a: Any, b: Any) -> Any:
    return qk_norm_rope.qk_norm_rope(q, k, a, b, EPS, cos, sin, config=(64, 8))


def rotate_back(_: Any, dq: Any, dk: Any, q: Any, k: Any, cos: Any, sin: Any, a: Any, b: Any) -> Any:
    return qk_norm_rope.qk_norm_rope_backward(dq, dk, q, k, a, b, EPS, cos, sin, [])[:2]


def attend_back(ends: Any, q: Any, k: Any, v: Any, dout: Any) -> Any:
    """With out = 0, so that each kernel alone gives the right result, whatever tiles of the other were run."""
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return attention_backward(dout, lse, q, k, v, torch.empty_like(q), lse, ends, ends, True, [], [])


WIDTH, INNER, HEAD = (1024,), (12288,), (1, 128)
CASES = {
    "rms_norm": Case(lambda _, x, w: rms_norm.rms_norm(x, w, EPS), [WIDTH], [WIDTH], one),
    "add_rms_norm": Case(lambda _, x, r, w: rms_norm.add_rms_norm(x, w, EPS, r), [WIDTH, WIDTH], [WIDTH], one),
    "rms_norm_backward": Case(
        lambda _, dy, ds, x, w: rms_norm.rms_norm_backward(dy, ds, x, w, EPS, [])[:1], [WIDTH] * 3, [WIDTH], one
    ),
    "qk_norm_rope": Case(rotate, [HEAD, HEAD, (128,), (128,)], [(128,), (128,)], one),
    "qk_norm_rope_backward": Case(rotate_back, [(16, 128)] * 4 + [(128,)] * 2, [(128,), (128,)], one),
    "swiglu": Case(lambda _, gate, up: swiglu(gate, up), [INNER, INNER], [], one),
    "swiglu_backward": Case(lambda _, *tensors: swiglu_backward(*tensors), [INNER] * 3, [], one),
    "norm_pool": Case(lambda ends, x, w: norm_pool(x, w, EPS, ends, 1024, True), [WIDTH], [WIDTH], single_rows),
    "norm_pool mean": Case(
        lambda ends, x, w: norm_pool(x, w, EPS, ends, 9, True, mean=True)[-1:], [WIDTH], [WIDTH], two
    ),
    "norm_score": Case(lambda ends, x, w: norm_score(x, w, EPS, ends, w.float())[-1:], [WIDTH], [WIDTH], two),
    "attention": Case(
        lambda ends, q, k, v: attention(q, k, v, ends, ends, 1, 1, return_lse=True), [HEAD] * 3, [], two, 70
    ),
    "attention_backward, two sequences": Case(attend_back, [HEAD] * 4, [], two, 70),
    "attention_backward, one": Case(lambda *args: attend_back(*args)[1:], [HEAD] * 4, [], one, 128),
}


def results(case: Case, T: int, tensors: list[torch.Tensor], other: list[torch.Tensor]) -> list[torch.Tensor]:
    out = case.run(case.ends(T, case.tail), *tensors, *other)
    return [x[-case.tail :] for x in ([out] if isinstance(out, torch.Tensor) else out)]


def check_addresses(patch):
    """Every address that is read or written must lie in a tensor that the kernel was launched with."""
    ranges: list[Any] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def known(self, args, kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize) for x in tensors]
        return arguments(self, args, kwargs)

    def inside(pointers, mask):
        at = numpy.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(numpy.int64)
        ends = (int(at.min()), int(at.max())) if at.size else ()
        assert all(any(low <= end < high for low, high in ranges) for end in ends), f"addresses {ends} beyond {ranges}"

    def checked_load(self, pointers, mask, *rest):
        inside(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        inside(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(executor, "_init_args_hst", known)
    patch.setattr(executor, "_restore_args_dev", lambda *args: None)  # it would write all of it
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)


def allocate(patch, make):
    """Let launchers get what they write to from ``make(shape, dtype)``."""
    original = torch.Tensor.new_empty

    def new_empty(x, *shape, dtype=None, **options):
        if options:  # the interpreter's own
            return original(x, *shape, **options)
        return make(shape if not shape or isinstance(shape[0], int) else shape[0], dtype or x.dtype)

    patch.setattr(torch.Tensor, "new_empty", new_empty)
    patch.setattr(torch, "empty_like", lambda x: make(x.shape, x.dtype))


def run_last_programs(patch, programs):
    """Only so many last programs run, where each has one tile, and nothing is summed over all of them."""

    def last_of_many(*ends):
        whole = range(*ends)  # none is so long but the interpreter's over programs
        return whole[-programs:] if len(whole) > 1000 else whole

    patch.setattr(interpreter, "range", last_of_many, raising=False)
    patch.setattr(rms_norm, "BACKWARD_CONFIGS", ((4096, 4, BEYOND),))
    patch.setattr(qk_norm_rope, "BACKWARD_CONFIGS", ((BEYOND, 4),))
    patch.setattr(torch.Tensor, "sum", lambda x, dim: x[-1])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_offsets_are_64_bits_wide(name, tmp_path, monkeypatch):
    case = CASES[name]
    T = BEYOND // math.prod(case.rows[0]) // 128 * 128 + 128
    torch.manual_seed(0)
    tails = [torch.randn(case.tail, *shape).to(DTYPE) for shape in case.rows]
    other = [torch.randn(shape).to(DTYPE) for shape in case.other]
    with monkeypatch.context() as patch:
        allocate(patch, lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        expected = results(case, case.tail, tails, other)
    files = (str(tmp_path / str(n)) for n in itertools.count())

    def sparse(shape, dtype=DTYPE):
        size = math.prod(shape)
        return torch.from_file(next(files), shared=True, size=max(1, size), dtype=dtype)[:size].view(shape)

    allocate(monkeypatch, sparse)
    check_addresses(monkeypatch)
    run_last_programs(monkeypatch, 4 if "attention" in name else 64)
    tensors = [sparse((T, *shape)) for shape in case.rows]
    for x, tail in zip(tensors, tails, strict=True):
        x[-case.tail :] = tail
    for a, b in zip(results(case, T, tensors, other), expected, strict=True):
        assert b.abs().max() > 0
        assert torch.equal(a, b)
