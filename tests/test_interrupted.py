"""Trainings killed at random moments, or out of disk space, go on to the same bytes, all files of the result included.

The test starts this file as a program of one thread, which imports everything once and forks a process per training.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

STEPS = 40
Call = Callable[[Path], list[str]]
Scarce = Callable[[Path, int], contextlib.AbstractContextManager[tuple[int | None, Callable[[], object]]]]


def start(call: list[str], errors: Path, limit: int | None = None) -> int:
    """Fork a process that runs the command; limit: bytes that a file may have. Its number."""
    from qwen3core.commands import main

    pid = os.fork()
    if pid == 0:
        with errors.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(None):
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                status = main(call)
            except BaseException as error:
                status = 1
                print(f"Traceback: {error!r}", file=file)
        os._exit(status)
    return pid


def run(call: list[str], errors: Path, limit: int | None = None) -> int:
    """Run the command to its end; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(start(call, errors, limit), 0)[1])


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def killed(folder: Path, call: Call, whole: dict[str, bytes], seconds: float) -> dict[str, int]:
    """Kill trainings twenty times: at any moment, while a state is written, and while the result is."""
    chance = random.Random(0)
    aims = [*["any"] * 10, *["state"] * 3, *["result"] * 7]
    found = dict.fromkeys(("begun", "state", "result", "ended"), 0)
    number = 0
    while aims:
        out = folder / f"killed-{number}"
        parts = {"state": ["training/.state.pt.part"], "result": [".part", "adapter/.part"]}
        pid = start(call(out), folder / "errors")
        until = time.monotonic() + chance.uniform(0, seconds)
        ended = 0
        while not ended and time.monotonic() < until:
            if aims[0] != "any":
                until = time.monotonic() + 60
                if any((out / part).exists() for part in parts[aims[0]]):
                    time.sleep(chance.uniform(0, 0.02))
                    break
            time.sleep(0.0003)
            ended = os.waitpid(pid, os.WNOHANG)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
            ended = os.WIFEXITED(os.waitpid(pid, 0)[1])
        if ended or ("model.safetensors" in files(out) and not (out / "training" / "state.pt").exists()):
            assert files(out) == whole, differences(files(out), whole)
            found["ended"] += 1
            number += 1
            continue
        aims.pop(0)
        found["begun"] += 1
        for aim, names in parts.items():
            found[aim] += any((out / name).exists() for name in names)
    out = folder / f"killed-{number}"
    if not out.exists() or files(out) != whole:
        assert run(call(out), folder / "errors") == 0, (folder / "errors").read_text()
    assert files(out) == whole, differences(files(out), whole)
    return found


def differences(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    return [name for name in {**found, **expected} if found.get(name) != expected.get(name)]


def full(folder: Path, call: Call, whole: dict[str, bytes], scarce: Scarce, cases: list[tuple[int, int]]) -> dict:
    """Run trainings on too little space, each then again on enough; cases: bytes, steps between states."""
    trained = 0
    for number, (size, save_every) in enumerate(cases):
        out = folder / f"full-{number}" / "out"
        out.parent.mkdir()
        command = [*call(out), "--save-every", str(save_every)]
        with scarce(out.parent, size) as (limit, more):
            status = run(command, folder / "errors", limit)
            said = (folder / "errors").read_text()
            assert status == 2, (size, status, said)
            assert said.splitlines()[-1].startswith("qwen3core: "), said
            found = files(out)
            assert "model.safetensors" not in found
            trained += found["training/loss.jsonl"] == whole["training/loss.jsonl"]
            more()
            assert run(command, folder / "errors") == 0, (folder / "errors").read_text()
            assert files(out) == whole, differences(files(out), whole)
    return {"cases": len(cases), "trained": trained}


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[None, Callable[[], object]]]:
    """A file system of ``size`` bytes, and what makes it larger."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield None, lambda: subprocess.run(["mount", "-o", "remount,size=100M", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files(folder: Path, size: int) -> Iterator[tuple[int, Callable[[], object]]]:
    """A limit of ``size`` bytes for each file, which takes no rights."""
    yield size, lambda: None


def program(folder: Path, how: str, *extra: str) -> None:
    """Train once undisturbed, then as ``how`` says; print what was seen."""
    from qwen3core.weights.synthesize import LAYOUTS, synthesize

    for module in ("torch._dynamo", "matplotlib.figure", *(["peft"] if extra else [])):  # once for all processes
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    layout = LAYOUTS["Qwen3-Embedding-small"]
    model = synthesize(folder / "model", replace(layout, config=replace(layout.config, intermediate_size=512)))
    rows = [{"query": f"what is {x}", "response": f"{x} is a thing"} for x in ("gold", "bread", "chess", "an owl")]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(out: Path) -> list[str]:
        flags = ["--epochs", str(STEPS // 2), "--batch-size", "2", "--learning-rate", "1e-3", "--save-every", "7"]
        return ["train", str(model), str(folder / "data.jsonl"), "-o", str(out), *flags, *extra]

    began = time.monotonic()
    pid, states = start(call(folder / "whole"), folder / "errors"), [0]
    while not os.waitpid(pid, os.WNOHANG)[0]:
        with contextlib.suppress(OSError):
            states.append((folder / "whole" / "training" / "state.pt").stat().st_size)
        time.sleep(0.001)
    seconds = time.monotonic() - began
    whole = files(folder / "whole")
    assert len(whole["training/loss.jsonl"].splitlines()) == STEPS, (folder / "errors").read_text()
    assert not [name for name in whole if "part" in name or "state" in name]
    state, weights = max(states), len(whole["model.safetensors"])
    if how == "killed":
        found: dict[str, float] = {**killed(folder, call, whole, seconds), "seconds": seconds}
    elif how == "disk":  # for the log, the first state, a state beside another, the result beside the last state
        cases = [(4096, 1000), (state // 2, 7), (state * 3 // 2, 7), (state + weights // 2, 1000)]
        found = full(folder, call, whole, small_disk, cases)
    else:  # for the log, a state, and the weights where they are larger
        cases = [(1000, 1000), (state // 2, 7), *([((state + weights) // 2, 1000)] if weights > state else [])]
        found = full(folder, call, whole, small_files, cases)
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--lora", "4"]], ids=["full", "lora"])
@pytest.mark.parametrize("how", ["killed", "disk", "files"])
def test_goes_on_to_the_same_bytes(how, extra, tmp_path):
    if extra:
        pytest.importorskip("peft")
    if how == "disk":
        (tmp_path / "try").mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "try"], capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")
        subprocess.run(["umount", tmp_path / "try"], check=True)
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), how, *extra],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if how == "killed":
        assert found["begun"] == 20
        assert min(found["state"], found["result"]) > 0
    else:
        assert found["trained"] == (how == "disk" or bool(extra))


if __name__ == "__main__":
    program(Path(sys.argv[1]), *sys.argv[2:])
