"""The files of one training: the log of losses, their plot, and the state to resume from."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..reading import read_jsonl
from ..writing import writing

STATE = "state.pt"


def digest(values: Iterable[str | Tensor]) -> str:
    """The first 64 bits of the SHA-256 of texts and tensors in their order, in hexadecimal."""
    found = hashlib.sha256()
    for value in values:
        data = value.encode() if isinstance(value, str) else _bytes(value)
        found.update(b"%d:" % len(data))  # so that "a", "bc" is not "ab", "c"
        found.update(data)
    return found.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().data


class RunFiles:
    """``loss.jsonl``, ``loss.png`` and ``state.pt`` in a folder; only the first process writes."""

    def __init__(self, folder: Path, identity: dict[str, Any], writes: bool) -> None:
        """identity: what a state must agree in to be resumed from. writes: whether this is the first process."""
        self.folder, self.writes = folder, writes
        # As it is read from a state; an address is of one process.
        self.identity = json.loads(re.sub(" at 0x[0-9a-f]+", "", json.dumps(identity, default=repr)))
        self.rows: list[dict[str, Any]] = []

    def resume(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Take up the state in the folder, if one is there; the step to go on with. Raises InputError."""
        path, log = self.folder / STATE, self.folder / "loss.jsonl"
        if not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = dict(state["identity"])
        except OSError:
            raise
        except Exception as error:  # of many types, some without a message
            raise InputError(
                f"{path}: expected the state of a training, found {path.stat().st_size} bytes that are none "
                f"({type(error).__name__}); remove it to begin anew"
            ) from error
        names = [name for name in {**identity, **self.identity} if identity.get(name) != self.identity.get(name)]
        if names:
            differ = [f"{name} {_differing(identity.get(name), self.identity.get(name))}" for name in names]
            raise InputError(
                f"{path}: expected the state of this training, found one of {'; '.join(differ)}; "
                "use its options, or remove it to begin anew"
            )
        with torch.no_grad():
            for name, value in state["parameters"].items():
                parameters[name].copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        found = read_jsonl(log, broken=[]) if log.exists() else []  # a kill may have cut a row
        steps = range(state["step"])
        self.rows = [row for row, _ in found if isinstance(row, dict) and row.get("step") in steps]
        if self.writes:
            with writing(log) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")
        return state["step"]

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Write the state before ``step``; the one before it stays until this is safe. Raises OSError."""
        if not self.writes:
            return
        state = {"step": step, "identity": self.identity, "optimizer": optimizer.state_dict()}
        state["parameters"] = {name: p.detach() for name, p in parameters.items()}
        with writing(self.folder / STATE) as part:
            try:
                with part.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # torch's own, about what the error of the disk has left
                raise OSError(str(error.__context__ or error)) from error

    def log(self, row: dict[str, Any]) -> None:
        """Append a step's row to ``loss.jsonl``, the first one to an empty file."""
        if self.writes:
            path = self.folder / "loss.jsonl"
            try:
                with path.open("a" if self.rows else "w", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise OSError(f"{path}: expected to append a row, found {error}") from error
        self.rows.append(row)

    def finish(self, write: Callable[[], None] | None) -> None:
        """Draw the losses, where matplotlib is installed, have ``write`` write the result, then remove the state."""
        if not self.writes:
            return
        if self.rows and importlib.util.find_spec("matplotlib"):
            with writing(self.folder / "loss.png") as part:
                draw(self.rows, part)
        if write:
            write()
        (self.folder / STATE).unlink(missing_ok=True)


def _differing(there: Any, here: Any) -> str:
    """Two values, long ones from shortly before they differ."""
    first, second = repr(there), repr(here)
    if len(first + second) > 120:
        start = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        start = max(0, start - 20)
        first, second = first[start : start + 60], second[start : start + 60]
    return f"{first}, here {second}"


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
