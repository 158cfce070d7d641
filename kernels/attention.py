"""Variable-length causal grouped-query attention, forward and backward, no padding, no atomics.

    s = q k^T / sqrt(D)      p = softmax(s over the keys that the query sees)      out = p v      lse = log sum exp s

Query i of a sequence with len_q queries and len_k keys sees keys 0 .. i + len_k - len_q: the last query sees all.
Query head h reads key head h // G, G = Hq / Hkv. With delta = rowsum(dout * out) - dlse, the gradients are

    dv = p^T dout      ds = p * (dout v^T - delta)      dq = ds k / sqrt(D)      dk = ds^T q / sqrt(D)

float32: scores, softmax (as powers of two, log2(e) in the scale), sums and accumulators; p and ds are rounded to q's
dtype where they enter a matmul. float32 inputs are multiplied as float32, not TF32.

A program computes one tile: BLOCK_M rows of one sequence and key head, a row being (query, head of the group), so that
one load of keys serves G heads. It walks over the keys in blocks of BLOCK_N. Below, all tiles of one sequence and key
head, len_q = 6, len_k = 10, G = 2, BLOCK_M = 4 (2 queries), BLOCK_N = 4; key blocks are read from left to right:

                                         keys   0 1 2 3   4 5 6 7   8 9
                       query 0, head 0 and 1    . . . .   x - - -          .  first loop: whole blocks that every row
    third program      query 1, head 0 and 1    . . . .   x x - -             of the tile sees, no mask
                                                                           x  second loop: blocks on the diagonal,
                       query 2, head 0 and 1    . . . .   x x x -             loaded with a mask
    second program     query 3, head 0 and 1    . . . .   x x x x          -  computed there and masked: -inf
                                                                              blank: never touched
                       query 4, head 0 and 1    . . . .   . . . .   x -
    first program      query 5, head 0 and 1    . . . .   . . . .   x x

The last tile of a sequence comes first, where the work is longest; sequences come in the order given (``plan`` gives
the longest first). A program finds its sequence by bisection of cu_seqlens: the grid is exact up to one tile per
sequence, however the lengths are spread. The backward computes p again from lse; one kernel makes dq and delta by query
tiles, a second dk and dv by key tiles: every sum has one owner and a fixed order.

FLOPs: forward 4 Hq D per visible (query, key) pair, backward 2.5 times that by convention, 3.5 times as done. Bytes, in
b-byte elements: (2 Hq + 2 Hkv) T D b forward at least. Sources: FlashAttention-2, arXiv:2307.08691; GQA rows packed as
in FlashAttention-3; bisection as in vLLM's unified attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3core.errors import InputError
from qwen3core.reference import declare, sequences

from .launch import INTERPRETED, check, check_cu_seqlens, launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@declare(causal=True)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True, return_lse: bool = False, debug: bool = False, config: Sequence[int] = (),
) -> Any:  # fmt: skip
    """q [Tq, Hq, D], k and v [Tk, Hkv, D], strided but along D, D 64 or 128, one dtype; cu_seqlens [N + 1] int32.

    Returns out [Tq, Hq, D], contiguous, and with return_lse also lse [Tq, Hq] float32, so that keys attended in parts
    can be put together (``merge``). Without ``causal`` every query sees all keys of its sequence. ``debug`` reads
    cu_seqlens and checks them, for which a GPU must be waited for. config: one of ``CONFIGS``. The max_seqlen are not
    needed here. Raises InputError.
    """
    out, lse = _forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, debug, config)
    return (out, lse) if return_lse else out


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from that over each: (out [Tq, Hq, D], lse [Tq, Hq])."""
    total = torch.logaddexp(lse, other_lse)
    weights = [(part - total).exp().unsqueeze(-1) for part in (lse, other_lse)]
    return (out * weights[0] + other_out * weights[1]).to(out.dtype), total


@torch.library.custom_op("qwen3core::attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, debug: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_attention("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, causal, debug)
    out, lse = _forward_fake(q, k, v)
    tensors = (q, q.stride(), k, k.stride(), v, v.stride(), out, lse)
    launch_tiles(attention_kernel, "forward", config, q, k, tensors, cu_seqlens_q, cu_seqlens_k, causal)
    return out, lse


