"""Running a model: demo, embed, rerank."""

import argparse

from .. import samples
from ..embedder import Embedder
from ..errors import InputError, check_int
from ..reranker import Reranker, ranked
from .arguments import Commands, add_command, add_model_options, add_split_special_tokens, open_pretrained
from .files import add_inputs, output_name, read_inputs, text_argument, text_of, write


def register(commands: Commands) -> None:
    """Add this group's commands and their arguments."""
    add_command(commands, "demo", demo, "embed and rerank a few texts with small checkpoints, offline", model=False)
    parser = add_command(commands, "embed", embed, "texts to vectors")
    _add_options(parser, "one text per line, or .jsonl rows with 'text'")
    parser.add_argument("--query", action="store_true", help="the texts are queries (implied by --instruction)")
    parser.add_argument("--dim", type=int, help="first components only, normalised after the cut")
    parser = add_command(commands, "rerank", rerank, "documents by P(yes) for a query, or scores of pairs")
    _add_options(
        parser, "one document per line, .jsonl rows with 'text', or without --query rows with 'query' and 'document'"
    )
    parser.add_argument("--query", type=text_argument, help="rank the inputs for this query")
    parser.add_argument("--top-k", type=int, help="with --query: only the best")


def _add_options(parser: argparse.ArgumentParser, what: str) -> None:
    add_inputs(parser, what)
    parser.add_argument(
        "-o", "--output", type=output_name, default="-", help="FILE.jsonl, .npy or .safetensors; - is stdout"
    )
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
