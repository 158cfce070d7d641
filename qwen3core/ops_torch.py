"""The fast set in stock PyTorch: the reference's formulas with fewer passes over memory, which decide on a CPU."""

from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .errors import InputError
from .reference import declare

LONG_KEYS = 512
"""Keys from which a copy that puts those of a head side by side pays on a CPU: 1.15 times as fast at 512 to 4096 keys,
1.5 times at 8192 (bench/README.md)."""

FEW = 2**16
"""Numbers up to which more passes take less time than more calls."""

BLOCK = 64
"""Queries, and keys, of a block of ``blocked_attention``."""

SCORES = 2**20
"""Scores of it at a time: more would not stay in the cache."""


@declare(row_wise=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.dtype == torch.bfloat16 and x.numel() > FEW:
        # Batch norm in evaluation, a row as a channel of mean 0: the same arithmetic, one pass for three.
        rows = x.reshape(1, -1, x.shape[-1])
        squares = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_().div_(x.shape[-1])[0]
        normed = F.batch_norm(rows, torch.zeros_like(squares), squares, eps=eps)
        return normed.view(x.shape).mul_(weight)
    wide = reference.at_least_float32(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale if wide is x else wide.mul_(scale)).to(x.dtype).mul_(weight)


@declare(row_wise=True)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    sin = sin.unsqueeze(1)
    out = x * cos.unsqueeze(1)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


@declare(row_wise=True, parts={"rms_norm": rms_norm, "rope": rope})
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """In bfloat16 on a CPU all heads at once, which is half the calls."""
    if not _narrow(q):
        return rope(rms_norm(q, q_weight, eps), cos, sin), rope(rms_norm(k, k_weight, eps), cos, sin)
    heads = (q.shape[1], k.shape[1])
    weight = torch.cat((q_weight.expand(heads[0], -1), k_weight.expand(heads[1], -1)))
    q, k = rope(rms_norm(torch.cat((q, k), dim=1), weight, eps), cos, sin).split(heads, dim=1)
    return q, k


@declare(row_wise=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up) if _may_overwrite(gate) else reference.swiglu(gate, up)


@declare(causal=True)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True,
) -> Tensor:  # fmt: skip
    """PyTorch's SDPA, one call for neighbours of equal lengths, which sorted batches are full of.

    ``blocked_attention`` where that is faster: in bfloat16 on AMD's CPUs.
    Raises InputError under forward-mode differentiation (``torch.func.jvp``, ``jacfwd``), which SDPA does not have.
    """
    if causal and _narrow(q) and _blocks_pay():
        return blocked_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    runs = _runs(cu_seqlens_q, cu_seqlens_k, causal)
    # split, not slices: the gradient of each slice would be a tensor of all rows.
    q_runs = q.split([n * len_q for len_q, _, n in runs])
    k_runs, v_runs = (x.split([n * len_k for _, len_k, n in runs]) for x in (k, v))
    out = []
    for (len_q, len_k, n), *rows in zip(runs, q_runs, k_runs, v_runs, strict=True):
        queries, keys, values = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in rows)
        if len_k >= LONG_KEYS and k.device.type == "cpu":
            keys, values = keys.contiguous(), values.contiguous()
        aligned = causal and len_q == len_k  # SDPA's own mask is aligned at the top left; one query sees all
        mask = reference.visible(queries[0], keys[0]) if causal and not aligned and len_q > 1 else None
        try:
            z = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=aligned, enable_gqa=True)
        except NotImplementedError as error:
            message = f"ops 'torch': attention: expected ops='reference' for forward-mode AD ({error})"
            raise InputError(message) from error
        out.append(z.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)  # torch.cat would copy a single one


