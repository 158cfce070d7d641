"""Packed batches: sequences of any lengths end to end, never padded, and a beginning that several share only once.

Two texts, A = P a0 and B = P b0 b1, that share the prefix P = p0 p1:

    row              0    1    2    3    4
    input_ids        p0   p1   a0   b0   b1
    position_ids     0    1    2    2    3
    cu_seqlens       0         2    3         5       three sequences: P, A's own tokens, B's own tokens

    full             queries   keys                   last_token       queries   keys
      P              0 1       0 1                      A              2         0 1 2
      A              2         0 1 2                    B              4         0 1 3 4
      B              3 4       0 1 3 4
    cu_seqlens_q     0 2 3 5                          cu_seqlens_q     0 1 2
    cu_seqlens_k     0 2 5 9                          cu_seqlens_k     0 3 7

A prefix whose keys and values were computed before (``prefix_kv``) has no rows; its keys come before those of row 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .errors import InputError

ALL_ROWS = slice(None)
"""As ``queries`` or ``keys`` of a layout: every row, without a copy."""
Prefix = tuple[int, ...]
"""Token ids that several sequences begin with; empty for a sequence that shares nothing."""
KeysValues = list[tuple[Tensor, Tensor]]
"""For every layer the keys, RoPE applied, and the values of some tokens: [tokens, Hkv, D] each."""


@dataclass(frozen=True)
class VarlenLayout:
    """Variable-length attention over a packed batch: the rows that query, the rows they see, sequence by sequence."""

    queries: Tensor | slice
    """Rows that query: [Tq] int64, or all."""
    keys: Tensor | slice
    """Rows that each of these sequences sees, those of ``prefix_kv`` counted first: [Tk] int64, or all."""
    cu_seqlens_q: Tensor
    """[sequences + 1] int32 on the batch's device."""
    cu_seqlens_k: Tensor
    """[sequences + 1] int32 on the batch's device."""
    max_seqlen_q: int
    """Most queries of a sequence."""
    max_seqlen_k: int
    """Most keys of a sequence."""


@dataclass(frozen=True)
class PackedBatch:
    """``N`` texts in ``T`` rows, one token each: shared prefixes first, then what is each text's own.

    Sequence n is rows ``cu_seqlens[n]:cu_seqlens[n + 1]`` of any packed tensor. Made by ``pack``.

    Example:
        >>> batch = pack([[7, 8, 1], [7, 8, 2, 3]], prefixes=[(7, 8), (7, 8)])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.cu_seqlens.tolist()
        ([7, 8, 1, 2, 3], [0, 1, 2, 2, 3], [0, 2, 3, 5])
    """

    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, from 0 in each text, its prefix included."""
    cu_seqlens: Tensor
    """[sequences + 1] int32, from 0 to T."""
    indices: Tensor
    """[N] int64, where each text stood in the caller's list."""
    full: VarlenLayout
    """Every row queries."""
    last_token: VarlenLayout
    """Only the last token of each text queries."""
    prefix_kv: KeysValues | None = None
    """Keys and values of the prefixes that were computed before."""

    @property
    def text_cu_seqlens(self) -> Tensor:
        """[N + 1] int32, the sequences of the texts alone, which begin where the shared prefixes end."""
        return self.cu_seqlens[-len(self.indices) - 1 :]

    @property
    def shares_prefixes(self) -> bool:
        """Whether texts attend to rows outside their own."""
        return self.prefix_kv is not None or len(self.cu_seqlens) - 1 > len(self.indices)


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    indices: Sequence[int] | None = None,
    prefixes: Sequence[Prefix] | None = None,
    prefix_kv: Mapping[Prefix, KeysValues] | None = None,
) -> PackedBatch:
    """Lay token id lists end to end on ``device``.

    Args:
        sequences: N lists of token ids, none empty.
        indices: where each sequence stood in the caller's list; 0 to N - 1 by default.
        prefixes: for each sequence, ids that it begins with and continues; equal ones become rows only once.
        prefix_kv: keys and values of prefixes that were computed before (``Qwen3Model.keys_values``).

    Raises:
        InputError: for an empty list, an empty sequence, or a prefix that its sequence does not begin with.

    Example:
        >>> pack([[5, 6, 7], [8]]).cu_seqlens.tolist()
        [0, 3, 4]
    """
    prefixes = prefixes or [()] * len(sequences)
    _check(sequences, prefixes)
    prefix_kv = prefix_kv or {}
    distinct = [prefix for prefix in dict.fromkeys(prefixes) if prefix]
    cached = [prefix for prefix in distinct if prefix in prefix_kv]
    computed = [prefix for prefix in distinct if prefix not in prefix_kv]

    rows = [*computed, *(ids[len(prefix) :] for ids, prefix in zip(sequences, prefixes, strict=True))]
    first_positions = [0] * len(computed) + [len(prefix) for prefix in prefixes]
    positions = [torch.arange(p, p + len(r)) for p, r in zip(first_positions, rows, strict=True)]
    cu_seqlens = build_cu_seqlens(map(len, rows))
    keys = _key_rows(cu_seqlens, cached, computed, prefixes) if distinct else None
    full, last_token = _layouts(cu_seqlens, keys, len(computed), torch.device(device))
    return PackedBatch(
        input_ids=to_device(torch.tensor([i for row in rows for i in row]), device),
        position_ids=to_device(torch.cat(positions), device),
        cu_seqlens=full.cu_seqlens_q,
        indices=to_device(torch.tensor(range(len(sequences)) if indices is None else indices), device),
        full=full,
        last_token=last_token,
        prefix_kv=_concatenate([prefix_kv[prefix] for prefix in cached]) if cached else None,
    )


