"""Named points inside the model, and what passes through them: ``hooks.py`` records points, and replaces them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .batch import PackedBatch
from .errors import InputError

POINTS = {
    "embed": "[T, H] token embeddings",
    "layers.{i}.resid_pre": "[T, H] residual stream into the layer",
    "layers.{i}.attn_norm": "[T, H] into attention, after input_layernorm",
    "layers.{i}.q_pre": "[T, Hq, D] queries out of q_proj, before q_norm and RoPE",
    "layers.{i}.k_pre": "[T, Hkv, D] keys out of k_proj, before k_norm and RoPE",
    "layers.{i}.q": "[T, Hq, D] queries after q_norm and RoPE",
    "layers.{i}.k": "[T, Hkv, D] keys after k_norm and RoPE",
    "layers.{i}.v": "[T, Hkv, D] values",
    "layers.{i}.scores": "[Hq, len_q, len_k] of one text: scaled products of q and k, -inf where masked",
    "layers.{i}.pattern": "[Hq, len_q, len_k] of one text: softmax of scores, what multiplies v",
    "layers.{i}.z": "[T, Hq, D] attention output per query head, before o_proj",
    "layers.{i}.attn_out": "[T, H] what attention adds to the residual stream",
    "layers.{i}.resid_mid": "[T, H] residual stream after attention",
    "layers.{i}.mlp_norm": "[T, H] into the MLP, after post_attention_layernorm",
    "layers.{i}.gate": "[T, I] out of gate_proj",
    "layers.{i}.up": "[T, I] out of up_proj",
    "layers.{i}.mlp_act": "[T, I] silu(gate) * up, into down_proj",
    "layers.{i}.mlp_out": "[T, H] what the MLP adds to the residual stream",
    "layers.{i}.resid_post": "[T, H] residual stream out of the layer",
    "final_norm": "[T, H] last hidden states, final norm applied",
    "pooled": "[N, dim] float32, one row per text: the embedding (before Dense), or the reranker's last hidden state",
    "logit": "[N] float32, a reranker's score before the sigmoid; [N, labels] where it has several",
    "score": "[N] float32, P(yes); [N, labels] where it has several",
}
"""Every point and its shape. TransformerLens has other names for some: its ``hook_q`` is ``q_pre`` here, ``hook_rot_q``
``q``, ``hook_attn_scores`` ``scores``, ``hook_pattern`` ``pattern``, ``hook_pre`` ``gate``, ``hook_pre_linear`` ``up``,
``hook_post`` ``mlp_act``, and ``hook_result`` what ``hooks.by_head`` gives.

``scores`` and ``pattern`` are computed only where a pattern ends in their own name (``*`` does not ask for them):
attention is then that of ``reference.py`` on the same q, k and v, whatever the ops, and z may differ in the last bits.
"""

TEXT_POINTS = ("pooled", "logit", "score")
"""Points of one row per text."""
PATTERN_POINTS = ("scores", "pattern")
"""Points of one tensor per text, which grow by the square of its length."""


@dataclass(frozen=True)
class Where:
    """What the rows of a point's tensor are: of its first dimension, of ``scores`` and ``pattern`` the queries."""

    name: str
    """Full name of the point."""
    batch: PackedBatch
    """The batch that is computed."""
    sequence: int | None = None
    """Which of the batch's sequences, where the tensor is one sequence's: scores and pattern."""

    @cached_property
    def rows(self) -> dict[int, slice]:
        """Each text's rows, by its index in the caller's list, in the order computed; shared prefixes are nobody's."""
        indices, starts = self.batch.indices.tolist(), self.batch.text_cu_seqlens.tolist()
        if self.sequence is not None:
            number = self.sequence - (len(self.batch.cu_seqlens) - len(starts))
            return {indices[number]: slice(0, starts[number + 1] - starts[number])} if number >= 0 else {}
        if self.name in TEXT_POINTS:
            return {index: slice(n, n + 1) for n, index in enumerate(indices)}
        return {index: slice(*ends) for index, *ends in zip(indices, starts, starts[1:], strict=False)}

    @cached_property
    def texts(self) -> Tensor:
        """[rows] int64: the index of each row's text in the caller's list, -1 for a shared prefix."""
        texts = torch.full_like(self.positions, -1)
        for index, rows in self.rows.items():
            texts[rows] = index
        return texts

    @property
    def positions(self) -> Tensor:
        """[rows] int64: each row's position in its text, from 0, shared prefix included."""
        return self.batch.position_ids[self._tokens]

    @property
    def input_ids(self) -> Tensor:
        """[rows] int64: each row's token; where a row is a text's, its last."""
        return self.batch.input_ids[self._tokens]

    @property
    def _tokens(self) -> Tensor | slice:
        """The rows of the batch that these are."""
        if self.sequence is not None:
            return slice(*self.batch.cu_seqlens[self.sequence : self.sequence + 2].tolist())
        return self.batch.last_token.queries if self.name in TEXT_POINTS else slice(None)

    @property
    def dim(self) -> int:
        """The dimension of the tensor that has these rows."""
        return 0 if self.sequence is None else 1

    def numbers(self, text: int, positions: "Positions" = None) -> list[int]:
        """The rows of one text at these positions, in the tensor. Raises InputError for one that is not there."""
        rows = self.rows[text]
        first, length = int(self.positions[rows.start]), rows.stop - rows.start
        listed = several(positions)
        if listed is None:
            return list(range(rows.start, rows.stop))
        wanted = [-1 if p == "last" else p for p in listed]
        found = [p - first if p >= 0 else p + length for p in wanted if isinstance(p, int)]
        if len(found) != len(wanted) or not all(0 <= n < length for n in found):
            raise InputError(
                f"positions: expected 'last', or numbers from {first} to {first + length - 1} or from {-length} to -1, "
                f"of text {text}, found {positions!r}"
            )
        return [rows.start + n for n in found]


Positions = int | str | Sequence[int | str] | None
"""Tokens of a text: ``"last"``, a number or several, negative ones counted from the end, or None for all."""


def several(positions: Positions) -> Sequence[int | str] | None:
    """A list of positions, also from a single one; None stays None."""
    return [positions] if isinstance(positions, int | str) else positions


@dataclass(frozen=True, eq=False)
class Hook:
    """A function of a point's tensor; what it returns goes on in the tensor's place."""

    points: frozenset[str]
    """Full names."""
    function: Callable[[Tensor, Where], Tensor]
    """What is called with the tensor of each of them."""


@dataclass(frozen=True)
class Hooks:
    """A model's hooks in one forward pass: ``hook(name, x)`` is x, or what they made of it."""

    active: Sequence[Hook]
    """In the order in which they were entered."""
    batch: PackedBatch
    """The batch that is computed."""
    prefix: str = ""
    """What comes before each name."""

    def __call__(self, name: str, x: Tensor, sequence: int | None = None) -> Tensor:
        for hook in self.active:
            if self.prefix + name in hook.points:
                x = hook.function(x, Where(self.prefix + name, self.batch, sequence))
        return x

    def ask(self, names: Iterable[str]) -> bool:
        """Whether one of these points is asked for."""
        return bool(self.active) and any(self.prefix + name in hook.points for name in names for hook in self.active)
