"""capture and edit: equal to transformers' states and attentions, exact if they change nothing, gone when they end."""

import dataclasses
import re

import pytest
import torch
from tolerances import HIDDEN_FP32, LOGIT_FP32, REORDERED_FP32

from qwen3core import Embedder, InputError, Reranker, capture, edit, edits, pack, reference, stream
from qwen3core.hooks import by_head
from qwen3core.points import POINTS

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
    absent = {"logit", "score"}  # of a reranker, see below
    assert set(acts) == {n.format(i=i) for n in POINTS.keys() - absent for i in range(4)} - asked_by_name(4)
    for point, description in POINTS.items():
        if (name := point.format(i=2)) in acts:
            shape = [sizes[s] for s in description[1 : description.index("]")].split(", ")]
            assert list(acts[name].shape) == shape, point
    with torch.no_grad(), capture(embedder.model, "layers.*.scores", "*.pattern") as acts:
        embedder.model(batch)
    assert set(acts) == asked_by_name(4)
    for name in acts:
        shapes = [list(x.shape) for x in acts.per_text(name)]
        assert shapes == [[sizes["Hq"], len(s), len(s)] for s in sequences], name


def asked_by_name(layers):
    return {f"layers.{i}.{name}" for i in range(layers) for name in ("scores", "pattern")}


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


def test_identity_edit_of_patterns_changes_no_bit(embedder):
    with capture(embedder, "layers.*.pattern"):
        before = embedder.encode(TEXTS, convert_to_tensor=True)
    with edit(embedder, {"layers.*.scores": lambda x: x.clone(), "layers.*.pattern": lambda x: x}):
        assert torch.equal(embedder.encode(TEXTS, convert_to_tensor=True), before)
    assert abs(before.numpy() - embedder.encode(TEXTS)).max() <= HIDDEN_FP32


def test_a_batch_has_what_each_text_has_alone(embedder):
    """Every point, patterns included."""
    everything = ("*", "layers.*.scores", "layers.*.pattern")
    with capture(embedder, *everything) as batch:
        embedder.encode(TEXTS)
    for text, alone_text in enumerate(TEXTS):
        with capture(embedder, *everything) as alone:
            embedder.encode([alone_text])
        assert set(alone) == set(batch)
        for name in alone:
            x, y = batch.per_text(name)[text], alone.per_text(name)[0]
            seen = y > -torch.inf  # scores that are masked
            assert torch.equal(x > -torch.inf, seen)
            assert (x - y)[seen].abs().max() <= HIDDEN_FP32 * y[seen].abs().max(), (name, text)


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


def test_a_hook_is_called_at_its_points_alone(embedder):
    names = []

    def look(x, where):
        names.append(where.name)
        return x

    with edit(embedder.model, {"layers.2.z": look}):
        embedder.encode("gravity")
    assert names == ["layers.2.z"]


def test_gradients_flow_to_captured_points(embedder):
    batch = pack(embedder.tokenizer.embedding(TEXTS, 8192))
    with capture(embedder.model, "layers.1.resid_post") as acts:
        pooled = embedder.model.pool(embedder.model(batch), batch)
    (gradient,) = torch.autograd.grad(pooled.sum(), acts["layers.1.resid_post"])
    assert gradient.abs().sum() > 0


def test_reranker_points(reranker_dir):
    reranker = Reranker.from_pretrained(reranker_dir, dtype="float32", device="cpu")
    pairs = [("gravity", "a force"), ("bread", "flour and water, salt and time")]
    with capture(reranker, "pooled", "logit", "score") as acts:
        scores = reranker.predict(pairs)
    assert acts["logit"].shape == acts["score"].shape == (2,)
    assert torch.equal(torch.stack(acts.per_text("score")), torch.tensor(scores))
    assert torch.equal(acts["score"], acts["logit"].sigmoid())
    assert abs(reranker.predict(pairs, logit=True) - torch.stack(acts.per_text("logit")).numpy()).max() <= LOGIT_FP32
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


