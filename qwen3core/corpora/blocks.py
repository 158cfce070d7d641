"""The rows of a corpus in blocks of a fixed number, each with its id; and what tells a file from another."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..errors import InputError
from ..reading import open_bytes, unread_rows

ENDS = 2**20
"""Bytes of the beginning and of the end of a file that ``fingerprint`` reads."""


@dataclass(frozen=True)
class Block:
    """Rows of a corpus that are embedded and written together, not parsed yet."""

    number: int
    """Of the block, from 0."""
    start: int
    """Number of the first row in the whole corpus, from 0."""
    rows: list[tuple[Callable[[], Any], str]]
    """For each row a function that parses it, and where it comes from."""
    has_ids: bool
    """Whether rows have an ``id``; else their number is it."""
    bytes_read: tuple[int, int]
    """Of the corpus before this block, and up to its end, as far as they have been read."""

    def columns(self) -> dict[str, list[str]]:
        """``id`` and ``text`` of every row. Raises InputError, which names the line or row."""
        found: dict[str, list[str]] = {"id": [], "text": []}
        for number, (read, where) in enumerate(self.rows, self.start):
            row = read()
            text = row.get("text") if isinstance(row, dict) else row
            if not isinstance(text, str):
                raise InputError(f"{where}: expected a text, or an object with a text 'text', found {str(row)[:80]}")
            found["text"].append(text)
            found["id"].append(self._id(row, number, where))
        return found

    def _id(self, row: Any, number: int, where: str) -> str:
        value = _id_of(row)
        if self.has_ids and type(value) not in (str, int):
            raise InputError(f"{where}: expected an id, text or integer, as the first row has, found {value!r:.80}")
        if not self.has_ids and value is not None:
            raise InputError(f"{where}: expected no id, as in the first row, found {value!r:.80}")
        return str(value) if self.has_ids else str(number)


def read_blocks(inputs: Sequence[str], rows: int) -> Iterator[Block]:
    """All rows of the inputs, in their order, in blocks of ``rows``; the last one may be shorter.

    inputs: .jsonl, .parquet or .txt, files or URLs. The first row says whether rows have ids. Holds one block; what it
    passes over is not parsed. Raises InputError and OSError.
    """
    source, number, has_ids, before = _rows(inputs), 0, False, 0
    while found := list(islice(source, rows)):
        if not number:
            has_ids = _id_of(found[0][0]()) is not None
        after = found[-1][2]
        unread = [(read, where) for read, where, _ in found]
        yield Block(number, number * rows, unread, has_ids, (before, after))
        number, before = number + 1, after


def _id_of(row: Any) -> Any:
    return row.get("id") if isinstance(row, dict) else None


def _rows(inputs: Sequence[str]) -> Iterator[tuple[Callable[[], Any], str, int]]:
    """(function that parses the row, where, bytes read so far) of every row."""
    before = 0
    for name in inputs:
        with open_bytes(name) as file:
            for read, where in unread_rows(name, file, ("id", "text")):
                yield read, where, before + file.tell()
            before += file.seek(0, os.SEEK_END)


def fingerprint(source: str) -> dict[str, Any]:
    """What tells an input from another: its name without folders, its size, a hash of its beginning and end.

    Raises InputError for what cannot be read again after a kill, such as standard input or a pipe, and OSError.
    """
    if source == "-":
        raise InputError("-: expected files or URLs, which can be read again after a kill, found standard input")
    with open_bytes(source) as file:
        if not file.seekable():
            raise InputError(f"{source}: expected a file that can be read again after a kill, found a pipe")
        size = file.seek(0, os.SEEK_END)
        ends = b""
        for place in (0, max(0, size - ENDS)):
            file.seek(place)
            ends += file.read(ENDS)
    return {"name": source.rpartition("/")[2], "size": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}
