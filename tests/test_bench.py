"""The comparison with other engines runs, on small checkpoints; bench/README.md holds the tables of the results."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import report


def quick_engines(*workloads):
    """Run the bench on small checkpoints and return the engines in its rows."""
    for package in ("transformers", "sentence_transformers"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "bench.run", "--quick", "--workload", *workloads]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [set(line.split("  ")) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "label"),
    [
        ("query", "one query"),
        ("corpus", "corpus"),
        ("rerank", "rerank"),
        ("memory", "memory"),
        ("lengths", "equal lengths"),
        ("startup", "start-up"),
    ],
)
def test_quick_bench_runs(workload, label):
    found = set().union(*(cells for cells in quick_engines(workload) if label in cells))
    assert {"qwen3core", "transformers", "sentence-transformers"} <= found


@pytest.mark.slow
def test_quick_bench_of_single_texts_runs():
    rows = quick_engines("long", "growth")
    assert sum({"long", "qwen3core"} <= cells for cells in rows) == 2
    assert sum({"long", "transformers"} <= cells for cells in rows) == 2
    assert sum({"growth", "qwen3core"} <= cells for cells in rows) == 6


def test_tables_are_those_of_the_results():
    text = (ROOT / "bench" / "README.md").read_text("utf-8")
    assert f"<!-- bench -->\n{report.tables()}<!-- /bench -->" in text
    assert report.tables().count("| one query, 16 tokens, float32 |") == 1  # one machine so far


def result(rows, **environment):
    return json.dumps({"environment": {"date": "2026-01-01", "torch": "2.13.0"} | environment, "rows": rows})


LABELS = {"workload": "corpus", "size": "2 texts", "tokens": 100}
ROWS = [LABELS | {"engine": name, "p50": p50, "ratio": p50 / 50} for name, p50 in (("qwen3core", 50), ("x", 75))]


def test_table_divides_by_our_time(tmp_path):
    (tmp_path / "corpus_float32.json").write_text(result(ROWS), "utf-8")
    assert report.table(tmp_path).splitlines()[2] == "| corpus, 2 texts, float32 | 2000 tokens/s | 1.50x |"


def test_every_device_has_a_section(tmp_path):
    for device in ("cpu", "gpu"):
        (tmp_path / device).mkdir()
        (tmp_path / device / "corpus_float32.json").write_text(result(ROWS, device=device.upper()), "utf-8")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "rms_norm.json").write_text(result([{"kernel": "rms_norm"}]), "utf-8")
    lines = report.tables(tmp_path).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["### CPU", "### GPU"]


def test_charts_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plot

    rows = [row | {"ratio_p20": row["ratio"], "ratio_p80": row["ratio"]} for row in ROWS]
    growth = [{"workload": "growth", "size": "1 x 8", "tokens": 8, "engine": "qwen3core", "p50": 1.0, "ratio": 1.0}]
    (tmp_path / "corpus_float32.json").write_text(result(rows), "utf-8")
    (tmp_path / "growth_float32.json").write_text(result(growth), "utf-8")
    plot.engines(tmp_path, "a device")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["engines.png", "growth.png"]
