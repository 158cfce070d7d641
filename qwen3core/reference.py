"""The specification: each operation in the fewest clear lines, with transformers' arithmetic, cast for cast.

Every other implementation is tested against these functions, and these, bit for bit, against transformers'
``modeling_qwen3`` with eager attention. Symbols: ``T`` packed tokens, ``N`` sequences, ``D`` head dimension,
``H`` hidden size. Where transformers says float32, these use float32 or wider, so that float64 inputs give a
float64 oracle. ``declare`` states beside each what the model's shortcuts may assume of it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Allows:
    """What the model's shortcuts may assume of an operation; nothing, unless declared."""

    row_wise: bool = False
    """Each row of the result depends on the same row of the inputs alone."""
    causal: bool = False
    """Attention is causal unless told otherwise, aligned at the bottom right, and takes fewer queries than keys."""
    last_token: bool = False
    """Pooling reads the last row of each sequence alone."""
    parts: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """For a fused operation: the operations that it stands for, by their names in ``Ops``."""


_DECLARED: WeakKeyDictionary[Callable[..., Any], Allows] = WeakKeyDictionary()


def declare(**allows: Any) -> Callable[[Function], Function]:
    """Declare, as a decorator, what an operation allows: the fields of ``Allows``.

    It holds for this very function: a wrapper of it, ``functools.wraps`` included, declares nothing.
    """

    def decorate(function: Function) -> Function:
        _DECLARED[function] = Allows(**allows)
        return function

    return decorate


def allows(function: Callable[..., Any]) -> Allows:
    """What was declared of a function; of an unknown one, nothing."""
    try:
        return _DECLARED.get(function, Allows())
    except TypeError:  # a callable that cannot be hashed or weakly referenced
        return Allows()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@declare(row_wise=True)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; [..., H] to [..., H], in x's dtype.

    The mean and the division are float32; the result is cast to x's dtype *before* the multiplication by weight.
    """
    wide = at_least_float32(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@declare(row_wise=True)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``; [..., in] and [out, in] to [..., out], in x's dtype, which the weights may be stored below."""
    return F.linear(x, weight.to(x.dtype))


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation of each row: x [N, K] to int8 [N, K] and scale [N] float32, x = int8 * scale; 0 is 0.

    In float16 a scale would be subnormal, or 0, for rows whose largest number is below 0.008.
    """
    scale = (x.abs().amax(-1).float() / 127).clamp(min=1e-30)
    return (x.float() / scale[:, None]).round().to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``linear`` with a weight out of ``int8_rows`` and its scale in float32; x [T, in] is quantised likewise."""
    rows, row_scale = int8_rows(x)
    # Not torch._int_mm, whose sums overflow on x86 without VNNI.
    return (F.linear(rows.float(), weight.float()) * scale * row_scale[:, None]).to(x.dtype)


@declare(row_wise=True)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [T, heads, D] by cos, sin [T, D], in the model's dtype.

    Pairs are (i, i + D/2), the two halves, not neighbours (i, i + 1).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


@declare(causal=True)
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, causal: bool = True, hook: Callable[[str, Tensor, int], Tensor] = lambda name, x, sequence: x,
) -> Tensor:  # fmt: skip
    """Grouped-query attention inside each sequence; q [Tq, Hq, D], k and v [Tk, Hkv, D] to [Tq, Hq, D].

    Query head h reads key head ``h // (Hq / Hkv)``. Causality is aligned at the bottom right: the last query of a
    sequence sees all its keys, so queries may be fewer than keys. Without ``causal`` every query sees all keys of its
    sequence. Scores are scaled by ``D ** -0.5`` in the model's dtype, softmax is float32, probabilities are cast back
    before they multiply v.
    The model passes ``causal`` only as False: an attention that does not take it serves causal models. ``hook`` is
    given each sequence's ``scores`` and ``pattern``, [Hq, len_q, len_k], and gives what is used in their place; the
    model passes it only where these are asked for. The max_seqlen arguments are for kernels that size a grid by them.
    Raises InputError where a sequence has more queries than keys and ``causal``.
    """
    out = []
    groups = q.shape[1] // k.shape[1]
    for n, (rows_q, rows_k) in enumerate(sequences(cu_seqlens_q, cu_seqlens_k, causal)):
        queries = q[rows_q].transpose(0, 1)  # [Hq, len_q, D]
        keys = k[rows_k].transpose(0, 1).repeat_interleave(groups, dim=0)
        values = v[rows_k].transpose(0, 1).repeat_interleave(groups, dim=0)
        scores = queries @ keys.transpose(1, 2) * q.shape[2] ** -0.5
        if causal:
            scores = scores.masked_fill(~visible(queries, keys), -torch.inf)
        scores = hook("scores", scores, n)
        pattern = hook("pattern", at_least_float32(scores).softmax(dim=-1).to(q.dtype), n)
        out.append((pattern @ values).transpose(0, 1))
    return torch.cat(out)


def sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool = True) -> Iterator[tuple[slice, slice]]:
    """The rows of each sequence's queries and of its keys. Raises InputError where causal queries outnumber keys."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        if causal and q1 - q0 > k1 - k0:
            raise InputError(f"attention: expected no more queries than keys, found {q1 - q0} and {k1 - k0}")
        yield slice(q0, q1), slice(k0, k1)


def visible(queries: Tensor, keys: Tensor) -> Tensor:
    """The causal mask of one sequence, aligned at the bottom right; [heads, length, D] each to [len_q, len_k] bool."""
    len_q, len_k = queries.shape[1], keys.shape[1]
    return torch.ones(len_q, len_k, dtype=torch.bool, device=queries.device).tril(len_k - len_q)


@declare(row_wise=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; [T, I] each, in the model's dtype."""
    return F.silu(gate) * up


@declare(last_token=True)
def pool(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    dim: int,
    normalize: bool,
    *,
    modes: tuple[str, ...] = ("lasttoken",),
    prompt_length: int = 0,
) -> Tensor:
    """Last token of each sequence, cut to ``dim``, then L2-normalised; [T, H] to [N, dim], in float32.

    The cut comes before the norm (Matryoshka representation learning, arXiv:2205.13147). Other ``modes``, and several
    side by side, are those of sentence-transformers' Pooling, over the tokens after the first ``prompt_length``; an
    operation that takes other modes than the last token has no shortcut.
    """
    if modes == ("lasttoken",) and not prompt_length:
        pooled = at_least_float32(hidden_states[cu_seqlens[1:].long() - 1])
    else:
        rows = [pool_text(x, modes, prompt_length) for x in hidden_states.split(cu_seqlens.diff().tolist())]
        pooled = torch.stack(rows)
    return cut(pooled, dim, normalize)


def cut(x: Tensor, dim: int | None, normalize: bool) -> Tensor:
    """The first ``dim`` components of vectors [N, H], all by default, then L2-normalised."""
    return F.normalize(x[:, :dim], dim=-1) if normalize else x[:, :dim]


def pool_text(hidden_states: Tensor, modes: tuple[str, ...], prompt_length: int) -> Tensor:
    """One text's vectors of several modes, side by side; [length, H] to [len(modes) * H], in float32."""
    x = at_least_float32(hidden_states)[prompt_length:]
    if not len(x):
        raise InputError(f"include_prompt: expected tokens beside the prompt's {prompt_length}, found none")
    weights = torch.arange(prompt_length + 1, prompt_length + 1 + len(x), device=x.device, dtype=x.dtype)[:, None]
    functions = {
        "cls": lambda: x[0],
        "max": lambda: x.amax(0),
        "mean": lambda: x.mean(0),
        "mean_sqrt_len_tokens": lambda: x.sum(0) / len(x) ** 0.5,
        "weightedmean": lambda: (x * weights).sum(0) / weights.sum(),
        "lasttoken": lambda: x[-1],
    }
    return torch.cat([functions[mode]() for mode in modes])


def p_yes(pooled: Tensor, yes_no: Tensor) -> Tensor:
    """sigmoid(pooled . (w_yes - w_no)): [N, H] float32 and the two rows [2, H] of the lm_head to [N] float32.

    Equals the softmax over the two logits; the difference is taken in float32, where near-ties survive.
    """
    return torch.sigmoid(pooled @ yes_minus_no(yes_no, pooled.dtype))


def yes_minus_no(yes_no: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The direction of P(yes) in the space of last hidden states: w_yes - w_no [H], from rows [2, H] of the lm_head."""
    yes, no = yes_no.to(dtype)
    return yes - no


# What fused operations stand for, by the operations above


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded before the norm."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] and k [T, Hkv, D], each normalised by head, then rotated."""
    return rope(rms_norm(q, q_weight, eps), cos, sin), rope(rms_norm(k, k_weight, eps), cos, sin)


def norm_pool(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool) -> Tensor:
    """pool(rms_norm(x)), [N, dim] float32."""
    return pool(rms_norm(x, weight, eps), cu_seqlens, dim, normalize)


def norm_score(x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, direction: Tensor) -> Tensor:
    """P(yes) [N] from pool(rms_norm(x)) and w_yes - w_no [H] float32."""
    pooled = norm_pool(x, weight, eps, cu_seqlens, x.shape[1], False)
    return torch.sigmoid(pooled @ direction.to(pooled.dtype))
