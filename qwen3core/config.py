"""The architecture's numbers, read from a checkpoint's config.json under the names that it uses there."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import CheckpointError

# Fields that would change the arithmetic, with the only values that this implementation computes.
_SUPPORTED: dict[str, tuple] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
}
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")
_EXPECTED = {int: "a positive integer", float: "a positive number", bool: "true or false", str | None: "text"}


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a Qwen3 decoder, fields as in config.json. ``head_dim`` does not follow from ``hidden_size``.

    Raises:
        CheckpointError: by ``from_file`` and ``from_dict``, for a field that is missing, wrong, or not supported.

    Example:
        >>> config = Qwen3Config.from_file(find("tiny-embedding") / "config.json")
        >>> config.hidden_size, config.num_attention_heads, config.head_dim
        (256, 4, 64)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_theta: float
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    dtype: str | None = None
    """Name of the dtype the checkpoint was saved for (``torch_dtype`` in older files)."""

    @classmethod
    def from_file(cls, path: str | Path) -> "Qwen3Config":
        """Read and check a config.json. Raises CheckpointError."""
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config") -> "Qwen3Config":
        """Check a parsed config.json (transformers 4 or 5 spelling); ``source`` names it in errors."""
        for name, supported in _SUPPORTED.items():
            if (found := data.get(name)) not in supported:
                raise CheckpointError(f"{source}: {name}: expected {supported[0]!r}, found {found!r}")
        layer_types = data.get("layer_types") or []
        if not isinstance(layer_types, list) or any(t != "full_attention" for t in layer_types):
            raise CheckpointError(f"{source}: layer_types: expected 'full_attention' only, found {layer_types!r:.200}")
        values = dict(data, dtype=data.get("dtype") or data.get("torch_dtype"))
        for name in ("rope_scaling", "rope_parameters"):
            rope = data.get(name) or {}
            if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type", "default")) != "default":
                raise CheckpointError(
                    f"{source}: {name}: expected no RoPE scaling (rope_type 'default'), found {rope!r:.200}"
                )
            values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta"))
        numbers: dict[str, Any] = {}
        for field in fields(cls):
            kind: Any = field.type
            value: Any = values.get(field.name)
            if value is None and field.default is not MISSING:
                continue
            right = isinstance(value, (int, float) if kind is float else kind)
            if not right or (kind in (int, float) and (isinstance(value, bool) or not 0 < value < 2**63)):
                raise CheckpointError(f"{source}: {field.name}: expected {_EXPECTED[kind]}, found {value!r}")
            numbers[field.name] = value
        config = cls(**numbers)
        if config.num_attention_heads % config.num_key_value_heads:
            raise CheckpointError(
                f"{source}: num_attention_heads: expected a multiple of num_key_value_heads "
                f"({config.num_key_value_heads}), found {config.num_attention_heads}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{source}: head_dim: expected an even number, found {config.head_dim}")
        if config.dtype not in (None, *DTYPE_NAMES):
            raise CheckpointError(f"{source}: dtype: expected one of {', '.join(DTYPE_NAMES)}, found {config.dtype!r}")
        return config


OFFICIAL_SIZES = {
    name: Qwen3Config(151669, hidden, mlp, layers, heads, 8, 40960, 1e6, tie_word_embeddings=tied, dtype="bfloat16")
    for name, hidden, mlp, layers, heads, tied in (
        ("0.6B", 1024, 3072, 28, 16, True),
        ("4B", 2560, 9728, 36, 32, True),
        ("8B", 4096, 12288, 36, 32, False),
    )
}
"""Shapes of the official checkpoints; vocabularies and positions differ by repository (weights/synthesize.py)."""


def read_json(path: Path, kind: type = dict) -> Any:
    """Parse a JSON object, or a list, from ``path``. Raises CheckpointError when it is missing or is anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, found {'a directory' if path.is_dir() else 'nothing'}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: expected JSON, found something else ({error})") from error
    if not isinstance(data, kind):
        expected = "a JSON object" if kind is dict else "a JSON list"
        raise CheckpointError(f"{path}: expected {expected}, found {type(data).__name__}")
    return data
