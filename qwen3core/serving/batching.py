"""Requests of many callers as packed batches: a bounded queue, a thread that tokenises, a thread that computes.

Each request is planned as a call of ``encode`` is (planning.py), into groups of at most ``batch_tokens`` rows. A batch
is the next group of the request at the front, and beside it groups of others that fit. What has groups left goes to
the back: a large request has a batch a round, and nobody waits for all of it.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Prefix
from ..forks import use_threads
from ..planning import plan
from ..pretrained import BATCH_TOKENS, Pretrained, is_finite


class QueueFull(Exception):
    """As many requests as may wait are waiting."""


class Closed(Exception):
    """No more requests are taken."""


@dataclass(frozen=True)
class Work:
    """A request's sequences, and what is computed of them."""

    pretrained: Pretrained
    sequences: list[list[int]]
    """Whole ones, none empty, as ``Pretrained.to_sequences`` gives them."""
    prefixes: list[Prefix]
    """For each, ids that it may begin with and that others may share."""
    options: dict[str, Any]
    """Of ``Pretrained.compute``; requests with equal ones share batches."""
    finish: Callable[[Tensor], Tensor] = lambda rows: rows
    """What becomes of the results [n, ...]."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


class Result(NamedTuple):
    """What a request gets."""

    rows: NDArray[np.float32]
    """[n, ...], in the order of its sequences."""
    tokens: int
    """Tokens of all its sequences."""


@dataclass(eq=False)
class _Job:
    """A request on its way: its work is tokenised first, then computed group by group."""

    future: "Future[Result]"
    work: Work = field(init=False)
    groups: deque[tuple[list[int], int]] = field(default_factory=deque)
    """Sequence numbers of each group that is not computed yet, and the rows that they take."""
    results: list[Tensor] = field(default_factory=list)
    """Of the groups that are computed."""
    order: list[int] = field(default_factory=list)
    """Their sequence numbers."""

    def plan(self, work: Work, batch_tokens: int) -> None:
        self.work, lengths = work, [len(ids) for ids in work.sequences]
        shared = work.pretrained.shared(work.sequences, work.prefixes)
        for group in plan(lengths, batch_tokens, shared):
            own = sum(lengths[i] - len(shared[i]) for i in group)
            self.groups.append((group, own + sum(map(len, {shared[i] for i in group}))))


class Batcher:
    """Computes requests in batches that they share.

    Args:
        batch_tokens: most tokens of a batch, or one longer sequence; by default those of ``encode``.
        max_requests: requests that may wait or be computed.
        observe: is called with the texts and the tokens of every batch, in the thread that computes.

    Example:
        >>> embedder, batcher = Embedder.from_pretrained("tiny-embedding"), Batcher(max_requests=8)
        >>> work = Work(embedder, embedder.to_sequences(["rain fell"]), [()], {})
        >>> batcher.submit(lambda: work).result().rows.shape
        (1, 256)
        >>> batcher.close()
    """

    def __init__(
        self,
        *,
        batch_tokens: int | None = None,
        max_requests: int = 256,
        observe: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> None:
        self.batch_tokens, self.max_requests, self.observe = batch_tokens, max_requests, observe
        self.accepting = True
        """Whether requests are taken; False for good."""
        self.unfinished = 0
        """Requests that were taken and have no answer yet."""
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._tokeniser = ThreadPoolExecutor(1, "tokenise")
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are taken and computed."""
        return self.accepting and self._thread.is_alive()

    def submit(self, prepare: Callable[[], Work]) -> "Future[Result]":
        """Take a request; ``prepare`` tokenises it, in a thread of its own. A cancelled future is not computed.

        Raises QueueFull, Closed. The future raises what ``prepare`` raises, and FloatingPointError for results
        that are not finite.
        """
        with self._changed:
            if not self.accepting:
                raise Closed
            if self.unfinished >= self.max_requests:
                raise QueueFull
            self.unfinished += 1
        job = _Job(Future())
        job.future.add_done_callback(self._finished)
        self._tokeniser.submit(self._prepare, job, prepare)
        return job.future

    def close(self) -> None:
        """Take no more requests, and wait until those taken are finished."""
        with self._changed:
            self.accepting = False
            self._changed.notify_all()
        self._thread.join()
        self._tokeniser.shutdown()

    def _finished(self, _: "Future[Result]") -> None:
        with self._changed:
            self.unfinished -= 1
            self._changed.notify_all()

    def _prepare(self, job: _Job, prepare: Callable[[], Work]) -> None:
        if job.future.cancelled():
            return
        try:
            work = prepare()
            job.plan(work, self._limit(work))
        except Exception as error:
            _fail(job, error)
            return
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def _limit(self, work: Work) -> int:
        return self.batch_tokens or BATCH_TOKENS.get(work.pretrained.device.type, 4096)

    def _run(self) -> None:
        use_threads()
        while True:
            with self._changed:
                while not (taken := self._take()):
                    if not self.accepting and not self.unfinished:
                        return
                    self._changed.wait()
            self._compute(taken)
            with self._changed:
                self._waiting.extend(job for job, _ in taken if job.groups)

    def _take(self) -> list[tuple[_Job, list[int]]]:
        """The groups of the next batch; what has left is forgotten."""
        taken: list[tuple[_Job, list[int]]] = []
        others: deque[_Job] = deque()
        free = 0
        for job in self._waiting:
            if job.future.cancelled():
                continue
            group, rows = job.groups[0]
            first, work = taken[0][0].work if taken else job.work, job.work
            if taken and (rows > free or work.pretrained is not first.pretrained or work.options != first.options):
                others.append(job)
                continue
            free = (free if taken else self._limit(work)) - rows
            taken.append((job, group))
            job.groups.popleft()
        self._waiting = others
        return taken

    def _compute(self, taken: list[tuple[_Job, list[int]]]) -> None:
        """Compute a batch; where it fails, each request by itself, so that none fails for another's fault."""
        try:
            results = self._results(taken)
        except Exception as error:
            if len(taken) == 1:
                _fail(taken[0][0], error)
            for one in taken if len(taken) > 1 else ():
                self._compute([one])
            return
        for (job, group), rows in zip(taken, results.split([len(group) for _, group in taken]), strict=True):
            job.results.append(rows)
            job.order += group
            if not job.groups:
                _finish(job)

    @torch.no_grad()
    def _results(self, taken: list[tuple[_Job, list[int]]]) -> Tensor:
        work = taken[0][0].work
        pretrained = work.pretrained
        sequences = [job.work.sequences[i] for job, group in taken for i in group]
        prefixes = [job.work.prefixes[i] for job, group in taken for i in group]
        results, order = [], []
        for batch in pretrained.pack_block(list(range(len(sequences))), sequences, prefixes, self._limit(work)):
            self.observe(len(batch.indices), len(batch.input_ids))
            results.append(pretrained.compute(batch, **work.options))
            order += batch.indices.tolist()
        return _in_order(results, order)


def _in_order(results: list[Tensor], order: list[int]) -> Tensor:
    """Rows of several results, whose places are ``order``."""
    rows = torch.cat(results)
    return rows[torch.tensor(order, device=rows.device).argsort()]


def _finish(job: _Job) -> None:
    """Give a request its results, unless it has left."""
    try:
        rows = job.work.finish(_in_order(job.results, job.order))
        if not is_finite(rows):
            raise FloatingPointError("results: expected finite numbers, found inf or nan")
        result = Result(rows.float().cpu().numpy(), job.work.tokens)
    except Exception as error:
        _fail(job, error)
        return
    if job.future.set_running_or_notify_cancel():
        job.future.set_result(result)


def _fail(job: _Job, error: Exception) -> None:
    job.groups.clear()
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
