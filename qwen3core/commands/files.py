"""What commands read and write: texts and rows from arguments, files and standard input; results to one file."""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..errors import InputError, check_unicode
from ..reading import ENDINGS, is_url, read_rows
from ..writing import writing

FORMATS = (".jsonl", ".npy", ".safetensors")


def add_inputs(parser: argparse.ArgumentParser, what: str, name: str = "inputs") -> None:
    """Add the arguments of ``read_inputs``."""
    parser.add_argument(
        name,
        nargs="*",
        default=[],
        metavar="INPUT",
        help=f"{what}: a {' or '.join(ENDINGS)} file or its URL, - (standard input), or a text of several words",
    )
    parser.add_argument("--text", action="append", default=[], help="a text, whatever it looks like; may be repeated")


def read_inputs(inputs: Sequence[str], texts: Sequence[str] = ()) -> Iterator[tuple[Any, str]]:
    """(text or JSON row, where it came from) of every row of the inputs, then the texts. Raises InputError.

    An input that is no file is a text if it could not be the name of one: it has a space, and no ending.
    """
    if not inputs and not texts:
        raise InputError("expected an INPUT or a --text, found neither")
    for item in inputs:
        if item == "-" or os.path.exists(item) or is_url(item):
            yield from read_rows(item)
        elif re.search(r"\s", item) and not re.search(r"\.\w+$", item):
            yield _argument(item)
        else:
            raise InputError(f"{item}: expected a file, or a text by --text, found nothing of this name")
    yield from map(_argument, texts)


def _argument(value: str) -> tuple[str, str]:
    text = text_argument(value)
    where = f"argument {text[:40]!r}"
    check_unicode(where, text)
    return text, where


def text_argument(value: str) -> str:
    """A text among the arguments, as argparse's ``type``: UTF-8, also where the locale is none of it."""
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return value  # refused, with its name, where texts are checked


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
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if output == "-":
        if sys.stdout is None:
            raise InputError("standard output: expected an open one, found it closed")
        sys.stdout.writelines(lines)
        return
    with writing(output) as part:
        if part.suffix == ".npy":
            np.save(part, array)
        elif part.suffix == ".safetensors":
            save_file({name: array}, part)
        else:
            with part.open("w", encoding="utf-8") as file:
                file.writelines(lines)


def output_name(value: str) -> str:
    """An ``--output`` of ``write``, as argparse's ``type``."""
    return value if value == "-" else file_name(value, FORMATS)


def output_name_or_folder(value: str) -> str:
    """``output_name``, or a folder: what is one, or ends in ``/``."""
    return value if is_folder(value) else output_name(value)


def is_folder(output: str) -> bool:
    """Whether an ``--output`` is a folder, there already or to be made."""
    return output.endswith("/") or os.path.isdir(output)


def file_name(value: str, formats: tuple[str, ...]) -> str:
    """A file of one of these formats that can be written, as argparse's ``type``."""
    path = Path(value)
    if not value.endswith(formats) or path.is_dir():
        found = "a directory" if path.is_dir() else repr(value)
        raise argparse.ArgumentTypeError(f"expected a name ending in {', '.join(formats)}, found {found}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a directory to write in, found none at {path.parent}")
    return value
