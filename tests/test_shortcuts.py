"""Shortcuts ask first: what is left out, shared or cached holds for any ops, change, thread and copy."""

import copy
import dataclasses
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import SAME_TEXT_FP32, SCORE_FP32

from qwen3core import Embedder, InputError, Ops, Reranker, capture, pack, reference
from qwen3core.model import MLP
from qwen3core.ops import OPERATIONS
from qwen3core.prefix_cache import PrefixCache
from qwen3core.reference import allows, declare

TEXTS = ["gravity", "a", "Brot und Wasser. " * 9, "gravity", "x = 1\n" * 40]
PAIRS = [(query, text) for query in ("what is gravity?", "Brot") for text in TEXTS]


def mixing_rows(op):
    """The operation with a little of every other row in each."""
    return lambda x, *args: op(x + 0.5 * x.mean(0, keepdim=True), *args)


def both_ways(q, k, v, cu_seqlens_q, cu_seqlens_k, *_):
    """Attention without a causal mask."""
    out = []
    for rows_q, rows_k in reference.sequences(cu_seqlens_q, cu_seqlens_k):
        x, y, z = (t[rows].transpose(0, 1) for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        out.append(torch.nn.functional.scaled_dot_product_attention(x, y, z, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def mean_pool(hidden_states, cu_seqlens, dim, normalize):
    parts = hidden_states.float().split(cu_seqlens.diff().tolist())
    pooled = torch.stack([part.mean(0) for part in parts])[:, :dim]
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


BREAKING = {name: mixing_rows(getattr(reference, name)) for name in OPERATIONS if name not in ("attention", "pool")}
BREAKING |= {"attention": both_ways, "pool": mean_pool}


def swapped(ops: Ops, name: str, function: Any) -> Ops:
    changes: dict[str, Any] = {name: function}
    return dataclasses.replace(ops, **changes)


@pytest.fixture(scope="module")
def opened(embedding_dir, reranker_dir):
    """Both jobs, and a function that runs each: vectors of queries and of documents, or scores."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu")
    return {
        "embedder": (embedder.model, lambda: np.stack([embedder.encode_query(TEXTS), embedder.encode_document(TEXTS)])),
        "reranker": (reranker.model, lambda: reranker.predict(PAIRS, batch_tokens=700)),
    }


@pytest.mark.parametrize("job", ["embedder", "reranker"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_op_gives_what_it_gives_without_shortcuts(opened, monkeypatch, job, name):
    """Each op swapped for one that breaks what the shortcuts assume, against capture, in which nothing is left out."""
    model, run = opened[job]
    monkeypatch.setattr(model, "ops", swapped(Ops.torch(), name, BREAKING[name]))
    with capture(model, "pooled"):
        right = run()
    assert np.abs(run() - right).max() <= SAME_TEXT_FP32
    # The same function with a false declaration is wrong, or this test would prove nothing.
    lying = declare(**dataclasses.asdict(allows(getattr(reference, name))))(lambda *args: BREAKING[name](*args))
    monkeypatch.setattr(model, "ops", swapped(Ops.torch(), name, lying))
    assert np.abs(run() - right).max() > 1e-3


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_unknown_function_declares_nothing(name):
    """A wrapper of a declared function is another function, even where it copies its attributes."""
    whole, function = Ops.torch(), getattr(Ops.torch(), name)
    assert whole.shortcuts
    assert whole.row_wise
    ops = swapped(whole, name, lambda *args: function(*args))
    assert not ops.shortcuts
    assert ops.row_wise == (name in ("attention", "pool"))
    assert swapped(ops, name, function).shortcuts


def test_prefixes_packed_by_hand_need_ops_that_allow_them(opened):
    model, _ = opened["embedder"]
    batch = pack([[1, 2, 3], [1, 2, 4]], prefixes=[(1, 2), (1, 2)])
    whole, ops = model.ops, dataclasses.replace(model.ops, attention=both_ways)
    try:
        model.ops = ops
        with pytest.raises(InputError, match=r"pack: prefixes: expected ops and modules that .* found Ops"):
            model.embed(batch)
    finally:
        model.ops = whole


def scale_v(model):
    """In place; k_norm would undo a change of k_proj's scale."""
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight *= 1.5


def other_layer(model):
    model.layers[1] = model.layers[2]


def other_weights(model):
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    weights["layers.0.self_attn.v_proj.weight"] *= 1.5
    model.load_state_dict(weights)


def assigned_weights(model):
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    weights["layers.0.mlp.up_proj.weight"] *= 1.5
    model.load_state_dict(weights, assign=True)


def other_op(model):
    half = declare(row_wise=True)(lambda gate, up: 0.5 * reference.swiglu(gate, up))
    model.ops = dataclasses.replace(model.ops, swiglu=half)


@pytest.mark.parametrize("change", [scale_v, other_layer, other_weights, assigned_weights, other_op])
def test_a_cached_prefix_holds_only_for_what_made_it(embedding_dir, change):
    cached, plain = (
        Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", prefix_cache_tokens=n) for n in (500, 0)
    )
    before = cached.encode_query(TEXTS)
    assert len(cached.prefix_cache) == 1
    for embedder in (cached, plain):
        change(embedder.model)
    changed = plain.encode_query(TEXTS)
    assert np.abs(changed - before).max() > 1e-3
    for _ in range(2):  # computed anew, then cached again
        assert np.abs(cached.encode_query(TEXTS) - changed).max() <= SAME_TEXT_FP32
        assert len(cached.prefix_cache) == 1


def test_threads_share_a_prefix_cache(opened, monkeypatch):
    """Eight threads, switched as often as Python can, over a cache that must evict at almost every call."""
    model, _ = opened["embedder"]
    monkeypatch.setattr(model, "keys_values", lambda batch: [tuple(batch.input_ids.tolist())])
    cache = PrefixCache(max_tokens=12)
    prefixes = [tuple(range(n, n + 4)) for n in range(6)]

    def use(seed):
        chance = random.Random(seed)
        for _ in range(150):
            wanted = chance.sample(prefixes, 2)
            assert cache.get(wanted, model) == {prefix: [prefix] for prefix in wanted}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(use, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert sum(map(len, cache)) <= 12


def test_threads_share_an_embedder(embedding_dir):
    """Each call gives what it gives alone, with a cache for two of three prompts."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", prefix_cache_tokens=60)
    calls = [(f"Instruct: {task}\nQuery:", texts) for task in ("one", "two", "three") for texts in (TEXTS, TEXTS[::-1])]
    alone = [embedder.encode(texts, prompt=prompt) for prompt, texts in calls]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda call: embedder.encode(call[1], prompt=call[0]), calls * 4))
    for found, right in zip(together, alone * 4, strict=True):
        assert np.abs(found - right).max() <= SAME_TEXT_FP32


OPTIONS: list[dict[str, Any]] = [
    {"max_length": 150},
    {"split_special_tokens": True},
    {"prefix_cache_tokens": 300},
    {"dtype": "float32"},
    {"dtype": "int8"},
    {"ops": "reference"},
    {"ops": "prepacked"},
]


@pytest.mark.filterwarnings("ignore:.*(longer than max_length|contain special tokens)")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_settings_survive_copies(embedding_dir, reranker_dir, options, copied):
    texts = [*TEXTS, "ends<|im_end|>here"]
    kinds: list[tuple[Any, Any]] = [(Embedder, embedding_dir), (Reranker, reranker_dir)]
    for kind, directory in kinds:
        opened = kind.from_pretrained(directory, device="cpu", **options)
        again = copied(opened)

        def run(x):
            return x.encode(texts) if isinstance(x, Embedder) else x.predict([("gravity", text) for text in texts])

        assert repr(again) == repr(opened)
        assert again.tokenizer.encode(texts) == opened.tokenizer.encode(texts)
        assert again.prefix_cache.max_tokens == opened.prefix_cache.max_tokens
        assert again.model.ops == opened.model.ops
        assert np.abs(run(again) - run(opened)).max() <= SAME_TEXT_FP32


class Mixing(torch.nn.Module):
    """In place of a layer or a part of one: a little of every other row in each."""

    def forward(self, x):
        return x + 0.5 * x.mean(0, keepdim=True)


class OwnMLP(MLP):
    """Called as ours is."""

    def forward(self, x, context):
        return super().forward(Mixing()(x), context)


def own_projection(model):
    linear = model.layers[1].mlp.down_proj
    model.layers[1].mlp.down_proj = own = copy.deepcopy(linear)
    own.__class__ = type("Own", (type(linear),), {"forward": lambda self, x, op: op(Mixing()(x), self.weight)})


MODULES = {
    "layer": lambda m: m.layers.__setitem__(2, Mixing()),
    "mlp": lambda m: setattr(m.layers[2], "mlp", Mixing()),
    "mlp, a class of ours": lambda m: setattr(m.layers[2], "mlp", OwnMLP(m.config)),
    "attention": lambda m: setattr(m.layers[2], "self_attn", Mixing()),
    "input_layernorm": lambda m: setattr(m.layers[3], "input_layernorm", Mixing()),
    "post_attention_layernorm": lambda m: setattr(m.layers[3], "post_attention_layernorm", Mixing()),
    "q_norm": lambda m: setattr(m.layers[3].self_attn, "q_norm", Mixing()),
    "norm": lambda m: setattr(m, "norm", Mixing()),
    "projection": own_projection,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_ones_own_gives_what_it_gives_without_shortcuts(embedding_dir, name):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", prefix_cache_tokens=99)
    before = embedder.encode_query(TEXTS)
    assert embedder.model.shortcuts
    torch.manual_seed(0)
    MODULES[name](embedder.model)
    assert not embedder.model.shortcuts
    with capture(embedder, "pooled"):
        right = embedder.encode_query(TEXTS)
    changed = embedder.encode_query(TEXTS)
    assert np.abs(changed - right).max() <= SAME_TEXT_FP32
    assert np.abs(changed - before).max() > 1e-3
    batch = pack([[1, 2, 3], [1, 2, 4]], prefixes=[(1, 2), (1, 2)])
    with pytest.raises(InputError, match="expected ops and modules that declare what sharing takes, found modules of"):
        embedder.model.embed(batch)


def test_a_projection_of_ones_own_has_all_rows_at_once(embedding_dir):
    model = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu").model
    seen = []
    for own in (False, True):
        linear: Any = model.get_submodule("layers.1.self_attn.q_proj")
        if own:
            linear.__class__ = type("Own", (type(linear),), {})
        with torch.no_grad():
            handle = linear.register_forward_hook(lambda module, args, out: seen.append(len(out)))
            model(pack([[1, 2, 3] * 400]))
            handle.remove()
    assert seen == [640, 560, 1200]


@pytest.mark.parametrize("place", ["layer", "mlp"])
def test_a_declared_module_has_shortcuts_and_a_lie_shows(embedding_dir, place):
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", prefix_cache_tokens=99)
    for own in (torch.nn.Tanh, Mixing):
        module = declare(row_wise=True)(type("Declared", (own,), {}))()
        if place == "layer":
            embedder.model.layers[1] = module
        else:
            embedder.model.layers[1].mlp = module
        assert embedder.model.shortcuts
        with capture(embedder, "pooled"):
            right = embedder.encode_query(TEXTS)
        difference = np.abs(embedder.encode_query(TEXTS) - right).max()
        assert len(embedder.prefix_cache) == 1
        assert difference > 1e-3 if own is Mixing else difference <= SAME_TEXT_FP32


@pytest.mark.parametrize("name", ["post_attention_layernorm", "q_norm", "norm"])
def test_fused_operations_do_not_pass_over_a_norm_of_ones_own(embedding_dir, name):
    model = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu").model
    MODULES[name](model)
    right = model.embed(pack([[1, 2, 3]]))
    model.ops = Ops.triton()
    assert (model.embed(pack([[1, 2, 3]])) - right).abs().max() <= SAME_TEXT_FP32


def test_fewer_layers(embedding_dir, reranker_dir):
    """Left out by assignment, everywhere: the vector is that of the layer's stream, normed; scores and caches, too."""
    kinds: list[tuple[Any, Any]] = [(Embedder, embedding_dir), (Reranker, reranker_dir)]
    for kind, directory in kinds:
        opened = kind.from_pretrained(directory, dtype="float32", device="cpu", prefix_cache_tokens=300)
        run = opened.encode_query if kind is Embedder else opened.predict
        inputs: Any = TEXTS if kind is Embedder else PAIRS
        with capture(opened, "layers.1.resid_post", stop_at="layers.1.resid_post") as acts:
            run(inputs)
        before = run(inputs)  # fills the cache
        opened.model.layers = opened.model.layers[:2]
        found = run(inputs)
        assert len(opened.prefix_cache) >= 1
        assert np.abs(found - before).max() > 1e-3
        model = opened.model
        last = torch.stack([x[-1] for x in acts.per_text("layers.1.resid_post")])
        with torch.no_grad():
            vectors = model.norm(last, model.ops.rms_norm)
            if kind is Embedder:
                expected = torch.nn.functional.normalize(vectors, dim=-1)
            else:
                expected = (vectors @ model.score_weight(opened.answers)[0]).sigmoid()
        assert np.abs(found - expected.numpy()).max() <= SCORE_FP32
        with pytest.raises(InputError, match=r"with i in 0\.\.1"), capture(opened, "layers.2.z"):
            pass
        assert "weights=torch.bfloat16" in repr(opened) or "weights=torch.float32" in repr(opened)


def test_adapters_in_training_have_shortcuts(embedding_dir):
    """peft's modules in place of ours: they are row-wise, and nothing is left out that a result needs."""
    pytest.importorskip("peft")
    from qwen3core.training.lora import add_lora

    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    add_lora(embedder.model, 4)
    with torch.no_grad():
        for name, parameter in embedder.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert embedder.model.shortcuts
    with capture(embedder, "pooled"):
        right = embedder.encode_query(TEXTS)
    assert np.abs(embedder.encode_query(TEXTS) - right).max() <= SAME_TEXT_FP32
