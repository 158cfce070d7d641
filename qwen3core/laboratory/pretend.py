"""A GPU that is not there: the dry run of whatever runs on one.

    python -m qwen3core.laboratory.pretend [--target sm_90] [--launches FOLDER] PROGRAM [ARGUMENT ...]

PROGRAM is what follows ``python``: FILE.py, -m MODULE or -c CODE; or a shell script, whose $PYTHON is a Python where
the same holds. There, torch says that it has one GPU. Its tensors are tensors of the CPU that say otherwise: to mix
them with the CPU's is an error, as on a GPU, and whatever would make the host wait for it is in ``WAITS``. Launches go
to Triton's interpreter, and are written to a folder, from which ``launches.compile_all`` compiles them.

What it does not imitate: speed, memory, streams, races, what a GPU's own kernels round; ``torch.compile`` gives the
function as it is. In-place changes of a tensor's shape are not followed.
"""

import argparse
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import TensorBase
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from .. import profiling
from . import timing

USAGE = "python -m qwen3core.laboratory.pretend [--target sm_90] [--launches FOLDER] PROGRAM [ARGUMENT ...]"
GPU = torch.device("cuda", 0)
NAME = "pretended GPU"
WAITS: list[str] = []
"""What the host waited for, in order: an operation, and the line that asked."""
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
"""Operations of torch whose result or its size the host must know."""
MIXING = {"copy_", "index", "index_put", "index_put_", "_index_put_impl_"}
"""Operations that take tensors of both; they copy, and wait."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        # The CPU's to all of torch but Python: its autograd and its choice of operations need no GPU.
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.on_cpu = inner

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.on_cpu!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ask(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # where views of tensors made outside would need a version
            with torch.inference_mode(False), torch.no_grad():
                return run(func, args, kwargs or {})
        return run(func, args, kwargs or {})


class Leave(torch.autograd.Function):
    """From the GPU to the CPU."""

    @staticmethod
    def forward(ctx: Any, x: OnGPU) -> Tensor:
        return x.on_cpu.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return OnGPU(dy)


class Enter(torch.autograd.Function):
    """From the CPU to the GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> OnGPU:
        return OnGPU(x.clone())

    @staticmethod
    def backward(ctx: Any, dy: OnGPU) -> Tensor:
        return dy.on_cpu


def move(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``."""
    copy = kwargs.pop("copy", False)
    if "other" in kwargs or (args and isinstance(args[0], Tensor)):
        other = kwargs["other"] if "other" in kwargs else args[0]
        device, dtype, blocking = other.device, other.dtype, True
    else:
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        blocking = not (non_blocking and getattr(x, "pinned", False))
    on_gpu, to_gpu = isinstance(x, OnGPU), device is not None and device.type == "cuda"
    x = x.to(dtype or x.dtype, copy=copy)
    if device is None or on_gpu == to_gpu:
        return x
    if on_gpu or blocking:
        wait("to cuda" if to_gpu else "to cpu")
    return (Enter if to_gpu else Leave).apply(x)


def pin(x: Tensor, *_: Any) -> Tensor:
    """``Tensor.pin_memory``, which needs a GPU."""
    pinned = x.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


MOVES: dict[Any, Callable[..., Any]] = {
    Tensor.to: move,
    Tensor.cpu: lambda x, *_: move(x, "cpu"),
    Tensor.cuda: lambda x, *_, non_blocking=False: move(x, GPU, non_blocking=non_blocking),
    Tensor.type_as: move,
    Tensor.pin_memory: pin,
}


def ask(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of torch as Python calls it, which may name the GPU."""
    func = original(func)
    with torch._C.DisableTorchFunctionSubclass() if OnGPU in types else nullcontext():
        if func in MOVES:
            return MOVES[func](*args, **kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]).type != "cuda":
            return func(*args, **kwargs)
        x = func(*args, **(kwargs | {"device": "cpu"}))
    if isinstance(x, OnGPU):
        return x
    if func in (torch.tensor, torch.as_tensor):
        wait("to cuda")
    return OnGPU(x.detach()).requires_grad_(x.requires_grad)


def original(func: Any) -> Any:
    """torch's own method where a program has replaced it: torch looks methods up by name, and would call that again."""
    if isinstance(func, FunctionType) and not func.__module__.startswith("torch"):
        return next((getattr(TensorBase, name) for name, own in vars(Tensor).items() if own is func), func)
    return func


def on_cpu(x: Any) -> Any:
    """What the pretended GPU's tensors, and descriptors of them, are on the CPU."""
    if hasattr(x, "block_shape"):
        return replace(x, base=on_cpu(x.base))
    return x.on_cpu if isinstance(x, OnGPU) else x


