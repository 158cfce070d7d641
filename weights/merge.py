"""Merging: one checkpoint out of several of the same shape, tensor by tensor, a shard in memory at a time."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen3core.errors import InputError

from .checkpoint import open_model, rewrite


def merge(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    linear: bool = False,
) -> None:
    """Write the merger of checkpoints, with the files of the first one.

    weights: the share of each, equal by default. Tensors are merged along the great circle between two (``slerp``), of
    more than two one after the other, as the series was (arXiv:2506.05176, section 3.3); with ``linear``, by
    weighted mean. Raises InputError and CheckpointError.
    """
    if len(directories) < 2:
        raise InputError(f"merge: expected two or more checkpoints, found {len(directories)}")
    shares = [1.0] * len(directories) if weights is None else [float(w) for w in weights]
    if len(shares) != len(directories) or not min(shares) > 0:
        raise InputError(f"weights: expected {len(directories)} numbers above 0, found {shares}")
    first, *others = [open_model(directory)[1] for directory in directories]
    for tensors in others:
        for name in first:
            tensors.check(name, first.shape(name))
        tensors.check_none_left(set(first))

    def merged(name: str) -> Tensor:
        result, total = first[name].float(), shares[0]
        for tensors, share in zip(others, shares[1:], strict=True):
            total += share
            result = (torch.lerp if linear else slerp)(result, tensors[name].float(), share / total)
        return result

    rewrite(directories[0], output, merged)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1), float32: ``(sin((1 - t) w) a + sin(t w) b) / sin(w)``, w the angle between them,
    each read as one vector. (Shoemake 1985.) Where the angle is as good as 0 or 180 degrees, linear.
    """
    dot, aa, bb = ((x * y).sum(-1, dtype=torch.float64).sum().item() for x, y in ((a, b), (a, a), (b, b)))
    angle = math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb)))) if aa and bb else 0.0
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, t)
    return (a * math.sin((1 - t) * angle)).add_(b, alpha=math.sin(t * angle)).div_(math.sin(angle))
