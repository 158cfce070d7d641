"""MTEB: the same scores through qwen3core and through sentence-transformers, on mteb's mock tasks and on files."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from conftest import ROOT, SHARED

pytest.importorskip("mteb")
import mteb
from mteb.mocks import MOCK_TASK_REGISTRY, MOCK_TASK_TEST_GRID
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import CrossEncoder, SentenceTransformer

from qwen3core import Embedder, Reranker
from qwen3core.commands import main
from qwen3core.evaluation import Retrieval, measure, read_retrieval, read_sts, rerank, search, sts
from qwen3core.evaluation.mteb import INSTRUCTIONS, MtebEncoder, MtebReranker, main_scores, retrieval_task, sts_task
from qwen3core.prompts import embedding_query
from qwen3core.weights.find import find

QUICK = (
    "BitextMining",
    "Classification",
    "PairClassification",
    "STS",
    "Retrieval",
    "InstructionRetrieval",
    "Reranking",
)


def params(tasks: Any) -> list[Any]:
    """Of mock tasks, by name; QUICK in the quick tests."""
    marks = {task: [] if task.metadata.name[4:].removesuffix("Task") in QUICK else [pytest.mark.slow] for task in tasks}
    return [pytest.param(task, id=task.metadata.name, marks=marks[task]) for task in tasks]


TASKS = params(MOCK_TASK_TEST_GRID)
RERANKED = params([task for task in MOCK_TASK_TEST_GRID if "Reranking" in task.metadata.type])


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", dtype="float32")


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    return SentenceTransformer(str(find("tiny-embedding")), device="cpu", model_kwargs={"dtype": "float32"})


@pytest.fixture(scope="module")
def their_reranker():
    return CrossEncoder(str(find("tiny-reranker")), device="cpu", model_kwargs={"dtype": "float32"})


@pytest.fixture(scope="module")
def held_out():
    """Three queries of the held-out set, and 110 documents, theirs among them."""
    data = read_retrieval(ROOT / "tests" / "data" / "held-out")
    queries = dict(list(data.queries.items())[:3])
    qrels = {query: data.qrels[query] for query in queries}
    relevant = {document for judged in qrels.values() for document in judged}
    others = [document for document in data.corpus if document not in relevant][: 110 - len(relevant)]
    return Retrieval({document: data.corpus[document] for document in [*others, *relevant]}, queries, qrels)


def numbers(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in mteb's nested results, by where it is."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(found, int | float):
        yield path, float(found)


def scores(model: Any, task: Any, **encode_kwargs: Any) -> dict[str, float]:
    """mteb's scores, and its predictions, such as the similarity of each query and document.

    But for those of clusters, which k-means numbers as it finds them: in another order with other last bits.
    """
    options: Any = {"cache": None, "co2_tracker": False, "show_progress_bar": False, "encode_kwargs": encode_kwargs}
    with TemporaryDirectory() as folder:
        found = mteb.evaluate(model, task, prediction_folder=folder, **options).task_results[0].scores
        predictions = [json.loads(path.read_text("utf-8")) for path in Path(folder).rglob("*.json")]
    if "Clustering" in task.metadata.type:
        predictions = []
    for prediction in predictions:
        del prediction["mteb_model_meta"]
    return dict(numbers([found, predictions]))


def assert_equal(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 2
    for name, value in found.items():
        same = math.isnan(value) and math.isnan(expected[name])
        assert same or value == pytest.approx(expected[name], rel=tolerances.MTEB_SCORE, abs=tolerances.MTEB_SCORE), (
            name
        )


def test_both_are_models_to_mteb(embedder, reranker):
    encoder, cross_encoder = MtebEncoder(embedder), MtebReranker(reranker)
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(encoder, CrossEncoderProtocol)
    assert isinstance(cross_encoder, CrossEncoderProtocol)
    assert not isinstance(cross_encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.n_parameters) == ("qwen3core/tiny-embedding", 256, 5_440_768)
    assert cross_encoder.mteb_model_meta.is_cross_encoder
    assert MtebEncoder(embedder, name="a/b", revision="c").mteb_model_meta.revision == "c"


def test_a_snapshot_of_the_hub_has_its_name_and_revision(embedder, monkeypatch, tmp_path):
    monkeypatch.setattr(embedder, "directory", tmp_path / "models--Qwen--Qwen3-Embedding-0.6B" / "snapshots" / "abc")
    meta = MtebEncoder(embedder).mteb_model_meta
    assert (meta.name, meta.revision) == ("Qwen/Qwen3-Embedding-0.6B", "abc")


@pytest.mark.parametrize("task", TASKS)
def test_mock_tasks_as_a_sentence_transformer(task, embedder, theirs):
    """mteb's wrapper around a SentenceTransformer: the checkpoint's own prompts."""
    assert_equal(scores(MtebEncoder(embedder, None), task), scores(theirs, task))


@pytest.mark.parametrize("task", TASKS)
def test_mock_tasks_with_instructions(task, embedder, theirs):
    """mteb's own model of Qwen3-Embedding: an instruction of each task, before all but documents."""
    instructions = {"MockRetrievalTask": "Find it", "MockSTSTask": "Compare"}
    model = InstructSentenceTransformerModel.__new__(InstructSentenceTransformerModel)
    model.model, model.prompts_dict, model.apply_instruction_to_passages = theirs, instructions, False
    model.mteb_model_meta = MtebEncoder(embedder).mteb_model_meta
    model.instruction_template = lambda text, role: "" if role == PromptType.document else embedding_query(text)
    assert_equal(scores(MtebEncoder(embedder, instructions), task), scores(model, task))


