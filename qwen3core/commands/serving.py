"""Computing for others over HTTP: serve."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from ..embedder import Embedder
from ..errors import InputError, check_int
from ..reranker import Reranker
from ..weights.find import find
from ..weights.layout import read_layout
from .arguments import Commands, add_command, add_model_options, add_split_special_tokens, open_pretrained, require

KEY = "QWEN3CORE_API_KEY"
"""The environment's variable of the key."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    parser = add_command(commands, "serve", serve, "an HTTP server: /v1/embeddings, /v1/rerank and more", model=False)
    about = "checkpoint directory or hub id, or NAME=MODEL to choose the name that requests call it"
    parser.add_argument("models", nargs="+", metavar="MODEL", help=about)
    parser.add_argument("--revision", help="branch, tag or commit of hub ids")
    parser.add_argument("--host", default=LOOPBACK[0], help="address to listen at; by default this machine's own alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any free one")
    parser.add_argument("--api-key-file", type=Path, help=f"file with the key that requests must have, or ${KEY}")
    parser.add_argument("--batch-tokens", type=int, help="most tokens in one batch")
    parser.add_argument("--max-requests", type=int, default=256, help="that may wait; more get 429; default 256")
    parser.add_argument("--max-body", type=int, default=2**21, help="bytes of a request, default 2 MiB")
    parser.add_argument("--grace", type=int, default=120, help="seconds to finish in when told to stop, default 120")
    add_split_special_tokens(parser)
    add_model_options(parser)


def serve(args: argparse.Namespace) -> int:
    """Open the checkpoints and answer requests until told to stop."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, package)
    for name, low in (("port", 0), ("batch_tokens", 1), ("max_requests", 1), ("max_body", 1), ("grace", 0)):
        if getattr(args, name) is not None:
            check_int(f"--{name.replace('_', '-')}", getattr(args, name), low)
    key = _key(args)
    if key is None and args.host not in LOOPBACK:
        print(f"qwen3core: {args.host}: whoever reaches it may use it, since there is no key", file=sys.stderr)
    models = _open(args)
    from ..serving.app import create_app  # after require
    from ..serving.run import run

    limits = {name: getattr(args, name) for name in ("batch_tokens", "max_requests", "max_body")}
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn's, once all is answered
        run(create_app(models, api_key=key, **limits), host=args.host, port=args.port, grace=args.grace)
    return 0


def _key(args: argparse.Namespace) -> str | None:
    """The key, of the file or the environment. Raises InputError for an empty one, OSError."""
    key = args.api_key_file.read_text("utf-8").strip() if args.api_key_file else os.environ.get(KEY)
    if key is not None and not key:
        raise InputError(f"{args.api_key_file or KEY}: expected a key, found nothing")
    return key


def _open(args: argparse.Namespace) -> dict[str, Embedder | Reranker]:
    models: dict[str, Embedder | Reranker] = {}
    for item in args.models:
        name, _, path = item.rpartition("=") if not os.path.exists(item) else ("", "", item)
        name = name or (Path(path).resolve().name if os.path.isdir(path) else path)
        if name in models:
            raise InputError(f"{item}: expected another name than {name!r}, which NAME=MODEL gives it")
        job = read_layout(find(path, revision=args.revision), job=args.job).job
        kind: Any = Embedder if job in (*Embedder.jobs, None, "chat") else Reranker
        models[name] = open_pretrained(kind, args, model=path)
    return models
