"""Usual edits: functions for ``hooks.edit``, written with nothing but what it gives them.

    with edit(reranker, {"layers.2.mlp_out": zero}): ...                                # ablation
    with edit(reranker, {"layers.1.resid_post": patch(acts, positions=5)}): ...         # activation patching
    with edit(embedder, {"layers.2.resid_post": add(vector, positions=None)}): ...      # steering
    with edit(reranker, replace_head(3, 7, mean_ablate(acts))): ...                     # one head

Those that take no positions change every row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError, check_int
from .hooks import Activations, with_where
from .points import Positions, Where, several

Edit = Callable[[Tensor, Where], Tensor]
"""A function of a point's tensor, and of what its rows are, to the tensor that goes on in its place."""


def zero(x: Tensor) -> Tensor:
    """Zeros in place of x."""
    return torch.zeros_like(x)


def mean_ablate(acts: Activations) -> Edit:
    """Every row becomes the mean of the same point's rows in ``acts``, a capture of reference texts."""
    return lambda x, where: acts[where.name].mean(0).to(x).expand_as(x)


def add(vector: Tensor, positions: Positions = "last") -> Edit:
    """Add a vector, such as [H], to the rows at these positions of each text. Raises InputError, in the edit."""
    return lambda x, where: _at(x, where, positions, lambda rows, text: rows + vector.to(x))


def patch(acts: Activations, positions: Positions = None, text: int | None = None) -> Edit:
    """Rows at these positions of each text become those at the same positions of the same text in ``acts``.

    text: the one of ``acts`` that all take theirs from. Raises InputError, in the edit, for a position that is in one
    of them alone, and without positions for texts of different lengths.
    """

    def replace(x: Tensor, where: Where) -> Tensor:
        def source(rows: Tensor, index: int) -> Tensor:
            new = acts.at(where.name, index if text is None else text, several(positions)).to(x)
            if new.shape != rows.shape:
                found = f"{list(new.shape)} to put there"
                raise InputError(
                    f"patch of {where.name!r}, text {index}: expected rows {list(rows.shape)}, found {found}"
                )
            return new

        return _at(x, where, positions, source)

    return replace


def replace_head(layer: int, head: int, function: Callable[..., Tensor] = zero) -> dict[str, Edit]:
    """For ``edit``: of a layer's ``z`` [T, Hq, D], query head ``head`` becomes what the function makes of all of z.

    Raises InputError, in the edit, where there is no such head.
    """
    every_head = with_where(function)

    def replace(z: Tensor, where: Where) -> Tensor:
        check_int("head", head, 0, z.shape[1] - 1)
        chosen = torch.arange(z.shape[1], device=z.device)[:, None] == head
        return torch.where(chosen, every_head(z, where), z)

    return {f"layers.{layer}.z": replace}


def _at(x: Tensor, where: Where, positions: Positions, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """x with the rows at these positions of each text replaced by ``function(rows, text)``."""
    numbers = {text: torch.tensor(where.numbers(text, positions), device=x.device) for text in where.rows}
    rows = [function(x.index_select(where.dim, n), text) for text, n in numbers.items()]
    return x.index_copy(where.dim, torch.cat([*numbers.values()]), torch.cat(rows, where.dim)) if rows else x
