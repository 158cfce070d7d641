"""Measures of quality, by scipy and by pytrec_eval (trec_eval's), which ir_measures brings."""

import math
from collections.abc import Sequence

import numpy as np

from ..embedder import Embedder
from ..errors import InputError, check_int, warn
from ..reranker import Reranker
from .files import Pair, Retrieval, check_id

Run = dict[str, dict[str, float]]
"""Query id to document id to score."""


def sts(embedder: Embedder, pairs: Sequence[Pair], *, dim: int | None = None) -> float:
    """Spearman's rank correlation between cosines, of vectors cut to ``dim``, and the scores that people gave.

    Raises InputError where it is not defined: fewer than two pairs, scores or cosines not finite or all equal.
    """
    from scipy.stats import spearmanr

    if len(pairs) < 2:
        raise InputError(f"sts: expected two or more pairs, found {len(pairs)}")
    first, second, scores = zip(*pairs, strict=True)
    _check_ranks("scores", np.array(scores, np.float64))
    left, right = (embedder.encode(texts, truncate_dim=dim) for texts in (first, second))
    cosines = np.einsum("nd,nd->n", left, right, dtype=np.float64)
    _check_ranks("cosines", cosines)
    return float(spearmanr(cosines, scores).statistic)


def _check_ranks(name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all() or (values == values[0]).all():
        raise InputError(f"sts: {name}: expected finite numbers that are not all equal, found {values[:4]}, ...")


def search(
    embedder: Embedder, data: Retrieval, *, dim: int | None = None, top: int = 100, ignore_identical_ids: bool = True
) -> Run:
    """The ``top`` documents of each query by the checkpoint's similarity, of vectors cut to ``dim``.

    ignore_identical_ids: leave out the document that has the query's id, since it is the query itself in sets such as
    ArguAna and Quora. This is BEIR's default; mteb does so for the tasks that say so. Where ids are mere numbers, it
    can lose a document that is another: a warning counts the queries to which that document was relevant.
    """
    check_int("top", top, 1)
    rows = {document: row for row, document in enumerate(data.corpus)}
    own = {query: rows[query] for query in data.queries if ignore_identical_ids and query in rows}
    lost = sum(data.qrels.get(query, {}).get(query, 0) > 0 for query in own)
    if lost:
        warn(
            f"{lost} of {len(data.queries)} queries lost a relevant document that has their own id; "
            "ignore_identical_ids=False leaves it in"
        )
    ids = list(data.corpus)
    documents = embedder.encode_document(list(data.corpus.values()), truncate_dim=dim, convert_to_tensor=True)
    queries = embedder.encode_query(list(data.queries.values()), truncate_dim=dim, convert_to_tensor=True)
    similarities = (row for block in queries.split(64) for row in embedder.similarity(block, documents))
    run = {}
    for query, scores in zip(data.queries, similarities, strict=True):
        if query in own:
            scores[own[query]] = -math.inf
        scores, best = scores.topk(min(top, len(ids) - (query in own)))
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
    """nDCG@10, R@10, R@100 (recall) and RR@10 (whose mean is MRR@10, MS MARCO's): means over all judged queries.

    All by pytrec_eval, so that all break ties in trec_eval's way: by float32 scores, then by id, the last one first.
    Negative relevance counts as 0. A query with nothing relevant counts as 0 in every mean, as in trec_eval and
    pytrec_eval. So does one without results, as by trec_eval's option -c: pytrec_eval gives zeros to a query whose
    results are empty and says nothing of a query that the run lacks. Queries of the run that are not judged are
    left out. Raises InputError for no queries, a score that is not finite, or an id that pytrec_eval cannot hold.
    """
    import ir_measures
    from ir_measures import RR, R, nDCG

    if not data.qrels:
        raise InputError("measure: expected judged queries, found none")
    for query, judged in data.qrels.items():
        for key in (query, *judged):
            check_id("qrels", key)
    for query, found in run.items():
        for key, score in ((query, 0.0), *found.items()):
            check_id("run", key)
            if not math.isfinite(score):
                raise InputError(f"run: query {query!r}, document {key!r}: expected a finite score, found {score}")
    sums = {"nDCG@10": 0.0, "R@10": 0.0, "R@100": 0.0, "RR@10": 0.0}
    for metric in ir_measures.pytrec_eval.iter_calc([nDCG @ 10, R @ 10, R @ 100, RR], data.qrels, run):
        if metric.measure != RR:
            sums[str(metric.measure)] += metric.value
        elif metric.value >= 1 / 10:  # trec_eval's has no cut; ir_measures' own RR@10 breaks ties the other way
            sums["RR@10"] += metric.value
    return {name: total / len(data.qrels) for name, total in sums.items()}
