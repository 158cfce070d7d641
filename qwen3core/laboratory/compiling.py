"""Compile kernels for GPUs that are not here: what is compiled is what launchers launch.

with compiling("sm_90", compiled):  # triton must have been imported without TRITON_INTERPRET
    swiglu(gate, up)                # small CPU tensors: Triton is told that the target is there
usage(compiled[0])                  # registers, spills, tensor-core instructions
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SHARED_MEMORY = {target: 1024 * kib for target, kib in KIB.items()}
"""Bytes for one block: CUDA programming guide, technical specifications; CDNA 3 instruction set, LDS."""


class Pretender:
    """A driver that says the target is the current device."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # what is compiled is cached by device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiling(target: str, compiled: list[Any]) -> Iterator[None]:
    """Within, a launch compiles for ``target``, appends the result to the list ``compiled``, and does not run."""
    run, runnable = JITFunction.run, launch.require_runnable

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        compiled.append(run(self, *args, **(options | {"warmup": True})))

    driver.set_active(Pretender(target))
    JITFunction.run, launch.require_runnable = compile_only, lambda op, x: None
    try:
        yield
    finally:
        JITFunction.run, launch.require_runnable = run, runnable


def number(before: str, text: str) -> int:
    """The first number after a pattern."""
    match = re.search(rf"{before}(\d+)", text)
    assert match, before
    return int(match[1])


def usage(kernel: Any) -> dict[str, Any]:
    """Registers, spill and counts of the instructions of tensor cores and TMA, and of register trades, of a kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {name: number(rf"\.{name}:\s*", text) for name in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": counts["vgpr_count"],
            "spill": counts["vgpr_spill_count"],
            "tensor": f"{text.count('v_mfma')} v_mfma",
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, spill = (number(f"{name}:", text) for name in ("REG", "STACK"))
    counts = Counter(re.findall(r"\b(HGMMA|UTCHMMA|HMMA|UTMALDG|USETMAXREG)\b", text))
    return {"registers": registers, "spill": spill, "tensor": ", ".join(f"{n} {x}" for x, n in counts.items())}


def configuration(kernel: Any) -> str:
    """The block sizes among a compiled kernel's constants, the mask of attention, its warps and stages."""
    constants = {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    blocks = [f"{name}={value}" for name, value in constants.items() if name.startswith(("BLOCK", "ROWS", "CAUSAL"))]
    return " ".join([*blocks, f"warps={kernel.metadata.num_warps}", f"stages={kernel.metadata.num_stages}"])
