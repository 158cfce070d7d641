"""The comparison with other engines runs, on small checkpoints; and the README's table is that of the results."""

import json
import subprocess
import sys

from conftest import ROOT

from bench.run import table


def test_quick_bench_runs():
    command = [sys.executable, "-m", "bench.run", "--quick", "--question", "corpus", "rerank", "memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ") for line in done.stdout.splitlines() if line.startswith(("corpus", "rerank", "memory"))]
    sides = {
        question: {row[3] if question != "memory" else row[2] for row in rows if row[0] == question}
        for question in ("corpus", "rerank", "memory")
    }
    for found in sides.values():
        assert {"qwen3core", "transformers", "sentence-transformers"} <= found


def test_readme_table_is_that_of_the_results():
    [folder] = {path.parent for path in (ROOT / "bench" / "results").glob("*/query_*.json")}  # of one machine
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"<!-- bench -->\n{table(folder)}\n<!-- /bench -->" in readme


def test_table_divides_by_our_time(tmp_path):
    labels = {"question": "corpus", "workload": "2 texts", "tokens": 100}
    rows = [
        labels | {"side": side, "p50": p50, "ratio": ratio}
        for side, p50, ratio in (("qwen3core", 50, 1), ("x", 75, 1.5))
    ]
    (tmp_path / "corpus_float32.json").write_text(json.dumps({"rows": rows}), "utf-8")
    assert table(tmp_path).splitlines()[2] == "| corpus, 2 texts, float32 | 2000 tokens/s | 1.50x |"
