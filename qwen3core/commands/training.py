"""Training: train."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from .. import training
from ..embedder import Embedder
from ..errors import check_int
from ..prompts import DEFAULT_TASK
from ..reranker import Reranker
from ..training import lora, losses
from ..weights.find import SHIPPED, find, is_embedding
from ..weights.tensors import check_apart, rewrite
from .arguments import Commands, add_command, add_device


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    about = "train on rows of query, response, rejected_response; writes an official-layout checkpoint"
    _add_train_options(add_command(commands, "train", train, about))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="DATA", help=".jsonl files; formats in qwen3core/training/data.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory; the same call resumes there")
    parser.add_argument("--kind", default="auto", choices=("auto", "embedding", "reranker"))
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, merged at the end")
    parser.add_argument("--instruction", default=DEFAULT_TASK, help="for queries that have none of their own")
    parser.add_argument("--max-length", type=int, default=512, help="tokens per input, template included")
    parser.add_argument(
        "--dims", type=int, nargs="+", help="embedding: widths to train (Matryoshka); by default the whole"
    )
    parser.add_argument("--temperature", type=float, default=0.02, help="embedding: InfoNCE's")
    parser.add_argument("--margin", type=float, default=0.1, help="embedding: above the positive, no longer a negative")
    parser.add_argument("--listwise", action="store_true", help="reranker: rank a positive above its own negatives")
    add_device(parser)
    for field in fields(training.Options):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")


def train(args: argparse.Namespace) -> int:
    """Train a checkpoint on files of examples, and write the trained one."""
    examples = training.read_examples(args.inputs)
    directory = find(args.model, revision=args.revision)
    check_apart(directory, args.output)
    options = training.Options(**{field.name: getattr(args, field.name) for field in fields(training.Options)})
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    embedding = args.kind == "embedding" or (args.kind == "auto" and is_embedding(directory))
    opened, task = (_embedding if embedding else _reranker)(args, directory, examples)
    model = opened.model.requires_grad_()
    if args.lora is not None:
        lora.add_lora(model, args.lora, seed=args.seed)
    training.train(model, task, options, args.output / "training")
    if int(os.environ.get("RANK", 0)) == 0:
        if args.lora is not None:
            base = str(directory.resolve()) if os.path.isdir(args.model) or args.model in SHIPPED else args.model
            adapter = args.output / "adapter"
            lora.save_lora(model, adapter, lm_head=not embedding, base=base, revision=args.revision)
        weights = lora.merged_weights(model) if args.lora is not None else model.state_dict()
        rewrite(directory, args.output, weights.__getitem__)
        print(args.output)
    return 0


def _embedding(
    args: argparse.Namespace, directory: Path, examples: Sequence[training.Example]
) -> tuple[Embedder | Reranker, training.Task]:
    opened = Embedder.from_pretrained(directory, dtype="float32", device=args.device, ops=args.ops)
    hidden_size = opened.model.config.hidden_size
    dims = args.dims or [hidden_size]
    for dim in dims:
        check_int("dims", dim, 1, hidden_size)
    return opened, training.embedding_task(
        examples,
        opened.tokenizer,
        instruction=args.instruction,
        max_length=args.max_length,
        dims=dims,
        temperature=args.temperature,
        margin=args.margin,
    )


def _reranker(
    args: argparse.Namespace, directory: Path, examples: Sequence[training.Example]
) -> tuple[Embedder | Reranker, training.Task]:
    opened = Reranker.from_pretrained(directory, dtype="float32", device=args.device, ops=args.ops)
    loss: Callable[..., torch.Tensor] = losses.listwise if args.listwise else losses.pointwise
    return opened, training.reranking_task(
        examples, opened.tokenizer, instruction=args.instruction, max_length=args.max_length, loss=loss
    )
