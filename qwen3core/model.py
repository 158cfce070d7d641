"""The Qwen3 decoder on packed sequences; parameter names are the checkpoint's own.

``T`` packed tokens, ``H`` hidden size, ``Hq``/``Hkv`` query/key heads, ``D`` head dimension, ``I`` MLP width.
Operations that a kernel may replace come from ``ops``; ``hook(name, x)`` returns x, or what an edit made of it.

Layers and their parts may be replaced by assignment (``model.layers[3].mlp = mine``), and left out
(``model.layers = model.layers[:12]``). A module that is not of this file's classes is called with x [T, H] alone, and
no shortcut is taken around it unless ``reference.declare(row_wise=True)`` decorates its class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from . import int8, reference
from .batch import KeysValues, PackedBatch, VarlenLayout
from .config import Qwen3Config, Yarn
from .errors import InputError
from .layout import LAST_TOKEN, Dense, Layout, Normalize
from .ops import Ops, call, resolve
from .points import PATTERN_POINTS, Hook, Hooks
from .reference import allows, declare

ROWS_PER_BLOCK = {"cpu": 1024}
"""Rows at a time through an MLP and the projections of q, k and v: a long text needs no more memory there than that."""


@dataclass(frozen=True)
class Context:
    """What the parts of one layer share in one forward pass."""

    ops: Ops
    cos: Tensor
    """[T, D], of the rows' positions."""
    sin: Tensor
    block_rows: int
    """Rows at a time, where no row depends on another."""
    hook: Hooks
    """The layer's: ``hook(name, x)`` at each point."""
    keys_values: KeysValues | None = None
    """Where each layer adds its keys and values, if they are asked for."""


