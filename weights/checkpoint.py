"""Find a checkpoint, read its safetensors, check every tensor, and assign them, memory-mapped, to a model.

Nothing is renamed: keys are parameter names, with or without a leading ``model.``. Other formats (pickled .bin, GGUF)
are refused, since a pickle runs code.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qwen3core.config import Qwen3Config, read_json
from qwen3core.errors import CheckpointError, InputError, warn
from qwen3core.model import Linear, Qwen3Model
from qwen3core.ops import Ops, resolve

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHIPPED = ("tiny-embedding", "tiny-reranker")
"""Small trained checkpoints beside this file."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``path_or_id`` itself, one of ``SHIPPED``, or a hub id's, downloaded if need be.

    The local cache answers first; HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are honoured. Raises CheckpointError.
    """
    name = str(path_or_id)
    if os.path.isdir(name):  # os.path: a name too long for a file is no error, it is just not there
        if revision is not None:
            raise InputError(f"revision: expected none with the local directory {name}, found {revision!r}")
        return Path(name)
    if name in SHIPPED and revision is None:
        return Path(__file__).parent / name
    if os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        found = "a file" if os.path.exists(name) else "nothing there"
        raise CheckpointError(
            f"{name}: expected a checkpoint directory, one of {', '.join(SHIPPED)}, or a hub id like owner/name, "
            f"found {found}"
        )

    def snapshot(local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.safetensors"], local_files_only=local_files_only
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if all((cached / file).exists() for file in ["tokenizer.json", *_weight_map(cached).values()]):
            return cached
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        pass  # not cached, or in part: fetch what is missing, or hear why not
    try:
        return snapshot(local_files_only=False)
    except Exception as error:  # the hub's client raises from several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: expected a local directory, a cached or a reachable hub id, found none "
            f"({type(error).__name__}: {reason})"
        ) from error


def load_model(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    ops: str | Ops = "auto",
    lm_head: bool = False,
) -> Qwen3Model:
    """A model with the checkpoint's weights, strictly checked; ``head`` for a reranker. Raises CheckpointError.

    dtype: a torch dtype or its name; ``"auto"`` is config.json's, else the tensors'. On both, and on ``"int8"``, on a
    CPU, see ``Pretrained.from_pretrained``. Where dtype and device keep the tensors as stored, they are pages of the
    file: opening costs no copy.
    """
    where = as_device(device)
    model, tensors = open_model(directory, ops=resolve(ops, where), lm_head=lm_head)
    int8 = dtype == "int8"
    target: torch.dtype | None = as_dtype("auto" if int8 else dtype, model, tensors)
    if where.type == "cpu" and target in (torch.bfloat16, torch.float16):
        if int8 or (dtype == "auto" and not cpu_has_bfloat16()):
            target, model.dtype = None, torch.float32
        elif target == torch.float16:
            warn("dtype float16 on a CPU: bfloat16 is used, since CPUs multiply float16 ten times as slowly")
            target = torch.bfloat16
    model.load_state_dict({name: tensors[name].to(where, target) for name in model.state_dict()}, assign=True)
    if int8:
        quantize(model)
    return model


def quantize(model: nn.Module) -> None:
    """Make the weights of every Linear int8. Raises InputError on a GPU."""
    for module in model.modules():
        if isinstance(module, Linear):
            if module.weight.device.type != "cpu":
                raise InputError(f"dtype int8: expected device cpu, found {module.weight.device}")
            module.quantize()


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, ARM's bf16); without, torch crawls."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text("utf-8")))


def open_model(
    directory: str | Path, *, ops: str | Ops = "auto", lm_head: bool = False
) -> tuple[Qwen3Model, "Tensors"]:
    """A model on the meta device and the tensors that fit it, strictly checked, none of them read yet."""
    config = Qwen3Config.from_file(Path(directory) / "config.json")
    tensors = Tensors(directory)
    tensors.require_layers(config.num_hidden_layers)
    rows, *_ = tensors.shape("embed_tokens.weight") or (0,)  # the tensor is right; config.json may be padded
    tensors.check("embed_tokens.weight", (rows, config.hidden_size))
    try:
        with torch.device("meta"):
            model = Qwen3Model(
                replace(config, vocab_size=rows), ops, lm_head=lm_head and not config.tie_word_embeddings
            )
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{directory}/config.json: expected the sizes of a model, found {config}") from error
    for name, parameter in model.state_dict().items():
        tensors.check(name, tuple(parameter.shape))
    tensors.check_none_left(model.state_dict())
    return model.eval(), tensors


class Tensors:
    """The tensors of a checkpoint by parameter name (no ``model.``), read on access, as pages of the file."""

    def __init__(self, directory: str | Path) -> None:
        """Open every safetensors file and index its tensors. Raises CheckpointError."""
        self.directory = Path(directory)
        self._where: dict[str, tuple[Path, str, safe_open]] = {}
        weight_map = _weight_map(self.directory)
        for file in sorted({self.directory / shard for shard in weight_map.values()}):
            handle = _open(file)
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name = key.removeprefix("model.")
                if name in self._where:
                    other, other_key, _ = self._where[name]
                    raise CheckpointError(
                        f"{file}: tensor {key!r}: expected it once, found it also in {other.name} as {other_key!r}"
                    )
                self._where[name] = (file, key, handle)
        for key, shard in weight_map.items():
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
        """Of every safetensors file, parameter names to the keys they have there."""
        files: dict[Path, dict[str, str]] = {}
        for name, (file, key, _) in self._where.items():
            files.setdefault(file, {})[name] = key
        return files

    def shape(self, name: str) -> tuple[int, ...]:
        _, key, handle = self._locate(name)
        return tuple(handle.get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        file, key, handle = self._locate(name)
        found = handle.get_slice(key).get_dtype()
        if found not in DTYPES:
            raise CheckpointError(f"{file}: tensor {key!r}: expected dtype {', '.join(DTYPES)}, found {found}")
        return str(DTYPES[found])

    def require_layers(self, count: int) -> None:
        """Before a model of ``count`` layers is built: an absurd count in config.json must not build one."""
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
        """Raise CheckpointError for a tensor that is not expected; a head that is not needed is left on disk."""
        for name, (file, key, _) in self._where.items():
            if name not in expected and name != "lm_head.weight":
                raise CheckpointError(f"{file}: tensor {key!r}: expected only the tensors of a Qwen3 decoder, found it")

    def _locate(self, name: str) -> tuple[Path, str, safe_open]:
        if name not in self._where:
            files = ", ".join(sorted({file.name for file, _, _ in self._where.values()}))
            raise CheckpointError(f"{self.directory}: tensor {name!r}: expected it in {files}, found it nowhere")
        return self._where[name]


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor key to file name, from the index; ``{"": SINGLE}`` for a checkpoint of one file."""
    if (directory / SINGLE).exists():
        return {"": SINGLE}
    index = directory / INDEX
    if not index.exists():
        suffixes = {".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".npz"}
        others = ", ".join(sorted(p.name for p in directory.iterdir() if p.suffix in suffixes))
        found = f"{others}, which this does not read" if others else "neither"
        raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, found {found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of tensor to file, found {weight_map!r:.80}")
    for key, shard in weight_map.items():
        inside = isinstance(shard, str) and shard == PurePosixPath(shard).name == PureWindowsPath(shard).name
        if not inside or not shard.endswith(".safetensors") or "\0" in shard:
            raise CheckpointError(
                f"{index}: tensor {key!r}: expected the name of a .safetensors file in this directory, "
                f"found {shard!r:.200}"
            )
    return weight_map


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


def is_embedding(directory: Path) -> bool:
    """Whether modules.json, of sentence-transformers, names a pooling; rerankers have none."""
    modules = directory / "modules.json"
    return modules.exists() and "Pooling" in modules.read_text("utf-8")


def rewrite(source: str | Path, directory: str | Path, tensor: Callable[[str], Tensor]) -> None:
    """Write a checkpoint like ``source`` with other weights: same files, keys, shapes and dtypes; a shard in memory.

    tensor: by parameter name. ``directory`` is made if need be; its files change only once all are written. Raises
    InputError where it is ``source`` itself.
    """
    source, directory = Path(source), Path(directory)
    check_apart(source, directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = Tensors(source)
    others = [p for p in source.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    with tempfile.TemporaryDirectory(dir=directory, prefix=".part.") as part:
        for file, keys in tensors.files().items():
            shard = {key: tensor(name).to(tensors[name].dtype).contiguous() for name, key in keys.items()}
            save_file(shard, Path(part) / file.name, metadata={"format": "pt"})
            shutil.copymode(file, Path(part) / file.name)  # safetensors writes it for the owner alone
        for path in others:
            copy = Path(part) / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for path in sorted(Path(part).rglob("*")):
            target = directory / path.relative_to(part)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)


def check_apart(source: Path, directory: Path) -> None:
    """Raise InputError where a checkpoint would be written over the one it is made from."""
    if directory.exists() and directory.samefile(source):
        raise InputError(f"{directory}: expected a directory other than the source's, found the same")


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that works; None is the first GPU where there is one, else the CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not in this build of torch
        raise InputError(f"device: expected one that torch can use here, found {device!r} ({error})") from error


def as_dtype(dtype: str | torch.dtype, model: Qwen3Model, tensors: Tensors) -> torch.dtype:
    """``torch.bfloat16`` or ``"bfloat16"``, if models are stored in it; ``"auto"`` is the checkpoint's own."""
    if dtype == "auto":
        dtype = model.config.dtype or tensors.dtype("embed_tokens.weight")
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in DTYPES.values():
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES.values())
        raise InputError(f"dtype: expected one of auto, int8, {names}, found {dtype!r}")
    return named
