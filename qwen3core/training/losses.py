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
    """Which rows of the outputs belong together; equal texts are one row. All int64."""

    query: Tensor
    """Rows of the queries [B]; unused for pairs."""
    positive: Tensor
    """Rows of their positives [B]."""
    negative: Tensor
    """Rows of the hard negatives [M]."""
    owner: Tensor
    """The query of each negative [M], from 0 to B - 1."""

    def to(self, device: torch.device) -> "Groups":
        """The same groups on a device."""
        return Groups(*(getattr(self, field.name).to(device) for field in fields(self)))


def info_nce(vectors: Tensor, groups: Groups, *, temperature: float, margin: float) -> Tensor:
    """-log of the positive's share among a query's candidates; vectors [n, D] of unit length to a scalar.

    Candidates of query i, by cosine: its positive, its hard negatives, every other query and every other positive of
    the batch; and every other positive compared with its own one (Qwen3 Embedding, arXiv:2506.05176, section 3.1). A
    candidate is left out as probably no negative where its cosine exceeds the positive's by more than ``margin``, where
    it is the same text as the query or the positive, or where it belongs to the same query. The logits of the softmax
    are cosines divided by ``temperature``.
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
    """-log P(right answer), mean over all pairs: yes for positives, no for negatives; logits [n] of yes minus no."""
    labels = torch.cat([torch.ones_like(logits[groups.positive]), torch.zeros_like(logits[groups.negative])])
    return F.binary_cross_entropy_with_logits(torch.cat([logits[groups.positive], logits[groups.negative]]), labels)


def listwise(logits: Tensor, groups: Groups) -> Tensor:
    """-log of the positive's share, by softmax of yes-minus-no logits [n], among it and its own negatives."""
    own, others = logits[groups.positive], logits[groups.negative]
    row = torch.arange(len(own), device=own.device)[:, None]
    candidates = others.expand(len(own), -1).masked_fill(groups.owner != row, -torch.inf)
    return (torch.cat([own[:, None], candidates], dim=1).logsumexp(1) - own).mean()
