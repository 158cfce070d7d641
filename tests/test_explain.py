"""What a decision comes from: the numbers."""

import dataclasses
import re

import pytest
import tolerances
import torch

from qwen3core import Embedder, InputError, Reranker, capture, edit, samples
from qwen3core.edits import replace_head
from qwen3core.explaining import contributions, integrated_gradients, lens, tokens
from qwen3core.layout import Dense

QUERY, DOCUMENTS = samples.DEMO_QUERY, samples.DEMO_DOCUMENTS
HOSTILE = "</script><b> & \"quotes\" 'n'\n<!-- 北京 😀 é -->"
ONCE = 1e9
"""A tolerance that halves nothing."""
LONG = " ".join(DOCUMENTS * 4)
"""About 300 tokens."""


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu")


@pytest.fixture(params=["reranker", "embedder"])
def opened(request):
    return request.getfixturevalue(request.param)


def decision(of, query, document):
    if isinstance(of, Reranker):
        return float(of.predict((query, document), logit=True))
    return of.similarity(of.encode_query(query), of.encode_document(document)).item()


@pytest.mark.parametrize(
    ("query", "document"),
    [("a", "b"), (QUERY, DOCUMENTS[4]), (QUERY, HOSTILE), ("Explain gravity", samples.DOCUMENTS[1])],
)
def test_attributions_are_complete(opened, query, document):
    found = integrated_gradients(opened, query, document)
    assert found.error < tolerances.COMPLETENESS
    assert abs(found.decision - decision(opened, query, document)) < tolerances.CONTRIBUTIONS
    total = sum(values.sum().item() for values in found.values)
    share = abs(total - (found.decision - found.baseline)) / abs(found.decision - found.baseline)
    assert share == pytest.approx(found.error, rel=1e-3, abs=1e-6)
    for values, text in zip(found.values, tokens(opened, query, document), strict=True):
        assert [value != 0 for value in values.tolist()] == [token.part != "template" for token in text]


@pytest.mark.slow
def test_attributions_of_long_texts_are_complete(opened):
    for document in [LONG, *DOCUMENTS, *samples.DOCUMENTS]:
        assert integrated_gradients(opened, QUERY, document).error < tolerances.COMPLETENESS, document


def test_attributions_equal_a_sum_of_many_small_steps(reranker):
    """The definition, written out: gradients at the middles of 100 equal steps, one copy at a time."""
    found = integrated_gradients(reranker, "a drum", "loud noise")
    [text] = tokens(reranker, "a drum", "loud noise")
    content = torch.tensor([[token.part != "template"] for token in text])
    with capture(reranker, "embed", detach=True) as acts:
        reranker.predict(("a drum", "loud noise"))
    baseline = torch.where(content, reranker.model.embed_tokens.weight.detach().mean(0), acts["embed"])
    total, steps = torch.zeros_like(baseline), 100
    for step in range(steps):
        x = (baseline + (step + 0.5) / steps * (acts["embed"] - baseline)).requires_grad_()
        with edit(reranker, {"embed": lambda _, x=x: x}):
            logit = reranker.predict(("a drum", "loud noise"), logit=True, grad=True)
        total += torch.autograd.grad(logit, x)[0] / steps
    expected = ((acts["embed"] - baseline) * total).sum(-1)
    assert (found.values[0] - expected).abs().max() < tolerances.COMPLETENESS * expected.abs().max()


def test_halving_the_path_makes_attributions_complete(reranker):
    once = integrated_gradients(reranker, QUERY, DOCUMENTS[4], tolerance=ONCE)
    halved = integrated_gradients(reranker, QUERY, DOCUMENTS[4])
    assert once.error > 10 * tolerances.COMPLETENESS
    assert halved.error < 0.5 * tolerances.COMPLETENESS
    assert (once.decision, once.baseline) == (halved.decision, halved.baseline)


def test_a_copy_at_a_time_gives_the_same(opened):
    together = integrated_gradients(opened, QUERY, "a violin", tolerance=ONCE)
    alone = integrated_gradients(opened, QUERY, "a violin", tolerance=ONCE, batch_tokens=1)
    for a, b in zip(together.values, alone.values, strict=True):
        assert (a - b).abs().max() < tolerances.SAME_TEXT_FP32 * 10


@pytest.mark.parametrize("document", [DOCUMENTS[2], HOSTILE, LONG])
def test_what_heads_and_mlps_add_sums_to_the_decision(opened, document):
    true = decision(opened, QUERY, document)
    added, by_layer = contributions(opened, QUERY, document), lens(opened, QUERY, document)
    config = opened.model.config
    assert added.shape == (1 + config.num_hidden_layers * (config.num_attention_heads + 1),)
    assert by_layer.shape == (config.num_hidden_layers + 1,)
    assert abs(added.sum().item() - true) < tolerances.CONTRIBUTIONS
    assert abs(by_layer[-1].item() - true) < tolerances.CONTRIBUTIONS
    assert (by_layer[:-1] - true).abs().min() > tolerances.CONTRIBUTIONS  # it is decided by the last layer
    assert not added.requires_grad


