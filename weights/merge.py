"""Merging: one checkpoint out of several of the same shape, tensor by tensor, a shard in memory at a time."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qwen3core.errors import InputError

from .build import open_model
from .tensors import rewrite


def merge(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    linear: bool = False,
) -> None:
    """Write the merger of checkpoints, with the files of the first one.

    weights: the share of each, equal by default. Two tensors are merged by ``slerp``, a third into their result, and so
    on, as the model series was (arXiv:2506.05176, section 3.3). linear: the weighted mean instead.
    Raises InputError for the options, CheckpointError for checkpoints of different shapes.
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
    """Interpolate from a (t = 0) to b (t = 1) along the great circle between them (slerp, Shoemake 1985), float32.

    ``(sin((1 - t) w) a + sin(t w) b) / sin(w)``, where w is the angle between the tensors, each read as one vector.
    Linear where w is within 1e-6 of 0 or 180 degrees, in which no great circle is defined.
    """
    dot, aa, bb = ((x * y).sum(-1, dtype=torch.float64).sum().item() for x, y in ((a, b), (a, a), (b, b)))
    angle = math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb)))) if aa and bb else 0.0
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, t)
    return (a * math.sin((1 - t) * angle)).add_(b, alpha=math.sin(t * angle)).div_(math.sin(angle))
