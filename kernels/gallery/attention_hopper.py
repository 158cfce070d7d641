"""Attention forward for Hopper, in Gluon: loads, products and softmax overlap. Not in the default set of operations.

Formula, rounding, tiles and the order of tiles are those of attention.py; bfloat16 or float16, D = 128. The tile of a
program is 2 x 64 rows, and each of its partitions has registers of its own:

    producer, 1 warp        loads q once, then blocks of keys and of values by TMA, each as soon as a buffer is empty
    consumer 0, 4 warps     rows 0:64 of the tile
    consumer 1, 4 warps     rows 64:128, on its own, so that one's softmax meets the other's products

A consumer issues two products at once, so that the softmax of block n may run under the second:

    tensor cores    s = q k_n^T     acc += p v_(n-1)
    other units                     m, total, p of block n                acc *= exp2(m before - m)
    memory                          k_n is released                       v_(n-1) is released

The compiled code does not quite do that: ptxas (of triton 3.9) waits for both products before the softmax. What
overlaps is then the two consumers, each with 16 HGMMA in a row, about twice the time of its softmax by peak rates.

A TMA descriptor knows where the tensor ends, not the sequence: a block would bring rows of the next sequence, whose p
is 0, but 0 * NaN is NaN. ``_ragged`` describes k and v so that rows beyond the sequence are outside and come as zeros.
Rows of q beyond it are computed and not stored.

Shared memory: 32 KB of q, 64 KB for each of STAGES blocks of 128 keys and values. FLOPs and bytes: as attention.py.
Aim: the 570 to 620 TFLOP/s of FlashAttention-3 on long sequences, whose schedule this is; not measured. Gluon has no
interpreter: laboratory/gluon.py executes this source on a CPU. Gluon of triton 3.6 to 3.9. Sources: arXiv:2407.08608;
triton/tools/ragged_tma.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwen3core.errors import InputError
from qwen3core.reference import declare

from ..attention import LN_2, LOG2_E, check_attention, key_range, query_tile
from ..launch import INTERPRETED, launch

CONFIGS = ((128, 2), (64, 4), (64, 2))  # (BLOCK_N, STAGES); the first is the default
ROWS = gl.constexpr(64)
"""Rows of one consumer, the least that a warpgroup's product has."""
REGISTERS = 168
"""For each thread, before the partitions trade: 3 x 128 threads have 65,536 together."""
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
FAR = gl.constexpr(2**30)
"""More than all tokens: the row coordinate at which every sequence ends."""

async_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)  # the name before triton 3.8


