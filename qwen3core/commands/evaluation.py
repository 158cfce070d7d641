"""What a model achieves: eval."""

import argparse

from .. import evaluation
from ..embedder import Embedder
from ..errors import InputError
from ..reranker import Reranker
from .arguments import Commands, add_command, add_model_options, add_split_special_tokens, open_pretrained, require


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    parser = add_command(commands, "eval", evaluate, "quality on sentence pairs and on a retrieval set")
    parser.add_argument("--sts", help="STSbenchmark's csv, or .jsonl rows of sentence1, sentence2, score")
    parser.add_argument("--retrieval", metavar="FOLDER", help="BEIR's corpus.jsonl, queries.jsonl, qrels/test.tsv")
    parser.add_argument("--qrels", help="another qrels file, BEIR's or TREC's")
    parser.add_argument("--reranker", metavar="MODEL", help="rerank the best 100 of each query as well")
    parser.add_argument("--dims", type=int, nargs="+", help="widths of the vectors; by default the whole")
    add_split_special_tokens(parser)
    add_model_options(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Print a row of measures for each width of the vectors."""
    if not args.sts and not args.retrieval:
        raise InputError("eval: expected --sts or --retrieval, found neither")
    if args.sts:
        require("scipy", "scipy")
    if args.retrieval:
        require("ir-measures", "ir_measures")
    pairs = evaluation.read_sts(args.sts) if args.sts else []
    data = evaluation.read_retrieval(args.retrieval, args.qrels) if args.retrieval else None
    embedder = open_pretrained(Embedder, args)
    reranker = open_pretrained(Reranker, args, model=args.reranker, revision=None) if args.reranker else None
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
