"""Named points inside the model: ``capture`` records them, ``edit`` replaces them.

    with capture(embedder, "layers.*.resid_post", "layers.3.pattern") as acts:
        embedder.encode(texts)
    acts["layers.3.resid_post"]             # [T, H], packed, in the order computed
    acts.per_text("layers.3.pattern")       # one [Hq, length, length] per text, in the caller's order
    acts.at("layers.3.resid_post", text=1)  # [H], of text 1's last token; text=None: [N, H], of each text's
    acts.tokens                             # the strings of each text's tokens

    with edit(embedder, {"layers.3.attn_out": lambda x: 0 * x}):    # or lambda x, where: ..., see Where and edits.py
        embedder.encode(texts)

Both nest, in any mix: a point passes through them in the order in which they were entered, so an inner capture
sees what an outer edit made. They are gone when their block ends, however it ends.

Inside the block everything is computed, every text and token in every layer; a call outside leaves out what its result
does not need, and may differ in the last bits. Hooks belong to the model: calls of other threads pass through them too.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from .batch import PackedBatch
from .errors import InputError
from .points import PATTERN_POINTS, POINTS, TEXT_POINTS, Hook, Positions, Where

X = TypeVar("X")


class Activations(Mapping[str, Tensor]):
    """What a capture recorded, by point name; texts are in the caller's order, but packed rows in that computed."""

    def __init__(self, names: Sequence[str], decode: Callable[[Sequence[int]], str] | None = None) -> None:
        self._records: dict[str, list[tuple[Where, Tensor]]] = {name: [] for name in names}
        self._decode = decode

    def __getitem__(self, name: str) -> Tensor:
        """One point's tensor itself, or all passes concatenated in the order computed. Raises InputError if none.

        Of scores and pattern, the one text's; where there are several, ``per_text`` has them.
        """
        passes = [x for _, x in self._passes(name)]
        if len(passes) > 1 and name.endswith(PATTERN_POINTS):
            raise InputError(f"{name!r}: expected one text, found {len(passes)}: per_text({name!r}) gives one by one")
        return passes[0] if len(passes) == 1 else torch.cat(passes)

    def __iter__(self) -> Iterator[str]:
        return (name for name, passes in self._records.items() if passes)

    def __contains__(self, name: object) -> bool:
        return bool(self._records.get(str(name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def per_text(self, name: str) -> list[Tensor]:
        """One tensor per text, in the order in which the texts were given; of a point of one row per text, that row.

        Raises InputError where the capture saw more than one call (use one capture per call).
        """
        return _in_order(name, self._of_each(name))

    def at(self, name: str, text: int | None = 0, position: Positions = "last") -> Tensor:
        """One token's row of a point, [H] say; of scores and pattern, a query's [Hq, len_k]; of pooled, the text's.

        text: index in the caller's list; None for all, [N, H]. position: in the text, negative ones from its end; a
        list of them, or None for all, gives their rows, [positions, H]. Raises InputError.
        """
        if text is None:
            return torch.stack([self.at(name, each, position) for each in self.texts])
        for where, x in self._passes(name):
            if text in where.rows:
                numbers = where.numbers(text, "last" if name in TEXT_POINTS else position)
                rows = x.index_select(where.dim, torch.tensor(numbers, device=x.device))
                return rows.select(where.dim, 0) if isinstance(position, int | str) else rows
        raise InputError(f"text: expected one of the capture's, found {text!r}")

    @property
    def texts(self) -> list[int]:
        """The texts' indices in the caller's list, in the order of ``per_text``; with ``into``, those of one batch."""
        return [int(texts[0]) for texts in self._of_tokens(lambda where: where.texts)]

    @property
    def tokens(self) -> list[list[str]]:
        """The strings of each text's tokens. Raises InputError where the capture was of a model without tokenizer."""
        if self._decode is None:
            raise InputError("tokens: expected capture(embedder, ...) or capture(reranker, ...), found a bare model")
        return [[self._decode([i]) for i in ids.tolist()] for ids in self.input_ids]

    @property
    def input_ids(self) -> list[Tensor]:
        """Each text's tokens, [length] int64."""
        return self._of_tokens(lambda where: where.input_ids)

    @property
    def positions(self) -> list[Tensor]:
        """Each text's positions, [length] int64; from 0, unless it shares a prefix."""
        return self._of_tokens(lambda where: where.positions)

    def _of_tokens(self, values: Callable[[Where], Tensor]) -> list[Tensor]:
        name = next(iter(self), "")
        batches = {id(where.batch): where.batch for where, _ in self._passes(name)}.values()
        everywhere = [Where("embed", batch) for batch in batches]
        return _in_order(name, ((i, values(where)[rows]) for where in everywhere for i, rows in where.rows.items()))

    def _of_each(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for where, x in self._passes(name):
            for text, rows in where.rows.items():
                one = x if where.sequence is not None else x[rows]
                yield text, one[0] if name in TEXT_POINTS else one

    def _passes(self, name: str) -> list[tuple[Where, Tensor]]:
        if not self._records.get(name):
            raise InputError(f"point {name!r}: expected it in the capture, found {', '.join(self) or 'nothing'}")
        return self._records[name]


def _in_order(name: str, texts: Iterable[tuple[int, X]]) -> list[X]:
    """Values in the order of the texts' indices. Raises InputError where one comes twice."""
    found: dict[int, X] = {}
    for index, value in texts:
        if index in found:
            raise InputError(f"per_text({name!r}): expected one call in the capture, found text {index} twice")
        found[index] = value
    return [found[index] for index in sorted(found)]


class Stopped(Exception):
    """Raised at a capture's ``stop_at``; ``capture`` is the one that stops there."""

    def __init__(self, capture: object) -> None:
        self.capture = capture
        """The activations of the capture that stops."""


@contextmanager
def capture(
    of: Any,
    *patterns: str,
    stop_at: str | None = None,
    into: Callable[[Activations], Any] | None = None,
    detach: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Activations]:
    """Record every point whose name matches a pattern (shell-style, ``*``), without copying or detaching.

    Args:
        of: an Embedder, a Reranker, or a model; every call of it inside the block is recorded.
        patterns: names of ``POINTS``, or patterns of them.
        stop_at: a point after which nothing is computed; ``encode`` and ``predict`` go through all batches and return
            None, a call of the model itself ends the block. It need not be recorded.
        into: a function that is given each batch's activations (``texts`` says whose), once complete; none are held
            here then, so that any number of texts passes in steady memory (``stream`` for more than fit in a list).
        detach, device, dtype: how tensors are stored: without their graph, where, and as what.

    Yields:
        Tensors by name, in the shapes and the dtype of ``POINTS``; ``per_text`` splits them by text.

    Raises:
        InputError: at once for a pattern that matches no point; at the end of the block where no point of a pattern was
            computed: the model did not run, or its operations or modules do not have that point.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> with capture(embedder, "layers.0.q", "layers.0.pattern") as acts:
        ...     vectors = embedder.encode(["gravity", "a violin"])
        >>> [x.shape[1:] for x in acts.per_text("layers.0.q")]
        [torch.Size([4, 64]), torch.Size([4, 64])]
        >>> acts.tokens[1], acts.at("layers.0.pattern", text=1).shape
        (['a', ' violin', '<|endoftext|>'], torch.Size([4, 3]))
    """
    model, tokenizer = _model(of), getattr(of, "tokenizer", None)
    if not patterns and stop_at is None:
        raise InputError("capture: expected one or more points to record, found none")
    names = _matching(model, patterns)
    if stop_at is not None:
        matched = _matching(model, [stop_at])[stop_at]
        if len(matched) > 1 or stop_at.endswith(PATTERN_POINTS):
            raise InputError(
                f"stop_at: expected one point, of all texts at once, such as layers.0.z, found {stop_at!r}"
            )
    recorded = list(dict.fromkeys(chain.from_iterable(names.values())))
    acts = Activations(recorded, tokenizer and tokenizer.decode)
    recorder = _Recorder(acts, stop_at, into, detach, device, dtype)
    try:
        with _active(model, Hook(frozenset([*recorded, stop_at or ""]), recorder.record)):
            yield acts
    except Stopped as stopped:
        if stopped.capture is not acts:
            raise
    _require_computed(names, recorder.computed)
    recorder.hand_over()


@dataclass
class _Recorder:
    """What a capture does at its points; the first fields are its arguments."""

    acts: Activations
    stop_at: str | None
    into: Callable[[Activations], Any] | None
    detach: bool
    device: torch.device | str | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        self.held = self.acts
        self.batch: PackedBatch | None = None
        self.computed: set[str] = set()
        self.grad_enabled = torch.is_grad_enabled()

    def record(self, x: Tensor, where: Where) -> Tensor:
        """Store a point's tensor; those of the batch before are handed over first."""
        if self.batch is not where.batch:
            self.hand_over()
            self.batch = where.batch
        self.computed.add(where.name)
        if where.name in self.held._records:
            stored = x.detach() if self.detach else x
            stored = stored.to(self.device or x.device, self.dtype or x.dtype)
            self.held._records[where.name].append((where, stored))
        if where.name == self.stop_at:
            raise Stopped(self.acts)
        return x

    def hand_over(self) -> None:
        """Give a batch's activations away, if they are to be."""
        if self.into is None:
            return
        complete, self.held = self.held, Activations([*self.held._records], self.acts._decode)
        if complete:
            with torch.set_grad_enabled(self.grad_enabled):  # encode runs without
                self.into(complete)


@contextmanager
def edit(of: Any, edits: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Replace points while the block runs.

    Args:
        of: an Embedder, a Reranker, or a model; every call of it inside the block is edited.
        edits: by name or pattern of ``POINTS``, a function of the point's tensor, or of that and ``Where``, that
            returns one of the same shape and dtype; ``edits.py`` has usual ones. A point that several patterns match
            passes through each in turn.

    Raises:
        InputError: as ``capture`` does, and where a function returns anything else than asked.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> before = embedder.encode("gravity")
        >>> with edit(embedder, {"layers.2.mlp_out": lambda x: 0 * x}):
        ...     after = embedder.encode("gravity")
        >>> bool((before == after).all())
        False
    """
    model = _model(of)
    names = _matching(model, edits)
    functions: dict[str, list[Callable[[Tensor, Where], Tensor]]] = {}
    for pattern, function in edits.items():
        for name in names[pattern]:
            functions.setdefault(name, []).append(with_where(function))
    computed: set[str] = set()

    def replace(x: Tensor, where: Where) -> Tensor:
        computed.add(where.name)
        for function in functions[where.name]:
            new = function(x, where)
            if not isinstance(new, Tensor) or (new.shape, new.dtype) != (x.shape, x.dtype):
                found = f"{list(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise InputError(f"edit of {where.name!r}: expected {list(x.shape)} {x.dtype}, found {found}")
            x = new
        return x

    with _active(model, Hook(frozenset(functions), replace)):
        yield
    _require_computed(names, computed)


def by_head(of: Any, layer: int, z: Tensor) -> Tensor:
    """What each query head adds to the residual stream: z [T, Hq, D] of a layer to [T, Hq, H], whose sum is attn_out.

    of: an Embedder, a Reranker, or a model. A single row of z, [Hq, D], gives [Hq, H].
    """
    weight = _model(of).layers[layer].self_attn.o_proj.dense()
    return torch.einsum("...hd,ohd->...ho", z, weight.to(z.dtype).unflatten(1, z.shape[-2:]))


def with_where(function: Callable[..., Tensor]) -> Callable[[Tensor, Where], Tensor]:
    """A function of (x, where), also from one of x alone: it is given ``where`` if it has a second argument to fill."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except ValueError:  # of some built-in functions, which take x alone
        parameters = []
    wanted = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return function if len(wanted) > 1 else lambda x, where: function(x)


def _model(of: Any) -> Any:
    model = getattr(of, "model", of)
    if not hasattr(model, "hooks"):
        raise InputError(f"expected an Embedder, a Reranker or their model, found {type(of).__name__}")
    return model


@contextmanager
def _active(model: Any, hook: Hook) -> Iterator[None]:
    model.hooks.append(hook)
    try:
        yield
    finally:
        model.hooks.remove(hook)


def _matching(model: Any, patterns: Iterable[str]) -> dict[str, list[str]]:
    """The names that each pattern matches. Raises InputError for one that matches none."""
    layers = range(len(model.layers))
    names = [n for p in POINTS for n in ([p.format(i=i) for i in layers] if "{i}" in p else [p])]
    found = {pattern: [name for name in names if _matches(name, pattern)] for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise InputError(
                f"point {pattern!r}: expected a name or pattern of {', '.join(POINTS)} with i in 0..{len(layers) - 1}"
            )
    return found


def _matches(name: str, pattern: str) -> bool:
    _, _, point = name.rpartition(".")
    return fnmatchcase(name, pattern) and (point not in PATTERN_POINTS or pattern.endswith(point))


def _require_computed(names: Mapping[str, Sequence[str]], computed: Container[str]) -> None:
    for pattern, matched in names.items():
        if not any(name in computed for name in matched):
            raise InputError(
                f"point {pattern!r}: expected it to be computed inside the block, found that it was not: the model did "
                "not run, or not to there, or has other modules or operations in its place"
            )
