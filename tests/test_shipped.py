"""The checkpoints that come along: their size, what they understand, and that every way to run them ranks as well."""

import pytest
import tolerances
from conftest import BFLOAT16, ROOT, SHARED

from qwen3core import Embedder, Reranker, evaluation
from qwen3core.config import Qwen3Config
from qwen3core.weights.find import SHIPPED, find
from qwen3core.weights.layout import read_layout

HELD_OUT = ROOT / "tests" / "data" / "held-out"


@pytest.fixture(scope="module")
def held_out():
    return evaluation.read_retrieval(HELD_OUT)


@pytest.fixture(scope="module")
def sts_dev():
    path = SHARED / "data" / "stsbenchmark" / "sts-dev.csv"
    if not path.exists():
        pytest.skip(f"STSbenchmark's sts-dev is not at ../{path.relative_to(ROOT.parent)}")
    return evaluation.read_sts(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_size_layout_and_provenance(name):
    folder = find(name)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12e6
    assert Qwen3Config.from_file(folder / "config.json").dtype == "bfloat16"
    assert read_layout(folder).job == name.removeprefix("tiny-")
    card = (folder / "README.md").read_text("utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in card
    assert f"python -m qwen3core.weights.tiny_recipe {name}" in card


WAYS = [("float32", "torch"), ("float32", "reference"), ("int8", "torch")]
if BFLOAT16:
    WAYS.append(("bfloat16", "torch"))


@pytest.mark.slow
def test_every_way_of_running_embeds_as_well(held_out):
    pytest.importorskip("ir_measures")
    found = {}
    for dtype, ops in WAYS:
        run = evaluation.search(
            Embedder.from_pretrained("tiny-embedding", dtype=dtype, ops=ops, device="cpu"), held_out
        )
        found[dtype, ops] = evaluation.measure(held_out, run)["nDCG@10"]
    assert min(found.values()) > 0.45
    assert max(found.values()) - min(found.values()) <= tolerances.QUALITY, found


@pytest.mark.slow
def test_reranking_helps_in_every_way_of_running(held_out):
    pytest.importorskip("ir_measures")
    queries = list(held_out.queries)[:500]
    data = evaluation.Retrieval(
        held_out.corpus,
        {query: held_out.queries[query] for query in queries},
        {query: held_out.qrels[query] for query in queries},
    )
    run = evaluation.search(Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu"), data, top=10)
    found = {}
    for dtype, ops in WAYS:
        reranker = Reranker.from_pretrained("tiny-reranker", dtype=dtype, ops=ops, device="cpu")
        found[dtype, ops] = evaluation.measure(data, evaluation.rerank(reranker, data, run))["nDCG@10"]
    assert min(found.values()) > evaluation.measure(data, run)["nDCG@10"] + 0.02
    assert max(found.values()) - min(found.values()) <= tolerances.QUALITY, found


@pytest.mark.slow
def test_sentence_pairs_at_every_width(sts_dev):
    pytest.importorskip("scipy")
    embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu")
    found = [evaluation.sts(embedder, sts_dev, dim=dim) for dim in (256, 128, 64)]
    assert found[0] > 0.70, found
    assert min(found) > found[0] - 0.03, found