SHARED = [[5, 6, 7, 8], [5, 6, 7, 9, 10, 11], [12, 13]]
PREFIXES = [(5, 6, 7), (5, 6, 7), ()]


def attentions(directory, ids, monkeypatch):
    """transformers' attention of one text: scores, from its eager function's arguments, and pattern, of every layer."""
    from transformers.models.qwen3 import modeling_qwen3

    eager, found = modeling_qwen3.eager_attention_forward, []

    def recorded(module, query, key, value, attention_mask, scaling, **options):
        keys = modeling_qwen3.repeat_kv(key, module.num_key_value_groups)
        found.append((query @ keys.transpose(2, 3) * scaling + attention_mask)[0])
        return eager(module, query, key, value, attention_mask, scaling=scaling, **options)

    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", recorded)
    theirs = modeling_qwen3.Qwen3Model.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        patterns = theirs(torch.tensor([ids]), output_attentions=True).attentions
    return found, [pattern[0] for pattern in patterns]


@pytest.mark.parametrize("ops", ["reference", "torch", "triton"])
@pytest.mark.parametrize("prefixes", [None, PREFIXES], ids=["mixed lengths", "shared prefix"])
def test_scores_and_pattern_equal_output_attentions(embedding_dir, ops, prefixes, monkeypatch):
    pytest.importorskip("transformers")
    model = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu", ops=ops).model
    with torch.no_grad(), capture(model, "layers.*.scores", "layers.*.pattern") as acts:
        model(pack(SHARED, prefixes=prefixes))
    for text, ids in enumerate(SHARED):
        expected = attentions(embedding_dir, ids, monkeypatch)
        for name, layers in zip(("scores", "pattern"), expected, strict=True):
            assert len(layers) == 4
            for i, theirs in enumerate(layers):
                ours = acts.per_text(f"layers.{i}.{name}")[text]
                own = theirs[:, len(ids) - ours.shape[1] :]  # the queries behind the prefix, which see all of it
                assert ours.shape == own.shape
                seen = own > -1e30
                assert torch.equal(ours > -torch.inf, seen)
                assert (ours - own)[seen].abs().max() <= HIDDEN_FP32 * own[seen].abs().max().clamp(min=1)


def test_z_is_what_the_pattern_makes_of_v(embedder):
    with capture(embedder, "layers.1.pattern", "layers.1.v", "layers.1.z") as acts:
        embedder.encode(TEXTS)
    for pattern, v, z in zip(*(acts.per_text(f"layers.1.{name}") for name in ("pattern", "v", "z")), strict=True):
        values = v.transpose(0, 1).repeat_interleave(2, dim=0)
        assert torch.equal(z, (pattern @ values).transpose(0, 1))


@pytest.mark.parametrize("point", ["scores", "pattern"])
def test_an_edited_pattern_is_used(embedder, point):
    """Where the last token may attend to itself alone, every text is its last token alone."""

    def close(x, where):
        x = x.clone()
        x[:, -1, :-1], x[:, -1, -1] = (-torch.inf, 0) if point == "scores" else (0, 1)
        return x

    with edit(embedder, {f"layers.*.{point}": close}):
        closed = embedder.encode(TEXTS)
    alone = embedder.encode("")
    assert abs(embedder.encode(TEXTS) - alone).max() > 0.01
    assert abs(closed - alone).max() <= HIDDEN_FP32