class Qwen3Model(nn.Module):
    """A Qwen3 decoder: ``model(batch)`` gives hidden states, ``embed`` a vector for each text, ``scores`` its P(yes).

    ``lm_head`` exists only where a reranker's is not tied to ``embed_tokens``. Threads may share a model while nobody
    changes it; ``capture`` and ``edit`` concern every call of every thread.

    Args:
        config: the architecture's numbers.
        ops: a set of operations, or its name (``ops.resolve``).
        lm_head: whether the checkpoint has an output matrix of its own that is needed.
        layout: what surrounds the decoder; that of the model cards by default.

    Example:
        >>> model = Qwen3Model(Qwen3Config(50, 8, 16, 2, 2, 1, 64, 1e6, head_dim=4))
        >>> model(pack([[1, 2, 3], [4]])).shape
        torch.Size([4, 8])
    """

    def __init__(
        self, config: Qwen3Config, ops: Ops | str = "auto", *, lm_head: bool = False, layout: Layout | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout or Layout()
        self.ops = resolve(ops)
        self.hooks: list[Hook] = []
        """The captures and edits that are active."""
        self.dtype: torch.dtype | None = None
        """Compute dtype, where it differs from the weights'."""
        weight = torch.empty(config.vocab_size, config.hidden_size)
        if not weight.is_meta:  # there, a normal_ that fills nothing imports half of torch (1.5 s)
            weight.normal_(std=0.02)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        """[vocab_size, H]."""
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        """``DecoderLayer`` each, or modules of your own; what is assigned here is what runs."""
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        """The final norm."""
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if lm_head else None
        scored = self.layout.score == "score"
        self.score = nn.Linear(config.hidden_size, len(self.layout.labels), bias=False) if scored else None
        """[labels, H], where a reranker's score is not a difference of logits."""
        for module in self.layout.modules:
            if isinstance(module, Dense):
                self.add_module(module.path, DenseLayer(module))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Last hidden states [T, H], final norm applied (transformers' ``last_hidden_state``), in the compute dtype."""
        return self._hook(batch)("final_norm", _run(self.norm, RMSNorm, self.run_layers(batch), self.ops.rms_norm))

    def embed(
        self, batch: PackedBatch, *, dim: int | None = None, normalize: bool | None = None, prompt_length: int = 0
    ) -> Tensor:
        """Each text's vector, pooled and through the layout's modules; [N, dim] float32.

        With shortcuts, no more of the last layer is computed than that needs. normalize: None as the layout says.
        prompt_length: tokens at the beginning that are not pooled, where the layout leaves prompts out.
        """
        normalize = self.layout.normalize if normalize is None else normalize
        if self.layout.modules:
            x = self._pooled(batch, None, False, prompt_length)
            return reference.cut(self.pass_on(x), dim, normalize)
        return self._pooled(batch, dim, normalize, prompt_length)

    def _pooled(self, batch: PackedBatch, dim: int | None, normalize: bool, prompt_length: int) -> Tensor:
        if not self.shortcuts:
            return self.pool(self(batch), batch, dim=dim, normalize=normalize, prompt_length=prompt_length)
        x, rows = self.run_layers(batch, last_token=True), batch.last_token.cu_seqlens_q
        width = dim or self.config.hidden_size
        if self.ops.norm_pool and isinstance(self.norm, RMSNorm):
            return self.norm(x, self.ops.norm_pool, rows, width, normalize)
        return self.ops.pool(_run(self.norm, RMSNorm, x, self.ops.rms_norm), rows, width, normalize)

    def tokens(self, batch: PackedBatch, *, normalize: bool = True) -> Tensor:
        """Every token's vector [T, dim] float32: through the layout's modules, where it is late interaction's."""
        x = reference.at_least_float32(self(batch))
        x = x if self.layout.pooling else self.pass_on(x)
        return F.normalize(x, dim=-1) if normalize else x

    def pass_on(self, x: Tensor) -> Tensor:
        """What the layout's modules make of vectors x [n, in]: [n, out] float32."""
        for module in self.layout.modules:
            x = F.normalize(x, dim=-1) if isinstance(module, Normalize) else self.get_submodule(module.path)(x)
        return x

    def logits(self, batch: PackedBatch, weight: Tensor | None) -> Tensor:
        """A reranker's raw scores [N] float32, before the sigmoid; [N, labels] where it has several.

        weight: of ``score_weight``.
        """
        pooled = self.embed(batch, normalize=False)
        # Not a product of matrices, whose bits would depend on the number of texts.
        logits = pooled if weight is None else (pooled[:, None] * weight.to(pooled.dtype)).sum(-1)
        return self._hook(batch)("logit", logits[:, 0] if logits.shape[1] == 1 else logits)

    def scores(self, batch: PackedBatch, weight: Tensor | None) -> Tensor:
        """A reranker's scores: P(yes) [N] float32 of each text's pooled hidden state; [N, labels] where it has several.

        weight: of ``score_weight``.
        """
        sigmoid, norm = self.layout.activation == "Sigmoid", isinstance(self.norm, RMSNorm)
        if self.ops.norm_score and norm and sigmoid and weight is not None and len(weight) == 1 and self.shortcuts:
            x, rows = self.run_layers(batch, last_token=True), batch.last_token.cu_seqlens_q
            return self.norm(x, self.ops.norm_score, rows, weight[0])
        return self._hook(batch)("score", _activation(self.layout.activation)(self.logits(batch, weight)))

    def score_weight(self, answers: Sequence[int]) -> Tensor | None:
        """The directions of a reranker's scores in the space of last hidden states, [labels, H] float32.

        answers: ids of yes and no, whose rows of the lm_head differ by the direction of P(yes), or of yes alone. None
        where the score comes from the layout's modules.
        """
        if self.layout.score == "modules":
            return None
        rows = reference.at_least_float32(self.lm_head_rows(answers) if self.score is None else self.score.weight)
        return rows[:1] - rows[1:] if self.score is None and len(rows) == 2 else rows

    @property
    def _pools_last_token(self) -> bool:
        """Whether the last row of each text is all that is pooled; where prompts are not, it must not be one's."""
        return self.layout.pooling == LAST_TOKEN and self.layout.include_prompt

    @property
    def shortcuts(self) -> bool:
        """Whether rows may be left out or shared: by pruning, by shared and cached prefixes, by equal texts.

        They may not while a hook is active, which must see every row, where an operation or a module does not declare
        what it takes, or where a token sees those after it, or the checkpoint pools more than the last.
        """
        usual = self.config.is_causal and self._pools_last_token
        return not self.hooks and usual and self.ops.shortcuts and self.row_wise

    @property
    def row_wise(self) -> bool:
        """Whether all modules are this file's, or declared to be row-wise."""
        kinds: set[type] = set()
        modules: list[Any] = [self.norm, *self.layers._modules.values()]
        while modules:  # level by level, which takes a tenth of the time of one by one
            kinds.update(map(type, modules))
            modules = [part for module in modules if type(module) in OWN for part in module._modules.values()]
        return all(allows(kind).row_wise for kind in kinds - OWN)

    def run_layers(
        self, batch: PackedBatch, *, last_token: bool = False, keys_values: KeysValues | None = None
    ) -> Tensor:
        """The residual stream [T, H] out of the last layer, before the final norm.

        Args:
            batch: on the model's device.
            last_token: only each text's last token [N, H] goes through the last layer; it attends to all others.
            keys_values: a list that receives every layer's keys and values.

        Raises:
            InputError: where texts share a prefix, and the ops do not declare that they may or the model is not causal.
        """
        if batch.shares_prefixes and not self.config.is_causal:
            raise InputError("pack: prefixes: expected a causal model, found is_causal false")
        if batch.shares_prefixes and not (self.ops.shortcuts and self.row_wise):
            found = self.ops if self.row_wise else "modules of one's own that do not"
            raise InputError(f"pack: prefixes: expected ops and modules that declare what sharing takes, found {found}")
        x = self.embed_tokens(batch.input_ids)
        x = self._hook(batch)("embed", x.to(self.dtype or x.dtype))
        cos, sin = rope_cos_sin(batch.position_ids, self.config, x.dtype)
        # Fused, the point between add and norm could not be edited.
        ops = replace(self.ops, add_rms_norm=None) if self.hooks else self.ops
        block_rows = ROWS_PER_BLOCK.get(x.device.type, 16384)
        if len(x) > block_rows and (self.hooks or not ops.row_wise or not self.row_wise):
            block_rows = len(x)
        for i, layer in enumerate(self.layers):
            layout = batch.last_token if last_token and i == len(self.layers) - 1 else batch.full
            hook = self._hook(batch, f"layers.{i}.")
            context = Context(ops, cos, sin, block_rows, hook, keys_values)
            prefix_kv = batch.prefix_kv[i] if batch.prefix_kv else None
            x = hook("resid_pre", x)
            x = hook("resid_post", _run(layer, DecoderLayer, x, layout, context, prefix_kv))
            if keys_values is not None and len(keys_values) == i:  # without attention of ours
                keys_values.append((x[:0], x[:0]))
        return x

    def keys_values(self, batch: PackedBatch) -> KeysValues:
        """Keys and values [T, Hkv, D] of every layer, for ``pack(..., prefix_kv=)`` to continue from."""
        keys_values: KeysValues = []
        self.run_layers(batch, keys_values=keys_values)
        return keys_values

    def pool(
        self,
        hidden_states: Tensor,
        batch: PackedBatch,
        *,
        dim: int | None = None,
        normalize: bool = True,
        prompt_length: int = 0,
    ) -> Tensor:
        """Each text's pooled hidden states, cut to ``dim``, normalised; [T, H] to [N, dim] float32."""
        modes = self.layout.pooling
        if batch.shares_prefixes and not self._pools_last_token:
            raise InputError(f"pack: prefixes: expected none where {', '.join(modes)} is pooled, found some")
        other = {} if self._pools_last_token else {"modes": modes, "prompt_length": prompt_length}
        width = dim or self.config.hidden_size * len(modes)
        pooled = call(self.ops.pool, hidden_states, batch.text_cu_seqlens, width, normalize, **other)
        return self._hook(batch)("pooled", pooled)

    @property
    def lm_head_name(self) -> str:
        """The parameter that turns hidden states into logits: ``lm_head.weight``, or the embeddings it is tied to."""
        return "lm_head.weight" if self.lm_head is not None else "embed_tokens.weight"

    def lm_head_rows(self, token_ids: Sequence[int]) -> Tensor:
        """The rows of these tokens [n, H] of the lm_head, in place of all."""
        weight = self.get_parameter(self.lm_head_name)
        return torch.stack([weight[i] for i in token_ids])  # an index tensor would make a GPU wait

    def _hook(self, batch: PackedBatch, prefix: str = "") -> Hooks:
        return Hooks(self.hooks, batch, prefix)

    def extra_repr(self) -> str:
        return f"{self.config},\n{self.ops}"


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, layout: VarlenLayout, context: Context, prefix_kv: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The residual stream [T, H] into the layer to that out of it [Tq, H], of the rows ``layout.queries``."""
        attn_norm = context.hook("attn_norm", _run(self.input_layernorm, RMSNorm, x, context.ops.rms_norm))
        attn_out = context.hook("attn_out", _run(self.self_attn, Attention, attn_norm, layout, context, prefix_kv))
        x, mlp_norm = self.add_and_norm(x[layout.queries], attn_out, context)
        return x + context.hook("mlp_out", _run(self.mlp, MLP, mlp_norm, context))

    def add_and_norm(self, x: Tensor, attn_out: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm, which the MLP reads; one operation where ops fuse them."""
        if context.ops.add_rms_norm and isinstance(self.post_attention_layernorm, RMSNorm):
            mlp_norm, x = self.post_attention_layernorm(x, context.ops.add_rms_norm, attn_out)
        else:
            x = context.hook("resid_mid", x + attn_out)
            mlp_norm = _run(self.post_attention_layernorm, RMSNorm, x, context.ops.rms_norm)
        return x, context.hook("mlp_norm", mlp_norm)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.options: dict[str, Any] = {} if config.is_causal else {"causal": False}
        """Nothing where causal, so that an attention of one's own need not take ``causal``."""
        q_size = config.num_attention_heads * self.head_dim
        kv_size = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, q_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(q_size, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)  # per head, before RoPE
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, layout: VarlenLayout, context: Context, prefix_kv: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Normed rows x [T, H] to what the querying rows [Tq, H] add to the residual stream."""
        q, k, v = in_blocks(partial(self.qkv, context), context.block_rows, x, context.cos, context.sin)
        if context.keys_values is not None:
            context.keys_values.append((k, v))
        if prefix_kv:
            k, v = (torch.cat(pair) for pair in zip(prefix_kv, (k, v), strict=True))
        attention, options = context.ops.attention, self.options
        if context.hook.ask(PATTERN_POINTS):  # which no fast attention has
            attention = reference.attention if allows(attention).causal else attention
            options = {**options, "hook": context.hook}
        lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k)
        z = call(attention, q[layout.queries], k[layout.keys], v[layout.keys], *lengths, **options)
        return self.o_proj(context.hook("z", z).flatten(-2), context.ops.linear)

    def qkv(self, context: Context, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of normed rows x [T, H] at the positions of cos, sin."""
        ops, hook = context.ops, context.hook
        products = _project(x, ops, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (product.unflatten(-1, (-1, self.head_dim)) for product in products)
        q, k, v = hook("q_pre", q), hook("k_pre", k), hook("v", v)
        if ops.qk_norm_rope and isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            weights = (norm.weight.to(q.dtype) for norm in (self.q_norm, self.k_norm))
            q, k = ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, cos, sin)
        else:
            q = ops.rope(_run(self.q_norm, RMSNorm, q, ops.rms_norm), cos, sin)
            k = ops.rope(_run(self.k_norm, RMSNorm, k, ops.rms_norm), cos, sin)
        return hook("q", q), hook("k", k), v


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        [out] = in_blocks(partial(self.block, context), context.block_rows, x)
        return out

    def block(self, context: Context, x: Tensor) -> tuple[Tensor]:
        gate, up = _project(x, context.ops, self.gate_proj, self.up_proj)
        gate, up = context.hook("gate", gate), context.hook("up", up)
        return (self.down_proj(context.hook("mlp_act", context.ops.swiglu(gate, up)), context.ops.linear),)


OWN = {DecoderLayer, Attention, MLP}
"""Modules whose parts decide what holds of them."""


@declare(row_wise=True)
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, op: Callable[..., Any] = reference.rms_norm, *args: Any) -> Any:
        """Apply ``ops.rms_norm``, or a fused op that takes the same weight and more arguments after eps."""
        return op(x, self.weight.to(x.dtype), self.eps, *args)


@declare(row_wise=True)
class Linear(nn.Linear):
    scale: Tensor | None
    """[out] float32, once the weight is int8."""
    packed: int8.Packed | None = None
    """Where this CPU has int8: the weights, of all that are ``quantize``d together; ``weight`` is then on meta."""
    rows = slice(None)
    """This weight's among them."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, x: Tensor, op: Callable[[Tensor, Tensor], Tensor] = reference.linear) -> Tensor:
        # op is an argument, not an attribute: replacing model.ops reaches every layer, and a module holds only weights.
        if self.scale is None:
            return op(x, self.weight)
        if self.packed is None:
            return reference.int8_linear(x, self.weight, self.scale)
        return self.packed.linear(x)[:, self.rows]

    def dense(self) -> Tensor:
        """The weight [out, in] in floating point, however it is stored."""
        if self.scale is None:
            return self.weight
        return (self.weight if self.packed is None else self.packed.weight()[self.rows]) * self.scale[:, None]


def quantize(*linears: Linear) -> None:
    """Round each row of weights that multiply the same x to 255 steps: half of bfloat16's memory, and no training."""
    pairs = [reference.int8_rows(linear.weight.detach().float()) for linear in linears]
    whole, scales = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    packed, start = int8.Packed(whole, scales) if int8.has_int8() else None, 0
    for linear, (weight, scale) in zip(linears, pairs, strict=True):
        linear.scale, linear.packed, linear.rows = scale, packed, slice(start, start + len(weight))
        linear.weight = nn.Parameter(weight if packed is None else weight.to("meta"), requires_grad=False)
        start += len(weight)


class DenseLayer(nn.Module):
    """``layout.Dense`` with its weights, in float32 or wider."""

    def __init__(self, module: Dense) -> None:
        super().__init__()
        self.linear = nn.Linear(module.in_features, module.out_features, bias=module.bias)
        projects = module.use_residual and module.in_features != module.out_features
        self.residual = nn.Linear(module.in_features, module.out_features, bias=False) if projects else None
        self.activation, self.use_residual = module.activation, module.use_residual

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.linear.bias is None else self.linear.bias.to(x.dtype)
        out = _activation(self.activation)(F.linear(x, self.linear.weight.to(x.dtype), bias))
        if not self.use_residual:
            return out
        return out + (x if self.residual is None else reference.linear(x, self.residual.weight))


def _run(module: nn.Module, own: type, x: Tensor, *args: Any) -> Tensor:
    """A module of this file's class ``own`` takes the arguments, another one x alone."""
    return module(x, *args) if isinstance(module, own) else module(x)


def _project(x: Tensor, ops: Ops, *projections: nn.Module) -> tuple[Tensor, ...]:
    """x through each of the projections; as one operation where ops fuse them, and nobody looks at one of them."""
    own = [p for p in projections if type(p) is Linear and not _hooked(p)]
    if ops.linears and len(own) == len(projections):
        if all(p.scale is None for p in own):
            return ops.linears(x, *(p.weight for p in own))
        if own[0].packed and all(p.packed is own[0].packed for p in own):
            return own[0].packed.linear(x).split([len(p.weight) for p in own], dim=1)
    return tuple(projection(x, ops.linear) for projection in projections)


def _hooked(module: nn.Module) -> bool:
    """Whether torch's own hooks are to be called with it, which is so where it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())


def _activation(name: str) -> nn.Module:
    return getattr(nn, name)()


def in_blocks(function: Callable[..., tuple[Tensor, ...]], size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``function(*tensors)`` on ``size`` rows at most; each row of its results depends on the same row only."""
    rows = len(tensors[0])
    if rows <= size:
        return function(*tensors)
    # Equal parts, since a small last one would read the weights again, of numbers of rows that oneDNN multiplies.
    size = min(size, -(-rows // -(-rows // size) // 64) * 64)
    parts = [function(*part) for part in zip(*(x.split(size) for x in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rope_cos_sin(position_ids: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of every position, angles in float32, cast to the compute dtype as transformers does."""
    inv_freq, scaling = rope_parameters(config.head_dim, config.rope_theta, config.rope_scaling, position_ids.device)
    angles = position_ids.float()[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1).to(torch.promote_types(dtype, torch.float32))
    cos, sin = angles.cos(), angles.sin()
    if scaling != 1:
        cos, sin = cos * scaling, sin * scaling
    return cos.to(dtype), sin.to(dtype)


@cache  # a copy to a GPU would wait for it
def rope_parameters(head_dim: int, rope_theta: float, yarn: Yarn | None, device: torch.device) -> tuple[Tensor, float]:
    """Angle of each pair per position [D / 2] float32, and what cos and sin are multiplied by.

    YaRN divides the angle by its factor where a pair makes fewer than ``beta_slow`` rotations in the original length,
    not at all where it makes more than ``beta_fast``, and in part between them.
    """
    # On the CPU for every device, so that all share the same bits.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    pos_freqs = rope_theta**exponents
    if yarn is None:
        return (1.0 / pos_freqs).to(device), 1.0
    low, high = (
        head_dim * math.log(yarn.original_max_position_embeddings / (beta * 2 * math.pi)) / (2 * math.log(rope_theta))
        for beta in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    unchanged = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    inv_freq = 1.0 / (yarn.factor * pos_freqs) * (1 - unchanged) + 1.0 / pos_freqs * unchanged
    scales = (yarn.mscale, yarn.mscale_all_dim) if yarn.mscale and yarn.mscale_all_dim else (1, 0)
    numerator, denominator = (0.1 * scale * math.log(max(yarn.factor, 1)) + 1.0 for scale in scales)
    scaling = numerator / denominator if yarn.attention_factor is None else yarn.attention_factor
    return inv_freq.to(device), scaling
