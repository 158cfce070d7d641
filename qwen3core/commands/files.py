"""What commands read and write: texts and rows from arguments, files and standard input; results to one file."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..errors import InputError
from ..jsonl import numbered_lines, parse_json, read_text

FORMATS = (".jsonl", ".npy", ".safetensors")


def read_inputs(inputs: Sequence[str]) -> list[tuple[Any, str]]:
    """(text or JSON row, where it came from) of every text, .txt line, .jsonl row, and line of standard input (-)."""
    rows: list[tuple[Any, str]] = []
    for item in inputs:
        if item == "-":
            rows += numbered_lines(sys.stdin.read(), "standard input")
        elif item.endswith(".txt"):
            rows += numbered_lines(read_text(item), item)
        elif item.endswith(".jsonl"):
            rows += ((parse_json(line, where), where) for line, where in numbered_lines(read_text(item), item))
        else:
            rows.append((item, f"argument {item[:40]!r}"))
    return rows


def text_of(row: Any, field: str, where: str) -> str:
    """The row itself, or its field, whichever is a text. Raises InputError that begins with ``where``."""
    text = row.get(field) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a text, or an object with a text {field!r}, found {str(row)[:80]}")
    return text


def write(output: str, name: str, array: NDArray[np.float32], rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows as .jsonl, or the array of all inputs in their order; whole or not at all. ``-``: standard output.

    name: of the array in a .safetensors file.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output == "-":
        sys.stdout.writelines(lines)
        return
    target = Path(output)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        if target.suffix == ".npy":
            np.save(part, array)
        elif target.suffix == ".safetensors":
            save_file({name: array}, part)
        else:
            with part.open("w", encoding="utf-8") as file:
                file.writelines(lines)
        os.replace(part, target)


def output_name(value: str) -> str:
    """An ``--output`` that can be written, as argparse's ``type``."""
    if value != "-" and not value.endswith(FORMATS):
        raise argparse.ArgumentTypeError(f"expected a name ending in {', '.join(FORMATS)}, or -, found {value!r}")
    if value != "-" and not Path(value).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing directory, found none at {Path(value).parent}")
    return value
