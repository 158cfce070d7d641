"""tiny-reranker: tiny-embedding, trained on to tell which definition belongs and to answer as the embedding ranks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F

from qwen3core.embedder import Embedder
from qwen3core.reranker import Reranker
from qwen3core.tokenizer import Tokenizer
from qwen3core.training import Example, Options, Task, reranking_task, train
from qwen3core.training.files import digest

from ..synthesize import Layout, synthesize
from ..tensors import rewrite
from .embedding import CONFIG, SENTENCES
from .wordnet import pairs, read_wordnet, texts

PAIRS, TEXTS = 8_000, 5_000
"""What the reranker learns from: queries with their definition, and texts with others like them."""


def tiny_reranker(out: Path, wordnet: Path, embedding: Path, options: Options) -> None:
    """Train the checkpoint from that of ``embedding`` and write it to ``out``."""
    embedder = Embedder.from_pretrained(embedding, dtype="float32")
    words = read_wordnet(wordnet)
    chance = random.Random(options.seed)
    known = pairs(words, held_out=False)
    documents = list(dict.fromkeys(example.positive for example in known))
    exact = with_negatives(chance.sample(known, PAIRS), documents, embedder, chance)
    some = chance.sample(texts(words, wordnet, options.seed, SENTENCES), 5 * TEXTS)
    alike = with_negatives([Example(text, text) for text in some[:TEXTS]], some[TEXTS:], embedder, chance)

    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(embedding / "tokenizer.json").backend
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # a reranker appends no EOS
    backend.save(str(work / "tokenizer.json"))
    start = synthesize(work / "start", Layout(CONFIG, "reranker"), seed=options.seed, tokenizer=work / "tokenizer.json")
    reranker = Reranker.from_pretrained(start, dtype="float32")
    reranker.model.load_state_dict(embedder.model.state_dict())
    reranker.model.requires_grad_()
    task = graded_task([*exact, *alike], reranker.tokenizer)
    train(reranker.model, task, options, work, write=lambda: rewrite(start, out, reranker.model.get_parameter))


@dataclass(frozen=True)
class Graded:
    """A query and documents with how relevant each is, from 0 to 1."""

    query: str
    documents: list[str]
    grades: list[float]


def with_negatives(
    examples: Sequence[Example], documents: list[str], embedder: Embedder, chance: random.Random
) -> list[Graded]:
    """Each example's query with eight documents: some that the embedding ranks near it, some further off, some random.

    The positive is right and the others wrong; where it is the query itself, it is left out, and how relevant a
    document is goes by the embedding: not at all at a cosine of 0.15, wholly at 0.65.
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
        texts, grades = [documents[n] for n in chosen], [0.0] * len(chosen)
        if alike:
            grades = ((cosines[chosen] - 0.15) / 0.5).clamp(0, 1).tolist()
        else:
            texts, grades = [example.positive, *texts], [1.0, *grades]
        if len(texts) == 8:
            found.append(Graded(example.query, texts, grades))
    return found


def graded_task(examples: Sequence[Graded], tokenizer: Tokenizer) -> Task:
    """The task of answering yes as far as a document is relevant (pointwise), and more to a better one (listwise)."""
    pointwise = [Example(e.query, e.documents[0], tuple(e.documents[1:])) for e in examples]
    task = reranking_task(pointwise, tokenizer)
    grades = torch.tensor([e.grades for e in examples])

    def batch(indices: list[int]) -> tuple[list[list[int]], list[tuple[int, ...]], Tensor]:
        sequences, prefixes, groups = task.batch(indices)
        rows = torch.cat([groups.positive[:, None], groups.negative.view(len(indices), -1)], dim=1)
        return sequences, prefixes, torch.stack([rows, grades[indices]])

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        rows, right = logits[wanted[0].long()], wanted[1]
        listwise = F.cross_entropy(rows, (right / 0.1).softmax(1))
        return listwise + F.binary_cross_entropy_with_logits(rows, right)

    identity = task.identity | {"loss": "graded", "grades": digest([grades])}
    return replace(task, batch=batch, loss=loss, identity=identity)
