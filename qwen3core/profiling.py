"""Where the time of a call goes: each operation's time, FLOPs and bytes, beside what this machine can do.

    report = profile(Embedder.from_pretrained("tiny-embedding"), texts)
    print(report)                   # two tables, by operation and by layer
    report.draw("roofline.png")

An operation can be no faster than its FLOPs at the speed of the fastest matrix product, nor than its bytes at that of
memory: the roofline (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785).

torch.profiler shows what is inside an operation (``with torch.profiler.profile(): embedder.encode(texts)``), and
torch.utils.flop_counter the FLOPs of products; neither knows projections and layers, bytes, that causal attention needs
half of the products, nor the FLOPs of oneDNN's and Triton's. On a GPU, times are those of CUDA events; no test has run
there yet.
"""

import copy
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .embedder import Embedder
from .errors import InputError, check_int
from .model import OWN, Linear, Qwen3Model
from .ops import FUSED, OPERATIONS, Ops
from .prefix_cache import PrefixCache
from .reading import as_list
from .reference import allows, declare
from .reranker import Reranker
from .writing import writing

ENDINGS = (".png", ".svg", ".pdf")
"""Endings of the pictures that ``Profile.draw`` writes."""
_BETWEEN = "between the operations"
"""Name of the time that is in no operation."""
_SHOWN = 0.002
"""Share of the time from which on an operation has its point in the picture."""
_POOLING = ("pool", "norm_pool", "norm_score")
"""Operations that may read one row of each text."""
_Mark = Any
"""A point in time: seconds, or on a GPU an event."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches at best."""

    matmul_tflops: float
    """TFLOP/s of a large matrix product in the compute dtype."""
    copy_gbs: float
    """GB/s of a large copy, bytes read and written."""

    def seconds(self, flops: float, bytes: float) -> float:
        """The least time that so much work takes."""
        return max(flops / self.matmul_tflops / 1e12, bytes / self.copy_gbs / 1e9)


@dataclass(frozen=True)
class Row:
    """The calls of one operation, in one layer or in all, summed."""

    layer: int | None
    """None outside the layers."""
    operation: str
    """A projection's name, or those of several in one operation; a field of ``Ops`` (``qk_norm_rope`` also where it is
    not fused), ``embed_tokens``, ``tokenizer``, or ``residual add``: from the end of a block's last product on, where
    no operation does it."""
    calls: int
    """Number of calls; more than one in a layer where there are several batches, or blocks of rows."""
    seconds: float
    """Time of them all."""
    flops: float
    """As ``count_flops`` has it."""
    bytes: float
    """Size of every tensor that goes in or comes out, once, as it is stored: what moves if no cache holds any of it."""
    limit: float = 0
    """Seconds that the ceilings allow."""


