"""LoRA (arXiv:2106.09685) in peft's files: which tensors of a checkpoint an adapter changes, and how.

A matrix W becomes ``W + scale * B @ A``, where scale is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` (rsLoRA).
"""

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from qwen3core.config import read_json
from qwen3core.errors import CheckpointError

FREE = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode"),
    # Which modules were adapted, the keys of the file say.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
}
"""Keys of ``adapter_config.json`` that are read, or change no number of a trained adapter."""
FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # The others change the weights of the base model, too.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
"""The only values of these keys that are honoured; of every other key, known or not, it is ``OFF``."""
OFF: tuple = (None, False, {}, [])
LORA, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?(.+?)\.(weight|base_layer\.weight|lora_[AB]\.weight|lora_embedding_[AB])"
)


LowRank = tuple[Tensor, Tensor, float]
"""[rows, r], [r, columns] and scale: what LoRA adds to a matrix is the product of the three."""


def read_adapter(config_file: Path, file: Path, handle: safe_open) -> tuple[dict[str, str], dict[str, LowRank]]:
    """What an adapter replaces, parameter name to the file's key, and what it adds, by parameter name.

    Raises CheckpointError for a config that is not honoured, and for a tensor that the config does not explain.
    """
    config = _read_config(config_file)
    replaced: dict[str, str] = {}
    pairs: dict[str, dict[str, str]] = {}
    for key in handle.keys():  # noqa: SIM118 - not a dict
        module, kind = match.groups() if (match := _KEY.fullmatch(key)) else ("", "")
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
    changes: dict[str, LowRank] = {}
    for name, keys in pairs.items():
        found = {kind: handle.get_tensor(keys[kind]) for kind in sorted(keys)}
        shapes = [list(matrix.shape) for matrix in found.values()]
        rank = _by_pattern(config_file, config, "r", "rank_pattern", name)
        alpha = _by_pattern(config_file, config, "lora_alpha", "alpha_pattern", name)
        if (*found,) not in (LORA, EMBEDDING) or (shapes[0][:-1], shapes[1][1:]) != ([rank], [rank]):
            raise CheckpointError(
                f"{file}: {name}: expected matrices A and B of rank {rank}, found {[*found]}, {shapes}"
            )
        a, b = found.values()
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        changes[name] = (a.T, b.T, scale) if (*found,) == EMBEDDING else (b, a, scale)
    return replaced, changes


def _read_config(file: Path) -> dict[str, Any]:
    """The adapter's config with peft's defaults; CheckpointError for what is not honoured."""
    config: dict[str, Any] = {"r": 8, "lora_alpha": 8, "peft_type": None, "modules_to_save": None} | read_json(file)
    for key in config.keys() - FREE:
        if config[key] not in (expected := FIXED.get(key, OFF)):
            text = " or ".join(map(repr, expected))
            raise CheckpointError(f"{file}: {key}: expected {text}, found {config[key]!r:.200}")
    saved = config["modules_to_save"] or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(f"{file}: modules_to_save: expected a list of names, found {saved!r:.200}")
    return config


def _by_pattern(file: Path, config: dict[str, Any], key: str, where: str, name: str) -> float:
    """The value of one matrix: of the first pattern that matches it, else the common one. Raises CheckpointError.

    A leading ``model.`` must not matter, since not all classes of transformers that may open the adapter have it.
    """
    patterns, module = config.get(where) or {}, name.removesuffix(".weight")
    try:
        first, second = (
            next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", full)), config[key])
            for full in (module, f"model.{module}")
        )
    except (re.error, AttributeError) as error:
        raise CheckpointError(f"{file}: {where}: expected regular expressions, found {patterns!r:.200}") from error
    if type(first) not in (int, float) or not 0 < first < math.inf or first != second:
        raise CheckpointError(
            f"{file}: {key}, {where}: expected a positive number for {module}, the same with and without a leading "
            f"'model.', found {first!r:.80} and {second!r:.80}"
        )
    return first
