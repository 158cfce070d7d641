"""The kernels of kernels/gallery: each beside its specification, where it rounds, what it must not see."""

import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from tolerances import REORDERED_FP32
from torch.utils.flop_counter import FlopCounterMode

from qwen3core import InputError, reference
from qwen3core.config import OFFICIAL_SIZES
from qwen3core.kernels import launch
from qwen3core.kernels.gallery import cascade, int8_norm, norm_linear, paged, sliding_window, swiglu_linear
from qwen3core.laboratory.check import check_op

# attention_hopper.py has tests of its own.
NAMES = sorted({path.stem for path in (ROOT / "kernels" / "gallery").glob("*.py")} - {"attention_hopper"})
EPS = 1e-6
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
if not launch.INTERPRETED:
    pytestmark = pytest.mark.gpu


def entry(name):
    """A file's function and operation."""
    module = import_module(f"qwen3core.kernels.gallery.{name}")
    return getattr(module, name), module.OPERATION


def listed(out):
    return out if isinstance(out, tuple) else (out,)


def on_device(arguments, dtype=torch.float32):
    """Arguments as kernels take them: float64 stands for the dtype."""
    return [
        x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_each_is_its_operation(name, dtype):
    function, operation = entry(name)
    report = check_op(function, operation, [dtype])
    assert report.ok, report


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_is_right(name):
    function, operation = entry(name)
    torch.manual_seed(0)
    arguments = on_device(max(operation.cases(), key=lambda case: operation.work(*case[1])[1])[1])
    expected = listed(function(*arguments))
    for config in import_module(function.__module__).CONFIGS:
        for a, b in zip(listed(function(*arguments, config=config)), expected, strict=True):
            assert (a.float() - b.float()).norm() <= REORDERED_FP32 * b.float().norm(), config


def rounding_of_norm_linear():
    """A product with the identity leaves the normed rows as they are."""
    x, w, one = randn(200, 64), randn(64), torch.eye(64, dtype=torch.float16)
    wide = x.float()
    late = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * w.float()).half()
    return norm_linear.norm_linear(*on_device((x, w, EPS, one), x.dtype)), reference.rms_norm(x, w, EPS), late


def rounding_of_swiglu_linear():
    """One product for each result, so that the order of a sum decides nothing; it is rounded before silu."""
    x, weight = randn(200, 64), 0.7 * torch.eye(64, dtype=torch.float16)
    gate = x @ weight
    wide = x.float() @ weight.float()
    late = (torch.nn.functional.silu(wide) * wide).half()
    return swiglu_linear.swiglu_linear(*on_device((x, weight, weight), x.dtype)), reference.swiglu(gate, gate), late


def rounding_of_int8_norm():
    """The scale is not rounded."""
    x, w = (2 * torch.rand(200, 64) - 1).half(), torch.ones(64).half()
    y = reference.rms_norm(x, w, EPS)
    late = (y.float() / (y.float().abs().amax(-1, keepdim=True) / 127).half()).round()
    return int8_norm.int8_norm(*on_device((x, w, EPS), x.dtype))[0], reference.int8_rows(y)[0], late


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64).half()


@pytest.mark.parametrize("of", [rounding_of_norm_linear, rounding_of_swiglu_linear, rounding_of_int8_norm])
def test_rounds_where_the_specification_does(of):
    """float16, bit for bit, for what an error norm hardly sees."""
    torch.manual_seed(0)
    found, expected, late = of()
    assert (found.cpu() == expected).float().mean() > 0.999
    assert (late == expected).float().mean() < 0.995


