"""Running a model: demo, embed, rerank."""

import argparse
import os
import re
from collections.abc import Callable

import torch

from .. import corpora, samples
from ..embedder import Embedder
from ..errors import InputError, check_int
from ..reranker import Reranker, ranked
from .arguments import (
    Commands,
    add_command,
    add_model_options,
    add_split_special_tokens,
    model_options,
    open_pretrained,
    require,
)
from .files import add_inputs, is_folder, output_name, output_name_or_folder, read_inputs, text_argument, text_of, write


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    add_command(commands, "demo", demo, "embed and rerank a few texts with small checkpoints, offline", model=False)
    parser = add_command(commands, "embed", embed, "texts to vectors; to a folder, of any number of texts")
    _add_options(
        parser,
        "one text per line, or rows with 'text', and for a folder 'id'",
        output_name_or_folder,
        "FILE.jsonl, .npy or .safetensors; - is stdout; FOLDER/: shards of Parquet, and after a kill, the call goes on",
    )
    parser.add_argument("--query", action="store_true", help="the texts are queries (implied by --instruction)")
    parser.add_argument("--dim", type=int, help="first components only, normalised after the cut")
    parser.add_argument("--rows-per-shard", type=int, help=f"for a folder, default {corpora.ROWS_PER_SHARD}")
    about = "for a folder: the K-th of N processes, from 1; env: by RANK and WORLD_SIZE, or Slurm's variables"
    parser.add_argument("--shard", type=shard_argument, metavar="K/N", help=about)
    parser = add_command(commands, "rerank", rerank, "documents by P(yes) for a query, or scores of pairs")
    _add_options(
        parser,
        "one document per line, rows with 'text', or without --query rows with 'query' and 'document'",
        output_name,
        "FILE.jsonl, .npy or .safetensors; - is stdout",
    )
    parser.add_argument("--query", type=text_argument, help="rank the inputs for this query")
    parser.add_argument("--top-k", type=int, help="with --query: only the best")


def _add_options(parser: argparse.ArgumentParser, what: str, output: Callable[[str], str], about: str) -> None:
    add_inputs(parser, what)
    parser.add_argument("-o", "--output", type=output, default="-", help=about)
    parser.add_argument("--instruction", type=text_argument, help="the task, in one sentence")
    parser.add_argument("--batch-tokens", type=int, help="most tokens in one batch")
    add_split_special_tokens(parser)
    add_model_options(parser)


def demo(args: argparse.Namespace) -> int:
    """Rank a few documents by the two shipped checkpoints, offline."""
    query, documents = samples.DEMO_QUERY, samples.DEMO_DOCUMENTS
    embedder = Embedder.from_pretrained("tiny-embedding", device="cpu")
    reranker = Reranker.from_pretrained("tiny-reranker", device="cpu")
    cosines = embedder.similarity(embedder.encode_query(query), embedder.encode_document(documents))[0]
    print(f"{len(documents)} documents, ranked for the query: {query}\n")
    print("P(yes)  cosine  document")
    for hit in reranker.rank(query, documents, return_documents=True):
        print(f" {hit['score']:.3f}  {cosines[hit['corpus_id']]:+.3f}  {hit['text']}")
    print("\nThese are the two small checkpoints that come with the package; English words and short sentences only.")
    print("For more: qwen3core rerank Qwen/Qwen3-Reranker-0.6B --query QUERY FILE   (downloads 1.2 GB)")
    return 0


def embed(args: argparse.Namespace) -> int:
    """Write the vector of every text."""
    if is_folder(args.output):
        return _embed_corpus(args)
    for name in ("rows_per_shard", "shard"):
        if getattr(args, name) is not None:
            raise InputError(f"{name}: expected with an output that is a folder alone, found {args.output}")
    texts = [text_of(row, "text", where) for row, where in read_inputs(args.inputs, args.text)]
    embedder = open_pretrained(Embedder, args)
    if args.query or args.instruction is not None:
        vectors = embedder.encode_query(
            texts, instruction=args.instruction, truncate_dim=args.dim, batch_tokens=args.batch_tokens
        )
    else:
        vectors = embedder.encode_document(texts, truncate_dim=args.dim, batch_tokens=args.batch_tokens)
    rows = ({"text": text, "embedding": vector.tolist()} for text, vector in zip(texts, vectors, strict=True))
    write(args.output, "embeddings", vectors, rows)
    return 0


def _embed_corpus(args: argparse.Namespace) -> int:
    """Write the vectors to shards in a folder, those that are not there yet, and say how many there are."""
    require("pyarrow", "pyarrow")
    if args.text or not args.inputs:
        found = f"--text {args.text[0]!r}" if args.text else "no INPUT"
        raise InputError(f"{args.output}: expected files or URLs for an output that is a folder, found {found}")
    if args.shard and torch.cuda.is_available() and args.device is None:
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0
        torch.cuda.set_device(int(local))
    options = model_options(args)
    options["ops"] = None if args.ops == "auto" else args.ops
    stage = corpora.Embed(
        **options, query=args.query, instruction=args.instruction, dim=args.dim, batch_tokens=args.batch_tokens
    )
    given = {name: value for name in ("rows_per_shard", "shard") if (value := getattr(args, name)) is not None}
    done = corpora.embed_corpus(stage, args.inputs, args.output, **given)
    print("{shards} of {of} shards, {texts} texts; {written} of the shards were written now".format(**done))
    return 0


def shard_argument(value: str) -> tuple[int, int]:
    """(k, n) of ``k/n``, or of the environment, as argparse's ``type``."""
    found = value
    if value == "env":
        names = ("RANK", "WORLD_SIZE") if "RANK" in os.environ else ("SLURM_PROCID", "SLURM_NTASKS")
        rank, size = (os.environ.get(name, "") for name in names)
        found = f"{int(rank) + 1}/{size}" if rank.isdecimal() else f"{' and '.join(names)} {rank}/{size}"
    numbers = re.fullmatch(r"(\d+)/(\d+)", found)
    k, n = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, or env, found {found!r}")
    return k, n


def rerank(args: argparse.Namespace) -> int:
    """Write P(yes) of every document, ranked for one query, or of every pair, in order."""
    if args.top_k is not None:
        check_int("top_k", args.top_k, 0)
        if args.query is None or not args.output.endswith(("-", ".jsonl")):
            raise InputError("top_k: expected with --query and an output of rows (.jsonl or -) alone")
    pairs = []
    for row, where in read_inputs(args.inputs, args.text):
        if args.query is not None:
            pairs.append((args.query, text_of(row, "text", where)))
        elif isinstance(row, dict):
            pairs.append((text_of(row, "query", where), text_of(row, "document", where)))
        else:
            raise InputError(f"{where}: expected --query, or .jsonl rows with query and document, found text")
    reranker = open_pretrained(Reranker, args)
    scores = reranker.predict(pairs, instruction=args.instruction, batch_tokens=args.batch_tokens)
    labels = reranker.layout.labels
    if len(labels) > 1 and (args.query is not None or args.output.endswith(("-", ".jsonl"))):
        raise InputError(f"rerank: expected a single score, or pairs and -o FILE.npy, found {', '.join(labels)}")
    order = ranked(scores, args.top_k) if args.query is not None else range(len(pairs))
    hits = (
        {"corpus_id": i, "score": float(scores[i]), "query": query, "text": text}
        for i in order
        for query, text in [pairs[i]]
    )
    write(args.output, "scores", scores, hits)
    return 0
