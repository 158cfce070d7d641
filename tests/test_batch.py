"""Packing and planning: the same text gives the same vector alone, in any batch, in any order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import SAME_TEXT_FP32

from qwen3core import Embedder, InputError, Reranker, pack
from qwen3core.batch import plan

TEXTS = ["", "a", "Gravity is a force.", "北京", "Brot und Wasser. " * 30, "x = 1\n" * 12, "yes " * 90, "gravity " * 5]


@pytest.mark.parametrize("ops", ["reference", "torch"])
def test_same_text_same_vector(embedding_dir, ops):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", ops=ops, device="cpu")
    alone = np.stack([embedder.encode(text) for text in TEXTS])
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    longest = max(len(ids) for ids in embedder.tokenizer.embedding(TEXTS, 8192))
    for order in (np.arange(len(TEXTS)), np.arange(len(TEXTS))[::-1], shuffled):
        for batch_tokens in (None, longest, longest + 40):
            together = embedder.encode([TEXTS[i] for i in order], batch_tokens=batch_tokens)
            assert np.abs(together - alone[order]).max() <= SAME_TEXT_FP32
    twice = embedder.encode([*TEXTS, *TEXTS])
    assert np.abs(twice[: len(TEXTS)] - twice[len(TEXTS) :]).max() <= SAME_TEXT_FP32


@pytest.mark.parametrize("ops", ["reference", "torch"])
def test_same_pair_same_score(reranker_dir, ops):
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", ops=ops, device="cpu")
    pairs = [("what is gravity?", text) for text in TEXTS]
    alone = np.array([reranker.predict(pair) for pair in pairs])
    assert np.abs(reranker.predict(pairs) - alone).max() <= SAME_TEXT_FP32
    assert np.abs(reranker.predict(pairs[::-1], batch_tokens=500)[::-1] - alone).max() <= SAME_TEXT_FP32


def test_pack():
    batch = pack([[5, 6, 7], [8], [9, 10]], indices=[4, 0, 2])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert (batch.input_ids.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert (batch.max_seqlen, batch.indices) == (3, (4, 0, 2))
    for empty in ([], [[1], []]):
        with pytest.raises(InputError, match="expected one or more sequences of at least one token"):
            pack(empty)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 120))
@settings(derandomize=True, deadline=None)
def test_plan_covers_all_within_budget_longest_first(lengths, budget):
    groups = plan(lengths, budget)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= budget for group in groups)
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)


def test_plan_defaults_and_errors():
    assert plan([], 1) == []
    assert plan([9000, 10], None) == [[0], [1]]
    assert plan([4000, 4000], None) == [[0, 1]]
    with pytest.raises(InputError, match=r"batch_tokens: expected at least 7, .*\(index 1\), found 6"):
        plan([3, 7], 6)
