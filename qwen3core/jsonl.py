"""UTF-8 text and JSON lines, read in one way: by training, evaluation and the commands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def read_text(path: str | Path) -> str:
    """The whole file, with every line end as ``\\n``. Raises InputError where it is not UTF-8, and OSError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#x}") from error


def numbered_lines(text: str, source: str | Path) -> Iterator[tuple[str, str]]:
    """(line, "source, line n") of every line, empty ones included; what follows the last line end is none if empty."""
    # Not splitlines: U+2028 and its like are part of a text.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        yield line, f"{source}, line {number}"


def parse_json(line: str, where: str) -> Any:
    """The JSON value of a line. Raises InputError that begins with ``where``."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON, found {line[:80]!r}") from error


def read_jsonl(path: str | Path, broken: list[str] | None = None) -> Iterator[tuple[Any, str]]:
    """(row, "file, line n") of every line that is not blank.

    broken: takes the message of each line that is not JSON; without it, the first one raises InputError.
    """
    for line, where in numbered_lines(read_text(path), path):
        if line.strip():
            try:
                yield parse_json(line, where), where
            except InputError as error:
                if broken is None:
                    raise
                broken.append(str(error))
