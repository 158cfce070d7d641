"""The common timing harness: engines in alternation, results as JSON with the ceilings of the same run."""

import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

from qwen3core.profiling import device_name
from qwen3core.writing import writing

RESULTS = Path(__file__).parent / "results"
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


def environment(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions that the numbers depend on."""
    found: dict[str, Any] = {"device": device_name(device), "date": date.today().isoformat()}
    found |= {"python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__, "interpreter": triton.knobs.runtime.interpret}
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda or torch.version.hip}
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
        return found
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text("utf-8").split() if cpuinfo.exists() else []
    features = [name for name in ("avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    return found | {"cpu": features, "threads": torch.get_num_threads()}


def save(folder: Path, name: str, rows: Iterable[dict], environment: dict, ceilings: dict[str, float]) -> Path:
    """Write folder/<device>/<name>.json and return its path."""
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = Path(folder) / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment, "ceilings": ceilings, "rows": list(rows)}
    with writing(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return path
