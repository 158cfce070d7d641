"""What is exported: an open checkpoint, what of it a format can hold, its hashes, and the files around its weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import read_json
from ..embedder import Embedder
from ..errors import InputError
from ..layout import LAST_TOKEN
from ..pretrained import is_finite
from ..reranker import Reranker
from ..weights.find import INDEX, find
from ..weights.layout import read_layout
from ..weights.tensors import Tensors, beside_weights, check_rewritable, copy_within

Source = Embedder | Reranker
JOBS = ("embedding", "reranker")
"""What an exported checkpoint may be for."""
HELD_BY_GRAPHS: dict[str, Any] = {"pooling": LAST_TOKEN, "include_prompt": True}
"""Fields of a layout that ``graph.build`` takes one value of, and that value."""


def open_source(path_or_id: str | Path, output: Path, *, job: str | None = None, revision: str | None = None) -> Source:
    """The checkpoint on the CPU, its weights as stored, as pages of the file.

    Raises InputError for an adapter, for an output inside of the checkpoint's directory, and for a job that is none of
    ``JOBS``; CheckpointError as ``from_pretrained`` does.
    """
    directory = find(path_or_id, revision=revision)
    check_rewritable(directory, output)
    found = read_layout(directory, job=job).job
    if found not in JOBS:
        raise InputError(
            f"{directory}: expected a checkpoint of the job {' or '.join(JOBS)}, or one that you say it is for, "
            f"found {found}"
        )
    kind: type[Embedder] | type[Reranker] = Reranker if found == "reranker" else Embedder
    return kind.from_pretrained(directory, device="cpu", job=job)


def check_held(source: Source, format: str, held: Mapping[str, Any]) -> None:
    """Raise InputError where a field of the layout has another value than the one that the format can hold."""
    for name, value in held.items():
        found = getattr(source.layout, name)
        if found != value:
            raise InputError(f"{format}: {name}: expected {value!r}, all that it can hold, found {found!r:.200}")


def converted(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in a dtype. Raises InputError where it is not finite there."""
    found = weight.detach().to(dtype)
    if not is_finite(found):
        raise InputError(f"{name}: expected weights that are finite in {dtype}, found some that are not")
    return found


def describe(source: Source) -> dict[str, str]:
    """The checkpoint's name, and of its weights and its tokenizer the SHA-256 by file, as a JSON object."""
    files = [*Tensors(source.directory).files(), source.tokenizer.path]
    hashes = {}
    for path in sorted(files):
        with path.open("rb") as file:
            hashes[str(path.relative_to(source.directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"qwen3core.source": source.directory.resolve().name, "qwen3core.source_sha256": json.dumps(hashes)}


def copy_surroundings(source: Source, part: Path, config: Mapping[str, Any]) -> None:
    """Copy what lies beside the weights, for readers that find the graph in a folder of its own.

    config: what config.json says in addition. Tokenizers are to pad on the left, where a reader's last row of a batch
    is each text's last token.
    """
    for path in beside_weights(source.directory):
        if path.name != INDEX:
            copy_within(source.directory, path, part)
    for name, changes in (("config.json", config), ("tokenizer_config.json", {"padding_side": "left"})):
        found = read_json(part / name) if (part / name).exists() else {}
        (part / name).write_text(json.dumps(found | dict(changes), indent=2, ensure_ascii=False) + "\n", "utf-8")
