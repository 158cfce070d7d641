"""Causal attention over keys and values in pages, which a table puts in order. Forward only.

    key j of sequence n  =  k_pages[table[n, j // S], j % S]          S: keys of a page

Tiles, device functions, roundings and the walk over keys are those of ../attention.py; only what a block of keys is
loaded from differs: BLOCK_N entries of the table, then as many rows. S = 4, a sequence of 6 keys in pages 7 and 2:

        table[n]   7 2 -         page 7   k0 k1 k2 k3         page 2   k4 k5 ?  ?         ?, -: never read

FLOPs: 4 Hq D per visible pair. Bytes: (2 Hq Tq + 2 Hkv Tk) D b at least, and 4 of the table for each page. To be
expected: the time of ../attention.py where FLOPs decide, since the table stays in L1; less than its bandwidth where one
query walks over many keys, for each block's addresses wait for the table's entries. Rows of D b = 256 bytes are whole
sectors wherever their pages lie. Sources: PagedAttention, arXiv:2309.06180; packed queries as in vLLM's unified
attention.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core import reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.config import Qwen3Config
from qwen3core.errors import InputError
from qwen3core.laboratory.operations import Operation
from qwen3core.profiling import visible_pairs

from ..attention import CONFIGS as ATTENTION_CONFIGS
from ..attention import (
    LOG2_E,
    add_keys,
    check_heads,
    check_queries,
    find_tile,
    key_range,
    launch_tiles,
    load_queries,
    split_rows,
    store_rows,
)
from ..launch import check, forward_only

CONFIGS = ATTENTION_CONFIGS["forward"]["hopper"]
"""What --tune tries; the default is that of ../attention.py for the GPU at hand."""


def paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    *, config: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """q [Tq, Hq, D], k_pages and v_pages [pages, S, Hkv, D], strided but along D, table [N, most pages] int32.

    Returns out [Tq, Hq, D]. cu_seqlens_k [N + 1] int32 says how many keys each sequence has; as many entries of its row
    of the table as hold them are to be pages that exist: not checked, since a GPU would be waited for. Raises
    InputError.
    """
    forward_only("paged", q, k_pages, v_pages)
    check("paged", q=(q, "Tq Hq D"), k_pages=(k_pages, "pages S Hkv D"), v_pages=(v_pages, "pages S Hkv D"))
    check_heads("paged", q, k_pages.shape[2])
    check_queries("paged", q, cu_seqlens_q, cu_seqlens_k)
    N = len(cu_seqlens_k) - 1
    if table.dim() != 2 or len(table) != N or table.dtype != torch.int32 or table.stride(1) != 1:
        found = f"{list(table.shape)} {table.dtype}, strides {table.stride()}"
        raise InputError(f"paged: table: expected [{N}, most pages] int32, contiguous rows, found {found}")
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    tensors = (q, q.stride(), k_pages, k_pages.stride(), v_pages, v_pages.stride(), table, table.stride(0), out, lse)
    launch_tiles(paged_kernel, "forward", config, q, k_pages[:, 0], tensors, cu_seqlens_q, cu_seqlens_k,
                 k_pages.shape[1])  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "table_stride"])
def paged_kernel(q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, table_ptr, table_stride, out_ptr, lse_ptr,
                 cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
                 S: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    n, q_start, len_q, tile = find_tile(tl.program_id(0), cu_seqlens_q_ptr, N, QUERIES)
    first = (tl.cdiv(len_q, QUERIES) - 1 - tile) * QUERIES
    if first < 0:
        return
    len_k = tl.load(cu_seqlens_k_ptr + n + 1) - tl.load(cu_seqlens_k_ptr + n)
    table_ptr += n.to(tl.int64) * table_stride
    k_ptr += tl.program_id(1).to(tl.int64) * k_strides[2]
    v_ptr += tl.program_id(1).to(tl.int64) * v_strides[2]
    token = (q_start + first).to(tl.int64)
    query, head_q = split_rows(GROUP, BLOCK_M)
    exists = first + query < len_q
    seen, full, end = key_range(first, query, len_q, len_k, True, QUERIES, BLOCK_N)
    q = load_queries(q_ptr, q_strides, token, query, head_q, exists, GROUP, D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    acc, m, total = attend_pages(acc, m, total, q, k_ptr, k_strides, v_ptr, v_strides, table_ptr, 0, full, seen, len_k,
                                 scale * LOG2_E, False, S, D, BLOCK_N)  # fmt: skip
    acc, m, total = attend_pages(acc, m, total, q, k_ptr, k_strides, v_ptr, v_strides, table_ptr, full, end, seen,
                                 len_k, scale * LOG2_E, True, S, D, BLOCK_N)  # fmt: skip
    store_rows(out_ptr, lse_ptr, acc, m, total, token, query, head_q, exists, HQ, GROUP, D)


@triton.jit
def attend_pages(acc, m, total, q, k_ptr, k_strides, v_ptr, v_strides, table_ptr, start, end, seen, len_k, scale,
                 MASK: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """``attend`` over keys whose pages are in the table."""
    for n in tl.range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + key // S, mask=key < len_k, other=0).to(tl.int64)
        k = load_keys(k_ptr, k_strides, page, key, len_k, MASK, S, D)
        s = tl.dot(q, k.T, input_precision="ieee")
        if MASK:
            s = tl.where(key[None, :] < seen[:, None], s, float("-inf"))
        v = load_keys(v_ptr, v_strides, page, key, len_k, MASK, S, D)
        acc, m, total = add_keys(acc, m, total, s, v, scale)
    return acc, m, total


@triton.jit
def load_keys(ptr, strides, page, key, len_k, MASK: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """Rows ``key`` of a sequence, each in its page, [BLOCK_N, D], zero from ``len_k`` on."""
    at = ptr + (page * strides[0] + key % S * strides[1])[:, None] + tl.arange(0, D)[None, :]
    return tl.load(at, mask=(key < len_k)[:, None], other=0.0) if MASK else tl.load(at)


def specification(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    S, lengths = k_pages.shape[1], cu_seqlens_k.diff().tolist()
    k, v = (
        torch.cat([x[row[: -(-n // S)]].flatten(0, 1)[:n] for row, n in zip(table.long(), lengths, strict=True)])
        for x in (k_pages, v_pages)
    )
    return reference.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, 0, 0)


def arguments(len_q: list[int], len_k: list[int], heads: tuple[int, int], D: int, S: int) -> tuple:
    """Pages in random order. What is not to be read is NaN: the rest of the last pages, and pages of no sequence."""
    randn = partial(torch.randn, dtype=torch.float64)
    counts = [-(-n // S) for n in len_k]
    order = torch.randperm(sum(counts) + 3)
    k_pages, v_pages = torch.full((2, len(order), S, heads[1], D), torch.nan, dtype=torch.float64)
    table = torch.full((len(len_k), max(counts) + 1), int(order[-1]), dtype=torch.int32)
    for n, pages in enumerate(order[: sum(counts)].split(counts)):
        table[n, : counts[n]] = pages
        for x in (k_pages, v_pages):
            rows = x[pages].flatten(0, 1)
            rows[: len_k[n]] = randn(len_k[n], heads[1], D)
            x[pages] = rows.unflatten(0, (-1, S))
    return randn(sum(len_q), heads[0], D), k_pages, v_pages, table, build_cu_seqlens(len_q), build_cu_seqlens(len_k)


def cases() -> Iterator[tuple[str, tuple]]:
    for S in (1, 7, 16, 64):
        yield f"pages of {S}", arguments([1, 66, 3], [1, 66, 130], (2, 1), 64, S)
    yield "one page", arguments([5], [5], (4, 2), 128, 256)
    yield "one query of many keys", arguments([1, 0, 1], [300, 3, 65], (8, 1), 64, 16)


def large(config: Qwen3Config, tokens: int) -> tuple:
    """Texts of 1024 tokens, of which the last 32 are new."""
    lengths = [min(32, tokens - start) for start in range(0, tokens, 32)]
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return arguments(lengths, [1024] * len(lengths), heads, config.head_dim, 16)


def work(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[int, int]:
    S, heads = k_pages.shape[1:3]
    _, HQ, D = q.shape
    entries = sum(-(-n // S) for n in cu_seqlens_k.diff().tolist())
    moved = 2 * q.nbytes + 2 * int(cu_seqlens_k[-1]) * heads * D * q.element_size() + 4 * entries
    return moved, 4 * HQ * D * visible_pairs(cu_seqlens_q, cu_seqlens_k, causal=True)


OPERATION = Operation(specification, cases, large, work)
