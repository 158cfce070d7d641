"""What the kernels compile to, for GPUs that are not here: bench/compiled.py, bounded."""

import itertools
import json
import subprocess
import sys

import pytest
from conftest import ROOT

KERNELS = {
    "attention_kernel",
    "dq_kernel",
    "dkdv_kernel",
    "rms_norm_kernel",
    "rms_norm_backward_kernel",
    "qk_norm_rope_kernel",
    "qk_norm_rope_backward_kernel",
    "swiglu_kernel",
    "swiglu_backward_kernel",
    "norm_pool_kernel",
    "sum_kernel",
    "norm_score_kernel",
}
GALLERY = {
    "sliding_window_kernel",
    "cascade_kernel",
    "paged_kernel",
    "norm_linear_kernel",
    "swiglu_linear_kernel",
    "quantized_norm_kernel",
}


def compile_all(folder, *jobs):
    """The rows of bench/compiled.py for each list of options, all at the same time."""
    runs = []
    for n, options in enumerate(jobs):
        file = folder / f"{n}.json"
        command = [sys.executable, ROOT / "bench" / "compiled.py", "--json", file, *options]
        runs.append((file, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
    found = []
    for file, run in runs:
        out, _ = run.communicate(timeout=1800)
        assert run.returncode == 0, out.decode()
        found += json.loads(file.read_text("utf-8"))
    return found


def test_a_small_kernel_compiles_for_hopper(tmp_path):
    """What is quick to compile, in its default configuration."""
    rows = compile_all(tmp_path, ["--target", "sm_90", "--defaults", "--kernel", "swiglu"])
    assert {row["kernel"] for row in rows} == {"swiglu_kernel", "swiglu_backward_kernel"}
    assert [row for row in rows if row["spill"] or row["shared"] > row["of"]] == []


@pytest.mark.slow
def test_attention_for_hopper_is_what_it_claims(tmp_path):
    """Products by warpgroups, TMA, registers traded between partitions; nothing spilled."""
    rows = compile_all(tmp_path, ["--target", "sm_90", "--kernel", "attention_hopper"])
    assert len(rows) == 8  # three configurations, either mask; the default for the larger model, too
    for row in rows:
        assert all(name in row["tensor"] for name in ("HGMMA", "UTMALDG", "USETMAXREG")), row
        assert row["spill"] == 0, row
        assert row["shared"] <= row["of"], row


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every kernel for every target: two processors, two processes."""
    jobs = (["--target", "sm_80", "sm_89", "gfx942"], ["--target", "sm_90", "sm_100", "sm_120"])
    return compile_all(tmp_path_factory.mktemp("compiled"), *jobs)


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = ("torch.bfloat16", "torch.float32")


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target(rows):
    for target, dtype in itertools.product(TARGETS, DTYPES):
        wanted = (target, dtype, True)
        found = {row["kernel"] for row in rows if (row["target"], row["dtype"], row["default"]) == wanted}
        only = {"attention_hopper_kernel"} if (target, dtype) == ("sm_90", "torch.bfloat16") else set()
        only |= GALLERY if dtype == "torch.bfloat16" and target != "gfx942" else set()
        assert found == KERNELS - {"sum_kernel"} | only, (target, dtype)
    assert {row["kernel"] for row in rows} >= KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["attention_kernel", "dq_kernel", "dkdv_kernel"])
def test_attention_compiles_with_either_mask(rows, kernel):
    mine = [row for row in rows if row["kernel"] == kernel and row["default"]]
    found = {(row["target"], row["dtype"], row["config"].split()[0]) for row in mine}
    assert found == set(itertools.product(TARGETS, DTYPES, ("CAUSAL=True", "CAUSAL=False")))


@pytest.mark.slow
def test_default_configurations_do_not_spill(rows):
    """But for dq in float32: q and dout are 128 numbers of a thread each, in products without tensor cores."""
    spilled = [row for row in rows if row["default"] and row["spill"]]
    assert [row for row in spilled if (row["kernel"], row["dtype"]) != ("dq_kernel", "torch.float32")] == []
    assert [row for row in spilled if row["spill"] > 32] == []


@pytest.mark.slow
def test_every_configuration_fits_into_shared_memory(rows):
    assert [row for row in rows if row["shared"] > row["of"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["attention_kernel", "dq_kernel", "dkdv_kernel"])
def test_attention_uses_hoppers_tensor_cores(rows, kernel):
    wanted = ("sm_90", kernel, "torch.bfloat16")
    found = [row["tensor"] for row in rows if (row["target"], row["kernel"], row["dtype"]) == wanted]
    assert len(found) >= 2
    assert all(tensor.endswith(" HGMMA") for tensor in found), found
