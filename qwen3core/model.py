"""The Qwen3 decoder on packed sequences; parameter names are the checkpoint's own.

``T`` packed tokens, ``H`` hidden size, ``Hq``/``Hkv`` query/key heads, ``D`` head dimension, ``I`` MLP width.
Operations that a kernel may replace go through ``ops``; ``tap(name, x)`` returns x, or what an edit made of it.
"""

import torch
from torch import Tensor, nn

from .batch import PackedBatch
from .config import Qwen3Config
from .hooks import Tap, Taps
from .ops import Ops, resolve


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, ops: Ops, tap: Tap) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), ops)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), ops)
        v = tap("v", self.v_proj(x).unflatten(-1, (-1, self.head_dim)))
        q, k = ops.rope(q, k, cos, sin)
        q, k = tap("q", q), tap("k", k)
        lengths = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
        z = tap("z", ops.attention(q, k, v, *lengths))
        return self.o_proj(z.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, ops: Ops, tap: Tap) -> Tensor:
        return self.down_proj(tap("mlp_act", ops.swiglu(self.gate_proj(x), self.up_proj(x))))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch, ops: Ops, tap: Tap) -> Tensor:
        """The residual stream [T, H] through one layer."""
        x = tap("resid_pre", x)
        attn_norm = tap("attn_norm", self.input_layernorm(x, ops))
        x = x + tap("attn_out", self.self_attn(attn_norm, cos, sin, batch, ops, tap))
        x = tap("resid_mid", x)
        mlp_norm = tap("mlp_norm", self.post_attention_layernorm(x, ops))
        x = x + tap("mlp_out", self.mlp(mlp_norm, ops, tap))
        return tap("resid_post", x)


class Qwen3Model(nn.Module):
    """``model(batch)`` gives hidden states, ``model.pool`` the vector of each sequence.

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

    def forward(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, H], final norm applied (transformers' ``last_hidden_state``), in the model's dtype."""
        tap = self.taps.scope(batch)
        x = tap("embed", self.embed_tokens(batch.input_ids))
        cos, sin = rope_cos_sin(batch.position_ids, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, batch, self.ops, self.taps.scope(batch, f"layers.{i}."))
        return tap("final_norm", self.norm(x, self.ops))

    def pool(
        self, hidden_states: Tensor, batch: PackedBatch, *, dim: int | None = None, normalize: bool = True
    ) -> Tensor:
        """Each sequence's last hidden state, cut to ``dim``, normalised; [T, H] to [N, dim] float32."""
        pooled = self.ops.pool(hidden_states, batch.cu_seqlens, dim or self.config.hidden_size, normalize)
        return self.taps.scope(batch)("pooled", pooled)

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
