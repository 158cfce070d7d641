"""Numbers that are none: a result with inf or nan raises, naming the text and the first point that has them."""

import re

import pytest
import torch

from qwen3core import Embedder, InputError, Reranker, edit, stream
from qwen3core.ops import Ops
from qwen3core.parity import _row

TEXTS = ["rain fell", "a violin", "gravity"]


@pytest.fixture
def embedder():
    return Embedder.from_pretrained("tiny-embedding", device="cpu", dtype="float32")


def raises(*parts):
    return pytest.raises(InputError, match=".*".join(map(re.escape, parts)))


@torch.no_grad()
def test_one_infinite_weight_names_the_first_point(embedder):
    embedder.model.layers[2].mlp.down_proj.weight[3, 5] = torch.inf
    with raises("input 0 (it ends in 'rain fell')", "first in layers.2.mlp_out (float32)"):
        embedder.encode(TEXTS)
    assert not embedder.model.hooks


@torch.no_grad()
def test_the_text_is_named_and_the_block_of_a_stream(embedder):
    token = embedder.tokenizer.encode(["a violin"])[0][-1]
    embedder.model.embed_tokens.weight[token] = torch.nan
    with raises("input 1 (it ends in 'a violin')", "first in embed (float32)"):
        embedder.encode(TEXTS)
    with raises("block of inputs from 1: input 0 (it ends in 'a violin')"):
        list(stream(embedder.encode, TEXTS, block_size=1))


def test_an_edit_to_nan_is_named(embedder):
    with edit(embedder.model, {"layers.1.attn_out": lambda x: x / 0}), raises("input 0", "first in layers.1.attn_out"):
        embedder.encode(TEXTS)
    embedder.encode(TEXTS)


@pytest.mark.parametrize(
    ("alone", "where"), [(False, "first after the layers"), (True, "none when it is computed alone")]
)
def test_what_the_points_do_not_show(embedder, monkeypatch, alone, where):
    compute = embedder.compute
    monkeypatch.setattr(
        embedder, "compute", lambda b, **kw: compute(b, **kw) * (1 if alone and len(b.indices) == 1 else torch.nan)
    )
    with raises("input 0", where):
        embedder.encode(TEXTS)


@torch.no_grad()
def test_float16_names_its_largest_number(embedder):
    embedder.model.ops = Ops.reference()
    embedder.model.half()
    for name in ("up_proj", "down_proj"):
        embedder.model.layers[1].mlp.get_parameter(f"{name}.weight").mul_(1e4).clamp_(-6e4, 6e4)
    with raises("first in layers.1.mlp_", "(float16, whose largest number is 65504)"):
        embedder.encode("a")


@pytest.mark.parametrize("what", ["weight", "model.norm.weight"])
def test_a_sigmoid_hides_nothing(what):
    reranker = Reranker.from_pretrained("tiny-reranker", device="cpu", dtype="float32")
    weight: torch.Tensor = reranker.model.norm.weight
    if what == "weight":
        reranker.model.lm_head = torch.nn.Linear(256, reranker.model.embed_tokens.num_embeddings, bias=False)
        weight = reranker.model.lm_head.weight[reranker.answers[0]]
    with torch.no_grad():
        weight[7] = torch.inf
    with raises(f"{what}: expected finite numbers, found inf or nan"):
        reranker.rank("a musical instrument", TEXTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", range(3), ids=["transformers", "ours", "float64"])
@pytest.mark.parametrize("int8", [False, True])
def test_parity_is_not_ok_where_a_number_is_none(dtype, bad, whose, int8):
    tensors = [torch.ones(2, 8) for _ in range(3)]
    tensors[whose][1, 3] = bad
    assert not _row("final_norm", dtype, int8, *tensors).ok
