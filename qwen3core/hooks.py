"""Named points inside the model: ``capture`` records them, ``edit`` replaces them.

    with capture(model, "layers.*.resid_post") as acts:
        embedder.encode(texts)
    acts["layers.3.resid_post"]             # [T, H], packed, in the order computed
    acts.per_text("layers.3.resid_post")    # one [length, H] per text, in the caller's order

    with edit(model, {"layers.3.attn_out": lambda x: 0 * x}):
        embedder.encode(texts)

Both nest, in any mix: a point passes through them in the order in which they were entered, so an inner capture
sees what an outer edit made. They are gone when their block ends, however it ends.

Inside the block everything is computed, every text and token in every layer; a call outside leaves out what its result
does not need, and may differ in the last bits. Hooks belong to the model: calls of other threads pass through them too.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from .batch import PackedBatch
from .config import Qwen3Config
from .errors import InputError

POINTS = {
    "embed": "[T, H] token embeddings",
    "layers.{i}.resid_pre": "[T, H] residual stream into the layer",
    "layers.{i}.attn_norm": "[T, H] into attention, after input_layernorm",
    "layers.{i}.q": "[T, Hq, D] queries after q_norm and RoPE",
    "layers.{i}.k": "[T, Hkv, D] keys after k_norm and RoPE",
    "layers.{i}.v": "[T, Hkv, D] values",
    "layers.{i}.z": "[T, Hq, D] attention output per head, before o_proj",
    "layers.{i}.attn_out": "[T, H] what attention adds to the residual stream",
    "layers.{i}.resid_mid": "[T, H] residual stream after attention",
    "layers.{i}.mlp_norm": "[T, H] into the MLP, after post_attention_layernorm",
    "layers.{i}.mlp_act": "[T, I] silu(gate) * up, into down_proj",
    "layers.{i}.mlp_out": "[T, H] what the MLP adds to the residual stream",
    "layers.{i}.resid_post": "[T, H] residual stream out of the layer",
    "final_norm": "[T, H] last hidden states, final norm applied",
    "pooled": "[N, dim] float32, one row per text: the embedding (before Dense), or the reranker's last hidden state",
}


class Hookable(Protocol):
    """A model that passes its points through hooks: ``Qwen3Model``."""

    config: Qwen3Config
    hooks: list[Callable[[str, Tensor, PackedBatch], Tensor]]


class Activations(Mapping[str, Tensor]):
    """What a capture recorded, by point name."""

    def __init__(self, names: list[str]) -> None:
        self._records: dict[str, list[tuple[PackedBatch, Tensor]]] = {name: [] for name in names}

    def __getitem__(self, name: str) -> Tensor:
        """One point's tensor itself, or all passes concatenated in the order computed. Raises InputError if none."""
        passes = [x for _, x in self._passes(name)]
        return passes[0] if len(passes) == 1 else torch.cat(passes)

    def __iter__(self) -> Iterator[str]:
        return (name for name, passes in self._records.items() if passes)

    def __contains__(self, name: object) -> bool:
        return bool(self._records.get(str(name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def per_text(self, name: str) -> list[Tensor]:
        """One tensor per text, in the order in which the texts were given; ``pooled`` gives one [dim] row each.

        Raises InputError where the capture saw more than one call (use one capture per call).
        """
        texts: dict[int, Tensor] = {}
        for batch, x in self._passes(name):
            lengths = batch.cu_seqlens.diff().tolist()
            parts = x.unbind(0) if name == "pooled" else x.split(lengths)[-len(batch.indices) :]
            for index, part in zip(batch.indices.tolist(), parts, strict=True):
                if index in texts:
                    raise InputError(f"per_text({name!r}): expected one call in the capture, found text {index} twice")
                texts[index] = part
        return [texts[index] for index in sorted(texts)]

    def _passes(self, name: str) -> list[tuple[PackedBatch, Tensor]]:
        if not self._records.get(name):
            raise InputError(f"point {name!r}: expected it in the capture, found {', '.join(self) or 'nothing'}")
        return self._records[name]


@contextmanager
def capture(model: Hookable, *patterns: str) -> Iterator[Activations]:
    """Record every point whose name matches a pattern (shell-style, ``*``), without copying or detaching.

    Args:
        model: whose points; every call inside the block is recorded.
        patterns: names of ``POINTS``, or patterns of them.

    Yields:
        Tensors by name, in the shapes and the dtype of ``POINTS``; ``per_text`` splits them by text.

    Raises:
        InputError: at once for a pattern that matches no point; at the end of the block for a point that was never
            computed: the ops set fuses it away, or the model did not run.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> with capture(embedder.model, "layers.0.q") as acts:
        ...     vectors = embedder.encode(["gravity", "a violin"])
        >>> [x.shape[1:] for x in acts.per_text("layers.0.q")]
        [torch.Size([4, 64]), torch.Size([4, 64])]
    """
    names = _matching(model, patterns)
    acts = Activations(names)

    def record(name: str, x: Tensor, batch: PackedBatch) -> Tensor:
        if name in acts._records:
            acts._records[name].append((batch, x))
        return x

    with _active(model, record):
        yield acts
    _require_computed(names, acts)


@contextmanager
def edit(model: Hookable, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace points while the block runs.

    Args:
        model: whose points; every call inside the block is edited.
        edits: by name or pattern of ``POINTS``, a function of the point's tensor that returns one of the same shape
            and dtype. A point that several patterns match passes through each in turn.

    Raises:
        InputError: as ``capture`` does, and where a function returns anything else than asked.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> before = embedder.encode("gravity")
        >>> with edit(embedder.model, {"layers.2.mlp_out": lambda x: 0 * x}):
        ...     after = embedder.encode("gravity")
        >>> bool((before == after).all())
        False
    """
    functions: dict[str, list[Callable[[Tensor], Tensor]]] = {}
    for pattern, function in edits.items():
        for name in _matching(model, [pattern]):
            functions.setdefault(name, []).append(function)
    seen = set()

    def replace(name: str, x: Tensor, batch: PackedBatch) -> Tensor:
        for function in functions.get(name, ()):
            seen.add(name)
            new = function(x)
            if not isinstance(new, Tensor) or (new.shape, new.dtype) != (x.shape, x.dtype):
                found = f"{list(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise InputError(f"edit of {name!r}: expected {list(x.shape)} {x.dtype}, found {found}")
            x = new
        return x

    with _active(model, replace):
        yield
    _require_computed(list(functions), seen)


@contextmanager
def _active(model: Hookable, hook: Callable[[str, Tensor, PackedBatch], Tensor]) -> Iterator[None]:
    model.hooks.append(hook)
    try:
        yield
    finally:
        model.hooks.remove(hook)


def _matching(model: Hookable, patterns: Sequence[str]) -> list[str]:
    layers = range(model.config.num_hidden_layers)
    names = [n for p in POINTS for n in ([p.format(i=i) for i in layers] if "{i}" in p else [p])]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"point {pattern!r}: expected a name or pattern of {', '.join(POINTS)} with i in 0..{len(layers) - 1}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _require_computed(names: list[str], computed: Container[str]) -> None:
    missing = [name for name in names if name not in computed]
    if missing:
        raise InputError(
            f"point {missing[0]!r}: expected it to be computed inside the block, found that it was not: "
            "the model did not run, or its ops fuse this point away (ops='reference' computes all)"
        )
