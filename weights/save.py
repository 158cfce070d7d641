"""Write a model back as the checkpoint that it came from, with the sizes and weights that it has now."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen3core.config import Qwen3Config, read_json
from qwen3core.errors import InputError
from qwen3core.model import MLP, Attention, DecoderLayer, Linear, Qwen3Model, RMSNorm

from .tensors import Tensors, check_rewritable, rewrite


def save_model(
    model: Qwen3Model, source: Path, directory: Path, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Write the checkpoint ``source`` with this model's weights, and in config.json its sizes.

    changes: as for ``rewrite``. Raises InputError where a module is not the decoder's own, sizes differ between layers,
    or weights are int8 or shared out, and as ``rewrite`` does.
    """
    check_rewritable(source, directory)
    if part := next((name for name, weight in model.named_parameters() if hasattr(weight, "device_mesh")), None):
        raise InputError(f"save: {part}: expected a whole weight, found the part that one process has of it")
    config = sizes(model)
    with torch.device("meta"):
        like = Qwen3Model(config, model.ops, lm_head=model.lm_head is not None, layout=model.layout)
    weights, expected = model.state_dict(), like.state_dict()
    for name in [*weights, *expected]:
        shapes = [list(x[name].shape) if name in x else None for x in (expected, weights)]
        if shapes[0] != shapes[1]:
            raise InputError(f"save: {name}: expected shape {shapes[0]} as in layer 0, found {shapes[1]}")
        if not weights[name].is_floating_point():
            raise InputError(f"save: {name}: expected floating-point weights, found {weights[name].dtype}")
    stored = Tensors(source)
    before = {field.name: getattr(model.config, field.name) for field in fields(config)}
    changed = {name: value for name in before if (value := getattr(config, name)) != before[name]}
    if "num_hidden_layers" in changed and "layer_types" in read_json(source / "config.json"):
        changed["layer_types"] = ["full_attention"] * config.num_hidden_layers
    rewrite(
        source,
        directory,
        lambda name: weights[name] if name in weights else stored[name],
        layers=changed.get("num_hidden_layers"),
        changes={**(changes or {}), **({"config.json": changed} if changed else {})},
    )


def sizes(model: Qwen3Model) -> Qwen3Config:
    """The model's configuration, with the numbers of layers, heads and columns that its modules have.

    Raises InputError where there is no layer, or a module is of another class than the decoder's.
    """
    if not len(model.layers):
        raise InputError("save: layers: expected at least one, found none")
    for name, module in [("norm", model.norm), *model.layers.named_modules(prefix="layers")]:
        if type(module) not in (nn.ModuleList, DecoderLayer, Attention, MLP, RMSNorm, Linear):
            raise InputError(f"save: {name}: expected the decoder's own module, found {type(module).__name__}")
    first: Any = model.layers[0]
    rows, hidden_size = model.embed_tokens.weight.shape
    return replace(
        model.config,
        vocab_size=rows,
        hidden_size=hidden_size,
        num_hidden_layers=len(model.layers),
        num_attention_heads=len(first.self_attn.q_proj.weight) // first.self_attn.head_dim,
        num_key_value_heads=len(first.self_attn.k_proj.weight) // first.self_attn.head_dim,
        intermediate_size=len(first.mlp.gate_proj.weight),
    )
