"""save: what was changed in memory opens again, here and in the other libraries, or is refused by name."""

import dataclasses
import json

import layouts
import numpy as np
import pytest
import torch
from checkpoint_files import tiny
from safetensors.torch import load_file
from tolerances import EMBEDDING_FP32, SAME_TEXT_FP32, SCORE_FP32

from qwen3core import Embedder, InputError, Ops, Reranker
from qwen3core.model import MLP, Linear
from qwen3core.weights.find import INDEX

TEXTS = ["Gravity is a force.", "a", "北京是中国的首都。" * 9]
PAIRS = [("gravity", "a force"), ("bread", "flour and water, salt and time")]


def resized(linear, rows=None, columns=None):
    new = Linear(columns or linear.in_features, rows or linear.out_features)
    new.weight.data = linear.weight.data[:rows, :columns].contiguous()
    return new


def fewer_layers(model):
    model.layers = model.layers[:2]


def more_layers(model):
    model.layers.append(model.layers[1])


def another_order(model):
    model.layers = torch.nn.ModuleList(reversed(model.layers))


def narrower_mlps(model):
    for layer in model.layers:
        mlp, size = layer.mlp, 96
        mlp.gate_proj, mlp.up_proj = resized(mlp.gate_proj, size), resized(mlp.up_proj, size)
        mlp.down_proj = resized(mlp.down_proj, columns=size)


def fewer_heads(model):
    """One key head and its two query heads, of two and four."""
    for layer in model.layers:
        attention, size = layer.self_attn, layer.self_attn.head_dim
        attention.q_proj = resized(attention.q_proj, 2 * size)
        attention.k_proj, attention.v_proj = resized(attention.k_proj, size), resized(attention.v_proj, size)
        attention.o_proj = resized(attention.o_proj, columns=2 * size)


def other_weights(model):
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight *= 1.5


