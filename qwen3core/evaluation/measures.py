"""Measures of quality, by scipy and by ir_measures (trec_eval's)."""

from collections.abc import Sequence

from ..embedder import Embedder
from ..reranker import Reranker
from .files import Pair, Retrieval

Run = dict[str, dict[str, float]]
"""Query id to document id to score."""


def sts(embedder: Embedder, pairs: Sequence[Pair], *, dim: int | None = None) -> float:
    """Spearman's rank correlation between cosines, of vectors cut to ``dim``, and the scores that people gave."""
    from scipy.stats import spearmanr

    first, second, scores = zip(*pairs, strict=True)
    left, right = (embedder.encode(texts, truncate_dim=dim) for texts in (first, second))
    return float(spearmanr((left * right).sum(1), scores).statistic)


def search(embedder: Embedder, data: Retrieval, *, dim: int | None = None, top: int = 100) -> Run:
    """The ``top`` documents of each query by cosine, of vectors cut to ``dim``."""
    ids = list(data.corpus)
    documents = embedder.encode_document(list(data.corpus.values()), truncate_dim=dim, convert_to_tensor=True)
    queries = embedder.encode_query(list(data.queries.values()), truncate_dim=dim, convert_to_tensor=True)
    run = {}
    for query, vector in zip(data.queries, queries, strict=True):
        scores, best = (documents @ vector).topk(min(top, len(ids)))
        run[query] = {ids[i]: s for i, s in zip(best.tolist(), scores.tolist(), strict=True)}
    return run


def rerank(reranker: Reranker, data: Retrieval, run: Run) -> Run:
    """The same documents of each query, with P(yes) as their score."""
    keys = [(query, document) for query, found in run.items() for document in found]
    scores = reranker.predict([(data.queries[query], data.corpus[document]) for query, document in keys])
    again: Run = {query: {} for query in run}
    for (query, document), score in zip(keys, scores, strict=True):
        again[query][document] = float(score)
    return again


def measure(data: Retrieval, run: Run) -> dict[str, float]:
    """nDCG@10, recall@10 and recall@100, means over the queries that have relevant documents."""
    import ir_measures
    from ir_measures import R, nDCG

    return {
        str(name): value
        for name, value in ir_measures.calc_aggregate([nDCG @ 10, R @ 10, R @ 100], data.qrels, run).items()
    }
