"""What a score comes from: explain."""

import argparse
from functools import partial

from ..embedder import Embedder
from ..errors import InputError
from ..explaining import explain
from ..reranker import Reranker
from ..weights.find import find
from ..weights.layout import read_layout
from ..writing import writing
from .arguments import Commands, add_command, add_device, add_job, add_split_special_tokens, open_pretrained
from .files import file_name, text_argument


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    about = "what a score comes from: tokens, layers, heads, attention, as one HTML file to open in a browser"
    parser = add_command(commands, "explain", write_page, about)
    parser.add_argument("--query", type=text_argument, required=True)
    parser.add_argument(
        "--document", type=text_argument, action="append", required=True, help="may be repeated, to compare"
    )
    parser.add_argument("-o", "--output", type=partial(file_name, formats=(".html",)), required=True, help="FILE.html")
    parser.add_argument("--instruction", type=text_argument, help="the task, in one sentence")
    about = "tokens per input, template included; by default the checkpoint's, and over 1024 are refused"
    parser.add_argument("--max-length", type=int, help=about)
    add_split_special_tokens(parser)
    add_device(parser)
    add_job(parser)


def write_page(args: argparse.Namespace) -> int:
    """Write a page about the decisions on a query and its documents, computed in float32."""
    job = read_layout(find(args.model, revision=args.revision), job=args.job).job
    if job not in ("embedding", "reranker"):
        raise InputError(f"{args.model}: expected a checkpoint of the job embedding or reranker, or --job, found {job}")
    kind: type[Embedder] | type[Reranker] = Embedder if job == "embedding" else Reranker
    opened = open_pretrained(kind, args, dtype="float32")
    page = explain(opened, args.query, args.document, name=args.model, instruction=args.instruction)
    with writing(args.output) as part:
        part.write_text(page, encoding="utf-8")
    print(args.output)
    return 0
