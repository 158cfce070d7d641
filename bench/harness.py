"""The common timing harness: sides in alternation, ceilings measured in the same run, results as JSON."""

import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy
import torch
import triton

RESULTS = Path(__file__).parent / "results"
FLUSH = 2**30
"""Bytes zeroed before each measurement on a GPU: far more than any L2 holds, and long enough (0.3 ms at 4 TB/s) for the
host to queue the call meanwhile, so that device time is measured and not Python's."""

Timing = dict[str, Any]
"""{"p20", "p50", "p80"} in milliseconds, or {"error"}"""


def compare(
    sides: dict[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 3
) -> dict[str, Timing]:
    """Each side's time, all sides in turn within each repeat, so that drift hits all alike.

    A side that raises in its warm-up is recorded as {"error"} and does not stop the others.
    """
    results, times = dict.fromkeys(sides), {}
    for name, side in sides.items():
        try:
            for _ in range(warmup):
                side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name] = []
        except Exception as error:
            results[name] = failure(error)
    if device.type == "cuda":
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        for _ in range(repeats):
            for name in times:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                sides[name]()
                end.record()
                times[name].append((start, end))
        torch.cuda.synchronize(device)
        times = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in times.items()}
    else:
        times = alternate({name: sides[name] for name in times}, repeats=repeats)
    for name, values in times.items():
        results[name] = {f"p{p}": float(numpy.percentile(values, p)) for p in (20, 50, 80)}
    return results


def alternate(sides: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 0) -> dict[str, list[float]]:
    """Wall clock in milliseconds of every call, all sides in turn within each repeat; of the warm-up, nothing.

    Every second turn is backwards, since what a side leaves behind (threads that spin, caches) is the next one's loss.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        for name, side in list(sides.items())[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            side()
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def failure(error: Exception) -> Timing:
    """The row of a side that cannot run."""
    if isinstance(error, ImportError):
        return {"error": "not installed"}
    return {"error": f"{type(error).__name__}: {error}".split("\n")[0][:100]}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: {"matmul_tflops"} of one big product, {"copy_gbs"} of one big copy, read + written."""
    size, copied = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randint(1, 100, (copied,), device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    sides = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = compare(sides, device, repeats=20)
    return {
        "matmul_tflops": 2 * size**3 / times["matmul"]["p50"] / 1e9,
        "copy_gbs": 2 * copied / times["copy"]["p50"] / 1e6,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found = {"device": platform.machine(), "date": date.today().isoformat(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__, "interpreter": triton.knobs.runtime.interpret}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or torch.version.hip}
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
        return found
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (model := re.search(r"model name\s*: (.*)", cpuinfo.read_text("utf-8"))):
        found["device"] = model[1]
    return found | {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def save(folder: Path, name: str, rows: Iterable[dict], environment: dict, ceilings: dict[str, float]) -> Path:
    """Write folder/<device>/<name>.json and return its path."""
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    path = Path(folder) / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment, "ceilings": ceilings, "rows": list(rows)}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return path
