"""The qwen3core command: demo, embed, rerank, train, merge, eval, parity, inspect, synthesize."""

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from . import evaluate as evaluation
from . import losses, prompts, samples
from .data import parse_json, read_examples, read_text
from .embedder import Embedder
from .errors import InputError, Qwen3CoreError, check_int
from .lora import add_lora, merged_weights, save_lora
from .parity import parity as compare
from .pretrained import MAX_LENGTH, Pretrained
from .reranker import Reranker
from .tokenizer import Tokenizer
from .train import Options, embedding_task, reranking_task
from .train import train as run_training
from .weights.checkpoint import check_apart, find, is_embedding, open_model, rewrite
from .weights.merge import merge as merge_checkpoints
from .weights.synthesize import synthesize as write_checkpoint

Opened = TypeVar("Opened", bound=Pretrained)
FORMATS = (".jsonl", ".npy", ".safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status is 0, 1 (a check failed) or 2 (bad input, said on stderr)."""
    args = _parser().parse_args(argv)
    warnings.formatwarning = lambda message, *_, **__: f"qwen3core: {message}\n"
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader has gone, as head does: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Qwen3CoreError, OSError) as error:
        print(f"qwen3core: {error}", file=sys.stderr)
        return 2


def demo(args: argparse.Namespace) -> int:
    query, documents = samples.DEMO_QUERY, samples.DEMO_DOCUMENTS
    embedder = Embedder.from_pretrained("tiny-embedding", device="cpu")
    reranker = Reranker.from_pretrained("tiny-reranker", device="cpu")
    cosines = embedder.similarity(embedder.encode_query(query), embedder.encode_document(documents))[0]
    print(f"{len(documents)} documents, ranked for the query: {query}\n")
    print("P(yes)  cosine  document")
    for hit in reranker.rank(query, documents, return_documents=True):
        print(f" {hit['score']:.3f}  {cosines[hit['corpus_id']]:+.3f}  {hit['text']}")
    print("\nThese are the two small checkpoints that come with the package; English words and short sentences only.")
    print("For more: qwen3core rerank Qwen/Qwen3-Reranker-0.6B --query QUERY TEXT ...   (downloads 1.2 GB)")
    return 0


