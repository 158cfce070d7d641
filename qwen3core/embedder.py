"""Text to unit vectors."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .batch import PackedBatch, build_cu_seqlens
from .errors import InputError, check_int, check_one_of, check_text, warn
from .model import Qwen3Model
from .pretrained import Pretrained, as_asked
from .prompts import EMBEDDING_QUERY
from .reading import as_list
from .tokenizer import Tokenizer

Texts = str | Iterable[str]
Vectors = NDArray[np.float32]


class EncodeOptions(TypedDict, total=False):
    """Keyword arguments of ``Embedder.encode``."""

    prompt_name: str | None
    prompt: str | None
    truncate_dim: int | None
    normalize_embeddings: bool | None
    batch_tokens: int | None
    show_progress_bar: bool | None


class Embedder(Pretrained):
    """Qwen3-Embedding: ``Embedder.from_pretrained(path_or_id)``, then ``encode_query`` and ``encode_document``.

    Args:
        model, tokenizer: of one checkpoint; prompts and whatever surrounds the decoder are the model's ``layout``.
        max_length: tokens per input, EOS included; longer inputs lose their end, and a warning counts them.
        prefix_cache_tokens: size of the LRU cache of prompts' keys and values.

    Raises:
        InputError, CheckpointError: for an option, or a tokenizer that does not fit.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> embedder.encode_document(["the violin is an instrument", "rain fell"]).shape
        (2, 256)
    """

    jobs = ("embedding", "late interaction")

    def __init__(
        self, model: Qwen3Model, tokenizer: Tokenizer, *, max_length: int | None = None, prefix_cache_tokens: int = 0
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, prefix_cache_tokens=prefix_cache_tokens)
        self.prompts = dict(model.layout.prompts)
        """What is put before texts, by name; yours to change."""
        self.default_prompt_name = model.layout.default_prompt_name
        """The prompt where a call names none; None: no prompt."""

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

    @overload
    def encode_query(
        self, inputs: Texts, *, instruction: str | None = None, grad: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...

    def encode_query(self, inputs: Texts, *, instruction: str | None = None, **options: Any) -> Any:
        """``encode`` with the query prompt: the checkpoint's, or that of your own ``instruction`` (one sentence)."""
        if instruction is not None:
            check_text("instruction", instruction)
        if instruction is not None or (options.get("prompt") is None and options.get("prompt_name") is None):
            options["prompt"] = self.query_prompt(instruction)
        return self.encode(inputs, **options)

    @overload
    def encode_document(
        self, inputs: Texts, *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Vectors: ...

    @overload
    def encode_document(
        self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...

    @overload
    def encode_document(self, inputs: Texts, *, grad: Literal[True], **options: Unpack[EncodeOptions]) -> Tensor: ...

    def encode_document(self, inputs: Texts, **options: Any) -> Any:
        """``encode`` with the document prompt, which is empty for the official checkpoints."""
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self._prompt("document")
        return self.encode(inputs, **options)

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_tensor: Literal[False] = False, **options: Unpack[EncodeOptions]
    ) -> Vectors: ...

    @overload
    def encode(
        self, inputs: Texts, *, convert_to_tensor: Literal[True], **options: Unpack[EncodeOptions]
    ) -> Tensor: ...

    @overload
    def encode(self, inputs: Texts, *, grad: Literal[True], **options: Unpack[EncodeOptions]) -> Tensor: ...

    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool | None = None,
        batch_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
        grad: bool = False,
    ) -> Any:
        """Embed texts.

        Args:
            inputs: one text, or any iterable of texts.
            prompt_name: name of a stored prompt, put before every text.
            prompt: a prompt itself.
            truncate_dim: keep the first components, before normalising; by default as many as the checkpoint says.
            normalize_embeddings: whether vectors have unit length; by default as the checkpoint says.
            batch_tokens: most tokens of one batch.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: None shows it on a terminal.
            grad: return a tensor with its graph; each text is then computed by itself, equal ones too.

        Returns:
            [n, dim] float32; [dim] for one text. None where a capture stopped the model (``stop_at``).

        Raises:
            InputError: for what is not text, or an option that cannot be.
        """
        layout, width = self.layout, self.layout.width(self.model.config.hidden_size)
        if not layout.pooling:
            raise InputError("encode: expected a checkpoint that pools, found one of late interaction (encode_tokens)")
        texts = [inputs] if isinstance(inputs, str) else as_list("inputs", inputs)
        prompt = self._prompt(prompt_name) if prompt is None else prompt
        if truncate_dim is not None:
            check_int("truncate_dim", truncate_dim, 1, width)
            if truncate_dim < 32:
                warn(f"truncate_dim={truncate_dim}: the models are trained for 32 and more")
        elif layout.truncate_dim is not None:
            truncate_dim = min(layout.truncate_dim, width)
        prefix = self._prefix(prompt)
        embeddings = self.run(
            [prompt + text if isinstance(text, str) else text for text in texts],
            [prefix] * len(texts),
            (truncate_dim or width,),
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            grad=grad,
            dim=truncate_dim,
            normalize=normalize_embeddings,
            prompt_length=0 if layout.include_prompt or not prompt else self._prompt_length(prefix),
        )
        return as_asked(embeddings, single=isinstance(inputs, str), tensor=convert_to_tensor or grad)

    def encode_tokens(
        self,
        inputs: Texts,
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
        grad: bool = False,
    ) -> "TokenVectors":
        """One vector of unit length for every token of every text, for late interaction (ColBERT, arXiv:2004.12832).

        Of a checkpoint that pools, they are the last hidden states, before any Dense.

        task: ``"query"`` or ``"document"``, whose prompt and length a checkpoint may declare; None counts as a document
        with the default prompt. Prompts and grad are as in ``encode``. Raises InputError.
        """
        check_one_of("task", task, (None, "query", "document"))
        layout = self.layout
        texts = [inputs] if isinstance(inputs, str) else as_list("inputs", inputs)
        if prompt is None:
            prompt = self._prompt(task if prompt_name is None else prompt_name)
        limited = copy.copy(self)
        limits = {"query": layout.query_length, "document": layout.document_length}
        limited.max_length = limits.get(task or "") or self.max_length
        skipped = () if task == "query" else layout.skiplist
        rows: list[Tensor] | None = limited.run(
            [prompt + text if isinstance(text, str) else text for text in texts],
            [()] * len(texts),
            None,
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            grad=grad,
            skipped=[i for word in skipped if (i := self.tokenizer.backend.token_to_id(word)) is not None],
        )
        hidden_size = self.model.config.hidden_size
        width = hidden_size if layout.pooling else layout.width(hidden_size)
        vectors = torch.cat(rows) if rows else torch.empty(0, width, device=self.device)
        return TokenVectors(vectors, build_cu_seqlens(map(len, rows or ())))  # none where a capture stopped the model

    def _prefix(self, prompt: str) -> tuple[int, ...]:
        """The ids that all texts of a prompt may begin with."""
        check_text("prompt", prompt)
        [ids] = self.tokenizer.encode([prompt])
        return (*self.tokenizer.opening, *ids)

    def _prompt_length(self, prefix: tuple[int, ...]) -> int:
        """The tokens of a prompt by itself, as sentence-transformers counts those that are not pooled."""
        alone = [*prefix, *self.tokenizer.closing]
        return len(alone) - (self.tokenizer.backend.id_to_token(alone[-1]) in self.layout.special_tokens)

    def query_prompt(self, instruction: str | None = None) -> str:
        """The prompt of queries; of a task of one's own, in the words that the checkpoint's prompts have around theirs.

        Raises InputError where those have no place for one.
        """
        if instruction is None:
            return self._prompt("query")
        before, _, after = EMBEDDING_QUERY.partition("{instruction}")
        prompts = [text for text in (self.prompts.get("query"), *self.prompts.values()) if text]
        own = [text for text in prompts if text.startswith(before) and after in text]
        if prompts and not own:
            raise InputError(
                f"instruction: expected none, which this checkpoint's prompts have no place for, found {instruction!r} "
                "(prompt= takes a whole prompt)"
            )
        ending = own[0][own[0].rindex(after) :] if own else after
        return before + instruction + ending

    def _prompt(self, name: str | None) -> str:
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name in ("query", "document"):
            return self.prompts.get(name, "")
        if not isinstance(name, str) or name not in self.prompts:
            raise InputError(f"prompt_name: expected one of {', '.join(self.prompts)}, found {name!r}")
        return self.prompts[name]

    def _declared(self) -> dict[str, dict[str, Any]]:
        declared = {name: getattr(self.layout, name) for name in ("prompts", "default_prompt_name")}
        changed = {name: value for name in declared if (value := getattr(self, name)) != declared[name]}
        return {"config_sentence_transformers.json": changed} if changed else {}

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.embedding(texts, self.max_length)

    def compute(self, batch: PackedBatch, *, skipped: list[int] | None = None, **options: Any) -> Any:
        if skipped is None:
            return self.model.embed(batch, **options)
        vectors = self.model.tokens(batch).split(batch.text_cu_seqlens.diff().tolist())
        counts = ~torch.isin(batch.input_ids, torch.tensor(skipped, device=self.device))
        return [x[rows] for x, rows in zip(vectors, counts.split([len(x) for x in vectors]), strict=True)]

    def similarity(self, a: "Vectors | Tensor | TokenVectors", b: "Vectors | Tensor | TokenVectors") -> Tensor:
        """Similarity of every pair of rows, float32 [len(a), len(b)]; a single vector counts as one row.

        It is the checkpoint's: cosine for the official ones, or dot product, negative euclidean or manhattan distance.
        Of token vectors it is MaxSim: for each token of a text of a, its largest product with one of b's, summed.
        """
        name = self.layout.similarity
        if isinstance(a, TokenVectors) and isinstance(b, TokenVectors):
            products = (a.vectors @ b.vectors.T).split(b.lengths, dim=1)
            largest = torch.stack([x.amax(1) for x in products], dim=1).split(a.lengths)
            return torch.stack([x.mean(0) if name == "meanmaxsim" else x.sum(0) for x in largest])
        left, right = (torch.atleast_2d(torch.as_tensor(x)).float() for x in (a, b))
        if left.shape[-1] != right.shape[-1] or left.dim() != 2 or right.dim() != 2:
            raise InputError(
                f"similarity: expected rows of equal length, found {list(left.shape)} and {list(right.shape)}"
            )
        if name in ("euclidean", "manhattan"):
            return -torch.cdist(left, right, p=2 if name == "euclidean" else 1)
        return left @ right.T if name == "dot" else F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


@dataclass(frozen=True)
class TokenVectors:
    """Vectors of the tokens of N texts: text n is rows ``cu_seqlens[n]:cu_seqlens[n + 1]``."""

    vectors: Tensor
    """[T, dim] float32, on the model's device."""
    cu_seqlens: Tensor
    """[N + 1] int32."""

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.cu_seqlens.diff().tolist()
