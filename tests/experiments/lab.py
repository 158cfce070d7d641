"""What the experiments share: held-out texts, a measure, and two kinds of figures.

A figure is drawn only where it is asked for: ``python tests/experiments/activation_patching.py --figure map.png``.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3core import Embedder
from qwen3core.evaluation import Retrieval, measure, read_retrieval

Pairs = list[tuple[str, str]]


def held_out(queries: int, documents: int) -> Retrieval:
    """The first queries of tests/data/held-out, the document of each, and others up to this number."""
    data = read_retrieval(Path(__file__).parents[1] / "data" / "held-out")
    qrels = dict(list(data.qrels.items())[:queries])
    relevant = [document for judged in qrels.values() for document in judged]
    corpus = {key: data.corpus[key] for key in list(dict.fromkeys([*relevant, *data.corpus]))[:documents]}
    return Retrieval(corpus, {key: data.queries[key] for key in qrels}, qrels)


def right_and_wrong(count: int) -> tuple[Pairs, Pairs]:
    """As many (query, its document), and (query, another one's document), of held-out queries."""
    data = held_out(count, count)
    queries, documents = [*data.queries.values()], [*data.corpus.values()]
    wrong = documents[1:] + documents[:1]
    return list(zip(queries, documents, strict=True)), list(zip(queries, wrong, strict=True))


def ndcg(data: Retrieval, similarity: Tensor) -> float:
    """nDCG@10 of similarities [queries, documents] between the set's texts, in its order."""
    rows = zip(data.queries, similarity.tolist(), strict=True)
    return measure(data, {query: dict(zip(data.corpus, row, strict=True)) for query, row in rows})["nDCG@10"]


def by_three_libraries(folder: str, text: str) -> list[np.ndarray]:
    """The float32 vector of a text, by qwen3core, sentence-transformers and transformers from one folder."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    ours = Embedder.from_pretrained(folder, dtype="float32").encode(text)
    theirs = SentenceTransformer(folder, model_kwargs={"dtype": torch.float32}).encode(text)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder, dtype=torch.float32)(**ids).last_hidden_state[0, -1].detach().numpy()
    return [ours, theirs, hidden / np.linalg.norm(hidden)]


def bars(values: Mapping[str, float], title: str) -> None:
    """Print values by name, and draw them, the first on top."""
    print(title, *(f"{value:8.3f}  {name}" for name, value in values.items()), sep="\n")
    if figure := _figure(0.3 * len(values)):
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()
        _save(axes, title)


def heatmap(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Print each row's largest column, and draw values [rows, columns], white at 0."""
    print(title, *(f"{row!r} {columns[n]!r}" for row, n in zip(rows, values.argmax(1), strict=True)), sep="\n")
    if figure := _figure(0.25 * len(rows)):
        axes, limit = figure.subplots(), float(values.abs().max())
        cmap, lowest = ("RdBu_r", -limit) if values.min() < 0 else ("Reds", 0)
        figure.colorbar(axes.imshow(values.numpy(), cmap=cmap, vmin=lowest, vmax=limit, aspect="auto"))
        axes.set_xticks(range(len(columns)), [repr(column)[1:-1] for column in columns], rotation=90)
        axes.set_yticks(range(len(rows)), [repr(row)[1:-1] for row in rows])
        _save(axes, title)


def _figure(height: float) -> Any:
    """An empty matplotlib figure, where one is asked for."""
    if "--figure" not in sys.argv:
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(8, 1.6 + height), layout="constrained")


def _save(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.figure.savefig(sys.argv[sys.argv.index("--figure") + 1], dpi=80)
