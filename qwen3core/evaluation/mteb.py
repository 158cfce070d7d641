"""MTEB 2: an ``Embedder`` or a ``Reranker`` as a model of ``mteb.evaluate``, and evaluation sets as tasks of its.

For mteb 2.26 (``pip install mteb``), which this file imports and nothing imports before it is asked for::

    mteb.evaluate(MtebEncoder(embedder), mteb.get_tasks(["STSBenchmark"]), cache=None)
    mteb.evaluate(MtebReranker(reranker), task.convert_to_reranking(folder, top_k=100), cache=None)

mteb's cache knows a checkpoint by name and revision, which a directory of one's own has not: ``cache=None`` there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.abstask import AbsTask, get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from torch import Tensor

from ..embedder import Embedder, Vectors
from ..errors import InputError
from ..pretrained import Pretrained
from ..reranker import Reranker, Scores
from .files import Pair, Retrieval

Batches = Iterable[Mapping[str, Any]]
"""Of mteb's DataLoader: texts under ``text``."""

Instructions = Mapping[str, str | Mapping[str, str]]
"""By name of a task, its instruction; or those of its ``query`` and ``document`` (``passage``), where both have one."""

INSTRUCTIONS: Instructions = json.loads(Path(__file__).with_name("task_prompts.json").read_text("utf-8"))
"""Those of the published results: evaluation/task_prompts.json of github.com/QwenLM/Qwen3-Embedding (Apache-2.0)."""

TOP = 100
"""How many documents of each query are reranked, as in the published results."""


class _Model:
    """What both kinds of model have in common.

    Args:
        opened: the checkpoint.
        instructions: what mteb says itself holds for tasks that are not in it; None: the checkpoint's own prompts.
        overwrites: fields of mteb's ``ModelMeta``, such as name and revision.
    """

    def __init__(self, opened: Any, instructions: Instructions | None = INSTRUCTIONS, **overwrites: Any) -> None:
        self.model, self.instructions = opened, instructions
        fields = {**_meta(opened), "use_instructions": instructions is not None, **overwrites}
        self.mteb_model_meta = ModelMeta.create_empty(fields)

    def instruction(self, task: TaskMetadata, role: str) -> str:
        """A task's instruction for the role query or document; empty where it has none."""
        stated = (self.instructions or {}).get(task.name) or task.prompt or get_abstask_prompt(task.name)
        if isinstance(stated, str):
            return "" if role == "document" else stated
        names = ("document", "passage") if role == "document" else ("query",)
        return next((stated[name] for name in names if name in stated), "")


class MtebEncoder(_Model):
    """mteb's ``EncoderProtocol``; batches are bounded in tokens (``encode_kwargs={"batch_tokens": n}``)."""

    model: Embedder

    def encode(
        self, inputs: Batches, *, task_metadata: TaskMetadata, prompt_type: Any = None, **options: Any
    ) -> Vectors:
        """Vectors [n, dim] float32 of mteb's batches of texts.

        prompt_type: query, document, or None where a task does not tell them apart; its instruction then precedes all.
        options: those of ``Embedder.encode``, and mteb's.
        """
        texts, options = _texts(inputs), _ours(options)
        role = prompt_type.value if prompt_type else None
        if self.instructions is None:
            if role is None:
                return self.model.encode(texts, **options)
            return (self.model.encode_document if role == "document" else self.model.encode_query)(texts, **options)
        instruction = self.instruction(task_metadata, role or "query")
        return self.model.encode(texts, prompt=self.model.query_prompt(instruction) if instruction else "", **options)

    def similarity(self, embeddings1: Vectors | Tensor, embeddings2: Vectors | Tensor) -> Tensor:
        """The checkpoint's, of every pair of rows."""
        return self.model.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Vectors | Tensor, embeddings2: Vectors | Tensor) -> Tensor:
        """The checkpoint's, of rows of the same number."""
        return self.model.similarity_pairwise(embeddings1, embeddings2)


class MtebReranker(_Model):
    """mteb's ``CrossEncoderProtocol``, for tasks that bring documents with each query."""

    model: Reranker

    def predict(self, inputs1: Batches, inputs2: Batches, *, task_metadata: TaskMetadata, **options: Any) -> Scores:
        """P(yes) [n] float32 of mteb's batches of queries and of documents; options: those of ``Reranker.predict``."""
        pairs = list(zip(_texts(inputs1), _texts(inputs2), strict=True))
        instruction = None if self.instructions is None else self.instruction(task_metadata, "query") or None
        return self.model.predict(pairs, instruction=instruction, **_ours(options))


