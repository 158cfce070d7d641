"""The Qwen3 decoder on packed sequences; parameter names are the checkpoint's own.

``T`` packed tokens, ``H`` hidden size, ``Hq``/``Hkv`` query/key heads, ``D`` head dimension, ``I`` MLP width.
Operations that a kernel may replace go through ``ops``; ``tap(name, x)`` returns x, or what an edit made of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .batch import ALL, PackedBatch, Reach
from .config import Qwen3Config
from .hooks import Tap, Taps, untapped
from .ops import Ops, resolve
from .reference import p_yes, yes_minus_no


MLP_ROWS = 2048
"""Tokens that go through an MLP at a time: its activations are the widest of a layer."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, op: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        """``op`` is ``ops.rms_norm``, or one that does more with the same weight, given the rest of its arguments."""
        return op(x, self.weight, self.eps, *args)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # per head, before RoPE
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, reach: Reach, ops: Ops, tap: Tap) -> Tensor:
        rows = reach.queries
        q, k, v = (
            proj(y).unflatten(-1, (-1, self.head_dim))
            for proj, y in ((self.q_proj, x[rows]), (self.k_proj, x), (self.v_proj, x))
        )
        v = tap("v", v)
        if ops.qk_norm_rope and rows is ALL:
            q, k = ops.qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, cos, sin)
        else:
            q = ops.rope(self.q_norm(ops.rms_norm, q), cos[rows], sin[rows])
            k = ops.rope(self.k_norm(ops.rms_norm, k), cos, sin)
        q, k = tap("q", q), tap("k", k)
        lengths = (reach.cu_seqlens_q, reach.cu_seqlens_k, reach.max_seqlen_q, reach.max_seqlen_k)
        z = tap("z", ops.attention(q, k[reach.keys], v[reach.keys], *lengths))
        return self.o_proj(z.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, ops: Ops, tap: Tap) -> Tensor:
        blocks = x.split(MLP_ROWS) if tap is untapped else [x]
        return torch.cat(
            [self.down_proj(tap("mlp_act", ops.swiglu(self.gate_proj(y), self.up_proj(y)))) for y in blocks]
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, reach: Reach, ops: Ops, tap: Tap) -> Tensor:
        """The residual stream [T, H] through one layer, of which ``reach.queries`` go on."""
        x = tap("resid_pre", x)
        attn_norm = tap("attn_norm", self.input_layernorm(ops.rms_norm, x))
        attn_out = tap("attn_out", self.self_attn(attn_norm, cos, sin, reach, ops, tap))
        x = x[reach.queries]
        if ops.add_rms_norm:
            mlp_norm, x = self.post_attention_layernorm(ops.add_rms_norm, x, attn_out)
        else:
            x = tap("resid_mid", x + attn_out)
            mlp_norm = self.post_attention_layernorm(ops.rms_norm, x)
        x = x + tap("mlp_out", self.mlp(tap("mlp_norm", mlp_norm), ops, tap))
        return tap("resid_post", x)


class Qwen3Model(nn.Module):
    """``model(batch)`` gives hidden states, ``model.embed`` a vector of each sequence, ``model.score`` its P(yes).

    ``lm_head`` exists only where a reranker's head is not tied to ``embed_tokens``.
    """

    def __init__(self, config: Qwen3Config, ops: Ops | str = "auto", *, lm_head: bool = False) -> None:
        super().__init__()
        self.config = config
        self.ops = resolve(ops)
        self.taps = Taps()
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there, a normal_ that fills nothing imports half of torch (1.5 s)
            weight.normal_(std=0.02)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head else None

    def residual(self, batch: PackedBatch, *, last: bool = False) -> Tensor:
        """The residual stream [T, H] out of the last layer, before the final norm.

        last: only each text's last token [N, H] goes through the last layer, which the others reach as keys and values.
        """
        x = self.taps.scope(batch)("embed", self.embed_tokens(batch.input_ids))
        cos, sin = rope_cos_sin(batch.position_ids, self.config, x.dtype)
        # Fused, the point between add and norm could not be edited.
        ops = replace(self.ops, add_rms_norm=None) if self.taps.active else self.ops
        for i, layer in enumerate(self.layers):
            reach = batch.last if last and i == len(self.layers) - 1 else batch.all
            x = layer(x, cos, sin, reach, ops, self.taps.scope(batch, f"layers.{i}."))
        return x

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
    # On the CPU for every device, so that all share the same bits.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    inv_freq = (1.0 / config.rope_theta**exponents).to(position_ids.device)
    angles = position_ids.float()[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1).to(torch.promote_types(dtype, torch.float32))
    return angles.cos().to(dtype), angles.sin().to(dtype)