@pytest.mark.parametrize("task", RERANKED)
def test_mock_tasks_as_a_cross_encoder(task, reranker, their_reranker):
    assert_equal(
        scores(MtebReranker(reranker, None), task), scores(their_reranker, task, activation_fn=torch.nn.Sigmoid())
    )
    stated = MtebReranker(reranker, {task.metadata.name: "Find it"})
    assert_equal(scores(stated, task), scores(their_reranker, task, prompt="Find it", activation_fn=torch.nn.Sigmoid()))
    assert MtebReranker(reranker).instruction(task.metadata, "query")


@pytest.mark.slow
def test_files_as_through_sentence_transformers(held_out, embedder, theirs, reranker, their_reranker, tmp_path):
    """Retrieval, and the best 100 of each query reranked; and the measures of this package."""
    task = retrieval_task(held_out)
    options: Any = {"cache": None, "co2_tracker": False, "show_progress_bar": False, "prediction_folder": tmp_path}
    expected = mteb.evaluate(theirs, task, **options).task_results[0].get_score()
    again = scores(their_reranker, task.convert_to_reranking(tmp_path, top_k=100))
    found = main_scores(embedder, [retrieval_task(held_out)], None, reranker=reranker)
    assert found["retrieval ndcg_at_10"] == expected
    assert found["reranked retrieval ndcg_at_10"] == again["/0/test/0/ndcg_at_10"]
    run = search(embedder, held_out)
    for name, of in (("retrieval", run), ("reranked retrieval", rerank(reranker, held_out, run))):
        assert abs(found[f"{name} ndcg_at_10"] - measure(held_out, of)["nDCG@10"]) < tolerances.MTEB_ROUNDED


def test_stsbenchmark_as_through_sentence_transformers(embedder, theirs):
    path = SHARED / "data" / "stsbenchmark" / "sts-dev.csv"
    if not path.exists():
        pytest.skip("no STSbenchmark at ../shared/data/stsbenchmark")
    pairs = read_sts(path)[:300]
    found = scores(MtebEncoder(embedder, None), sts_task(pairs))
    assert_equal(found, scores(theirs, sts_task(pairs)))
    assert found["/0/test/0/cosine_spearman"] == pytest.approx(sts(embedder, pairs), abs=tolerances.MTEB_SCORE)


def recorded(prompts: list[str]) -> Any:
    """An embedder that notes what is put before texts."""

    def encode(texts, prompt):
        prompts.append(prompt)
        return np.zeros((len(texts), 2), np.float32)

    return SimpleNamespace(encode=encode, query_prompt=lambda instruction: f"<{instruction}>")


@pytest.mark.parametrize(
    ("name", "query", "document", "neither"),
    [
        ("NFCorpus", *[INSTRUCTIONS["NFCorpus"], "", INSTRUCTIONS["NFCorpus"]]),
        ("ArguAna", *["Given a claim, find documents that refute the claim"] * 3),  # claims find claims
        ("BelebeleRetrieval", *[INSTRUCTIONS["BelebeleRetrieval"], "", INSTRUCTIONS["BelebeleRetrieval"]]),
        ("BSARDRetrieval.v2", *["Retrieve text based on user query.", "", "Retrieve text based on user query."]),
    ],
    ids=["NFCorpus", "ArguAna", "Belebele", "mteb's own"],
)
def test_instructions_of_tasks(name, query, document, neither):
    prompts: list[str] = []
    encoder = MtebEncoder.__new__(MtebEncoder)
    encoder.model, encoder.instructions = recorded(prompts), INSTRUCTIONS
    where: Any = {"task_metadata": mteb.get_task(name).metadata, "hf_split": "test", "hf_subset": "default"}
    for role in (PromptType.query, PromptType.document, None):
        assert encoder.encode([{"text": ["a", "b"]}, {"text": ["c"]}], prompt_type=role, **where).shape == (3, 2)
    assert prompts == [f"<{text}>" if text else "" for text in (query, document, neither)]


def test_similarity_of_rows_is_the_checkpoints(embedder):
    encoder, rows = MtebEncoder(embedder), embedder.encode([f"text {i}" for i in range(130)])
    expected = embedder.similarity(rows, rows[::-1].copy()).diagonal()
    np.testing.assert_allclose(encoder.similarity_pairwise(rows, rows[::-1].copy()), expected, atol=1e-6)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [MOCK_TASK_REGISTRY[name]() for name in tasks])
    (tmp_path / "sts.jsonl").write_text(
        "".join(f'{{"sentence1": "a {i}", "sentence2": "b", "score": {i}}}\n' for i in range(5)), "utf-8"
    )
    arguments = ["--mteb", "MockRetrievalTask", "--sts", str(tmp_path / "sts.jsonl"), "--reranker", "tiny-reranker"]
    assert main(["eval", "tiny-embedding", "--dims", "64", *arguments]) == 0
    [row] = capsys.readouterr().out.splitlines()
    names = ["MockRetrievalTask ndcg_at_10", "reranked MockRetrievalTask ndcg_at_10", "sts cosine_spearman"]
    assert [part.rpartition(" ")[0] for part in row.split("  ")] == ["dim", *names]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mteb"], "expected --sts, --retrieval or --mteb"),
        (["--mteb", "NoSuchTask"], "--mteb: expected tasks of mteb"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    assert main(["eval", "tiny-embedding", *arguments]) == 2
    assert message in capsys.readouterr().err
