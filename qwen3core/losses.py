"""Losses of the training recipe, on the outputs of one whole batch: vectors of texts, or yes-minus-no logits of pairs.

``B`` queries, each with one positive; ``M`` hard negatives in all. Everything float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Groups:
    """Which rows of the outputs belong together; equal texts are one row."""

    query: Tensor
    """[B] int64; unused for pairs."""
    positive: Tensor
    """[B]"""
    negative: Tensor
    """[M]"""
    owner: Tensor
    """[M], the query, by its number in B, of each negative."""

    def to(self, device: torch.device) -> "Groups":
        return Groups(*(getattr(self, field.name).to(device) for field in fields(self)))


def info_nce(vectors: Tensor, groups: Groups, *, temperature: float, margin: float) -> Tensor:
    """-log of the positive's share among a query's candidates; vectors [n, D] of unit length to a scalar.

    Candidates of query i: its positive, its hard negatives, and in the batch every other positive, every other query,
    and, of its positive, every other positive (Qwen3 Embedding, arXiv:2506.05176, section 3.1). One is left out as
    probably no negative where it scores more than ``margin`` above the positive, is the same text as query or positive,
    or belongs to the same query.
    """
    q, p, n = vectors[groups.query], vectors[groups.positive], vectors[groups.negative]
    own = (q * p).sum(-1, keepdim=True)
    candidates = torch.cat([q @ p.T, q @ q.T, p @ p.T, q @ n.T], dim=1)
    text = torch.cat([groups.positive, groups.query, groups.positive, groups.negative])
    mine = groups.query[:, None]
    theirs = groups.query.expand(3, -1).reshape(-1)
    row = torch.arange(len(q), device=q.device)[:, None]
    left_out = (candidates > own + margin) | (text == mine) | (text == groups.positive[:, None])
    left_out |= torch.cat([theirs == mine, groups.owner != row], dim=1)
    logits = torch.cat([own, candidates.masked_fill(left_out, -torch.inf)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def matryoshka(outputs: Tensor, groups: Groups, *, dims: Sequence[int], temperature: float, margin: float) -> Tensor:
    """Mean of ``info_nce`` over the first ``dims`` components, normalised after the cut (arXiv:2205.13147)."""
    cuts = [F.normalize(outputs[:, :dim], dim=-1) for dim in dims]
    return torch.stack([info_nce(cut, groups, temperature=temperature, margin=margin) for cut in cuts]).mean()


def pointwise(logits: Tensor, groups: Groups) -> Tensor:
    """-log P(right answer), yes for positives and no for negatives; logits [n] are of yes minus no."""
    labels = torch.cat([torch.ones_like(logits[groups.positive]), torch.zeros_like(logits[groups.negative])])
    return F.binary_cross_entropy_with_logits(torch.cat([logits[groups.positive], logits[groups.negative]]), labels)


def listwise(logits: Tensor, groups: Groups) -> Tensor:
    """-log of the positive's share, by softmax of yes-minus-no logits [n], among itself and its own negatives."""
    own, others = logits[groups.positive], logits[groups.negative]
    row = torch.arange(len(own), device=own.device)[:, None]
    candidates = others.expand(len(own), -1).masked_fill(groups.owner != row, -torch.inf)
    return (torch.cat([own[:, None], candidates], dim=1).logsumexp(1) - own).mean()
