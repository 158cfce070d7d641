"""``reference.int8_linear`` through oneDNN, on CPUs with instructions for int8 (VNNI, AMX)."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn

from .products import in_sizes

BLOCK = 2**19
"""Numbers that are quantised at a time: what lies between x and its int8 then stays in the cache."""


class Packed:
    """int8 weights [out, in], those of several projections one after the other, as oneDNN lays them out for itself."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.zero = scale, torch.zeros(len(scale), dtype=torch.int32)

    def weight(self) -> Tensor:
        """As it was given."""
        return self.packed.to_dense().T.contiguous()

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.weight(), self.scale)  # no copy is made of a packed tensor

    def linear(self, x: Tensor) -> Tensor:
        """``reference.int8_linear`` of rows x [T, in]; in bfloat16 with one rounding more."""
        rows, row_scale = int8_rows(x)
        rows = rows.view(torch.uint8).bitwise_xor_(128)  # 128 more: without AMX, signed rows take 5000 times as long
        last = (None, 1.0, 0, torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32, "none", [None], "")

        def product(part: Tensor) -> Tensor:
            return torch.ops.onednn.qlinear_pointwise(part, 1.0, 128, self.packed, self.scale, self.zero, *last)

        return in_sizes(product, rows).mul_(row_scale[:, None]).to(x.dtype)


@torch.no_grad()
def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.int8_rows``, the same numbers, with fewer passes over memory."""
    quantized, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    size = max(1, BLOCK // x.shape[1])
    wide = torch.empty(min(size, len(x)), x.shape[1])
    for part, rows, row_scale in zip(x.split(size), quantized.split(size), scale.split(size), strict=True):
        if x.dtype == torch.bfloat16:  # without the sign, it is as large as its bits are
            largest = part.view(torch.int16).bitwise_and(0x7FFF).amax(-1).view(torch.bfloat16)
        else:
            largest = part.abs().amax(-1)
        row_scale.copy_(largest.float().div_(127).clamp_(min=1e-30))
        rows.copy_(wide[: len(part)].copy_(part).div_(row_scale[:, None]).round_())
    return quantized, scale


@cache
def has_int8() -> bool:
    """Whether this CPU has instructions for it, and torch has oneDNN; without, oneDNN's sums would overflow."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    return mkldnn.is_available() and bool(re.search(r"\b(avx512_vnni|avx_vnni)\b", flags))
