"""Several devices: two processes on the CPU give what one gives."""

import warnings

import numpy as np
import pytest
import tolerances

from qwen3core import Embedder, InputError, Reranker, capture
from qwen3core.pool import Pool

TEXTS = [f"text number {i} " * (i % 5 + 1) for i in range(40)]
PAIRS = [("a number", text) for text in TEXTS]


@pytest.fixture(scope="module")
def embedder():
    """With a prompt and a layer less than the checkpoint: the processes have it as it is, not as its files are."""
    embedder = Embedder.from_pretrained("tiny-embedding", max_length=60)
    embedder.model.layers = embedder.model.layers[:3]
    embedder.prompts["mine"] = "Find: "
    return embedder


@pytest.fixture(scope="module")
def pool(embedder):
    pool = embedder.start_multi_process_pool(["cpu", "cpu"])
    yield pool
    embedder.stop_multi_process_pool(pool)


def test_two_processes_give_the_vectors_of_one(embedder, pool):
    for options in ({}, {"prompt_name": "mine", "truncate_dim": 40}, {"normalize_embeddings": False}):
        found, expected = embedder.encode(TEXTS, pool=pool, **options), embedder.encode(TEXTS, **options)
        assert found.dtype == expected.dtype
        scale = np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(found / scale, expected / scale, atol=tolerances.SAME_TEXT_FP32)
    found = embedder.encode_query(TEXTS, pool=pool, convert_to_tensor=True, chunk_size=7)
    np.testing.assert_allclose(found, embedder.encode_query(TEXTS), atol=tolerances.SAME_TEXT_FP32)
    bits = [embedder.encode(TEXTS, precision="ubinary", **options) for options in ({"pool": pool}, {})]
    assert np.unpackbits(bits[0] ^ bits[1]).mean() < 1e-3  # signs of numbers that are almost 0
    rows = embedder.encode(TEXTS, pool=pool, convert_to_numpy=False)
    assert [row.shape for row in rows] == [(256,)] * len(TEXTS)
    assert len({process.pid for process in pool.executor._processes.values()}) == 2


def test_what_is_single_or_empty(embedder, pool):
    np.testing.assert_array_equal(embedder.encode("one", pool=pool), embedder.encode("one"))
    assert embedder.encode([], pool=pool).shape == (0, 256)
    assert embedder.encode(iter(TEXTS[:3]), pool=pool).shape == (3, 256)


def test_a_list_of_devices_and_a_reranker():
    reranker = Reranker.from_pretrained("tiny-reranker")
    found = reranker.predict(pairs=PAIRS, device=["cpu"])
    np.testing.assert_allclose(found, reranker.predict(PAIRS), atol=tolerances.SAME_TEXT_FP32)
    assert reranker.predict(PAIRS[0], device=["cpu"]) == reranker.predict(PAIRS[0])


def test_messages_come_back(embedder, pool):
    with pytest.raises(InputError, match="block of inputs from 2: input 1: expected text"):
        embedder.encode(["a", "b", "c", 4], pool=pool, chunk_size=2)
    with pytest.warns(UserWarning, match="2 of 2"):
        embedder.encode(["long " * 60, "longer " * 60, "short", "shorter"], pool=pool, chunk_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert embedder.encode(TEXTS[:4], pool=pool).shape == (4, 256)  # the pool goes on


def test_what_is_refused(embedder, pool):
    with pytest.raises(InputError, match="target_devices: expected one or more"):
        Pool(embedder, [])
    with pytest.raises(InputError, match="target_devices: expected devices of torch, found 'gpu'"):
        embedder.start_multi_process_pool(["gpu"])
    with pytest.raises(InputError, match="chunk_size: expected an integer of at least 1, found 0"):
        embedder.encode(TEXTS, pool=pool, chunk_size=0)
    with pytest.raises(InputError, match="grad: expected none with several devices"):
        embedder.encode(TEXTS, pool=pool, grad=True)
    with pytest.raises(InputError, match="chunk_size: expected none without pool"):
        embedder.encode(TEXTS, chunk_size=2)
    for options in ({"pool": pool}, {"device": ["cpu"]}):
        with pytest.raises(InputError, match="output_value: expected 'sentence_embedding' of several devices"):
            embedder.encode(TEXTS, output_value="token_embeddings", **options)
    with pytest.raises(InputError, match="expected no capture or edit active"), capture(embedder, "embed"):
        embedder.encode(TEXTS, pool=pool)