def test_patterns_of_an_attention_of_ones_own(embedder):
    """It is asked to show them; one that declares to be causal attention is replaced by the reference's meanwhile."""
    model, whole = embedder.model, embedder.model.ops
    both_ways = lambda *args, hook=None: reference.attention(*args, causal=False, **({"hook": hook} if hook else {}))  # noqa: E731
    try:
        model.ops = dataclasses.replace(whole, attention=both_ways)
        with capture(model, "layers.0.pattern") as acts:
            model(pack([[1, 2, 3]]))
        assert (acts["layers.0.pattern"] > 0).all()
        model.ops = dataclasses.replace(whole, attention=lambda *args: reference.attention(*args))
        model(pack([[1, 2, 3]]))
        with (
            pytest.raises(InputError, match=r"expected a function that takes hook= as reference.py's does.*lambda"),
            capture(model, "layers.0.pattern"),
        ):
            model(pack([[1, 2, 3]]))
    finally:
        model.ops = whole


def test_a_star_does_not_ask_for_patterns(embedder):
    with capture(embedder, "layers.0.*") as acts:
        embedder.encode("gravity")
    assert not asked_by_name(1) & set(acts)
    with capture(embedder, "*.pattern") as acts:
        embedder.encode(["gravity", "a"])
    with pytest.raises(InputError, match=r"'layers.0.pattern': expected one text, found 2: per_text"):
        acts["layers.0.pattern"]


def test_heads_add_up_to_what_attention_adds(embedder):
    with capture(embedder, "layers.2.z", "layers.2.attn_out") as acts:
        embedder.encode(TEXTS)
    parts = by_head(embedder, 2, acts["layers.2.z"])
    attn_out = acts["layers.2.attn_out"]
    assert parts.shape == (len(attn_out), 4, 64)
    assert (parts.sum(1) - attn_out).norm() <= REORDERED_FP32 * attn_out.norm()
    one = by_head(embedder.model, 2, acts["layers.2.z"][-1])
    assert (one - parts[-1]).norm() <= REORDERED_FP32 * one.norm()


def test_tokens_and_positions(embedder):
    """In the caller's order, though batches are sorted by length."""
    with capture(embedder, "layers.0.resid_post", "layers.0.pattern", "pooled") as acts:
        embedder.encode(TEXTS)
    sequences = embedder.tokenizer.embedding(TEXTS, 8192)
    assert [ids.tolist() for ids in acts.input_ids] == sequences
    assert [p.tolist() for p in acts.positions] == [[*range(len(ids))] for ids in sequences]
    assert acts.tokens[1] == ["a", "<|endoftext|>"]
    assert ["".join(tokens) for tokens in acts.tokens[::3]] == [f"{text}<|endoftext|>" for text in TEXTS[::3]]
    for text, ids in enumerate(sequences):
        part, pattern = (acts.per_text(f"layers.0.{name}")[text] for name in ("resid_post", "pattern"))
        assert torch.equal(acts.at("layers.0.resid_post", text), part[-1])
        assert torch.equal(acts.at("layers.0.resid_post", text, -len(ids)), part[0])
        assert torch.equal(acts.at("layers.0.resid_post", text, [1, -1]), part[[1, -1]])
        assert torch.equal(acts.at("layers.0.resid_post", text, None), part)
        assert torch.equal(acts.at("layers.0.pattern", text, 1), pattern[:, 1])
        assert torch.equal(acts.at("pooled", text), acts.per_text("pooled")[text])
    assert acts.texts == [0, 1, 2, 3]
    assert torch.equal(acts.at("pooled", None), torch.stack(acts.per_text("pooled")))
    assert torch.equal(acts.at("layers.0.resid_post", None, 0)[1], acts.at("layers.0.resid_post", 1, 0))
    with pytest.raises(
        InputError, match=r"positions: expected 'last', or numbers from 0 to 1 or .* of text 1, found 2"
    ):
        acts.at("layers.0.resid_post", 1, 2)
    with pytest.raises(InputError, match=r"text: expected one of the capture's, found 4"):
        acts.at("layers.0.resid_post", 4)
    with capture(embedder.model, "embed") as acts:
        embedder.encode("a")
    with pytest.raises(InputError, match=r"tokens: expected capture\(embedder, ...\)"):
        _ = acts.tokens


