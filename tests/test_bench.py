"""The comparison with other engines runs, on small checkpoints; bench/README.md holds the tables of the results."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from bench import engines, report, workloads
from bench.worker import Failed, Worker
from qwen3core.kernels import rms_norm
from qwen3core.laboratory import timing

PEERS = ("qwen3core", "transformers", "sentence-transformers")


def quick_bench(*options):
    """The cells of each row that the bench prints, on small checkpoints."""
    for package in ("transformers", "sentence_transformers"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "bench.run", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [line.split("  ") for line in done.stdout.splitlines()]


def agree(rows, workload, engines, count):
    """Each engine has so many rows of the workload, and no engine's results differ."""
    found = [cells for cells in rows if cells[0] == workload]
    for engine in engines:
        assert sum(engine in cells for cells in found) == count
    assert not [cells for cells in found if any("differs" in cell or "cosine" in cell for cell in cells)]


@pytest.fixture(scope="module")
def rows():
    others = [name for name in workloads.WORKLOADS if name != "query"]
    return quick_bench("--workload", *others, "--engine", *PEERS, "qwen3core, served")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "engines", "count"),
    [
        ("corpus", PEERS, 1),
        ("rerank", PEERS, 1),
        ("memory", PEERS, 3),
        ("equal lengths", PEERS, 3),
        ("start-up", PEERS, 1),
        ("long", PEERS, 1),
        ("growth", ["qwen3core"], 5),
        ("served", ["qwen3core", "qwen3core, served"], 1),
    ],
)
def test_quick_bench_runs(workload, engines, count, rows):
    agree(rows, workload, engines, count)


