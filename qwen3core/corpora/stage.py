"""The step from a batch of rows to their vectors: of ``embed_corpus``, and of Ray Data."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..embedder import Embedder, EncodeOptions, Vectors
from ..errors import InputError
from ..weights.find import PATTERNS, base_directory


class Embed:
    """Adds the column ``embedding`` to a batch, float32 [n, dim], in place of its column ``text``.

    Args:
        model: checkpoint directory or hub id.
        query: whether the texts are queries; an instruction implies it.
        instruction, dim, batch_tokens: as ``encode_query`` has them (``truncate_dim``).
        ops: None is ``"batch_invariant"`` on a CPU, so that a vector is the same whichever process computes it, after
            whatever it computed before; on a GPU ``"auto"``.
        options: of ``Embedder.from_pretrained``.

    With Ray Data, on two workers:
        pool = ray.data.ActorPoolStrategy(size=2)
        rows = ray.data.read_parquet(path)
        rows.map_batches(Embed, fn_constructor_args=[model], compute=pool, batch_size=1024).write_parquet(folder)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        query: bool = False,
        instruction: str | None = None,
        dim: int | None = None,
        batch_tokens: int | None = None,
        ops: str | None = None,
        **options: Any,
    ) -> None:
        device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self.ops = ops or ("batch_invariant" if torch.device(device).type == "cpu" else "auto")
        self.embedder = Embedder.from_pretrained(model, ops=self.ops, **options)
        self.query, self.instruction = query or instruction is not None, instruction
        self.options: EncodeOptions = {"truncate_dim": dim, "batch_tokens": batch_tokens, "show_progress_bar": False}
        self.opened_with = options

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """The batch, columns by name, with its vectors. Raises InputError."""
        if "text" not in batch:
            raise InputError(f"batch: expected a column text, found {', '.join(batch) or 'none'}")
        columns = {name: values for name, values in batch.items() if name != "text"}
        return columns | {"embedding": self.encode(list(batch["text"]))}

    def encode(self, texts: list[str]) -> Vectors:
        """float32 [n, dim]."""
        if self.query:
            return self.embedder.encode_query(texts, instruction=self.instruction, **self.options)
        return self.embedder.encode_document(texts, **self.options)

    def identity(self) -> dict[str, Any]:
        """What decides on the vectors, as JSON: a hash of the checkpoint's files, and the options."""
        dtype = self.opened_with.get("dtype", "auto")
        return {
            "checkpoint": checkpoint_hash(self.embedder.directory),
            "query": self.query,
            "instruction": self.instruction,
            "dim": self.options["truncate_dim"],
            "batch_tokens": self.options["batch_tokens"],
            "max_length": self.embedder.max_length,
            "dtype": str(self.embedder.dtype if dtype == "auto" else dtype).removeprefix("torch."),
            "ops": self.ops,
            "split_special_tokens": self.opened_with.get("split_special_tokens", False),
        }


def checkpoint_hash(directory: Path) -> str:
    """SHA-256 of names and contents of a checkpoint's files, and of those of an adapter's base. Raises OSError."""
    found = hashlib.sha256()
    for folder in dict.fromkeys((directory, base_directory(directory))):
        for path in sorted({path for pattern in PATTERNS for path in folder.rglob(pattern)}):
            with path.open("rb") as file:
                found.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
