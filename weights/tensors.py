"""Read a checkpoint's safetensors, tensor by tensor, and write one like it with other weights.

Nothing is renamed: keys are parameter names, with or without a leading ``model.``. Other formats (pickled .bin, GGUF)
are refused, since a pickle runs code.
"""

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3core.config import read_json
from qwen3core.errors import CheckpointError, InputError
from qwen3core.writing import writing_into

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in a safetensors header, those that weights of a model may have."""
OTHER_FORMATS = {".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".npz"}
"""Endings of weights that this does not read."""


class Tensors:
    """The tensors of a checkpoint by parameter name (no ``model.``), read on access, as pages of the file.

    ``tensors[name]`` raises CheckpointError where the tensor is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open every safetensors file and index its tensors. Raises CheckpointError."""
        self.directory = Path(directory)
        self._where: dict[str, tuple[Path, str, safe_open]] = {}
        mapped = weight_map(self.directory)
        for file in sorted({self.directory / shard for shard in mapped.values()}):
            handle = _open(file)
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name = key.removeprefix("model.")
                if name in self._where:
                    other, other_key, _ = self._where[name]
                    raise CheckpointError(
                        f"{file}: tensor {key!r}: expected it once, found it also in {other.name} as {other_key!r}"
                    )
                self._where[name] = (file, key, handle)
        for key, shard in mapped.items():
            if key and (found := self._locate(key.removeprefix("model."))[0].name) != shard:
                raise CheckpointError(
                    f"{self.directory / INDEX}: tensor {key!r}: expected it in {shard}, found it in {found}"
                )

    def __getitem__(self, name: str) -> Tensor:
        _, key, handle = self._locate(name)
        return handle.get_tensor(key)

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
            file, key, _ = self._locate(name)
            raise CheckpointError(f"{file}: tensor {key!r}: expected shape {list(shape)}, found {list(found)}")

    def check_none_left(self, expected: Container[str]) -> None:
        """Raise CheckpointError for a tensor that is not expected; an lm_head that is not needed stays on disk."""
        for name, (file, key, _) in self._where.items():
            if name not in expected and name != "lm_head.weight":
                raise CheckpointError(f"{file}: unexpected tensor {key!r}")

    def _locate(self, name: str) -> tuple[Path, str, safe_open]:
        if name not in self._where:
            files = ", ".join(sorted({file.name for file, _, _ in self._where.values()}))
            raise CheckpointError(f"{self.directory}: missing tensor {name!r} in {files}")
        return self._where[name]


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor key to file name, from the index; ``{"": SINGLE}`` where there is one file. Raises CheckpointError."""
    if (directory / SINGLE).exists():
        return {"": SINGLE}
    index = directory / INDEX
    if not index.exists():
        others = ", ".join(sorted(p.name for p in directory.iterdir() if p.suffix in OTHER_FORMATS))
        found = f"{others}, which this does not read" if others else "neither"
        raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, found {found}")
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor to file, found {mapped!r:.80}")
    for key, shard in mapped.items():
        inside = isinstance(shard, str) and shard == PurePosixPath(shard).name == PureWindowsPath(shard).name
        if not inside or not shard.endswith(".safetensors") or "\0" in shard:
            raise CheckpointError(
                f"{index}: tensor {key!r}: expected the name of a .safetensors file in this directory, "
                f"found {shard!r:.200}"
            )
    return mapped


def _open(file: Path) -> safe_open:
    if not os.path.isfile(file):
        found = "something else" if os.path.exists(file) else "nothing"
        raise CheckpointError(f"{file}: expected a safetensors file, found {found}")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found {file.stat().st_size} bytes that are not one ({error})"
        ) from error


def rewrite(source: str | Path, directory: str | Path, tensor: Callable[[str], Tensor]) -> None:
    """Write a checkpoint like ``source`` with other weights: same files, keys, shapes and dtypes; a shard in memory.

    tensor: by parameter name. ``directory`` is made if need be; its files change only once all are written. Raises
    InputError where it is in ``source``, or a weight is not finite in the checkpoint's dtype; CheckpointError, OSError.
    """
    source, directory = Path(source), Path(directory)
    check_apart(source, directory)
    tensors, others = Tensors(source), beside_weights(source)
    with writing_into(directory) as part:
        for file, keys in tensors.files().items():
            shard = {key: tensor(name).to(tensors[name].dtype).contiguous() for name, key in keys.items()}
            for key, weight in shard.items():
                if not weight.isfinite().all():
                    raise InputError(
                        f"{key}: expected weights that are finite in {weight.dtype}, found some that are not"
                    )
            save_file(shard, part / file.name, metadata={"format": "pt"})
        for path in others:
            copy_within(source, path, part)


def copy_within(source: Path, path: Path, directory: Path) -> None:
    """Copy a file of ``source`` to the same place in ``directory``."""
    copy = directory / path.relative_to(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)


def check_apart(source: Path, directory: Path) -> None:
    """Raise InputError where a checkpoint would be written over the one it is made from, or into it."""
    source, directory = source.resolve(), directory.resolve()
    if directory.is_relative_to(source):
        found = "the same" if directory == source else f"one inside {source}"
        raise InputError(f"{directory}: expected a directory other than the source's, found {found}")


def beside_weights(source: Path) -> list[Path]:
    """The other files of a checkpoint: by ending at its top, in folders that modules.json names, of chat templates.

    Whatever else is in its directory, such as earlier outputs, is none of it. Raises CheckpointError.
    """
    listed, named = source / "modules.json", set[str]()
    try:
        if listed.exists():
            named = {os.path.normpath(module["path"] or ".") for module in json.loads(listed.read_text("utf-8"))}
        if outside := [name for name in named if os.path.isabs(name) or name.split("/")[0] == ".."]:
            raise ValueError(f"outside of its directory: {outside[0]}")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{listed}: expected modules with paths, found something else ({error})") from error
    folders = named - {"."} | {"additional_chat_templates"}  # of transformers
    top = [path for ending in ("*.json", "*.jinja", "*.md", "merges.txt", "LICENSE*") for path in source.glob(ending)]
    inside = [path for folder in sorted(folders) for path in (source / folder).rglob("*")]
    return [path for path in [*top, *inside] if path.is_file()]
