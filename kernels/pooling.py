"""What the two jobs need of the last hidden states, in one pass over the rows that count: no [T, H] norm, no copies.

    norm_pool    y = rms_norm(x[last token]), cut to dim, over max(|y|, 1e-12) where normalised        the embedding
    norm_score   sigmoid(rms_norm(x[last token]) . direction), direction = w_yes - w_no                the reranker

With ``mean`` the first takes the mean of rms_norm over the sequence's tokens in place of its last. y has the rounding
of the specification (x's dtype after the norm); mean, length, dot and result are float32. The backward is a few rows
in plain PyTorch, then RMSNorm's backward kernel.

Bytes for N sequences, in b-byte elements: N H b in (T H b for the mean), 4 N dim out. Cut before normalising:
Matryoshka representation learning, arXiv:2205.13147. Two rows of the head in place of 151,669: the model card.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from qwen3core.errors import InputError
from qwen3core.reference import declare, pool

from .launch import check, check_cu_seqlens, launch
from .rms_norm import normed, rms_norm, rms_norm_backward

# (warps, programs that sum a sequence for its mean); the first is the default
CONFIGS = ((4, 1), (8, 1), (2, 1))
# Predicted for T = 16k in 54 sequences on 132 multiprocessors: one program each leaves most of them idle, and the
# longest sequence, 1045 rows, is 261 steps of about 0.7 us: 180 us where bytes take 8. With 8 programs 33 steps and a
# second launch: 25 us; with 16, 17 steps and 4 to add up: 15 to 20 us. At more than 1000 sequences the first wins.
MEAN_CONFIGS = (*CONFIGS, (4, 8), (4, 16), (8, 16))
MEAN_ROWS = 4
"""Rows that the mean reads at a time."""


@declare(last_token=True, parts={"rms_norm": rms_norm, "pool": pool})
def norm_pool(
    x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool, *, mean: bool = False,
    debug: bool = False, config: Sequence[int] = CONFIGS[0],
) -> Tensor:  # fmt: skip
    """x [T, H] before the final norm, its weight [H], cu_seqlens [N + 1] int32: rows [N, dim] float32.

    ``debug`` reads cu_seqlens and checks them, for which a GPU must be waited for. Raises InputError.
    """
    return _pool(x, weight, eps, cu_seqlens, dim, normalize, mean, debug, config)[0]


@declare(last_token=True, parts={"rms_norm": rms_norm, "pool": pool})
def norm_score(
    x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, direction: Tensor, *, debug: bool = False,
    config: Sequence[int] = CONFIGS[0],
) -> Tensor:  # fmt: skip
    """x [T, H] before the final norm, its weight [H], cu_seqlens [N + 1] int32, direction [H] float32: P(yes) [N].

    The result is float32. ``debug`` is that of ``norm_pool``. Raises InputError.
    """
    return _score(x, weight, eps, cu_seqlens, direction, debug, config)


@torch.library.custom_op("qwen3core::norm_pool", mutates_args=())
def _pool(
    x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool, mean: bool, debug: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("norm_pool", x, weight, eps, cu_seqlens, debug)
    if not 1 <= dim <= x.shape[1]:
        raise InputError(f"norm_pool: dim: expected 1 to {x.shape[1]}, found {dim}")
    out, norms = _pool_fake(x, weight, eps, cu_seqlens, dim)
    (N,), H, (warps, parts) = norms.shape, x.shape[1], config if mean else (config[0], 1)
    sizes = {"H": H, "ROWS": MEAN_ROWS if mean else 1, "BLOCK_H": triton.next_power_of_2(H), "num_warps": warps}
    sums = norms if parts == 1 else x.new_empty(N, parts, H, dtype=torch.float32)
    if parts > 1:
        launch(sum_kernel, (N, parts), x, x.stride(0), weight, cu_seqlens, sums, eps, PARTS=parts, **sizes)
    launch(norm_pool_kernel, (N,), x, x.stride(0), weight, cu_seqlens, sums, out, norms, dim, eps, NORMALIZE=normalize,
           MEAN=mean, PARTS=parts, **sizes)  # fmt: skip
    return out, norms


@_pool.register_fake
def _pool_fake(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, *_: Any) -> tuple[Tensor, Tensor]:
    N = cu_seqlens.shape[0] - 1
    return x.new_empty(N, dim, dtype=torch.float32), x.new_empty(N, dtype=torch.float32)


@torch.library.custom_op("qwen3core::norm_score", mutates_args=())
def _score(
    x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, direction: Tensor, debug: bool, config: Sequence[int]
) -> Tensor:
    _check("norm_score", x, weight, eps, cu_seqlens, debug)
    if direction.shape != weight.shape or direction.dtype != torch.float32 or direction.device != x.device:
        found = f"{list(direction.shape)} {direction.dtype} on {direction.device}"
        raise InputError(f"norm_score: direction: expected {list(weight.shape)} float32 on {x.device}, found {found}")
    out = _score_fake(x, weight, eps, cu_seqlens)
    launch(norm_score_kernel, out.shape, x, x.stride(0), weight, cu_seqlens, direction.contiguous(), out, eps,
           x.shape[1], triton.next_power_of_2(x.shape[1]), num_warps=config[0])  # fmt: skip
    return out


@_score.register_fake
def _score_fake(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, *_: Any) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


def _check(op: str, x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, debug: bool) -> None:
    check(op, eps=eps, x=(x, "T H"), weight=(weight, "H"))
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, x, 1, debug)


@triton.jit
def sum_kernel(x_ptr, stride, weight_ptr, cu_seqlens_ptr, sums_ptr, eps, PARTS: tl.constexpr, H: tl.constexpr,
               ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """For the mean: sums [N, PARTS, H] float32, each of every PARTS-th group of ROWS rows of a sequence."""
    n, part, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_H)
    start = tl.load(cu_seqlens_ptr + n) + part * ROWS
    end = tl.load(cu_seqlens_ptr + n + 1)
    total = sum_rows(x_ptr, stride, weight_ptr, start, end, eps, PARTS, H, ROWS, BLOCK_H)
    tl.store(sums_ptr + (n * PARTS + part) * H + column, total, mask=column < H)


@triton.jit
def norm_pool_kernel(x_ptr, stride, weight_ptr, cu_seqlens_ptr, sums_ptr, out_ptr, norms_ptr, dim, eps,
                     NORMALIZE: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr, H: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    if PARTS == 1:
        row = pooled_row(x_ptr, stride, weight_ptr, cu_seqlens_ptr, n, eps, MEAN, H, ROWS, BLOCK_H)
    else:
        row = tl.zeros((BLOCK_H,), tl.float32)
        for first in tl.range(0, PARTS, ROWS):
            part = first + tl.arange(0, ROWS)[:, None]
            at = sums_ptr + (n * PARTS + part) * H + column[None, :]
            row += tl.sum(tl.load(at, mask=(part < PARTS) & (column < H)[None, :], other=0.0), axis=0)
        row /= tl.load(cu_seqlens_ptr + n + 1) - tl.load(cu_seqlens_ptr + n)
    row = tl.where(column < dim, row, 0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(row * row)), 1e-12) if NORMALIZE else 1.0
    tl.store(out_ptr + n * dim + column, row / norm, mask=column < dim)
    tl.store(norms_ptr + n, norm)


@triton.jit
def norm_score_kernel(x_ptr, stride, weight_ptr, cu_seqlens_ptr, direction_ptr, out_ptr, eps, H: tl.constexpr,
                      BLOCK_H: tl.constexpr):  # fmt: skip
    n = tl.program_id(0)
    column = tl.arange(0, BLOCK_H)
    row = pooled_row(x_ptr, stride, weight_ptr, cu_seqlens_ptr, n, eps, False, H, 1, BLOCK_H)
    logit = tl.sum(row * tl.load(direction_ptr + column, mask=column < H, other=0.0))
    tl.store(out_ptr + n, tl.sigmoid(logit))


@triton.jit
def pooled_row(x_ptr, stride, weight_ptr, cu_seqlens_ptr, n, eps, MEAN: tl.constexpr, H: tl.constexpr,
               ROWS: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """rms_norm of sequence n's last row, or the mean of rms_norm of all its rows; [BLOCK_H] float32, zero beyond H."""
    end = tl.load(cu_seqlens_ptr + n + 1)
    start = tl.load(cu_seqlens_ptr + n) if MEAN else end - 1
    return sum_rows(x_ptr, stride, weight_ptr, start, end, eps, 1, H, ROWS, BLOCK_H) / (end - start)


