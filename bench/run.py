"""How fast, how much memory, how soon: qwen3core beside other engines.

    python -m bench.run --quick     # small random checkpoints: proves that the bench runs; --out writes its rows
    python -m bench.run --full --python vllm=VENV/bin/python    # 0.6B; JSON, charts and the tables of bench/README.md

Every engine runs in a process of its own, of the environment named for it or of this one; those that are not installed
are left out, and named. Every time is wall clock around a call that takes texts and returns numpy, the engines one
after the other in each repeat; ratios are taken within a repeat, and only of engines whose results agree.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from bench import harness, report
from bench.workloads import WORKLOADS, Row, Setup
from qwen3core import profiling
from qwen3core.weights.synthesize import synthesize


def main() -> None:
    args = arguments()
    folder = args.out or (harness.RESULTS if args.full else None)
    with tempfile.TemporaryDirectory() as temporary:
        setup = prepare(args, args.checkpoints or Path(temporary))
        environment = harness.environment(torch.device(setup.device))
        print(environment, flush=True)
        try:
            for name in args.workload:
                found, load = [], [os.getloadavg()[0]]
                for row in WORKLOADS[name](setup):
                    print(line(row), flush=True)
                    found.append(row)
                if folder:
                    noted = environment | {"load": [*load, os.getloadavg()[0]], "engines": setup.versions}
                    ceilings = vars(profiling.ceilings(torch.device(setup.device), getattr(torch, args.dtype)))
                    path = harness.save(folder, f"{name}_{args.dtype}", found, noted, ceilings)
        finally:
            setup.close()
    if folder and folder.resolve() == harness.RESULTS.resolve():
        from bench import plot

        plot.engines(path.parent, environment["device"])
        report.write_tables()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="small checkpoints, few texts; nothing is written")
    size.add_argument(
        "--full", action="store_true", help="0.6B; writes bench/results and the tables of bench/README.md"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: bench/results; with --quick: none")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="of its own environment")
    parser.add_argument("--engine", nargs="+", default=[], help="beside qwen3core (default: all that are installed)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full workload's texts")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the long text (default: 8192)")
    parser.add_argument("--repeats", type=int, default=7, help="of short calls; long ones have 3 or more")
    parser.add_argument("--checkpoints", type=Path, help="folder that the synthesized checkpoints stay in")
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path) -> Setup:
    """Synthesize the two checkpoints, where they are not in the folder already."""
    size = "small" if args.quick else "0.6B"
    embedding, reranker = (folder / f"Qwen3-{kind}-{size}" for kind in ("Embedding", "Reranker"))
    for path in (embedding, reranker):
        if not path.exists():
            synthesize(path, path.name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = {"cpu": 1 / 8, "cuda": 1 / 256}[device]
    scale, repeats, length = (few, 2, 256) if args.quick else (args.scale, args.repeats, args.length)
    pythons = {engine.lower(): path for engine, _, path in (pair.partition("=") for pair in args.python)}
    return Setup(embedding, reranker, args.dtype, device, repeats, scale, length, pythons, args.engine)


def line(row: Row) -> str:
    return "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())


if __name__ == "__main__":
    main()