@pytest.mark.parametrize("name", ["sliding_window", "cascade", "paged"])
def test_sequences_do_not_see_each_other(name):
    """NaN in the second of three sequences reaches no other."""
    torch.manual_seed(0)
    arguments = {
        "sliding_window": lambda: sliding_window.arguments([30, 70, 40], [30, 70, 40], (2, 1), 64, 20),
        "cascade": lambda: cascade.arguments(40, [30, 70, 40], [30, 70, 40], (2, 1), 64),
        "paged": lambda: paged.arguments([30, 70, 40], [30, 70, 40], (2, 1), 64, 16),
    }[name]()
    function, _ = entry(name)
    clean = function(*on_device(arguments))
    arguments[0][30:100] = math.nan
    for x in arguments[1:]:
        if isinstance(x, torch.Tensor) and len(x) == 140:
            x[30:100] = math.nan
    if name == "paged":
        _, k_pages, v_pages, table, *_ = arguments
        for pages in (k_pages, v_pages):
            pages[table[1, :5].long()] = math.nan
    found = function(*on_device(arguments))
    assert torch.equal(found[:30], clean[:30])
    assert torch.equal(found[100:], clean[100:])
    assert found[30:100].isnan().all()


def test_a_window_hides_what_is_before_it():
    """Of 9 keys a window of 4 shows the last 4: the first 5 may be anything, the fifth from the end included."""
    torch.manual_seed(0)
    q, k, v, *rest = on_device(sliding_window.arguments([1], [9], (1, 1), 64, 4))
    expected = sliding_window.sliding_window(q, k, v, *rest)
    for key, seen in enumerate([False] * 5 + [True] * 4):
        changed = k.clone()
        changed[key] += 10 * q[0]
        assert torch.equal(sliding_window.sliding_window(q, changed, v, *rest), expected) != seen


@pytest.mark.parametrize("name", NAMES)
def test_least_work_counts_each_number_once(name):
    """What goes in and what comes out, at a small model's sizes, and the FLOPs of the specification's products."""
    config = OFFICIAL_SIZES["0.6B"]
    small = replace(config, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96)
    function, operation = entry(name)
    torch.manual_seed(0)
    arguments = on_device(operation.large(small, 64))
    out = listed(function(*arguments))
    tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    moved, flops = operation.work(*arguments)
    if name == "paged":  # 3 pages are of no sequence; the table counts
        tensors = [tensors[0], *(x[3:] for x in tensors[1:]), arguments[3][:, :-1]]
    assert moved == sum(x.nbytes for x in (*tensors, *out))
    with FlopCounterMode(display=False) as counter:
        operation.specification(*arguments)
    if name in ("norm_linear", "swiglu_linear"):
        assert flops == counter.get_total_flops()
    elif name in ("sliding_window", "cascade", "paged"):
        assert 0.5 * counter.get_total_flops() < flops < counter.get_total_flops()


WRONG = {
    r"sliding_window: window: expected at least 1, found 0": lambda: sliding_window.sliding_window(
        *on_device(sliding_window.arguments([3], [3], (2, 1), 64, 0))
    ),
    r"cascade: prefix_k: expected \[P, Hkv, D\] with .*Hkv = 1": lambda: cascade.cascade(
        *(x[:, [0, 0]] if i == 1 else x for i, x in enumerate(on_device(cascade.arguments(5, [3], [3], (2, 1), 64))))
    ),
    r"paged: table: expected \[1, most pages\] int32, contiguous rows, found \[2, 2\]": lambda: paged.paged(
        *(x[[0, 0]] if i == 3 else x for i, x in enumerate(on_device(paged.arguments([3], [3], (2, 1), 64, 16))))
    ),
    r"norm_linear: weight: expected \[O, H\] with O = 3, H = 8": lambda: norm_linear.norm_linear(
        *on_device((torch.ones(2, 8), torch.ones(8), EPS, torch.ones(3, 9)))
    ),
    r"swiglu_linear: up_weight: expected \[I, H\] with I = 3": lambda: swiglu_linear.swiglu_linear(
        *on_device((torch.ones(2, 8), torch.ones(3, 8), torch.ones(4, 8)))
    ),
    r"int8_norm: eps: expected more than 0": lambda: int8_norm.int8_norm(
        *on_device((torch.ones(2, 8), torch.ones(8), 0.0))
    ),
    r"int8_norm: expected torch.no_grad\(\) or tensors without requires_grad": lambda: int8_norm.int8_norm(
        *on_device((torch.ones(2, 8, requires_grad=True), torch.ones(8), EPS))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_refused_with_its_name(message):
    with pytest.raises(InputError, match=message):
        WRONG[message]()
