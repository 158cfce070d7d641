"""Reading results: the rows of a device's folder, the labels of tables and charts, the tables of bench/README.md."""

import json
from pathlib import Path

from bench.harness import RESULTS
from bench.workloads import OURS, Row
from qwen3core.writing import writing

README = Path(__file__).parent / "README.md"


def timed_rows(folder: Path) -> list[Row]:
    """The rows of all results in a device's folder that compare times, each with its "dtype"."""
    return [
        row | {"dtype": path.stem.rpartition("_")[2]}
        for path in sorted(folder.glob("*_*.json"))
        for row in json.loads(path.read_text("utf-8"))["rows"]
        if "ratio" in row
    ]


def by_label(rows: list[Row]) -> dict[str, list[Row]]:
    """Group the rows that compare engines by the label that tables and charts give them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["workload"] != "growth":
            groups.setdefault(f"{row['workload']}, {row['size']}, {row['dtype']}", []).append(row)
    return groups


def table(folder: Path) -> str:
    """A row for each workload, a column for each engine: its time over qwen3core's."""
    groups = by_label(timed_rows(folder))
    names = dict.fromkeys(row["engine"] for rows in groups.values() for row in rows if row["engine"] != OURS)
    lines = [f"| workload | {OURS} | " + " | ".join(names) + " |", "|---|---:" + "|---:" * len(names) + "|"]
    for label, rows in groups.items():
        engines = {row["engine"]: row for row in rows}
        cells = (f"{engines[name]['ratio']:.2f}x" if name in engines else "" for name in names)
        lines.append(f"| {label} | {speed(engines[OURS])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed(row: Row) -> str:
    if row["workload"] == "one query":
        return f"{row['p50']:.0f} ms"
    if "tokens" in row:
        return f"{row['tokens'] / row['p50'] * 1e3:.0f} tokens/s"
    return f"{row['p50'] / 1e3:.1f} s"


def tables(results: Path = RESULTS) -> str:
    """A section for each device that engines were compared on: versions, the table, its charts."""
    sections = []
    for folder in sorted({path.parent for path in results.glob("*/*.json")}):
        if not by_label(timed_rows(folder)):
            continue
        found = [json.loads(path.read_text("utf-8"))["environment"] for path in sorted(folder.glob("*_*.json"))]
        last = max(found, key=lambda environment: environment["date"])
        threads = f", {last['threads']} threads" if "threads" in last else ""
        dates = " to ".join(sorted({min(environment["date"] for environment in found), last["date"]}))
        charts = ", ".join(f"[{path.name}](results/{folder.name}/{path.name})" for path in sorted(folder.glob("*.png")))
        sections.append(
            f"### {last['device']}\n\n{dates}, torch {last['torch']}{threads}. Charts: {charts}.\n\n{table(folder)}\n"
        )
    return "\n".join(sections)


def write_tables() -> None:
    """Put the tables of all devices between the two marks of bench/README.md."""
    before, mark, rest = README.read_text("utf-8").partition("<!-- bench -->\n")
    _, end, after = rest.partition("<!-- /bench -->")
    with writing(README) as part:
        part.write_text(f"{before}{mark}{tables()}{end}{after}", "utf-8")