def _check(sequences: Sequence[Sequence[int]], prefixes: Sequence[Prefix]) -> None:
    lengths = [len(ids) for ids in sequences]
    if not lengths or min(lengths) == 0:
        raise InputError(f"pack: expected one or more sequences of at least one token, found lengths {lengths[:8]}")
    for n, (ids, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
        if len(prefix) >= len(ids) or tuple(ids[: len(prefix)]) != prefix:
            raise InputError(f"pack: sequence {n}: expected it to begin with its prefix and continue, found otherwise")


def _key_rows(
    cu_seqlens: Tensor, cached: Sequence[Prefix], computed: Sequence[Prefix], prefixes: Sequence[Prefix]
) -> list[Tensor]:
    """The key rows that each sequence of the batch sees: its prefix's, then its own; [length] int64 each."""
    # Keys are those of the cached prefixes, then those of the batch's rows.
    *cached_starts, row_0 = build_cu_seqlens(map(len, cached)).tolist()
    starts = [row_0 + start for start in cu_seqlens.tolist()]
    first_key = dict(zip(cached, cached_starts, strict=True)) | dict(zip(computed, starts, strict=False))
    keys = []
    for prefix, start, end in zip([()] * len(computed) + list(prefixes), starts, starts[1:], strict=False):
        first = first_key.get(prefix, 0)
        keys.append(torch.cat([torch.arange(first, first + len(prefix)), torch.arange(start, end)]))
    return keys


def _layouts(
    cu_seqlens: Tensor, keys: list[Tensor] | None, computed: int, device: torch.device
) -> tuple[VarlenLayout, VarlenLayout]:
    """The layouts ``full`` and ``last_token`` of a batch whose first ``computed`` sequences are prefixes.

    keys: the rows that each sequence sees; None where each sees itself alone.
    """
    put = partial(to_device, device=device)
    lengths = cu_seqlens.diff().tolist() if keys is None else [len(rows) for rows in keys]
    queries = put(cu_seqlens)
    full = VarlenLayout(
        queries=ALL_ROWS,
        keys=ALL_ROWS if keys is None else put(torch.cat(keys)),
        cu_seqlens_q=queries,
        cu_seqlens_k=queries if keys is None else put(build_cu_seqlens(lengths)),
        max_seqlen_q=int(cu_seqlens.diff().max()),
        max_seqlen_k=max(lengths),
    )
    last_token = VarlenLayout(
        queries=put(cu_seqlens[computed + 1 :].long() - 1),
        keys=ALL_ROWS if keys is None else put(torch.cat(keys[computed:])),
        cu_seqlens_q=put(torch.arange(len(lengths) - computed + 1, dtype=torch.int32)),
        cu_seqlens_k=queries if keys is None else put(build_cu_seqlens(lengths[computed:])),
        max_seqlen_q=1,
        max_seqlen_k=max(lengths[computed:]),
    )
    return full, last_token


def _concatenate(parts: Sequence[KeysValues]) -> KeysValues:
    """Keys and values of several prefixes as one, layer by layer."""
    layers = zip(*parts, strict=True)
    return [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers]


def build_cu_seqlens(lengths: Iterable[int]) -> Tensor:
    """Cumulated lengths [N + 1] int32 on the CPU: sequence n is rows ``cu_seqlens[n]:cu_seqlens[n + 1]``."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to ``device``; to a GPU without waiting for it."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