@dataclass(frozen=True)
class Profile:
    """What ``profile`` found; ``str`` of it is Markdown."""

    title: str
    """Checkpoint, dtype, size of the call, CPU or GPU."""
    ops: str
    """The set of operations."""
    rows: list[Row]
    """One for each operation of each layer, in the order computed."""
    seconds: float
    """The whole call, timed by itself, without what times its parts."""
    ceilings: Ceilings
    """What the machine reached, before the calls or after them."""

    def by_operation(self) -> list[Row]:
        """One row for each operation, over all layers, in the order computed."""
        return [replace(row, layer=None) for row in _summed(self.rows, lambda row: row.operation)]

    def by_layer(self) -> list[Row]:
        """One row for each layer, over all of its operations."""
        rows = _summed([row for row in self.rows if row.layer is not None], lambda row: row.layer)
        return [replace(row, operation="") for row in rows]

    @property
    def between(self) -> float:
        """Seconds in no operation: Python, tensors put together, results; negative where chance is larger."""
        return self.seconds - sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        """Two tables, by operation and by layer; shares are those of the whole call."""
        columns = "calls | ms | share | GFLOP | GFLOP/s | MB | GB/s | of the ceiling |\n|---" + "|---:" * 8 + "|"
        parts = {"operations": self.seconds - self.between, _BETWEEN: self.between, "whole": self.seconds}
        return "\n".join(
            [
                f"{self.title}\n{self.ops}",
                f"Ceilings: {self.ceilings.matmul_tflops * 1e3:.0f} GFLOP/s, {self.ceilings.copy_gbs:.1f} GB/s",
                f"\n| operation | {columns}",
                *(self._line(row.operation, row) for row in self.by_operation()),
                *(f"| {name} | | {s * 1e3:.2f} | {s / self.seconds:.1%} | | | | | |" for name, s in parts.items()),
                f"\n| layer | {columns}",
                *(self._line(str(row.layer), row) for row in self.by_layer()),
            ]
        )

    def _line(self, label: str, row: Row) -> str:
        work = (row.flops / 1e9, row.flops / row.seconds / 1e9, row.bytes / 1e6, row.bytes / row.seconds / 1e9)
        cells = [f"{row.calls}", f"{row.seconds * 1e3:.2f}", f"{row.seconds / self.seconds:.1%}"]
        cells += [f"{x:.3g}" if x else "" for x in work] + [f"{row.limit / row.seconds:.0%}" if row.limit else ""]
        return f"| {label} | {' | '.join(cells)} |"

    def draw(self, path: str | Path) -> None:
        """Write the roofline, and the time of each operation, as a picture. Needs matplotlib.

        path: ends in one of ``ENDINGS``. Raises InputError and OSError.
        """
        if Path(path).suffix not in ENDINGS:
            raise InputError(f"{path}: expected a name ending in {', '.join(ENDINGS)}, found {Path(path).suffix!r}")
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 6), dpi=130, layout="constrained")
        figure.suptitle(self.title, fontsize=10)
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        names = [row.operation for row in self.by_operation()]
        colors = dict(zip(names, map(colormaps["tab20"], range(20)), strict=False))
        self._draw_roofline(left, colors)
        self._draw_times(right, colors)
        with writing(path) as part:
            figure.savefig(part)

    def _draw_roofline(self, axes: Any, colors: dict[str, Any]) -> None:
        """FLOPs per second by FLOPs per byte; the area of a point is the operation's share of the time."""
        rows = [row for row in self.by_operation() if row.flops and row.seconds > _SHOWN * self.seconds]
        top, slope = self.ceilings.matmul_tflops * 1e3, self.ceilings.copy_gbs
        places = {row.operation: (row.flops / row.bytes, row.flops / row.seconds / 1e9) for row in rows}
        ends = (min(x for x, _ in places.values()) / 3, max(top / slope, *(x for x, _ in places.values())) * 3)
        axes.loglog([ends[0], top / slope, ends[1]], [slope * ends[0], top, top], color="black")
        line = {"arrowstyle": "-", "relpos": (0, 0.5)}
        for i, row in enumerate(sorted(rows, key=lambda row: places[row.operation][1])):
            name, color = row.operation, colors[row.operation]
            axes.scatter(*places[name], 30 + 1500 * row.seconds / self.seconds, color=color, alpha=0.7)
            beside = {"xytext": (1.03, (i + 0.5) / len(rows)), "textcoords": "axes fraction", "va": "center"}
            axes.annotate(name, places[name], fontsize=8, arrowprops=line | {"color": color}, **beside)
        axes.set(xlabel="FLOP per byte", ylabel="GFLOP/s")
        axes.set_title(f"roof: {top:.0f} GFLOP/s, {slope:.1f} GB/s; area: share of the time", fontsize=9)
        axes.grid(alpha=0.3)

    def _draw_times(self, axes: Any, colors: dict[str, Any]) -> None:
        """Milliseconds of each operation, and in them those that the ceilings allow."""
        rows = self.by_operation()
        names = [*(row.operation for row in rows), _BETWEEN]
        seconds = [*(row.seconds for row in rows), self.between]
        bars = axes.barh(names, [1e3 * s for s in seconds], color=[colors.get(name, "0.8") for name in names])
        axes.bar_label(bars, [f"{s / self.seconds:.1%}" for s in seconds], padding=3, fontsize=8)
        axes.barh(names[:-1], [1e3 * row.limit for row in rows], height=0.25, color="black")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(f"ms, of {self.seconds * 1e3:.1f}; black: what the ceilings allow")


def profile(pretrained: Embedder | Reranker, inputs: Iterable[Any], *, repeats: int = 5) -> Profile:
    """Time a call of ``encode``, ``encode_tokens`` (late interaction) or ``predict``, whole and by its operations.

    After a warm-up of both, calls that are timed whole and calls that are timed by their parts take turns, ``repeats``
    times; the times are those of the fastest call of either, whose difference is chance on a busy machine. Shortcuts
    are taken as ever, but the prefix cache is empty at each call. With more than 1024 texts the tokenizer works while
    the model does, and the parts exceed the whole.

    Args:
        pretrained: an open checkpoint; no other thread may use it meanwhile.
        inputs: texts; (query, document) pairs for a reranker.

    Raises:
        InputError: for inputs that the call does not take, or none.

    Example:
        >>> report = profile(Embedder.from_pretrained("tiny-embedding"), ["gravity"], repeats=1)
        >>> [row.operation for row in report.by_operation()][:4], len(report.by_layer())
        (['tokenizer', 'embed_tokens', 'rms_norm', 'q_proj, k_proj, v_proj'], 4)
    """
    check_int("repeats", repeats, 1)
    inputs = as_list("inputs", inputs)
    if not inputs:
        raise InputError("profile: expected one or more inputs, found none")
    plain = copy.copy(pretrained)
    plain.prefix_cache = PrefixCache(0)
    tops = [ceilings(plain.device, plain.dtype)]  # before and after: in between, their copies would empty the caches
    wholes, timed = [], []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        _call(plain, inputs)
        wholes.append(time.perf_counter() - start)
        timed.append(_parts(plain, inputs))
    tops.append(ceilings(plain.device, plain.dtype))
    top = Ceilings(max(each.matmul_tflops for each in tops), max(each.copy_gbs for each in tops))
    rows, tokens = min(timed[1:], key=lambda parts: sum(row.seconds for row in parts[0]))
    rows = [replace(row, limit=top.seconds(row.flops, row.bytes)) for row in rows]
    size = f"inputs: {len(inputs)}, tokens computed: {tokens}, threads: {torch.get_num_threads()}"
    title = f"{plain.directory.name}, {plain.dtype}, {device_name(plain.device)}, {size}"
    return Profile(title, repr(plain.model.ops), rows, min(wholes[1:]), top)


