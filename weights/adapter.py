"""LoRA (arXiv:2106.09685) in peft's files: which tensors of a checkpoint an adapter changes, and how.

A matrix W becomes ``W + scale * B @ A``, where scale is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` (rsLoRA).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen3core.config import read_json
from qwen3core.errors import CheckpointError, InputError, check_int, check_number

HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
"""Keys of ``adapter_config.json`` that decide the numbers."""
OF_TRAINING = {
    *("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode"),
    # Which modules were adapted, the keys of the file say.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
}
"""Those that change no number of a trained adapter."""
FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # The others change the weights of the base model, too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""Those with the only values that are honoured."""
OFF: tuple = (None, False, {}, [])
"""The only values of every other key, known or not: off."""
_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?(.+?)\.(weight|base_layer\.weight|lora_[AB]\.weight|lora_embedding_[AB])"
)


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to one matrix; its two tensors are read when it is added."""

    handle: safe_open
    down: str
    """Key of A [r, in]; of an embedding's [r, rows]."""
    up: str
    """Key of B [out, r]; of an embedding's [H, r]."""
    scale: float
    transposed: bool
    """Whether ``B @ A`` is the change's transpose, as it is an embedding's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the change."""
        (_, columns), (rows, _) = (self.handle.get_slice(key).get_shape() for key in (self.down, self.up))
        return (columns, rows) if self.transposed else (rows, columns)

    def add_to(self, weight: Tensor) -> Tensor:
        """The changed matrix, in float32, or the matrix's dtype where that is wider."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        down, up = (self.handle.get_tensor(key).to(exact) for key in (self.down, self.up))
        left, right = (down.T, up.T) if self.transposed else (up, down)
        return torch.addmm(weight.to(exact), left, right, alpha=self.scale)


def read_adapter(config_file: Path, file: Path, handle: safe_open) -> tuple[dict[str, str], dict[str, LowRank]]:
    """What an adapter replaces, parameter name to the file's key, and what it adds, by parameter name.

    Raises CheckpointError for a config that is not honoured, and for a tensor that the config does not explain.
    """
    config = _read_config(config_file)
    replaced: dict[str, str] = {}
    pairs: dict[str, dict[str, str]] = {}
    for key in handle.keys():  # noqa: SIM118 - not a dict
        found = _KEY.fullmatch(key)
        module, kind = found.groups() if found else ("", "")
        saved = kind == "weight" and module.endswith(tuple(config["modules_to_save"] or ()))  # as peft matches
        if kind.startswith("lora_"):
            given, part = pairs.setdefault(f"{module}.weight", {}), kind.removesuffix(".weight")
        elif saved or kind == "base_layer.weight":
            given, part = replaced, f"{module}.weight"
        else:
            raise CheckpointError(f"{file}: unexpected tensor {key!r}, neither LoRA's nor one of modules_to_save")
        if part in given:
            raise CheckpointError(f"{file}: tensor {key!r}: expected it once, found it also as {given[part]!r}")
        given[part] = key
    changes = {}
    for name, keys in pairs.items():
        kinds = next(
            (k for k in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")) if keys.keys() == set(k)), None
        )
        shapes = {kind: handle.get_slice(key).get_shape() for kind, key in keys.items()}
        rank, alpha = (_by_pattern(config_file, config, key, name) for key in ("r", "lora_alpha"))
        if (
            kinds is None
            or [len(shape) for shape in shapes.values()] != [2, 2]
            or not (shapes[kinds[0]][0] == shapes[kinds[1]][1] == rank)
        ):
            raise CheckpointError(f"{file}: {name}: expected matrices A and B of rank {rank}, found {shapes}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[name] = LowRank(handle, keys[kinds[0]], keys[kinds[1]], scale, transposed=kinds[0] != "lora_A")
    return replaced, changes


def _read_config(file: Path) -> dict[str, Any]:
    """The adapter's config with peft's defaults; CheckpointError for what is not honoured."""
    config: dict[str, Any] = {"r": 8, "lora_alpha": 8, "peft_type": None, "modules_to_save": None} | read_json(file)
    for key in config.keys() - HONOURED - OF_TRAINING:
        if config[key] not in (expected := FIXED.get(key, OFF)):
            raise CheckpointError(
                f"{file}: {key}: expected {' or '.join(map(repr, expected))}, found {config[key]!r:.200}"
            )
    saved = config["modules_to_save"]
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise CheckpointError(f"{file}: modules_to_save: expected a list of names, found {saved!r:.200}")
    return config


def _by_pattern(file: Path, config: dict[str, Any], key: str, name: str) -> float:
    """The rank ``r`` or the ``lora_alpha`` of one matrix, from the first pattern that matches it, else the common one.

    Raises CheckpointError, also where the match depends on a leading ``model.``, which the classes of transformers that
    may open the adapter do not share.
    """
    where = "rank_pattern" if key == "r" else "alpha_pattern"
    patterns, module = config.get(where) or {}, name.removesuffix(".weight")
    try:
        first, second = (
            next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", full)), config[key])
            for full in (module, f"model.{module}")
        )
    except (re.error, AttributeError) as error:
        raise CheckpointError(f"{file}: {where}: expected regular expressions, found {patterns!r:.200}") from error
    try:
        check_int(key, first, 1) if key == "r" else check_number(key, first, 0)
    except InputError as error:
        raise CheckpointError(f"{file}: {where}: {error}") from error
    if first != second:
        raise CheckpointError(
            f"{file}: {where}: expected one value for {module} with and without a leading 'model.', "
            f"found {first} and {second}"
        )
    return first
