"""The architecture's numbers, read from a checkpoint's config.json under the names that it uses there."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import CheckpointError

# Fields that would change the arithmetic, with the only values that this implementation computes, and why.
_SUPPORTED: dict[str, tuple[tuple, str]] = {
    "model_type": (("qwen3",), " (its text decoder alone is computed: no images, no experts)"),
    "hidden_act": (("silu", None), ""),
    "attention_bias": ((False, None), ""),
    "use_sliding_window": ((False, None), ""),
    "partial_rotary_factor": ((1.0, None), ""),
    "per_layer_config": ((None, {}), " (all layers are computed alike)"),
    "auto_map": ((None, {}), " (the repository's own code may compute something else)"),
    "quantization": ((None, {}), " (mlx-lm serves MLX's format)"),
    "quantization_config": ((None, {}), " (vLLM serves quantised weights)"),
}
# The same of fields that are lists.
_LISTS: dict[str, tuple[tuple, str]] = {
    "layer_types": (("full_attention",), ""),
    "architectures": (
        ("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"),
        " (no listwise reranker: several documents in one context)",
    ),
}
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")
_EXPECTED = {
    int: "a positive integer",
    float: "a positive number",
    float | None: "a positive number",
    bool: "true or false",
    str | None: "text",
}


@dataclass(frozen=True)
class Yarn:
    """RoPE stretched to texts ``factor`` times as long (YaRN, arXiv:2309.00071); transformers' names and defaults."""

    factor: float
    original_max_position_embeddings: int
    """``max_position_embeddings`` where config.json does not say."""
    beta_fast: float = 32
    beta_slow: float = 1
    attention_factor: float | None = None
    """What cos and sin are multiplied by; None: it follows from ``factor``, ``mscale`` and ``mscale_all_dim``."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Whether the range of dimensions that are stretched in part is widened to whole numbers."""
    rope_type: str | None = "yarn"
    """Its name in config.json."""


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
    is_causal: bool = True
    """Whether a token sees only those before it, and itself; else all of its text."""
    rope_scaling: Yarn | None = None
    """How RoPE is stretched, if it is (in ``rope_parameters`` of newer files)."""

    @property
    def position_limit(self) -> int:
        """The longest text in tokens: ``max_position_embeddings``, or what YaRN stretches it to."""
        yarn = self.rope_scaling
        stretched = int(yarn.factor * yarn.original_max_position_embeddings) if yarn else 0
        return max(self.max_position_embeddings, stretched)

    @classmethod
    def from_file(cls, path: str | Path) -> "Qwen3Config":
        """Read and check a config.json. Raises CheckpointError."""
        return cls.from_dict(read_json(Path(path)), str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config") -> "Qwen3Config":
        """Check a parsed config.json (transformers 4 or 5 spelling); ``source`` names it in errors."""
        _refuse_other_arithmetic(data, source)
        values = dict(data)
        values["dtype"] = _one_of(source, {name: data.get(name) for name in ("dtype", "torch_dtype")})
        values["rope_theta"], values["rope_scaling"] = _rope(data, source)
        config = _read(cls, values, source)
        if (found := data.get("use_bidirectional_attention")) not in (None, not config.is_causal):
            raise CheckpointError(
                f"{source}: use_bidirectional_attention: expected {not config.is_causal}, since is_causal is "
                f"{config.is_causal} and transformers reads that alone for Qwen3, found {found!r:.200}"
            )
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


def _refuse_other_arithmetic(data: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError where config.json declares what is not computed here."""
    for name, (supported, why) in _SUPPORTED.items():
        if (found := data.get(name)) not in supported:
            found = found.get("quant_method", found) if isinstance(found, Mapping) else found
            raise CheckpointError(f"{source}: {name}: expected {supported[0]!r}{why}, found {found!r:.200}")
    for name, (supported, why) in _LISTS.items():
        found = data.get(name) or []
        if not isinstance(found, list) or any(value not in supported for value in found):
            expected = f"a list of {' or '.join(supported)}{why}"
            raise CheckpointError(f"{source}: {name}: expected {expected}, found {found!r:.200}")


def _rope(data: Mapping[str, Any], source: str) -> tuple[Any, Yarn | None]:
    """rope_theta and what stretches RoPE, in the spelling of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    found = {name: rope for name in ("rope_scaling", "rope_parameters") if (rope := data.get(name))}
    name, rope = next(iter(found.items()), ("rope_parameters", {}))
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{source}: {name}: expected the parameters of RoPE, found {rope!r:.200}")
    _one_of(source, found)
    values = dict(rope)
    theta = _one_of(
        source, {"rope_theta": data.get("rope_theta"), f"{name}.rope_theta": values.pop("rope_theta", None)}
    )
    rope_type = _one_of(source, {f"{name}.{key}": values.pop(key, None) for key in ("rope_type", "type")})
    known = [field.name for field in fields(Yarn)] if rope_type == "yarn" else []
    unknown = {key: value for key, value in values.items() if key not in known}
    if unknown.pop("partial_rotary_factor", 1.0) != 1.0 or unknown or rope_type not in (None, "default", "yarn"):
        expected = "RoPE of rope_type 'default' or 'yarn' and no parameters but its own"
        raise CheckpointError(f"{source}: {name}: expected {expected}, found {rope!r:.200}")
    if rope_type != "yarn":
        return theta, None
    original = "original_max_position_embeddings"
    said = _one_of(source, {original: data.get(original), f"{name}.{original}": values.get(original)})
    values[original] = data.get("max_position_embeddings") if said is None else said
    return theta, _read(Yarn, values, f"{source}: {name}")


def _one_of(source: str, spellings: Mapping[str, Any]) -> Any:
    """The one value among what several spellings of a field say, or None. Raises CheckpointError if they differ."""
    found = {name: value for name, value in spellings.items() if value is not None}
    value = next(iter(found.values()), None)
    if any(other != value for other in found.values()):
        text = ", ".join(f"{name}: {other!r:.200}" for name, other in found.items())
        raise CheckpointError(f"{source}: expected spellings that agree, found {text}")
    return value


def _read(cls: Any, values: Mapping[str, Any], source: str) -> Any:
    """A dataclass, its fields checked and taken from ``values``. Raises CheckpointError."""
    numbers: dict[str, Any] = {}
    for field in fields(cls):
        kind: Any = field.type
        value: Any = values.get(field.name)
        # To transformers, null is false: no value of a field that is true where it is absent.
        absent = field.name not in values if kind is bool else value is None
        if absent and field.default is not MISSING:
            continue
        number = kind in (int, float, float | None)
        right = isinstance(value, int if kind is int else (int, float)) if number else isinstance(value, kind)
        if not right or (number and (isinstance(value, bool) or not 0 < value < 2**63)):
            raise CheckpointError(f"{source}: {field.name}: expected {_EXPECTED[kind]}, found {value!r:.200}")
        numbers[field.name] = value
    return cls(**numbers)


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