def _call(pretrained: Embedder | Reranker, inputs: list[Any]) -> object:
    """The results on the host, so that a GPU is done when they are here."""
    if isinstance(pretrained, Reranker):
        return pretrained.predict(inputs)
    return pretrained.encode(inputs) if pretrained.layout.pooling else pretrained.encode_tokens(inputs).vectors.cpu()


def _parts(plain: Embedder | Reranker, inputs: list[Any]) -> tuple[list[Row], int]:
    """A call's rows, without their limits, and the number of its tokens."""
    timer = _Timer(plain.device)
    found: list[Row] = []

    def encode(texts: Sequence[str]) -> list[list[int]]:
        start = time.perf_counter()
        ids = plain.tokenizer.encode(texts)
        found.append(Row(None, "tokenizer", 1, time.perf_counter() - start, 0, 0))
        return ids

    timed = copy.copy(plain)
    timed.tokenizer = copy.copy(plain.tokenizer)
    vars(timed.tokenizer)["encode"] = encode
    with timer.on(plain.model):
        _call(timed, inputs)
    found += [replace(row, seconds=_elapsed(start, end)) for row, start, end in timer.calls]
    return _summed(found, lambda row: (row.layer, row.operation)), timer.tokens


class _Timer:
    """Marks the time at both ends of every operation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls: list[tuple[Row, _Mark, _Mark]] = []
        self.tokens = 0
        self.layer: int | None = None
        self.start: _Mark = None
        """When the matrix that is in use began."""
        self.names: dict[int, str] = {}
        """Of the projections, by their weights' ids."""
        self.pairs = cache(visible_pairs)  # a GPU is waited for once in a batch, not in every layer

    @contextmanager
    def on(self, model: Qwen3Model) -> Iterator[None]:
        """Within, operations are wrapped, and layers and the matrices that are no operation's have hooks."""
        ops, handles = model.ops, []
        for name, module in model.named_modules():
            parent, _, own_name = name.rpartition(".")
            if type(module) is Linear and module.scale is None and type(model.get_submodule(parent)) in OWN:
                self.names[id(module.weight)] = own_name
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                handles.append(module.register_forward_pre_hook(self.begin))
                handles.append(module.register_forward_hook(partial(self.end, own_name)))
        for i, layer in enumerate(model.layers):
            handles.append(layer.register_forward_pre_hook(partial(self.enter, i)))
            handles.append(layer.register_forward_hook(self.leave))
        model.ops = self.wrapped(ops)
        try:
            yield
        finally:
            model.ops = ops
            for handle in handles:
                handle.remove()

    def wrapped(self, ops: Ops) -> Ops:
        """All operations, with what they declare."""
        functions = {name: f for name in (*OPERATIONS, *FUSED) if (f := getattr(ops, name))}
        found: dict[str, Any] = {name: self.timed(name, function) for name, function in functions.items()}
        for name, function in found.items():
            said = allows(functions[name])
            declare(**vars(said) | {"parts": {part: found[part] for part in said.parts}})(function)
        return replace(ops, **found)

    def timed(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which is recorded."""

        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            start = _mark(self.device)
            out = function(*args, **options)
            end = _mark(self.device)
            if operation == "rms_norm":
                self.add_residual("o_proj", args[0], start)
            if operation in _POOLING and allows(function).last_token and not options:
                args = (args[0][: len(out)], *args[1:])  # as many rows are read as come out
            pairs = self.pairs(*args[3:5], options.get("causal", True)) if operation == "attention" else 0
            outs = out if isinstance(out, tuple) else (out,)
            on_heads = operation == "rope" or (operation == "rms_norm" and args[0].dim() == 3)
            name = "qk_norm_rope" if on_heads else operation
            if operation in ("linear", "linears"):
                name = ", ".join(self.names.get(id(weight), "linear") for weight in args[1:])
            flops = sum(count_flops(operation, args, x, pairs) for x in (outs if operation == "linears" else outs[:1]))
            self.add(name, start, end, flops, (*args, *outs))
            return out

        return run

    def begin(self, *_: Any) -> None:
        """Before a matrix is used."""
        self.start = _mark(self.device)

    def end(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """After it."""
        end, x = _mark(self.device), args[0]
        if isinstance(module, nn.Embedding):
            self.tokens += len(x)
            self.add(name, self.start, end, 0, (x, out, out))  # as many rows are read as come out
        else:
            tensors = (x, *module.parameters(), *module.buffers(), out)
            self.add(name, self.start, end, count_flops("linear", args, out), tensors)

    def enter(self, layer: int, *_: Any) -> None:
        """Before a layer."""
        self.layer = layer

    def leave(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        """After it."""
        self.add_residual("down_proj", out, _mark(self.device))
        self.layer = None

    def add_residual(self, product: str, x: Tensor, end: _Mark) -> None:
        """Record what has come after this product, if it was the last operation: a sum of x's shape."""
        last, _, start = self.calls[-1]
        if last.operation == product:
            self.add("residual add", start, end, x.numel(), (x, x, x))

    def add(self, operation: str, start: _Mark, end: _Mark, flops: float, tensors: Iterable[Any]) -> None:
        """Record a call that reads and writes these tensors."""
        moved = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        self.calls.append((Row(self.layer, operation, 1, 0, flops, moved), start, end))


def visible_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool) -> int:
    """Keys that queries see, of all together: n m for n queries and m keys, less the n (n - 1) / 2 that are masked."""
    n, m = (cu_seqlens.diff().long() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    return int((n * m - causal * (n * (n - 1) // 2)).sum())


def count_flops(operation: str, args: tuple[Any, ...], out: Tensor, pairs: int = 0) -> float:
    """FLOPs of a call of an operation of ``Ops``: products, sums, divisions, roots and exponentials count 1 each.

    They are those that the result needs; what an implementation does beyond, such as products that are masked, is not
    counted, nor is softmax.

        linear          2 T in out      a product and a sum for each row and weight; linears: of one result
        attention       4 D Hq pairs    D products and sums for q . k and as many for p . v, for each key that is seen
        rms_norm        4               square, sum, division by the root, weight; for each number of x
        add_rms_norm    5               and the sum
        rope            3               two products, a sum
        qk_norm_rope    7               for each number of q and k
        swiglu          5               silu's negation, exponential, sum and division; the product
        norm_pool       4               for each number of the rows that are read
        norm_score      6               and a product and a sum
        pool            0               1 where all rows are read, for a mean
        pool, norm_pool 3               square, sum, division; for each number of the result, where it is normalised
    """
    x = args[0]
    if operation in ("linear", "linears"):
        return 2 * x.numel() * out.shape[-1]
    if operation == "attention":
        return 4 * x.shape[1] * x.shape[2] * pairs
    count = FLOPS[operation] * x.numel()
    if operation == "qk_norm_rope":
        count += FLOPS[operation] * args[1].numel()
    if operation in ("pool", "norm_pool"):
        count += 3 * out.numel() * args[-1] + (x.numel() if len(x) > len(out) else 0)
    return count


FLOPS = {
    **{"rms_norm": 4, "add_rms_norm": 5, "rope": 3, "qk_norm_rope": 7, "swiglu": 5},
    **{"pool": 0, "norm_pool": 4, "norm_score": 6},
}
"""For each number of the first argument; see ``count_flops``."""


LARGE = {"cpu": (1024, 2**27), "cuda": (8192, 2**30)}
"""Rows of a matrix that is multiplied, and bytes that are copied, to see what a device can do."""


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure this machine: the fastest of 10 products of large matrices, and of 10 copies of a large tensor."""
    size, copied = LARGE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randint(1, 100, (copied,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    product, copying = (_fastest(run, device) for run in (lambda: F.linear(a, b), lambda: target.copy_(source)))
    return Ceilings(2 * size**3 / product / 1e12, 2 * copied / copying / 1e9)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of 10 calls, after one."""
    times = []
    for _ in range(11):
        start = _mark(device)
        run()
        times.append(_elapsed(start, _mark(device)))
    return min(times[1:])


def _mark(device: torch.device) -> _Mark:
    """Now, on the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: _Mark, end: _Mark) -> float:
    """Seconds between two marks; a GPU is waited for."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text("utf-8")) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def _summed(rows: Iterable[Row], key: Callable[[Row], object]) -> list[Row]:
    """Rows of one key as one, in the order of the first ones."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    numbers = ("calls", "seconds", "flops", "bytes", "limit")
    return [
        replace(same[0], **{name: sum(getattr(row, name) for row in same) for name in numbers})
        for same in groups.values()
    ]
