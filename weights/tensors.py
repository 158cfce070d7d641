"""Read a checkpoint's safetensors, tensor by tensor, and write one like it with other weights.

Nothing is renamed: keys are parameter names, with or without a leading ``model.``; those of a module of
sentence-transformers begin with its folder. Other formats (pickled .bin, GGUF) are refused, since a pickle runs code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3core.config import read_json
from qwen3core.errors import CheckpointError, InputError
from qwen3core.writing import writing_into

from .adapter import LowRank, read_adapter
from .find import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, base_directory, module_folders, other_weights, weight_map

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in a safetensors header, those that weights of a model may have."""


class Tensors:
    """The tensors of a checkpoint by parameter name (no ``model.``), read on access, as pages of the file.

    ``tensors[name]`` raises CheckpointError where the tensor is missing. Changes of a PEFT adapter are added on access:
    such a tensor is float32, or float64 where it is stored so, whatever ``dtype`` says that it is stored in.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open every safetensors file and index its tensors. Raises CheckpointError."""
        self.directory = Path(directory)
        self._where: dict[str, tuple[Path, str, safe_open]] = {}
        self._low_rank: dict[str, LowRank] = {}
        base = base_directory(self.directory)
        mapped = weight_map(base)
        for file in sorted({base / shard for shard in mapped.values()}):
            self._add(file, "")
        for key, shard in mapped.items():
            if key and (found := self._locate(key.removeprefix("model."))[0].name) != shard:
                raise CheckpointError(f"{base / INDEX}: tensor {key!r}: expected it in {shard}, found it in {found}")
        self._folders = module_folders(self.directory)
        for folder in self._folders:
            file = self.directory / folder / SINGLE
            if file.exists() or other_weights(file.parent):
                self._add(file, f"{folder}.")
        if (self.directory / ADAPTER_CONFIG).exists():
            self._adapt(tied=read_json(base / "config.json").get("tie_word_embeddings") is True)

    def _add(self, file: Path, folder: str) -> None:
        """Index a file; ``folder`` begins a module's names."""
        handle = _open(file)
        for key in handle.keys():  # noqa: SIM118 - not a dict
            name = folder + key if folder else key.removeprefix("model.")
            if name in self._where:
                other, other_key, _ = self._where[name]
                raise CheckpointError(
                    f"{file}: tensor {key!r}: expected it once, found it also in {other.name} as {other_key!r}"
                )
            self._where[name] = (file, key, handle)

    def _adapt(self, *, tied: bool) -> None:
        """Take up the tensors of the adapter, which are checked. tied: whether the base ties lm_head and embeddings."""
        file = self.directory / ADAPTER
        handle = _open(file)
        replaced, self._low_rank = read_adapter(self.directory / ADAPTER_CONFIG, file, handle)
        if tied and {"embed_tokens.weight", "lm_head.weight"} & (replaced.keys() | self._low_rank.keys()):
            # As peft has it, which adapts one of the two and leaves the other as it was.
            self._where.setdefault("lm_head.weight", self._locate("embed_tokens.weight"))
        self._where |= {name: (file, key, handle) for name, key in replaced.items()}
        for name, (left, right, _) in self._low_rank.items():
            if (found := (len(left), right.shape[1])) != self.shape(name):
                raise CheckpointError(
                    f"{file}: {name}: expected a change of shape {list(self.shape(name))}, found {list(found)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        _, key, handle = self._locate(name)
        weight = handle.get_tensor(key)
        if name not in self._low_rank:
            return weight
        *matrices, scale = self._low_rank[name]
        exact = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(*(x.to(exact) for x in (weight, *matrices)), alpha=scale)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def files(self) -> dict[Path, dict[str, str]]:
        """Every safetensors file, with its parameter names and the keys they have there."""
        files: dict[Path, dict[str, str]] = {}
        for name, (file, key, _) in self._where.items():
            files.setdefault(file, {})[name] = key
        return files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file's header. Raises CheckpointError where the tensor is missing."""
        _, key, handle = self._locate(name)
        return tuple(handle.get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        """Name of the stored dtype, as ``"torch.bfloat16"``. Raises CheckpointError unless it is floating-point."""
        file, key, handle = self._locate(name)
        found = handle.get_slice(key).get_dtype()
        if found not in SAFETENSORS_DTYPES:
            expected = ", ".join(SAFETENSORS_DTYPES)
            raise CheckpointError(f"{file}: tensor {key!r}: expected dtype {expected}, found {found}")
        return str(SAFETENSORS_DTYPES[found])

    def require_layers(self, count: int) -> None:
        """Raise CheckpointError unless the files have ``count`` layers, so that no absurd number of them is built."""
        found = {name.split(".")[1] for name in self if name.startswith("layers.")}
        if len(found) != count:
            raise CheckpointError(
                f"{self.directory}: num_hidden_layers: expected {count} layers as in config.json, found {len(found)}"
            )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the tensor is there, floating-point and of this shape."""
        self.dtype(name)
        if (found := self.shape(name)) != shape:
            file, key, _ = self._where[name]
            raise CheckpointError(f"{file}: tensor {key!r}: expected shape {list(shape)}, found {list(found)}")

    def check_none_left(self, expected: Container[str], *, decoder_only: bool = False) -> None:
        """Raise CheckpointError for a tensor that is not expected; an lm_head that is not needed stays on disk.

        decoder_only: so does what follows the decoder, a score head and the modules in folders.
        """
        after = ("score.weight", *(f"{folder}." for folder in self._folders)) if decoder_only else ()
        for name, (file, key, _) in self._where.items():
            if name not in expected and name != "lm_head.weight" and not name.startswith(after):
                raise CheckpointError(f"{file}: unexpected tensor {key!r}")

    def _locate(self, name: str) -> tuple[Path, str, safe_open]:
        if name not in self._where:
            files = ", ".join(sorted({file.name for file, _, _ in self._where.values()}))
            raise CheckpointError(f"{self.directory}: missing tensor {name!r} in {files}")
        return self._where[name]


def _open(file: Path) -> safe_open:
    if not os.path.isfile(file):
        found = "something else" if os.path.exists(file) else other_weights(file.parent) or "nothing"
        raise CheckpointError(f"{file}: expected a safetensors file, found {found}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found {file.stat().st_size} bytes that are not one ({error})"
        ) from error


def rewrite(
    source: str | Path,
    directory: str | Path,
    tensor: Callable[[str], Tensor],
    *,
    layers: int | None = None,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint like ``source`` with other weights: same files, keys and dtypes; a shard in memory.

    tensor: by parameter name. layers: how many the decoder has, by default as many as in ``source``. changes: by the
    name of a JSON file, values of its keys that are other ones. ``directory`` is made if need be; its files change only
    once all are written. Raises InputError as ``check_rewritable``, and where a weight is not finite in the
    checkpoint's dtype; CheckpointError, OSError.
    """
    source, directory = Path(source), Path(directory)
    check_rewritable(source, directory)
    tensors = Tensors(source)
    files = tensors.files()
    others = [path for path in beside_weights(source) if path not in files]
    values = {name: dict(keys) for name, keys in (changes or {}).items()}
    if layers is not None:
        files = _with_layers(files, layers)
        if (source / INDEX) in others:
            values[INDEX] = {
                "metadata": {},
                "weight_map": {key: file.name for file, keys in files.items() for key in keys.values()},
            }
    with writing_into(directory) as part:
        for file, keys in files.items():
            shard: dict[str, Tensor] = {}
            for name, key in keys.items():
                weight = tensor(name).to(_stored_dtype(tensors, name)).contiguous()
                if not weight.isfinite().all():
                    raise InputError(
                        f"{key}: expected weights that are finite in {weight.dtype}, found some that are not"
                    )
                shared = any(weight.data_ptr() == other.data_ptr() for other in shard.values())
                shard[key] = weight.clone() if shared else weight  # a layer that is there twice
            place = part / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(shard, place, metadata={"format": "pt"})
        for path in others:
            copy_within(source, path, part)
        for name, changed in values.items():
            found = read_json(part / name) if (part / name).exists() else {}
            (part / name).write_text(json.dumps(found | changed, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _with_layers(files: Mapping[Path, Mapping[str, str]], count: int) -> dict[Path, dict[str, str]]:
    """Names and keys of every file, as ``Tensors.files``, with ``count`` layers: new ones are named like layer 0."""
    chosen: dict[Path, dict[str, str]] = {}
    first: dict[str, str] = {}
    last, found = next(iter(files)), 0
    for file, keys in files.items():
        for name, key in keys.items():
            number = int(name.split(".")[1]) if name.startswith("layers.") else -1
            if number == 0:
                first[name] = key
            if number >= found:
                last, found = file, number + 1
            if number < count:
                chosen.setdefault(file, {})[name] = key
    for i in range(found, count):
        new = {
            name.replace("layers.0.", f"layers.{i}."): key.replace("layers.0.", f"layers.{i}.")
            for name, key in first.items()
        }
        chosen.setdefault(last, {}).update(new)
    return chosen


def _stored_dtype(tensors: Tensors, name: str) -> torch.dtype:
    """The dtype of a tensor; of one in a new layer, of its like in layer 0."""
    return tensors[name if name in tensors else re.sub(r"^layers\.\d+", "layers.0", name)].dtype


def copy_within(source: Path, path: Path, directory: Path) -> None:
    """Copy a file of ``source`` to the same place in ``directory``."""
    copy = directory / path.relative_to(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)


def check_rewritable(source: Path, directory: Path) -> None:
    """Raise InputError where a checkpoint would be made from an adapter, or written over the one it is made from."""
    if (source / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{source}: expected a checkpoint of full weights to write another one from, found {ADAPTER_CONFIG}: "
            "merge the adapter first, by peft's merge_and_unload"
        )
    source, directory = source.resolve(), directory.resolve()
    if directory.is_relative_to(source):
        found = "the same" if directory == source else f"one inside {source}"
        raise InputError(f"{directory}: expected a directory other than the source's, found {found}")


def beside_weights(source: Path) -> list[Path]:
    """The other files of a checkpoint: by ending at its top, in folders that modules.json names, of chat templates.

    Weights in these folders are among them. Whatever else is in its directory, such as earlier outputs, is none of it.
    Raises CheckpointError.
    """
    folders = [*module_folders(source), "additional_chat_templates"]  # the latter of transformers
    top = [path for ending in ("*.json", "*.jinja", "*.md", "merges.txt", "LICENSE*") for path in source.glob(ending)]
    inside = [path for folder in folders for path in (source / folder).rglob("*")]
    return [path for path in [*top, *inside] if path.is_file()]
