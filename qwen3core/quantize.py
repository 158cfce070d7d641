"""Vectors in 8 bits, or one, for each component."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, check_one_of, warn

PRECISIONS = ("int8", "uint8", "binary", "ubinary")
"""What ``quantize`` takes."""


def quantize(vectors: NDArray[np.float32], precision: str, ranges: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """Vectors [n, dim] with 8 bits for a component, or one, by sentence-transformers' formulas (util/quantization.py).

    Args:
        vectors: of ``encode``.
        precision: ``"int8"`` and ``"uint8"`` count 255 equal steps from each component's least value to its largest;
            ``"binary"`` (int8) and ``"ubinary"`` (uint8) pack the signs of eight components into a byte.
        ranges: [2, dim], these least and largest values; by default those of the vectors themselves.

    Returns:
        [n, dim], or [n, ceil(dim / 8)], in 8 bits.

    Raises:
        InputError: where ranges are those of a single vector.
    """
    check_one_of("precision", precision, PRECISIONS)
    if precision.endswith("binary"):
        packed = np.packbits(vectors > 0, axis=-1)
    else:
        if ranges is None and len(vectors):
            if len(vectors) == 1:
                raise InputError(f"precision: expected several vectors, whose ranges {precision} takes, found one")
            if len(vectors) < 100:
                warn(f"precision: {precision} takes the ranges of {len(vectors)} vectors; 100 and more are steadier")
            ranges = np.stack((vectors.min(axis=0), vectors.max(axis=0)))
        low, high = np.zeros((2, vectors.shape[1])) if ranges is None else ranges.astype(np.float32)
        steps = (high - low) / 255
        packed = np.clip(np.floor((vectors - low) / np.where(steps == 0, 1, steps)), 0, 255).astype(np.uint8)
    return packed if precision.startswith("u") else (packed - 128).astype(np.int8)
