"""Training: train."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from .. import training
from ..embedder import Embedder
from ..errors import InputError
from ..reranker import Reranker
from ..training import lora, losses
from ..training.files import STATE
from ..weights.build import ties_lm_head
from ..weights.find import SHIPPED, find
from ..weights.layout import read_layout
from ..weights.tensors import Tensors, check_rewritable, rewrite
from .arguments import Commands, add_command, add_device, add_job, open_pretrained
from .files import text_argument

EMBEDDING_OPTIONS, RERANKER_OPTIONS = ("dims", "temperature", "margin"), ("listwise",)
"""Options of one job alone; None unless given."""


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    about = "train on rows of query, response, rejected_response; writes an official-layout checkpoint"
    _add_train_options(add_command(commands, "train", train, about))


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="DATA", help=".jsonl files; formats in qwen3core/training/data.py")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a new directory; after a kill, the same call goes on"
    )
    add_job(parser)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, merged at the end")
    parser.add_argument(
        "--instruction", type=text_argument, help="for queries that have none of their own; by default as in use"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens per input, template included")
    parser.add_argument(
        "--dims", type=int, nargs="+", help="embedding: widths to train (Matryoshka); by default the whole"
    )
    parser.add_argument("--temperature", type=float, help="embedding: InfoNCE's, default 0.02")
    parser.add_argument("--margin", type=float, help="embedding: above the positive, no longer a negative; default 0.1")
    listwise = "reranker: rank a positive above its own negatives"
    parser.add_argument("--listwise", action="store_true", default=None, help=listwise)
    add_device(parser)
    for field in fields(training.Options):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")


def train(args: argparse.Namespace) -> int:
    """Train a checkpoint on files of examples, and write the trained one."""
    options = training.Options(**{field.name: getattr(args, field.name) for field in fields(training.Options)})
    directory = find(args.model, revision=args.revision)
    check_rewritable(directory, args.output)
    _check_resumable(args.output)
    examples = training.read_examples(args.inputs)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    job = read_layout(directory, job=args.job).job
    if job not in ("embedding", "reranker"):
        raise InputError(f"{directory}: expected a checkpoint of the job embedding or reranker, or --job, found {job}")
    embedding = job == "embedding"
    kind: type[Embedder] | type[Reranker] = Embedder if embedding else Reranker
    opened = open_pretrained(kind, args, dtype="float32")
    task = _task(opened, args, examples)
    model = opened.model.requires_grad_()
    if args.lora is not None:
        lora.add_lora(model, args.lora, seed=args.seed)

    def write() -> None:
        weights = lora.merged_weights(model) if args.lora is not None else model.state_dict()
        stored = Tensors(directory)
        if ties_lm_head(model.config, stored):
            weights["lm_head.weight"] = weights["embed_tokens.weight"]
        rewrite(directory, args.output, lambda name: weights[name] if name in weights else stored[name])
        if args.lora is not None:
            base = str(directory.resolve()) if os.path.isdir(args.model) or args.model in SHIPPED else args.model
            adapter = args.output / "adapter"
            lora.save_lora(model, adapter, lm_head=not embedding, source=directory, base=base, revision=args.revision)
        print(args.output)

    training.train(model, task, options, args.output / "training", write=write)
    return 0


def _check_resumable(output: Path) -> None:
    """Raise InputError where a directory has files in it that no interrupted training explains."""
    if output.exists() and not (output / "training" / STATE).exists():
        found = sorted({path.name for path in output.iterdir()} - {"training"})
        if found:
            raise InputError(f"{output}: expected an empty directory, or an interrupted training, found {found[0]}")


def _task(opened: Embedder | Reranker, args: argparse.Namespace, examples: Sequence[training.Example]) -> training.Task:
    kinds = {"embedding": EMBEDDING_OPTIONS, "reranker": RERANKER_OPTIONS}
    job = "embedding" if isinstance(opened, Embedder) else "reranker"
    given = {name: value for names in kinds.values() for name in names if (value := getattr(args, name)) is not None}
    for name in given:
        if name not in kinds[job]:
            raise InputError(f"--{name}: expected none with a checkpoint for the job {job!r}, found {given[name]}")
    if isinstance(opened, Embedder):
        task = training.embedding_task(
            examples,
            opened.tokenizer,
            instruction=args.instruction,
            query_prompt=opened.query_prompt,
            document_prompt=opened.prompts.get("document", ""),
            max_length=args.max_length,
            **given,
        )
    else:
        instruction = opened.layout.instruction if args.instruction is None else args.instruction
        loss = losses.listwise if given else losses.pointwise
        task = training.reranking_task(
            examples, opened.tokenizer, instruction=instruction, max_length=args.max_length, loss=loss
        )
    return replace(task, identity=task.identity | {"lora": args.lora})
