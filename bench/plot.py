"""Charts from the results of bench_kernels.py, beside them: attention.png, attention_backward.png, memory.png.

    python bench/plot.py bench/results/<device>

Attention: TFLOP/s of each batch, by sequence length; the others: share of copy bandwidth at the largest T.
"""

import argparse
import json
from pathlib import Path

from matplotlib import pyplot


def chart(path: Path, device: str, rows: list[dict], group: str, value: str, label: str, ceiling: float) -> None:
    """Grouped bars, one panel for each model, one colour for each side that has a number; the ceiling as a line."""
    models, sides, groups = (
        list(dict.fromkeys(row[key] for row in rows if value in row)) for key in ("model", "side", group)
    )
    if not sides:
        return
    width = 0.8 / len(sides)
    size = (4 + 0.9 * len(groups), 4.2 * len(models))
    figure, axes = pyplot.subplots(len(models), squeeze=False, figsize=size, layout="constrained")
    for model, axis in zip(models, axes[:, 0], strict=True):
        for i, side in enumerate(sides):
            found = {
                row[group]: row[value] for row in rows if row["model"] == model and row["side"] == side and value in row
            }
            places = [groups.index(name) + (i + 0.5) * width - 0.4 for name in found]
            axis.bar(places, found.values(), width, label=side)
        axis.axhline(ceiling, color="black", linestyle="--", label="ceiling")
        axis.set_xticks(range(len(groups)), groups, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_ylabel(label)
        axis.set_title(f"{path.stem}, {model}, {device}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def engines(folder: Path, device: str, found: list[dict]) -> None:
    """engines.png: the time of every side as a multiple of qwen3core's; growth.png: the cost of a token."""
    growth = [row for row in found if row["question"] == "growth"]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in found:
        if row["question"] != "growth" and row["side"] != "qwen3core":
            groups.setdefault((row["question"], row["workload"], row["dtype"]), []).append(row)
    if groups:
        lines = sum(len(rows) + 1.5 for rows in groups.values())
        figure, axis = pyplot.subplots(figsize=(9, 1 + 0.22 * lines), layout="constrained")
        ticks, place = {}, 0.0
        for name, rows in groups.items():
            axis.text(0.05, place, ", ".join(name), weight="bold", va="center")
            places = [place + 1 + i for i in range(len(rows))]
            low, middle, high = ([row[key] for row in rows] for key in ("ratio_p20", "ratio", "ratio_p80"))
            spread = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            bars = axis.barh(places, middle, xerr=spread, color=["C0" if m >= 1 else "C1" for m in middle])
            axis.bar_label(bars, fmt="%.2fx", padding=3)
            ticks |= dict(zip(places, (row["side"] for row in rows), strict=True))
            place += len(rows) + 1.5
        axis.axvline(1, color="black", linestyle="--")
        axis.set_yticks(list(ticks), list(ticks.values()))
        axis.set_ylim(place, -1)
        axis.margins(x=0.1)
        axis.set_xlabel("time, as a multiple of qwen3core's (median, 20th to 80th percentile); orange: faster than it")
        axis.set_title(device, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        save(figure, folder / "engines.png")
    if growth:
        figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for label, rows in (
            ("texts of 32 tokens", [row for row in growth if row["workload"].endswith("texts")]),
            ("one text", [row for row in growth if not row["workload"].endswith("texts")]),
        ):
            axis.plot([row["tokens"] for row in rows], [row["p50"] / row["tokens"] for row in rows], "o-", label=label)
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens in the call")
        axis.set_ylabel("ms per token")
        axis.set_title(f"qwen3core, {device}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
        save(figure, folder / "growth.png")


def save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shares, device = [], ""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        rows, device = found["rows"], found["environment"]["device"]
        if path.stem in ("attention", "attention_backward"):
            ceiling = found["ceilings"]["matmul_tflops"]
            chart(folder / f"{path.stem}.png", device, rows, "batch", "TFLOP/s", "TFLOP/s", ceiling)
        elif not path.stem.endswith("_tune"):
            largest = max(int(row["T"]) for row in rows)
            rows = [row for row in rows if int(row["T"]) == largest]
            shares += [row | {"group": f"{row['kernel']} {row['direction']}"} for row in rows]
    if shares:
        chart(folder / "memory.png", device, shares, "group", "share", "share of copy bandwidth", 1.0)


if __name__ == "__main__":
    main()
