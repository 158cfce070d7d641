"""Text to unit vectors."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .batch import PackedBatch, Prefix, build_cu_seqlens
from .calls import as_vectors, theirs
from .errors import InputError, as_text, check_int, check_one_of, warn
from .layout import SIMILARITIES, Layout
from .model import Qwen3Model
from .pool import Pool, pooled
from .pretrained import Pretrained, as_asked
from .prompts import EMBEDDING_QUERY
from .reading import as_texts
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
    batch_size: int | None
    show_progress_bar: bool | None
    device: str | torch.device | Sequence[str] | None
    pool: Pool | None
    chunk_size: int | None
    task: Literal["query", "document"] | None


class TheirEncodeOptions(EncodeOptions, total=False):
    """Keyword arguments of ``Embedder.encode`` that say what it returns (calls.py)."""

    output_value: Literal["sentence_embedding", "token_embeddings"] | None
    precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] | None
    convert_to_numpy: bool
    convert_to_tensor: bool


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
        layout = model.layout
        self.prompts = _prompts(layout)
        """What is put before texts, by name; yours to change."""
        self.default_prompt_name = layout.default_prompt_name
        """The prompt where a call names none; None: no prompt."""
        self.truncate_dim = layout.truncate_dim
        """Length that vectors are cut to where a call says none; None: whole. Yours to change."""
        self.similarity_fn_name = layout.similarity

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

    @overload
    def encode_query(
        self, inputs: Texts, *, instruction: str | None = None, **options: Unpack[TheirEncodeOptions]
    ) -> Any: ...

    @theirs()
    def encode_query(
        self,
        inputs: Texts,
        *,
        instruction: str | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        **options: Any,
    ) -> Any:
        """``encode`` with the query prompt: the checkpoint's, or that of your own ``instruction`` (one sentence)."""
        if instruction is not None:
            prompt = self.query_prompt(as_text("instruction", instruction))
        elif prompt is None and prompt_name is None:
            prompt_name = "query"
        return self.encode(inputs=inputs, prompt=prompt, prompt_name=prompt_name, task="query", **options)

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

    @overload
    def encode_document(self, inputs: Texts, **options: Unpack[TheirEncodeOptions]) -> Any: ...

    @theirs()
    def encode_document(
        self, inputs: Texts, *, prompt: str | None = None, prompt_name: str | None = None, **options: Any
    ) -> Any:
        """``encode`` with the document prompt, which is empty for the official checkpoints."""
        if prompt is None and prompt_name is None:
            prompt_name = next((name for name in ("document", "passage", "corpus") if name in self.prompts), None)
        return self.encode(inputs=inputs, prompt=prompt, prompt_name=prompt_name, task="document", **options)

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

    @overload
    def encode(self, inputs: Texts, **options: Unpack[TheirEncodeOptions]) -> Any: ...

    @theirs(as_vectors)
    @pooled
    def encode(
        self,
        inputs: Texts,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
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
            batch_tokens, batch_size: most tokens, and most texts, of one batch.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: None shows it on a terminal.
            grad: return a tensor with its graph; each text is then computed by itself, equal ones too.
            pool: of ``start_multi_process_pool``; device: or a list of devices, for this call; chunk_size: texts that a
                process takes at a time.

        sentence-transformers' other keywords are taken too (calls.py).

        Returns:
            [n, dim] float32; [dim] for one text. None where a capture stopped the model (``stop_at``).

        Raises:
            InputError: for what is not text, or an option that cannot be.
        """
        width = self.layout.width(self.model.config.hidden_size)
        if not self.layout.pooling:
            raise InputError("encode: expected a checkpoint that pools, found one of late interaction (encode_tokens)")
        texts = as_texts("inputs", inputs)
        prompt = as_text("prompt", self.prompt_named(prompt_name) if prompt is None else prompt)
        if truncate_dim is not None:
            check_int("truncate_dim", truncate_dim, 1, width)
            if truncate_dim < 32:
                warn(f"truncate_dim={truncate_dim}: the models are trained for 32 and more")
        elif self.truncate_dim is not None:
            truncate_dim = self.get_embedding_dimension()
        prefix, prompt_length = self.prefix(prompt)
        embeddings = self.run(
            [prompt + text for text in texts],
            [prefix] * len(texts),
            (truncate_dim or width,),
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            grad=grad,
            dim=truncate_dim,
            normalize=normalize_embeddings,
            prompt_length=prompt_length,
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
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = True,
        grad: bool = False,
    ) -> "TokenVectors":
        """One vector for every token of every text, for late interaction (ColBERT, arXiv:2004.12832).

        They have unit length unless told otherwise. Of a checkpoint that pools, they are the last hidden states, before
        any Dense.

        task: ``"query"`` or ``"document"``, whose prompt and length a checkpoint may declare; None counts as a document
        with the default prompt. Prompts and grad are as in ``encode``. Raises InputError.
        """
        check_one_of("task", task, (None, "query", "document"))
        layout = self.layout
        texts = as_texts("inputs", inputs)
        if prompt is None:
            prompt = self.prompt_named(task if prompt_name is None else prompt_name)
        prompt = as_text("prompt", prompt)
        limited = copy.copy(self)
        limits = {"query": layout.query_length, "document": layout.document_length}
        limited.max_length = limits.get(task or "") or self.max_length
        skipped = () if task == "query" else layout.skiplist
        rows: list[Tensor] | None = limited.run(
            [prompt + text for text in texts],
            [()] * len(texts),
            None,
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            grad=grad,
            normalize=normalize_embeddings,
            skipped=[i for word in skipped if (i := self.tokenizer.backend.token_to_id(word)) is not None],
        )
        hidden_size = self.model.config.hidden_size
        width = hidden_size if layout.pooling else layout.width(hidden_size)
        vectors = torch.cat(rows) if rows else torch.empty(0, width, device=self.device)
        return TokenVectors(vectors, build_cu_seqlens(map(len, rows or ())))  # none where a capture stopped the model

    def prefix(self, prompt: str) -> tuple[Prefix, int]:
        """The ids that all texts of a prompt may begin with; of the prompt's tokens, how many are not pooled."""
        tokenizer, layout = self.tokenizer, self.layout
        [ids] = tokenizer.encode([prompt])
        prefix = (*tokenizer.opening, *ids)
        if layout.include_prompt or not prompt:
            return prefix, 0
        alone = [*prefix, *tokenizer.closing]  # counted as sentence-transformers does
        return prefix, len(alone) - (tokenizer.backend.id_to_token(alone[-1]) in layout.special_tokens)

    def query_prompt(self, instruction: str | None = None) -> str:
        """The prompt of queries; of a task of one's own, in the words that the checkpoint's prompts have around theirs.

        Raises InputError where those have no place for one.
        """
        if instruction is None:
            return self.prompt_named("query")
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

    def prompt_named(self, name: str | None) -> str:
        """The prompt of this name, by default ``default_prompt_name``'s. Raises InputError."""
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name in ("query", "document"):
            return self.prompts.get(name, "")
        if not isinstance(name, str) or name not in self.prompts:
            raise InputError(f"prompt_name: expected one of {', '.join(self.prompts)}, found {name!r}")
        return self.prompts[name]

    def _declared(self) -> dict[str, dict[str, Any]]:
        layout = self.layout
        declared = {
            "prompts": _prompts(layout),
            "default_prompt_name": layout.default_prompt_name,
            "truncate_dim": layout.truncate_dim,
            "similarity_fn_name": layout.similarity,
        }
        changed = {name: value for name in declared if (value := getattr(self, name)) != declared[name]}
        return {"config_sentence_transformers.json": changed} if changed else {}

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.embedding(texts, self.max_length)

    def compute(self, batch: PackedBatch, *, skipped: list[int] | None = None, **options: Any) -> Any:
        if skipped is None:
            return self.model.embed(batch, **options)
        vectors = self.model.tokens(batch, **options).split(batch.text_cu_seqlens.diff().tolist())
        counts = ~torch.isin(batch.input_ids, torch.tensor(skipped, device=self.device))
        return [x[rows] for x, rows in zip(vectors, counts.split([len(x) for x in vectors]), strict=True)]

    def get_embedding_dimension(self) -> int:
        """Length of the vectors of ``encode``."""
        width = self.layout.width(self.model.config.hidden_size)
        return min(self.truncate_dim or width, width)

    get_sentence_embedding_dimension = get_embedding_dimension
    """Its name before sentence-transformers 6."""

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Set ``self.truncate_dim`` for a while."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    @property
    def similarity_fn_name(self) -> str:
        """What ``similarity`` computes: of the checkpoint, or set to another of ``Layout.similarity``."""
        return self._similarity

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str) -> None:
        value = getattr(value, "value", value)  # of sentence-transformers' Enum
        check_one_of("similarity_fn_name", value, SIMILARITIES)
        self._similarity = value

    def similarity(self, a: "Vectors | Tensor | TokenVectors", b: "Vectors | Tensor | TokenVectors") -> Tensor:
        """Similarity of every pair of rows, float32 [len(a), len(b)]; a single vector counts as one row.

        It is the checkpoint's: cosine for the official ones, or dot product, negative euclidean or manhattan distance.
        Of token vectors it is MaxSim: for each token of a text of a, its largest product with one of b's, summed.
        """
        name = self.similarity_fn_name
        if isinstance(a, TokenVectors) and isinstance(b, TokenVectors):
            products = (a.vectors @ b.vectors.T).split(b.lengths, dim=1)
            largest = torch.stack([x.amax(1) for x in products], dim=1).split(a.lengths)
            return torch.stack([x.mean(0) if name == "meanmaxsim" else x.sum(0) for x in largest])
        left, right = (torch.atleast_2d(_rows(x)) for x in (a, b))
        if left.shape[-1] != right.shape[-1] or left.dim() != 2 or right.dim() != 2:
            raise InputError(
                f"similarity: expected rows of equal length, found {list(left.shape)} and {list(right.shape)}"
            )
        if name in ("euclidean", "manhattan"):
            return -torch.cdist(left, right, p=2 if name == "euclidean" else 1)
        return left @ right.T if name == "dot" else F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T

    def similarity_pairwise(self, a: "Vectors | Tensor | TokenVectors", b: "Vectors | Tensor | TokenVectors") -> Tensor:
        """``similarity`` of each row of a with the same row of b, float32 [n]; one number of two single vectors."""
        if isinstance(a, TokenVectors) and isinstance(b, TokenVectors):
            return self.similarity(a, b).diagonal()
        left, right = _rows(a), _rows(b)
        if left.shape != right.shape or left.dim() not in (1, 2):
            raise InputError(
                f"similarity_pairwise: expected as many rows of equal length, found {list(left.shape)} and "
                f"{list(right.shape)}"
            )
        if self.similarity_fn_name in ("euclidean", "manhattan"):
            order = 2 if self.similarity_fn_name == "euclidean" else 1
            return -torch.linalg.vector_norm(left - right, ord=order, dim=-1)
        if self.similarity_fn_name == "cosine":
            left, right = F.normalize(left, dim=-1), F.normalize(right, dim=-1)
        return (left * right).sum(-1)


def _prompts(layout: Layout) -> dict[str, str]:
    """Those of a checkpoint; queries and documents have an empty one where it declares none."""
    return {"query": "", "document": "", **layout.prompts}


def _rows(x: Any) -> Tensor:
    """Vectors in any container, float32."""
    many = isinstance(x, (list, tuple)) and x
    return (torch.stack([torch.as_tensor(row) for row in x]) if many else torch.as_tensor(x)).float()


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
