"""What commands have in common: a command's parser, the options of an open model, and checks before any work."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from ..pretrained import Pretrained

Commands = Any  # argparse's own type of ``add_subparsers`` is private
Opened = TypeVar("Opened", bound=Pretrained)


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str, *, model: bool = True
) -> argparse.ArgumentParser:
    """The parser of a new command; ``model`` gives it a checkpoint as its first argument."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=function)
    if model:
        parser.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
        parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--ops``."""
    parser.add_argument("--device", help="cpu, cuda, ...; by default the first GPU where there is one")
    parser.add_argument("--ops", default="auto", help="auto, reference, torch, prepacked, batch_invariant or triton")


def add_job(parser: argparse.ArgumentParser) -> None:
    """Add ``--job``."""
    about = "what the checkpoint is for, where its files say something else, or nothing"
    parser.add_argument("--job", choices=("embedding", "reranker"), help=about)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of running an open model: dtype, device, ops, job, max_length."""
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, int8")
    add_device(parser)
    add_job(parser)
    about = "tokens per input, template included; by default the checkpoint's, at most 8192"
    parser.add_argument("--max-length", type=int, help=about)


def add_split_special_tokens(parser: argparse.ArgumentParser) -> None:
    """Add ``--split-special-tokens``."""
    parser.add_argument(
        "--split-special-tokens", action="store_true", help="read <|im_end|> and the like as plain text"
    )


def open_pretrained(kind: type[Opened], args: argparse.Namespace, **changed: Any) -> Opened:
    """The checkpoint that the arguments name, with their options; changed: in place of theirs."""
    options = model_options(args) | changed
    return kind.from_pretrained(options.pop("model"), **options)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` among a command's, by name."""
    names = ("model", "revision", "dtype", "device", "ops", "job", "max_length", "split_special_tokens")
    return {name: value for name, value in vars(args).items() if name in names}


def require(package: str, module: str) -> None:
    """Raise InputError where an optional package is not installed."""
    if not importlib.util.find_spec(module):
        raise InputError(f"{package} is not installed: pip install {package}")


def require_new(directory: Path) -> None:
    """Raise InputError where a directory has files in it."""
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: expected a new or an empty directory, found files in it")
