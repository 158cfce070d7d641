"""capture and edit: equal to transformers' hidden states, exact when they change nothing, gone when they end."""

import pytest
import torch
from tolerances import HIDDEN_FP32, REORDERED_FP32

from qwen3core import Embedder, InputError, Reranker, capture, edit, pack, reference
from qwen3core.hooks import POINTS

TEXTS = ["Gravity is a force.", "a", "北京是中国的首都。" * 9, "Explain gravity"]


@pytest.fixture(scope="module")
def embedder(embedding_dir):
    return Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")


def test_capture_equals_output_hidden_states(embedder, embedding_dir):
    theirs = pytest.importorskip("transformers").AutoModel.from_pretrained(embedding_dir, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = embedder.tokenizer.embedding([text], 8192)
        with torch.no_grad(), capture(embedder.model, "embed", "layers.*.resid_*", "final_norm") as acts:
            embedder.model(pack(ids))
        states = theirs(torch.tensor(ids), output_hidden_states=True).hidden_states
        names = ["embed", "layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post", "final_norm"]
        assert len(states) == len(names)
        for name, state in zip(names, states, strict=True):
            assert (acts[name] - state[0]).abs().max() <= HIDDEN_FP32 * state.abs().max(), name
        assert torch.equal(acts["layers.1.resid_pre"], acts["layers.0.resid_post"])


def test_every_point_has_its_documented_shape(embedder):
    config = embedder.model.config
    sequences = embedder.tokenizer.embedding(TEXTS, 8192)
    batch = pack(sequences)
    with torch.no_grad(), capture(embedder.model, "*") as acts:
        embedder.model.pool(embedder.model(batch), batch, dim=48)
    sizes = {"T": len(batch.input_ids), "N": len(TEXTS), "H": config.hidden_size, "I": config.intermediate_size}
    sizes |= {"Hq": config.num_attention_heads, "Hkv": config.num_key_value_heads, "D": config.head_dim, "dim": 48}
    assert len(acts) == 3 + 12 * config.num_hidden_layers
    for point, description in POINTS.items():
        shape = [sizes[s] for s in description[1 : description.index("]")].split(", ")]
        assert list(acts[point.format(i=2)].shape) == shape, point


def test_the_points_add_up(embedder):
    with capture(embedder.model, "layers.1.*") as acts:
        embedder.encode(TEXTS)
    a = {name.removeprefix("layers.1."): x for name, x in acts.items()}
    assert torch.equal(a["resid_mid"], a["resid_pre"] + a["attn_out"])
    assert torch.equal(a["resid_post"], a["resid_mid"] + a["mlp_out"])
    layer, linear = embedder.model.layers[1], embedder.model.ops.linear
    with torch.no_grad():  # as encode does, which lets linear choose oneDNN
        assert torch.equal(a["attn_out"], layer.self_attn.o_proj(a["z"].flatten(1), linear))
        assert torch.equal(a["mlp_out"], layer.mlp.down_proj(a["mlp_act"], linear))


def test_per_text_is_in_the_callers_order_over_several_batches(embedder):
    """encode sorts by length and runs batches; per_text undoes both."""
    sequences = embedder.tokenizer.embedding(TEXTS, 8192)
    with capture(embedder.model, "layers.3.resid_post", "pooled") as acts:
        embeddings = embedder.encode(TEXTS, batch_tokens=max(map(len, sequences)), convert_to_tensor=True)
    parts = acts.per_text("layers.3.resid_post")
    assert [len(part) for part in parts] == [len(s) for s in sequences]
    assert torch.equal(torch.stack(acts.per_text("pooled")), embeddings)
    assert len(acts["layers.3.resid_post"]) == sum(map(len, sequences))
    for text, part in zip(TEXTS, parts, strict=True):
        with capture(embedder.model, "layers.3.resid_post") as alone:
            embedder.encode(text)
        assert (part - alone["layers.3.resid_post"]).abs().max() <= HIDDEN_FP32
    with capture(embedder.model, "embed") as twice:
        embedder.encode(TEXTS)
        embedder.encode(TEXTS)
    with pytest.raises(InputError, match=r"per_text\('embed'\): expected one call .* text \d twice"):
        twice.per_text("embed")


def test_identity_edit_changes_no_bit(embedder):
    with capture(embedder.model, "embed"):  # under capture as well, so that nothing is left out
        before = embedder.encode(TEXTS, convert_to_tensor=True)
    with edit(embedder.model, {"*": lambda x: x}), edit(embedder.model, {"layers.*": lambda x: x.clone()}):
        assert torch.equal(embedder.encode(TEXTS, convert_to_tensor=True), before)


def test_edit_replaces_exactly_what_it_names(embedder):
    """Zeroing what attention adds equals removing o_proj's weight."""
    model = embedder.model
    with edit(model, {"layers.2.attn_out": torch.zeros_like}):
        edited = embedder.encode(TEXTS)
    weight = model.layers[2].self_attn.o_proj.weight
    saved = weight.detach().clone()
    try:
        weight.data.zero_()
        with capture(model, "embed"):  # under capture as well, so that nothing is left out
            assert (embedder.encode(TEXTS) == edited).all()
    finally:
        weight.data.copy_(saved)
    assert (embedder.encode(TEXTS) != edited).any()


def test_order_of_nesting(embedder):
    """A point passes through captures and edits in the order in which they were entered."""
    with (
        capture(embedder.model, "embed") as before,
        edit(embedder.model, {"embed": lambda x: x + 1}),
        capture(embedder.model, "embed") as between,
        edit(embedder.model, {"embed": lambda x: x * 2, "emb*": lambda x: x - 3}),
        capture(embedder.model, "embed") as after,
    ):
        embedder.encode("text")
    assert torch.equal(between["embed"], before["embed"] + 1)
    assert torch.equal(after["embed"], between["embed"] * 2 - 3)


def test_a_failing_nested_edit_leaves_no_trace(embedder):
    before = embedder.encode(TEXTS)

    def fail(x):
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        capture(embedder.model, "embed") as acts,
        edit(embedder.model, {"layers.0.q": torch.zeros_like}),
        edit(embedder.model, {"layers.1.mlp_act": fail}),
    ):
        embedder.encode(TEXTS)
    assert list(acts) == ["embed"]
    assert embedder.model.hooks == []
    assert (embedder.encode(TEXTS) == before).all()


