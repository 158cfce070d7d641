"""Calls timed side by side: engines in alternation, on a GPU by its own events; only what gives the right numbers."""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch._functorch.config
from torch import Tensor

FLUSH = 2**30
"""Bytes zeroed before each measurement on a GPU: far more than any L2 holds, and long enough (0.3 ms at 4 TB/s) for the
host to queue the call meanwhile, so that device time is measured and not Python's."""

TOLERANCE = 2e-2
"""Relative Frobenius error in bfloat16 against float32, 1e-3 to 1e-2 where it is right: beyond, no time is given."""
DIRECTIONS = ("forward", "backward")

Run = Callable[[], Any]
Runs = Mapping[str, Run]
"""The call to time, by the engine's name."""
Timing = dict[str, Any]
"""{"p25", "p50", "p75"} in milliseconds, or {"error"}"""


def prepared(function: Callable[..., Any], arguments: Sequence[Any], douts: Sequence[Tensor] = ()) -> Run:
    """The function's call with copies of the arguments, since some write into what they get.

    With douts, the outputs' gradients: torch.autograd.grad, by each argument that requires one, of a graph that is
    built here. Raises ValueError where the outputs have no gradient.
    """
    copies = [_copy(x, bool(douts)) if isinstance(x, Tensor) else x for x in arguments]
    if not douts:
        return partial(function, *copies)
    with torch.enable_grad():
        outs = listed(function(*copies))
    if not all(out.requires_grad for out in outs):
        raise ValueError("the outputs have no gradient")
    leaves = [x for x in copies if isinstance(x, Tensor) and x.requires_grad]
    return partial(torch.autograd.grad, outs, leaves, list(douts), retain_graph=True)


def engines_of(
    functions: Mapping[str, Callable[..., Any]], arguments: Sequence[Any], douts: Sequence[Tensor], direction: str
) -> dict[str, Callable[[], Run]]:
    """What ``measure`` takes, of functions of the same arguments; backward by the outputs' gradients douts."""
    given = douts if direction == "backward" else ()
    return {name: partial(prepared, function, arguments, given) for name, function in functions.items()}


def _copy(x: Tensor, differentiated: bool) -> Tensor:
    copy = x.detach().clone().requires_grad_(differentiated and x.requires_grad)
    if copy.dim() > 1:  # one compilation for any number of rows
        torch._dynamo.maybe_mark_dynamic(copy, 0)
    return copy


def listed(outs: Any) -> list[Tensor]:
    return [outs] if isinstance(outs, Tensor) else list(outs)


def expect(
    specification: Callable[..., Any], arguments: Sequence[Any], wide: Sequence[Any]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Random gradients of the outputs for the arguments, in their dtypes; by direction, what the wide ones give."""
    outs = listed(prepared(specification, wide)())
    douts = [torch.randn_like(x) for x in listed(prepared(specification, arguments)())]
    if not any(isinstance(x, Tensor) and x.requires_grad for x in wide):
        return douts, {"forward": outs}
    gradients = prepared(specification, wide, [dout.to(out) for dout, out in zip(douts, outs, strict=True)])()
    return douts, {"forward": outs, "backward": list(gradients)}


@torch._functorch.config.patch(donated_buffer=False)  # a compiled graph's backward runs many times
def measure(
    engines: Mapping[str, Callable[[], Run]], expected: Sequence[Tensor], device: torch.device, repeats: int
) -> dict[str, Timing]:
    """Time what each engine prepares, if it gives what is expected; {"error"} of those that raise or do not."""
    results: dict[str, Timing] = {name: {} for name in engines}  # in their order
    runs = {}
    for name, prepare in engines.items():
        try:
            run = prepare()
            worst = numpy.max([_relative_error(*pair) for pair in zip(listed(run()), expected, strict=True)])
            if not worst < TOLERANCE:  # NaN, if there is one
                raise ValueError(f"disagrees with the specification, relative error {worst:.1e}")
            runs[name] = run
        except Exception as error:
            results[name] = failure(error)
    return results | compare(runs, device, repeats=repeats)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def compare(engines: Runs, device: torch.device, *, repeats: int, warmup: int = 3) -> dict[str, Timing]:
    """Time each engine's call, all engines one after the other within each repeat, so that drift hits all alike.

    An engine that raises in its warm-up is recorded as {"error"} and does not stop the others.
    """
    results: dict[str, Timing] = {name: {} for name in engines}  # in the order given
    runs = {}
    for name, run in engines.items():
        try:
            for _ in range(warmup):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            runs[name] = run
        except Exception as error:
            results[name] = failure(error)
    if device.type == "cuda":
        times = device_times(runs, repeats, device)
    else:
        times = alternate({name: partial(wall_time, run) for name, run in runs.items()}, repeats)
    for name, values in times.items():
        results[name] = quartiles(values)
    return results


def alternate(engines: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The times that every call gives, the engines one after the other in each repeat.

    Every second repeat goes backwards, since what an engine leaves behind (caches, a warm CPU) changes the next.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats):
        for name, run in list(engines.items())[:: -1 if repeat % 2 else 1]:
            times[name].append(run())
    return times


def wall_time(run: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def device_times(engines: Runs, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds on the GPU of every call, the engines one after the other in each repeat, caches flushed first."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, run in engines.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def quartiles(values: list[float]) -> Timing:
    return {f"p{p}": float(numpy.percentile(values, p)) for p in (25, 50, 75)}


def failure(error: Exception) -> Timing:
    """The row of an engine that cannot run."""
    if isinstance(error, ImportError):
        return {"error": "not installed"}
    return {"error": f"{type(error).__name__}: {error}".split("\n")[0][:100]}


def profile(engines: Mapping[str, Callable[[], Run]], path: Path) -> dict[str, str]:
    """Write what a call of each engine launches, and for how long, as Proton's tree: {"file"}, or {"error"}.

    To be read by ``proton-viewer -m time/us FILE``. Needs a GPU and triton.profiler.
    """
    try:
        from triton import profiler

        path.parent.mkdir(parents=True, exist_ok=True)
        runs = {name: prepare() for name, prepare in engines.items()}
        for run in runs.values():  # what compiles is not to be seen
            run()
        session = profiler.start(str(path.with_suffix("")))
        try:
            for name, run in runs.items():
                with profiler.scope(name):
                    run()
            torch.cuda.synchronize()
        finally:
            profiler.finalize(session)
    except Exception as error:
        return failure(error)
    return {"file": str(path)}


def gpu_state() -> dict[str, str]:
    """Clocks, temperature and power of the first GPU now, as nvidia-smi says them; empty where it is not there."""
    if not shutil.which("nvidia-smi"):
        return {}
    names = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    values = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
    return dict(zip(names, values, strict=False))
