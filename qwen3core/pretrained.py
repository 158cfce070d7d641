"""What the two jobs share: an open checkpoint (model and tokenizer) and the run over batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batch import PackedBatch, pack, plan
from .config import read_json
from .errors import InputError, check_int
from .model import Qwen3Model
from .ops import Ops
from .tokenizer import Tokenizer
from .weights.checkpoint import find, load_model

MAX_LENGTH = 8192
Self = TypeVar("Self", bound="Pretrained")


class Pretrained:
    """A model with its tokenizer. Use ``Embedder`` or ``Reranker``."""

    needs_head = False

    def __init__(
        self,
        model: Qwen3Model,
        tokenizer: Tokenizer,
        *,
        max_length: int = MAX_LENGTH,
        sentence_transformers: dict[str, Any] | None = None,
    ) -> None:
        """sentence_transformers: the checkpoint's parsed config_sentence_transformers.json, where it has one."""
        limit = model.config.max_position_embeddings
        check_int("max_length", max_length, 1)
        if max_length > limit and max_length != MAX_LENGTH:
            raise InputError(f"max_length: expected at most {limit}, the model's limit, found {max_length}")
        tokenizer.check_vocabulary(model.embed_tokens.num_embeddings)
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = min(max_length, limit)
        self.sentence_transformers = sentence_transformers or {}

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        ops: str | Ops = "auto",
        max_length: int = MAX_LENGTH,
        split_special_tokens: bool = False,
    ) -> Self:
        """Open a checkpoint directory, or a hub id (local cache first, downloaded otherwise).

        dtype: ``"auto"`` keeps the checkpoint's. device: None is the first GPU, else the CPU. max_length: tokens
        per input, template included; longer inputs lose content. split_special_tokens: see ``Tokenizer``.
        Raises CheckpointError for what is wrong with the files, InputError for the options.
        """
        directory = find(path_or_id, revision=revision)
        model = load_model(directory, dtype=dtype, device=device, ops=ops, head=cls.needs_head)
        tokenizer = Tokenizer(directory / "tokenizer.json", split_special_tokens=split_special_tokens)
        extra = directory / "config_sentence_transformers.json"
        return cls(
            model, tokenizer, max_length=max_length, sentence_transformers=read_json(extra) if extra.exists() else None
        )

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(dtype={self.dtype}, device={str(self.device)!r}, "
            f"max_length={self.max_length}, ops={self.model.ops})"
        )

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[Sequence[int]],
        function: Callable[[PackedBatch], Tensor],
        *shape: int,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Tensor:
        """Token id sequences through ``function`` in batches: its rows [N, *shape] float32, in the order given."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        out = torch.empty(len(sequences), *shape, dtype=dtype, device=self.device)
        rows = self.model.embed_tokens.num_embeddings
        for index, ids in enumerate(sequences):
            if max(ids) >= rows:
                raise InputError(f"input {index}: expected token ids below {rows} (embed_tokens), found {max(ids)}")
        groups = plan([len(s) for s in sequences], batch_tokens)
        # By default on a terminal (tqdm's None), if there is more than one batch to wait for.
        disable = None if show_progress_bar is None and len(groups) > 1 else not show_progress_bar
        with tqdm(total=len(sequences), disable=disable, unit="text", leave=False) as bar:
            for indices in groups:
                batch = pack([sequences[i] for i in indices], device=self.device, indices=indices)
                out[indices] = function(batch)
                bar.update(len(indices))
        return out