def check_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool = True,
    debug: bool = False,
) -> None:  # fmt: skip
    """Check what ``attention`` is given, for any kernel that takes the same. Raises InputError."""
    check(op, q=(q, "Tq Hq D"), k=(k, "Tk Hkv D"), v=(v, "Tk Hkv D"))
    check_heads(op, q, k.shape[1])
    check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k, 0, debug)
    check_queries(op, q, cu_seqlens_q, cu_seqlens_k, causal, debug)


def check_heads(op: str, q: Tensor, heads: int) -> None:
    """Check the sizes of q [Tq, Hq, D] for as many key heads. Raises InputError."""
    if q.shape[2] not in (64, 128):
        raise InputError(f"{op}: D: expected 64 or 128, found {q.shape[2]}")
    if q.shape[1] not in [heads * group for group in (1, 2, 4, 8, 16)]:
        raise InputError(f"{op}: Hq: expected 1, 2, 4, 8 or 16 times Hkv = {heads}, found {q.shape[1]}")


def check_queries(
    op: str, q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool = True, debug: bool = False
) -> None:
    """Check the queries' cu_seqlens beside the keys'. Raises InputError."""
    check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q, 0, debug)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        found = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        raise InputError(f"{op}: expected cu_seqlens_q and cu_seqlens_k of one length, found {found}")
    if causal and (debug or q.device.type == "cpu"):
        list(sequences(cu_seqlens_q, cu_seqlens_k))  # raises where a sequence has more queries than keys