@pytest.mark.slow
def test_quick_bench_of_a_query_runs_with_all_engines():
    agree(quick_bench("--workload", "query"), "one query", PEERS, 1)


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        (["swiglu"], ["ours", "torch eager", "torch.compile"], ["ours", "torch eager", "torch.compile"]),
        pytest.param(
            ["rms_norm", "--tune"], map(str, rms_norm.CONFIGS), map(str, rms_norm.BACKWARD_CONFIGS),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_bench_of_kernels_runs(options, forward, backward):
    """Interpreted, in minute sizes: each engine agrees with the specification, or is not installed."""
    command = [sys.executable, "bench/bench_kernels.py", "--tiny", "--kernel", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith(f"| {options[0]} ")]
    found = {(row[2], row[4]) for row in rows if row[5] != "not installed"}
    expected = {"forward": forward, "backward": backward}
    assert found == {(direction, engine) for direction, engines in expected.items() for engine in engines}
    for row in rows:
        assert row[5] == "not installed" or float(row[6]) > 0


def test_configurations_are_a_modules_while_a_kernel_runs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import bench_kernels

    owner = SimpleNamespace(CONFIGS=(1, 2))
    run = bench_kernels.with_configs(lambda: lambda: owner.CONFIGS, owner, {"CONFIGS": (2,)})()
    assert (owner.CONFIGS, run(), owner.CONFIGS) == ((1, 2), (2,), (1, 2))


# A worker runs in a copy of this process's environment, and opens a stand-in in place of an engine.
STANDIN = """
import os, sys, time, bench.worker, bench.engines, numpy
class Run:
    asked = 0
    def forget(self): self.asked = 0
    def __call__(self, texts, size=1.0):
        print("noise on stdout", flush=True)
        self.asked += 1
        if texts == ["end"]:
            os.close(int(sys.argv[1]))
            time.sleep(0.2)
            print("the last words")
            sys.stdout.flush()
            os._exit(3)
        return numpy.full((len(texts), 2), self.asked * size)
bench.engines.OPENERS = {"embed": lambda directory, **options: {"it": Run, "missing": lambda: __import__("nowhere")}}
bench.worker.main()
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that runs the stand-in whatever module it is asked for."""
    path = tmp_path / "python"
    (tmp_path / "standin.py").write_text(STANDIN, "utf-8")
    path.write_text(f'#!/bin/sh\nPYTHONPATH=. exec {sys.executable} {tmp_path}/standin.py "$3"\n', "utf-8")
    path.chmod(0o755)
    return str(path)


def test_worker_calls_an_engine_and_forgets_between_calls(python, capfd):
    worker = Worker(python, job="embed", engine="it", directory="x")
    assert worker.versions["python"].startswith("3.")
    for _ in range(2):
        ms, rows = worker.call([[["a"]], [["b", "c"]]], size=2)
        assert rows.tolist() == [[2, 2], [4, 4], [4, 4]]
        assert ms >= 0
    worker.close()
    assert worker.process.returncode == 0
    assert capfd.readouterr() == ("", "")


def test_worker_says_why_an_engine_does_not_open(python):
    with pytest.raises(Failed, match=r"^ModuleNotFoundError: No module named 'nowhere'$"):
        Worker(python, job="embed", engine="missing", directory="x")


def test_worker_whose_process_ends_says_its_last_words(python):
    worker = Worker(python, job="embed", engine="it", directory="x")
    with pytest.raises(Failed, match=r"^its process ended: the last words$"):
        worker.call([[["end"]]])
    worker.close()


def test_peak_of_a_worker_begins_again(python):
    worker = Worker(python, job="embed", engine="it", directory="x")
    before = worker.peak()
    worker.call([[["a"] * 2**22]])  # 64 MiB of results
    grown, after = worker.peak(), worker.peak()
    worker.close()
    assert grown > before + 64
    assert after < grown - 32


def test_engines_import_no_package_until_one_is_opened():
    code = "import sys, bench.engines, bench.worker; print([n for n in ('torch', 'qwen3core') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_engines_alternate_in_both_orders():
    calls = []

    def run(name):
        calls.append(name)
        return len(calls)

    times = timing.alternate({name: partial(run, name) for name in "ab"}, 3)
    assert calls == [*"ab", *"ba", *"ab"]
    assert times == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_ratio_is_of_the_same_repeat_and_has_quartiles():
    times = {"qwen3core": [1.0, 10.0, 4.0, 2.0, 1.0], "x": [2.0, 30.0, 4.0, 8.0, 5.0]}
    ours, other = workloads.statistics({}, times)
    assert (ours["ratio"], ours["ratio_p25"], ours["ratio_p75"]) == (1, 1, 1)
    assert (other["ratio"], other["ratio_p25"], other["ratio_p75"]) == (3, 2, 4)
    assert (other["p25"], other["p50"], other["p75"]) == (4, 5, 8)


def setup(repeats=2):
    return workloads.Setup(ROOT, ROOT, "float32", "cpu", repeats=repeats, scale=1, length=8, pythons={})


def test_engine_that_differs_or_fails_has_no_ratio(monkeypatch):
    monkeypatch.setattr(workloads, "SETTLED", 0)
    vectors = {
        "qwen3core": [[1, 0]],
        "close": [[2, 0.01]],
        "far": [[1, 0.1]],
        "nan": [[np.nan, 1]],
        "wide": [[1, 0, 0]],
    }
    asked = []

    def run(name):
        asked.append(name)
        time.sleep(0.001)
        if name == "failing":
            raise Failed("out of memory")
        return 1.0 if name == "qwen3core" else 2.0, np.array(vectors[name], np.float32)

    runs = {name: lambda name=name: run(name) for name in [*vectors, "failing"]}
    found = {row["engine"]: row for row in workloads.compared({"workload": "w"}, runs, setup())}
    assert found["close"]["ratio"] == 2
    assert found["close"]["cosine"] == pytest.approx(1 - 1.25e-5, abs=1e-6)
    assert found["far"]["differs"] == "cosine 0.995"
    assert found["nan"]["differs"] == "cosine nan"
    assert found["wide"]["differs"] == "shape (1, 3)"
    assert found["failing"]["differs"] == "out of memory"
    for name in ("far", "nan", "wide", "failing"):
        assert not {"ratio", "p50"} & found[name].keys()
        assert asked.count(name) == 1  # and none is timed


@pytest.mark.parametrize(
    ("dtype", "engine", "far"), [("float32", "x", 2e-3), ("bfloat16", "x", 0.1), ("float32", "x int8", 0.2)]
)
def test_scores_agree_within_the_precision(dtype, engine, far):
    ours = np.array([0.5, 0.25], np.float32)
    assert "differs" not in workloads.agreement(ours + np.float32(far / 4), ours, dtype, engine)
    assert workloads.agreement(ours - [0, far], ours, dtype, engine)["differs"] == f"dP {far:.4g}"


@pytest.mark.parametrize(("ms", "repeats"), [(1e3, 7), (12e3, 5), (90e3, 3)])
def test_long_calls_are_repeated_three_times(monkeypatch, ms, repeats):
    monkeypatch.setattr(workloads, "SETTLED", 0)
    calls = []

    def run(name):
        calls.append(name)
        return ms, np.ones((1, 2), np.float32)

    list(workloads.compared({}, {name: partial(run, name) for name in ("qwen3core", "x")}, setup(repeats=7)))
    assert calls.count("x") == 1 + repeats


def test_products_are_not_compared(monkeypatch):
    monkeypatch.setattr(workloads, "SETTLED", 0)
    runs = {"qwen3core": lambda: (1.0, np.ones((1, 2))), engines.PRODUCTS: lambda: (0.5, np.zeros(0))}
    rows = list(workloads.compared({}, runs, setup()))
    assert [row["ratio"] for row in rows] == [1, 0.5]


def test_environment_is_that_of_the_engine(monkeypatch):
    opened = []

    class Stub:
        versions = {"torch": "2"}  # noqa: RUF012

        def __init__(self, python, **job):
            opened.append((python, job))

    monkeypatch.setattr(workloads, "Worker", Stub)
    asking = setup()
    asking.pythons["vllm"] = "/its/python"
    for engine in ("vLLM", "transformers"):
        asking.open("embed", engine)
    assert [python for python, _ in opened] == ["/its/python", sys.executable]
    assert opened[0][1] == asking.options("embed") | {"job": "embed", "engine": "vLLM"}
    assert asking.versions == {"vLLM": {"torch": "2"}, "transformers": {"torch": "2"}}


def test_tables_are_those_of_the_results():
    text = (ROOT / "bench" / "README.md").read_text("utf-8")
    assert f"<!-- bench -->\n{report.tables()}<!-- /bench -->" in text
    assert "| one query, 16 tokens, float32 |" in report.tables()  # of the first machine


def result(rows, **environment):
    return json.dumps({"environment": {"date": "2026-01-01", "torch": "2.13.0"} | environment, "rows": rows})


LABELS = {"workload": "corpus", "size": "2 texts", "tokens": 100}
ROWS = [
    LABELS | {"engine": "qwen3core", "p50": 50, "ratio": 1.0, "cosine": 1.0},
    LABELS | {"engine": "vLLM", "p50": 75, "ratio": 1.5, "ratio_p25": 1.4, "ratio_p75": 1.61, "cosine": 0.9992},
    LABELS | {"engine": "x", "cosine": 0.5, "differs": "cosine 0.5"},
]


def test_table_divides_by_our_time(tmp_path):
    (tmp_path / "corpus_float32.json").write_text(result(ROWS), "utf-8")
    assert report.table(tmp_path)[2:] == [
        "| corpus, 2 texts, float32 | 2000 tokens/s | 1.50x [1.40, 1.61] | differs: cosine 0.5 |",
        "| least cosine, float32 | | 0.9992 | 0.5 |",
    ]


def test_agreement_of_several_workloads_is_the_worst():
    rows = [{"engine": "x", "dtype": "float32", key: value} for key in ("cosine", "dP") for value in (0.5, 0.1, 0.9)]
    agreements = report.agreements(rows)
    assert agreements == {"least cosine, float32": {"x": 0.1}, "largest difference of P(yes), float32": {"x": 0.9}}


@pytest.mark.parametrize(("cpu", "seen"), [(["amx_bf16"], ["1.50x [1.40, 1.61] | yes |"]), (["avx512_vnni"], [])])
def test_targets_are_for_cpus_with_bfloat16(tmp_path, cpu, seen):
    (tmp_path / "corpus_bfloat16.json").write_text(result(ROWS, cpu=cpu), "utf-8")
    (tmp_path / "corpus_float32.json").write_text(result(ROWS, cpu=cpu), "utf-8")
    lines = report.targets(tmp_path)[3:]
    assert [line.split("1.10x | ")[1] for line in lines] == seen


def test_engine_that_differs_misses_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TARGETS", [("corpus", "x", 0.5)])
    (tmp_path / "corpus_bfloat16.json").write_text(result(ROWS, cpu=["amx_bf16"]), "utf-8")
    assert report.targets(tmp_path)[-1].endswith("| differs: cosine 0.5 | **no** |")


def test_every_device_has_a_section(tmp_path):
    for device in ("cpu", "gpu"):
        (tmp_path / device).mkdir()
        environment = {
            "device": device.upper(),
            "load": [0.5, 2.25],
            "engines": {"vLLM": {"python": "3", "torch": "2"}},
        }
        (tmp_path / device / "corpus_float32.json").write_text(result(ROWS, **environment), "utf-8")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "rms_norm.json").write_text(result([{"kernel": "rms_norm"}]), "utf-8")
    lines = report.tables(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### CPU", "### GPU"]
    assert sum("load 0.5 to 2.2" in line for line in lines) == 2
    assert lines.count("Versions: vLLM: python 3, torch 2.") == 2


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    growth = [{"workload": "growth", "size": "1 x 8", "tokens": 8, "engine": "qwen3core", "p50": 1.0, "ratio": 1.0}]
    (tmp_path / "corpus_float32.json").write_text(result(ROWS), "utf-8")
    (tmp_path / "growth_float32.json").write_text(result(growth), "utf-8")
    plot.engines(tmp_path, "a device")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["engines.png", "growth.png"]
