"""Quality: rank correlation on pairs of sentences; nDCG@10 and recall on a retrieval set, also after reranking.

The measures are scipy's and those of ir_measures (trec_eval).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .data import read_jsonl, read_text
from .embedder import Embedder
from .errors import InputError
from .reranker import Reranker

Pair = tuple[str, str, float]


@dataclass(frozen=True)
class Retrieval:
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    """Of each query, documents and how relevant they are."""


def sts(embedder: Embedder, pairs: Sequence[Pair], *, dim: int | None = None) -> float:
    """Spearman's rank correlation between cosines, of vectors cut to ``dim``, and the scores that people gave."""
    from scipy.stats import spearmanr

    first, second, scores = zip(*pairs, strict=True)
    left, right = (embedder.encode(texts, truncate_dim=dim) for texts in (first, second))
    return float(spearmanr((left * right).sum(1), scores).statistic)


def search(
    embedder: Embedder, data: Retrieval, *, dim: int | None = None, top: int = 100
) -> dict[str, dict[str, float]]:
    """Of each query, the ``top`` documents by cosine."""
    ids = list(data.corpus)
    documents = embedder.encode_document(list(data.corpus.values()), truncate_dim=dim, convert_to_tensor=True)
    queries = embedder.encode_query(list(data.queries.values()), truncate_dim=dim, convert_to_tensor=True)
    run = {}
    for query, vector in zip(data.queries, queries, strict=True):
        scores, best = (documents @ vector).topk(min(top, len(ids)))
        run[query] = {ids[i]: s for i, s in zip(best.tolist(), scores.tolist(), strict=True)}
    return run


def rerank(reranker: Reranker, data: Retrieval, run: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The same documents of each query, by P(yes)."""
    keys = [(query, document) for query, found in run.items() for document in found]
    scores = reranker.predict([(data.queries[query], data.corpus[document]) for query, document in keys])
    again: dict[str, dict[str, float]] = {query: {} for query in run}
    for (query, document), score in zip(keys, scores, strict=True):
        again[query][document] = float(score)
    return again


def measure(data: Retrieval, run: dict[str, dict[str, float]]) -> dict[str, float]:
    """nDCG@10, recall@10 and recall@100, means over the queries that have relevant documents."""
    import ir_measures
    from ir_measures import R, nDCG

    return {
        str(name): value
        for name, value in ir_measures.calc_aggregate([nDCG @ 10, R @ 10, R @ 100], data.qrels, run).items()
    }


def read_sts(path: str | Path) -> list[Pair]:
    """STSbenchmark's own files (tab-separated: score, sentence1 and sentence2 in columns 5 to 7), or .jsonl rows of
    sentence1, sentence2 and score. Raises InputError.
    """
    pairs: list[Pair] = []
    if str(path).endswith(".jsonl"):
        rows = [(where, [row.get(k) for k in ("sentence1", "sentence2", "score")]) for row, where in read_jsonl(path)]
    else:
        lines = csv.reader(read_text(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [(f"{path}, line {n}", [*line[5:7], *line[4:5]]) for n, line in enumerate(lines, 1)]
    for where, row in rows:
        try:
            left, right, score = row
            pairs.append((str(left), str(right), float(score)))
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected sentence1, sentence2 and a score, found {row}") from None
    return pairs


def read_retrieval(folder: str | Path, qrels: str | Path | None = None) -> Retrieval:
    """A folder as BEIR has them: corpus.jsonl, queries.jsonl, and qrels/test.tsv unless ``qrels`` names another.

    qrels: lines of query, document and relevance, or TREC's of four columns. Only queries in it are asked. Raises
    InputError.
    """
    folder = Path(folder)
    corpus, queries = _texts(folder / "corpus.jsonl"), _texts(folder / "queries.jsonl")
    path = Path(qrels or folder / "qrels" / "test.tsv")
    found: dict[str, dict[str, int]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        columns = line.split()
        if not columns or (number == 1 and columns[-1] == "score"):
            continue
        try:
            query, document = columns[0], columns[-2]
            relevance = int(columns[-1])
            if len(columns) not in (3, 4) or query not in queries or document not in corpus:
                raise ValueError
        except (ValueError, IndexError):
            raise InputError(
                f"{path}, line {number}: expected a query's id, a document's and a whole number, found {line[:80]!r}"
            ) from None
        found.setdefault(query, {})[document] = relevance
    return Retrieval(corpus, {query: queries[query] for query in found}, found)


def _texts(path: Path) -> dict[str, str]:
    texts = {}
    for row, where in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "_id" not in row:
            raise InputError(f"{where}: expected an object with _id and text, found {str(row)[:80]}")
        texts[str(row["_id"])] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts
