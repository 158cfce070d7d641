"""What benches have in common: the machine that they ran on, and results as JSON with the ceilings of the same run."""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton

from qwen3core.profiling import device_name
from qwen3core.writing import writing

RESULTS = Path(__file__).parent / "results"


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