CHANGES = [fewer_layers, more_layers, another_order, narrower_mlps, fewer_heads, other_weights]
NUMBERS = {
    "fewer_layers": {"num_hidden_layers": 2},
    "more_layers": {"num_hidden_layers": 5},
    "narrower_mlps": {"intermediate_size": 96},
    "fewer_heads": {"num_attention_heads": 2, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory, embedding_dir, reranker_dir):
    """Float32 checkpoints, and one in three files, by job."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for job, source in (("embedding", embedding_dir), ("reranker", reranker_dir)):
        kind = Embedder if job == "embedding" else Reranker
        opened = kind.from_pretrained(source, device="cpu")
        opened.save(root / job)
        found[job] = root / job
    return found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("job", ["embedding", "reranker"])
def test_what_is_saved_opens_again_everywhere(directories, tmp_path, job, change):
    kind, inputs = (Embedder, TEXTS) if job == "embedding" else (Reranker, PAIRS)
    opened = kind.from_pretrained(directories[job], dtype="float32", device="cpu")
    run = lambda x: x.encode(inputs) if job == "embedding" else x.predict(inputs)  # noqa: E731
    before = run(opened)
    change(opened.model)
    # In the checkpoint's dtype, which the weights are rounded to.
    for parameter in opened.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    changed = run(opened)
    assert np.abs(changed - before).max() > 1e-3
    opened.save(tmp_path / "out")
    again = kind.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    assert np.abs(run(again) - changed).max() <= SAME_TEXT_FP32
    config, source = (json.loads((d / "config.json").read_text("utf-8")) for d in (tmp_path / "out", directories[job]))
    assert {name: config[name] for name in config if config[name] != source.get(name)} == NUMBERS.get(
        change.__name__, {}
    )
    library = pytest.importorskip("sentence_transformers")
    if job == "embedding":
        theirs = library.SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": "float32"})
        assert np.abs(theirs.encode(inputs, batch_size=1) - changed).max() <= EMBEDDING_FP32
        model = pytest.importorskip("transformers").AutoModel.from_pretrained(tmp_path / "out", dtype="float32")
        ids = opened.tokenizer.embedding([TEXTS[0]], 99)
        with torch.no_grad():
            last = torch.nn.functional.normalize(model(torch.tensor(ids)).last_hidden_state[0, -1], dim=0)
        assert np.abs(last.numpy() - changed[0]).max() <= EMBEDDING_FP32
    else:
        theirs = library.CrossEncoder(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": "float32"})
        scores = theirs.predict(inputs, batch_size=1, activation_fn=torch.nn.Sigmoid())
        assert np.abs(scores - changed).max() <= SCORE_FP32


@pytest.mark.parametrize("change", [fewer_layers, more_layers])
def test_in_several_files(tmp_path, change):
    """The index names what is there; a file that holds nothing any more is not written."""
    from qwen3core.weights.synthesize import LAYOUTS, synthesize

    layout = dataclasses.replace(LAYOUTS["Qwen3-Embedding-small"], shards=4)
    embedder = Embedder.from_pretrained(synthesize(tmp_path / "source", layout), device="cpu")
    change(embedder.model)
    expected = embedder.encode(TEXTS)
    embedder.save(tmp_path / "out")
    assert (Embedder.from_pretrained(tmp_path / "out", device="cpu").encode(TEXTS) == expected).all()
    index = json.loads((tmp_path / "out" / INDEX).read_text("utf-8"))["weight_map"]
    assert set(index.values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert len(model.layers) == len(embedder.model.layers)


def test_unchanged_is_equal(embedding_dir, tmp_path):
    Embedder.from_pretrained(embedding_dir, device="cpu").save(tmp_path / "out")
    for path in embedding_dir.rglob("*"):
        copy = tmp_path / "out" / path.relative_to(embedding_dir)
        if path.suffix == ".safetensors":  # whose header has an order
            tensors, expected = load_file(copy), load_file(path)
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        elif path.is_file():
            assert path.read_bytes() == copy.read_bytes(), path


def test_unchanged_in_several_files_has_the_index_that_it_had(tmp_path):
    source = tiny(tmp_path / "source", shards=2)
    Embedder.from_pretrained(source, device="cpu").save(tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (source / INDEX).read_bytes()


def test_prompts_are_saved(embedding_dir, tmp_path):
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    embedder.prompts["mine"] = "Mine: "
    embedder.default_prompt_name = "mine"
    embedder.save(tmp_path / "out")
    again = Embedder.from_pretrained(tmp_path / "out", device="cpu")
    assert again.prompts == embedder.prompts
    assert (again.encode(TEXTS) == embedder.encode(TEXTS)).all()
    assert not (again.encode(TEXTS) == again.encode(TEXTS, prompt="")).all()


def own_mlp(model):
    model.layers[1].mlp = torch.nn.Identity()


def own_class(model):
    model.layers[1].mlp.__class__ = type("OwnMLP", (MLP,), {})


def one_narrower(model):
    model.layers[2].mlp.up_proj = resized(model.layers[2].mlp.up_proj, 96)


def no_layers(model):
    model.layers = model.layers[:0]


def own_norm(model):
    model.norm = torch.nn.LayerNorm(64)


REFUSED = [
    (own_mlp, r"save: layers\.1\.mlp: expected the decoder's own module, found Identity"),
    (own_class, r"save: layers\.1\.mlp: expected the decoder's own module, found OwnMLP"),
    (own_norm, r"save: norm: expected the decoder's own module, found LayerNorm"),
    (
        one_narrower,
        r"save: layers\.2\.mlp\.up_proj\.weight: expected shape \[160, 64\] as in layer 0, found \[96, 64\]",
    ),
    (no_layers, r"save: layers: expected at least one, found none"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_the_layout_cannot_hold_is_refused(embedding_dir, tmp_path, change, message):
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    change(embedder.model)
    with pytest.raises(InputError, match=message):
        embedder.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_adapters_and_the_source_itself_are_refused(embedding_dir, bases, tmp_path):
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu", dtype="int8")
    with pytest.raises(InputError, match=r"save: layers\.0\.\S+: expected floating-point weights, found torch\.int8"):
        embedder.save(tmp_path / "out")
    with pytest.raises(InputError, match="expected a directory other than the source's"):
        embedder.save(embedding_dir)
    adapted = layouts.copy(bases["embedding"], tmp_path / "adapted")
    layouts.adapter(adapted, bases["embedding"])
    with pytest.raises(InputError, match="merge the adapter first"):
        Embedder.from_pretrained(adapted, device="cpu").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_swapped_operations_are_not_saved_and_a_warning_says_so(embedding_dir, tmp_path):
    embedder = Embedder.from_pretrained(embedding_dir, device="cpu")
    embedder.model.ops = dataclasses.replace(Ops.torch(), swiglu=lambda gate, up: gate * up)
    with pytest.warns(UserWarning, match="save: ops: swiglu: swapped operations are not saved"):
        embedder.save(tmp_path / "out")


def test_a_checkpoint_of_one_layer_and_two_files(tmp_path):
    source = tiny(tmp_path / "source", shards=2)
    embedder = Embedder.from_pretrained(source, device="cpu")
    embedder.model.layers.append(embedder.model.layers[0])
    embedder.save(tmp_path / "out")
    assert len(Embedder.from_pretrained(tmp_path / "out", device="cpu").model.layers) == 2
