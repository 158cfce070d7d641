"""(query, document) to P(yes)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .errors import InputError, as_list, check_int, check_text
from .pretrained import Pretrained
from .prompts import DEFAULT_TASK, reranker_body


class Reranker(Pretrained):
    """Qwen3-Reranker. ``Reranker.from_pretrained(path_or_id)``, then ``predict`` or ``rank``."""

    needs_head = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.yes_id, self.no_id = self.tokenizer.yes_no()

    def predict(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """P(yes) that each document meets its query: float32 [n]; one (query, document) gives one number.

        Returns numpy, or a tensor on the model's device with convert_to_tensor. Raises InputError.
        """
        pairs = as_list("pairs", pairs)
        single = len(pairs) == 2 and all(isinstance(part, str) for part in pairs)
        task = DEFAULT_TASK if instruction is None else instruction
        check_text("instruction", task)
        checked = []
        for index, pair in enumerate([pairs] if single else pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"pair {index}: expected (query, document), found {_describe(pair)}")
            query, document = pair
            for role, text in (("query", query), ("document", document)):
                check_text(f"pair {index}: {role}", text)
            checked.append((query, document))
        yes_no = self.yes_no
        scores = self.run(
            [reranker_body(task, query, document) for query, document in checked],
            self._prefixes(task, [query for query, _ in checked]),
            lambda contents: self.tokenizer.frame(contents, self.max_length),
            lambda batch: self.model.score(batch, yes_no),
            batch_tokens=batch_tokens,
            show_progress_bar=show_progress_bar,
        )
        result = scores[0] if single else scores
        return result if convert_to_tensor else result.cpu().numpy()

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        instruction: str | None = None,
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Documents by P(yes), best first: ``{"corpus_id", "score"}`` and ``"text"`` with return_documents."""
        documents = as_list("documents", documents)
        if top_k is not None:
            check_int("top_k", top_k, 0)
        scores = self.predict([(query, d) for d in documents], instruction=instruction, **options)
        ranking: list[dict[str, Any]] = [{"corpus_id": i, "score": float(s)} for i, s in enumerate(scores)]
        ranking.sort(key=lambda hit: -hit["score"])
        if return_documents:
            ranking = [dict(hit, text=documents[hit["corpus_id"]]) for hit in ranking]
        return ranking[:top_k]

    def _prefixes(self, task: str, queries: list[str]) -> list[tuple[int, ...]]:
        """What the pairs of one query begin with; for queries of a single pair, what all such pairs do."""
        counts = Counter(queries)
        starts = {query: reranker_body(task, query if n > 1 else "", "") for query, n in counts.items()}
        contents = self.tokenizer.content(list(starts.values()))
        prefixes = {query: (*self.tokenizer.prefix, *ids) for query, ids in zip(starts, contents, strict=True)}
        return [prefixes[query] for query in queries]

    @property
    def yes_no(self) -> Tensor:
        """The rows of yes and no [2, H] of the head."""
        return self.model.head_rows((self.yes_id, self.no_id))


def _describe(pair: object) -> str:
    return f"{len(pair)} items" if isinstance(pair, (list, tuple)) else type(pair).__name__
