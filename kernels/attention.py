"""Variable-length causal grouped-query attention, forward and backward, no padding, no atomics.

    s = q k^T / sqrt(D)      p = softmax(s over the keys that the query sees)      out = p v      lse = log sum exp s

Query i of a sequence with len_q queries and len_k keys sees keys 0 .. i + len_k - len_q: the last query sees all.
Query head h reads key head h // G, G = Hq / Hkv. With delta = rowsum(dout * out) - dlse, the gradients are

    dv = p^T dout      ds = p * (dout v^T - delta)      dq = ds k / sqrt(D)      dk = ds^T q / sqrt(D)

float32: scores, softmax (as powers of two, log2(e) in the scale), sums and accumulators; p and ds are rounded to q's
dtype where they enter a matmul. float32 inputs are multiplied as float32, not TF32.

How: a tile is BLOCK_M rows of one sequence and key head, a row being (query, head of the group): one load of keys
serves G heads. Its program finds its sequence by bisection of cu_seqlens: the grid is exact up to one tile per
sequence, however the lengths are spread. It runs over the keys that all rows see without a mask, then over those on
the diagonal with one; later keys are not touched. Tiles start at the end of each sequence, where the work is longest,
sequences in the order given (``plan`` gives the longest first). The backward computes p again from lse; one kernel
makes dq and delta by query tiles, a second dk and dv by key tiles: every sum has one owner and a fixed order.

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
from qwen3core.reference import sequences

from .launch import INTERPRETED, check, check_cu_seqlens, launch

# (BLOCK_M, BLOCK_N, warps, stages); the first of a list is the default
CONFIGS = {
    "forward": {
        "hopper": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        "cuda": ((128, 32, 8, 3), (64, 64, 4, 2)),
        "hip": ((128, 64, 8, 2), (128, 32, 8, 2)),
        "float32": ((32, 32, 8, 1),),
    },
    "dq": {
        "hopper": ((128, 64, 8, 2), (64, 64, 4, 3)),
        "cuda": ((64, 64, 8, 2), (64, 32, 4, 2)),
        "hip": ((64, 32, 4, 2),),
        "float32": ((32, 32, 8, 1),),
    },
    "dkdv": {
        "hopper": ((32, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 2)),
        "cuda": ((64, 64, 8, 2), (32, 64, 8, 2)),
        "hip": ((32, 64, 4, 1),),
        "float32": ((32, 32, 8, 1),),
    },
}
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sequence_of(tile, cu_seqlens, N, BLOCK: tl.constexpr):
    """The tile-th tile of BLOCK tokens, counted over all sequences: (its sequence, start, length, tile within it).

    Sequence n begins at tile cu_seqlens[n] // BLOCK + n, which leaves room for the tiles of those before; a tile past
    the end of its sequence is left empty.
    """
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= tile:
            low = middle + 1
        else:
            high = middle
    n = low - 1
    start = tl.load(cu_seqlens + n)
    length = tl.load(cu_seqlens + n + 1) - start
    return n, start, length, tile - (start // BLOCK + n)


@triton.jit
def queries_of(cu_seqlens_q, cu_seqlens_k, N, QUERIES: tl.constexpr):
    """This program's tile of QUERIES queries: (start in q, length, first query, start in k, length) of its sequence.

    The last tile of a sequence comes first, having the most keys. The first query is negative where there is no tile.
    """
    n, q_start, len_q, tile = sequence_of(tl.program_id(0), cu_seqlens_q, N, QUERIES)
    k_start = tl.load(cu_seqlens_k + n)
    len_k = tl.load(cu_seqlens_k + n + 1) - k_start
    return q_start, len_q, (tl.cdiv(len_q, QUERIES) - 1 - tile) * QUERIES, k_start.to(tl.int64), len_k


@triton.jit
def rows_of(GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row r of a query tile is (query r // GROUP of the tile, head r % GROUP of the group), [BLOCK_M] each."""
    row = tl.arange(0, BLOCK_M)
    return row // GROUP, row % GROUP


