"""Each kernel once beside the specification on a device, before ``ops="auto"`` takes it there.

No GPU has confirmed these kernels yet. So the first model that is opened on one compares them there, forward and
backward, in bfloat16: some hundred tokens with the sizes of 0.6B, in milliseconds once the kernels are compiled.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen3core import reference
from qwen3core.batch import build_cu_seqlens
from qwen3core.config import OFFICIAL_SIZES
from qwen3core.errors import warn
from qwen3core.ops import OPERATIONS, Ops

DTYPE = torch.bfloat16
TOLERANCE = 2e-2
"""Relative Frobenius error against float32, of each result and gradient: bfloat16 operands give 1e-3 to 1e-2."""
EPS = 1e-6
LENGTHS = [1, 40, 67], [90, 40, 130]
"""Queries and keys of each sequence."""


def confirm(ops: Ops, device: torch.device) -> Ops:
    """``ops`` with torch's operation in place of each that is wrong on this device; a warning says which, and how.

    A fused operation that is wrong is left out, as are those that stand for a wrong one. A GPU is waited for.
    """
    with torch.inference_mode(False), torch.enable_grad():
        for name, (specification, args) in _cases(device).items():
            function = getattr(ops, name)
            if function and (found := _disagreement(function, specification, args)):
                warn(
                    f"ops 'auto': {name}: expected a kernel that agrees with torch on {device} within {TOLERANCE:g}, "
                    f"found {found}: torch's is used (ops='triton' takes all kernels unchecked)"
                )
                replacement: Any = getattr(Ops.torch(), name) if name in OPERATIONS else None
                ops = replace(ops, **{name: replacement})
    return replace(ops, checked=str(device))


def _disagreement(function: Callable, specification: Callable, args: tuple) -> str:
    """What is wrong with a function, in words; nothing if it is right."""
    wide = [
        x.detach().float().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in args
    ]
    expected = _results(specification, wide)
    try:
        found = _results(function, args)
        errors = [(a.float() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    except Exception as error:  # whatever Triton's compiler or the driver raises
        return f"{type(error).__name__}: {error}".split("\n")[0][:200]
    worst = torch.stack(errors).max().item()  # NaN, if there is one
    return "" if worst <= TOLERANCE else f"a relative error of {worst:.2g}"


def _results(function: Callable, args: Any) -> list[Tensor]:
    """Outputs, and the gradients of what requires them for fixed random cotangents."""
    out = function(*args)
    outs = [out] if isinstance(out, Tensor) else list(out)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in outs]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, cotangents)]


def _cases(device: torch.device) -> dict[str, tuple[Callable, tuple]]:
    """For each operation of ``Ops`` that has kernels: its specification and arguments."""
    config, generator = OFFICIAL_SIZES["0.6B"], torch.Generator().manual_seed(0)
    hidden, inner, D = config.hidden_size, config.intermediate_size, config.head_dim

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, DTYPE).requires_grad_()

    cu_q, cu_k = (build_cu_seqlens(lengths).to(device) for lengths in LENGTHS)
    Tq, Tk = map(sum, LENGTHS)
    x, residual, gate, up = (randn(Tk, n) for n in (hidden, hidden, inner, inner))
    q, k, v = (randn(Tk, heads, D) for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2))
    weight, q_weight, k_weight = randn(hidden), randn(D), randn(D)
    cos, sin = (angles(randn(Tk, D).detach()) for angles in (torch.cos, torch.sin))
    direction = (randn(hidden).detach().float() / hidden**0.5).requires_grad_()

    return {
        "rms_norm": (reference.rms_norm, (x, weight, EPS)),
        "attention": (reference.attention, (q[:Tq], k, v, cu_q, cu_k, max(LENGTHS[0]), max(LENGTHS[1]))),
        "swiglu": (reference.swiglu, (gate, up)),
        "add_rms_norm": (reference.add_rms_norm, (x, weight, EPS, residual)),
        "qk_norm_rope": (reference.qk_norm_rope, (q, k, q_weight, k_weight, EPS, cos, sin)),
        "norm_pool": (reference.norm_pool, (x, weight, EPS, cu_k, hidden // 2, True)),
        "norm_score": (reference.norm_score, (x, weight, EPS, cu_k, direction)),
    }
