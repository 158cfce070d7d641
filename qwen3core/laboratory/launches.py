"""Launches of kernels, written down with what Triton specialises on, to be compiled later.

    python -m qwen3core.laboratory.launches FOLDER [--target sm_90 ...]

compiles those of a folder and fails where one spills, or needs more shared memory than the target has. A line of JSON
is a launch that would be compiled anew: the kernel, its options, and its arguments, tensors as their dtype and the
bytes by which they miss an alignment of 16, descriptors as their fields.
"""

import argparse
import importlib
import json
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from . import gluon
from .compiling import SHARED_MEMORY, TARGETS, Pretender, configuration, usage
from .interpreter import use_exact_arithmetic

KEYS: dict[str, list[str]] = {}
"""What each kernel was specialised for, by its name: as many compilations as it would take."""


def interpret(target: str, folder: Path | None, inner: Callable[[Any], Any] = lambda x: x) -> None:
    """From now on launches for ``target`` are counted in ``KEYS``, written to the folder, and interpreted.

    inner: what a launch is given to what the interpreter is given.
    """
    use_exact_arithmetic()
    driver.set_active(Pretender(target))
    specialise, interpreted = JITFunction.run, cache(InterpretedFunction)

    def interpreting(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args, options = inner(args), inner(options)
        triton.knobs.runtime.jit_cache_hook = partial(note, folder, self, args, options)
        specialise(self, *args, grid=grid, warmup=True, **options)
        triton.knobs.runtime.jit_cache_hook = None
        run = partial(gluon.execute, self) if isinstance(self, GluonJITFunction) else interpreted(self.fn).run
        run(*args, grid=grid, warmup=warmup, **options)

    JITFunction.run = interpreting
    JITFunction.__call__ = lambda self, *args, **options: interpreted(self.fn)(*args, **options)


def note(folder: Path | None, function: Any, args: Any, options: dict[str, Any], *, key: Any, **_: Any) -> bool:
    """Write a launch down, if it is the first of its specialisation; Triton's hook: True compiles nothing."""
    name = function.fn.__name__
    if str(key) in KEYS.setdefault(name, []):
        return True
    KEYS[name].append(str(key))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        found = {"module": function.fn.__module__, "name": name, "args": encode(args), "options": encode(options)}
        with (folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return True


def encode(x: Any) -> Any:
    if isinstance(x, Tensor):
        return {"dtype": str(x.dtype).removeprefix("torch."), "misses": x.data_ptr() % 16}
    if isinstance(x, TensorDescriptor):
        return {name: encode(value) for name, value in vars(x).items()} | {"layout": vars(x.layout)}
    if isinstance(x, tuple | list):
        return [encode(part) for part in x]
    return {name: encode(value) for name, value in x.items()} if isinstance(x, dict) else x


def decode(x: Any) -> Any:
    if isinstance(x, dict) and "layout" in x:
        shapes = [x[name] for name in ("shape", "strides", "block_shape")]
        return TensorDescriptor(decode(x["base"]), *shapes, NVMMASharedLayout(**x["layout"]))
    if isinstance(x, dict):
        dtype = getattr(torch, x["dtype"])
        return torch.empty(32, dtype=dtype)[x["misses"] // dtype.itemsize :]
    return tuple(decode(part) for part in x) if isinstance(x, list) else x


def compile_all(folder: Path, target: str) -> Iterator[dict[str, Any]]:
    """Compile the launches of a folder: for each a row of what it takes. triton must not be interpreted."""
    driver.set_active(Pretender(target))
    lines = {line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()}
    seen = set()
    for line in sorted(lines):
        found = json.loads(line)
        function = getattr(importlib.import_module(found["module"]), found["name"])
        options = {name: decode(value) for name, value in found["options"].items()}
        kernel = function.run(*decode(found["args"]), grid=(1,), warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            row = {"target": target, "kernel": kernel.name, "config": configuration(kernel), **usage(kernel)}
            yield row | {"shared": kernel.metadata.shared, "of": SHARED_MEMORY[target]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=["sm_90"])
    args = parser.parse_args()
    bad = 0
    for target in args.target:
        for row in compile_all(args.folder, target):
            wrong = row["spill"] > 0 or row["shared"] > row["of"]
            print("WRONG " if wrong else "", *row.values(), flush=True)
            bad += wrong
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
