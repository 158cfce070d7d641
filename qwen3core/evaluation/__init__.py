"""Quality: rank correlation on pairs of sentences; nDCG, recall, MRR on a retrieval set, also after reranking."""

from .files import Pair, Retrieval, read_retrieval, read_sts
from .measures import measure, rerank, search, sts

__all__ = ["Pair", "Retrieval", "measure", "read_retrieval", "read_sts", "rerank", "search", "sts"]
