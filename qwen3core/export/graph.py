"""The decoder as an ONNX graph of padded batches, operator by operator: ids and mask to vectors, or to scores.

The arithmetic is that of ``reference.py`` in float32, on [B, L] in place of packed rows; opset 23 has operators for
RMSNorm, RoPE and grouped-query attention. Padding may be on either end: positions count the tokens that the mask shows,
and the last of them is pooled. Tensors have the checkpoint's names, those of ``Linear`` its transpose, [in, out].
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..layout import Dense, Normalize
from ..model import DenseLayer, Qwen3Model, rope_parameters
from ..reranker import Reranker
from .source import Source, converted

OPSET, IR_VERSION = 23, 11
INPUTS = ("input_ids", "attention_mask")
"""Names of a graph's inputs."""
ACTIVATIONS = {
    **{name: name for name in ("Identity", "Sigmoid", "Tanh", "Mish", "Softplus", "Softsign")},
    **{"ReLU": "Relu", "GELU": "Gelu", "ELU": "Elu", "SELU": "Selu", "CELU": "Celu", "LeakyReLU": "LeakyRelu"},
    "Hardswish": "HardSwish",
}
"""Operators by the class of torch.nn that they compute as they are."""


class Builder:
    """Calls add an operator: ``builder("MatMul", x, weight)`` gives its result. Numbers and arrays become constants."""

    def __init__(self, half: bool, embeddings_half: bool) -> None:
        import onnx_ir
        from onnx_ir.tape import Tape

        self.ir, self.tape = onnx_ir, Tape()
        self.half = {"Linear": half, "Embedding": half or embeddings_half}
        """Whether matrices of a kind are stored in float16."""

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> Any:
        values = [x if isinstance(x, self.ir.Value) else self.constant(x) for x in inputs]
        return self.tape.op(op, values, attributes)

    def constant(self, value: Any) -> Any:
        """An int64 or float32 constant of a number or an array."""
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        return self.tape.initializer(self.ir.tensor(array), f"constant_{len(self.tape.initializers)}")

    def weight(self, name: str, weight: Tensor, kind: str = "") -> Any:
        """A tensor, which is checked now, and read and converted again when it is written."""
        dtype = torch.float16 if self.half.get(kind) else torch.float32
        rows = weight.T if kind == "Linear" else weight
        converted(name, rows, dtype)

        def read() -> Any:
            return self.ir.tensor(converted(name, rows, dtype).contiguous().numpy())

        kinds = {torch.float16: self.ir.DataType.FLOAT16, torch.float32: self.ir.DataType.FLOAT}
        lazy = self.ir.LazyTensor(read, kinds[dtype], self.ir.Shape(rows.shape), name=name)
        return self.tape.initializer(lazy, name)

    def float(self, x: Any) -> Any:
        """x in float32."""
        return self("Cast", x, to=self.ir.DataType.FLOAT)

    def linear(self, x: Any, name: str, module: Any) -> Any:
        """x @ weight.T."""
        weight = self.weight(f"{name}.weight", module.weight, "Linear")
        return self("MatMul", x, self.float(weight) if self.half["Linear"] else weight)

    def norm(self, x: Any, name: str, module: Any) -> Any:
        """RMSNorm along the last dimension."""
        return self("RMSNormalization", x, self.weight(f"{name}.weight", module.weight), axis=-1, epsilon=module.eps)

    def activation(self, x: Any, name: str) -> Any:
        """An activation of torch.nn by its class's name. Raises InputError."""
        if name not in ACTIVATIONS:
            raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {name}")
        return self(ACTIVATIONS[name], x)


def build(source: Source, *, half: bool = False, embeddings_half: bool = False) -> Any:
    """An ``onnx_ir.Model`` of ``input_ids`` and ``attention_mask``, [batch, length] int64.

    Its outputs are ``last_hidden_state`` [batch, length, H] and ``sentence_embedding`` [batch, dim], float32; of a
    reranker, ``logits`` and ``scores`` [batch, labels], before and after the sigmoid. half: store matrices in float16.
    Raises InputError for an activation that ONNX has no operator for.
    """
    g, model = Builder(half, embeddings_half), source.model
    ir, config, layout = g.ir, model.config, model.layout
    ids, mask = (ir.val(name, ir.DataType.INT64, ["batch", "length"]) for name in INPUTS)
    places = g("Range", 0, g("Squeeze", g("Shape", ids, start=1, end=2)), 1)
    hidden = _decode(g, model, ids, mask, places)
    last = g("ArgMax", g("Mul", mask, g("Add", places, 1)), axis=1, keepdims=1)
    pooled = _pass_on(g, model, g("GatherND", hidden, last, batch_dims=1))
    if isinstance(source, Reranker):
        direction = model.score_weight(source.answers)
        logits = pooled if direction is None else g("MatMul", pooled, g.weight("direction", direction.T))
        width = len(layout.labels)
        outputs = {"logits": logits, "scores": g.activation(logits, layout.activation)}
        shapes = [["batch", width], ["batch", width]]
    else:
        width = source.get_embedding_dimension()
        vectors = g("Slice", pooled, [0], [width], [1])
        vectors = _normalize(g, vectors) if layout.normalize else vectors
        outputs = {"last_hidden_state": hidden, "sentence_embedding": vectors}
        shapes = [["batch", "length", config.hidden_size], ["batch", width]]
    for (name, value), shape in zip(outputs.items(), shapes, strict=True):
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    tape, opsets = g.tape, {"": OPSET}
    graph = ir.Graph(
        [ids, mask], [*outputs.values()], nodes=tape.nodes, initializers=tape.initializers, opset_imports=opsets
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="qwen3core")


