"""Find a checkpoint: a directory, one that comes with the package, or a hub id, downloaded where it is not cached.

And its files of weights: in the directory itself, in the folders of its modules, of the base model of an adapter.
"""

import json
import os
import re
from pathlib import Path

import huggingface_hub

from qwen3core.config import read_json
from qwen3core.errors import CheckpointError, InputError

SHIPPED = ("tiny-embedding", "tiny-reranker")
"""Small trained checkpoints beside this file."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
"""What is fetched of a hub id."""
OTHER_FORMATS = {
    ".bin": "a pickle, which runs code: transformers' save_pretrained converts it",
    ".gguf": "GGUF, which llama.cpp serves",
    ".npz": "MLX's, which mlx-lm serves",
    ".onnx": "ONNX, which onnxruntime serves",
}
"""Endings of weights that are not read, and what would read them."""


def find(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``path_or_id`` itself, one of ``SHIPPED``, or a hub id's, downloaded if need be.

    The local cache answers first; HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured.
    Raises CheckpointError for a name that leads nowhere, InputError for a revision of a local directory.
    """
    name = str(path_or_id)
    if os.path.isdir(name):  # os.path: a name too long for a file is no error, it is just not there
        if revision is not None:
            raise InputError(f"revision: expected none with the local directory {name}, found {revision!r}")
        return Path(name)
    if name in SHIPPED and revision is None:
        return Path(__file__).parent / name
    if os.path.exists(name) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        found = "a file" if os.path.exists(name) else "nothing there"
        raise CheckpointError(
            f"{name}: expected a checkpoint directory, one of {', '.join(SHIPPED)}, or a hub id like owner/name, "
            f"found {found}"
        )
    for cached in (True, False):
        try:
            directory = Path(
                huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=PATTERNS, local_files_only=cached
                )
            )
            if not cached or _is_whole(directory):
                break
        except Exception as error:  # of several libraries
            if not cached:
                reason = str(error).strip().partition("\n")[0]
                raise CheckpointError(
                    f"{name}: expected a local directory, a cached or a reachable hub id, found none "
                    f"({type(error).__name__}: {reason})"
                ) from error
    if (directory / ADAPTER_CONFIG).exists() and has_weights(directory):
        raise CheckpointError(
            f"{name}: expected {SINGLE} or {ADAPTER_CONFIG}, found both: transformers adds the adapter of a hub id to "
            f"its base_model_name_or_path, that of a directory to the weights beside it; for these, open {directory}"
        )
    return directory


def _is_whole(directory: Path) -> bool:
    """Whether a cached snapshot has every file that opening it needs. Raises CheckpointError."""
    adapter = (directory / ADAPTER_CONFIG).exists()  # its tokenizer and its weights may be its base model's
    files = [ADAPTER] if adapter else ["tokenizer.json", *weight_map(directory).values()]
    files += [f"{folder}/{SINGLE}" for folder, kind in module_folders(directory).items() if kind == "Dense"]
    return all((directory / file).exists() for file in files)


def base_directory(directory: str | Path) -> Path:
    """The directory with a checkpoint's config and full weights: itself, or of a PEFT adapter its base model's.

    As transformers has it: weights beside ``adapter_config.json`` are those that the adapter is for; else its
    ``base_model_name_or_path`` names them, a path (from the working directory) or a hub id, of its ``revision``.
    Raises CheckpointError where that leads nowhere, or to another adapter.
    """
    directory = Path(directory)
    file = directory / ADAPTER_CONFIG
    if not file.exists() or has_weights(directory):
        return directory
    config = read_json(file)
    name = str(config.get("base_model_name_or_path"))
    try:
        base = find(name, revision=None if os.path.isdir(name) else config.get("revision"))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: base_model_name_or_path: {error}") from error
    if (base / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{file}: base_model_name_or_path: expected a full model, found an adapter in {base}")
    return base


def has_weights(directory: Path) -> bool:
    """Whether full weights lie in the directory itself."""
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor key to file name, from the index; ``{"": SINGLE}`` where there is one file. Raises CheckpointError."""
    if (directory / SINGLE).exists():
        return {"": SINGLE}
    index = directory / INDEX
    if not index.exists():
        raise CheckpointError(
            f"{directory}: expected {SINGLE} or {INDEX}, found {other_weights(directory) or 'neither'}"
        )
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor to file, found {mapped!r:.80}")
    for key, shard in mapped.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", shard):
            raise CheckpointError(
                f"{index}: tensor {key!r}: expected the name of a .safetensors file in this directory, "
                f"found {shard!r:.200}"
            )
    return mapped


def other_weights(directory: Path) -> str:
    """Weights of formats that are not read, in the directory or its ``onnx``, in words; empty where there are none."""
    files = sorted([*directory.glob("*"), *directory.glob("onnx/*")])
    return ", ".join(f"{path.name} ({OTHER_FORMATS[path.suffix]})" for path in files if path.suffix in OTHER_FORMATS)


def module_folders(directory: Path) -> dict[str, str]:
    """The folders that modules.json names, and the class of module in each. Raises CheckpointError."""
    listed = directory / "modules.json"
    try:
        modules = json.loads(listed.read_text("utf-8")) if listed.exists() else []
        kinds = {os.path.normpath(module["path"] or "."): str(module.get("type")) for module in modules}
        if outside := [name for name in kinds if os.path.isabs(name) or name.split("/")[0] == ".."]:
            raise ValueError(f"outside of its directory: {outside[0]}")
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{listed}: expected modules with paths, found something else ({error})") from error
    return {name: kind.rpartition(".")[2] for name, kind in kinds.items() if name != "."}
