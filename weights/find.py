"""Find a checkpoint: a directory, one that comes with the package, or a hub id, downloaded where it is not cached."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from qwen3core.errors import CheckpointError, InputError

from .tensors import weight_map

SHIPPED = ("tiny-embedding", "tiny-reranker")
"""Small trained checkpoints beside this file."""


def find(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``path_or_id`` itself, one of ``SHIPPED``, or a hub id's, downloaded if need be.

    The local cache answers first; HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured.
    Raises CheckpointError for a name that leads nowhere, InputError for a revision of a local directory.
    """
    name = str(path_or_id)
    if os.path.isdir(name):  # os.path: a name too long for a file is no error, it is just not there
        if revision is not None:
            raise InputError(f"revision: expected none with the local directory {name}, found {revision!r}")
        return Path(name)
    if name in SHIPPED and revision is None:
        return Path(__file__).parent / name
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        found = "a file" if os.path.exists(name) else "nothing there"
        raise CheckpointError(
            f"{name}: expected a checkpoint directory, one of {', '.join(SHIPPED)}, or a hub id like owner/name, "
            f"found {found}"
        )
    try:
        cached = _snapshot(name, revision, local_files_only=True)
        if all((cached / file).exists() for file in ["tokenizer.json", *weight_map(cached).values()]):
            return cached
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        pass  # not cached, or in part: fetch what is missing, or hear why not
    try:
        return _snapshot(name, revision, local_files_only=False)
    except Exception as error:  # the hub's client raises from several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: expected a local directory, a cached or a reachable hub id, found none "
            f"({type(error).__name__}: {reason})"
        ) from error


def base_directory(directory: Path) -> Path:
    """The directory itself, or that of the base of an adapter."""
    return directory


def _snapshot(name: str, revision: str | None, *, local_files_only: bool) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=["*.json", "*.safetensors"], local_files_only=local_files_only
        )
    )


def is_embedding(directory: Path) -> bool:
    """Whether modules.json, of sentence-transformers, names a pooling; rerankers have none."""
    modules = directory / "modules.json"
    return modules.exists() and "Pooling" in modules.read_text("utf-8")
