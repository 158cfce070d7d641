"""Which texts share a batch, and which beginning they share in it."""

from collections.abc import Sequence

from .batch import Prefix


def shared_prefixes(sequences: Sequence[Sequence[int]], candidates: Sequence[Prefix]) -> list[Prefix]:
    """For each sequence, as much of its candidate as all sequences of that candidate begin with, and continue.

    Computing it once gives the right result only where ``Qwen3Model.shortcuts`` holds. The comparison is on ids, since
    a prefix's last characters and what follows them may be one token.
    """
    lengths: dict[Prefix, int] = {}
    for ids, candidate in zip(sequences, candidates, strict=True):
        n = min(lengths.get(candidate, len(candidate)), len(ids) - 1)
        while candidate[:n] != tuple(ids[:n]):
            n -= 1
        lengths[candidate] = n
    return [candidate[: lengths[candidate]] for candidate in candidates]


def plan(
    lengths: Sequence[int], batch_tokens: int, prefixes: Sequence[Prefix] | None = None, batch_size: int | None = None
) -> list[list[int]]:
    """Group sequence numbers so that each group has at most ``batch_tokens`` rows, or is one longer sequence.

    Longest first among sequences of one prefix; a group counts a prefix once, and has at most ``batch_size`` sequences.
    """
    prefixes = prefixes or [()] * len(lengths)
    order = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
    groups: list[list[int]] = []
    free, last_prefix = 0, None
    for index in sorted(range(len(lengths)), key=lambda i: (order[prefixes[i]], -lengths[i])):
        prefix = prefixes[index]
        rows = lengths[index] - (len(prefix) if prefix == last_prefix else 0)
        if rows > free or not groups or len(groups[-1]) == batch_size:
            groups.append([])
            free, rows = batch_tokens, lengths[index]
        groups[-1].append(index)
        free, last_prefix = free - rows, prefix
    return groups
