"""Charts of a device's results, written beside them.

    python -m bench.plot bench/results/<device>

Of bench.run: engines.png and growth.png. Of bench_kernels.py: attention.png and attention_backward.png, TFLOP/s of each
batch, by sequence length; memory.png, the other kernels' share of copy bandwidth at the largest T.
"""

import argparse
import json
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from bench.report import by_label, timed_rows
from bench.workloads import OURS, Row
from qwen3core.writing import writing


def kernel_chart(path: Path, device: str, rows: list[Row], group: str, value: str, label: str, ceiling: float) -> None:
    """Grouped bars, one panel for each model, one colour for each engine that has a number; the ceiling as a line."""
    models, names, groups = (
        list(dict.fromkeys(row[key] for row in rows if value in row)) for key in ("model", "engine", group)
    )
    if not names:
        return
    width = 0.8 / len(names)
    size = (4 + 0.9 * len(groups), 4.2 * len(models))
    figure, axes = pyplot.subplots(len(models), squeeze=False, figsize=size, layout="constrained")
    for model, axis in zip(models, axes[:, 0], strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if row["model"] == model and row["engine"] == name and value in row]
            places = [groups.index(row[group]) + (i + 0.5) * width - 0.4 for row in own]
            axis.bar(places, [row[value] for row in own], width, label=name)
        axis.axhline(ceiling, color="black", linestyle="--", label="ceiling")
        axis.set_xticks(range(len(groups)), groups, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_ylabel(label)
        axis.set_title(f"{path.stem}, {model}, {device}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def engines(folder: Path, device: str) -> None:
    """Draw engines.png, every engine's time over qwen3core's, and growth.png, qwen3core's time per token."""
    rows = timed_rows(folder)
    groups = {
        label: others
        for label, group in by_label(rows).items()
        if (others := [row for row in group if row["engine"] != OURS and "ratio" in row])
    }
    if groups:
        ratio_chart(folder / "engines.png", device, groups)
    growth = [row for row in rows if row["workload"] == "growth"]
    if growth:
        growth_chart(folder / "growth.png", device, growth)


def ratio_chart(path: Path, device: str, groups: dict[str, list[Row]]) -> None:
    lines = sum(len(rows) + 1.5 for rows in groups.values())
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.22 * lines), layout="constrained")
    ticks: dict[float, str] = {}
    top = 0.0
    for label, rows in groups.items():
        axis.text(0.05, top, label, weight="bold", va="center")
        places = [top + 1 + i for i in range(len(rows))]
        low, middle, high = (
            [float(row[key] if key in row else row["ratio"]) for row in rows]
            for key in ("ratio_p25", "ratio", "ratio_p75")
        )
        spread = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        bars = axis.barh(places, middle, xerr=spread, color=["C0" if m >= 1 else "C1" for m in middle])
        axis.bar_label(bars, fmt="%.2fx", padding=3)
        ticks |= dict(zip(places, (row["engine"] for row in rows), strict=True))
        top += len(rows) + 1.5
    axis.axvline(1, color="black", linestyle="--")
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_ylim(top, -1)
    axis.margins(x=0.1)
    axis.set_xlabel("time or memory over qwen3core's (median and quartiles); orange: less than it")
    axis.set_title(device, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    save(figure, path)


def growth_chart(path: Path, device: str, rows: list[Row]) -> None:
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    many = [row for row in rows if row["size"].endswith("texts")]
    one = [row for row in rows if not row["size"].endswith("texts")]
    for label, found in (("texts of 32 tokens", many), ("one text", one)):
        axis.plot([row["tokens"] for row in found], [row["p50"] / row["tokens"] for row in found], "o-", label=label)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens in the call")
    axis.set_ylabel("ms per token")
    axis.set_title(f"qwen3core, {device}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    with writing(path) as part:
        figure.savefig(part, dpi=130)
    pyplot.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    memory: list[Row] = []
    device = ""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        rows, device = found["rows"], found["environment"]["device"]
        if path.stem in ("attention", "attention_backward"):
            ceiling = found["ceilings"]["matmul_tflops"]
            kernel_chart(folder / f"{path.stem}.png", device, rows, "batch", "TFLOP/s", "TFLOP/s", ceiling)
        elif rows and "kernel" in rows[0] and not path.stem.endswith("_tune"):
            largest = max(int(row["T"]) for row in rows)
            rows = [row for row in rows if int(row["T"]) == largest]
            memory += [row | {"group": f"{row['kernel']} {row['direction']}"} for row in rows]
    if memory:
        kernel_chart(folder / "memory.png", device, memory, "group", "share", "share of copy bandwidth", 1.0)
    engines(folder, device)


if __name__ == "__main__":
    main()
