"""Devices and dtypes: what weights are stored in, what they are computed in, and int8."""

import re
from pathlib import Path

import torch
from torch import nn

from qwen3core.errors import InputError, warn
from qwen3core.model import MLP, Attention, Qwen3Model
from qwen3core.model import quantize as quantize_together
from qwen3core.products import give_back

from .tensors import SAFETENSORS_DTYPES, Tensors


def as_device(device: str | torch.device | None) -> torch.device:
    """A device that works; None is the first GPU where there is one, else the CPU. Raises InputError."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not in this build of torch
        raise InputError(f"device: expected one that torch can use here, found {device!r} ({error})") from error


def as_dtype(dtype: str | torch.dtype, model: Qwen3Model, tensors: Tensors) -> torch.dtype:
    """``torch.bfloat16`` or ``"bfloat16"``, if models are stored in it; ``"auto"`` is the checkpoint's own.

    Raises InputError for any other.
    """
    if dtype == "auto":
        dtype = model.config.dtype or tensors.dtype("embed_tokens.weight")
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in SAFETENSORS_DTYPES.values():
        names = ", ".join(str(d).removeprefix("torch.") for d in SAFETENSORS_DTYPES.values())
        raise InputError(f"dtype: expected one of auto, int8, {names}, found {dtype!r}")
    return named


def choose(
    dtype: str | torch.dtype, device: torch.device, model: Qwen3Model, tensors: Tensors
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtype to convert weights to, None for as stored; and the compute dtype, None for that of the weights.

    dtype: as in ``load_model``. A CPU multiplies neither float16 nor, without instructions for it, bfloat16 at a
    useful speed: weights stored so are computed with in float32, or float16 is replaced by bfloat16. int8 is computed
    with in the dtype of the two that the CPU multiplies.
    """
    int8 = dtype == "int8"
    target = as_dtype("auto" if int8 else dtype, model, tensors)
    if device.type == "cpu" and target in (torch.bfloat16, torch.float16):
        if int8 or (dtype == "auto" and not cpu_has_bfloat16()):
            return None, torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        if target == torch.float16:
            warn("dtype float16 on a CPU: bfloat16 is used, since CPUs multiply float16 ten times as slowly")
            return torch.bfloat16, None
    return target, None


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, ARM's bf16); without, torch crawls."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpuinfo.read_text("utf-8")))


def quantize(model: nn.Module) -> None:
    """Make the weights of every Linear int8, of those that share their input together. Raises InputError on a GPU."""
    for module in model.modules():
        if isinstance(module, Attention):
            together = [(module.q_proj, module.k_proj, module.v_proj), (module.o_proj,)]
        elif isinstance(module, MLP):
            together = [(module.gate_proj, module.up_proj), (module.down_proj,)]
        else:
            continue
        for linears in together:
            if (found := linears[0].weight.device).type != "cpu":
                raise InputError(f"dtype int8: expected device cpu, found {found}")
            stored = [linear.weight for linear in linears]
            quantize_together(*linears)
            give_back(stored)
