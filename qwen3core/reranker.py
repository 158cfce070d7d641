"""(query, document) to P(yes)."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import PackedBatch, Prefix
from .calls import as_scores, theirs
from .errors import CheckpointError, InputError, as_text, check_int
from .model import Qwen3Model
from .pool import Pool, pooled
from .pretrained import Pretrained, as_asked
from .prompts import FIELDS
from .reading import as_list, as_pairs
from .tokenizer import Tokenizer

Pairs = Iterable[Sequence[str]]
Scores = NDArray[np.float32]


class PredictOptions(TypedDict, total=False):
    """Keyword arguments of ``Reranker.predict``."""

    instruction: str | None
    batch_tokens: int | None
    batch_size: int | None
    show_progress_bar: bool | None
    logit: bool
    prompt: str | None
    activation_fn: Callable[[Tensor], Tensor] | None
    device: str | torch.device | Sequence[str] | None
    pool: Pool | None
    chunk_size: int | None


class TheirPredictOptions(PredictOptions, total=False):
    """Keyword arguments of ``Reranker.predict`` that say what it returns (calls.py)."""

    apply_softmax: bool | None
    convert_to_numpy: bool
    convert_to_tensor: bool


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

    jobs = ("reranker",)

    def __init__(
        self, model: Qwen3Model, tokenizer: Tokenizer, *, max_length: int | None = None, prefix_cache_tokens: int = 0
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, prefix_cache_tokens=prefix_cache_tokens)
        layout = model.layout
        self.answers = layout.answers or (tokenizer.yes_no() if layout.score == "lm_head" else ())
        """Ids of yes and no, or of yes alone."""
        rows = model.embed_tokens.num_embeddings
        if max(self.answers, default=0) >= rows:
            raise CheckpointError(f"true_token_id, false_token_id: expected ids below {rows}, found {self.answers}")

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
        labels = self.layout.labels
        if len(labels) > 1:
            raise InputError(f"rank: expected a checkpoint of one score, found {len(labels)}: {', '.join(labels)}")
        if top_k is not None:
            check_int("top_k", top_k, 0)
        scores = self.predict([(query, document) for document in documents], **options)
        if scores is None:  # a capture stopped the model
            return []
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

    @overload
    def predict(self, pairs: Pairs, *, grad: Literal[True], **options: Unpack[PredictOptions]) -> Tensor: ...

    @overload
    def predict(self, pairs: Pairs, **options: Unpack[TheirPredictOptions]) -> Any: ...

    @theirs(as_scores)
    @pooled
    def predict(
        self,
        pairs: Pairs,
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
        logit: bool = False,
        grad: bool = False,
    ) -> Any:
        """P(yes) that each document meets its query, or the scores of ``layout.labels`` where there are several.

        Args:
            pairs: (query, document) tuples, or a single one.
            instruction: what a document must do for its query, in one sentence; the checkpoint's by default.
            batch_tokens, batch_size: most tokens, and most pairs, of one batch.
            convert_to_tensor: return a tensor on the model's device in place of a numpy array.
            show_progress_bar: None shows it on a terminal.
            logit: return the score before the sigmoid.
            grad: return a tensor with its graph; each pair is then computed by itself, equal ones too.
            pool, device, chunk_size: several devices, as in ``Embedder.encode``.

        sentence-transformers' other keywords are taken too (calls.py).

        Returns:
            [n] float32, or [n, labels]; one number, or row, for a single pair. None where a capture stopped the model.

        Raises:
            InputError: for what is no pair of texts, or an option that cannot be.
        """
        checked, single = as_pairs(pairs)
        labels = len(self.layout.labels)
        scores = self.run(
            *self.fill(checked, instruction),
            () if labels == 1 else (labels,),
            batch_tokens=batch_tokens,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            grad=grad,
            weight=self.model.score_weight(self.answers),
            logit=logit,
        )
        return as_asked(scores, single=single, tensor=convert_to_tensor or grad)

    def fill(self, pairs: Sequence[tuple[str, str]], instruction: str | None = None) -> tuple[list[str], list[Prefix]]:
        """The template's text of each (query, document), and the ids that it may begin with. Raises InputError."""
        template = self.tokenizer.template
        task = as_text("instruction", self.layout.instruction if instruction is None else instruction)
        if instruction is not None and FIELDS[0] not in template.body:
            raise InputError(f"instruction: expected none, for which this template has no place, found {task!r}")
        # All pairs of a query begin with it; those of queries with a single pair, with what comes before any query.
        counts = Counter(query for query, _ in pairs)
        starts = {query: template.start(task, query if n > 1 else None) for query, n in counts.items()}
        token_ids = self.tokenizer.encode(list(starts.values()))
        prefixes = {query: (*self.tokenizer.prefix, *ids) for query, ids in zip(starts, token_ids, strict=True)}
        texts = [template.fill(task, query, document) for query, document in pairs]
        return texts, [prefixes[query] for query, _ in pairs]

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.reranking(texts, self.max_length)

    def compute(self, batch: PackedBatch, *, logit: bool = False, **options: Any) -> Tensor:
        return self.model.logits(batch, **options) if logit else self.model.scores(batch, **options)


def ranked(scores: Sequence[float] | Scores | Tensor, top_k: int | None = None) -> list[int]:
    """Indices of the ``top_k`` highest scores (of all, by default), best first, equal ones in the order given."""
    return sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:top_k]