def test_each_row_is_of_the_part_that_it_says(opened):
    heads = opened.model.config.num_attention_heads
    for layer, head in ((0, 2), (2, 1), (3, 3)):
        row = 1 + layer * (heads + 1) + head
        assert contributions(opened, QUERY, "a violin")[row] != 0
        with edit(opened, replace_head(layer, head)):
            assert (contributions(opened, QUERY, "a violin") == 0).nonzero().tolist() == [[row]]
        with edit(opened, {f"layers.{layer}.mlp_out": lambda x: 0 * x}):
            assert (contributions(opened, QUERY, "a violin") == 0).nonzero().tolist() == [[row + heads - head]]


def test_lens_is_the_decision_of_fewer_layers(reranker):
    """After layer k it is what the model gives with the layers above it left out."""
    by_layer = lens(reranker, QUERY, DOCUMENTS[1])
    layers = reranker.model.layers
    try:
        for k in range(1, len(layers)):
            reranker.model.layers = layers[:k]
            assert abs(decision(reranker, QUERY, DOCUMENTS[1]) - by_layer[k].item()) < tolerances.CONTRIBUTIONS
    finally:
        reranker.model.layers = layers


def test_another_instruction_changes_every_number(opened):
    for function in (contributions, lens):
        usual, own = (function(opened, QUERY, "a drum", instruction=task) for task in (None, "Find a noise"))
        assert (usual - own).abs().max() > 1e-3
    own_words = integrated_gradients(opened, QUERY, "a drum", instruction="Find a noise", tolerance=ONCE)
    assert len(own_words.values[0]) == len(tokens(opened, QUERY, "a drum", "Find a noise")[0])


def test_tokens_say_their_text_and_part(opened):
    texts = tokens(opened, "Is it 北?", HOSTILE)
    ids = opened.to_sequences(["Is it 北?"])[0] if isinstance(opened, Embedder) else None
    assert ids is None or len(texts[0]) > len(ids)
    for part, text in (("query", "Is it 北?"), ("document", HOSTILE)):
        found = [token.text for all_ in texts for token in all_ if token.part == part]
        pieces = re.sub("(.)₁", r"\1", re.sub(".[₂₃₄]", "", "".join(found)))
        assert pieces.strip() == text
    whole = "".join(token.text for text in texts for token in text)
    for piece in ("北₁北₂北₃", "😀₁😀₂😀₃😀₄", "é₁é₂"):
        assert piece in whole
    end = "<|endoftext|>" if isinstance(opened, Embedder) else "</think>\n\n"
    assert whole.endswith(end)
    assert texts[-1][-1].part == "template"


def test_tokens_of_a_text_that_is_cut(reranker):
    cut = Reranker(reranker.model, reranker.tokenizer, max_length=100)
    with pytest.warns(UserWarning, match="truncated"):
        [text] = tokens(cut, QUERY, LONG)
    assert len(text) == 100
    assert [token.text for token in text[-6:]] == [token.text for token in tokens(reranker, "a", "b")[0][-6:]]
    with pytest.warns(UserWarning, match="truncated"):
        assert integrated_gradients(cut, QUERY, LONG).error < tolerances.COMPLETENESS


@pytest.mark.parametrize(
    "changed", [{"pooling": ("mean",)}, {"modules": (Dense("2_Dense", 256, 8),)}, {"labels": ("yes", "no")}]
)
def test_a_decision_without_one_direction_is_refused(opened, changed, monkeypatch):
    monkeypatch.setattr(opened.model, "layout", dataclasses.replace(opened.model.layout, **changed))
    for function in (contributions, lens):
        with pytest.raises(InputError, match="explain: expected a decision by the last token's hidden state"):
            function(opened, QUERY, "a drum")


def test_a_score_of_modules_and_several_scores_are_refused(reranker, monkeypatch):
    monkeypatch.setattr(reranker.model, "score_weight", lambda answers: None)
    with pytest.raises(InputError, match="explain: expected a score of one direction, found one of the"):
        contributions(reranker, QUERY, "a drum")
    layout = dataclasses.replace(reranker.model.layout, labels=("bad", "good"))
    monkeypatch.setattr(reranker.model, "layout", layout)
    with pytest.raises(InputError, match="explain: expected a checkpoint of one score, found bad, good"):
        integrated_gradients(reranker, QUERY, "a drum")


def test_bad_input_of_the_functions(reranker):
    quantised = Reranker.from_pretrained("tiny-reranker", dtype="int8", device="cpu")
    with pytest.raises(InputError, match="explain: expected weights with gradients, found int8"):
        integrated_gradients(quantised, QUERY, "a drum")
    with pytest.raises(InputError, match="tolerance: expected a finite number of at least 0, found -1"):
        integrated_gradients(reranker, QUERY, "a drum", tolerance=-1)
