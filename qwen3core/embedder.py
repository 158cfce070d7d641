"""Text to unit vectors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CheckpointError, InputError, as_list, check_int, check_text, warn
from .pretrained import Pretrained
from .prompts import EMBEDDING_PROMPTS, embedding_query


class Embedder(Pretrained):
    """Qwen3-Embedding. ``Embedder.from_pretrained(path_or_id)``, then ``encode_query`` and ``encode_document``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.prompts: dict[str, str] = self.sentence_transformers.get("prompts") or EMBEDDING_PROMPTS
        """Prompts by name: the checkpoint's own, else the model card's."""
        if not isinstance(self.prompts, dict) or not all(isinstance(text, str) for text in self.prompts.values()):
            raise CheckpointError(
                f"config_sentence_transformers.json: prompts: expected an object of texts, found {self.prompts!r:.200}"
            )

    def encode(
        self,
        inputs: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        batch_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Embed texts: [n, dim] float32, unit length; [dim] for one string.

        prompt, or the one stored as prompt_name, is put before every text. truncate_dim keeps the first components
        (1 to hidden size), then normalises. batch_tokens bounds the tokens of one batch. Returns a numpy array, or
        a tensor on the model's device with convert_to_tensor. Raises InputError.
        """
        texts = [inputs] if isinstance(inputs, str) else as_list("inputs", inputs)
        prompt = self._prompt(prompt_name) if prompt is None else prompt
        check_text("prompt", prompt)
        hidden_size = self.model.config.hidden_size
        if truncate_dim is not None:
            check_int("truncate_dim", truncate_dim, 1, hidden_size)
            if truncate_dim < 32:
                warn(f"truncate_dim={truncate_dim}: the models are trained for 32 and more")
        [prefix] = self.tokenizer.content([prompt])
        texts = [prompt + text if isinstance(text, str) else text for text in texts]
        embeddings = self.run(
            texts,
            [tuple(prefix)] * len(texts),
            lambda contents: self.tokenizer.close(contents, self.max_length),
            lambda batch: self.model.embed(batch, dim=truncate_dim, normalize=normalize_embeddings),
            truncate_dim or hidden_size,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )
        result = embeddings[0] if isinstance(inputs, str) else embeddings
        return result if convert_to_tensor else result.cpu().numpy()

    def encode_query(self, inputs: str | Iterable[str], *, instruction: str | None = None, **options: Any) -> Any:
        """``encode`` with the query prompt: the checkpoint's, or that of your own ``instruction`` (one sentence)."""
        if instruction is not None:
            check_text("instruction", instruction)
            options["prompt"] = embedding_query(instruction)
        elif options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self.prompts.get("query", EMBEDDING_PROMPTS["query"])
        return self.encode(inputs, **options)

    def encode_document(self, inputs: str | Iterable[str], **options: Any) -> Any:
        """``encode`` with the document prompt, which is empty for the official checkpoints."""
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self.prompts.get("document", EMBEDDING_PROMPTS["document"])
        return self.encode(inputs, **options)

    @staticmethod
    def similarity(a: "np.ndarray | Tensor", b: "np.ndarray | Tensor") -> Tensor:
        """Cosine of every pair of rows, float32 [len(a), len(b)]; a single vector counts as one row."""
        left, right = (torch.atleast_2d(torch.as_tensor(x)).float() for x in (a, b))
        if left.shape[-1] != right.shape[-1] or left.dim() != 2 or right.dim() != 2:
            raise InputError(
                f"similarity: expected rows of equal length, found {list(left.shape)} and {list(right.shape)}"
            )
        return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T

    def _prompt(self, name: str | None) -> str:
        name = name if name is not None else self.sentence_transformers.get("default_prompt_name")
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.prompts:
            raise InputError(f"prompt_name: expected one of {', '.join(self.prompts)}, found {name!r}")
        return self.prompts[name]
