"""Planted mistakes in kernels: each must fail a test of kernels in bfloat16, without a GPU."""

import inspect
import tempfile
from pathlib import Path

import pytest
import test_kernels
import test_overflow
import torch
from triton.runtime.errors import InterpreterError

from qwen3core.kernels import attention, launch, qk_norm_rope, rms_norm, swiglu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not launch.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1"),
]
CPU = torch.device("cpu")


def rounds(of):
    return lambda: test_kernels.test_rounds_where_the_specification_does(of, torch.bfloat16, CPU)


def norm():
    test_kernels.test_rms_norm((32, 100), torch.bfloat16, CPU)


def attend():
    test_kernels.test_attention("small", 2, torch.bfloat16, True, CPU)


def offsets():
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(test_overflow, "DTYPE", torch.bfloat16)
        try:
            test_overflow.test_offsets_are_64_bits_wide("rms_norm", Path(folder), patch)
        except InterpreterError as error:  # an address is checked within the kernel
            raise AssertionError("a wrong address") from error


MISTAKES = {
    "cast dropped: squares summed in bfloat16": (rms_norm.normed, "wide = x.to(tl.float32)", "wide = x", norm),
    "cast dropped: silu not rounded": (
        swiglu.swiglu_kernel,
        "(g * tl.sigmoid(g)).to(y_ptr.dtype.element_ty)",
        "(g * tl.sigmoid(g))",
        rounds(test_kernels.rounding_of_swiglu),
    ),
    "rounding moved: after the weight": (
        rms_norm.normed,
        "n.to(x.dtype).to(tl.float32) * weight",
        "n * weight",
        rounds(test_kernels.rounding_of_rms_norm),
    ),
    "rounding moved: after the rotation": (
        qk_norm_rope.rotate,
        "y1 = y1.to(x1.dtype).to(tl.float32)\n",
        "\n",
        rounds(test_kernels.rounding_of_qk_norm_rope),
    ),
    "mask missing: keys after the query": (attention.attend, "< seen[:, None]", "< len_k", attend),
    "mask missing: keys after the query, backward": (attention.add_dq, "< seen[:, None]", "< len_k", attend),
    "mask missing: columns of the next row": (
        rms_norm.rms_norm_kernel,
        "tl.load(x_ptr + offsets, mask=mask, other=0.0)",
        "tl.load(x_ptr + offsets)",
        norm,
    ),
    "offset of 32 bits": (rms_norm.tile_of, ".to(tl.int64)[:, None]", "[:, None]", offsets),
}


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Replace a piece of a kernel's text, in its module."""

    def run(function, old, new):
        module, source = inspect.getmodule(function.fn), inspect.getsource(function.fn)
        assert old in source
        file = tmp_path / "mistake.py"  # the interpreter reads a function's source
        file.write_text(source.replace(old, new))
        namespace = dict(vars(module))
        exec(compile(file.read_text(), file, "exec"), namespace)
        monkeypatch.setattr(module, function.__name__, namespace[function.__name__])

    return run


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_fails_in_bfloat16(name, plant):
    function, old, new, check = MISTAKES[name]
    check()
    plant(function, old, new)
    with pytest.raises(AssertionError):
        check()
