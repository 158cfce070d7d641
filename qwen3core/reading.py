"""Texts and rows, read in one way by the commands, training, evaluation and ``stream``: files, URLs, standard input.

UTF-8 whatever the locale says; a byte order mark at the beginning is no text; a line ends at ``\\n``, ``\\r\\n`` or
``\\r``, nowhere else (U+2028 and its like are part of a text). Every error names the line, or of Parquet the row.
"""

import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, as_text, check_unicode

ENDINGS = (".jsonl", ".parquet", ".txt")
"""Endings of the files that ``read_rows`` reads, in any case."""

PARQUET_ROWS = 1024
"""Rows of a Parquet file that are decoded at a time."""
PARQUET_BYTES = 2**20
"""Bytes that are read at a time of each of its columns."""


def is_url(source: str | Path) -> bool:
    """Whether it has the form ``protocol://...``."""
    return bool(re.fullmatch(r"\w[\w.+-]*://\S+", str(source)))


def open_bytes(source: str | Path) -> AbstractContextManager[BinaryIO]:
    """The bytes of a file, of a URL that fsspec and its packages know, or of ``-``, standard input.

    Raises InputError, and the errors of OSError's and other families that fsspec's packages have.
    """
    if source == "-":
        return nullcontext(sys.stdin.buffer)  # before the decoding: sys.stdin has the locale's
    if not is_url(source):
        return open(source, "rb")
    try:
        import fsspec

        return fsspec.open(str(source), "rb")
    except (ImportError, ValueError) as error:  # fsspec's own, or what it says of a protocol
        raise InputError(f"{source}: expected a URL that can be read here, found {error}") from error


def read_lines(source: str | Path, file: BinaryIO | None = None) -> Iterator[tuple[str, str]]:
    """(line, "source, line n") of every line, blank ones included, as it is read; ``-`` is standard input.

    What follows the last line end is no line if it is empty. file: ``source``, where it is open already. Raises
    InputError (not UTF-8, or what ``check_unicode`` refuses) and OSError.
    """
    name = "standard input" if source == "-" else source
    with nullcontext(file) if file else open_bytes(source) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
        try:
            for number, line in enumerate(text, 1):
                where = f"{name}, line {number}"
                if not line.isascii() and (wrong := re.search("[\udc80-\udcff]", line)):
                    raise InputError(f"{where}: expected UTF-8 text, found byte {ord(wrong[0]) - 0xDC00:#x}")
                line = line.removesuffix("\n")
                check_unicode(where, line)
                yield line, where
        finally:
            text.detach()  # which leaves standard input open


def read_jsonl(source: str | Path, broken: list[str] | None = None) -> Iterator[tuple[Any, str]]:
    """(JSON value, "source, line n") of every line that is not blank.

    broken: takes the message of each line that is not JSON; without it, the first one raises InputError.
    """
    for line, where in read_lines(source):
        if line.strip():
            try:
                yield _parse_json(line, where), where
            except InputError as error:
                if broken is None:
                    raise
                broken.append(str(error))


def read_rows(source: str | Path) -> Iterator[tuple[Any, str]]:
    """(row, where): of .jsonl JSON values, of .parquet objects, of .txt and standard input lines. Raises InputError."""
    _check_ending(source)
    with open_bytes(source) as file:
        for read, where in unread_rows(source, file):
            yield read(), where


def unread_rows(
    source: str | Path, file: BinaryIO, columns: Sequence[str] | None = None
) -> Iterator[tuple[Callable[[], Any], str]]:
    """(function that parses and checks the row, where) of every row, for those who pass some over.

    file: ``source``, open. columns: of Parquet, those to read where they are there; None: all. Raises InputError.
    """
    ending = _check_ending(source)
    if ending == ".parquet":
        yield from _parquet_rows(source, file, columns)
        return
    for line, where in read_lines(source, file):
        if ending != ".jsonl":
            yield partial(str, line), where
        elif line.strip():
            yield partial(_parse_json, line, where), where


