"""Is a function the operation that it stands for? ``check_op`` says, and guesses what is wrong where it is not.

    report = check_op(my_rms_norm, "rms_norm")
    print(report); assert report.ok

The rule: the error against float64 is at most OPS_RATIO times that of the specification in the same dtype, for each
output and each gradient (Frobenius norms). Inputs and outputs stand in buffers of NaN, so that a read out of bounds
makes a result NaN and a write out of bounds is seen. Functions run on the GPU where there is one, else on the CPU:
Triton kernels through its interpreter, if TRITON_INTERPRET=1 was set before triton was imported.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..errors import InputError, check_one_of
from ..kernels import launch
from ..ops import Ops
from ..profiling import device_name
from .interpreter import use_exact_arithmetic
from .operations import CANCELLED, OPERATIONS, OPS_RATIO, SMALL, Operation, cast

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROW = ("float16", "bfloat16")
LAYOUTS = ("contiguous", "strided", "no gradient")
"""How each case is run; the last is contiguous, too."""

MARGIN = 2**16
"""Elements before and after each tensor that nothing may touch: more than a tile has."""

AROUND = 77
"""What is in the margins of integers, and of tensors that a function creates."""

CREATING = {
    torch: ("empty", "empty_like", "empty_strided", "zeros", "zeros_like"),
    Tensor: ("new_empty", "new_empty_strided", "new_zeros"),
}
"""Functions whose tensors get such margins while a function is checked."""

LAST, NAN = "only the last", "NaN, so that something out of bounds is read, or nothing written"
"""Places of wrong numbers."""

Results = dict[str, Tensor]
"""On the CPU, by name: "output 0", "gradient of weight"."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong; ``str`` of it is a sentence."""

    kind: str
    """"declaration" (``Ops`` refuses it), "error" (an exception), "shape", "dtype", "bounds" (a write outside),
    "inputs" (one is changed), "bits" (other ones the second time); and for wrong numbers what they point to: "strides",
    "eps", "rounding", "mask", "gradient", or "values"."""
    case: str
    dtype: str
    layout: str
    """One of ``LAYOUTS``."""
    what: str
    """"output 0", "gradient of weight", "x" (an input), "call", "function"."""
    message: str
    """What was expected, and what was found."""
    guess: str = ""
    """What is likely to be wrong, in words."""

    def __str__(self) -> str:
        where = f"{self.what} in {self.dtype}, case {self.case!r}, {self.layout}: {self.message}"
        return f"{where}; {self.guess}" if self.guess else where


