"""Attention whose queries see the last W keys, their own included. Forward only.

    s = q k^T / sqrt(D)      p = softmax(s over the last W keys that a causal query sees)      out = p v

Tiles, device functions and roundings are those of ../attention.py; the walk over keys begins where the window of the
tile's first query does. One tile, 4 queries of one head, W = 3, BLOCK_N = 4:

                 keys   0 1 2 3   4 5 6 7   8 9 a b   c d
        query 8                   - - . .   . - - -                 .  seen
        query 9                   - - - .   . . - -                 -  computed and masked
        query a                   - - - -   . . . -             blank  never touched
        query b                   - - - -   - . . .

Every block is masked: only in the middle of a window longer than BLOCK_M / G + BLOCK_N are some that would not need it,
and a loop of their own took more registers than an A100 has.

FLOPs: 4 Hq D per visible pair, at most W per query. Bytes: (2 Hq + 2 Hkv) T D b at least. To be expected: the rate of
../attention.py on its masked blocks, for about W + BLOCK_M / G + BLOCK_N keys per query, which is 1.25 W for W = 512
and tiles of 64 queries and 64 keys. Sources: arXiv:2004.05150 (Longformer), arXiv:2310.06825 (Mistral 7B).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core import reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.config import Qwen3Config
from qwen3core.errors import InputError
from qwen3core.laboratory.operations import Operation

from ..attention import CONFIGS as ATTENTION_CONFIGS
from ..attention import (
    LOG2_E,
    add_keys,
    check_attention,
    key_range,
    launch_tiles,
    load_block,
    load_queries,
    query_tile,
    split_rows,
    store_rows,
)
from ..launch import forward_only

CONFIGS = ATTENTION_CONFIGS["forward"]["hopper"]
"""What --tune tries; the default is that of ../attention.py for the GPU at hand."""


def sliding_window(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    window: int, *, config: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """``attention`` with the same arguments, causal, to the last ``window`` keys, at least 1. Raises InputError."""
    forward_only("sliding_window", q, k, v)
    check_attention("sliding_window", q, k, v, cu_seqlens_q, cu_seqlens_k)
    if window < 1:
        raise InputError(f"sliding_window: window: expected at least 1, found {window}")
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    tensors = (q, q.stride(), k, k.stride(), v, v.stride(), out, lse)
    launch_tiles(sliding_window_kernel, "forward", config, q, k, tensors, cu_seqlens_q, cu_seqlens_k, window)
    return out


@triton.jit(do_not_specialize=["N"])
def sliding_window_kernel(q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, lse_ptr,
                          cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
                          WINDOW: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    q_start, len_q, first, k_start, len_k = query_tile(cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, QUERIES)
    if first < 0:
        return
    k_ptr += k_start * k_strides[0] + tl.program_id(1) * k_strides[1]
    v_ptr += k_start * v_strides[0] + tl.program_id(1) * v_strides[1]
    token = (q_start + first).to(tl.int64)
    query, head_q = split_rows(GROUP, BLOCK_M)
    exists = first + query < len_q
    # Row r sees keys seen[r] - WINDOW : seen[r].
    seen, _, end = key_range(first, query, len_q, len_k, True, QUERIES, BLOCK_N)
    start = tl.maximum(len_k - len_q + first + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    q = load_queries(q_ptr, q_strides, token, query, head_q, exists, GROUP, D)
    # Not -inf: a row may see nothing of the first blocks, and -inf less -inf is NaN.
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for n in tl.range(start, end, BLOCK_N):
        k = load_block(k_ptr, k_strides[0], n, len_k, True, D, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        after = seen[:, None] - (n + tl.arange(0, BLOCK_N))[None, :]  # 1 for a query's own key
        s = tl.where((after > 0) & (after <= WINDOW), s, float("-inf"))
        v = load_block(v_ptr, v_strides[0], n, len_k, True, D, BLOCK_N)
        acc, m, total = add_keys(acc, m, total, s, v, scale * LOG2_E)
    store_rows(out_ptr, lse_ptr, acc, m, total, token, query, head_q, exists, HQ, GROUP, D)


def specification(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    window: int,
) -> Tensor:  # fmt: skip
    def hook(name: str, x: Tensor, sequence: int) -> Tensor:
        if name != "scores":
            return x
        len_q, len_k = x.shape[1:]
        before = torch.ones(len_q, len_k, dtype=torch.bool, device=x.device).tril(len_k - len_q - window)
        return x.masked_fill(before, -torch.inf)

    return reference.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, hook=hook)


def arguments(len_q: list[int], len_k: list[int], heads: tuple[int, int], D: int, window: int) -> tuple:
    randn = partial(torch.randn, dtype=torch.float64)
    q, k, v = randn(sum(len_q), heads[0], D), randn(sum(len_k), heads[1], D), randn(sum(len_k), heads[1], D)
    return q, k, v, build_cu_seqlens(len_q), build_cu_seqlens(len_k), max(len_q), max(len_k), window


def cases() -> Iterator[tuple[str, tuple]]:
    for window in (1, 64, 1000):
        yield f"window {window}", arguments([1, 66, 3], [1, 66, 3], (2, 1), 64, window)
    yield "window over whole blocks", arguments([20], [200], (8, 1), 64, 130)
    yield "fewer queries than keys", arguments([1, 5, 0, 3], [200, 70, 7, 3], (4, 2), 128, 37)


def large(config: Qwen3Config, tokens: int) -> tuple:
    lengths = [min(4096, tokens - start) for start in range(0, tokens, 4096)]
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return arguments(lengths, lengths, heads, config.head_dim, 512)


def work(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *rest: Any) -> tuple[int, int]:
    window = rest[-1]
    pairs = 0
    for queries, keys in reference.sequences(cu_seqlens_q, cu_seqlens_k):
        len_q, len_k = queries.stop - queries.start, keys.stop - keys.start
        pairs += sum(min(len_k - len_q + i + 1, window) for i in range(len_q))
    return 2 * q.nbytes + k.nbytes + v.nbytes, 4 * q.shape[1] * q.shape[2] * pairs


OPERATION = Operation(specification, cases, large, work)
