"""A small retrieval set for the lessons: documents of tests/data/held-out, and the queries that belong to them."""

from pathlib import Path

import torch
from torch import Tensor

from qwen3core.evaluation import read_retrieval

FOLDER = Path(__file__).resolve().parents[1] / "data" / "held-out"


def read(size: int) -> tuple[list[str], list[str], Tensor]:
    """Queries, documents, and for each query the row of its one document, int64."""
    data = read_retrieval(FOLDER)
    rows = {document: row for row, document in enumerate(list(data.corpus)[:size])}
    relevant = {query: rows[d] for query, judged in data.qrels.items() for d in judged if d in rows}
    documents = list(data.corpus.values())[:size]
    return [data.queries[query] for query in relevant], documents, torch.tensor(list(relevant.values()))


def recall_at_10(queries: Tensor, documents: Tensor, relevant: Tensor) -> float:
    """The share of queries whose document is among the ten of the largest dot product; vectors [n, dim]."""
    found = (queries @ documents.T).topk(10).indices == relevant[:, None].to(queries.device)
    return found.any(dim=1).float().mean().item()
