"""A tiny checkpoint, and ways to break its files, for tests of loading."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialise

from qwen3core.weights.synthesize import LAYOUTS, Layout, synthesize

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tiny(directory: Path, kind: str = "embedding", *, tied: bool = True, shards: int = 1) -> Path:
    """A 36 KB checkpoint of one layer; two shards split it after ``gate_proj``."""
    config = replace(
        LAYOUTS[f"Qwen3-{kind.capitalize()}-small"].config,
        hidden_size=8,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return synthesize(directory, Layout(config, kind, shards))


def edit_json(path: Path, *removed: str, **changed: object) -> None:
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: v for k, v in data.items() if k not in removed} | changed), "utf-8")


def split(content: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def join(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edit_header(file: Path, change: Callable[[dict], object]) -> None:
    header, data = split(file.read_bytes())
    change(header)
    file.write_bytes(join(header, data))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a valid safetensors file with other tensors."""
    tensors = parse(file.read_bytes())
    change(tensors)
    file.write_bytes(serialise(tensors))


def relayout(header: dict) -> dict:
    """The header with offsets that agree with its shapes and dtypes, as far as they make sense."""
    offset = 0
    for entry in (value for key, value in header.items() if key != "__metadata__"):
        size = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "U8": 1}.get(entry["dtype"], 2)
        for number in entry["shape"]:
            size *= number
        entry["data_offsets"] = [offset, offset + size]
        offset += size
    return header


def clear(message: str) -> bool:
    """Whether a message says what was expected and found, or names the tensor that is missing or unexpected."""
    named = re.search(r": (missing|unexpected) tensor '", message)
    return bool(named) or ("expected" in message and "found" in message)
