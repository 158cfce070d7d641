"""Text to unit vectors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .batch import PackedBatch
from .config import read_json
from .errors import CheckpointError, InputError, check_int, check_text, warn
from .model import Qwen3Model
from .pretrained import MAX_LENGTH, Pretrained
from .prompts import EMBEDDING_PROMPTS, embedding_query
from .reading import as_list
from .tokenizer import Tokenizer

Texts = str | Iterable[str]
Vectors = NDArray[np.float32]


class EncodeOptions(TypedDict, total=False):
    """Keyword arguments of ``Embedder.encode``."""

    prompt_name: str | None
    prompt: str | None
    truncate_dim: int | None
    normalize_embeddings: bool
    batch_tokens: int | None
    show_progress_bar: bool | None


class Embedder(Pretrained):
    """Qwen3-Embedding: ``Embedder.from_pretrained(path_or_id)``, then ``encode_query`` and ``encode_document``.

    Args:
        model, tokenizer: of one checkpoint.
        max_length: tokens per input, EOS included; longer inputs lose their end, and a warning counts them.
        prefix_cache_tokens: size of the LRU cache of prompts' keys and values.
        prompts: prompts by name; those of the model card by default.
        default_prompt_name: the prompt of ``encode`` where none is named.

    Raises:
        InputError, CheckpointError: for an option, a tokenizer that does not fit, or prompts that are no texts.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> embedder.encode_document(["the violin is an instrument", "rain fell"]).shape
        (2, 256)
    """

    def __init__(
        self,
        model: Qwen3Model,
        tokenizer: Tokenizer,
        *,
        max_length: int = MAX_LENGTH,
        prefix_cache_tokens: int = 0,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, prefix_cache_tokens=prefix_cache_tokens)
        self.prompts = prompts or EMBEDDING_PROMPTS
        self.default_prompt_name = default_prompt_name
        if not isinstance(self.prompts, dict) or not all(isinstance(text, str) for text in self.prompts.values()):
            raise CheckpointError(
                f"config_sentence_transformers.json: prompts: expected an object of texts, found {self.prompts!r:.200}"
            )

    @classmethod
    def read_settings(cls, directory: Path) -> dict[str, Any]:
        """The prompts of config_sentence_transformers.json, where a checkpoint has one."""
        path = directory / "config_sentence_transformers.json"
        stored = read_json(path) if path.exists() else {}
        return {name: stored.get(name) for name in ("prompts", "default_prompt_name")}

    @overload
    def encode_query(
        self,
        inputs: Texts,
        *,
        instruction: str | None = None,
        convert_to_tensor: Literal[False] = False,
        **options: Unpack[EncodeOptions],
    ) -> Vectors: ...

    @overload
    def encode_query(
        self,
        inputs: Texts,
        *,
        instruction: str | None = None,
        convert_to_tensor: Literal[True],
        **options: Unpack[EncodeOptions],
    ) -> Tensor: ...

    def encode_query(self, inputs: Texts, *, instruction: str | None = None, **options: Any) -> Any:
        """``encode`` with the query prompt: the checkpoint's, or that of your own ``instruction`` (one sentence)."""
        if instruction is not None:
            check_text("instruction", instruction)
            options["prompt"] = embedding_query(instruction)
        elif options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self.prompts.get("query", EMBEDDING_PROMPTS["query"])
        return self.encode(inputs, **options)

    @overload
    def encode_document(
        self, inputs: Texts, *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Vectors: ...

    @overload
    def encode_document(
        self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...

    def encode_document(self, inputs: Texts, **options: Any) -> Any:
        """``encode`` with the document prompt, which is empty for the official checkpoints."""
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self.prompts.get("document", EMBEDDING_PROMPTS["document"])
        return self.encode(inputs, **options)

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Vectors: ...

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...

    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        batch_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Embed texts.

        Args:
            inputs: one text, or any iterable of texts.
            prompt_name: name of a stored prompt, put before every text.
            prompt: a prompt itself.
            truncate_dim: keep the first components (1 to hidden size), before normalising.
            normalize_embeddings: whether vectors have unit length.
            batch_tokens: most tokens of one batch.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: None shows it on a terminal.

        Returns:
            [n, dim] float32; [dim] for one text.

        Raises:
            InputError: for what is not text, or an option that cannot be.
        """
        texts = [inputs] if isinstance(inputs, str) else as_list("inputs", inputs)
        prompt = self._prompt(prompt_name) if prompt is None else prompt
        check_text("prompt", prompt)
        hidden_size = self.model.config.hidden_size
        if truncate_dim is not None:
            check_int("truncate_dim", truncate_dim, 1, hidden_size)
            if truncate_dim < 32:
                warn(f"truncate_dim={truncate_dim}: the models are trained for 32 and more")
        [prefix] = self.tokenizer.encode([prompt])
        embeddings = self.run(
            [prompt + text if isinstance(text, str) else text for text in texts],
            [tuple(prefix)] * len(texts),
            (truncate_dim or hidden_size,),
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            dim=truncate_dim,
            normalize=normalize_embeddings,
        )
        result = embeddings[0] if isinstance(inputs, str) else embeddings
        return result if convert_to_tensor else result.cpu().numpy()

    def _prompt(self, name: str | None) -> str:
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.prompts:
            raise InputError(f"prompt_name: expected one of {', '.join(self.prompts)}, found {name!r}")
        return self.prompts[name]

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.embedding(texts, self.max_length)

    def compute(self, batch: PackedBatch, **options: Any) -> Tensor:
        return self.model.embed(batch, **options)

    @staticmethod
    def similarity(a: Vectors | Tensor, b: Vectors | Tensor) -> Tensor:
        """Cosine of every pair of rows, float32 [len(a), len(b)]; a single vector counts as one row."""
        left, right = (torch.atleast_2d(torch.as_tensor(x)).float() for x in (a, b))
        if left.shape[-1] != right.shape[-1] or left.dim() != 2 or right.dim() != 2:
            raise InputError(
                f"similarity: expected rows of equal length, found {list(left.shape)} and {list(right.shape)}"
            )
        return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T