def _decode(g: Builder, model: Qwen3Model, ids: Any, mask: Any, places: Any) -> Any:
    """Last hidden states [B, L, H]."""
    config = model.config
    inv_freq, scaling = rope_parameters(config.head_dim, config.rope_theta, config.rope_scaling, torch.device("cpu"))
    positions = g("Max", g("Sub", g("CumSum", mask, 1), 1), 0)
    angles = g("Mul", g("Unsqueeze", g.float(positions), [2]), inv_freq.numpy())
    rope = [g("Mul", g(name, angles), scaling) for name in ("Cos", "Sin")]  # [B, L, D / 2]
    column = g("Unsqueeze", places, [1])
    seen = g("Cast", g("Unsqueeze", mask, [1, 2]), to=g.ir.DataType.BOOL)
    if config.is_causal:
        seen = g("And", seen, g("LessOrEqual", places, column))
    seen = g("Or", seen, g("Equal", places, column))  # a row sees itself, so that no padding is nan; [B, 1, L, L]
    x = g("Gather", g.weight("embed_tokens.weight", model.embed_tokens.weight, "Embedding"), ids)
    x = g.float(x) if g.half["Embedding"] else x
    for i, layer in enumerate(model.layers):
        x = _layer(g, x, f"layers.{i}", layer, rope, seen)
    return g.norm(x, "norm", model.norm)


def _layer(g: Builder, x: Any, name: str, layer: Any, rope: list[Any], seen: Any) -> Any:
    """The residual stream [B, L, H] out of a layer; seen: [B, 1, L, L] bool."""
    attention, mlp = layer.self_attn, layer.mlp

    def heads(kind: str) -> Any:
        """[B, heads, L, D]."""
        y = g.linear(normed, f"{name}.self_attn.{kind}_proj", getattr(attention, f"{kind}_proj"))
        y = g("Reshape", y, [0, 0, -1, attention.head_dim])
        if kind != "v":
            y = g.norm(y, f"{name}.self_attn.{kind}_norm", getattr(attention, f"{kind}_norm"))
        y = g("Transpose", y, perm=[0, 2, 1, 3])
        return y if kind == "v" else g("RotaryEmbedding", y, *rope)

    normed = g.norm(x, f"{name}.input_layernorm", layer.input_layernorm)
    z = g("Attention", heads("q"), heads("k"), heads("v"), seen)
    z = g("Reshape", g("Transpose", z, perm=[0, 2, 1, 3]), [0, 0, -1])
    x = g("Add", x, g.linear(z, f"{name}.self_attn.o_proj", attention.o_proj))
    normed = g.norm(x, f"{name}.post_attention_layernorm", layer.post_attention_layernorm)
    gate, up = (g.linear(normed, f"{name}.mlp.{part}", getattr(mlp, part)) for part in ("gate_proj", "up_proj"))
    active = g("Mul", g("Mul", gate, g("Sigmoid", gate)), up)
    return g("Add", x, g.linear(active, f"{name}.mlp.down_proj", mlp.down_proj))


def _pass_on(g: Builder, model: Qwen3Model, x: Any) -> Any:
    """What the layout's modules make of vectors x [B, in]."""
    for module in model.layout.modules:
        if isinstance(module, Normalize):
            x = _normalize(g, x)
        else:
            x = _dense(g, x, module, model.get_submodule(module.path))
    return x


def _dense(g: Builder, x: Any, dense: Dense, module: DenseLayer | Any) -> Any:
    y = g.linear(x, f"{dense.path}.linear", module.linear)
    if dense.bias:
        y = g("Add", y, g.weight(f"{dense.path}.linear.bias", module.linear.bias))
    y = g.activation(y, dense.activation)
    if not dense.use_residual:
        return y
    return g("Add", y, x if module.residual is None else g.linear(x, f"{dense.path}.residual", module.residual))


def _normalize(g: Builder, x: Any) -> Any:
    """Unit length, with the bound of torch's ``normalize``."""
    return g("Div", x, g("Max", g("ReduceL2", x, [-1], keepdims=1), 1e-12))
