"""(query, document) to P(yes)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .batch import PackedBatch
from .errors import InputError, check_int, check_text
from .model import Qwen3Model
from .pretrained import MAX_LENGTH, Pretrained
from .prompts import DEFAULT_TASK, reranker_body
from .reading import as_list
from .tokenizer import Tokenizer

Pairs = Iterable[Sequence[str]]
Scores = NDArray[np.float32]


class PredictOptions(TypedDict, total=False):
    """Keyword arguments of ``Reranker.predict``."""

    instruction: str | None
    batch_tokens: int | None
    show_progress_bar: bool | None


class Hit(TypedDict, total=False):
    """A document of ``Reranker.rank``: its index, P(yes), and with return_documents its text."""

    corpus_id: int
    score: float
    text: str


class Reranker(Pretrained):
    """Qwen3-Reranker: ``Reranker.from_pretrained(path_or_id)``, then ``predict`` or ``rank``.

    Args:
        model, tokenizer: of one checkpoint; the model with its lm_head, unless that is tied to the embeddings.
        max_length: tokens per input, template included; longer documents lose their end, and a warning counts them.
        prefix_cache_tokens: size of the LRU cache of queries' keys and values.

    Raises:
        InputError, CheckpointError: for an option, or a tokenizer that does not fit or has no single yes and no.

    Example:
        >>> reranker = Reranker.from_pretrained("tiny-reranker")
        >>> reranker.predict([("a musical instrument", "a violin"), ("a musical instrument", "heavy rain")]).shape
        (2,)
    """

    needs_lm_head = True

    def __init__(
        self, model: Qwen3Model, tokenizer: Tokenizer, *, max_length: int = MAX_LENGTH, prefix_cache_tokens: int = 0
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, prefix_cache_tokens=prefix_cache_tokens)
        self.yes_id, self.no_id = self.tokenizer.yes_no()

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Unpack[PredictOptions],
    ) -> list[Hit]:
        """Documents by P(yes), best first, at most ``top_k``; options are those of ``predict``. Raises InputError."""
        documents = as_list("documents", documents)
        if top_k is not None:
            check_int("top_k", top_k, 0)
        scores = self.predict([(query, document) for document in documents], **options)
        hits = [Hit(corpus_id=i, score=float(scores[i])) for i in ranked(scores, top_k)]
        return [Hit(**hit, text=documents[hit["corpus_id"]]) for hit in hits] if return_documents else hits

    @overload
    def predict(
        self, pairs: Pairs, *, convert_to_tensor: Literal[False] = False, **options: Unpack[PredictOptions]
    ) -> Scores: ...

    @overload
    def predict(
        self, pairs: Pairs, *, convert_to_tensor: Literal[True], **options: Unpack[PredictOptions]
    ) -> Tensor: ...

    def predict(
        self,
        pairs: Pairs,
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """P(yes) that each document meets its query.

        Args:
            pairs: (query, document) tuples, or a single one.
            instruction: what a document must do for its query, in one sentence; the model card's by default.
            batch_tokens: most tokens of one batch.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: None shows it on a terminal.

        Returns:
            [n] float32; one number for a single pair.

        Raises:
            InputError: for what is no pair of texts, or an option that cannot be.
        """
        pairs = as_list("pairs", pairs)
        single = len(pairs) == 2 and all(isinstance(part, str) for part in pairs)
        task = DEFAULT_TASK if instruction is None else instruction
        check_text("instruction", task)
        checked = _checked([pairs] if single else pairs)
        # All pairs of a query begin with it; those of queries with a single pair, with what comes before any query.
        counts = Counter(query for query, _ in checked)
        starts = {query: reranker_body(task, query if n > 1 else "", "") for query, n in counts.items()}
        token_ids = self.tokenizer.encode(list(starts.values()))
        prefixes = {query: (*self.tokenizer.prefix, *ids) for query, ids in zip(starts, token_ids, strict=True)}
        scores = self.run(
            [reranker_body(task, query, document) for query, document in checked],
            [prefixes[query] for query, _ in checked],
            (),
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
            yes_no=self.yes_no,
        )
        result = scores[0] if single else scores
        return result if convert_to_tensor else result.cpu().numpy()

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.reranking(texts, self.max_length)

    def compute(self, batch: PackedBatch, **options: Any) -> Tensor:
        return self.model.score(batch, **options)

    @property
    def yes_no(self) -> Tensor:
        """The rows of yes and no [2, H] of the lm_head."""
        return self.model.lm_head_rows((self.yes_id, self.no_id))


def _checked(pairs: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    checked = []
    for index, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            found = f"{len(pair)} items" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise InputError(f"pair {index}: expected (query, document), found {found}")
        query, document = pair
        for role, text in (("query", query), ("document", document)):
            check_text(f"pair {index}: {role}", text)
        checked.append((query, document))
    return checked


def ranked(scores: Sequence[float] | Scores | Tensor, top_k: int | None = None) -> list[int]:
    """Indices of the ``top_k`` highest scores (of all, by default), best first, equal ones in the order given."""
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:top_k]
