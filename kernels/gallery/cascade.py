"""Attention of many continuations of one prefix, whose keys are read once for all of them. Forward only.

    (o, l) = attention of all queries, as one sequence, over the prefix, without a mask; l = log sum exp
    out    = (e^l o + sum of e^s v) / (e^l + sum of e^s)          s: causal scores of each continuation's own keys

Two launches. The first is ../attention.py, whose tiles hold queries of several continuations: they share each load of
the prefix's keys, and fill a tile where every continuation is short. The second begins with what the first wrote, as if
it had just walked over the prefix (acc = o, m = l, total = 1), walks over the continuation's own keys and writes over
it: no pass that merges. P = 6 keys of the prefix, two continuations of 2 and 3 tokens:

                          prefix          own keys
        a0 a1             . . . . . .     .
                          . . . . . .     . .                     one tile of the first launch: all five rows
        b0 b1 b2          . . . . . .          .                  a tile of the second: one continuation
                          . . . . . .          . .
                          . . . . . .          . . .

float32 within a launch; o is rounded to q's dtype between the two, as where ``merge`` puts two results together.

FLOPs: 4 Hq D per visible pair. Bytes: (2 Hq T + 2 Hkv (P + T)) D b at least, and 2 Hq T D b more for o. To be expected:
beside ../attention.py over a copy of the prefix for each continuation, where these have fewer than BLOCK_M / G tokens
and the keys' bytes decide, P 2 Hkv D b are read for each BLOCK_M / G tokens in place of each continuation, and take as
much less time; where FLOPs decide, its time and that of the bytes of o. Sources: Hydragen, arXiv:2402.05099;
FlashInfer's cascade inference.
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
from qwen3core.laboratory.operations import Operation
from qwen3core.profiling import visible_pairs

from ..attention import CONFIGS as ATTENTION_CONFIGS
from ..attention import (
    LOG2_E,
    attend,
    attention,
    check_attention,
    key_range,
    launch_tiles,
    load_queries,
    query_tile,
    split_rows,
    store_rows,
)
from ..launch import check, forward_only

CONFIGS = ATTENTION_CONFIGS["forward"]["hopper"]
"""What --tune tries; the default is that of ../attention.py for the GPU at hand."""


def cascade(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, *, config: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """Causal ``attention`` over prefix_k and prefix_v [P, Hkv, D] and then each sequence's own keys: out [Tq, Hq, D].

    The other arguments are those of ``attention``, without the prefix. Raises InputError.
    """
    forward_only("cascade", q, prefix_k, prefix_v, k, v)
    check_attention("cascade", q, k, v, cu_seqlens_q, cu_seqlens_k)
    check("cascade", k=(k, "Tk Hkv D"), prefix_k=(prefix_k, "P Hkv D"), prefix_v=(prefix_v, "P Hkv D"))
    P = len(prefix_k)
    all_queries = torch.stack((cu_seqlens_q[0], cu_seqlens_q[-1]))
    whole_prefix = torch.arange(2, dtype=torch.int32, device=q.device) * P
    out, lse = attention(q, prefix_k, prefix_v, all_queries, whole_prefix, len(q), P, causal=False, return_lse=True,
                         config=config)  # fmt: skip
    tensors = (q, q.stride(), k, k.stride(), v, v.stride(), out, lse)
    launch_tiles(cascade_kernel, "forward", config, q, k, tensors, cu_seqlens_q, cu_seqlens_k, True)
    return out


@triton.jit(do_not_specialize=["N"])
def cascade_kernel(q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, lse_ptr,
                   cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
                   CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
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
    seen, full, end = key_range(first, query, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    q = load_queries(q_ptr, q_strides, token, query, head_q, exists, GROUP, D)
    acc = load_queries(out_ptr, (HQ * D, D), token, query, head_q, exists, GROUP, D).to(tl.float32)
    lse = tl.load(lse_ptr + (token + query) * HQ + tl.program_id(1) * GROUP + head_q, mask=exists, other=0.0)
    m = lse * LOG2_E
    total = tl.full((BLOCK_M,), 1.0, tl.float32)
    acc, m, total = attend(acc, m, total, q, k_ptr, k_strides[0], v_ptr, v_strides[0], 0, full, seen, len_k,
                           scale * LOG2_E, False, D, BLOCK_N)  # fmt: skip
    acc, m, total = attend(acc, m, total, q, k_ptr, k_strides[0], v_ptr, v_strides[0], full, end, seen, len_k,
                           scale * LOG2_E, True, D, BLOCK_N)  # fmt: skip
    store_rows(out_ptr, lse_ptr, acc, m, total, token, query, head_q, exists, HQ, GROUP, D)


def specification(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int,
) -> Tensor:  # fmt: skip
    P, lengths = len(prefix_k), cu_seqlens_k.diff().tolist()
    keys, values = (
        torch.cat([x for part in own.split(lengths) for x in (prefix, part)])
        for prefix, own in ((prefix_k, k), (prefix_v, v))
    )
    cu_seqlens = cu_seqlens_k + P * torch.arange(len(cu_seqlens_k), dtype=torch.int32, device=q.device)
    return reference.attention(q, keys, values, cu_seqlens_q, cu_seqlens, max_seqlen_q, P + max_seqlen_k)


def arguments(P: int, len_q: list[int], len_k: list[int], heads: tuple[int, int], D: int) -> tuple:
    randn = partial(torch.randn, dtype=torch.float64)
    prefix = [randn(P, heads[1], D) for _ in range(2)]
    own = [randn(sum(len_k), heads[1], D) for _ in range(2)]
    rest = (build_cu_seqlens(len_q), build_cu_seqlens(len_k), max(len_q), max(len_k))
    return randn(sum(len_q), heads[0], D), *prefix, *own, *rest


def cases() -> Iterator[tuple[str, tuple]]:
    yield "many short", arguments(70, [1, 2, 3] * 4, [1, 2, 3] * 4, (4, 2), 64)
    yield "odd", arguments(129, [66, 1, 3], [66, 1, 3], (2, 1), 128)
    yield "fewer queries than keys", arguments(64, [1, 0, 5], [70, 2, 5], (8, 1), 64)
    yield "no prefix", arguments(0, [5, 66], [5, 66], (2, 1), 64)


def large(config: Qwen3Config, tokens: int) -> tuple:
    lengths = [min(32, tokens - start) for start in range(0, tokens, 32)]
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return arguments(1024, lengths, lengths, heads, config.head_dim)


def work(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    *rest: Any,
) -> tuple[int, int]:  # fmt: skip
    pairs = len(q) * len(prefix_k) + visible_pairs(cu_seqlens_q, cu_seqlens_k, causal=True)
    moved = 2 * q.nbytes + sum(x.nbytes for x in (prefix_k, prefix_v, k, v))
    return moved, 4 * q.shape[1] * q.shape[2] * pairs


OPERATION = Operation(specification, cases, large, work)
