"""Reading results: the rows of a device's folder, the labels of tables and charts, the tables of bench/README.md."""

import json
from pathlib import Path

from bench.harness import RESULTS
from bench.workloads import OURS, Row
from qwen3core.writing import writing

README = Path(__file__).parent / "README.md"
TARGETS = [
    ("one query", "vLLM", 1.2),
    ("one query", "OpenVINO", 1.3),
    ("corpus", "vLLM", 1.1),
    ("corpus", "OpenVINO, best batches", 1.5),
    ("corpus", "sentence-transformers, best batches", 2.3),
    ("corpus", "its matrix products alone", 0.9),
    ("corpus", "qwen3core, int8", 0.625),
    ("equal lengths, 8 x 128", "vLLM", 1.05),
    ("equal lengths, 8 x 128", "its matrix products alone", 0.92),
    ("rerank", "vLLM", 1.6),
    ("rerank", "transformers, last logits", 2.5),
    ("long", "vLLM", 1.3),
]
"""Workload, engine, the least multiple of our time that it should take, of int8 the most; on CPUs with bfloat16."""


def timed_rows(folder: Path) -> list[Row]:
    """The rows of all results in a device's folder that compare times, each with its "dtype"."""
    return [
        row | {"dtype": path.stem.rpartition("_")[2]}
        for path in sorted(folder.glob("*_*.json"))
        for row in json.loads(path.read_text("utf-8"))["rows"]
        if "ratio" in row or "differs" in row
    ]


def environments(folder: Path) -> list[dict]:
    """Those of all results in a device's folder that compare engines."""
    return [json.loads(path.read_text("utf-8"))["environment"] for path in sorted(folder.glob("*_*.json"))]


def by_label(rows: list[Row]) -> dict[str, list[Row]]:
    """Group the rows that compare engines by the label that tables and charts give them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["workload"] != "growth":
            groups.setdefault(f"{row['workload']}, {row['size']}, {row['dtype']}", []).append(row)
    return groups


def table(folder: Path) -> list[str]:
    """A row for each workload, a column for each engine: its time over qwen3core's, and quartiles of that."""
    rows = timed_rows(folder)
    groups = by_label(rows)
    names = dict.fromkeys(row["engine"] for rows in groups.values() for row in rows if row["engine"] != OURS)
    lines = [f"| workload | {OURS} | " + " | ".join(names) + " |", "|---|---:" + "|---:" * len(names) + "|"]
    for label, group in groups.items():
        engines = {row["engine"]: row for row in group}
        cells = (cell(engines[name]) if name in engines else "" for name in names)
        lines.append(f"| {label} | {speed(engines[OURS])} | " + " | ".join(cells) + " |")
    for label, worst in agreements(rows).items():
        cells = (f"{worst[name]:.4g}" if name in worst else "" for name in names)
        lines.append(f"| {label} | | " + " | ".join(cells) + " |")
    return lines


def cell(row: Row) -> str:
    if "differs" in row:
        return f"differs: {row['differs']}"
    spread = f" [{row['ratio_p25']:.2f}, {row['ratio_p75']:.2f}]" if "ratio_p25" in row else ""
    return f"{row['ratio']:.2f}x{spread}"


def agreements(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Least cosine and largest difference of P(yes) to qwen3core's results, by dtype, by engine."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        for key, label, worst in (("cosine", "least cosine", min), ("dP", "largest difference of P(yes)", max)):
            if key in row:
                engines = found.setdefault(f"{label}, {row['dtype']}", {})
                engines[row["engine"]] = worst(row[key], engines.get(row["engine"], row[key]))
    return found


def targets(folder: Path) -> list[str]:
    """The targets that were measured, and what was seen."""
    if not any("bf16" in name for each in environments(folder) for name in each.get("cpu", ())):
        return []
    lines = ["", "| workload | engine | target | seen | met |", "|---|---|---:|---:|---|"]
    groups = by_label(timed_rows(folder))
    for workload, engine, least in TARGETS:
        for label, rows in groups.items():
            for row in rows:
                if label.startswith(workload) and label.endswith("bfloat16") and row["engine"] == engine:
                    missed = row.get("ratio", 0) < least
                    met = "**no**" if missed != engine.endswith("int8") else "yes"
                    lines.append(f"| {label} | {engine} | {least:.2f}x | {cell(row)} | {met} |")
    return lines


def speed(row: Row) -> str:
    if row["workload"] == "memory":
        return f"{row['MiB']:.0f} MiB"
    if row["workload"] == "one query":
        return f"{row['p50']:.0f} ms"
    if "tokens" in row:
        return f"{row['tokens'] / row['p50'] * 1e3:.0f} tokens/s"
    return f"{row['p50'] / 1e3:.1f} s"


def tables(results: Path = RESULTS) -> str:
    """A section for each device that engines were compared on: versions, the table, targets."""
    folders = sorted({path.parent for path in results.glob("*/*.json")})
    sections = (
        [*heading(folder), "", *table(folder), *targets(folder)] for folder in folders if by_label(timed_rows(folder))
    )
    return "\n".join("\n".join(lines) + "\n" for lines in sections)


def heading(folder: Path) -> list[str]:
    """The device, what it can do and had to do, its charts, and which versions were compared when."""
    found = environments(folder)
    last = max(found, key=lambda environment: environment["date"])
    said = [" to ".join(sorted({min(environment["date"] for environment in found), last["date"]}))]
    said.append(f"torch {last['torch']}")
    if "threads" in last:
        said.append(f"{last['threads']} threads")
    said += last.get("cpu", ())
    loads = [load for environment in found for load in environment.get("load", ())]
    if loads:
        said.append(f"load {min(loads):.1f} to {max(loads):.1f}")
    charts = ", ".join(f"[{path.name}](results/{folder.name}/{path.name})" for path in sorted(folder.glob("*.png")))
    lines = [f"### {last['device']}", "", f"{', '.join(said)}. Charts: {charts}."]
    versions: dict[str, str] = {}
    for each in found:
        for engine, used in each.get("engines", {}).items():
            versions.setdefault(", ".join(f"{package} {version}" for package, version in used.items()), engine)
    if versions:
        lines += ["", "Versions: " + "; ".join(f"{engine}: {used}" for used, engine in versions.items()) + "."]
    return lines


def write_tables() -> None:
    """Put the tables of all devices between the two marks of bench/README.md."""
    before, mark, rest = README.read_text("utf-8").partition("<!-- bench -->\n")
    _, end, after = rest.partition("<!-- /bench -->")
    with writing(README) as part:
        part.write_text(f"{before}{mark}{tables()}{end}{after}", "utf-8")