def wait(what: str) -> None:
    """Note that the host waits, and for whom."""
    stack = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    line = next((f"{f.filename}:{f.lineno}" for f in reversed(stack) if f.filename != __file__), "")
    WAITS.append(f"{what}, {line}")


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of torch, or one of the package's own, which runs as if it were on the GPU."""
    if func.namespace == "qwen3core":
        with MODE:
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    name = func._schema.name.partition("::")[2]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    others = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
    if ours and others and name not in MIXING:
        raise RuntimeError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in ours[1:])
    sized = name == "repeat_interleave" and "output_size" not in kwargs
    if ours and (name in WAITING or others or by_mask or sized):
        wait(name)
    wrapped = {id(x.on_cpu): x for x in ours}
    args, kwargs = tree_map(on_cpu, (args, kwargs))
    out = func(*args, **kwargs)
    if not isinstance(tensors[0], OnGPU) and name == "copy_":
        return out
    return tree_map_only(Tensor, lambda x: wrapped[id(x)] if id(x) in wrapped else OnGPU(x), out)


class Mode(TorchFunctionMode):
    """Sees what is asked for on the GPU without a tensor of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ask(func, types, args, kwargs or {})


MODE = Mode()


class Event:
    """The n-th is recorded n milliseconds after the start."""

    recorded = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0

    def record(self, stream: object = None) -> None:
        Event.recorded += 1
        self.time = Event.recorded

    def synchronize(self) -> None:
        wait("event")

    def elapsed_time(self, end: "Event") -> float:
        return float(end.time - self.time)


def stand_ins(major: int, minor: int) -> dict[str, Any]:
    """What torch.cuda is asked for, of a device of that compute capability."""
    memory = 80 * 2**30
    properties = SimpleNamespace(
        name=NAME, total_memory=memory, major=major, minor=minor, multi_processor_count=132, gcnArchName=NAME
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **options: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (memory, memory),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: wait("synchronize"),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.empty(0),
        "set_rng_state": lambda state, device=None: None,
        "set_device": lambda device: None,
        "device_of": lambda x: nullcontext(),
        "Event": Event,
        "_lazy_init": lambda: None,
    }


def start(target: str, launches: Path | None = None) -> None:
    """From now on there is a GPU, whose launches are written to the folder; its tensors need ``MODE``."""
    from ..kernels import launch  # not before: they import triton
    from . import launches as recording
    from .compiling import TARGETS

    arch = TARGETS[target].arch
    for name, value in stand_ins(*divmod(arch, 10) if isinstance(arch, int) else (9, 4)).items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda model=None, **options: model if model else (lambda f: f)  # type: ignore[assignment]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or Module.to would change their data alone
    profiling.LARGE["cuda"], timing.FLUSH = profiling.LARGE["cpu"], 1  # what only a GPU does quickly
    check = torch.library.opcheck

    def opcheck(*args: Any, **options: Any) -> Any:
        with patch.object(launch, "INTERPRETED", True):  # on the CPU: it changes tensors' shapes in place
            return check(*tree_map(on_cpu, args), **options)

    torch.library.opcheck = opcheck
    recording.interpret(target, launches, inner=partial(tree_map, on_cpu))


def python(folder: Path, options: list[str]) -> str:
    """An executable file that is this Python with the pretended GPU."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {__name__} {shlex.join(options)} "$@"\n', "utf-8")
    path.chmod(0o755)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], usage=USAGE)
    parser.add_argument("--target", default="sm_90", help="whose configurations are launched (default: sm_90)")
    parser.add_argument("--launches", type=Path, help="folder that launches are written to")
    own: list[str] = []
    program = sys.argv[1:]
    while program and program[0] in ("--target", "--launches"):  # the program has options of its own
        own, program = own + program[:2], program[2:]
    if not program or program[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    args = parser.parse_args(own)
    options = ["--target", args.target]
    if args.launches:
        args.launches = args.launches.absolute()  # programs change folders
        options += ["--launches", str(args.launches)]
    os.environ.pop("TRITON_INTERPRET", None)  # launches are interpreted, kernels are not
    with tempfile.TemporaryDirectory() as folder:
        executable = python(Path(folder), options)
        if program[0].endswith(".sh"):
            raise SystemExit(subprocess.run(["bash", *program], env=os.environ | {"PYTHON": executable}).returncode)
        sys.executable = executable
        start(args.target, args.launches)
        with MODE:
            run_program(program)


def run_program(program: list[str]) -> None:
    """As ``python`` would."""
    kind, *rest = program
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = program
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    from qwen3core.laboratory import pretend  # or its tensors would be of two classes

    pretend.main()
