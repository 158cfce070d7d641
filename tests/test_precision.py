"""Stored and compute dtypes on a CPU, int8, and streams."""

import copy
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import INT8_ERROR, SAME_TEXT_FP32

from qwen3core import Embedder, InputError, Reranker, capture, int8, load_model, model, reference, stream
from qwen3core.hooks import by_head
from qwen3core.weights import precision

TEXTS = ["", "a", "Gravity is a force.", "北京", "Brot und Wasser. " * 30, "x = 1\n" * 12]


def weight(pretrained):
    return pretrained.model.layers[0].mlp.gate_proj.weight


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_computes_in_float32_where_a_cpu_has_no_bfloat16(embedding_dir, monkeypatch, has_bfloat16):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_bfloat16)
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    assert embedder.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert weight(embedder).dtype == torch.bfloat16
    assert f"dtype={embedder.dtype}, weights=torch.bfloat16" in repr(embedder)
    exact = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu").encode(TEXTS)
    error = np.abs(embedder.encode(TEXTS) - exact).max()
    assert error > 1e-3 if has_bfloat16 else error <= SAME_TEXT_FP32


def test_an_explicit_dtype_is_used(embedding_dir, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    for dtype in ("bfloat16", "float32", "float64"):
        embedder = Embedder.from_pretrained(embedding_dir, dtype=dtype, device="cpu")
        assert embedder.dtype == weight(embedder).dtype == getattr(torch, dtype)


def test_float16_on_a_cpu_is_bfloat16_with_a_warning(embedding_dir):
    with pytest.warns(UserWarning, match="dtype float16 on a CPU: bfloat16 is used"):
        assert load_model(embedding_dir, dtype="float16", device="cpu").embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [2, 5, 300])
