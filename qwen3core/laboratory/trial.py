"""Variants through every step of the laboratory: checked, compiled, predicted, timed, put into a model.

trial = Trial.of(load("my.py:swiglu")[0], rows)        # rows: what it compiles to (compiled.py)
print(trial); json.dumps(asdict(trial))
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import samples
from ..config import OFFICIAL_SIZES
from ..ops import FUSED, Ops, resolve
from ..parity import parity
from ..profiling import Profile, Row, ceilings, device_name
from ..reference import allows, declare
from . import timing
from .check import Report, check_op
from .contenders import contenders
from .operations import OPERATIONS, cast
from .roofline import CARDS
from .variants import Variant

SIZE, TOKENS = "0.6B", 8192
"""The official model whose sizes are predicted and timed, and how many tokens of it."""
CHECKPOINTS = {"norm_score": "tiny-reranker"}
"""The shipped checkpoint that an operation is put into, where it is not tiny-embedding."""

Step = dict[str, Any]
"""What a step gave, or {"error": why it did not run or failed}."""


@dataclass(frozen=True)
class Trial:
    """One variant. ``asdict`` of it is what the command's ``--json`` has in "trials", and a line of ``--results``."""

    kernel: str
    """``FILE.py:function``"""
    config: str | None
    """The entry of CONFIGS, as text; null for the default."""
    op: str
    ok: bool
    """Nothing wrong: check, parity where it ran, and every kernel compiles and fits into shared memory."""
    check: Report
    """{"device", "runs": {dtype: number}, "findings": [{"kind", "case", "dtype", "layout", "what", "message",
    "guess"}], "notes"}"""
    compiled: list[Step]
    """By target and kernel: {"target", "kernel", "config", "registers", "spill", "tensor", "shared", "of", "loads",
    "stores"}. spill: bytes of stack, for AMD registers; shared: bytes, "of" those that the card has; loads and stores:
    {bytes that an instruction moves for a thread: instructions}. Empty where nothing is compiled: plain PyTorch."""
    work: Step
    """{"model", "tokens", "dtype", "bytes", "flops", "intensity"}: the least, whatever the variant moves."""
    predicted_ms: dict[str, float]
    """By card, the least time for that work by roofline: by its datasheet; "measured": by this GPU's own best."""
    timed: Step
    """{"device", "before", "after", "ms": {engine: {"p25", "p50", "p75"} or {"error"}}, "backward_ms", "profile":
    {"file"} or {"error"}}: forward, and the gradients alone, beside the others; of the gradients {} where no variant
    has them. before and after: clocks, temperature and power; profile: Proton's, {} where none was asked for."""
    parity: Step
    """{"ok", "title", "rows": [{"point", "max_abs", "relative", "error_transformers", "error_ours", "ok"}]}"""
    environment: dict[str, str]
    """{"torch", "triton", "date"}"""

    def __str__(self) -> str:
        """A few lines of Markdown."""
        work, name = self.work, " ".join(filter(None, (self.kernel, self.config)))
        least = f"{work['bytes'] / 1e6:.4g} MB, {work['flops'] / 1e9:.4g} GFLOP, {work['intensity']:.3g} FLOP per byte"
        cards = ", ".join(f"{name} {ms:.3g}" for name, ms in self.predicted_ms.items())
        return "\n".join(
            [
                f"## {name} as {self.op}: {'ok' if self.ok else 'NOT ok'}",
                f"check: {self.check}",
                *_table(self.compiled, "compiled: nothing, there is no Triton kernel in it"),
                f"least work: {least} ({work['model']}, {work['tokens']} tokens, {work['dtype']})",
                f"ms by roofline, predicted from datasheets, not measured: {cards}",
                *_table(
                    [
                        {"direction": direction, "engine": name, **row}
                        for direction, key in (("forward", "ms"), ("backward", "backward_ms"))
                        for name, row in self.timed.get(key, {}).items()
                    ],
                    self.timed.get("error", ""),
                ),
                *(f"profile, {key}: {found}" for key, found in self.timed.get("profile", {}).items()),
                f"parity: {self.parity.get('error') or self.parity['title'] + ': ' + self._worst()}",
            ]
        )

    def _worst(self) -> str:
        """Where the model differs most, and whether that is too much."""
        worst = max(self.parity["rows"], key=lambda row: (not row["ok"], row["error_ours"]))
        return f"{'ok' if self.parity['ok'] else 'FAIL'}, largest error {worst['error_ours']:.1e} at {worst['point']}"

    @staticmethod
    def of(variant: Variant, compiled: list[Step], timed: Step | None = None, checkpoint: str | None = None) -> "Trial":
        """Check a variant, predict its time, and put it into a model.

        timed: out of ``times``; None without a GPU. checkpoint: one of the shipped ones by default.
        """
        report = check_op(variant.function, variant.operation)
        found = in_model(variant, checkpoint) if report.ok else {"error": "not run: the check failed"}
        fits = all("error" not in row and row["shared"] <= row["of"] for row in compiled)
        work = work_of(variant)
        return Trial(
            kernel=variant.source,
            config=None if variant.config is None else str(variant.config),
            op=variant.op,
            ok=report.ok and fits and bool(found.get("ok", True)),
            check=report,
            compiled=compiled,
            work=work,
            predicted_ms=predicted(work),
            timed=timed or {"error": "not timed: no GPU"},
            parity=found,
            environment={"torch": torch.__version__, "triton": triton.__version__, "date": date.today().isoformat()},
        )


