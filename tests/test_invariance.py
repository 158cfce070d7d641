"""``Ops.batch_invariant``: a text's bits do not depend on what shares its batch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import BFLOAT16
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.backends import mkldnn

from qwen3core import Embedder, Reranker, ops_torch
from qwen3core.batch import build_cu_seqlens

pytestmark = pytest.mark.skipif(not mkldnn.is_available(), reason="torch without oneDNN")
PROMPTS = ("", "Instruct: find what is true, and say where it was found\nQuery:")
words = st.sampled_from(["gravity", "violin", "rain", "北京", "bread", "which?", "sixty-four", "the", "of"])
text = st.integers(0, 90).flatmap(lambda n: st.lists(words, min_size=n, max_size=n)).map(" ".join)
several = st.lists(text, min_size=1, max_size=8)


def examples(dtype, count):
    """Fewer where the CPU emulates bfloat16."""
    emulated = dtype == "bfloat16" and not BFLOAT16
    return settings(
        max_examples=count // 4 if emulated else count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def opened(kind, name, dtype, **options):
    return kind.from_pretrained(name, dtype=dtype, device="cpu", ops="batch_invariant", **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors(dtype, threads):
    """Alone, together, in another order, with other neighbours, in small batches, after a prompt, from a cache."""
    plain = opened(Embedder, "tiny-embedding", dtype)
    cached = opened(Embedder, "tiny-embedding", dtype, prefix_cache_tokens=200)

    @examples(dtype, 8)
    @given(several, several, st.sampled_from(PROMPTS), st.randoms(use_true_random=False), st.integers(500, 3000))
    def check(texts, others, prompt, chance, batch_tokens):
        alone = {t: plain.encode(t, prompt=prompt) for t in texts}
        mixed = [*texts, *others, texts[0]]
        chance.shuffle(mixed)
        for embedder in (plain, cached, cached):
            for options in ({}, {"batch_tokens": batch_tokens}):
                for t, vector in zip(mixed, embedder.encode(mixed, prompt=prompt, **options), strict=True):
                    if t in alone:
                        np.testing.assert_array_equal(vector, alone[t])

    check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores(dtype, threads):
    plain = opened(Reranker, "tiny-reranker", dtype)
    cached = opened(Reranker, "tiny-reranker", dtype, prefix_cache_tokens=500)

    @examples(dtype, 5)
    @given(several, text, st.randoms(use_true_random=False))
    def check(documents, query, chance):
        pairs = [*((query, d) for d in documents), ("another", documents[0])]
        alone = {pair: plain.predict(pair) for pair in pairs}
        mixed = [*pairs, pairs[0]]
        chance.shuffle(mixed)
        for reranker in (plain, cached, cached):
            for pair, score in zip(mixed, reranker.predict(mixed), strict=True):
                assert score == alone[pair]

    check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_texts(dtype):
    """More rows than are computed at a time, beside short ones."""
    embedder = opened(Embedder, "tiny-embedding", dtype)
    texts = ["the violin " * 700, "rain fell " * 300, "bread"]
    for t, vector in zip(texts, embedder.encode(texts), strict=True):
        np.testing.assert_array_equal(vector, embedder.encode(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_attention_in_blocks_is_the_same_whoever_queries(dtype):
    """All rows of a text, those after a prefix, its last one; beside others or alone."""
    lengths = [5, 63, 64, 65, 65, 130, 200]
    q, k, v = (torch.randn(sum(lengths), heads, 64).to(dtype) for heads in (4, 2, 2))
    cu_seqlens = build_cu_seqlens(lengths)
    whole = ops_torch.blocked_attention(q, k, v, cu_seqlens, cu_seqlens, 200, 200)
    for start, end in pairwise(cu_seqlens.tolist()):
        length = end - start
        for first in {0, 3, length // 2, length - 1}:
            cu_q, cu_k = build_cu_seqlens([length - first]), build_cu_seqlens([length])
            part = ops_torch.blocked_attention(q[start + first : end], k[start:end], v[start:end], cu_q, cu_k, 200, 200)
            assert torch.equal(part, whole[start + first : end])


@torch.no_grad()
def test_kernels():
    """Each sequence has its own programs and its own order of tiles."""
    pytest.importorskip("triton")
    from qwen3core.kernels import attention, launch, pooling, qk_norm_rope, rms_norm

    device = "cpu" if launch.INTERPRETED else "cuda"
    if not launch.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and Triton was imported without TRITON_INTERPRET=1")
    lengths = [5, 64, 130]
    q, k, v = (torch.randn(sum(lengths), heads, 64, device=device) for heads in (4, 2, 2))
    x, weight = torch.randn(sum(lengths), 96, device=device), torch.rand(96, device=device)
    cos, sin = torch.randn(2, sum(lengths), 64, device=device)

    def computed(rows, lengths):
        cu_seqlens = build_cu_seqlens(lengths).to(device)
        heads = qk_norm_rope.qk_norm_rope(q[rows], k[rows], weight[:64], weight[32:], 1e-6, cos[rows], sin[rows])
        z = attention.attention(*heads, v[rows], cu_seqlens, cu_seqlens, max(lengths), max(lengths))
        pooled = pooling.norm_pool(x[rows], weight, 1e-6, cu_seqlens, 96, True)
        return z, rms_norm.rms_norm(x[rows], weight, 1e-6), pooled

    z, normed, pooled = computed(slice(None), lengths)
    for n, (start, end) in enumerate(pairwise(build_cu_seqlens(lengths).tolist())):
        alone = computed(slice(start, end), [end - start])
        for one, whole in zip(alone, (z[start:end], normed[start:end], pooled[n : n + 1]), strict=True):
            assert torch.equal(one, whole)
