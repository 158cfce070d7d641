"""Products with the weights on a CPU, through oneDNN where it is faster: weights that it lays out for itself once,
several weights as one product, and few numbers of rows, for each of which it holds on to code.

``linear`` and ``linears`` are those of ``Ops.torch``; ``prepacked_*`` and ``invariant_*`` those of the sets of their
names.
"""

import ctypes
import mmap
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.backends import mkldnn
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference
from .reference import declare

ONEDNN_ROWS = 512
"""Rows up to which oneDNN's float32 product is faster on a CPU: 1.7 times at 16, 1.3 at 128 (bench/README.md)."""

FIRST_NUMBERS = 10
"""oneDNN holds on to 0.6 MB of code for each number of rows and shape of weight that it meets. So the first numbers
of rows are multiplied as they are, which are all where few lengths recur, and later ones are filled up."""

MET: set[int] = set()
"""Those first numbers."""

ONEDNN_SIZES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Numbers of rows that later ones are filled up to, with zeros; of float32, what is more is MKL's."""

PACKED_SIZES = (*ONEDNN_SIZES, *range(192, 1025, 64))
"""The same of weights in oneDNN's own layout; more rows are multiplied in parts of equal size."""

USES = 8
"""Products with a bfloat16 weight before ``Ops.torch`` lays it out: what that takes is then soon gained."""

PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""``Packed`` by the first of its weights."""

DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
"""Linux's advice that pages are not needed."""

SAME_BITS: dict[tuple[object, ...], tuple[int, ...]] = {}
"""Numbers of rows that give a row the same bits, by shape, dtype and threads."""

NUMBERS = 2**20
"""Results that are compared for it."""


@dataclass
class Packed:
    """Weights side by side in oneDNN's layout, and what they were made of."""

    weights: tuple[ref[Tensor], ...]
    versions: tuple[int, ...]
    dtype: torch.dtype
    uses: int = 0
    packed: Tensor | None = None

    def made_of(self, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether these are the weights, and none has changed."""
        same = len(weights) == len(self.weights) and all(a() is b for a, b in zip(self.weights, weights, strict=True))
        return same and self.dtype == dtype and self.versions == tuple(w._version for w in weights)


@declare(row_wise=True)
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``reference.linear`` through oneDNN where that is faster; a bfloat16 weight is packed at its 9th use."""
    return _several(x, (weight,), USES)[0]


@declare(row_wise=True, parts={"linear": linear})
def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """``linear`` with each weight; as one product once they are packed, so that each result is a view of it."""
    return _several(x, weights, USES)


@declare(row_wise=True)
def prepacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``linear`` on a copy of the weight in oneDNN's own layout, made at its first use and when it has changed."""
    return _several(x, (weight,))[0]


@declare(row_wise=True, parts={"linear": prepacked_linear})
def prepacked_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return _several(x, weights)


@declare(row_wise=True)
def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``prepacked_linear`` in numbers of rows that give each row the same bits."""
    return invariant_linears(x, weight)[0]


@declare(row_wise=True, parts={"linear": invariant_linear})
def invariant_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    packed = _packed(x, weights)
    if packed is None:
        return tuple(reference.linear(x, w) for w in weights)
    return _split(_onednn(x, packed, _same_bits(x, packed)), weights)


def _several(x: Tensor, weights: tuple[Tensor, ...], uses: int = 0) -> tuple[Tensor, ...]:
    """One product with the weights side by side where they are packed (``_packed``), else one with each."""
    packed = _packed(x, weights, uses)
    return tuple(_plain(x, w) for w in weights) if packed is None else _split(_onednn(x, packed), weights)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    """The product with a weight as it is stored."""
    fast = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled() and mkldnn.is_available()
    if fast and x.dim() == 2 and len(x) <= ONEDNN_ROWS and (len(x) <= ONEDNN_SIZES[-1] or _as_it_is(len(x))):
        return _onednn(x, weight.to(x.dtype))
    return reference.linear(x, weight)


def _split(product: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return product.split([len(weight) for weight in weights], dim=1)


def _packed(x: Tensor, weights: tuple[Tensor, ...], uses: int = 0) -> Tensor | None:
    """The weights in oneDNN's layout, for products with rows x [T, in]; None where it has none, or not yet.

    uses: products before they are packed; then only bfloat16 pages of a file are, which the copy can replace.
    """
    if x.dim() != 2 or torch.is_grad_enabled():
        return None
    found: Packed | None = PACKED.get(weights[0])
    if found is None or not found.made_of(weights, x.dtype):
        if not _has_layout(x) or any(w.is_inference() for w in weights):
            return None
        if uses and (x.dtype != torch.bfloat16 or any(w.dtype != x.dtype or _in_memory(w) for w in weights)):
            return None
        found = Packed(tuple(map(ref, weights)), tuple(w._version for w in weights), x.dtype)
        PACKED[weights[0]] = found
    found.uses += 1
    if found.packed is None and found.uses > uses:
        if uses and not all(map(_file_pages, weights)):
            found.uses = 0
            return None
        whole = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        found.packed = torch.ops.mkldnn._reorder_linear_weight(whole.to(x.dtype))
        give_back(weights)
    return found.packed


def _in_memory(weight: Tensor) -> bool:
    """Whether a weight is not pages of a file."""
    return weight.untyped_storage().resizable()


def give_back(weights: Iterable[Tensor]) -> None:
    """Take the pages of a file that hold weights out of this process's memory; they are read again where needed."""
    for pages in filter(None, map(_file_pages, weights)):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(pages.start), ctypes.c_size_t(len(pages)), DONTNEED)


