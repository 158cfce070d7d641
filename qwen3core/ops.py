"""``Ops``: every operation that a kernel may replace, as one value.

    model.ops = dataclasses.replace(model.ops, rms_norm=mine)     # swaps it everywhere, q_norm and k_norm included

Some kernels do several operations at once. Such a fused operation declares the parts that it stands for, and a set
uses it only while each of these is the set's own: with one part replaced, the fused operation is dropped. ``repr``
shows what a set uses. An operation that cannot take an input raises and says why.

What a set allows, it knows from what its functions declare (``reference.declare``). A function that declares nothing is
right everywhere, and slower: the model then takes no shortcut around it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn

from . import ops_torch, products, reference
from .errors import InputError
from .reference import allows

OPERATIONS = ("linear", "rms_norm", "rope", "attention", "swiglu", "pool")
"""Fields of ``Ops`` that every set has."""
FUSED = ("linears", "add_rms_norm", "qk_norm_rope", "norm_pool", "norm_score")
"""Fields of ``Ops`` that stand for several of them."""


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation. Signatures, shapes and precision: ``reference.py``, same names.

    Example:
        >>> Ops.torch().shortcuts, replace(Ops.torch(), pool=lambda *args: reference.pool(*args)).shortcuts
        (True, False)
    """

    linear: Callable[[Tensor, Tensor], Tensor]
    """(x, weight) to x @ weight.T"""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x, weight, eps); q_norm and k_norm as well"""
    rope: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(queries or keys, cos, sin)"""
    attention: Callable[..., Tensor]
    """(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) to z"""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate, up) to silu(gate) * up"""
    pool: Callable[[Tensor, Tensor, int, bool], Tensor]
    """(hidden_states, cu_seqlens, dim, normalize) to one vector for each text"""

    linears: Callable[..., tuple[Tensor, ...]] | None = None
    """(x, *weights) to x @ weight.T of each"""
    add_rms_norm: Callable[[Tensor, Tensor, float, Tensor], tuple[Tensor, Tensor]] | None = None
    """(x, weight, eps, residual) to (rms_norm(x + residual), x + residual)"""
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]] | None = None
    """(q, k, q_weight, k_weight, eps, cos, sin) to rope(rms_norm(q)), rope(rms_norm(k))"""
    norm_pool: Callable[[Tensor, Tensor, float, Tensor, int, bool], Tensor] | None = None
    """(x, weight, eps, cu_seqlens, dim, normalize) to pool(rms_norm(x))"""
    norm_score: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor] | None = None
    """(x, weight, eps, cu_seqlens, w_yes - w_no [H] float32) to P(yes) [N] from pool(rms_norm(x))"""

    checked: str = field(default="", compare=False)
    """The GPU where its kernels were compared with torch before they were used; empty where they were not."""
    row_wise: bool = field(init=False, compare=False)
    """Rows may go through a layer in blocks: all but attention and pooling are declared row-wise."""
    shortcuts: bool = field(init=False, compare=False)
    """Rows may be left out or shared: row-wise, causal attention, pooling of the last token, all declared."""

    def __post_init__(self) -> None:
        for name in FUSED:
            function = getattr(self, name)
            parts = allows(function).parts
            if function is not None and not parts:
                raise InputError(f"ops: {name}: expected a function with reference.declare(parts=...), found none")
            if any(getattr(self, part) is not own for part, own in parts.items()):
                object.__setattr__(self, name, None)
        found = {name: allows(f) for name in (*OPERATIONS, *FUSED) if (f := getattr(self, name))}
        pooling = [found.pop(name) for name in ("pool", "norm_pool", "norm_score") if name in found]
        causal = found.pop("attention").causal
        row_wise = all(each.row_wise for each in found.values())
        object.__setattr__(self, "row_wise", row_wise)
        object.__setattr__(self, "shortcuts", row_wise and causal and all(each.last_token for each in pooling))

    @staticmethod
    def reference() -> "Ops":
        """The specification."""
        return Ops(**{name: getattr(reference, name) for name in OPERATIONS})

    @staticmethod
    def torch() -> "Ops":
        """Fast with stock PyTorch: what it ships fused, and in place where no gradient is recorded.

        On CPUs with bfloat16, oneDNN lays each bfloat16 weight that is pages of a file out for itself, at its 9th use;
        those pages then leave the process's memory.
        """
        own = ("rms_norm", "rope", "attention", "swiglu", "qk_norm_rope")
        functions = {name: getattr(ops_torch, name) for name in own}
        return Ops(linear=products.linear, linears=products.linears, pool=reference.pool, **functions)

    @staticmethod
    def prepacked() -> "Ops":
        """``torch()`` with each weight in oneDNN's layout from its first use: faster on a CPU, most for one short text.

        Where the weights are not pages of a file in the compute dtype, that is a second copy of every linear weight. A
        weight changed in place is converted anew, but not one changed through ``.data``. It is ``torch()`` while
        gradients are recorded, on a GPU, in bfloat16 on a CPU where oneDNN has no bfloat16, and for weights made in
        inference mode, whose changes are not counted.
        Raises InputError where torch is built without oneDNN.
        """
        if not mkldnn.is_available():
            raise InputError("ops 'prepacked': expected a torch built with oneDNN, found one without (use 'torch')")
        return replace(Ops.torch(), linear=products.prepacked_linear, linears=products.prepacked_linears)

    @staticmethod
    def batch_invariant() -> "Ops":
        """``prepacked()`` that gives a text the same bits whatever shares its batch, on a CPU.

        Neighbours, their order, ``batch_tokens``, a shared prefix or a cache then change no bit of a vector or score,
        at a fixed number of threads; modules after pooling (Dense) are not looked after. Its price: bench/README.md.
        Raises InputError where torch is built without oneDNN.
        """
        own = {name: getattr(products, f"invariant_{name}") for name in ("linear", "linears")}
        return replace(Ops.prepacked(), **own, attention=ops_torch.blocked_attention)

    @staticmethod
    def triton() -> "Ops":
        """The Triton kernels of ``qwen3core.kernels``, forward and backward; rope and pool alone are the reference.

        They run on a GPU in float32, bfloat16 and float16, and on the CPU, slowly, with TRITON_INTERPRET=1 in the
        environment. Raises InputError where triton is not installed.
        """
        try:
            from .kernels import attention, pooling, qk_norm_rope, rms_norm, swiglu
        except ImportError as error:
            raise InputError(f"ops 'triton': triton is not installed: pip install triton ({error})") from error
        return Ops(
            linear=reference.linear,
            rms_norm=rms_norm.rms_norm,
            rope=reference.rope,
            attention=attention.attention,
            swiglu=swiglu.swiglu,
            pool=reference.pool,
            add_rms_norm=rms_norm.add_rms_norm,
            qk_norm_rope=qk_norm_rope.qk_norm_rope,
            norm_pool=pooling.norm_pool,
            norm_score=pooling.norm_score,
        )

    def __repr__(self) -> str:
        functions = {name: f for name in (*OPERATIONS, *FUSED) if (f := getattr(self, name))}
        names = (f"{name}={f.__module__}.{getattr(f, '__qualname__', repr(f))}" for name, f in functions.items())
        checked = f", checked={self.checked!r}" if self.checked else ""
        return f"Ops({', '.join(names)}, shortcuts={self.shortcuts}{checked})"


def resolve(ops: "Ops | str", device: torch.device | None = None) -> Ops:
    """An Ops, or the name of one; ``"auto"`` is triton for a GPU, else torch. Raises InputError.

    For ``"auto"`` each kernel is first compared with torch on that GPU, once in a process; what is wrong is replaced,
    and a warning says so. ``"triton"`` takes the kernels as they are.
    """
    if isinstance(ops, Ops):
        return ops
    auto = partial(_confirmed, device) if device is not None and device.type == "cuda" else Ops.torch
    sets = {
        "auto": auto,
        "reference": Ops.reference,
        "torch": Ops.torch,
        "prepacked": Ops.prepacked,
        "batch_invariant": Ops.batch_invariant,
        "triton": Ops.triton,
    }
    if not isinstance(ops, str) or ops not in sets:
        raise InputError(f"ops: expected one of {', '.join(sets)}, or an Ops, found {ops!r}")
    return sets[ops]()


@cache
def _confirmed(device: torch.device) -> Ops:
    from .kernels.confirm import confirm

    return confirm(Ops.triton(), device)


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``function(*args, **options)``. Raises InputError where an operation of one's own does not take an option."""
    try:
        return function(*args, **options)
    except TypeError as error:
        parameters = inspect.signature(function).parameters if options else {}
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if missing := [name for name in options if name not in parameters and not takes_any]:
            raise InputError(
                f"ops: expected a function that takes {missing[0]}= as reference.py's does, which this checkpoint or "
                f"this capture needs, found {getattr(function, '__qualname__', function)!r}"
            ) from error
        raise
