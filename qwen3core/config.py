"""The architecture's numbers, read from a checkpoint's config.json under the names that it uses there."""

import json
from collections.abc import Callable, Mapping
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
    "layer_types": (("full_attention", None), ""),
    "architectures": (
        ("Qwen3Model", "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", None),
        " (no listwise reranker: several documents in one context)",
    ),
}
_LISTS = ("layer_types", "architectures")
DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")


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
    rope_type: str = "yarn"


# What a value of a field's type is.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", lambda x: type(x) is int and 0 < x < 2**63),
    **dict.fromkeys((float, float | None), ("a positive number", lambda x: type(x) in (int, float) and 0 < x < 2**63)),
    bool: ("true or false", lambda x: type(x) is bool),
    str: ("'yarn'", lambda x: x == "yarn"),
    str | None: (f"one of {', '.join(DTYPE_NAMES)}", lambda x: x in DTYPE_NAMES),
    Yarn | None: ("YaRN", lambda x: type(x) is Yarn),
}


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
    """Rows of ``embed_tokens``."""
    hidden_size: int
    """``H``: width of the residual stream."""
    intermediate_size: int
    """``I``: width of the MLP."""
    num_hidden_layers: int
    """Layers that the checkpoint has."""
    num_attention_heads: int
    """``Hq``: query heads."""
    num_key_value_heads: int
    """``Hkv``: key and value heads; ``Hq / Hkv`` query heads share each."""
    max_position_embeddings: int
    """The longest text in tokens, before any stretching of RoPE."""
    rope_theta: float
    """Base of RoPE's angles: pair i turns by ``rope_theta ** (-2 i / D)`` per position."""
    head_dim: int = 128
    """``D``: width of a head."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square under the root of every norm."""
    tie_word_embeddings: bool = False
    """Whether the lm_head is ``embed_tokens``."""
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
        for name, (supported, why) in _SUPPORTED.items():
            found = data.get(name)
            if any(x not in supported for x in (found if name in _LISTS and isinstance(found, list) else [found])):
                expected = " or ".join(repr(x) for x in supported if x is not None)
                found = found.get("quant_method", found) if isinstance(found, Mapping) else found
                raise CheckpointError(f"{source}: {name}: expected {expected}{why}, found {found!r:.200}")
        theta, rope = _rope(data, source)
        dtype = _agreed(data, source, "dtype", "torch_dtype")
        config = _read(cls, {**data, "dtype": dtype, "rope_theta": theta, "rope_scaling": rope}, source)
        heads, shared, both_ways = config.num_attention_heads, config.num_key_value_heads, not config.is_causal
        said = data.get("use_bidirectional_attention")  # which transformers does not read for Qwen3
        for name, right, expected in (
            ("num_attention_heads", heads % shared == 0, f"a multiple of num_key_value_heads ({shared})"),
            ("head_dim", config.head_dim % 2 == 0, "an even number"),
            ("use_bidirectional_attention", said in (None, both_ways), f"{both_ways}, as is_causal is {not both_ways}"),
        ):
            if not right:
                raise CheckpointError(f"{source}: {name}: expected {expected}, found {data[name]!r:.200}")
        return config


def _rope(data: Mapping[str, Any], source: str) -> tuple[Any, Yarn | None]:
    """rope_theta and what stretches RoPE, in the spelling of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    name = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = _agreed(data, source, "rope_scaling", "rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{source}: {name}: expected the parameters of RoPE, found {rope!r:.200}")
    said = {**data, **{f"{name}.{key}": value for key, value in rope.items()}}
    theta = _agreed(said, source, "rope_theta", f"{name}.rope_theta")
    rope_type = _agreed(said, source, f"{name}.rope_type", f"{name}.type") or "default"
    known = ["rope_theta", "rope_type", "type", *(field.name for field in fields(Yarn) if rope_type == "yarn")]
    others = {key: value for key, value in rope.items() if key not in known}
    if rope_type not in ("default", "yarn") or others not in ({}, {"partial_rotary_factor": 1.0}):
        expected = "RoPE of rope_type 'default' or 'yarn' and no parameters but its own"
        raise CheckpointError(f"{source}: {name}: expected {expected}, found {rope!r:.200}")
    if rope_type == "default":
        return theta, None
    key = "original_max_position_embeddings"
    original = _agreed(said, source, key, f"{name}.{key}")
    original = data.get("max_position_embeddings") if original is None else original
    return theta, _read(Yarn, {**rope, key: original}, f"{source}: {name}")


def _agreed(data: Mapping[str, Any], source: str, *spellings: str) -> Any:
    """What a field's spellings say, or None where none is there. Raises CheckpointError if they differ."""
    found = {name: data[name] for name in spellings if data.get(name) not in (None, {})}
    first, *others = found.values() or [None]
    if any(other != first for other in others):
        text = ", ".join(f"{name}: {value!r:.200}" for name, value in found.items())
        raise CheckpointError(f"{source}: expected spellings that agree, found {text}")
    return first


def _read(cls: Any, values: Mapping[str, Any], source: str) -> Any:
    """A dataclass, its fields checked and taken from ``values``. Raises CheckpointError."""
    found: dict[str, Any] = {}
    for field in fields(cls):
        value = values.get(field.name)
        expected, right = _KINDS[field.type]
        # To transformers, null is false: no value of a field that is true where it is absent.
        absent = field.name not in values if field.type is bool else value is None
        if not absent or field.default is MISSING:
            if not right(value):
                raise CheckpointError(f"{source}: {field.name}: expected {expected}, found {value!r:.200}")
            found[field.name] = value
    return cls(**found)


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
