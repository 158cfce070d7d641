"""What all launchers share, in the order of a call: checks of arguments, then the launch itself.

Numbers that change from batch to batch are in each kernel's ``do_not_specialize``: Triton would otherwise compile again
for 1 and for multiples of 16.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from qwen3core.errors import InputError

INTERPRETED = triton.knobs.runtime.interpret
"""TRITON_INTERPRET=1 was set when the kernels were imported: they run on the CPU, through numpy, slowly."""

BFLOAT16_INTERPRETED = False
"""Triton's interpreter has been made right in bfloat16: qwen3core.laboratory.interpreter sets it."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(op: str, *, eps: float = 1.0, **tensors: tuple[Tensor, str]) -> None:
    """Check tensors against shapes of named sizes: ``check("swiglu", gate=(gate, "T I"), up=(up, "T I"))``.

    All must be on one device that can run kernels, of one dtype out of float32, bfloat16 and float16, with stride 1
    along the last dimension; sizes of the same name must agree, and eps be above 0. Raises InputError.
    """
    if not eps > 0:
        raise InputError(f"{op}: eps: expected more than 0, found {eps}")
    sizes: dict[str, int] = {}
    first = next(iter(tensors.values()))[0]
    for name, (x, shape) in tensors.items():
        names = shape.split()
        expected = [sizes.setdefault(size, found) for size, found in zip(names, x.shape, strict=False)]
        if x.dim() != len(names) or list(x.shape) != expected:
            known = ", ".join(f"{size} = {sizes[size]}" for size in names if size in sizes)
            raise InputError(f"{op}: {name}: expected [{', '.join(names)}] with {known}, found {list(x.shape)}")
        if x.device != first.device:
            raise InputError(f"{op}: {name}: expected a tensor on {first.device}, found one on {x.device}")
        if x.dtype not in KERNEL_DTYPES or x.dtype != first.dtype:
            wanted = first.dtype if first.dtype in KERNEL_DTYPES else "float32, bfloat16 or float16"
            raise InputError(f"{op}: {name}: expected {wanted}, found {x.dtype}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise InputError(f"{op}: {name}: expected stride 1 along the last dimension, found strides {x.stride()}")
    require_runnable(op, first)


def require_runnable(op: str, x: Tensor) -> None:
    """Raise InputError where kernels cannot run on x."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"{op}: expected tensors on a GPU (or TRITON_INTERPRET=1 in the environment), found {x.device}"
        )
    if x.dtype == torch.bfloat16 and INTERPRETED and not BFLOAT16_INTERPRETED:
        raise InputError(
            f"{op}: expected float32 or float16, found bfloat16, in which Triton's interpreter is wrong: call "
            "qwen3core.laboratory.interpreter.use_exact_arithmetic first"
        )


def forward_only(op: str, *tensors: Tensor) -> None:
    """Raise InputError where autograd would want a gradient from a kernel that has no backward."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InputError(f"{op}: expected torch.no_grad() or tensors without requires_grad: it has no backward")


def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, like: Tensor, shortest: int, debug: bool) -> None:
    """Check that ``cu_seqlens`` [N + 1] int32 delimits the rows of ``like`` in sequences of at least ``shortest`` rows.

    Its values are read on the CPU, or with debug: on a GPU that waits for the device. Raises InputError.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype != torch.int32 or cu_seqlens.stride(0) != 1:
        found = f"{list(cu_seqlens.shape)} {cu_seqlens.dtype}, stride {cu_seqlens.stride()}"
        raise InputError(f"{op}: {name}: expected [N + 1] int32, contiguous, found {found}")
    if cu_seqlens.device != like.device:
        raise InputError(f"{op}: {name}: expected a tensor on {like.device}, found one on {cu_seqlens.device}")
    if debug or like.device.type == "cpu":
        values = cu_seqlens.tolist()
        steps = cu_seqlens.diff().tolist()
        if values[0] != 0 or values[-1] != len(like) or min(steps, default=shortest) < shortest:
            raise InputError(
                f"{op}: {name}: expected to go from 0 to {len(like)} in steps of at least {shortest}, found {values}"
            )


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    """Run ``kernel[grid](x, *args, **options)`` on x's device; an empty grid is no launch."""
    if 0 not in grid:
        with torch.cuda.device_of(x):
            # Explicit, since Triton 3.10 changes the default and the last bits of results with it.
            kernel[grid](x, *args, enable_fp_fusion=True, **options)
