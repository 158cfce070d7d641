"""What a kernel is checked against: an operation's specification, its cases, and the least work that it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..batch import build_cu_seqlens
from ..config import Qwen3Config
from ..profiling import visible_pairs

OPS_RATIO = 2
"""Error against float64, as a multiple of the plain specification's in the same dtype."""

CANCELLED = 2**-21
"""Of the largest result's norm, added to the rule. The softmax gradient of a query with one key is 0, and exactly so as
autograd computes it; a kernel subtracts two float32 sums of D products, equal but for their roundings (seen: up to 3 of
2^-23)."""

EPS = 1e-6
LENGTH = 512
"""Tokens of each sequence among large arguments."""


@dataclass(frozen=True)
class Operation:
    """An operation as the laboratory knows it. In arguments, tensors of float64 stand for the dtype that is tested.

    They are cast to it, and those that require a gradient are differentiated by; all others go in as they are. A file
    with a kernel for an operation of its own has one of these as ``OPERATION``.
    """

    specification: Callable[..., Any]
    """In plain PyTorch, in any float dtype; same arguments, a tensor or a tuple of tensors."""
    cases: Callable[[], Iterator[tuple[str, tuple]]]
    """(name, arguments) on the CPU: small, odd, strided, empty."""
    large: Callable[[Qwen3Config, int], tuple]
    """Arguments on the CPU at a model's sizes, of so many tokens."""
    work: Callable[..., tuple[int, int]]
    """The least (bytes moved, FLOPs) for such arguments once they are cast."""
    agreement: float = 0.0
    """The least share of float16 and bfloat16 results that are the specification's bit for bit, since they are rounded
    where it rounds (not all: a sum in another order changes a few); 0 where it may be rounded elsewhere."""