def test_unused_hooks_are_not_called(embedder):
    batch = pack([[1, 2, 3]])
    assert embedder.model._hook(batch)("any", batch.input_ids) is batch.input_ids
    assert embedder.model._hook(batch).__name__ == "_identity"


def test_gradients_flow_to_captured_points(embedder):
    batch = pack(embedder.tokenizer.embedding(TEXTS, 8192))
    with capture(embedder.model, "layers.1.resid_post") as acts:
        pooled = embedder.model.pool(embedder.model(batch), batch)
    (gradient,) = torch.autograd.grad(pooled.sum(), acts["layers.1.resid_post"])
    assert gradient.abs().sum() > 0


def test_reranker_points(reranker_dir):
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu")
    with capture(reranker.model, "pooled") as acts:
        scores = reranker.predict([("gravity", "a force"), ("bread", "flour and water, salt and time")])
    expected = reference.p_yes(torch.stack(acts.per_text("pooled")), reranker.model.lm_head_rows(reranker.answers))
    assert abs(expected.detach().numpy() - scores).max() <= REORDERED_FP32


@pytest.mark.parametrize("use", [lambda m, p: capture(m, p), lambda m, p: edit(m, {p: lambda x: x})])
def test_points_that_cannot_be_served_raise(embedder, use):
    with (
        pytest.raises(InputError, match=r"point 'layers\.9\.q': expected a name or pattern"),
        use(embedder.model, "layers.9.q"),
    ):
        pass
    with pytest.raises(InputError, match="'pooled': expected it to be computed"), use(embedder.model, "pooled"):
        embedder.model(pack([[1, 2]]))
    with pytest.raises(InputError, match="point 'embed'"), use(embedder.model, "embed"):
        pass  # the model did not run


def test_reading_what_was_not_captured_raises(embedder):
    with capture(embedder.model, "embed") as acts:
        with pytest.raises(InputError, match="point 'embed': expected it in the capture, found nothing"):
            acts["embed"]
        embedder.encode("x")
    with pytest.raises(InputError, match="point 'final_norm': expected it in the capture, found embed"):
        acts.per_text("final_norm")


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: x[:1], r"\[1, 64\]"),
        (lambda x: x.double(), "torch.float64"),
        (lambda x: x.numpy(), "ndarray"),
    ],
)
def test_an_edit_must_keep_shape_and_dtype(embedder, function, found):
    with (
        pytest.raises(InputError, match=rf"'layers\.0\.resid_mid': expected \[\d+, 64\] .*32, found .*{found}"),
        edit(embedder.model, {"layers.0.resid_mid": function}),
    ):
        embedder.encode(TEXTS)