def test_int8_linear_rounds_to_255_steps(rows):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 512, generator=generator) for n in (rows, 96))
    x[0] = 0
    x[-1] *= 1e4  # a row of large values leaves the others their precision
    quantized, scale = reference.int8_rows(w)
    assert (quantized.dtype, quantized.abs().max()) == (torch.int8, 127)
    assert ((quantized * scale[:, None] - w).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()
    exact, found = x.double() @ w.double().T, reference.int8_linear(x, quantized, scale)
    errors = (found - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1)
    assert found.dtype == torch.float32
    assert 1e-4 < errors.max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_of_small_rows_and_of_zeros(dtype):
    """Each number to within half a step, however small its row: 0.008 / 127 is below float16's normal numbers."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(6)[:, None]
    x[2] = 0
    x = x.to(dtype)
    for quantise in (reference.int8_rows, int8.int8_rows):
        quantized, scale = quantise(x)
        assert scale.dtype == torch.float32
        assert (quantized[2] == 0).all()
        assert (quantized[[0, 1, 3, 4, 5]].abs().amax(1) == 127).all()
        assert ((quantized * scale[:, None] - x.float()).abs() <= scale[:, None] / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("rows", [1, 14, 300, 1200])
def test_int8_through_onednn_is_the_references(rows, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 512, generator=generator).to(dtype)
    x[-1] *= 1e4
    x[0, 5] = -100  # the largest number of a row is negative
    x[1:2] = 0
    for expected, found in zip(reference.int8_rows(x), int8.int8_rows(x), strict=True):
        assert torch.equal(expected, found)
    if not int8.has_int8():
        pytest.skip("a CPU without int8")
    weight, scale = reference.int8_rows(torch.randn(96, 512, generator=generator))
    packed = int8.Packed(weight, scale)
    assert torch.equal(packed.weight(), weight)
    torch.testing.assert_close(packed.linear(x), reference.int8_linear(x, weight, scale), rtol=tolerance, atol=0)


@pytest.mark.parametrize("has_int8", [True, False])
def test_int8_sums_do_not_overflow(has_int8, monkeypatch):
    """Rows and weights all at 127, of which oneDNN adds two in 16 bits where the CPU has no instructions for more."""
    if has_int8 and not int8.has_int8():
        pytest.skip("a CPU without int8")
    monkeypatch.setattr(int8, "has_int8", lambda: has_int8)
    linear = model.Linear(64, 16)
    torch.nn.init.ones_(linear.weight)
    model.quantize(linear)
    assert (linear.packed is not None) == has_int8
    torch.testing.assert_close(linear(torch.ones(20, 64)), torch.full((20, 16), 64.0))
    torch.testing.assert_close(linear.dense(), torch.ones(16, 64))


@pytest.mark.parametrize("has_int8", [True, False])
def test_int8_projections_together_are_those_alone(embedding_dir, has_int8, monkeypatch):
    """A hook on a projection, or ops without ``linears``, asks for it alone; copies share what projections share."""
    if has_int8 and not int8.has_int8():
        pytest.skip("a CPU without int8")
    monkeypatch.setattr(int8, "has_int8", lambda: has_int8)
    embedder = Embedder.from_pretrained(embedding_dir, dtype="int8", device="cpu")
    together = embedder.encode(TEXTS)
    embedder.model.ops = dataclasses.replace(embedder.model.ops, linears=None)
    assert np.array_equal(embedder.encode(TEXTS), together)
    attention: Any = copy.deepcopy(embedder).model.layers[0].self_attn
    assert attention.q_proj.packed is attention.v_proj.packed is not attention.o_proj.packed or not has_int8
    z = torch.randn(3, 4, 128)
    stored: Any = load_model(embedding_dir, dtype="float32", device="cpu").layers[0].self_attn
    k_proj = attention.k_proj
    assert ((k_proj.dense() - stored.k_proj.weight).abs() <= k_proj.scale[:, None] * 0.501).all()
    exact = attention.o_proj.dense() @ z.flatten(1).T
    torch.testing.assert_close(by_head(embedder, 0, z).sum(1), exact.T)


def test_int8_embeds_and_reranks(embedding_dir, reranker_dir):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="int8", device="cpu")
    reranker = Reranker.from_pretrained(reranker_dir, dtype="int8", device="cpu")
    computed = torch.bfloat16 if precision.cpu_has_bfloat16() else torch.float32
    assert (embedder.dtype, weight(embedder).dtype) == (computed, torch.int8)
    vectors = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu").encode(TEXTS)
    assert 1e-4 < np.linalg.norm(embedder.encode(TEXTS) - vectors, axis=1).max() < INT8_ERROR
    pairs = [("what?", text) for text in TEXTS]
    scores = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu").predict(pairs)
    assert 1e-5 < np.abs(reranker.predict(pairs) - scores).max() < INT8_ERROR
    with capture(embedder.model, "layers.0.resid_post") as acts:
        embedder.encode(TEXTS)
    assert acts["layers.0.resid_post"].dtype == embedder.dtype


def test_int8_is_for_cpus(embedding_dir):
    with pytest.raises(InputError, match="dtype int8: expected device cpu, found meta"):
        load_model(embedding_dir, dtype="int8", device="meta")


def test_stream_holds_one_block(embedding_dir):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield f"text {i % 7}"

    blocks = stream(embedder.encode_query, endless(), block_size=10, truncate_dim=32)
    first, second = next(blocks), next(blocks)
    assert len(taken) == 20
    assert first.shape == second.shape == (10, 32)
    both = embedder.encode_query([f"text {i % 7}" for i in range(20)], truncate_dim=32)
    assert np.abs(np.concatenate([first, second]) - both).max() <= SAME_TEXT_FP32
    assert list(stream(embedder.encode, [])) == []
    with pytest.raises(InputError, match="block of inputs from 2: input 1: expected text"):
        list(stream(embedder.encode, ["a", "b", "c", 4], block_size=2))


def test_a_failing_text_deep_in_a_corpus_is_named(embedding_dir):
    """Tokenised in blocks, equal texts once: the index is still the caller's."""
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    texts = ["same"] * 3000 + ["gravity " * 9]
    with pytest.raises(InputError, match=r"batch_tokens: .*\(index 3000\), found 12"):
        embedder.encode(texts, batch_tokens=12)
