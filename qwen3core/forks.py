"""OpenMP's threads do not survive a fork, and a child that counts on them waits for ever: here it has one thread."""

import os

import torch

from .errors import warn

_used = False
"""Whether this process, or the one that it was forked from, has used several threads."""

_lost = 0
"""How many threads the fork took, until a warning has said so."""


def use_threads() -> None:
    """Say that threads are about to be used; warns, once, where a fork took them."""
    global _used, _lost
    _used = True
    if _lost:
        lost, _lost = _lost, 0
        warn(
            f"forked from a process that has computed: 1 thread in place of {lost}, since the others are not here; "
            'start processes by multiprocessing.get_context("spawn"), or fork before a model is opened'
        )


def _after_in_child() -> None:
    global _lost
    if _used and (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
        _lost = threads


os.register_at_fork(after_in_child=_after_in_child)