def embed(args: argparse.Namespace) -> int:
    texts = [_text(row, "text", where) for row, where in _read(args.inputs)]
    embedder = _open(Embedder, args)
    encode = embedder.encode_query if args.query or args.instruction is not None else embedder.encode_document
    options = {"instruction": args.instruction} if args.instruction is not None else {}
    vectors = encode(texts, truncate_dim=args.dim, batch_tokens=args.batch_tokens, **options)
    rows = ({"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True))
    _write(args.output, "embeddings", vectors, rows)
    return 0


def rerank(args: argparse.Namespace) -> int:
    if args.top_k is not None:
        check_int("top_k", args.top_k, 0)
    pairs = []
    for row, where in _read(args.inputs):
        if args.query is not None:
            pairs.append((args.query, _text(row, "text", where)))
        elif isinstance(row, dict):
            pairs.append((_text(row, "query", where), _text(row, "document", where)))
        else:
            raise InputError(f"{where}: expected --query, or .jsonl rows with query and document, found text")
    reranker = _open(Reranker, args)
    scores = reranker.predict(pairs, instruction=args.instruction, batch_tokens=args.batch_tokens)
    hits = [
        {"corpus_id": i, "score": float(score), "query": query, "text": text}
        for i, (score, (query, text)) in enumerate(zip(scores, pairs, strict=True))
    ]
    if args.query is not None:
        hits = sorted(hits, key=lambda hit: -hit["score"])[: args.top_k]
    _write(args.output, "scores", scores, hits)
    return 0


def parity(args: argparse.Namespace) -> int:
    _need("parity", "transformers")
    texts = [_text(row, "text", where) for row, where in _read(args.inputs)]
    options = {name: getattr(args, name) for name in ("revision", "kind", "dtype", "ops", "device", "max_length")}
    report = compare(args.model, texts=texts or None, **options)
    print(report)
    print(f"\n{'Equal within tolerance.' if report.ok else 'NOT equal within tolerance.'}")
    return 0 if report.ok else 1


def inspect(args: argparse.Namespace) -> int:
    directory = find(args.model, revision=args.revision)
    model, tensors = open_model(directory)
    print(directory, *(f"  {name}: {value}" for name, value in vars(model.config).items()), sep="\n")
    parameters = sum(math.prod(tensors.shape(name)) for name in tensors)
    print(f"\n{len(list(tensors))} tensors, {parameters:,} parameters; layers 1 and up repeat the shapes of layer 0:")
    for name in tensors:
        if not name.startswith("layers.") or name.startswith("layers.0."):
            print(f"  {name:44} {tensors.dtype(name).removeprefix('torch.'):9} {list(tensors.shape(name))}")

    tokenizer = Tokenizer(directory / "tokenizer.json")
    tokenizer.check_vocabulary(model.config.vocab_size)
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    plain = tokenizer.embedding(["gravity"], max_length=8192)[0]
    body = "gravity " * 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = tokenizer.reranking([body], max_length=len(prefix) + 8 + len(suffix))[0]
    yes, no = tokenizer.yes_no()
    checks: dict[str, bool] = {
        f"{prompts.EOS} ({tokenizer.eos}) closes an embedding input exactly once": plain[-1] == tokenizer.eos
        and plain.count(tokenizer.eos) == 1,
        f"the reranker's prefix is {len(prefix)} tokens that decode to its bytes": tokenizer.decode(prefix)
        == prompts.RERANKER_PREFIX,
        f"the reranker's suffix is {len(suffix)} tokens that decode to its bytes": tokenizer.decode(suffix)
        == prompts.RERANKER_SUFFIX,
        "truncation keeps prefix and suffix": cut == [*prefix, *tokenizer.encode([body])[0][:8], *suffix],
        f"yes is token {yes} and no is token {no}": yes != no,
    }
    print("\ntokenizer")
    for what, right in checks.items():
        print(f"  {'ok  ' if right else 'FAIL'} {what}")
    return 0 if all(checks.values()) else 1


def train(args: argparse.Namespace) -> int:
    examples = read_examples(args.inputs)
    directory = find(args.model, revision=args.revision)
    check_apart(directory, args.output)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's
    common = {"instruction": args.instruction, "max_length": args.max_length}
    opened: Embedder | Reranker
    if args.kind == "embedding" or (args.kind == "auto" and is_embedding(directory)):
        opened = Embedder.from_pretrained(directory, dtype="float32", device=args.device, ops=args.ops)
        hidden_size = opened.model.config.hidden_size
        dims = args.dims or [hidden_size]
        for dim in dims:
            check_int("dims", dim, 1, hidden_size)
        task = embedding_task(
            examples, opened.tokenizer, dims=dims, temperature=args.temperature, margin=args.margin, **common
        )
    else:
        opened = Reranker.from_pretrained(directory, dtype="float32", device=args.device, ops=args.ops)
        loss = losses.listwise if args.listwise else losses.pointwise
        task = reranking_task(examples, opened.tokenizer, loss=loss, **common)
    model = opened.model.requires_grad_()
    if args.lora is not None:
        add_lora(model, args.lora, seed=args.seed)
    run_training(model, task, options, args.output / "training")
    if int(os.environ.get("RANK", 0)) == 0:
        if args.lora is not None:
            save_lora(model, args.output / "adapter", lm_head=isinstance(opened, Reranker))
        weights = merged_weights(model) if args.lora is not None else model.state_dict()
        rewrite(directory, args.output, weights.__getitem__)
        print(args.output)
    return 0


def merge(args: argparse.Namespace) -> int:
    _new(args.output)
    merge_checkpoints([find(m) for m in args.models], args.output, weights=args.weights, linear=args.linear)
    print(args.output)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    if not args.sts and not args.retrieval:
        raise InputError("eval: expected --sts or --retrieval, found neither")
    for given, module in ((args.sts, "scipy"), (args.retrieval, "ir_measures")):
        if given:
            _need("eval", module)
    pairs = evaluation.read_sts(args.sts) if args.sts else []
    data = evaluation.read_retrieval(args.retrieval, args.qrels) if args.retrieval else None
    embedder = _open(Embedder, args)
    reranker = Reranker.from_pretrained(args.reranker, dtype=args.dtype, ops=args.ops) if args.reranker else None
    for dim in args.dims or [embedder.model.config.hidden_size]:
        row: dict[str, float] = {}
        if pairs:
            row["spearman"] = evaluation.sts(embedder, pairs, dim=dim)
        if data:
            run = evaluation.search(embedder, data, dim=dim)
            row |= evaluation.measure(data, run)
            if reranker:
                again = evaluation.measure(data, evaluation.rerank(reranker, data, run))
                row |= {f"reranked {name}": value for name, value in again.items()}
        print(f"dim {dim}", *(f"{name} {value:.4f}" for name, value in row.items()), sep="  ", flush=True)
    return 0


def _need(command: str, module: str) -> None:
    if not importlib.util.find_spec(module):
        raise InputError(f"{command}: expected {module} (pip install {module}), found it missing")


def _new(directory: Path) -> None:
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: expected a new or an empty directory, found files in it")


def synthesize(args: argparse.Namespace) -> int:
    _new(args.directory)
    print(write_checkpoint(args.directory, args.layout, seed=args.seed, tokenizer=args.tokenizer))
    return 0


# ------------------------------------------------------------------------------------------- reading and writing


def _read(inputs: Sequence[str]) -> list[tuple[Any, str]]:
    """(text or JSON row, where it came from) of every text, .txt line, .jsonl row, and line of standard input (-)."""
    rows: list[tuple[Any, str]] = []
    for item in inputs:
        if item == "-":
            text = sys.stdin.read()
        elif item.endswith((".txt", ".jsonl")):
            text = read_text(item)
        else:
            rows.append((item, f"argument {item[:40]!r}"))
            continue
        # Not splitlines: U+2028 and its like are part of a text.
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
            where = f"{'standard input' if item == '-' else item}, line {number}"
            rows.append((parse_json(line, where) if item.endswith(".jsonl") else line, where))
    return rows


def _text(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a text, or an object with a text {field!r}, found {str(row)[:80]}")
    return text


def _write(output: str, name: str, array: NDArray[np.float32], rows: Any) -> None:
    """Rows as .jsonl, or the array of all inputs in their order; whole or not at all. ``-`` is standard output."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output == "-":
        sys.stdout.writelines(lines)
        return
    target = Path(output)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        if target.suffix == ".npy":
            np.save(part, array)
        elif target.suffix == ".safetensors":
            save_file({name: array}, part)
        else:
            with part.open("w", encoding="utf-8") as file:
                file.writelines(lines)
        os.replace(part, target)


def _output(value: str) -> str:
    if value != "-" and not value.endswith(FORMATS):
        raise argparse.ArgumentTypeError(f"expected a name ending in {', '.join(FORMATS)}, or -, found {value!r}")
    if value != "-" and not Path(value).parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected an existing directory, found none at {Path(value).parent}")
    return value


def _open(kind: type[Opened], args: argparse.Namespace) -> Opened:
    names = ("revision", "dtype", "device", "ops", "max_length", "split_special_tokens")
    return kind.from_pretrained(args.model, **{name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3core", description="Qwen3-Embedding and Qwen3-Reranker in plain PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int], text: str, *, name: str = "", model: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name or run.__name__, help=text, description=text)
        sub.set_defaults(run=run)
        if model:
            sub.add_argument("model", metavar="MODEL", help="checkpoint directory or hub id")
            sub.add_argument("--revision", help="branch, tag or commit of the hub id")
        return sub

    def running(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, int8")
        sub.add_argument("--device", help="cpu, cuda, ...; by default the first GPU where there is one")
        sub.add_argument("--ops", default="auto", help="auto, reference, torch, prepacked or triton")
        sub.add_argument("--max-length", type=int, default=MAX_LENGTH, help="tokens per input, template included")

    def working(sub: argparse.ArgumentParser, what: str) -> None:
        sub.add_argument(
            "inputs", nargs="+", metavar="INPUT", help=f"{what}: a text, a .txt or .jsonl file, or - (stdin)"
        )
        sub.add_argument(
            "-o", "--output", type=_output, default="-", help="FILE.jsonl, .npy or .safetensors; - is stdout"
        )
        sub.add_argument("--instruction", help="the task, in one sentence")
        sub.add_argument("--batch-tokens", type=int, help="most tokens in one batch")
        sub.add_argument(
            "--split-special-tokens", action="store_true", help="read <|im_end|> and the like as plain text"
        )
        running(sub)

    command(demo, "embed and rerank a few texts with the small checkpoints that come along, offline", model=False)
    sub = command(embed, "texts to vectors")
    working(sub, "one text per line, or .jsonl rows with 'text'")
    sub.add_argument("--query", action="store_true", help="the texts are queries (implied by --instruction)")
    sub.add_argument("--dim", type=int, help="keep the first components only, then normalise")
    sub = command(rerank, "documents by P(yes) for a query, or scores of pairs")
    working(sub, "one document per line, .jsonl rows with 'text', or without --query rows with 'query' and 'document'")
    sub.add_argument("--query", help="rank the inputs for this query")
    sub.add_argument("--top-k", type=int, help="with --query: only the best")
    sub = command(train, "train on rows of query, response, rejected_response; writes an official-layout checkpoint")
    sub.add_argument("inputs", nargs="+", metavar="DATA", help=".jsonl files; formats in qwen3core/data.py")
    sub.add_argument("-o", "--output", type=Path, required=True, help="directory; the same call resumes there")
    sub.add_argument("--kind", default="auto", choices=("auto", "embedding", "reranker"))
    sub.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank (peft), merged at the end")
    sub.add_argument("--instruction", default=prompts.DEFAULT_TASK, help="of queries that have none of their own")
    sub.add_argument("--max-length", type=int, default=512, help="tokens per input, template included")
    sub.add_argument(
        "--dims", type=int, nargs="+", help="embedding: widths to train (Matryoshka); by default the whole"
    )
    sub.add_argument("--temperature", type=float, default=0.02, help="embedding: of InfoNCE")
    sub.add_argument("--margin", type=float, default=0.1, help="embedding: above the positive, no longer a negative")
    sub.add_argument("--listwise", action="store_true", help="reranker: rank a positive above its own negatives")
    sub.add_argument("--device", help="cpu, cuda, ...; by default the first GPU where there is one")
    sub.add_argument("--ops", default="auto", help="auto, reference, torch, prepacked or triton")
    for field in fields(Options):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            sub.add_argument(flag, action="store_true")
        else:
            sub.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    sub = command(merge, "one checkpoint out of several of the same shape", model=False)
    sub.add_argument("models", nargs="+", metavar="MODEL", help="checkpoint directories or hub ids")
    sub.add_argument("-o", "--output", type=Path, required=True, help="a new directory")
    sub.add_argument("--weights", type=float, nargs="+", help="the share of each; equal by default")
    sub.add_argument("--linear", action="store_true", help="by weighted mean, in place of spherically")
    sub = command(evaluate, "quality on sentence pairs and on a retrieval set", name="eval")
    sub.add_argument("--sts", help="STSbenchmark's csv, or .jsonl rows of sentence1, sentence2, score")
    sub.add_argument("--retrieval", metavar="FOLDER", help="BEIR's corpus.jsonl, queries.jsonl, qrels/test.tsv")
    sub.add_argument("--qrels", help="another file of judgements, BEIR's or TREC's")
    sub.add_argument("--reranker", metavar="MODEL", help="rerank the best 100 of each query as well")
    sub.add_argument("--dims", type=int, nargs="+", help="widths of the vectors; by default the whole")
    sub.add_argument("--split-special-tokens", action="store_true", help="read <|im_end|> and the like as plain text")
    running(sub)
    sub = command(parity, "compare with transformers, layer by layer")
    sub.add_argument("--inputs", nargs="+", default=[], metavar="INPUT", help="texts to compare on, as for embed")
    sub.add_argument("--kind", default="auto", choices=("auto", "embedding", "reranker"))
    running(sub)
    command(inspect, "configuration, tensors and tokenizer self-check")
    sub = command(synthesize, "write a checkpoint with random weights in the official layout", model=False)
    sub.add_argument("directory", type=Path)
    sub.add_argument("--layout", default="Qwen3-Embedding-small", help="e.g. Qwen3-Reranker-0.6B, Qwen3-Embedding-8B")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--tokenizer", type=Path, help="a tokenizer.json; a small one is built otherwise")
    return parser
