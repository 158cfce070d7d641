"""The qwen3core command: a file per group of commands, which registers its arguments beside its functions.

A group has ``register(commands)``. Its functions take the parsed arguments and give the exit status.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence

from ..errors import Qwen3CoreError
from . import checkpoints, evaluation, explaining, exporting, kernels, run, serving, training


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0, 1 (a check failed) or 2 (bad input, said on stderr)."""
    parser = argparse.ArgumentParser(
        prog="qwen3core", description="Qwen3-Embedding and Qwen3-Reranker in plain PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (run, explaining, training, evaluation, checkpoints, exporting, serving, kernels):
        group.register(commands)
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # as all that is read, whatever the locale says
    warnings.formatwarning = lambda message, *_, **__: f"qwen3core: {message}\n"
    try:
        status = args.run(args)
        print(end="", flush=True)  # here, where what cannot be written is said
        return status
    except BrokenPipeError:  # the reader has gone, as ``| head`` does: nothing more to say
        return 1
    except (Qwen3CoreError, OSError) as error:
        print(f"qwen3core: {error}", file=sys.stderr)
        return 2
    finally:
        _give_up_what_cannot_be_written()


def _give_up_what_cannot_be_written() -> None:
    """What standard output still holds would be tried again at the exit, and change the exit status."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
