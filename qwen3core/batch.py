"""Sequences of any lengths, laid end to end: packed, never padded; what sequences begin with in common, only once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .errors import InputError

ALL = slice(None)
KeysValues = list[tuple[Tensor, Tensor]]
"""Keys, RoPE applied, and values of some tokens: [tokens, Hkv, D] each, for every layer."""


@dataclass(frozen=True)
class Reach:
    """Which rows of a packed batch attend to which: what ``ops.attention`` takes, and the rows to hand it."""

    queries: Tensor | slice
    """Rows that ask, sequence after sequence: [Tq] int64, or all."""
    keys: Tensor | slice
    """Rows that each of these sequences sees, counted from the first of ``PackedBatch.past``: [Tk] int64, or all."""
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class PackedBatch:
    """``N`` texts in ``T`` tokens; sequence n is rows ``cu_seqlens[n]:cu_seqlens[n + 1]`` of any packed tensor.

    Sequences are the shared heads, if any, and then the texts (without their heads). Heads that were computed before
    are not among the rows; their keys and values are ``past``.
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, from 0 in each text, its head included."""
    cu_seqlens: Tensor
    """[sequences + 1] int32, from 0 to T."""
    max_seqlen: int
    indices: tuple[int, ...]
    """[N], where each text stood in the caller's list."""
    all: Reach
    """Every token attends to its text up to itself."""
    last: Reach
    """So does only the last token of each text."""
    past: KeysValues | None = None


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    heads: Sequence[tuple[int, ...]] | None = None,
    past: Mapping[tuple[int, ...], KeysValues] | None = None,
) -> PackedBatch:
    """Lay token id lists end to end on ``device``.

    heads: for each sequence, ids that it begins with and continues; equal heads are laid down, and so computed, once.
    past: heads that were computed before.
    Raises InputError for an empty list, an empty sequence, or a head that is not one.
    """
    lengths = [len(s) for s in sequences]
    if not lengths or min(lengths) == 0:
        raise InputError(f"pack: expected one or more sequences of at least one token, found lengths {lengths[:8]}")
    heads = heads or [()] * len(sequences)
    for n, (sequence, head) in enumerate(zip(sequences, heads, strict=True)):
        if len(head) >= len(sequence) or tuple(sequence[: len(head)]) != head:
            raise InputError(f"pack: sequence {n}: expected it to begin with its head and continue, found otherwise")
    past = past or {}
    known = [head for head in dict.fromkeys(heads) if head in past]
    shared = [head for head in dict.fromkeys(heads) if head and head not in past]
    rows = [*shared, *(s[len(head) :] for s, head in zip(sequences, heads, strict=True))]
    before = [()] * len(shared) + list(heads)
    cu_seqlens = _cumulated([len(row) for row in rows])
    starts = cu_seqlens.tolist()
    position_ids = torch.cat([torch.arange(len(h), len(h) + len(r)) for h, r in zip(before, rows, strict=True)])

    put = partial(to_device, device=device)
    cu, longest = put(cu_seqlens), max(len(row) for row in rows)
    keys: Tensor | slice = ALL
    keys_of_texts: Tensor | slice = ALL
    cu_keys = cu_keys_of_texts = cu
    if known or shared:
        *starts_known, own = _cumulated([len(head) for head in known]).tolist()
        first = dict(zip([*known, *shared], [*starts_known, *(own + start for start in starts)], strict=False))
        seen = [
            torch.cat([torch.arange(len(h)) + first.get(h, 0), torch.arange(len(r)) + own + start])
            for h, r, start in zip(before, rows, starts, strict=False)
        ]
        keys, keys_of_texts = put(torch.cat(seen)), put(torch.cat(seen[len(shared) :]))
        cu_keys, cu_keys_of_texts = put(_cumulated([len(s) for s in seen])), put(_cumulated(lengths))
    ends = put(cu_seqlens[len(shared) + 1 :].long() - 1)
    ones = put(torch.arange(len(lengths) + 1, dtype=torch.int32))
    return PackedBatch(
        input_ids=put(torch.tensor([i for row in rows for i in row])),
        position_ids=put(position_ids),
        cu_seqlens=cu,
        max_seqlen=longest,
        indices=tuple(indices) if indices is not None else tuple(range(len(lengths))),
        all=Reach(ALL, keys, cu, cu_keys, longest, max(lengths)),
        last=Reach(ends, keys_of_texts, ones, cu_keys_of_texts, 1, max(lengths)),
        past=[_joined(layer) for layer in zip(*(past[head] for head in known), strict=True)] if known else None,
    )


def shared_heads(sequences: Sequence[Sequence[int]], prefixes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each sequence, as much of its prefix as all sequences of that prefix begin with, and continue.

    On ids, since a prefix's last characters and what follows them may be one token.
    """
    lengths: dict[tuple[int, ...], int] = {}
    for sequence, prefix in zip(sequences, prefixes, strict=True):
        n = min(lengths.get(prefix, len(prefix)), len(sequence) - 1)
        while prefix[:n] != tuple(sequence[:n]):
            n -= 1
        lengths[prefix] = n
    return [prefix[: lengths[prefix]] for prefix in prefixes]


def plan(lengths: Sequence[int], batch_tokens: int, heads: Sequence[tuple[int, ...]] | None = None) -> list[list[int]]:
    """Group sequence indices so that each group lays down at most ``batch_tokens`` tokens, or is one longer sequence.

    Longest first among sequences of one head, which a group counts once.
    """
    heads = heads or [()] * len(lengths)
    number = {head: i for i, head in enumerate(dict.fromkeys(heads))}
    groups: list[list[int]] = []
    room, laid = 0, None
    for index in sorted(range(len(lengths)), key=lambda i: (number[heads[i]], -lengths[i])):
        head = heads[index]
        cost = lengths[index] - (len(head) if head == laid else 0)
        if cost > room or not groups:
            groups.append([])
            room, cost = batch_tokens, lengths[index]
        groups[-1].append(index)
        room, laid = room - cost, head
    return groups


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values)


def _cumulated(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to ``device``; to a GPU without waiting for it."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
