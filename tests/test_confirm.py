"""What ``ops="auto"`` does on a GPU that the kernels have not been seen on: found wrong, replaced, and said."""

import dataclasses
import warnings

import pytest
import torch

from qwen3core import Ops
from qwen3core.kernels import confirm, launch
from qwen3core.laboratory.interpreter import use_exact_arithmetic
from qwen3core.reference import allows, declare

if launch.INTERPRETED:
    use_exact_arithmetic()

DEVICE = torch.device("cpu" if launch.INTERPRETED else "cuda")


def wrong(ops, name, change):
    """The set with a kernel whose results are changed, declared as the kernel is."""
    kernel = getattr(ops, name)
    found = declare(**vars(allows(kernel)))(lambda *args, **options: change(kernel(*args, **options)))
    return dataclasses.replace(ops, **{name: found})


@pytest.fixture
def few(monkeypatch):
    """Few tokens, for which the interpreter needs a second."""
    monkeypatch.setattr(confirm, "LENGTHS", ([1, 4], [9, 4]))


@pytest.mark.slow
def test_right_kernels_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = confirm.confirm(Ops.triton(), DEVICE)
    assert found == Ops.triton()
    assert repr(found).endswith(f", checked='{DEVICE}')")
    assert "checked" not in repr(Ops.triton())


def test_each_kernel_of_the_set_is_checked():
    functions = {name: f for name, f in vars(Ops.triton()).items() if callable(f)}
    kernels = {name for name, f in functions.items() if f.__module__.startswith("qwen3core.kernels.")}
    assert confirm._cases(torch.device("cpu")).keys() == kernels


@pytest.mark.usefixtures("few")
def test_wrong_kernel_is_replaced_and_named():
    ops = wrong(Ops.triton(), "swiglu", lambda y: y * 1.05)
    with pytest.warns(UserWarning, match=rf"'auto': swiglu: .* on {DEVICE} within 0.02, found .* error of 0.05: "):
        found = confirm.confirm(ops, DEVICE)
    assert found == dataclasses.replace(Ops.triton(), swiglu=Ops.torch().swiglu)


@pytest.mark.usefixtures("few")
def test_wrong_fused_kernel_is_left_out():
    ops = wrong(Ops.triton(), "add_rms_norm", lambda pair: (pair[0], pair[1] * float("nan")))
    with pytest.warns(UserWarning, match="add_rms_norm: .* found a relative error of nan: torch's is used"):
        found = confirm.confirm(ops, DEVICE)
    assert found == dataclasses.replace(Ops.triton(), add_rms_norm=None)


@pytest.mark.usefixtures("few")
def test_what_stands_for_a_wrong_kernel_is_left_out():
    def fails(*args):
        raise RuntimeError("PassManager::run failed\nand much more")

    ops = dataclasses.replace(Ops.triton(), rms_norm=declare(row_wise=True)(fails))
    with pytest.warns(UserWarning, match="rms_norm: .* found RuntimeError: PassManager::run failed: torch's"):
        found = confirm.confirm(ops, DEVICE)
    assert found.rms_norm is Ops.torch().rms_norm
    assert (found.add_rms_norm, found.qk_norm_rope, found.norm_pool, found.norm_score) == (None,) * 4


@pytest.mark.usefixtures("few")
def test_wrong_gradient_is_found():
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy / 2

    ops = wrong(Ops.triton(), "attention", Half.apply)
    with pytest.warns(UserWarning, match="attention: .* found a relative error of 0.5"):
        assert confirm.confirm(ops, DEVICE).attention is Ops.torch().attention