@dataclass(frozen=True)
class Report:
    """What ``check_op`` found; ``str`` of it says each sort of finding once."""

    device: str
    runs: dict[str, int]
    """By dtype, the runs that gave a result."""
    findings: list[Finding]
    notes: list[str]
    """What is no fault, but to be known: inputs that the function refuses by an InputError; that it has no gradient."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong in something that ran."""
        return not self.findings and any(self.runs.values())

    def __str__(self) -> str:
        first = {(f.kind, f.what): f for f in reversed(self.findings)}
        counts = Counter((f.kind, f.what) for f in self.findings)
        runs = ", ".join(f"{n} in {dtype}" for dtype, n in self.runs.items())
        lines = [f"{'right' if self.ok else 'WRONG'}; runs: {runs}, on {self.device}"]
        lines += [f"  {sort[0]} ({n} findings): {first[sort]}" for sort, n in counts.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_op(
    function: Callable[..., Any],
    op: str | Operation,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: str | torch.device | None = None,
) -> Report:
    """Check a function against an operation: one of ``OPERATIONS`` by its name, or one's own.

    For each case and dtype: shapes, dtypes and devices; values, and gradients where the function has them, by the rule
    above, for contiguous inputs, for strided ones, and with no gradient recorded; nothing written outside of outputs;
    the same bits the second time; and that float16 and bfloat16 are rounded where the specification rounds, if the
    operation asks for that (``agreement``). By its name, also that ``Ops`` takes the function as that operation.
    device: the first GPU, or the CPU, by default. Raises InputError for an unknown op.
    """
    refused: list[Finding] = []
    if not isinstance(op, Operation):
        check_one_of("op", op, OPERATIONS)
        refused = _refused(function, op)
        op = OPERATIONS[op]
    if launch.INTERPRETED:
        use_exact_arithmetic()
    on_gpu = torch.cuda.is_available() and not launch.INTERPRETED
    where = torch.device(device or ("cuda" if on_gpu else "cpu"))
    runs: list[_Run] = []
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        arguments = list(op.cases())
        for dtype in dtypes:
            for case in (_Case.of(op, *each, dtype) for each in arguments):
                runs += (_run(function, case, layout, where) for layout in LAYOUTS)
    findings = refused + [finding for run in runs for finding in run.findings]
    findings += _rounded_elsewhere(runs, op.agreement, findings)
    counts = Counter({_name(dtype): 0 for dtype in dtypes})
    counts.update(run.case.dtype for run in runs if run.found)
    notes = list(dict.fromkeys(note for run in runs for note in run.notes))
    return Report(device_name(where), dict(counts), [_guessed(each, findings, runs) for each in findings], notes)


def _refused(function: Callable[..., Any], op: str) -> list[Finding]:
    """A finding where no set of operations takes the function as its ``op``."""
    changed: dict[str, Any] = {op: function}
    try:
        replace(Ops.reference(), **changed)
    except InputError as error:
        return [Finding("declaration", "all", "all dtypes", "all", "function", str(error))]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Case:
    """A case in one dtype, and what the specification makes of it in that dtype and in float64."""

    name: str
    dtype: str
    arguments: dict[str, Any]
    plain: Results
    exact: Results

    @staticmethod
    def of(op: Operation, name: str, arguments: Sequence[Any], dtype: torch.dtype) -> "_Case":
        names = inspect.signature(op.specification).parameters
        rounded, wide = (
            dict(zip(names, cast(arguments, *dtypes), strict=False)) for dtypes in ((dtype,), (dtype, torch.float64))
        )
        plain, exact = (_results(op.specification, each) for each in (rounded, wide))
        return _Case(name, _name(dtype), rounded, plain, exact)


@dataclass(frozen=True)
class _Run:
    """What one run of the function gave: nothing where it raised an exception."""

    case: _Case
    layout: str
    found: Results
    findings: list[Finding]
    notes: list[str]


def _run(function: Callable[..., Any], case: _Case, layout: str, device: torch.device) -> _Run:
    """Run the function twice, the second time for its bits, and judge the results."""
    findings: list[Finding] = []
    run = _Run(case, layout, {}, findings, [])

    def wrong(kind: str, what: str, message: str, guess: str = "") -> None:
        findings.append(Finding(kind, case.name, case.dtype, layout, what, message, guess))

    with torch.set_grad_enabled(layout != "no gradient"), _Margins() as margins:
        arguments = {
            name: margins.place(x.to(device), name, layout == "strided") if isinstance(x, Tensor) else x
            for name, x in case.arguments.items()
        }
        try:
            first, second = (_results(function, arguments) for _ in range(2))
        except InputError as error:
            run.notes.append(f"refused in {case.dtype}: {error}")
            return run
        except Exception as error:
            wrong("error", "call", f"{type(error).__name__}: {error}", _why(error))
            return run
    run.found.update(first)
    for name, x in case.arguments.items():
        if isinstance(x, Tensor) and not _same(x, arguments[name].cpu()):
            wrong("inputs", name, "expected as it was, found changed by the call")
    for name in margins.touched():
        wrong("bounds", name, "expected nothing written outside of it, found something", "a store without its mask")
    for name, x in second.items():
        if not _same(x, first[name]):
            wrong("bits", name, "expected the same bits the second time, found others", "a race, or memory not set")
    _judge(run, wrong)
    return run


def _why(error: Exception) -> str:
    if "active drivers" in str(error):
        return "without a GPU, TRITON_INTERPRET=1 is to be set before triton is imported"
    return ""


def _results(function: Callable[..., Any], arguments: dict[str, Any]) -> Results:
    """Outputs, and gradients of the arguments that require one, for fixed random cotangents."""
    out = function(*arguments.values())
    outs = list(out) if isinstance(out, tuple | list) else [out]
    if not all(isinstance(x, Tensor) for x in outs):
        raise TypeError(f"expected a tensor or a tuple of tensors, found {', '.join(type(x).__name__ for x in outs)}")
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    if any(x.device != device for x in outs):
        raise TypeError(f"expected outputs on {device}, found {', '.join(str(x.device) for x in outs)}")
    found = {f"output {i}": x.detach().cpu() for i, x in enumerate(outs)}
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outs]
    pairs = [(x, dx) for x, dx in zip(outs, cotangents, strict=True) if x.requires_grad]
    if leaves and pairs:
        differentiated, by = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(differentiated, list(leaves.values()), by, allow_unused=True)
        named = zip(leaves, gradients, strict=True)
        found |= {f"gradient of {name}": x.cpu() for name, x in named if x is not None}
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, whatever the strides."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*(_bytes(x) for x in (a, b)))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


