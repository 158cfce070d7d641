"""What a kernel is checked against: an operation's specification, its cases, and the least work that it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..config import Qwen3Config


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