def test_positions_behind_a_shared_prefix(embedder):
    with torch.no_grad(), capture(embedder.model, "layers.1.v", "layers.1.pattern") as acts:
        embedder.model(pack(SHARED, prefixes=PREFIXES))
    assert [p.tolist() for p in acts.positions] == [[3], [3, 4, 5], [0, 1]]
    assert [ids.tolist() for ids in acts.input_ids] == [[8], [9, 10, 11], [12, 13]]
    assert torch.equal(acts.at("layers.1.v", 1, 4), acts.per_text("layers.1.v")[1][1])
    assert acts.at("layers.1.pattern", 1, 4).shape == (4, 6)
    with pytest.raises(InputError, match="numbers from 3 to 5"):
        acts.at("layers.1.v", 1, 2)


def test_stop_at_skips_all_later_work(embedder):
    """encode goes through all batches, and gives nothing; other captures see what was computed before."""
    with capture(embedder, "layers.1.*") as whole:
        embedder.encode(TEXTS)
    sizes = {"batch_tokens": 250}
    with capture(embedder, "layers.2.resid_pre") as later, capture(embedder, "embed") as first:
        with capture(embedder, "layers.1.mlp_act", stop_at="layers.1.resid_post") as acts:
            assert embedder.encode(TEXTS, **sizes) is None
            assert embedder.encode(TEXTS[0]) is None
        embedder.encode("a")
    assert len(later["layers.2.resid_pre"]) == 2
    sequences = embedder.tokenizer.embedding([*TEXTS, TEXTS[0]], 8192)
    assert len(first["embed"]) - 2 == len(acts["layers.1.mlp_act"]) == sum(map(len, sequences))
    with capture(embedder, "layers.1.resid_post", stop_at="layers.1.resid_post") as acts:
        embedder.encode(TEXTS)
    for ours, expected in zip(acts.per_text("layers.1.resid_post"), whole.per_text("layers.1.resid_post"), strict=True):
        assert torch.equal(ours, expected)
    with capture(embedder.model, "embed", stop_at="layers.0.z") as acts:
        embedder.model(pack([[1, 2]]))
        raise AssertionError  # a call of the model itself ends the block
    assert acts["embed"].shape == (2, 64)
    with capture(embedder.model, "embed", stop_at="layers.0.z") as acts:
        with capture(embedder.model, "embed"):
            embedder.model(pack([[1, 2]]))
        raise AssertionError  # nor does another capture stop there
    assert embedder.model.hooks == []
    reranker = Reranker.from_pretrained("tiny-reranker", device="cpu")
    with capture(reranker, stop_at="layers.0.z"):
        assert reranker.rank("gravity", ["a force", "bread"]) == []
    with pytest.raises(InputError, match="expected one or more points to record, found none"), capture(embedder):
        pass
    with pytest.raises(InputError, match="expected an Embedder, a Reranker or their model, found str"), capture("x"):
        pass
    for wrong in ("layers.0.pattern", "layers.9.z", "layers.*.z"):
        with pytest.raises(InputError, match=re.escape(wrong)), capture(embedder, "embed", stop_at=wrong):
            pass


def test_into_hands_over_each_batch_once(embedder):
    """Whatever the batches, what is handed over is what one capture of all has; nothing is held."""
    with capture(embedder, "layers.2.resid_post", "pooled") as whole:
        vectors = embedder.encode(TEXTS * 3, convert_to_tensor=True)
    handed: dict[str, list[torch.Tensor]] = {"layers.2.resid_post": [], "pooled": []}
    batches, seen = [], []

    def receive(acts):
        assert torch.is_grad_enabled()  # a probe can learn, though encode records nothing
        batches.append(len(acts.input_ids))
        seen.extend(acts.texts)
        for name, parts in handed.items():
            parts.extend(acts.per_text(name))

    with capture(embedder, *handed, into=receive) as empty:
        for again in stream(embedder.encode, iter(TEXTS * 3), block_size=5, batch_tokens=250, convert_to_tensor=True):
            assert torch.isfinite(again).all()
    assert not empty
    assert len(batches) > 3
    assert sum(batches) == len(TEXTS) * 3 == len(handed["pooled"])
    assert sorted(seen) == sorted([*range(5), *range(5), 0, 1])  # of the blocks of 5, 5 and 2
    for name, parts in handed.items():
        ours, expected = (torch.stack([x.sum() for x in y]).sort()[0] for y in (parts, whole.per_text(name)))
        assert (ours - expected).abs().max() <= HIDDEN_FP32 * expected.abs().max()
    assert vectors.shape == (12, 64)

    def fail(acts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), capture(embedder, "embed", into=fail):
        embedder.encode(TEXTS)
    assert embedder.model.hooks == []