@_forward.register_fake
def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def launch_tiles(
    function: Any, kernel: str, config: Sequence[int], q: Tensor, k: Tensor, tensors: tuple, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, mask: int,
) -> None:  # fmt: skip
    """Launch a function over (tiles, key heads), tiles of keys for "dkdv" and of queries otherwise.

    Its tiles are those of ``config``, or of a kernel's default in CONFIGS; ``mask`` is its first constant, CAUSAL here.
    """
    block_m, block_n, warps, stages = config or CONFIGS[kernel][_family(q)][0]
    (Tq, HQ, D), (Tk, HKV, _), N = q.shape, k.shape, len(cu_seqlens_q) - 1
    tiles = (Tk // block_n if kernel == "dkdv" else Tq // (block_m * HKV // HQ)) + N
    launch(function, (tiles, HKV), *tensors, cu_seqlens_q, cu_seqlens_k, N, D**-0.5, mask, HQ, HKV, D, block_m,
           block_n, num_warps=warps, num_stages=stages)  # fmt: skip


# (BLOCK_M, BLOCK_N, warps, stages). The first of a list is the default, so small that it does not spill and fits into
# the shared memory of every card of its family: "hopper" has 227 KB, "cuda" 99 KB or more, "hip" 64 KB; "float32" is
# for all of them (there dq spills, 24 bytes at most). What is predicted of the others stands in bench/README.md;
# bench_kernels.py --tune tries them.
CONFIGS = {
    "forward": {
        "hopper": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "cuda": ((128, 32, 8, 3), (64, 64, 4, 2)),
        "hip": ((128, 64, 8, 2), (128, 32, 8, 2)),
        "float32": ((32, 16, 8, 1), (32, 32, 8, 1)),
    },
    "dq": {
        "hopper": ((128, 64, 8, 2), (64, 64, 4, 3)),
        "cuda": ((64, 64, 8, 2), (64, 32, 4, 2)),
        "hip": ((64, 32, 4, 2),),
        "float32": ((16, 16, 8, 1), (32, 32, 8, 1)),
    },
    "dkdv": {
        "hopper": ((32, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 2)),
        "cuda": ((64, 64, 8, 2), (32, 64, 8, 2)),
        "hip": ((32, 64, 4, 1),),
        "float32": ((32, 16, 8, 1), (32, 32, 8, 1)),
    },
}


def _family(q: Tensor) -> str:
    """The key in CONFIGS for the GPU and q's dtype; "hopper" is all that has 227 KB of shared memory."""
    if INTERPRETED:
        return "hopper"
    if q.dtype == torch.float32:
        return "float32"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    return "hopper" if target.arch in (90, 100, 103) else "cuda"


@triton.jit(do_not_specialize=["N"])
def attention_kernel(q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, lse_ptr,
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
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    acc, m, total = attend(acc, m, total, q, k_ptr, k_strides[0], v_ptr, v_strides[0], 0, full, seen, len_k,
                           scale * LOG2_E, False, D, BLOCK_N)  # fmt: skip
    acc, m, total = attend(acc, m, total, q, k_ptr, k_strides[0], v_ptr, v_strides[0], full, end, seen, len_k,
                           scale * LOG2_E, True, D, BLOCK_N)  # fmt: skip
    store_rows(out_ptr, lse_ptr, acc, m, total, token, query, head_q, exists, HQ, GROUP, D)


@triton.jit
def query_tile(cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, QUERIES: tl.constexpr):
    """This program's tile of QUERIES queries: (start in q, length, first query, start in k, length) of its sequence.

    The last tile of a sequence comes first, having the most keys. The first query is negative where there is no tile.
    """
    n, q_start, len_q, tile = find_tile(tl.program_id(0), cu_seqlens_q_ptr, N, QUERIES)
    k_start = tl.load(cu_seqlens_k_ptr + n)
    len_k = tl.load(cu_seqlens_k_ptr + n + 1) - k_start
    return q_start, len_q, (tl.cdiv(len_q, QUERIES) - 1 - tile) * QUERIES, k_start.to(tl.int64), len_k


@triton.jit
def find_tile(number, cu_seqlens_ptr, N, TOKENS: tl.constexpr):
    """Tile ``number`` of TOKENS tokens, counted over all sequences: (its sequence, start, length, tile within it).

    Sequence n begins at tile cu_seqlens[n] // TOKENS + n, since each sequence before it needs at most one tile more
    than its whole ones. A tile that begins beyond the end of its sequence does nothing.
    """
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // TOKENS + middle <= number:
            low = middle + 1
        else:
            high = middle
    n = low - 1
    start = tl.load(cu_seqlens_ptr + n)
    length = tl.load(cu_seqlens_ptr + n + 1) - start
    return n, start, length, number - (start // TOKENS + n)


@triton.jit
def split_rows(GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row r of a query tile is (query r // GROUP of the tile, head r % GROUP of the group), [BLOCK_M] each."""
    row = tl.arange(0, BLOCK_M)
    return row // GROUP, row % GROUP


@triton.jit
def load_queries(q_ptr, q_strides, token, query, head_q, exists, GROUP: tl.constexpr, D: tl.constexpr):
    """The rows of a tile that begins at ``token`` of q, [BLOCK_M, D], zero where none exists."""
    q_ptr += token * q_strides[0] + tl.program_id(1) * GROUP * q_strides[1]
    at = (query * q_strides[0] + head_q * q_strides[1])[:, None] + tl.arange(0, D)[None, :]
    return tl.load(q_ptr + at, mask=exists[:, None], other=0.0)


@triton.jit
def store_rows(out_ptr, lse_ptr, acc, m, total, token, query, head_q, exists,
               HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Write the tile's rows of out and lse, contiguous, from the running acc [BLOCK_M, D], m and total [BLOCK_M]."""
    # No key at all (not causal, an empty sequence of keys): zeros, and a logarithm of -inf.
    acc *= tl.math.div_rn(1.0, tl.where(total > 0, total, 1.0))[:, None]
    at = query * HQ + head_q
    out_ptr += (token * HQ + tl.program_id(1) * GROUP) * D
    lse_ptr += token * HQ + tl.program_id(1) * GROUP
    tl.store(out_ptr + at[:, None] * D + tl.arange(0, D)[None, :], acc, mask=exists[:, None])
    # No division: a GPU's may err by two units of lse's last place, and in the gradients all p of the row with it.
    tl.store(lse_ptr + at, (m + tl.log2(total)) * LN_2, mask=exists)


@triton.jit
def key_range(first, query, len_q, len_k, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys the tile of QUERIES queries from ``first`` sees: (seen, full, end).

    Row r sees keys 0:seen[r]; all rows see 0:full, which is whole blocks; none sees end or later.
    """
    if CAUSAL:
        before = len_k - len_q + first + 1
        seen = before + query
        full = before // BLOCK_N * BLOCK_N
        end = tl.minimum(before + QUERIES - 1, len_k)
    else:
        seen = query * 0 + len_k
        full = len_k // BLOCK_N * BLOCK_N
        end = len_k
    return seen, full, end


@triton.jit
def attend(acc, m, total, q, k_ptr, k_stride, v_ptr, v_stride, start, end, seen, len_k, scale,
           MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Add keys start:end of a sequence to the running acc [BLOCK_M, D], maximum m and total [BLOCK_M]."""
    for n in tl.range(start, end, BLOCK_N):
        k = load_block(k_ptr, k_stride, n, len_k, MASK, D, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        if MASK:
            s = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], s, float("-inf"))
        v = load_block(v_ptr, v_stride, n, len_k, MASK, D, BLOCK_N)
        acc, m, total = add_keys(acc, m, total, s, v, scale)
    return acc, m, total


@triton.jit
def add_keys(acc, m, total, s, v, scale):
    """Add keys of scores s [BLOCK_M, BLOCK_N] and values v [BLOCK_N, D] to the running acc, m and total."""
    m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    total = total * alpha + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_new, total


@triton.jit
def load_block(ptr, stride, n, length, MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows n : n + BLOCK_N of the sequence at ptr, [BLOCK_N, D], zero from ``length`` on."""
    row = n + tl.arange(0, BLOCK_N)[:, None]
    at = ptr + row.to(tl.int64) * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=row < length, other=0.0) if MASK else tl.load(at)


# Backward


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, _, _ = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
    gradients = attention_backward(dout, dlse, *ctx.saved_tensors, ctx.causal, [], [])
    return *gradients, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("qwen3core::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, causal: bool, dq_config: Sequence[int], dkdv_config: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, from what ``attention`` got and returned; an empty config is the default."""
    q, k, v, dout, dlse = (x.contiguous() for x in (q, k, v, dout, dlse))
    delta = torch.empty_like(lse)
    dq, dk, dv = _backward_fake(dout, dlse, q, k, v)
    shared = (cu_seqlens_q, cu_seqlens_k, causal)
    launch_tiles(dq_kernel, "dq", dq_config, q, k, (q, k, v, out, lse, dout, dlse, delta, dq), *shared)
    launch_tiles(dkdv_kernel, "dkdv", dkdv_config, q, k, (q, k, v, lse, dout, delta, dk, dv), *shared)
    return dq, dk, dv


@attention_backward.register_fake
def _backward_fake(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@triton.jit(do_not_specialize=["N"])
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, delta_ptr, dq_ptr,
              cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
              CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq, and delta [Tq, Hq] for the other kernel; all contiguous."""
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    q_start, len_q, first, k_start, len_k = query_tile(cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, QUERIES)
    if first < 0:
        return
    head = tl.program_id(1)
    k_ptr += (k_start * HKV + head) * D
    v_ptr += (k_start * HKV + head) * D
    query, head_q = split_rows(GROUP, BLOCK_M)
    exists = first + query < len_q
    seen, full, end = key_range(first, query, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    at_row = (q_start + first + query).to(tl.int64) * HQ + head * GROUP + head_q
    at = at_row[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + at, mask=exists[:, None], other=0.0)
    dout = tl.load(dout_ptr + at, mask=exists[:, None], other=0.0)
    out = tl.load(out_ptr + at, mask=exists[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    delta -= tl.load(dlse_ptr + at_row, mask=exists, other=0.0)
    tl.store(delta_ptr + at_row, delta, mask=exists)
    lse = tl.load(lse_ptr + at_row, mask=exists, other=float("inf")) * LOG2_E
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, HKV * D, 0, full, seen, len_k, scale * LOG2_E,
                False, D, BLOCK_N)  # fmt: skip
    dq = add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, HKV * D, full, end, seen, len_k, scale * LOG2_E,
                True, D, BLOCK_N)  # fmt: skip
    tl.store(dq_ptr + at, dq * scale, mask=exists[:, None])


@triton.jit
def add_dq(dq, q, dout, lse, delta, k_ptr, v_ptr, stride, start, end, seen, len_k, scale,
           MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Add what keys start:end of a sequence give to dq [BLOCK_M, D], without its scale; lse in base 2."""
    for n in tl.range(start, end, BLOCK_N):
        k = load_block(k_ptr, stride, n, len_k, MASK, D, BLOCK_N)
        s = tl.dot(q, k.T, input_precision="ieee")
        if MASK:
            s = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - lse[:, None])
        v = load_block(v_ptr, stride, n, len_k, MASK, D, BLOCK_N)
        ds = p * (tl.dot(dout, v.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["N"])
def dkdv_kernel(q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
                cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
                CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk and dv; all contiguous."""
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    n, k_start, len_k, tile = find_tile(tl.program_id(0), cu_seqlens_k_ptr, N, BLOCK_N)
    first = tile * BLOCK_N
    if first >= len_k:
        return
    head = tl.program_id(1)
    q_start = tl.load(cu_seqlens_q_ptr + n)
    len_q = tl.load(cu_seqlens_q_ptr + n + 1) - q_start
    at_query = q_start.to(tl.int64) * HQ + head * GROUP
    q_ptr += at_query * D
    dout_ptr += at_query * D
    lse_ptr += at_query
    delta_ptr += at_query
    at_key = (k_start.to(tl.int64) * HKV + head) * D
    k = load_block(k_ptr + at_key, HKV * D, first, len_k, True, D, BLOCK_N)
    v = load_block(v_ptr + at_key, HKV * D, first, len_k, True, D, BLOCK_N)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    key = first + tl.arange(0, BLOCK_N)
    shift = len_k - len_q
    full = 0
    if CAUSAL:
        # Queries from ``start`` see this tile's first key, from ``full`` its last; whole tiles between them.
        start = tl.maximum(first - shift, 0)
        full = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - shift, 0) - start, QUERIES) * QUERIES + start
        end = tl.minimum(full, len_q)
        dk, dv = add_dkdv(dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, end, shift,
                          scale * LOG2_E, True, HQ, GROUP, D, BLOCK_M)  # fmt: skip
    dk, dv = add_dkdv(dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, full, len_q, shift,
                      scale * LOG2_E, False, HQ, GROUP, D, BLOCK_M)  # fmt: skip
    at = at_key + key.to(tl.int64)[:, None] * HKV * D + tl.arange(0, D)[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=(key < len_k)[:, None])
    tl.store(dv_ptr + at, dv, mask=(key < len_k)[:, None])


@triton.jit
def add_dkdv(dk, dv, k, v, key, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, end, shift, scale, MASK: tl.constexpr,
             HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Add what queries start:end of a sequence and group give to dk, without its scale, and dv, [BLOCK_N, D] each."""
    query, head_q = split_rows(GROUP, BLOCK_M)
    for first in tl.range(start, end, BLOCK_M // GROUP):
        exists = first + query < end
        at_row = (first + query).to(tl.int64) * HQ + head_q
        at = at_row[:, None] * D + tl.arange(0, D)[None, :]
        q = tl.load(q_ptr + at, mask=exists[:, None], other=0.0)
        s = tl.dot(k, q.T, input_precision="ieee")
        if MASK:
            s = tl.where(key[:, None] <= (first + query + shift)[None, :], s, float("-inf"))
        p = tl.exp2(s * scale - tl.load(lse_ptr + at_row, mask=exists, other=float("inf"))[None, :] * LOG2_E)
        dout = tl.load(dout_ptr + at, mask=exists[:, None], other=0.0)
        dv = tl.dot(p.to(q.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, dout.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta_ptr + at_row, mask=exists, other=0.0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv
