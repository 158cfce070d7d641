"""Checkpoints as such: inspect, parity, profile, synthesize, merge."""

import argparse
import math
import warnings
from functools import partial
from pathlib import Path

from .. import parity, profiling, samples
from ..embedder import Embedder
from ..pretrained import open_tokenizer, with_tokens
from ..reranker import Reranker
from ..tokenizer import Tokenizer
from ..weights import merge, synthesize
from ..weights.build import open_model
from ..weights.find import find
from ..weights.layout import read_layout
from .arguments import Commands, add_command, add_model_options, open_pretrained, require, require_new
from .files import add_inputs, file_name, read_inputs, text_of


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    parser = add_command(commands, "parity", compare, "compare with transformers, layer by layer")
    add_inputs(parser, "texts to compare on", "--inputs")
    add_model_options(parser)
    parser = add_command(
        commands, "profile", profile, "time, FLOPs and bytes of each operation, beside the machine's best"
    )
    add_inputs(parser, "texts, or a reranker's documents, of one call", "--texts")
    picture = partial(file_name, formats=profiling.ENDINGS)
    parser.add_argument("-o", "--output", type=picture, help=f"a picture: FILE{', '.join(profiling.ENDINGS)}")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the fastest counts, default 5")
    add_model_options(parser)
    add_command(commands, "inspect", inspect, "configuration, tensors and tokenizer self-check")
    about = "write a checkpoint with random weights in the official layout"
    parser = add_command(commands, "synthesize", write_random, about, model=False)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layout", default="Qwen3-Embedding-small", help="such as Qwen3-Reranker-0.6B")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; a small one is built otherwise")
    parser = add_command(commands, "merge", write_merged, "one checkpoint out of several of one shape", model=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint directories or hub ids")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new directory")
    parser.add_argument("--weights", type=float, nargs="+", help="the share of each; equal by default")
    parser.add_argument("--linear", action="store_true", help="weighted mean, in place of slerp")


def compare(args: argparse.Namespace) -> int:
    """Print the parity report; the exit status is 1 beyond tolerance."""
    texts = _texts(args.inputs, args.text)
    options = {name: getattr(args, name) for name in ("revision", "job", "dtype", "ops", "device", "max_length")}
    report = parity.parity(args.model, texts=texts or None, **options)
    print(report)
    print(f"\n{'Equal within tolerance.' if report.ok else 'NOT equal within tolerance.'}")
    return 0 if report.ok else 1


def _texts(inputs: list[str], texts: list[str]) -> list[str]:
    """The texts that the arguments name; none where they are none."""
    rows = read_inputs(inputs, texts) if inputs or texts else ()
    return [text_of(row, "text", where) for row, where in rows]


def profile(args: argparse.Namespace) -> int:
    """Print where the time of one call goes, and draw it."""
    if args.output:
        require("matplotlib", "matplotlib")
    texts = _texts(args.texts, args.text) or [*samples.DOCUMENTS, samples.LONG_DOCUMENT]
    if read_layout(find(args.model, revision=args.revision), job=args.job).job in Embedder.jobs:
        report = profiling.profile(open_pretrained(Embedder, args), texts, repeats=args.repeats)
    else:
        pairs = [(samples.QUERIES[1], text) for text in texts]
        report = profiling.profile(open_pretrained(Reranker, args), pairs, repeats=args.repeats)
    print(report)
    if args.output:
        report.draw(args.output)
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Print configuration, tensors and checks of the tokenizer; the exit status is 1 where one fails."""
    directory = find(args.model, revision=args.revision)
    layout = read_layout(directory)
    model, tensors = open_model(directory, layout=layout)
    print(directory, *(f"  {name}: {value}" for name, value in vars(model.config).items()), sep="\n")
    tokenizer = open_tokenizer(directory, layout)
    layout = with_tokens(layout, tokenizer)
    print("\naround the decoder", *(f"  {name}: {value!r}" for name, value in vars(layout).items()), sep="\n")
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors)
    print(f"\n{len(list(tensors))} tensors, {parameters:,} parameters; layers 1 and up repeat the shapes of layer 0:")
    for name in tensors:
        if not name.startswith("layers.") or name.startswith("layers.0."):
            print(f"  {name:44} {tensors.dtype(name).removeprefix('torch.'):9} {list(tensors.shape(name))}")
    tokenizer.check_vocabulary(model.config.vocab_size)
    checks = check_tokenizer(tokenizer)
    print("\ntokenizer")
    for what, right in checks.items():
        print(f"  {'ok  ' if right else 'FAIL'} {what}")
    return 0 if all(checks.values()) else 1


def check_tokenizer(tokenizer: Tokenizer) -> dict[str, bool]:
    """Conventions that a tokenizer must follow for either job, in words, and whether it does."""
    prefix, suffix, template = tokenizer.prefix, tokenizer.suffix, tokenizer.template
    closing = tokenizer.closing
    embedding = tokenizer.embedding(["gravity"], max_length=8192)[0]
    body = "gravity " * 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = tokenizer.reranking([body], max_length=len(prefix) + 8 + len(suffix))[0]
    return {
        f"{tokenizer.decode(closing)!r} ({closing}) closes an embedding input exactly once": not closing
        or (embedding[-len(closing) :] == closing and embedding.count(closing[-1]) == closing.count(closing[-1])),
        f"the reranker's prefix is {len(prefix)} tokens that decode to its bytes": tokenizer.decode(prefix)
        == template.prefix,
        f"the reranker's suffix is {len(suffix)} tokens that decode to its bytes": tokenizer.decode(suffix)
        == template.suffix,
        "truncation keeps prefix and suffix": cut == [*prefix, *tokenizer.encode([body])[0][:8], *suffix],
        "yes and no are one token each": len({*tokenizer.yes_no()}) == 2,
    }


def write_random(args: argparse.Namespace) -> int:
    """Write a checkpoint with random weights."""
    require_new(args.directory)
    print(synthesize.synthesize(args.directory, args.layout, seed=args.seed, tokenizer=args.tokenizer))
    return 0


def write_merged(args: argparse.Namespace) -> int:
    """Write one checkpoint out of several."""
    require_new(args.output)
    merge.merge([find(m) for m in args.models], args.output, weights=args.weights, linear=args.linear)
    print(args.output)
    return 0
