"""Packing: the same text gives the same vector alone, in any batch, whatever is shared or left out."""

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import SAME_TEXT_FP32

from qwen3core import Embedder, InputError, Reranker, capture, model, pack, prefix_cache, pretrained

TEXTS = ["", "a", "Gravity is a force.", "北京", "Brot und Wasser. " * 30, "x = 1\n" * 12, "yes " * 90, "gravity " * 5]


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
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


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
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
    assert (batch.full.max_seqlen_q, batch.indices.tolist()) == (3, [4, 0, 2])
    for empty in ([], [[1], []]):
        with pytest.raises(InputError, match="expected one or more sequences of at least one token"):
            pack(empty)


def rows_of(rows):
    assert isinstance(rows, torch.Tensor)
    return rows.tolist()


def test_shared_prefixes_are_packed_once():
    batch = pack([[1, 2, 3], [7, 8], [1, 2, 4, 5]], prefixes=[(1, 2), (), (1, 2)])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8, 4, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5, 7]
    assert rows_of(batch.full.keys) == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert batch.full.cu_seqlens_k.tolist() == [0, 2, 5, 7, 11]
    assert (batch.full.max_seqlen_q, batch.full.max_seqlen_k, batch.last_token.max_seqlen_q) == (2, 4, 1)
    assert rows_of(batch.last_token.queries) == [2, 4, 6]
    assert rows_of(batch.last_token.keys) == [0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert batch.last_token.cu_seqlens_k.tolist() == [0, 3, 5, 9]


@pytest.mark.parametrize("prefix", [(2,), (1, 2, 3), (1, 2, 3, 4)])
def test_pack_refuses_a_prefix_that_is_not_one(prefix):
    with pytest.raises(InputError, match="pack: sequence 1: expected it to begin with its prefix and continue"):
        pack([[9], [1, 2, 3]], prefixes=[(), prefix])


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
def test_no_shortcut_changes_a_result(embedding_dir, reranker_dir, monkeypatch, ops):
    """Order, equal texts, shared prompts and queries, blocks of rows, the last layer for last tokens only.

    Against a run under capture, in which nothing is left out.
    """
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", ops=ops, device="cpu")
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", ops=ops, device="cpu")
    texts = [*TEXTS, *TEXTS[::-2], "Instruct", ": gravity", "\u0301 merges"]
    pairs = [(q, d) for q in ("what is gravity?", "", "yes") for d in texts] + [("once", "a"), ("only once", "b")]
    with capture(embedder.model, "layers.0.v"), capture(reranker.model, "layers.0.v"):
        vectors, scores = embedder.encode_query(texts), reranker.predict(pairs)
    longest = 600
    for block, batch_tokens, direction in ((10**9, None, 1), (7, None, -1), (50, longest, 1)):
        monkeypatch.setitem(model.ROWS_PER_BLOCK, "cpu", block)
        again = embedder.encode_query(texts[::direction], batch_tokens=batch_tokens)[::direction]
        assert np.abs(again - vectors).max() <= SAME_TEXT_FP32
        again = reranker.predict(pairs[::direction], batch_tokens=batch_tokens)[::direction]
        assert np.abs(again - scores).max() <= SAME_TEXT_FP32


@pytest.fixture
def rows(monkeypatch):
    """Rows of each batch that is computed."""
    found = []

    def spy(*args, **options):
        batch = pack(*args, **options)
        found.append(len(batch.input_ids))
        return batch

    monkeypatch.setattr(pretrained, "pack", spy)
    monkeypatch.setattr(prefix_cache, "pack", spy)
    return found


def test_what_texts_share_is_computed_once(embedding_dir, rows):
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    embedder.encode(["gravity"] * 50)
    assert rows == [len(embedder.tokenizer.embedding(["gravity"], 100)[0])]
    prompt, texts = "a long instruction of many words: ", ["gravity", "gravity gravity", "b"]
    embedder.encode(texts, prompt=prompt)
    apart = sum(map(len, embedder.tokenizer.embedding([prompt + text for text in texts], 1000)))
    [ids] = embedder.tokenizer.encode([prompt])
    assert rows[1] <= apart - 2 * (len(ids) - 1)


def test_what_pairs_share_is_computed_once(reranker_dir, rows):
    reranker = Reranker.from_pretrained(reranker_dir, device="cpu")
    pairs = [("what is gravity? " * 20, d) for d in ("aa", "bb", "cc", "dd")]
    reranker.predict(pairs[0])
    reranker.predict(pairs)
    assert rows[1] < 1.25 * rows[0]
    reranker.predict([(q, "aa") for q in ("one", "two", "three", "four")])  # share the system prompt
    assert rows[2] < 2 * rows[0]


def test_cached_prefixes_change_no_result(embedding_dir, reranker_dir):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu")
    pairs = [(q, d) for q in ("what is gravity?", "yes") for d in TEXTS]
    vectors, scores = embedder.encode_query(TEXTS), reranker.predict(pairs)
    cached: dict[str, Any] = {"dtype": "float32", "device": "cpu", "prefix_cache_tokens": 1000}
    embedder = Embedder.from_pretrained(embedding_dir, **cached)
    reranker = Reranker.from_pretrained(reranker_dir, **cached)
    for _ in range(2):
        assert np.abs(embedder.encode_query(TEXTS) - vectors).max() <= SAME_TEXT_FP32
        assert np.abs(np.stack([embedder.encode_query(text) for text in TEXTS]) - vectors).max() <= SAME_TEXT_FP32
        assert np.abs(reranker.predict(pairs[::-1], batch_tokens=2000)[::-1] - scores).max() <= SAME_TEXT_FP32
    assert len(embedder.prefix_cache) == 1
    assert len(reranker.prefix_cache) == 2


def test_cached_prefixes_are_used_and_bounded(reranker_dir, rows):
    reranker = Reranker.from_pretrained(reranker_dir, device="cpu", prefix_cache_tokens=10_000)
    pairs = [("what is gravity? " * n, d) for n in (1, 2) for d in ("a", "b")]
    reranker.predict(pairs[:2])
    prefix, texts = rows
    reranker.predict(pairs[:2])
    assert rows[2:] == [texts]  # nothing but what is the pairs' own
    assert [len(p) for p in reranker.prefix_cache] == [prefix]
    reranker.prefix_cache.max_tokens = prefix + 50
    reranker.predict(pairs[2:])
    [longer] = map(len, reranker.prefix_cache)  # the older one had to go
    assert prefix < longer <= prefix + 50
    reranker.predict(pairs)  # both do not fit: one is cached, the other is computed in the batch
    assert len(reranker.prefix_cache) == 1
    reranker.prefix_cache.max_tokens = 10
    reranker.predict(pairs)
    assert list(reranker.prefix_cache) == []