class _Margins:
    """Within, tensors stand in larger buffers: those placed in NaN, since what is read there must show in a result;
    those that are created in AROUND, since NaN that is written onto NaN would not show."""

    def __init__(self) -> None:
        self.placed: list[tuple[str, Tensor, Sequence[int], Sequence[int], float]] = []
        """(name, buffer, shape and strides of the tensor in it, what is around it)"""
        self.patches = ExitStack()

    def __enter__(self) -> "_Margins":
        for owner, names in CREATING.items():
            for name in names:
                patched = partial(self.create, getattr(owner, name), "empty" in name)
                self.patches.enter_context(
                    mock.patch.object(owner, name, lambda *args, run=patched, **o: run(*args, **o))
                )
        return self

    def __exit__(self, *error: object) -> None:
        self.patches.close()

    def create(self, function: Callable[..., Tensor], empty: bool, *args: Any, **options: Any) -> Tensor:
        """What the function creates, with margins; empty: and with NaN in it."""
        x = function(*args, **options)
        inside = self.put(x, "a new tensor", x.shape, x.stride(), AROUND)
        return inside.fill_(math.nan) if empty and x.is_floating_point() else inside

    def place(self, x: Tensor, name: str, strided: bool) -> Tensor:
        """A copy of an input; strided: each row, and each matrix, followed by NaN."""
        padded = [n + pad for n, pad in zip(x.shape, [0] + [1] * (x.dim() - 2) + [16], strict=False)]
        strides = torch.empty(padded if strided and x.dim() > 1 else x.shape, device="meta").stride()
        around = math.nan if x.is_floating_point() else AROUND
        return self.put(x, name, x.shape, strides, around).requires_grad_(x.requires_grad)

    def put(self, x: Tensor, name: str, shape: Sequence[int], strides: Sequence[int], around: float) -> Tensor:
        if x.dtype == torch.bool or x.device.type == "meta":
            return x
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if x.numel() else 0
        buffer = torch.full((extent + 2 * MARGIN,), around, dtype=x.dtype, device=x.device)
        inside = buffer.as_strided(shape, strides, MARGIN).copy_(x.detach())
        self.placed.append((name, buffer, shape, strides, around))
        return inside

    def touched(self) -> list[str]:
        """Names of the tensors around which something has been written."""
        names = []
        for name, buffer, shape, strides, around in self.placed:
            outside = buffer.clone()
            outside.as_strided(shape, strides, MARGIN).fill_(around)
            if not _same(outside, torch.full_like(buffer, around)):
                names.append(name)
        return names


def _judge(run: _Run, wrong: Callable[..., None]) -> None:
    """Compare what was found with the specification."""
    case, found = run.case, run.found
    outputs = [[name for name in results if name.startswith("output")] for results in (found, case.exact)]
    if outputs[0] != outputs[1]:
        wrong("shape", "call", f"expected {len(outputs[1])} outputs, found {len(outputs[0])}")
        return
    differentiable = any(name.startswith("gradient") for name in found)
    if not differentiable and run.layout != "no gradient" and len(case.exact) > len(outputs[1]):
        run.notes.append("forward only: the outputs have no gradient")
    unquantised = [x for x in case.exact.values() if x.itemsize > 1]  # others have another unit
    cancelled = CANCELLED * max((x.double().norm().item() for x in unquantised), default=0)
    for name, exact in case.exact.items():
        a, b = found.get(name), case.plain[name]
        if a is None:
            if differentiable:
                wrong("gradient", name, "expected a gradient, found none")
        elif a.shape != b.shape:
            wrong("shape", name, f"expected {list(b.shape)}, found {list(a.shape)}")
            return  # what follows from it is not said
        elif a.dtype != b.dtype:
            wrong("dtype", name, f"expected {b.dtype}, found {a.dtype}")
            return
        else:
            _judge_numbers(name, a, b, exact, cancelled, wrong)