def cast(arguments: Sequence[Any], *dtypes: torch.dtype, device: str | torch.device = "cpu") -> list[Any]:
    """Arguments on a device, those of float64 in a dtype (in several, one after the other: rounded to each)."""

    def converted(x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            return x.to(device)
        y = x.detach().to(device)
        for dtype in dtypes:
            y = y.to(dtype)
        return y.requires_grad_(x.requires_grad)

    return [converted(x) if isinstance(x, Tensor) else x for x in arguments]


def leaf(*shape: int) -> Tensor:
    """Random numbers that stand for the dtype that is tested, differentiated by."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def angles(T: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of random angles, the two halves of D alike, as RoPE has them."""
    both = (torch.rand(T, D // 2, dtype=torch.float64) * 6.28).repeat(1, 2)
    return both.cos(), both.sin()


def sequences(tokens: int) -> Tensor:
    """cu_seqlens of so many tokens, in sequences of LENGTH and one of the rest."""
    return build_cu_seqlens([min(LENGTH, tokens - start) for start in range(0, tokens, LENGTH)])


def each(arguments: Callable[..., tuple], cases: dict[str, tuple]) -> Callable[[], Iterator[tuple[str, tuple]]]:
    """``cases`` of an Operation: the arguments that a function makes of each case's sizes.

    In the one named SMALL, matrices are so small that eps counts.
    """

    def made(name: str, sizes: tuple) -> tuple[str, tuple]:
        found = arguments(*sizes)
        if name == SMALL:
            for x in found:
                if isinstance(x, Tensor) and x.requires_grad and x.dim() > 1:
                    x.data *= EPS**0.5
        return name, found

    return lambda: (made(*case) for case in cases.items())


def norm_arguments(*shape: int) -> tuple:
    return leaf(*shape), leaf(shape[-1]), EPS


def added_arguments(*shape: int) -> tuple:
    return *norm_arguments(*shape), leaf(*shape)


def rope_arguments(T: int, heads: int, D: int) -> tuple:
    return leaf(T, heads, D), *angles(T, D)


def qk_arguments(T: int, hq: int, hkv: int, D: int) -> tuple:
    return leaf(T, hq, D), leaf(T, hkv, D), leaf(D), leaf(D), EPS, *angles(T, D)


def attention_arguments(hq: int, hkv: int, D: int, len_q: Sequence[int], len_k: Sequence[int]) -> tuple:
    q, k, v = leaf(sum(len_q), hq, D), leaf(sum(len_k), hkv, D), leaf(sum(len_k), hkv, D)
    return q, k, v, build_cu_seqlens(len_q), build_cu_seqlens(len_k), max(len_q), max(len_k)


def pool_arguments(lengths: Sequence[int], H: int, dim: int, normalize: bool) -> tuple:
    return leaf(sum(lengths), H), build_cu_seqlens(lengths), dim, normalize


def norm_pool_arguments(lengths: Sequence[int], H: int, dim: int, normalize: bool) -> tuple:
    x, *rest = pool_arguments(lengths, H, dim, normalize)
    return x, leaf(H), EPS, *rest


def norm_score_arguments(lengths: Sequence[int], H: int) -> tuple:
    return leaf(sum(lengths), H), leaf(H), EPS, build_cu_seqlens(lengths), torch.randn(H) / H**0.5


def pool_work(x: Tensor, cu_seqlens: Tensor, dim: int, normalize: bool) -> tuple[int, int]:
    """Read: one row of each sequence; written: float32."""
    N = len(cu_seqlens) - 1
    return N * x.shape[1] * x.itemsize + 4 * N * dim, 3 * N * dim * normalize


def norm_pool_work(
    x: Tensor, weight: Tensor, eps: float, cu_seqlens: Tensor, dim: int, normalize: bool
) -> tuple[int, int]:
    moved, flops = pool_work(x, cu_seqlens, dim, normalize)
    return moved + weight.nbytes, flops + 4 * (len(cu_seqlens) - 1) * x.shape[1]


def attention_work(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int) -> tuple[int, int]:
    pairs = visible_pairs(cu_q, cu_k, causal=True)
    return 2 * q.nbytes + k.nbytes + v.nbytes, 4 * q.shape[1] * q.shape[2] * pairs


SMALL = "small numbers"
ROWS = {"one row": (1, 64), "odd": (33, 100), "heads": (7, 3, 128), "wide": (3, 1500), "empty": (0, 40), SMALL: (5, 64)}
HEADS = {"one token": (1, 4, 2, 64), "odd": (9, 6, 3, 128), "one head": (17, 1, 1, 64), "empty": (0, 4, 2, 64)}
HEADS |= {"head size of no power of two": (5, 3, 1, 80), SMALL: (5, 4, 2, 64)}
SEQUENCES = [1, 5, 9, 2]
POOLED = {"unit": (SEQUENCES, 100, 33, True), "raw": (SEQUENCES, 128, 128, False), "one token": ([1], 100, 100, True)}
NORM_POOLED = POOLED | {SMALL: (SEQUENCES, 100, 100, False)}

OPERATIONS = {
    "linear": Operation(
        reference.linear,
        each(
            lambda T, K, N: (leaf(T, K), leaf(N, K)), {"one row": (1, 64, 96), "odd": (33, 100, 70), "empty": (0, 8, 8)}
        ),
        lambda size, T: (leaf(T, size.hidden_size), leaf(size.intermediate_size, size.hidden_size)),
        lambda x, w: (x.nbytes + w.nbytes + len(x) * len(w) * x.itemsize, 2 * x.numel() * len(w)),
    ),
    "rms_norm": Operation(
        reference.rms_norm,
        each(norm_arguments, ROWS),
        lambda size, T: norm_arguments(T, size.hidden_size),
        lambda x, w, eps: (2 * x.nbytes + w.nbytes, 4 * x.numel()),
        agreement=0.99,
    ),
    "add_rms_norm": Operation(
        reference.add_rms_norm,
        each(added_arguments, ROWS),
        lambda size, T: added_arguments(T, size.hidden_size),
        lambda x, w, eps, residual: (4 * x.nbytes + w.nbytes, 5 * x.numel()),
        agreement=0.99,
    ),
    "rope": Operation(
        reference.rope,
        each(rope_arguments, {"one token": (1, 2, 64), "odd": (9, 3, 128), "empty": (0, 2, 64)}),
        lambda size, T: rope_arguments(T, size.num_attention_heads, size.head_dim),
        lambda x, cos, sin: (2 * x.nbytes + cos.nbytes + sin.nbytes, 3 * x.numel()),
    ),
    "qk_norm_rope": Operation(
        reference.qk_norm_rope,
        each(qk_arguments, HEADS),
        lambda size, T: qk_arguments(T, size.num_attention_heads, size.num_key_value_heads, size.head_dim),
        lambda q, k, a, b, eps, *both: (
            2 * (q.nbytes + k.nbytes) + sum(x.nbytes for x in (a, b, *both)),
            7 * (q.numel() + k.numel()),
        ),
    ),
    "attention": Operation(
        reference.attention,
        each(
            attention_arguments,
            {
                "one token": (2, 1, 128, [1], [1]),
                "tile edges": (4, 2, 128, [1, 64, 129], [1, 64, 129]),
                "tiny": (4, 1, 64, [1, 2, 3] * 4, [1, 2, 3] * 4),
                "fewer queries": (1, 1, 64, [1, 63, 1, 0, 64], [300, 65, 1, 7, 129]),
                "empty sequences": (8, 1, 64, [0, 3, 0], [0, 3, 0]),
            },
        ),
        lambda size, T: attention_arguments(
            size.num_attention_heads, size.num_key_value_heads, size.head_dim, *[sequences(T).diff().tolist()] * 2
        ),
        attention_work,
    ),
    "swiglu": Operation(
        reference.swiglu,
        each(
            lambda *shape: (leaf(*shape), leaf(*shape)),
            {"one row": (1, 100), "odd": (17, 1500), "small": (3, 40), "empty": (0, 8)},
        ),
        lambda size, T: (leaf(T, size.intermediate_size), leaf(T, size.intermediate_size)),
        lambda gate, up: (3 * gate.nbytes, 5 * gate.numel()),
        agreement=0.99,
    ),
    "pool": Operation(
        reference.pool,
        each(pool_arguments, POOLED),
        lambda size, T: (leaf(T, size.hidden_size), sequences(T), size.hidden_size, True),
        pool_work,
    ),
    "norm_pool": Operation(
        reference.norm_pool,
        each(norm_pool_arguments, NORM_POOLED),
        lambda size, T: (*norm_arguments(T, size.hidden_size), sequences(T), size.hidden_size, True),
        norm_pool_work,
    ),
    "norm_score": Operation(
        reference.norm_score,
        each(norm_score_arguments, {"odd": (SEQUENCES * 4, 100), "even": (SEQUENCES * 4, 128)}),
        lambda size, T: norm_score_arguments(sequences(T).diff().tolist(), size.hidden_size),
        lambda x, w, eps, cu, d: (
            (len(cu) - 1) * (x.shape[1] * x.itemsize + 4) + w.nbytes + d.nbytes,
            6 * (len(cu) - 1) * x.shape[1],
        ),
    ),
}
"""By their names in ``Ops``: what a kernel may replace."""
