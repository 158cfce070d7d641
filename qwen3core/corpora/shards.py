"""A corpus to shards of Parquet in a folder: each is whole or not there, so that a run goes on after any kill."""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..errors import InputError, check_int
from ..writing import locked, writing_into
from .blocks import Block, fingerprint, read_blocks
from .stage import Embed

MANIFEST = "_manifest.json"
"""What the run is; readers of Parquet folders pass over names that begin with an underline."""
ROWS_PER_SHARD = 4096
"""Rows of a shard, unless the caller says: what a kill can lose."""


def embed_corpus(
    stage: Embed,
    inputs: Sequence[str],
    output: str | Path,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    shard: tuple[int, int] = (1, 1),
) -> dict[str, int]:
    """Write ``part-00000.parquet`` and so on, with columns id (string) and embedding (float32 [dim]), to a folder.

    A part that is there is passed over: the same call goes on where it was killed. Batches are made within a part, so
    that with ``Embed``'s own ops on one CPU, at one number of threads, all bytes are those of a run without a kill.

    Args:
        inputs: .jsonl, .parquet or .txt, files or URLs; rows of a text, or of ``text`` and ``id``. Without an id, it is
            the row's number in the corpus, from 0.
        output: a new folder, or one of the same run: checkpoint, options and inputs are compared.
        shard: (k, n): the k-th of n processes, from 1, takes part k - 1, n + k - 1, ...; n may change after a kill.

    Returns:
        Numbers of ``shards`` and ``texts`` that are this process's, of them ``written`` by this call, and ``of`` all.

    Raises:
        InputError: for the inputs, another run in the folder, a process that is at work there.
        OSError: for what cannot be read or written.
    """
    check_int("rows_per_shard", rows_per_shard, 1)
    k, n = shard
    check_int("shard: its number", k, 1, n)
    output = Path(output)
    sources = [fingerprint(name) for name in inputs]
    own = output / f".{k}-of-{n}"
    done = {"shards": 0, "of": 0, "texts": 0, "written": 0}
    with locked(own), ExitStack() as stack:
        stack.callback(shutil.rmtree, own)  # after an error too, unlike after a kill
        _agree(output, {**stage.identity(), "rows_per_shard": rows_per_shard, "inputs": sources}, own)
        bar, texts = None, 0
        for block in read_blocks(inputs, rows_per_shard):
            done["of"] += 1
            if block.number % n != k - 1:
                continue
            done["shards"] += 1
            done["texts"] += len(block.rows)
            path = output / f"part-{block.number:05}.parquet"
            if path.exists():
                continue
            if bar is None:  # what was done before a kill counts for no rate
                bar = stack.enter_context(_bar(sum(source["size"] for source in sources), block.bytes_read[0]))
            with writing_into(output, f"{own.name}/part") as part:
                write_parquet(part / path.name, _embedded(stage, block))
            done["written"] += 1
            texts += len(block.rows)
            bar.set_postfix_str(f"{texts / bar.format_dict['elapsed']:.1f} texts/s", refresh=False)
            bar.update(block.bytes_read[1] - bar.n)
    return done


def _embedded(stage: Embed, block: Block) -> dict[str, Any]:
    columns = block.columns()
    try:
        return stage(columns)
    except InputError as error:
        raise InputError(f"rows from {block.rows[0][1]} on: {error}") from error


def _bar(total: int, initial: int) -> tqdm:
    """Progress in bytes of the input, on standard error: each second on a terminal, else each minute."""
    interval = 1 if sys.stderr.isatty() else 60
    return tqdm(total=total, initial=initial, unit="B", unit_scale=True, mininterval=interval, maxinterval=interval)


def _agree(output: Path, identity: dict[str, Any], own: Path) -> None:
    """Write what the run is, or raise InputError where the folder holds another run, or none but other files."""
    path = output / MANIFEST
    found = {other.name for other in output.iterdir() if not other.name.startswith(".")}
    if MANIFEST not in found:
        if found:
            raise InputError(f"{output}: expected an empty directory, or a run to go on with, found {min(found)}")
        with writing_into(output, f"{own.name}/part") as part:
            (part / MANIFEST).write_text(json.dumps(identity, indent=2) + "\n", "utf-8")
        return
    try:
        there = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: expected what a run writes, found something else ({error})") from error
    differ = [name for name in {**there, **identity} if there.get(name) != identity.get(name)]
    if differ:
        found_there = "; ".join(f"{name} {there.get(name)!r:.200}, here {identity.get(name)!r:.200}" for name in differ)
        raise InputError(
            f"{path}: expected this run, found one of {found_there}; use its options, or another directory"
        )


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    """One row group of the columns; a float32 array [n, dim] becomes lists of a fixed size. Raises OSError."""
    import pyarrow
    from pyarrow import parquet

    vectors = columns["embedding"]
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    table = pyarrow.table({"id": pyarrow.array(columns["id"], pyarrow.string()), "embedding": lists})
    # Numbers of vectors do not recur, so that neither a dictionary nor compression makes them smaller.
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_statistics=["id"])