def _ours(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those of mteb's that say nothing here."""
    return {
        name: x for name, x in options.items() if name not in ("hf_split", "hf_subset", "batch_size", "prompt_type")
    }


def _texts(batches: Batches) -> list[str]:
    """Of documents with their title before them, of queries with their own instruction behind, as mteb joins them."""
    return [text for batch in batches for text in batch["text"]]


def _meta(opened: Pretrained) -> dict[str, Any]:
    """Fields of ``ModelMeta``. A snapshot in the hub's cache has the repository's name and revision."""
    directory, layout = opened.directory.resolve(), opened.layout
    name, revision = f"qwen3core/{directory.name}", None
    if directory.parent.name == "snapshots":
        name = directory.parents[1].name.removeprefix("models--").replace("--", "/")
        revision = directory.name
    fields: dict[str, Any] = {
        "name": name,
        "revision": revision,
        "n_parameters": sum(weight.numel() for weight in opened.model.parameters()),
        "n_embedding_parameters": opened.model.embed_tokens.weight.numel(),
        "max_tokens": opened.max_length,
        "open_weights": True,
        "framework": ["PyTorch", "safetensors"],
    }
    if isinstance(opened, Reranker):
        return fields | {"model_type": ["cross-encoder"]}
    similarity = next((known for known in ScoringFunction if known.value == layout.similarity), None)
    width = layout.width(opened.model.config.hidden_size)
    return fields | {"model_type": ["dense"], "embed_dim": width, "similarity_fn_name": similarity}


def sts_task(pairs: Sequence[Pair], name: str = "sts") -> AbsTaskSTS:
    """Pairs of sentences as a task of mteb's."""
    columns = dict(zip(("sentence1", "sentence2", "score"), zip(*pairs, strict=True), strict=True))

    class Task(AbsTaskSTS):
        metadata = _task_metadata(name, "STS", "cosine_spearman")

        def load_data(self, *args: Any, **options: Any) -> None:
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(columns)), True

    return Task()


def retrieval_task(data: Retrieval, name: str = "retrieval", *, ignore_identical_ids: bool = True) -> AbsTaskRetrieval:
    """A corpus, queries and qrels as a task of mteb's; ignore_identical_ids as in ``search``."""
    ignore = ignore_identical_ids
    texts = {
        part: [{"id": key, "text": text} for key, text in rows.items()]
        for part, rows in (("corpus", data.corpus), ("queries", data.queries))
    }

    class Task(AbsTaskRetrieval):
        metadata = _task_metadata(name, "Retrieval", "ndcg_at_10")
        ignore_identical_ids = ignore

        def load_data(self, *args: Any, **options: Any) -> None:
            split: Any = {part: Dataset.from_list(rows) for part, rows in texts.items()}
            split |= {"relevant_docs": data.qrels, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Task()


def _task_metadata(name: str, kind: Any, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="Files of one's own",
        dataset={"path": "local", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        category="t2t",
        modalities=["text"],
    )


def tasks_named(names: Sequence[str]) -> list[AbsTask]:
    """mteb's own tasks. Raises InputError for a name that it has not."""
    try:
        return list(mteb.get_tasks(tasks=list(names))) if names else []
    except KeyError as error:
        raise InputError(f"--mteb: expected tasks of mteb {mteb.__version__}, found one that is not: {error}") from None


def main_scores(
    embedder: Embedder,
    tasks: Iterable[AbsTask],
    instructions: Instructions | None = INSTRUCTIONS,
    *,
    reranker: Reranker | None = None,
    dim: int | None = None,
) -> dict[str, float]:
    """The main score of each task, by its name and the score's; nothing is read from mteb's cache nor written to it.

    reranker: also gives the score of retrieval and reranking tasks once their documents, of retrieval the best 100 of
    each query, are in its order. dim: the first components of vectors, as in ``search``.
    """
    scores: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for task in tasks:
            name = f"{task.metadata.name} {task.metadata.main_score}"
            encoder = MtebEncoder(embedder, instructions)
            scores[name] = _run(encoder, task, prediction_folder=folder, encode_kwargs={"truncate_dim": dim})
            if reranker and isinstance(task, AbsTaskRetrieval):
                if "Reranking" not in task.metadata.type:
                    task = task.convert_to_reranking(folder, top_k=TOP)
                scores[f"reranked {name}"] = _run(MtebReranker(reranker, instructions), task)
    return scores


def _run(model: Any, task: AbsTask, **options: Any) -> float:
    results = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False, **options)
    return float(results.task_results[0].get_score())
