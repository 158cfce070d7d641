"""Kernels: kernel."""

import argparse
import importlib.util
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, check_one_of
from .arguments import Commands, add_command


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    about = "check functions against an operation, compile, time and rank them; the JSON: qwen3core/laboratory/trial.py"
    parser = add_command(commands, "kernel", kernel, about, model=False)
    parser.add_argument("sources", nargs="+", metavar="FILE.py:FUNCTION", help="with the operation's signature")
    parser.add_argument("--op", help="rms_norm, ...; by default the file's OPERATION, or the function's name")
    parser.add_argument("--target", nargs="+", help="GPUs to compile for, such as sm_90; by default all")
    parser.add_argument(
        "--dump", type=Path, metavar="FOLDER", help="write PTX and SASS there; on a GPU roofline, profile"
    )
    parser.add_argument("--model", help="checkpoint to put it into; by default a small one that is shipped")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="append a line for each variant")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of text")
    parser.add_argument("--tune", action="store_true", help="once for each entry of the file's CONFIGS, as config=")


def kernel(args: argparse.Namespace) -> int:
    """Print what the laboratory finds about each variant; the exit status is 1 where something is wrong."""
    if not importlib.util.find_spec("triton"):
        raise InputError("kernel: triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, below
    from ..laboratory import trial
    from ..laboratory.compiled import compile_elsewhere
    from ..laboratory.compiling import TARGETS
    from ..laboratory.variants import load

    targets = args.target or list(TARGETS)
    for target in targets:
        check_one_of("--target", target, TARGETS)
    variants = [variant for source in args.sources for variant in load(source, args.op, tune=args.tune)]
    compiled = compile_elsewhere(args.sources, args.op, args.tune, targets, args.dump)
    timed: dict[str, Any] = {}
    if torch.cuda.is_available():
        for op in {variant.op for variant in variants}:
            same = [variant for variant in variants if variant.op == op]
            profile = args.dump / f"{op}.hatchet" if args.dump else None
            timed[op] = trial.times(same, torch.device("cuda"), profile=profile)
    trials = []
    for variant in variants:
        found = trial.Trial.of(variant, compiled[variant.name], timed.get(variant.op), args.model)
        trials.append(found)
        if not args.json:
            print(found, end="\n\n", flush=True)
        if args.results:
            with args.results.open("a", encoding="utf-8") as file:
                file.write(_json(asdict(found)) + "\n")
    if args.json:
        print(_json({"trials": [asdict(found) for found in trials]}))
    elif len(trials) > 1:
        print(trial.ranking(trials))
    if timed and args.dump and importlib.util.find_spec("matplotlib"):
        trial.draw(trials, args.dump / "roofline.png")
    return 0 if all(found.ok for found in trials) else 1


def _json(value: Any) -> str:
    """JSON, in which a number that is not finite is null."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, list):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False)