@triton.jit
def sum_rows(x_ptr, stride, weight_ptr, start, end, eps, PARTS: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
             BLOCK_H: tl.constexpr):  # fmt: skip
    """Sum of rms_norm of ROWS rows from ``start`` and of every PARTS-th such group before ``end``; zero beyond H."""
    column = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in tl.range(start, end, PARTS * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * stride + column[None, :], mask=(row < end) & (column < H)[None, :], other=0.0)
        total += tl.sum(normed(x, weight, eps, H)[0], axis=0)
    return total


# Backward


def _pool_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, cu_seqlens, ctx.dim, ctx.normalize, ctx.mean, *_ = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, *output)


def _pool_autograd(ctx: Any, dout: Tensor, _: Tensor) -> tuple:
    x, weight, cu_seqlens, out, norms = ctx.saved_tensors
    if ctx.normalize:
        dout = (dout - out * (out * dout).sum(1, keepdim=True)) / norms[:, None]
    dy = F.pad(dout, (0, x.shape[1] - ctx.dim))
    if ctx.mean:
        lengths = cu_seqlens.diff()
        dy = (dy / lengths[:, None]).repeat_interleave(lengths, dim=0, output_size=x.shape[0])
        dx, dw = rms_norm_backward(dy, None, x, weight, ctx.eps, [])
    else:
        dx, dw = _last_rows_backward(dy, x, weight, ctx.eps, cu_seqlens)
    return dx, dw, *[None] * 7


_pool.register_autograd(_pool_autograd, setup_context=_pool_setup)


def _score_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps, cu_seqlens, direction, *_ = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, direction, output)


def _score_autograd(ctx: Any, dout: Tensor) -> tuple:
    x, weight, cu_seqlens, direction, out = ctx.saved_tensors
    dlogit = (dout * out * (1 - out))[:, None]
    dx, dw = _last_rows_backward(dlogit * direction, x, weight, ctx.eps, cu_seqlens)
    y = rms_norm(x[cu_seqlens[1:].long() - 1], weight, ctx.eps)
    return dx, dw, None, None, (dlogit * y).sum(0), None, None


_score.register_autograd(_score_autograd, setup_context=_score_setup)


def _last_rows_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    last = cu_seqlens[1:].long() - 1
    rows, dw = rms_norm_backward(dy, None, x[last], weight, eps, [])
    return torch.zeros_like(x).index_copy(0, last, rows), dw
