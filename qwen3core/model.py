"""The Qwen3 decoder on packed sequences; parameter names are the checkpoint's own.

``T`` packed tokens, ``H`` hidden size, ``Hq``/``Hkv`` query/key heads, ``D`` head dimension, ``I`` MLP width.
Operations that a kernel may replace go through ``ops``; ``tap(name, x)`` returns x, or what an edit made of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .batch import KeysValues, PackedBatch, Reach
from .config import Qwen3Config
from .hooks import Tap, Taps
from .ops import Ops, resolve
from .reference import p_yes, yes_minus_no

BLOCK = {"cpu": 1024}
"""Rows that go through a layer at a time, attention aside: a long text needs no more memory for its MLPs than that."""


class Linear(nn.Linear):
    scale: Tensor | None = None
    """[out] float32, once the weight is int8."""

    def forward(self, x: Tensor, op: Callable[[Tensor, Tensor], Tensor] = reference.linear) -> Tensor:
        return op(x, self.weight) if self.scale is None else reference.int8_linear(x, self.weight, self.scale)

    def quantize(self) -> None:
        """Round each row of the weight to 255 steps: a quarter of float32's memory, and the end of its training."""
        weight, self.scale = reference.int8_rows(self.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, op: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        """``op`` is ``ops.rms_norm``, or one that does more with the same weight, given the rest of its arguments."""
        return op(x, self.weight.to(x.dtype), self.eps, *args)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # per head, before RoPE
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor, ops: Ops, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of normed rows x [T, H]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x, ops.linear).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        if ops.qk_norm_rope:
            weights = (norm.weight.to(q.dtype) for norm in (self.q_norm, self.k_norm))
            q, k = ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, cos, sin)
        else:
            q = ops.rope(self.q_norm(ops.rms_norm, q), cos, sin)
            k = ops.rope(self.k_norm(ops.rms_norm, k), cos, sin)
        return tap("q", q), tap("k", k), tap("v", v)


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, ops: Ops, tap: Tap) -> Tensor:
        gate, up = self.gate_proj(x, ops.linear), self.up_proj(x, ops.linear)
        return self.down_proj(tap("mlp_act", ops.swiglu(gate, up)), ops.linear)


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        reach: Reach,
        past: tuple[Tensor, Tensor] | None,
        ops: Ops,
        tap: Tap,
        block: int,
    ) -> Tensor:
        """The residual stream [T, H] through one layer, of which the rows ``reach.queries`` go on.

        past: keys and values that come before those of the rows. block: rows at a time, attention aside.
        """

        def before(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            attn_norm = tap("attn_norm", self.input_layernorm(ops.rms_norm, x))
            return self.self_attn.qkv(attn_norm, cos, sin, ops, tap)

        def after(x: Tensor, z: Tensor) -> tuple[Tensor]:
            attn_out = tap("attn_out", self.self_attn.o_proj(z.flatten(-2), ops.linear))
            if ops.add_rms_norm:
                mlp_norm, x = self.post_attention_layernorm(ops.add_rms_norm, x, attn_out)
            else:
                x = tap("resid_mid", x + attn_out)
                mlp_norm = self.post_attention_layernorm(ops.rms_norm, x)
            return (x + tap("mlp_out", self.mlp(tap("mlp_norm", mlp_norm), ops, tap)),)

        x = tap("resid_pre", x)
        q, k, v = in_blocks(before, block, x, cos, sin)
        if past:
            k, v = (torch.cat(pair) for pair in zip(past, (k, v), strict=True))
        lengths = (reach.cu_seqlens_q, reach.cu_seqlens_k, reach.max_seqlen_q, reach.max_seqlen_k)
        z = tap("z", ops.attention(q[reach.queries], k[reach.keys], v[reach.keys], *lengths))
        return tap("resid_post", *in_blocks(after, block, x[reach.queries], z))


def in_blocks(function: Callable[..., tuple[Tensor, ...]], size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)`` on ``size`` rows at a time; each row of its results depends on the same row only."""
    if len(tensors[0]) <= size:
        return function(*tensors)
    parts = [function(*rows) for rows in zip(*(x.split(size) for x in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class Qwen3Model(nn.Module):
    """``model(batch)`` gives hidden states, ``model.embed`` a vector of each sequence, ``model.score`` its P(yes).

    ``lm_head`` exists only where a reranker's head is not tied to ``embed_tokens``.
    """

    def __init__(self, config: Qwen3Config, ops: Ops | str = "auto", *, lm_head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.ops = resolve(ops)
        self.taps = Taps()
        self.dtype: torch.dtype | None = None
        """Of the arithmetic, where it is not that of the weights."""
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there, a normal_ that fills nothing imports half of torch (1.5 s)
            weight.normal_(std=0.02)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head else None

    def residual(self, batch: PackedBatch, *, last: bool = False, taps: Taps | None = None) -> Tensor:
        """The residual stream [T, H] out of the last layer, before the final norm.

        last: only each text's last token [N, H] goes through the last layer, which the others reach as keys and values.
        """
        taps = taps or self.taps
        x = self.embed_tokens(batch.input_ids)
        x = taps.scope(batch)("embed", x.to(self.dtype or x.dtype))
        cos, sin = rope_cos_sin(batch.position_ids, self.config, x.dtype)
        # Fused, the point between add and norm could not be edited.
        ops = replace(self.ops, add_rms_norm=None) if taps.active else self.ops
        block = len(x) if taps.active else BLOCK.get(x.device.type, 16384)
        for i, layer in enumerate(self.layers):
            reach = batch.last if last and i == len(self.layers) - 1 else batch.all
            past = batch.past[i] if batch.past else None
            x = layer(x, cos, sin, reach, past, ops, taps.scope(batch, f"layers.{i}."), block)
        return x

    def keys_values(self, batch: PackedBatch) -> KeysValues:
        """Of every layer and token, for ``pack(..., past=)`` to continue from."""
        kept: dict[str, Tensor] = {}
        taps = Taps()
        taps.active.append(lambda name, x, batch: kept.setdefault(name, x) if name[-2:] in (".k", ".v") else x)
        self.residual(batch, taps=taps)
        return [(kept[f"layers.{i}.k"], kept[f"layers.{i}.v"]) for i in range(len(self.layers))]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, H], final norm applied (transformers' ``last_hidden_state``), in the model's dtype."""
        return self.taps.scope(batch)("final_norm", self.norm(self.ops.rms_norm, self.residual(batch)))

    def pool(
        self, hidden_states: Tensor, batch: PackedBatch, *, dim: int | None = None, normalize: bool = True
    ) -> Tensor:
        """Each text's last hidden state, cut to ``dim``, normalised; [T, H] to [N, dim] float32."""
        cu_seqlens = batch.cu_seqlens[-len(batch.indices) - 1 :]
        pooled = self.ops.pool(hidden_states, cu_seqlens, dim or self.config.hidden_size, normalize)
        return self.taps.scope(batch)("pooled", pooled)

    def embed(self, batch: PackedBatch, *, dim: int | None = None, normalize: bool = True) -> Tensor:
        """``pool(forward(batch))``, of the last layer no more than that needs unless a point is watched; [N, dim]."""
        if self.taps.active:
            return self.pool(self(batch), batch, dim=dim, normalize=normalize)
        x, rows, width = self.residual(batch, last=True), batch.last.cu_seqlens_q, dim or self.config.hidden_size
        if self.ops.norm_pool:
            return self.norm(self.ops.norm_pool, x, rows, width, normalize)
        return self.ops.pool(self.norm(self.ops.rms_norm, x), rows, width, normalize)

    def head_rows(self, token_ids: Sequence[int]) -> Tensor:
        """The rows of these tokens [n, H] of the head, in place of all."""
        head = self.lm_head or self.embed_tokens
        return head.weight[torch.tensor(token_ids, device=head.weight.device)]

    def score(self, batch: PackedBatch, yes_no: Tensor) -> Tensor:
        """P(yes) [N] float32 of each sequence's last hidden state, from the rows of yes and no [2, H] of the head."""
        if self.ops.norm_score is None or self.taps.active:
            return p_yes(self.embed(batch, normalize=False), yes_no)
        x, rows = self.residual(batch, last=True), batch.last.cu_seqlens_q
        return self.norm(self.ops.norm_score, x, rows, yes_minus_no(yes_no))

    def extra_repr(self) -> str:
        return f"{self.config},\n{self.ops}"


def rope_cos_sin(position_ids: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of every position, angles in float32, cast to the model's dtype as transformers does."""
    angles = position_ids.float()[:, None] * _inv_freq(config.head_dim, config.rope_theta, position_ids.device)
    angles = torch.cat((angles, angles), dim=-1).to(torch.promote_types(dtype, torch.float32))
    return angles.cos().to(dtype), angles.sin().to(dtype)


@cache  # a copy to a GPU would wait for it
def _inv_freq(head_dim: int, rope_theta: float, device: torch.device) -> Tensor:
    # On the CPU for every device, so that all share the same bits.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / rope_theta**exponents).to(device)
