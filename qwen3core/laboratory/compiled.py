"""What a variant compiles to, for GPUs that need not be here. In a process of its own, since triton is then imported
without its interpreter:

    python -m qwen3core.laboratory.compiled '{"sources": ["my.py:swiglu"], "targets": ["sm_90"]}'
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import OFFICIAL_SIZES
from ..errors import InputError
from .compiling import SHARED_MEMORY, TARGETS, compiling, configuration, usage
from .operations import cast
from .variants import PACKAGE, Variant, load

TOKENS = 64
"""Rows of what is compiled for; kernels are compiled for any number of them."""
SIZE = "0.6B"
"""The official model whose sizes are compiled for."""

PTX_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.(?!v\d)[a-zA-Z][\w:]*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)")
AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(?:[su]?(byte|short|dword))(?:x(\d))?")


def accesses(asm: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Instructions that load from global memory and store to it, counted by the bytes that each moves for a thread."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    if "amdgcn" in asm:
        for kind, unit, count in AMD_ACCESS.findall(asm["amdgcn"]):
            width = {"byte": 1, "short": 2, "dword": 4}[unit] * int(count or 1)
            (loads if kind == "load" else stores)[width] += 1
    else:
        for kind, count, bits in PTX_ACCESS.findall(asm["ptx"]):
            (loads if kind == "ld" else stores)[int(count or 1) * int(bits) // 8] += 1
        loads.update(int(size, 0) for size in PTX_COPY.findall(asm["ptx"]))
    return {
        name: {str(width): n for width, n in sorted(counts.items())}
        for name, counts in (("loads", loads), ("stores", stores))
    }


def rows(variant: Variant, target: str, dump: Path | None = None) -> list[dict[str, Any]]:
    """One row for each kernel that the variant launches in bfloat16, forward and backward, or the error.

    dump: a folder for PTX and SASS (for AMD: its assembly).
    """
    arguments = cast(variant.operation.large(OFFICIAL_SIZES[SIZE], TOKENS), torch.bfloat16)
    compiled: list[Any] = []
    try:
        with compiling(target, compiled):
            out = variant.function(*arguments)
            outs = [x for x in (out if isinstance(out, tuple | list) else [out]) if x.requires_grad]
            leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
            if outs and leaves:
                torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)
    except Exception as error:
        return [{"target": target, "error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}]
    found = []
    for kernel in {kernel.hash: kernel for kernel in compiled}.values():
        row = {"target": target, "kernel": kernel.name, "config": configuration(kernel), **usage(kernel)}
        found.append(row | {"shared": kernel.metadata.shared, "of": SHARED_MEMORY[target], **accesses(kernel.asm)})
        for language in ("ptx", "sass") if "ptx" in kernel.asm else ("amdgcn",):
            if dump:
                dump.mkdir(parents=True, exist_ok=True)
                (dump / f"{target}-{kernel.name}-{kernel.hash[:8]}.{language}").write_text(
                    kernel.asm[language], "utf-8"
                )
    return found


def compile_elsewhere(
    sources: Sequence[str], op: str | None, tune: bool, targets: Sequence[str], dump: Path | None
) -> dict[str, list[dict[str, Any]]]:
    """``rows`` for each target, by variant's name, out of a process without the interpreter. Raises InputError."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    job = {"sources": list(sources), "op": op, "tune": tune, "targets": list(targets), "dump": dump and str(dump)}
    run = subprocess.run(
        [sys.executable, "-m", "qwen3core.laboratory.compiled", json.dumps(job)],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise InputError(f"compile: expected rows, found {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(job: dict[str, Any]) -> None:
    """Print the rows of a job as JSON, by the variant's name."""
    variants = [variant for source in job["sources"] for variant in load(source, job["op"], tune=job["tune"])]
    dump = Path(job["dump"]) if job["dump"] else None
    print(json.dumps({v.name: [row for target in job["targets"] for row in rows(v, target, dump)] for v in variants}))


if __name__ == "__main__":
    main({"op": None, "tune": False, "targets": list(TARGETS), "dump": None} | json.loads(sys.argv[1]))