def _judge_numbers(
    name: str, a: Tensor, b: Tensor, exact: Tensor, cancelled: float, wrong: Callable[..., None]
) -> None:
    """The rule; whole numbers may be one off the specification's in the same dtype, as halves may round either way."""
    x = exact.double()
    error, plain = ((each.double() - x).where(each.double() != x, 0) for each in (a, b))
    if not a.is_floating_point():
        off = (a.double() - b.double()).abs().max().item() if a.numel() else 0
        if off > 1:
            wrong("values", name, f"expected whole numbers at most 1 off, found {off:.0f}")
        return
    bound = OPS_RATIO * plain.norm().item() + cancelled
    if not error.norm() <= bound:
        message = (
            f"expected an error of at most {bound:.1e}, {OPS_RATIO} times plain PyTorch's, found {error.norm():.1e}"
        )
        wrong("values", name, message, _place(~(error.abs() <= OPS_RATIO * plain.abs().max() + cancelled), a))


def _place(wrong: Tensor, found: Tensor) -> str:
    """Where numbers are wrong, if that says something: NaN, or the end of a dimension alone."""
    for dim, n in enumerate(wrong.shape):
        where = wrong.any(dim=[d for d in range(wrong.dim()) if d != dim]) if wrong.dim() > 1 else wrong
        first = int(where.int().argmax())
        if first > 0 and where[first:].all() and 2 * first != n:  # a half is no partial block, but may be RoPE's
            return f"{LAST} {n - first} of {n} along dimension {dim}"
    return NAN if found.isnan().any() else ""


def _rounded_elsewhere(runs: Sequence[_Run], least: float, findings: Sequence[Finding]) -> Iterator[Finding]:
    """A finding for each 16-bit output that is exact enough, but too seldom the specification's bit for bit."""
    wrong = {(f.dtype, f.what) for f in findings}
    equal: Counter[tuple[str, str]] = Counter()
    counted: Counter[tuple[str, str]] = Counter()
    for run in runs:
        for what, x in run.found.items():
            sort = run.case.dtype, what
            expected = run.case.plain.get(what, torch.empty(()))
            comparable = what.startswith("output") and expected.shape == x.shape
            if comparable and sort[0] in NARROW and sort not in wrong:
                equal[sort] += int(x.eq(expected).sum())
                counted[sort] += x.numel()
    for sort, n in counted.items():
        if equal[sort] < least * n:
            message = f"expected at least {least:.0%} of the specification's bits, found {equal[sort] / n:.1%}"
            guess = "a rounding is moved or left out: round to the dtype where the specification does"
            yield Finding("rounding", "all", sort[0], "all", sort[1], message, guess)


def _guessed(finding: Finding, findings: Sequence[Finding], runs: Sequence[_Run]) -> Finding:
    """The finding; of wrong numbers, with what is likely to be wrong, by what is right beside them."""
    if finding.kind != "values":
        return finding
    numbers = [f for f in findings if f.kind == "values"]
    same = [f for f in numbers if f.what == finding.what]
    wrong = {f.case for f in findings if f.what == finding.what}
    right = {run.case.name for run in runs if run.found and run.case.exact[finding.what].numel()} - wrong
    outputs = any(f.what.startswith("output") for f in numbers)
    float32 = any(run.found for run in runs if run.case.dtype == "float32")
    alone = (
        f"right in {', '.join(sorted(right))}, wrong in {', '.join(sorted(wrong))}" if right else "wrong in every case"
    )
    guesses = {
        "strides": (
            all(f.layout == "strided" for f in same),
            "wrong for strided inputs alone: a stride is assumed in place of used",
        ),
        "eps": (wrong == {SMALL}, "wrong for small numbers alone: eps is missing, or added elsewhere"),
        "rounding": (
            float32 and all(f.dtype in NARROW for f in same),
            "right in float32: a cast to float32 is missing, or a rounding misplaced",
        ),
        "mask": (
            any(f.guess.startswith(LAST) for f in same) or bool(right and (outputs or finding.guess)),
            f"{alone}: a mask of the last, partial block is missing or wrong",
        ),
        "gradient": (not outputs, f"the outputs are right: the backward's formula ({alone})"),
        "values": (True, f"the formula ({alone})"),
    }
    kind, guess = next((kind, guess) for kind, (applies, guess) in guesses.items() if applies)
    return replace(finding, kind=kind, guess="; ".join(filter(None, (finding.guess, guess))))