@triton.jit
def keys_of(first, query, len_q, len_k, CAUSAL: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr):
    """For the tile of QUERIES queries from ``first``: (seen, full, end).

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
def load_block(x, stride, n, length, MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows n : n + BLOCK_N of the sequence at x, [BLOCK_N, D], zero from ``length`` on."""
    row = n + tl.arange(0, BLOCK_N)[:, None]
    at = x + row.to(tl.int64) * stride + tl.arange(0, D)[None, :]
    return tl.load(at, mask=row < length, other=0.0) if MASK else tl.load(at)


@triton.jit
def attend(acc, m, total, q, k, k_stride, v, v_stride, start, end, seen, len_k, scale,
           MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Keys start:end of the sequence at k and v into the running out [BLOCK_M, D], maximum and sum [BLOCK_M]."""
    for n in tl.range(start, end, BLOCK_N):
        s = tl.dot(q, load_block(k, k_stride, n, len_k, MASK, D, BLOCK_N).T, input_precision="ieee")
        if MASK:
            s = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, axis=1)
        values = load_block(v, v_stride, n, len_k, MASK, D, BLOCK_N)
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["N"])
def attention_kernel(q, q_strides, k, k_strides, v, v_strides, out, lse, cu_seqlens_q, cu_seqlens_k, N, scale,
                     CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    q_start, len_q, first, k_start, len_k = queries_of(cu_seqlens_q, cu_seqlens_k, N, QUERIES)
    if first < 0:
        return
    head = tl.program_id(1)
    token = (q_start + first).to(tl.int64)
    q += token * q_strides[0] + head * GROUP * q_strides[1]
    k += k_start * k_strides[0] + head * k_strides[1]
    v += k_start * v_strides[0] + head * v_strides[1]
    query, head_q = rows_of(GROUP, BLOCK_M)
    exists = first + query < len_q
    seen, full, end = keys_of(first, query, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    column = tl.arange(0, D)[None, :]
    q += (query * q_strides[0] + head_q * q_strides[1])[:, None] + column
    rows = tl.load(q, mask=exists[:, None], other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    acc, m, total = attend(acc, m, total, rows, k, k_strides[0], v, v_strides[0], 0, full, seen, len_k,
                           scale * LOG2_E, False, D, BLOCK_N)  # fmt: skip
    acc, m, total = attend(acc, m, total, rows, k, k_strides[0], v, v_strides[0], full, end, seen, len_k,
                           scale * LOG2_E, True, D, BLOCK_N)  # fmt: skip
    # No key at all (not causal, an empty sequence of keys): zeros, and a logarithm of -inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = query * HQ + head_q
    out += (token * HQ + head * GROUP) * D
    lse += token * HQ + head * GROUP
    tl.store(out + at[:, None] * D + column, acc, mask=exists[:, None])
    tl.store(lse + at, (m + tl.log2(total)) / LOG2_E, mask=exists)


@triton.jit
def keys_gradient(dq, q, dout, lse, delta, k, v, stride, start, end, seen, len_k, scale,
                  MASK: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Keys start:end of the sequence at k and v into the running dq [BLOCK_M, D]; lse in base 2."""
    for n in tl.range(start, end, BLOCK_N):
        keys = load_block(k, stride, n, len_k, MASK, D, BLOCK_N)
        s = tl.dot(q, keys.T, input_precision="ieee")
        if MASK:
            s = tl.where((n + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - lse[:, None])
        values = load_block(v, stride, n, len_k, MASK, D, BLOCK_N)
        ds = p * (tl.dot(dout, values.T, input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["N"])
def dq_kernel(q, k, v, out, lse, dout, dlse, delta, dq, cu_seqlens_q, cu_seqlens_k, N, scale,
              CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq, and delta [Tq, Hq] for the other kernel; all contiguous."""
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    q_start, len_q, first, k_start, len_k = queries_of(cu_seqlens_q, cu_seqlens_k, N, QUERIES)
    if first < 0:
        return
    head = tl.program_id(1)
    k += (k_start * HKV + head) * D
    v += (k_start * HKV + head) * D
    query, head_q = rows_of(GROUP, BLOCK_M)
    exists = first + query < len_q
    seen, full, end = keys_of(first, query, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    at_row = (q_start + first + query).to(tl.int64) * HQ + head * GROUP + head_q
    at = at_row[:, None] * D + tl.arange(0, D)[None, :]
    rows = tl.load(q + at, mask=exists[:, None], other=0.0)
    rows_dout = tl.load(dout + at, mask=exists[:, None], other=0.0)
    rows_out = tl.load(out + at, mask=exists[:, None], other=0.0)
    rows_delta = tl.sum(rows_out.to(tl.float32) * rows_dout.to(tl.float32), axis=1)
    rows_delta -= tl.load(dlse + at_row, mask=exists, other=0.0)
    tl.store(delta + at_row, rows_delta, mask=exists)
    rows_lse = tl.load(lse + at_row, mask=exists, other=float("inf")) * LOG2_E
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    acc = keys_gradient(acc, rows, rows_dout, rows_lse, rows_delta, k, v, HKV * D, 0, full, seen, len_k,
                        scale * LOG2_E, False, D, BLOCK_N)  # fmt: skip
    acc = keys_gradient(acc, rows, rows_dout, rows_lse, rows_delta, k, v, HKV * D, full, end, seen, len_k,
                        scale * LOG2_E, True, D, BLOCK_N)  # fmt: skip
    tl.store(dq + at, acc * scale, mask=exists[:, None])


@triton.jit
def queries_gradient(dk, dv, keys, values, key, q, dout, lse, delta, start, end, shift, scale, MASK: tl.constexpr,
                     HQ: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Queries start:end of the sequence and group at q, dout, lse, delta into the running dk and dv [BLOCK_N, D]."""
    query, head_q = rows_of(GROUP, BLOCK_M)
    for first in tl.range(start, end, BLOCK_M // GROUP):
        exists = first + query < end
        at_row = (first + query).to(tl.int64) * HQ + head_q
        at = at_row[:, None] * D + tl.arange(0, D)[None, :]
        rows = tl.load(q + at, mask=exists[:, None], other=0.0)
        s = tl.dot(keys, rows.T, input_precision="ieee")
        if MASK:
            s = tl.where(key[:, None] <= (first + query + shift)[None, :], s, float("-inf"))
        p = tl.exp2(s * scale - tl.load(lse + at_row, mask=exists, other=float("inf"))[None, :] * LOG2_E)
        rows_dout = tl.load(dout + at, mask=exists[:, None], other=0.0)
        dv = tl.dot(p.to(rows.dtype), rows_dout, dv, input_precision="ieee")
        dp = tl.dot(values, rows_dout.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta + at_row, mask=exists, other=0.0)[None, :])
        dk = tl.dot(ds.to(rows.dtype), rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["N"])
def dkdv_kernel(q, k, v, lse, dout, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, N, scale,
                CAUSAL: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk and dv; all contiguous."""
    GROUP: tl.constexpr = HQ // HKV
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    n, k_start, len_k, tile = sequence_of(tl.program_id(0), cu_seqlens_k, N, BLOCK_N)
    first = tile * BLOCK_N
    if first >= len_k:
        return
    head = tl.program_id(1)
    q_start = tl.load(cu_seqlens_q + n)
    len_q = tl.load(cu_seqlens_q + n + 1) - q_start
    at_query = q_start.to(tl.int64) * HQ + head * GROUP
    q += at_query * D
    dout += at_query * D
    lse += at_query
    delta += at_query
    at_key = (k_start.to(tl.int64) * HKV + head) * D
    keys = load_block(k + at_key, HKV * D, first, len_k, True, D, BLOCK_N)
    values = load_block(v + at_key, HKV * D, first, len_k, True, D, BLOCK_N)
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, D), tl.float32)
    key = first + tl.arange(0, BLOCK_N)
    shift = len_k - len_q
    full = 0
    if CAUSAL:
        # Queries from ``start`` see this tile's first key, from ``full`` its last; whole tiles between them.
        start = tl.maximum(first - shift, 0)
        full = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - shift, 0) - start, QUERIES) * QUERIES + start
        end = tl.minimum(full, len_q)
        acc_k, acc_v = queries_gradient(acc_k, acc_v, keys, values, key, q, dout, lse, delta, start, end, shift,
                                        scale * LOG2_E, True, HQ, GROUP, D, BLOCK_M)  # fmt: skip
    acc_k, acc_v = queries_gradient(acc_k, acc_v, keys, values, key, q, dout, lse, delta, full, len_q, shift,
                                    scale * LOG2_E, False, HQ, GROUP, D, BLOCK_M)  # fmt: skip
    at = at_key + key.to(tl.int64)[:, None] * HKV * D + tl.arange(0, D)[None, :]
    tl.store(dk + at, acc_k * scale, mask=(key < len_k)[:, None])
    tl.store(dv + at, acc_v, mask=(key < len_k)[:, None])


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
    check("attention", q=(q, "Tq Hq D"), k=(k, "Tk Hkv D"), v=(v, "Tk Hkv D"))
    if q.shape[2] not in (64, 128):
        raise InputError(f"attention: D: expected 64 or 128, found {q.shape[2]}")
    if q.shape[1] not in [k.shape[1] * group for group in (1, 2, 4, 8, 16)]:
        raise InputError(f"attention: Hq: expected 1, 2, 4, 8 or 16 times Hkv = {k.shape[1]}, found {q.shape[1]}")
    check_cu_seqlens("attention", "cu_seqlens_q", cu_seqlens_q, q, 0, debug)
    check_cu_seqlens("attention", "cu_seqlens_k", cu_seqlens_k, k, 0, debug)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        found = f"{len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        raise InputError(f"attention: expected cu_seqlens_q and cu_seqlens_k of one length, found {found}")
    if causal and (debug or q.device.type == "cpu"):
        list(sequences(cu_seqlens_q, cu_seqlens_k))  # raises where a sequence has more queries than keys
    out, lse = _forward_fake(q, k, v)
    tensors = (q, q.stride(), k, k.stride(), v, v.stride(), out, lse)
    _launch("forward", config, q, k, tensors, cu_seqlens_q, cu_seqlens_k, causal)
    return out, lse


@_forward.register_fake
def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


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
    _launch("dq", dq_config, q, k, (q, k, v, out, lse, dout, dlse, delta, dq), *shared)
    _launch("dkdv", dkdv_config, q, k, (q, k, v, lse, dout, delta, dk, dv), *shared)
    return dq, dk, dv


@attention_backward.register_fake
def _backward_fake(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _launch(
    kernel: str, config: Sequence[int], q: Tensor, k: Tensor, tensors: tuple, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, causal: bool,
) -> None:  # fmt: skip
    block_m, block_n, warps, stages = config or CONFIGS[kernel][_family(q)][0]
    (Tq, HQ, D), (Tk, HKV, _), N = q.shape, k.shape, len(cu_seqlens_q) - 1
    tiles = (Tk // block_n if kernel == "dkdv" else Tq // (block_m * HKV // HQ)) + N
    function = {"forward": attention_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}[kernel]
    launch(function, (tiles, HKV), *tensors, cu_seqlens_q, cu_seqlens_k, N, D**-0.5, causal, HQ, HKV, D, block_m,
           block_n, num_warps=warps, num_stages=stages)  # fmt: skip


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


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, _, _ = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
    gradients = attention_backward(dout, dlse, *ctx.saved_tensors, ctx.causal, [], [])
    return *gradients, None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
