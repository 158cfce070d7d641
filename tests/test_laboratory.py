"""The laboratory: wrong kernels are found and named, right ones pass; the command's JSON and exit status."""

import json
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import triton
from conftest import ROOT

from qwen3core import InputError, Ops, reference
from qwen3core.commands import main
from qwen3core.kernels import launch
from qwen3core.laboratory import contenders, timing, trial
from qwen3core.laboratory.check import DTYPES, check_op
from qwen3core.laboratory.compiled import accesses
from qwen3core.laboratory.operations import OPERATIONS, Operation, each, leaf
from qwen3core.laboratory.variants import Variant, import_file, load

INTERPRETED = pytest.mark.skipif(not launch.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")
KERNELS = ("add_rms_norm", "qk_norm_rope", "norm_pool", "norm_score", "attention")
EXACT = (torch.float32, torch.float16)

RMS_NORM = """
import torch
import triton
import triton.language as tl

CONFIGS = [(1,), (4,)]


@triton.jit
def kernel(x_ptr, stride, w_ptr, y_ptr, H, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < H
    x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0)
    w = tl.load(w_ptr + column, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / H + eps)
    y = normed.to(x.dtype) * w
    tl.store(y_ptr + row * H + column, y, mask=mask)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, config):
        ctx.save_for_backward(x, w)
        ctx.eps = eps
        rows, H = x.reshape(-1, x.shape[-1]), x.shape[-1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if len(rows):
            kernel[(len(rows),)](rows, rows.stride(0), w, y, H, eps, triton.next_power_of_2(H), num_warps=config[0])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        r = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + ctx.eps)
        n, g = x.float() * r, (dy * w).float()
        dx = r * (g - n * (g * n).mean(-1, keepdim=True))
        dw = (dy.float() * n.to(x.dtype).float()).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dw.to(w.dtype), None, None


def rms_norm(x, weight, eps, config=CONFIGS[0]):
    return Norm.apply(x, weight, eps, config)
"""

WRONG = {
    "mask": ("+ row * stride + column, mask=mask, other=0.0)", "+ row * stride + column)"),
    "cast": ("wide = x.to(tl.float32)", "wide = x"),
    "rounding": ("normed.to(x.dtype) * w", "normed * w.to(tl.float32)"),
    "strides": ("rows.stride(0)", "H"),
    "eps": (" / H + eps)", " / H)"),
    "gradient": (" - n * (g * n).mean(-1, keepdim=True)", ""),
    "bounds": ("column, y, mask=mask)", "column, y)"),
}
"""Bugs, as what is replaced by what in RMS_NORM."""


@pytest.fixture
def kernel_file(tmp_path):
    """A function that writes RMS_NORM to a file outside of the package, right or with one of the bugs."""

    def write(bug=None):
        source = RMS_NORM
        if bug:
            assert WRONG[bug][0] in source
            source = source.replace(*WRONG[bug])
        path = tmp_path / f"{bug or 'right'}.py"
        path.write_text(source, "utf-8")
        return path

    return write


@INTERPRETED
def test_a_right_kernel_of_a_file_outside_passes(kernel_file):
    function = import_file(kernel_file()).rms_norm
    report = check_op(function, "rms_norm", EXACT)
    assert report.ok, report
    assert report.runs == {"float32": 18, "float16": 18}
    assert str(report).startswith("right; runs: 18 in float32")


@INTERPRETED
@pytest.mark.parametrize(
    ("bug", "kind", "what", "words"),
    [
        ("mask", "mask", "output 0", "a mask of the last, partial block is missing"),
        ("cast", "rounding", "output 0", "a cast to float32 is missing|a rounding is moved or left out"),
        ("rounding", "rounding", "output 0", "a rounding is moved or left out"),
        ("strides", "strides", "output 0", "a stride is assumed"),
        ("eps", "eps", "output 0", "wrong for small numbers alone: eps is missing"),
        ("gradient", "gradient", "gradient of x", "the outputs are right: the backward's formula"),
        ("bounds", "bounds", "a new tensor", "expected nothing written outside of it"),
    ],
)
def test_a_wrong_kernel_is_found_and_named(kernel_file, bug, kind, what, words):
    report = check_op(import_file(kernel_file(bug)).rms_norm, "rms_norm", EXACT)
    assert not report.ok
    assert {(f.kind, f.what) for f in report.findings} == {(kind, what)}, report
    assert re.search(words, str(report))


def shape(gate, up):
    return reference.swiglu(gate, up)[None]


def narrow(gate, up):
    return reference.swiglu(gate, up).half()


def changes_input(gate, up):
    out = reference.swiglu(gate, up)
    with torch.no_grad():
        gate.zero_()
    return out


def random_bits(gate, up):
    return reference.swiglu(gate, up) * (1 + 1e-7 * torch.rand(()))


def unwritten(gate, up):
    out = torch.empty_like(gate)
    out[: len(gate) // 2] = reference.swiglu(gate, up)[: len(gate) // 2]
    return out


def nan_beyond(gate, up):
    out = torch.empty_like(gate)
    out.as_strided((out.numel() + 1,), (1,)).fill_(torch.nan)  # NaN on NaN would not be seen
    return out.copy_(reference.swiglu(gate.detach(), up.detach()))


def half_of_the_last_dimension(gate, up):
    return reference.swiglu(gate, up) * torch.where(torch.arange(gate.shape[1]) < gate.shape[1] / 2, 1, -1)


def raises(gate, up):
    raise ZeroDivisionError("of one's own")


def formula(gate, up):
    return gate * up


def no_gradient_of_up(gate, up):
    return reference.swiglu(gate, up.detach())


def two_outputs(gate, up):
    return reference.swiglu(gate, up), gate


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (shape, {"shape"}),
        (two_outputs, {"shape"}),
        (narrow, {"dtype"}),
        (changes_input, {"error", "inputs", "bits"}),
        (random_bits, {"bits"}),
        (unwritten, {"mask"}),
        (nan_beyond, {"bounds"}),
        (half_of_the_last_dimension, {"values"}),
        (raises, {"error"}),
        (formula, {"values"}),
        (no_gradient_of_up, {"gradient"}),
    ],
)
def test_each_kind_of_mistake_has_its_name(function, kinds):
    report = check_op(function, "swiglu", [torch.float32])
    assert not report.ok
    assert {f.kind for f in report.findings} <= kinds, report


def test_refusals_and_missing_gradients_are_notes():
    def refuses(gate, up):
        if gate.dtype != torch.float32:
            raise InputError("swiglu: expected float32")
        return reference.swiglu(gate.detach(), up.detach())

    report = check_op(refuses, "swiglu", EXACT)
    assert report.ok
    assert report.runs == {"float32": 12, "float16": 0}
    assert report.notes == [
        "forward only: the outputs have no gradient",
        "refused in float16: swiglu: expected float32",
    ]
    assert not check_op(refuses, "swiglu", [torch.float16]).ok  # nothing ran


def test_a_function_that_no_set_takes_is_found():
    """By the operation's name: a fused one declares its parts. An Operation of one's own is in no set."""
    function = reference.add_rms_norm
    (finding,) = check_op(function, "add_rms_norm", [torch.float32]).findings
    with pytest.raises(InputError) as refusal:
        replace(Ops.reference(), add_rms_norm=function)
    assert (finding.kind, finding.message) == ("declaration", str(refusal.value))
    assert check_op(function, OPERATIONS["add_rms_norm"], [torch.float32]).ok

    @reference.declare(row_wise=True, parts={"rms_norm": reference.rms_norm})
    def declared(*args):
        return function(*args)

    assert check_op(declared, "add_rms_norm", [torch.float32]).ok


def test_whole_numbers_may_be_one_off():
    operation = Operation(
        lambda x: (x * 10).round().to(torch.int8),
        each(lambda *shape: (leaf(*shape),), {"odd": (7, 5)}),
        lambda size, T: (leaf(T, size.hidden_size),),
        lambda x: (x.nbytes, x.numel()),
    )
    assert check_op(lambda x: (x * 10).floor().to(torch.int8), operation, EXACT).ok
    assert not check_op(lambda x: (x * 13).round().to(torch.int8), operation, EXACT).ok


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_specifications_pass(op):
    # With AMX, oneDNN's bfloat16 product of strided rows reads beyond them, times 0: what is NaN there shows.
    report = check_op(OPERATIONS[op].specification, OPERATIONS[op], EXACT if op == "linear" else DTYPES)
    assert report.ok, report
    assert report.notes == []


def slow(op):
    return pytest.param(op, marks=pytest.mark.slow)


@INTERPRETED
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", *map(slow, KERNELS)])
def test_the_kernels_pass(op):
    report = check_op(getattr(Ops.triton(), op), op)
    assert report.ok, report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py:rms_norm"], "absent.py: expected a Python file, found none"),
        (["{file}:absent"], "expected a function 'absent'"),
        (["{file}:Norm"], "expected --op, one of linear, rms_norm, .*, or an OPERATION, found 'Norm'"),
        (["{file}:rms_norm", "--op", "absent"], "found 'absent'"),
        (["{file}:rms_norm", "--target", "sm_10"], "--target: expected one of sm_80, .*, found 'sm_10'"),
        (["{broken}:rms_norm"], "expected a file to import, found NameError: name 'absent'"),
        (["{plain}:swiglu", "--tune"], "--tune: expected a list CONFIGS"),
    ],
)
def test_bad_input_is_refused_by_name(kernel_file, tmp_path, capsys, arguments, message):
    (tmp_path / "broken.py").write_text("absent\n", "utf-8")
    (tmp_path / "plain.py").write_text("def swiglu(gate, up):\n    return gate\n", "utf-8")
    files = {"file": kernel_file(), "broken": tmp_path / "broken.py", "plain": tmp_path / "plain.py"}
    assert main(["kernel", *(argument.format(**files) for argument in arguments)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_of_the_package_have_their_own_names():
    assert import_file(ROOT / "kernels" / "swiglu.py").__name__ == "qwen3core.kernels.swiglu"
    assert import_file(ROOT / "kernels" / "gallery" / "paged.py").__name__ == "qwen3core.kernels.gallery.paged"
    assert import_file(ROOT / "qwen3core" / "reference.py") is reference
    (variant,) = load(f"{ROOT}/kernels/swiglu.py:swiglu")
    assert variant.operation is OPERATIONS["swiglu"]


TRIAL = {
    *("kernel", "config", "op", "ok", "check", "compiled", "work", "predicted_ms", "timed", "parity", "environment")
}
COMPILED = {*("target", "kernel", "config", "registers", "spill", "tensor", "shared", "of", "loads", "stores")}


@INTERPRETED
def test_the_command_prints_one_stable_object(kernel_file, tmp_path, capsys):
    """Right and wrong side by side; one target, and a file of results."""
    pytest.importorskip("sentence_transformers")
    sources = [f"{kernel_file(bug)}:rms_norm" for bug in (None, "mask")]
    results, dump = tmp_path / "results.jsonl", tmp_path / "dump"
    options = ["--json", "--target", "sm_90", "--results", str(results), "--dump", str(dump)]
    assert main(["kernel", *sources, *options]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in results.read_text("utf-8").splitlines()] == found["trials"]
    right, wrong = found["trials"]
    for each_trial, source in zip((right, wrong), sources, strict=True):
        assert set(each_trial) == TRIAL
        assert (each_trial["kernel"], each_trial["config"], each_trial["op"]) == (source, None, "rms_norm")
        assert set(each_trial["check"]) == {"device", "runs", "findings", "notes"}
        assert each_trial["timed"] == {"error": "not timed: no GPU"}
        (row,) = each_trial["compiled"]  # the backward of this kernel is plain PyTorch
        assert set(row) == COMPILED
        assert (row["target"], row["kernel"], row["spill"]) == ("sm_90", "kernel", 0)
        assert row["loads"]
        assert row["stores"]
    assert (right["ok"], wrong["ok"]) == (True, False)
    assert right["check"]["findings"] == []
    assert right["parity"]["ok"]
    assert {row["point"] for row in right["parity"]["rows"]} >= {"embed", "pooled"}
    assert set(wrong["check"]["findings"][0]) == {"kind", "case", "dtype", "layout", "what", "message", "guess"}
    assert wrong["parity"] == {"error": "not run: the check failed"}
    assert right["work"] == {
        **{"model": "0.6B", "tokens": 8192, "dtype": "bfloat16"},
        **{"bytes": 4 * 8192 * 1024 + 2048, "flops": 4 * 8192 * 1024},
        "intensity": 4 * 8192 * 1024 / (4 * 8192 * 1024 + 2048),
    }
    assert 0.009 < right["predicted_ms"]["H100 SXM"] < 0.011  # 34 MB at 3.35 TB/s
    assert {path.suffix for path in dump.iterdir()} == {".ptx", ".sass"}


@INTERPRETED
@pytest.mark.slow
def test_every_configuration_is_tried_and_ranked(kernel_file, capsys):
    assert main(["kernel", f"{kernel_file()}:rms_norm", "--tune", "--target", "sm_80", "gfx942"]) == 0
    out = capsys.readouterr().out
    assert out.count("check: right") == 2
    ranked = re.findall(r"\| .*rms_norm (\(.*\)) \| True \| +\| (\d+) \| (\d+) \|", out)  # spills, registers
    assert sorted(config for config, *_ in ranked) == ["(1,)", "(4,)"]
    assert ranked == sorted(ranked, key=lambda row: [int(n) for n in row[1:]])
    assert "not timed: no GPU" in out
    assert "predicted from datasheets, not measured" in out
    assert out.count("| gfx942 | kernel |") == out.count("| sm_80 | kernel |") == 2


@INTERPRETED
@pytest.mark.slow
def test_kernels_of_the_gallery_by_the_command(capsys):
    """Each with an operation of its own, side by side."""
    names = ("int8_norm", "norm_linear", "sliding_window")
    sources = [f"{ROOT}/kernels/gallery/{name}.py:{name}" for name in names]
    assert main(["kernel", *sources, "--json", "--target", "sm_90"]) == 0
    found = json.loads(capsys.readouterr().out)["trials"]
    assert [each_trial["op"] for each_trial in found] == [*names]
    for each_trial in found:
        assert each_trial["ok"]
        assert set(each_trial["check"]["runs"]) == {"float32", "float16", "bfloat16"}
        assert each_trial["check"]["notes"] == []
        assert each_trial["parity"] == {"error": "not run: no operation of Ops"}
        assert [row["spill"] for row in each_trial["compiled"]] == [0]


class Planned:
    """A stand-in for FlashInfer's wrapper."""

    plans: ClassVar[list] = []

    def __init__(self, workspace, layout):
        assert (len(workspace), layout) == (2**28, "NHD")

    def plan(self, cu_q, cu_k, *sizes, causal, q_data_type):
        self.plans.append((*sizes, causal, q_data_type))
        self.ends = (cu_q, cu_k)

    def run(self, q, k, v):
        return reference.attention(q, k, v, *self.ends, 0, 0)


@pytest.fixture
def timed_contenders(monkeypatch):
    """A function of an operation's name: which contenders are timed, and why others are not; none that is slow here."""
    module = SimpleNamespace(BatchPrefillWithRaggedKVCacheWrapper=Planned)
    monkeypatch.setitem(sys.modules, "flashinfer", module)

    def run(op, tokens):
        arguments = trial.cast(OPERATIONS[op].large(SMALL_CONFIG, tokens), torch.float32)
        with torch.no_grad():
            douts, expected = timing.expect(OPERATIONS[op].specification, arguments, arguments)
            functions = contenders.contenders(op, OPERATIONS[op])
            functions = {name: f for name, f in functions.items() if name not in ("ops triton", "torch.compile")}
            found = {
                direction: timing.measure(
                    timing.engines_of(functions, arguments, douts, direction), results, torch.device("cpu"), 1
                )
                for direction, results in expected.items()
            }
        return {
            direction: {name: row.get("error", "timed") for name, row in rows.items()}
            for direction, rows in found.items()
        }

    return run


SMALL_CONFIG = replace(
    trial.OFFICIAL_SIZES["0.6B"], num_attention_heads=4, num_key_value_heads=2, hidden_size=64, intermediate_size=96
)


@pytest.mark.parametrize(
    ("op", "names"),
    {
        "rms_norm": {"torch eager", "torch F.rms_norm"},
        "add_rms_norm": {"torch eager", "torch F.rms_norm"},
        "qk_norm_rope": {"torch eager", "torch F.rms_norm", "ops torch"},
        "swiglu": {"torch eager", "ops torch"},
        "norm_pool": {"torch eager", "torch F.rms_norm"},
        "norm_score": {"torch eager", "torch F.rms_norm"},
    }.items(),
)
def test_contenders_give_the_operation_and_its_gradients(timed_contenders, op, names):
    for rows in timed_contenders(op, 600).values():
        assert {name for name, error in rows.items() if error == "timed"} == names
        assert {error for name, error in rows.items() if name not in names} <= {"not installed"}


def test_contenders_of_attention(timed_contenders):
    """SDPA where sequences have one length; FlashInfer, which is a stand-in, plans once and is forward only."""
    Planned.plans.clear()
    equal, several = timed_contenders("attention", 1024), timed_contenders("attention", 600)
    ran = {"torch eager", "ops torch", "FlexAttention", "FlashInfer", "SDPA flash"}
    assert {name for name, error in equal["forward"].items() if error == "timed"} == ran
    assert {name for name, error in several["forward"].items() if error == "timed"} == ran - {"SDPA flash"}
    assert several["forward"]["SDPA flash"] == "InputError: SDPA: expected sequences of one length, found several"
    assert equal["backward"]["SDPA flash"] == "timed"
    assert Planned.plans == [(4, 2, 128, True, torch.float32)] * 4  # once for each batch and direction


@pytest.fixture
def two_contenders(monkeypatch):
    def contenders(op, operation):
        def absent(*args):
            raise ImportError("nowhere")

        return {"torch eager": operation.specification, "absent": absent, "wrong": lambda gate, up: gate}

    monkeypatch.setattr(trial, "contenders", contenders)


def test_variants_are_timed_beside_others(two_contenders, tmp_path):
    """On a CPU, whose numbers mean nothing: what is wrong or absent has none."""
    variant = Variant("mine", "swiglu", OPERATIONS["swiglu"], Ops.torch().swiglu)
    found = trial.times([variant], torch.device("cpu"), tokens=8, repeats=2)
    assert set(found) == {"device", "before", "after", "profile", "ms", "backward_ms"}
    assert found["profile"] == {}
    for key in ("ms", "backward_ms"):
        assert {name for name, ms in found[key].items() if "p50" in ms} == {"mine", "torch eager"}
        assert found[key]["absent"] == {"error": "not installed"}
        assert next(iter(found[key])) == "mine"
    assert "disagrees" in found["ms"]["wrong"]["error"]


@pytest.fixture
def profiler(monkeypatch):
    """A stand-in for Proton, and what it is told."""
    told: list[str] = []

    def start(name):
        told.append(f"start {name}")
        return 7

    def scope(name):
        told.append(name)
        return nullcontext()

    module = SimpleNamespace(start=start, scope=scope, finalize=lambda session: told.append(f"end of {session}"))
    monkeypatch.setattr(triton, "profiler", module, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("waited"))
    return told


def test_a_profile_is_of_one_call_of_each(profiler, tmp_path):
    calls = []
    engines = {name: lambda name=name: lambda: calls.append(name) for name in "ab"}
    path = tmp_path / "made" / "swiglu.hatchet"
    assert timing.profile(engines, path) == {"file": str(path)}
    assert profiler == [f"start {path.parent / 'swiglu'}", "a", "b", "waited", "end of 7"]
    assert calls == [*"ab", *"ab"]  # once before
    assert path.parent.is_dir()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU, which can be profiled")
def test_a_profile_without_a_gpu_says_why_there_is_none(tmp_path):
    found = timing.profile({"a": lambda: lambda: None}, tmp_path / "a.hatchet")
    assert list(found) == ["error"]


def test_gradients_are_timed_where_a_variant_has_them(two_contenders):
    def forward_only(gate, up):
        return reference.swiglu(gate.detach(), up.detach())

    variants = [Variant("forward only", "swiglu", OPERATIONS["swiglu"], forward_only)]
    assert trial.times(variants, torch.device("cpu"), tokens=8, repeats=1)["backward_ms"] == {}
    variants.append(Variant("mine", "swiglu", OPERATIONS["swiglu"], Ops.torch().swiglu))
    found = trial.times(variants, torch.device("cpu"), tokens=8, repeats=1)["backward_ms"]
    assert found["forward only"] == {"error": "ValueError: the outputs have no gradient"}
    assert "p50" in found["mine"]


def test_the_roofline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    work = {"model": "0.6B", "tokens": 8, "dtype": "bfloat16", "bytes": 3000, "flops": 5000, "intensity": 5 / 3}
    timed = {
        "device": "a GPU",
        "ms": {"mine": {"p25": 1.0, "p50": 1.0, "p75": 1.0}, "absent": {"error": "not installed"}},
        "profile": {"error": "no CUPTI"},
    }
    report = check_op(reference.swiglu, "swiglu", [])
    found = trial.Trial("f.py:mine", None, "swiglu", True, report, [], work, {}, timed, {"error": "not run"}, {})
    trial.draw([found], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    assert "| forward | mine | 1 | 1 | 1 |" in str(found)
    assert "profile, error: no CUPTI" in str(found)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_says_what_it_moves(op):
    """At a model's sizes, with the numbers of the kernels' docstrings where they have some."""
    arguments = OPERATIONS[op].large(trial.OFFICIAL_SIZES["0.6B"], 600)
    moved, flops = OPERATIONS[op].work(*(trial.cast(arguments, torch.bfloat16)))
    T, H, N, b = 600, 1024, 2, 2
    expected = {
        "linear": (2 * (T * H + 3072 * H + T * 3072), 2 * T * H * 3072),
        "rms_norm": (2 * T * H * b + H * b, 4 * T * H),
        "add_rms_norm": (4 * T * H * b + H * b, 5 * T * H),
        "rope": ((2 * 16 + 2) * T * 128 * b, 3 * T * 16 * 128),
        "qk_norm_rope": (2 * T * 24 * 128 * b + 2 * T * 128 * b + 2 * 128 * b, 7 * T * 24 * 128),
        "attention": ((2 * 16 + 2 * 8) * T * 128 * b, 4 * 16 * 128 * (512 * 513 // 2 + 88 * 89 // 2)),
        "swiglu": (3 * T * 3072 * b, 5 * T * 3072),
        "pool": (N * H * b + 4 * N * H, 3 * N * H),
        "norm_pool": (N * H * b + 4 * N * H + H * b, 7 * N * H),
        "norm_score": (N * H * b + 4 * N + H * b + 4 * H, 6 * N * H),
    }
    assert (moved, flops) == expected[op]


@pytest.mark.parametrize(
    ("asm", "loads", "stores"),
    [
        (
            {
                "ptx": "@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n"
                "ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];\n"
                "ld.global.b16 { %rs1 }, [ %rd1 ];\nld.shared.v4.b32 {%r1}, [%r2];\n"
                "cp.async.cg.shared.global [ %r5 + 0 ], [ %rd7 + 0 ], 0x10, %r6;\n"
                "st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };"
            },
            {"2": 1, "8": 1, "16": 2},
            {"16": 1},
        ),
        (
            {
                "amdgcn": "global_load_dwordx4 v[2:5], v[6:7], off\nbuffer_load_ushort v1, off\n"
                "global_store_dword v1, v2"
            },
            {"2": 1, "16": 1},
            {"4": 1},
        ),
    ],
    ids=["ptx", "amdgcn"],
)
def test_accesses_are_counted_by_width(asm, loads, stores):
    assert accesses(asm) == {"loads": loads, "stores": stores}


@pytest.mark.parametrize("op", ["add_rms_norm", "norm_pool"])
def test_a_fused_operation_stands_for_the_parts_of_its_set(op):
    def mine(*args):
        return OPERATIONS[op].specification(*args)

    ops = trial.with_function(Ops.torch(), op, mine)
    assert getattr(ops, op) is not None
    assert ops.rms_norm is Ops.torch().rms_norm
