"""The files of one training: the log of losses, their plot, and the state to resume from."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..reading import read_jsonl


class RunFiles:
    """``loss.jsonl``, ``loss.png`` and ``state.pt`` in a folder; only the first process writes."""

    def __init__(self, folder: Path, identity: dict[str, Any], writes: bool) -> None:
        """identity: what a state must agree in to be resumed from. writes: whether this is the first process."""
        self.folder, self.identity, self.writes = folder, identity, writes
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []

    def resume(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Take up the state in the folder, if one is there; the step to go on with. Raises InputError."""
        first, log, path = 0, self.folder / "loss.jsonl", self.folder / "state.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["identity"] != self.identity:
                differ = [f"{k} {v!r}" for k, v in state["identity"].items() if self.identity.get(k) != v]
                raise InputError(
                    f"{path}: expected the state of this training, found one of {', '.join(differ)}; "
                    "use its options, or remove it to begin anew"
                )
            with torch.no_grad():
                for name, value in state["parameters"].items():
                    parameters[name].copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            self.rows = [row for row, _ in read_jsonl(log) if row["step"] < first]
        if self.writes:
            log.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")
        return first

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the state before ``step``, whole or not at all."""
        if self.writes:
            state = {"step": step, "identity": self.identity, "optimizer": optimizer.state_dict()}
            part = self.folder / "state.pt.part"
            torch.save(state | {"parameters": {name: p.detach() for name, p in parameters.items()}}, part)
            os.replace(part, self.folder / "state.pt")

    def log(self, row: dict[str, Any]) -> None:
        """Append a step's row to ``loss.jsonl``."""
        self.rows.append(row)
        if self.writes:
            with (self.folder / "loss.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Draw the losses, where matplotlib is installed, and remove the state."""
        if not self.writes:
            return
        if importlib.util.find_spec("matplotlib"):
            draw(self.rows, self.folder / "loss.png")
        (self.folder / "state.pt").unlink(missing_ok=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the loss of every step, and its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
    width = max(1, len(rows) // 50)
    means = [sum(near) / len(near) for i in range(len(rows)) if (near := values[max(0, i - width) : i + width + 1])]
    axes.plot(steps, values, color="0.8", linewidth=0.8, label="one step")
    axes.plot(steps, means, color="C0", linewidth=1.8, label=f"mean of {2 * width + 1} steps")
    axes.set(xlabel="step", ylabel="loss", title=f"Loss by step, {means[0]:.3g} to {means[-1]:.3g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