@declare(causal=True)
def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True,
) -> Tensor:  # fmt: skip
    """Blocks of 64 positions against the keys up to their end, all texts of as many blocks at once.

    A block is the same product whatever shares the batch, and however few of its rows query, as after a shared prefix.
    It is ``attention`` where gradients are recorded and without ``causal``.
    """
    if not causal or torch.is_grad_enabled():
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    runs = _runs(cu_seqlens_q, cu_seqlens_k, causal)
    q_runs, out_runs = (x.split([n * len_q for len_q, _, n in runs]) for x in (q, out))
    k_runs, v_runs = (x.split([n * len_k for _, len_k, n in runs]) for x in (k, v))
    groups: dict[tuple[int, int], list[tuple[Any, ...]]] = {}
    for (len_q, len_k, n), *rows in zip(runs, q_runs, out_runs, k_runs, v_runs, strict=True):
        parts = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in rows)
        group = ((len_k - len_q) // BLOCK, -(-len_k // BLOCK))
        groups.setdefault(group, []).append((len_q, len_k, n, *parts))
    for (first, count), members in groups.items():
        _attend_blocks(first, count, members)
    return out


def _attend_blocks(first: int, count: int, runs: list[tuple[Any, ...]]) -> None:
    """Attention of texts of ``count`` blocks, from block ``first`` on.

    runs: of texts of equal lengths, len_q, len_k, n, queries and results [n, Hq, len_q, D], keys, values
    [n, Hkv, len_k, D].
    """
    q, k = runs[0][3], runs[0][5]
    n, (_, kv_heads, _, dim), positions = sum(run[2] for run in runs), k.shape, (count - first) * BLOCK
    queries = q.new_zeros(n, q.shape[1], positions, dim)
    keys, values = k.new_zeros(2, n, kv_heads, count * BLOCK, dim)
    spans, start = [], 0
    for len_q, len_k, size, q_run, _, k_run, v_run in runs:
        texts, offset = slice(start, start + size), len_k - len_q - first * BLOCK
        spans.append((texts, slice(None), slice(offset, offset + len_q)))
        queries[spans[-1]] = q_run
        keys[texts, :, :len_k], values[texts, :, :len_k] = k_run, v_run
        start += size
    queries = queries.view(n * kv_heads, -1, positions, dim)
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
    for block in queries.split(BLOCK, dim=2):  # each is overwritten by its result
        first += 1
        end = first * BLOCK
        size = 1 << (SCORES // (block.shape[1] * BLOCK * end) | 1).bit_length() - 1  # a power of 2: none is left alone
        for part, a, b in zip(*(x.split(size) for x in (block, keys, values)), strict=True):
            scores = torch.bmm(part.flatten(1, 2), a[:, :end].transpose(1, 2)).mul_(dim**-0.5)
            scores.unflatten(1, (-1, BLOCK))[..., -BLOCK:].masked_fill_(later, -torch.inf)
            part.copy_(torch.bmm(scores.softmax(-1), b[:, :end]).view_as(part))
    z = queries.view(n, -1, positions, dim)
    for span, run in zip(spans, runs, strict=True):
        run[4].copy_(z[span])


def _runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> list[tuple[int, int, int]]:
    """Neighbours of equal lengths: queries, keys, and how many there are."""
    lengths = ((x.stop - x.start for x in rows) for rows in reference.sequences(cu_seqlens_q, cu_seqlens_k, causal))
    return [(*pair, len(list(run))) for pair, run in groupby(map(tuple, lengths))]


@cache
def _blocks_pay() -> bool:
    """Whether ``blocked_attention`` is faster than SDPA in bfloat16: twice on AMD's CPUs, half on Intel's."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False


def _narrow(x: Tensor) -> bool:
    """Whether x is bfloat16 on a CPU, and no gradient is recorded."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled()


def _may_overwrite(x: Tensor) -> bool:
    """Whether x is on a CPU, in a dtype that is not float16, and no gradient needs what is overwritten."""
    return x.dtype in (torch.float32, torch.bfloat16) and x.device.type == "cpu" and not torch.is_grad_enabled()