def _file_pages(weight: Tensor) -> range | None:
    """Addresses of the pages of a file that hold a weight, those whole that hold nothing else.

    None where the weight is no pages of a file, where a page is this process's own, since it was written to, and where
    the system does not say so.
    """
    size = mmap.PAGESIZE
    first, end = -(-weight.data_ptr() // size), (weight.data_ptr() + weight.nbytes) // size
    if _in_memory(weight) or end <= first:
        return None
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            flags = np.frombuffer(file.read(8 * (end - first)), "<u8")
    except OSError:
        return None
    there, of_a_file = (flags >> 62) != 0, (flags >> 61) & 1 == 1  # in memory or swapped out; not written to
    whole = len(flags) == end - first and bool((of_a_file | ~there).all())
    return range(first * size, end * size) if whole else None


def _onednn(x: Tensor, weight: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """oneDNN's product of rows x [T, in] and a weight, packed or not: [T, out]; sizes: of ``in_sizes``."""
    return in_sizes(lambda rows: torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""), x, sizes)


def in_sizes(product: Callable[[Tensor], Tensor], x: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """``product(x)`` of rows x [T, in], in few numbers of rows. No row depends on what is filled in.

    sizes: the numbers of rows that it may multiply; None: ``PACKED_SIZES``, and the first that it meets.
    """
    if len(x) in sizes if sizes else _as_it_is(len(x)):
        return product(x)
    size = _size(len(x), sizes or PACKED_SIZES)
    *parts, last = x.split(size)
    if len(last) < size:
        last = torch.cat((last, last.new_zeros(size - len(last), x.shape[1])))
    products = [product(part) for part in (*parts, last)]
    return (products[0] if len(products) == 1 else torch.cat(products))[: len(x)]


def _as_it_is(rows: int) -> bool:
    """Whether this number of rows is multiplied as it is: one of the sizes, or of the first numbers."""
    if rows in MET or rows in PACKED_SIZES:
        return True
    if rows <= ONEDNN_ROWS and len(MET) < FIRST_NUMBERS:
        MET.add(rows)
    return rows in MET


def _size(rows: int, sizes: Sequence[int]) -> int:
    """The least of ``sizes`` that rows fill in as few parts as can be: a part more would read the weight again."""
    parts = -(-rows // sizes[-1])
    return sizes[bisect_left(sizes, -(-rows // parts))]


def _same_bits(x: Tensor, packed: Tensor) -> tuple[int, ...]:
    """The sizes that give a row the same bits, seen on random rows: where oneDNN splits the sums, it depends on them.

    128 always is among them. Of a million numbers, sums in another order round some hundred differently.
    """
    key = (*packed.shape, x.dtype, torch.get_num_threads())
    if key not in SAME_BITS:
        usual, count = ONEDNN_SIZES[-1], max(PACKED_SIZES[-1], NUMBERS // len(packed))
        rows = torch.randn(count, x.shape[1], generator=torch.Generator().manual_seed(0)).to(x.dtype)
        whole = _onednn(rows, packed, [usual])
        found = []
        for n in PACKED_SIZES:
            first = max(n, NUMBERS // len(packed))
            if torch.equal(_onednn(rows[:first], packed, [n]), whole[:first]):
                found.append(n)
        SAME_BITS[key] = tuple(found)
    return SAME_BITS[key]


def _has_layout(x: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for weights of x's dtype; for bfloat16, not on every CPU."""
    if x.device.type != "cpu" or not mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
