"""An engine in a process of its own: no other engine shares its packages, its memory or its threads.

    worker = Worker(sys.executable, job="embed", engine="transformers", directory=folder, dtype="float32")
    milliseconds, vectors = worker.call([[["a text", "another"]]])

The process is ``PYTHON -m bench.worker DESCRIPTOR``. A JSON object a line comes in by stdin, and one goes out by that
descriptor, since engines print. Times are taken there, around calls that take texts and give numpy. It imports only
what its engine needs, so an environment need not have all that qwen3core needs.
"""

import base64
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
MODULES = (
    *("torch", "transformers", "sentence_transformers", "onnxruntime", "openvino", "optimum", "llama_cpp", "vllm"),
    *("infinity_emb", "fastapi"),
)
"""Modules whose versions numbers depend on."""


class Failed(Exception):
    """What an engine raised, or that its process ended."""


class Worker:
    """This end: starts the process and opens the engine. Raises Failed."""

    def __init__(self, python: str, **opening: Any) -> None:
        answers, descriptor = os.pipe()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[descriptor],
            cwd=ROOT,
            text=True,
        )
        os.close(descriptor)
        self.answers = os.fdopen(answers)
        try:
            self.versions = self.ask("open", **opening)
        except Failed:
            self.close()
            raise

    def ask(self, action: str, **job: Any) -> Any:
        """The answer to a job."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps({"do": action, **job}, default=str) + "\n")
            self.process.stdin.flush()
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()  # it may still have to say why
            self.log.seek(0)
            last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"its process ended: {''.join(last)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["done"]

    def call(self, calls: list[list[Any]], **options: Any) -> tuple[float, np.ndarray]:
        """Call the engine with each list of arguments: milliseconds of all, results one after the other."""
        found = self.ask("call", calls=calls, options=options)
        rows = np.frombuffer(base64.b64decode(found["data"]), np.float32).reshape(found["shape"])
        return found["ms"], rows

    def peak(self) -> float:
        """MiB resident at most since it was last called, or since the start."""
        return self.ask("peak")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()
        self.log.close()


class _Engine:
    """The other end."""

    run: Callable[..., np.ndarray]

    def open(self, job: str, engine: str, directory: str, **options: Any) -> dict[str, str]:
        """Open the engine; the versions of its packages."""
        from bench import engines

        self.run = engines.OPENERS[job](Path(directory), **options)[engine]()
        found = packages_distributions()
        used = {name for module in MODULES if module in sys.modules for name in found.get(module, ())}
        return {"python": platform.python_version()} | {name: version(name) for name in sorted(used)}

    def call(self, calls: list[list[Any]], options: dict[str, Any]) -> dict[str, Any]:
        """Time the calls. What an engine remembers of texts is forgotten first: those of a repeat are the same."""
        getattr(self.run, "forget", lambda: None)()
        start = time.perf_counter()
        parts = [self.run(*arguments, **options) for arguments in calls]
        elapsed = (time.perf_counter() - start) * 1e3
        rows = np.concatenate(parts).astype(np.float32)
        return {"ms": elapsed, "shape": rows.shape, "data": base64.b64encode(rows.tobytes()).decode()}

    def peak(self) -> float:
        """The sum over this process and those that it started; memory that they share counts in each."""
        total = 0
        pids = [str(os.getpid())]
        for pid in pids:
            status = Path(f"/proc/{pid}/status").read_text("utf-8")
            total += int(status.split("VmHWM:")[1].split()[0])
            Path(f"/proc/{pid}/clear_refs").write_text("5", "utf-8")  # the peak begins again
            pids += [
                child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
            ]
        return total / 1024


def main() -> None:
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # or a process that outlives this one would hold the pipe open
    engine = _Engine()
    with os.fdopen(descriptor, "w") as answers:
        for line in sys.stdin:
            job = json.loads(line)
            try:
                answer = {"done": getattr(engine, job.pop("do"))(**job)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
