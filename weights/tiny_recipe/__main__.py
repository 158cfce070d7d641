"""How the checkpoints that come with this package were made: one command each, seeded, on a CPU.

    apt-get install wordnet-base; pip install '.[recipe]'
    python -m qwen3core.weights.tiny_recipe tiny-embedding OUT
    python -m qwen3core.weights.tiny_recipe tiny-reranker OUT --embedding TINY-EMBEDDING
    python -m qwen3core.weights.tiny_recipe held-out OUT     # the pairs that both are evaluated on

The embedding learns the vectors that all-MiniLM-L6-v2 gives to WordNet's definitions and examples and to sentences
composed of its words, rotated so that their first components say the most (Matryoshka). The reranker starts from it and
learns which definition an example or a word belongs to, against others that the embedding ranks near; and, on texts of
any kind, to answer as the embedding ranks.
"""

import argparse
import json
import random
from pathlib import Path

from qwen3core.training import Options
from qwen3core.writing import writing_into

from .embedding import tiny_embedding
from .reranker import tiny_reranker
from .wordnet import pairs, read_wordnet


def held_out(out: Path, wordnet: Path, seed: int, queries: int = 2000, documents: int = 4000) -> None:
    """Write BEIR's files of pairs from synsets that no training text comes from, among documents of more of these."""
    chance = random.Random(seed)
    examples = pairs(read_wordnet(wordnet), held_out=True)
    chosen = chance.sample(examples, queries)
    corpus = dict.fromkeys(example.positive for example in [*chosen, *chance.sample(examples, len(examples))])
    number = {text: str(i) for i, text in enumerate(sorted(list(corpus)[:documents]))}
    numbered = ((f"q{i}", example.query) for i, example in enumerate(chosen))
    qrels = (f"q{i}\t{number[example.positive]}\t1\n" for i, example in enumerate(chosen))
    with writing_into(out) as part:
        for name, rows in (("corpus", ((i, text) for text, i in number.items())), ("queries", numbered)):
            lines = (json.dumps({"_id": i, "text": text}) + "\n" for i, text in rows)
            (part / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        (part / "qrels").mkdir()
        (part / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(qrels), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qwen3core.weights.tiny_recipe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", choices=("tiny-embedding", "tiny-reranker", "held-out"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--embedding", type=Path, default=Path(__file__).parents[1] / "tiny-embedding")
    parser.add_argument("--epochs", type=float, help="less, to try")
    args = parser.parse_args()
    if args.checkpoint == "held-out":
        held_out(args.out, args.wordnet, seed=0)
    elif args.checkpoint == "tiny-embedding":
        options = Options(epochs=args.epochs or 1.5, batch_size=128, learning_rate=2e-3, weight_decay=0.01)
        tiny_embedding(args.out, args.wordnet, options)
    else:
        options = Options(epochs=args.epochs or 1, batch_size=16, learning_rate=5e-4, weight_decay=0.01)
        tiny_reranker(args.out, args.wordnet, args.embedding, options)


if __name__ == "__main__":
    main()