@declare(causal=True)
def attention_hopper(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True, return_lse: bool = False, debug: bool = False, config: Sequence[int] = CONFIGS[0],
) -> Any:  # fmt: skip
    """``attention.attention``, forward only, for bfloat16 or float16 and D = 128, on sm_90. Raises InputError.

    Strides and addresses of q, k and v must be multiples of 16 bytes.
    """
    check_attention("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, causal, debug)
    _check_for_hopper(q=q, k=k, v=v)
    (Tq, HQ, D), (Tk, HKV, _), N = q.shape, k.shape, len(cu_seqlens_q) - 1
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    block_n, stages = config
    queries = ROWS.value * HKV // HQ
    if Tk == 0:  # nothing to describe
        out.zero_(), lse.fill_(-torch.inf)
    elif Tq > 0:
        launch(attention_hopper_kernel, (Tq // (2 * queries) + N, HKV), out, lse,
               _descriptor(q, q.shape, q.stride(), [queries, HQ // HKV, D]), _ragged(k, block_n), _ragged(v, block_n),
               cu_seqlens_q, cu_seqlens_k, N, D**-0.5, causal, HQ, HKV, D, block_n, stages, num_warps=4,
               maxnreg=REGISTERS)  # fmt: skip
    return (out, lse) if return_lse else out


def _check_for_hopper(**tensors: Tensor) -> None:
    arch = 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch
    if arch != 90:
        raise InputError(f"attention_hopper: expected a GPU of compute capability 9.0, found {arch}")
    for name, x in tensors.items():
        if x.dtype == torch.float32 or x.shape[2] != 128:
            found = f"{x.dtype}, {x.shape[2]}"
            raise InputError(f"attention_hopper: {name}: expected bfloat16 or float16 and D = 128, found {found}")
        if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) % 8:
            found = f"strides {x.stride()} and address {x.data_ptr()}"
            raise InputError(f"attention_hopper: {name}: expected multiples of 16 bytes, found {found}")


def _ragged(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of ``rows`` rows of one head of x [T, H, D], which end where a sequence ends.

    Row r of the sequence at start:start + length has coordinates (FAR, start + length, FAR - length + r, head, 0). The
    third is outside from r = length on. The first takes FAR rows away again: FAR times its stride is 2^64 less those,
    and addresses are added modulo 2^64.
    """
    far, stride = FAR.value, x.stride(0)
    strides = [2**64 // far - stride, stride, *x.stride()]
    return _descriptor(x, [2 * far - 1, 2 * far - 1, far, *x.shape[1:]], strides, [1, 1, rows, 1, x.shape[2]])


def _descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(x, list(shape), list(strides), block, layout)


@gluon.jit(do_not_specialize=["N"])
def attention_hopper_kernel(out_ptr, lse_ptr, q_desc, k_desc, v_desc, cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, scale,
                            CAUSAL: gl.constexpr, HQ: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr,
                            BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    QUERIES: gl.constexpr = 2 * ROWS * HKV // HQ
    q_start, len_q, first, k_start, len_k = query_tile(cu_seqlens_q_ptr, cu_seqlens_k_ptr, N, QUERIES)
    if first < 0:
        return
    _, _, end = key_range(first, 0, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    blocks = gl.maximum(gl.cdiv(end, BLOCK_N), 1)  # without any key one block of zeros, all of it masked
    bufs = (buffers(q_desc, 2), buffers(k_desc, STAGES), buffers(v_desc, STAGES))
    ready = (barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1))
    empty = (barriers(STAGES, 2), barriers(STAGES, 2))  # both consumers have released it
    fence_async_shared()
    tile = (q_start, first, len_q, k_start.to(gl.int32), len_k, gl.program_id(1), blocks)
    gl.warp_specialize(
        [
            (consume, (0, bufs, ready, empty, out_ptr, lse_ptr, tile, scale, CAUSAL, HQ, HKV, D, BLOCK_N, STAGES)),
            (consume, (1, bufs, ready, empty, out_ptr, lse_ptr, tile, scale, CAUSAL, HQ, HKV, D, BLOCK_N, STAGES)),
            (produce, (q_desc, k_desc, v_desc, bufs, ready, empty, tile, HQ, HKV, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def buffers(desc, NUMBER: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [NUMBER] + desc.block_type.shape, desc.layout)  # noqa: RUF005


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def produce(q_desc, k_desc, v_desc, bufs, ready, empty, tile, HQ: gl.constexpr, HKV: gl.constexpr,
            BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Load both consumers' rows of q, then key and value blocks one after another."""
    GROUP: gl.constexpr = HQ // HKV
    QUERIES: gl.constexpr = ROWS // GROUP
    q_start, first, _, k_start, len_k, head, blocks = tile
    mbarrier.expect(ready[0].index(0), 2 * q_desc.block_type.nbytes)
    for i in gl.static_range(2):
        token = q_start + first + i * QUERIES
        async_load(q_desc, [token, head * GROUP, 0], ready[0].index(0), bufs[0].index(i))
    for n in range(blocks):
        load_block(k_desc, bufs[1], ready[1], empty[0], n, k_start, len_k, head, BLOCK_N, STAGES)
        load_block(v_desc, bufs[2], ready[2], empty[1], n, k_start, len_k, head, BLOCK_N, STAGES)


@gluon.jit
def load_block(desc, bufs, ready, empty, n, start, length, head, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Load block n of a sequence's keys or values, rows beyond its length as zeros, once its buffer is empty."""
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), n // STAGES & 1 ^ 1)  # the first time round nothing is to be waited for
    mbarrier.expect(ready.index(stage), desc.block_type.nbytes)
    at = [FAR, start + length, FAR - length + n * BLOCK_N, head, 0]
    async_load(desc, at, ready.index(stage), bufs.index(stage))


@gluon.jit
def consume(INDEX: gl.constexpr, bufs, ready, empty, out_ptr, lse_ptr, tile, scale, CAUSAL: gl.constexpr,
            HQ: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr):  # fmt: skip
    """Attention of rows 64 * INDEX : 64 * INDEX + 64 of the tile, stored."""
    GROUP: gl.constexpr = HQ // HKV
    QUERIES: gl.constexpr = ROWS // GROUP
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    acc_layout: gl.constexpr = product_layout(D)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q_start, first, len_q, _, len_k, head, blocks = tile
    first += INDEX * QUERIES
    row = gl.arange(0, ROWS, row_layout)
    seen, full, _ = key_range(first, row // GROUP, len_q, len_k, CAUSAL, QUERIES, BLOCK_N)
    m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.full([ROWS], 0.0, gl.float32, row_layout)
    zeros = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_layout)
    acc = gl.full([ROWS, D], 0.0, gl.float32, acc_layout)

    mbarrier.wait(ready[0].index(0), 0)
    q = bufs[0].index(INDEX).reshape([ROWS, D])
    k_0 = ready_block(bufs[1], ready[1], 0, D, BLOCK_N, STAGES)
    s_0 = warpgroup_mma(q, k_0.permute((1, 0)), zeros, use_acc=False)
    mbarrier.arrive(empty[0].index(0))
    p, m, total, _ = softmax(s_0, m, total, 0, full, seen, scale * LOG2_E, bufs[0].dtype, s_layout, acc_layout, BLOCK_N)
    for n in range(1, blocks):
        k = ready_block(bufs[1], ready[1], n, D, BLOCK_N, STAGES)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        v = ready_block(bufs[2], ready[2], n - 1, D, BLOCK_N, STAGES)
        acc = warpgroup_mma(p, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(empty[0].index(n % STAGES))
        p_next, m, total, alpha = softmax(s, m, total, n * BLOCK_N, full, seen, scale * LOG2_E, bufs[0].dtype,
                                          s_layout, acc_layout, BLOCK_N)  # fmt: skip
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))  # p, too: it is read until then
        mbarrier.arrive(empty[1].index((n - 1) % STAGES))
        acc = acc * alpha[:, None]
        p = p_next
    v = ready_block(bufs[2], ready[2], blocks - 1, D, BLOCK_N, STAGES)
    acc = warpgroup_mma(p, v, acc)
    store_rows(acc, m, total, out_ptr, lse_ptr, q_start, first, len_q, head, row_layout, acc_layout, HQ, GROUP, D)


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a warpgroup's product [64, columns]."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def ready_block(bufs, ready, n, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Block n [BLOCK_N, D], once it is there."""
    mbarrier.wait(ready.index(n % STAGES), n // STAGES & 1)
    return bufs.index(n % STAGES).reshape([BLOCK_N, D])


@gluon.jit
def softmax(s, m, total, start, full, seen, scale, dtype: gl.constexpr, s_layout: gl.constexpr,
            acc_layout: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """Scores of keys from ``start`` on to (p as an operand, maximum, total, factor of what was summed before).

    Without any key yet the maximum is -inf: 0 in its place gives p = 0.
    """
    if start >= full:
        key = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        s = gl.where(key[None, :] < seen[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
    finite = gl.where(m_new > float("-inf"), m_new, 0.0)
    p = gl.exp2(s * scale - finite[:, None])
    alpha = gl.exp2(m - finite)
    total = total * alpha + gl.sum(p, axis=1)
    p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))
    return p, m_new, total, gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))


@gluon.jit
def store_rows(acc, m, total, out_ptr, lse_ptr, q_start, first, len_q, head, row_layout: gl.constexpr,
               acc_layout: gl.constexpr, HQ: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr):  # fmt: skip
    """Store the rows of queries from ``first`` on that the sequence has; a row's 256 bytes by 16 threads."""
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    at = (q_start + first).to(gl.int64) * HQ + head * GROUP
    row = gl.arange(0, ROWS, row_layout)
    exists = first + row // GROUP < len_q
    gl.store(lse_ptr + at + row // GROUP * HQ + row % GROUP, (m + gl.log2(total)) * LN_2, mask=exists)
    divisor = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, acc_layout))
    out = gl.convert_layout((acc / divisor[:, None]).to(out_ptr.dtype.element_ty), out_layout)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, out_layout))
    exists = first + row // GROUP < len_q
    out_ptr += at * D
    gl.store(out_ptr + ((row // GROUP * HQ + row % GROUP) * D)[:, None] + column[None, :], out, mask=exists[:, None])
