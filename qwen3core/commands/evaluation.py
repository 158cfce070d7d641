"""What a model achieves: eval."""

import argparse
from collections.abc import Sequence
from typing import Any

from .. import evaluation
from ..embedder import Embedder
from ..errors import InputError, check_int
from ..reranker import Reranker
from .arguments import Commands, add_command, add_model_options, add_split_special_tokens, open_pretrained, require


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    parser = add_command(commands, "eval", evaluate, "quality on sentence pairs and on a retrieval set")
    parser.add_argument("--sts", help="STSbenchmark's csv, or .jsonl rows of sentence1, sentence2, score")
    parser.add_argument("--retrieval", metavar="FOLDER", help="BEIR's corpus.jsonl, queries.jsonl, qrels/test.tsv")
    parser.add_argument("--qrels", help="another qrels file, BEIR's or TREC's")
    parser.add_argument("--reranker", metavar="MODEL", help="rerank the best 100 of each query as well")
    about = "leave out the document with the query's own id, as BEIR does (the default)"
    parser.add_argument("--ignore-identical-ids", action=argparse.BooleanOptionalAction, help=about)
    parser.add_argument("--dims", type=int, nargs="+", help="widths of the vectors; by default the whole")
    about = "by mteb: its tasks of these names, with the published results' instructions; and the files, without"
    parser.add_argument("--mteb", metavar="TASK", nargs="*", help=about)
    add_split_special_tokens(parser)
    add_model_options(parser)


def evaluate(args: argparse.Namespace) -> int:
    """Print what a retrieval set holds, and a row of measures for each width of the vectors."""
    if not args.sts and not args.retrieval and not args.mteb:
        raise InputError("eval: expected --sts, --retrieval or --mteb with tasks, found none")
    for name in ("qrels", "reranker", "ignore_identical_ids"):
        if getattr(args, name) is not None and not args.retrieval and not (name == "reranker" and args.mteb):
            raise InputError(f"eval: expected --retrieval with --{name.replace('_', '-')}, found none")
    if args.mteb is not None:
        require("mteb", "mteb")
        from ..evaluation import mteb

        tasks = mteb.tasks_named(args.mteb)
    else:
        for given, package, module in ((args.sts, "scipy", "scipy"), (args.retrieval, "ir-measures", "ir_measures")):
            if given:
                require(package, module)
    pairs = evaluation.read_sts(args.sts) if args.sts else []
    data = evaluation.read_retrieval(args.retrieval, args.qrels) if args.retrieval else None
    embedder = open_pretrained(Embedder, args)
    reranker = open_pretrained(Reranker, args, model=args.reranker, revision=None, job=None) if args.reranker else None
    layout = embedder.layout
    width = layout.width(embedder.model.config.hidden_size)
    for dim in args.dims or ():
        check_int("--dims", dim, 1, width)
    ignore = args.ignore_identical_ids is not False
    if data:
        own = sum(query in data.corpus for query in data.queries) if ignore else 0
        print(*(f"{name} {n}" for name, n in (data.counts() | {"own ids left out": own}).items()), sep="  ", flush=True)
    for dim in args.dims or [layout.truncate_dim or width]:
        if args.mteb is None:
            row = _measures(embedder, pairs, data, reranker, dim, ignore)
        else:  # files with the checkpoint's own prompts, as without mteb
            files: list[Any] = [mteb.sts_task(pairs)] if pairs else []
            files += [mteb.retrieval_task(data, ignore_identical_ids=ignore)] if data else []
            row = mteb.main_scores(embedder, tasks, reranker=reranker, dim=dim)
            row |= mteb.main_scores(embedder, files, None, reranker=reranker, dim=dim)
        print(f"dim {dim}", *(f"{name} {value:.4f}" for name, value in row.items()), sep="  ", flush=True)
    return 0


def _measures(
    embedder: Embedder,
    pairs: Sequence[evaluation.Pair],
    data: evaluation.Retrieval | None,
    reranker: Reranker | None,
    dim: int,
    ignore_identical_ids: bool,
) -> dict[str, float]:
    """Of vectors cut to ``dim``; of the reranker, on the best 100 of each query."""
    row: dict[str, float] = {}
    if pairs:
        row["spearman"] = evaluation.sts(embedder, pairs, dim=dim)
    if data:
        run = evaluation.search(embedder, data, dim=dim, ignore_identical_ids=ignore_identical_ids)
        row |= evaluation.measure(data, run)
        if reranker:
            again = evaluation.measure(data, evaluation.rerank(reranker, data, run))
            row |= {f"reranked {name}": value for name, value in again.items()}
    return row
