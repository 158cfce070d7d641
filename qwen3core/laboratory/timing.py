"""Calls timed side by side: engines in alternation, on a GPU by its own events."""

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy
import torch

FLUSH = 2**30
"""Bytes zeroed before each measurement on a GPU: far more than any L2 holds, and long enough (0.3 ms at 4 TB/s) for the
host to queue the call meanwhile, so that device time is measured and not Python's."""

Runs = Mapping[str, Callable[[], object]]
"""The call to time, by the engine's name."""
Timing = dict[str, Any]
"""{"p25", "p50", "p75"} in milliseconds, or {"error"}"""


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


def gpu_state() -> dict[str, str]:
    """Clocks, temperature and power of the first GPU now, as nvidia-smi says them; empty where it is not there."""
    if not shutil.which("nvidia-smi"):
        return {}
    names = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    values = subprocess.run(command, capture_output=True, text=True).stdout.strip().split(", ")
    return dict(zip(names, values, strict=False))