def _table(rows: Sequence[Step], otherwise: str) -> list[str]:
    """Rows of different columns in Markdown, or the text where there are none."""
    if not rows:
        return [otherwise]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return ["", *(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines)), ""]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{n} x {width} B" for width, n in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def work_of(variant: Variant) -> Step:
    """The least bytes and FLOPs at the sizes of SIZE and TOKENS, in bfloat16."""
    arguments = cast(variant.operation.large(OFFICIAL_SIZES[SIZE], TOKENS), torch.bfloat16)
    moved, flops = variant.operation.work(*arguments)
    sizes = {"model": SIZE, "tokens": TOKENS, "dtype": "bfloat16"}
    return sizes | {"bytes": moved, "flops": flops, "intensity": flops / moved}


def predicted(work: Step) -> dict[str, float]:
    """Milliseconds by card."""
    cards = dict(CARDS)
    if torch.cuda.is_available():
        cards["measured"] = ceilings(torch.device("cuda"), torch.bfloat16)
    return {name: card.seconds(work["flops"], work["bytes"]) * 1e3 for name, card in cards.items()}


def times(
    variants: Sequence[Variant],
    device: torch.device,
    tokens: int = TOKENS,
    repeats: int = 20,
    profile: Path | None = None,
) -> Step:
    """Variants of one operation, timed beside each other and beside ``contenders``, gradients where a variant has them.

    Whatever raises, or disagrees with the specification in float32, gets {"error"} in place of its time. profile: the
    file that a Proton profile of the variants is written to.
    """
    operation, own = variants[0].operation, {v.name: v.function for v in variants}
    functions = own | contenders(variants[0].op, operation)
    found: dict[str, dict[str, timing.Timing]] = {direction: {} for direction in timing.DIRECTIONS}
    before = timing.gpu_state()
    with torch.no_grad():
        with torch.device(device):
            large = operation.large(OFFICIAL_SIZES[SIZE], tokens)
        rounded, wide = (
            cast(large, *dtypes, device=device) for dtypes in ((torch.bfloat16,), (torch.bfloat16, torch.float32))
        )
        douts, expected = timing.expect(operation.specification, rounded, wide)
        if not any(_has_gradient(function, rounded, douts) for function in own.values()):
            expected.pop("backward", None)
        for direction, results in expected.items():
            engines = timing.engines_of(functions, rounded, douts, direction)
            found[direction] = timing.measure(engines, results, device, repeats)
        after = timing.gpu_state()
        profiled = timing.profile(timing.engines_of(own, rounded, douts, "forward"), profile) if profile else {}
    return {
        **{"device": device_name(device), "before": before, "after": after, "profile": profiled},
        **{"ms": found["forward"], "backward_ms": found["backward"]},
    }


def _has_gradient(function: Callable[..., Any], arguments: Sequence[Any], douts: Sequence[Tensor]) -> bool:
    try:
        return bool(timing.prepared(function, arguments, douts))
    except Exception:  # whatever it is, it is no time
        return False


def in_model(variant: Variant, checkpoint: str | None = None) -> Step:
    """Parity of a model with the variant in its set of operations.

    On a GPU in the checkpoint's dtype; on a CPU, where interpreted kernels are slow, in float32, of a few short texts.
    """
    if variant.op not in OPERATIONS:
        return {"error": "not run: no operation of Ops"}
    if missing := [name for name in ("transformers", "sentence_transformers") if not importlib.util.find_spec(name)]:
        return {"error": f"not run: {missing[0]} is not installed"}
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {} if on_gpu else {"dtype": "float32", "texts": samples.QUERIES}
    base = resolve("auto", torch.device("cuda" if on_gpu else "cpu"))
    path = checkpoint or CHECKPOINTS.get(variant.op, "tiny-embedding")
    try:
        report = parity(path, ops=with_function(base, variant.op, variant.function), **options)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": report.ok, **asdict(report)}


def with_function(base: Ops, op: str, function: Callable[..., Any]) -> Ops:
    """A set with the function as its operation ``op``; a fused one stands for the set's own parts."""

    def wrapped(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    parts = {part: getattr(base, part) for part in allows(getattr(Ops.triton(), op)).parts} if op in FUSED else {}
    changed: dict[str, Any] = {op: declare(**vars(allows(function)) | {"parts": parts})(wrapped)}
    return replace(base, **changed)


def ranking(trials: Sequence[Trial]) -> str:
    """A table of variants, the best first: right ones before wrong ones, then by time, then by spills and registers."""

    def row(trial: Trial) -> Step:
        name = " ".join(filter(None, (trial.kernel, trial.config)))
        worst = {key: max((each.get(key, 0) for each in trial.compiled), default=0) for key in ("spill", "registers")}
        ms = trial.timed.get("ms", {}).get(name, {}).get("p50", math.inf)
        return {"variant": name, "ok": trial.ok, "p50 ms": ms, **worst}

    rows = sorted(map(row, trials), key=lambda x: (not x["ok"], x["p50 ms"], x["spill"], x["registers"]))
    return "\n".join(_table([{**x, "p50 ms": "" if math.isinf(x["p50 ms"]) else x["p50 ms"]} for x in rows], ""))


def draw(trials: Sequence[Trial], path: Path) -> None:
    """The roofline of this GPU, with all that was timed for the first trial's operation. Needs matplotlib."""
    timed, work = trials[0].timed, trials[0].work
    top = ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    limit = top.seconds(work["flops"], work["bytes"])
    rows = [
        Row(None, name, 1, ms["p50"] / 1e3, work["flops"], work["bytes"], limit)
        for name, ms in timed["ms"].items()
        if "p50" in ms
    ]
    title = f"{trials[0].op}, {work['model']}, {work['tokens']} tokens, {work['dtype']}, {timed['device']}"
    Profile(title, "", rows, sum(row.seconds for row in rows), top).draw(path)
