"""Sequences of any lengths, laid end to end: packed, never padded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError, check_int


@dataclass(frozen=True)
class PackedBatch:
    """``N`` sequences in ``T`` tokens; sequence n is rows ``cu_seqlens[n]:cu_seqlens[n + 1]`` of any packed tensor."""

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, from 0 in each sequence."""
    cu_seqlens: Tensor
    """[N + 1] int32, from 0 to T."""
    max_seqlen: int
    indices: tuple[int, ...]
    """[N], where each sequence stood in the caller's list."""


def pack(
    sequences: Sequence[Sequence[int]], *, device: torch.device | str = "cpu", indices: Sequence[int] | None = None
) -> PackedBatch:
    """Lay token id lists end to end on ``device``. Raises InputError for an empty list or an empty sequence."""
    lengths = [len(s) for s in sequences]
    if not lengths or min(lengths) == 0:
        raise InputError(f"pack: expected one or more sequences of at least one token, found lengths {lengths[:8]}")
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedBatch(
        input_ids=torch.tensor([i for s in sequences for i in s]).to(device),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).to(device),
        cu_seqlens=cu_seqlens.to(device),
        max_seqlen=max(lengths),
        indices=tuple(indices) if indices is not None else tuple(range(len(lengths))),
    )


def plan(lengths: Sequence[int], batch_tokens: int | None) -> list[list[int]]:
    """Group sequence indices, longest first, so that each group holds at most ``batch_tokens`` tokens.

    ``None`` means 8192, or the longest sequence where that is more. Raises InputError where one sequence alone
    exceeds the budget.
    """
    if not lengths:
        return []
    if batch_tokens is not None:
        check_int("batch_tokens", batch_tokens, 1)
    longest = max(lengths)
    budget = max(8192, longest) if batch_tokens is None else batch_tokens
    if budget < longest:
        raise InputError(
            f"batch_tokens: expected at least {longest}, the length in tokens of the longest input "
            f"(index {list(lengths).index(longest)}), found {batch_tokens}"
        )
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= lengths[index]
    return groups
