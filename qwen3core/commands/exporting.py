"""Checkpoints for other runtimes: export."""

import argparse
from pathlib import Path

from ..errors import InputError
from ..export import FORMATS, export
from .arguments import Commands, add_command, add_job, require, require_new


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    about = "write a checkpoint for ONNX Runtime, transformers.js, OpenVINO or llama.cpp"
    parser = add_command(commands, "export", write, about)
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new directory; of gguf, a FILE.gguf")
    dtypes = ", ".join(f"{', '.join(format.dtypes)} ({name})" for name, format in FORMATS.items())
    parser.add_argument("--dtype", default="float32", help=f"what matrices are stored in: {dtypes}; default float32")
    add_job(parser)


def write(args: argparse.Namespace) -> int:
    """Write a checkpoint in another format."""
    for package in FORMATS[args.format].packages:
        require(package, package.replace("-", "_"))
    if args.format != "gguf":
        require_new(args.output)
    elif args.output.suffix != ".gguf":
        raise InputError(f"{args.output}: expected a name ending in .gguf, found {args.output.name!r}")
    options = {name: getattr(args, name) for name in ("format", "dtype", "job", "revision")}
    export(args.model, args.output, **options)
    print(args.output)
    return 0