def test_how_tensors_are_stored(embedder):
    batch = pack([[1, 2, 3]])
    with capture(embedder, "embed", dtype=torch.float16, detach=True) as acts, capture(embedder, "embed") as plain:
        embedder.model(batch)
    assert acts["embed"].dtype == torch.float16
    assert not acts["embed"].requires_grad
    assert plain["embed"].requires_grad
    assert plain["embed"].dtype == torch.float32
    with capture(embedder, "embed", device="meta") as acts:
        embedder.model(batch)
    assert acts["embed"].is_meta


def test_an_edit_is_told_where_it_is(embedder):
    """Rows of each text by the caller's index, positions, token ids; the same for the patterns of one text."""
    seen: dict[str, list] = {}

    def look(x, where):
        seen.setdefault(where.name, []).append((x.shape, where))
        return x

    with edit(embedder, {"layers.0.resid_mid": look, "layers.1.pattern": look, "pooled": look}):
        embedder.encode(TEXTS)
    sequences = embedder.tokenizer.embedding(TEXTS, 8192)
    [(shape, where)] = seen["layers.0.resid_mid"]
    assert shape[0] == len(where.texts) == len(where.positions) == len(where.input_ids)
    assert where.batch.input_ids is where.input_ids or torch.equal(where.batch.input_ids, where.input_ids)
    for text, ids in enumerate(sequences):
        assert where.input_ids[where.rows[text]].tolist() == where.input_ids[where.texts == text].tolist() == ids
        assert where.positions[where.rows[text]].tolist() == [*range(len(ids))]
    assert len(seen["layers.1.pattern"]) == len(TEXTS)
    for shape, where in seen["layers.1.pattern"]:
        [(text, rows)] = where.rows.items()
        assert (rows.start, rows.stop) == (0, len(sequences[text]))
        assert where.input_ids.tolist() == sequences[text]
        assert shape == (4, len(sequences[text]), len(sequences[text]))
    [(shape, where)] = seen["pooled"]
    assert shape == (len(TEXTS), 64)
    assert {text: rows.start for text, rows in where.rows.items()} == {t: n for n, t in enumerate(where.texts.tolist())}
    assert where.positions.tolist() == [len(sequences[text]) - 1 for text in where.texts.tolist()]
    assert set(where.input_ids.tolist()) == {embedder.tokenizer.eos}


def test_zero_and_add_and_mean(embedder):
    model = embedder.model
    with capture(embedder, "layers.1.mlp_out") as reference_texts:
        embedder.encode(["bread", "gravity"])
    vector = torch.arange(64.0)
    for positions in ("last", None, 0, [0, -1]):
        with (
            capture(embedder, "layers.1.mlp_out") as before,
            edit(embedder, {"layers.1.mlp_out": edits.add(vector, positions)}),
            capture(embedder, "layers.1.mlp_out") as after,
        ):
            embedder.encode(TEXTS)
        for x, y in zip(*(a.per_text("layers.1.mlp_out") for a in (before, after)), strict=True):
            rows = (
                range(len(x))
                if positions is None
                else {len(x) - 1}
                if positions == "last"
                else {0} | ({len(x) - 1} if positions != 0 else set())
            )
            assert torch.equal(y, x + torch.tensor([[float(i in rows)] for i in range(len(x))]) * vector)
    for function, expected in (
        (edits.zero, torch.zeros(64)),
        (edits.mean_ablate(reference_texts), reference_texts["layers.1.mlp_out"].mean(0)),
    ):
        with edit(embedder, {"layers.1.mlp_out": function}), capture(model, "layers.1.mlp_out") as acts:
            embedder.encode(TEXTS)
        assert torch.equal(acts["layers.1.mlp_out"], expected.expand_as(acts["layers.1.mlp_out"]))