def _check_ending(source: str | Path) -> str:
    """The ending of a source whose rows can be read; none of standard input. Raises InputError."""
    ending = "" if source == "-" else Path(source).suffix.lower()
    if source != "-" and ending not in ENDINGS:
        found = "a directory" if Path(source).is_dir() else ending or "no ending"
        raise InputError(f"{source}: expected a file ending in {', '.join(ENDINGS)}, found {found}")
    return ending


def _parquet_rows(
    source: str | Path, file: BinaryIO, columns: Sequence[str] | None
) -> Iterator[tuple[Callable[[], Any], str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(f"{source}: pyarrow is not installed: pip install pyarrow ({error})") from error

    def read(batch: Any, index: int, where: str) -> Any:
        try:
            row = {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: expected UTF-8 text, found {error}") from error
        _check(row, where)
        return row

    number = 0
    try:
        # Without both options, all that has been read of the file, or a whole column of a row group, stays in memory.
        opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=PARQUET_BYTES)
        for batch in opened.iter_batches(PARQUET_ROWS, columns=columns):
            for index in range(len(batch)):
                where = f"{source}, row {(number := number + 1)}"
                yield partial(read, batch, index, where), where
    except ArrowException as error:
        raise InputError(f"{source}: expected a Parquet file, found {error}") from error


def as_iterator(name: str, values: Iterable[Any]) -> Iterator[Any]:
    """Iterate over anything but a text, bytes, a dict or a table; over an open file, its lines without their ends.

    Raises InputError.
    """
    if hasattr(values, "columns"):  # of pandas, polars and pyarrow; it would give their names
        raise InputError(f"{name}: expected a list, found {type(values).__name__}, a table: pass one of its columns")
    if hasattr(values, "to_pylist"):  # of pyarrow, whose items are no str
        values = values.to_pylist()
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise InputError(f"{name}: expected a list, found {type(values).__name__}")
    try:
        found = iter(values)
    except TypeError as error:  # an array of no dimensions
        raise InputError(f"{name}: expected a list, found {type(values).__name__} ({error})") from error
    if not isinstance(values, io.TextIOBase):
        return found
    return (line.removesuffix("\n").removeprefix("" if n else "\ufeff") for n, line in enumerate(found))


def as_list(name: str, values: Iterable[Any]) -> list[Any]:
    """``as_iterator`` as a list."""
    return list(as_iterator(name, values))


def as_texts(name: str, values: str | Iterable[str]) -> list[str]:
    """One text, or any iterable of texts, as a list of plain str. Raises InputError, naming the index."""
    texts = [values] if isinstance(values, str) else as_iterator(name, values)
    return [as_text(f"input {index}", text) for index, text in enumerate(texts)]


def as_pairs(values: Iterable[Sequence[str]]) -> tuple[list[tuple[str, str]], bool]:
    """(query, document) pairs as plain str, and whether ``values`` is a single one. Raises InputError."""
    values = as_list("pairs", values)
    single = len(values) == 2 and all(isinstance(part, str) for part in values)
    pairs = []
    for index, pair in enumerate([values] if single else values):
        pair = pair.tolist() if hasattr(pair, "tolist") else pair  # a row of an array
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            found = f"{len(pair)} items" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise InputError(f"pair {index}: expected (query, document), found {found}")
        roles = zip(("query", "document"), pair, strict=True)
        query, document = (as_text(f"pair {index}: {role}", text) for role, text in roles)
        pairs.append((query, document))
    return pairs, single


def _parse_json(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON, found {line[:80]!r}") from error
    if "\\u" in line:  # all else is text as the line is
        _check(value, where)
    return value


def _check(value: Any, where: str) -> None:
    """Raise InputError where a text of a JSON value is no Unicode text."""
    if isinstance(value, str):
        check_unicode(where, value)
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check(item, where)