@pytest.mark.parametrize("point", ["resid_post", "q_pre", "pattern", "z"])
def test_patching_takes_rows_of_another_run(embedder, point):
    """All rows patched give that run; one row, that row alone, in each text of the batch."""
    name = f"layers.1.{point}"
    texts, others = ["gravity pulls", "bread"], ["heavy bodies", "trees"]
    sequences = embedder.tokenizer.embedding([*texts, *others], 99)
    if [len(s) for s in sequences[:2]] != [len(s) for s in sequences[2:]]:
        sequences = [[7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20]]
    clean, other = pack(sequences[:2]), pack(sequences[2:])
    model = embedder.model
    with torch.no_grad():
        with capture(model, name) as acts, capture(model, "layers.2.*") as expected:
            model(other)
        with edit(model, {name: edits.patch(acts)}), capture(model, "layers.2.*", name) as found:
            model(clean)
        assert torch.equal(found.per_text(name)[0], acts.per_text(name)[0])
        if point == "resid_post":
            assert all(torch.equal(found[n], expected[n]) for n in expected)
        if point == "pattern":  # text 1 has other keys than text 0
            return
        one = edits.patch(acts, positions=1, text=0)
        with capture(model, name) as before, edit(model, {name: one}), capture(model, name) as after:
            model(clean)
    for text in (0, 1):
        x, y, source = before.per_text(name)[text], after.per_text(name)[text], acts.per_text(name)[0]
        assert torch.equal(y[1], source[1])
        assert torch.equal(y[[0, 2]], x[[0, 2]])


def test_what_a_patch_refuses(embedder):
    with capture(embedder, "layers.1.z") as acts:
        embedder.encode(TEXTS)
    cases = [
        (
            edits.patch(acts, text=1),
            r"patch of 'layers\.1\.z', text \d: expected rows \[\d+, 4, 128\], found \[2, 4, 128\]",
        ),
        (edits.patch(acts, positions=7), r"positions: expected 'last', or numbers from 0 to 1 .* of text 1, found"),
        (edits.patch(acts, text=9), r"text: expected one of the capture's, found 9"),
        (edits.add(torch.ones(128), positions="first"), r"positions: .* found 'first'"),
    ]
    for function, message in cases:
        with pytest.raises(InputError, match=message), edit(embedder, {"layers.1.z": function}):
            embedder.encode(TEXTS)
    wrong = edits.replace_head(1, 4)
    with pytest.raises(InputError, match="head: expected an integer from 0 to 3, found 4"), edit(embedder, wrong):
        embedder.encode(TEXTS)


def test_replacing_a_head_leaves_the_others(embedder):
    with capture(embedder, "layers.2.z") as acts:
        embedder.encode(TEXTS)
    mean = acts["layers.2.z"].mean(0)
    for function, expected in ((edits.zero, 0 * mean), (edits.mean_ablate(acts), mean), (lambda x: x + 1, None)):
        with edit(embedder, edits.replace_head(2, 1, function)), capture(embedder, "layers.2.z") as after:
            embedder.encode(TEXTS)
        z = acts["layers.2.z"].clone()
        z[:, 1] = z[:, 1] + 1 if expected is None else expected[1]
        assert torch.equal(after["layers.2.z"], z)
