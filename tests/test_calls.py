"""sentence-transformers' keywords: ours beside its own numbers and types, what is refused, and what counts as text."""

import collections
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import layouts
import markupsafe
import numpy as np
import pytest
import torch
from tolerances import EMBEDDING_FP32, HIDDEN_FP32, LOGIT_FP32, SAME_TEXT_FP32, SCORE_FP32

from qwen3core import Embedder, InputError, Reranker, calls, capture
from qwen3core.quantize import PRECISIONS, quantize
from qwen3core.weights.find import find

pytest.importorskip("sentence_transformers")
import sentence_transformers
from sentence_transformers.util.quantization import quantize_embeddings
from sentence_transformers.util.similarity import SimilarityFunction

TEXTS = ["the violin is an instrument", "rain fell", "gold is a metal", "", "bread is food and gold is not"]
QUERY = "a musical instrument"
PAIRS = [(QUERY, text) for text in TEXTS]
FLOAT32: dict[str, Any] = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
FLAGS = list(itertools.product([True, False], repeat=2))


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def peer():
    return sentence_transformers.SentenceTransformer(str(find("tiny-embedding")), **FLOAT32)


@pytest.fixture(scope="module")
def cross_peer():
    return sentence_transformers.CrossEncoder(str(find("tiny-reranker")), **FLOAT32)


def same(ours, theirs, tolerance=EMBEDDING_FP32):
    """The same types, shapes and numbers."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            same(x, y, tolerance)
    else:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("table", "kind", "methods"),
    [
        (calls.OF_ENCODE, "SentenceTransformer", ["encode", "encode_query", "encode_document"]),
        (calls.OF_PREDICT, "CrossEncoder", ["predict", "rank"]),
    ],
)
def test_the_table_has_each_of_their_keywords(table, kind, methods):
    signatures = [inspect.signature(getattr(getattr(sentence_transformers, kind), method)) for method in methods]
    theirs = {name for signature in signatures for name in signature.parameters} - {"self", "kwargs"}
    assert theirs <= set(table)
    assert set(table) - theirs <= {"task", "processing_kwargs"}  # which are in their kwargs
    assert calls.__doc__ is not None
    assert all(f"- ``{name}``: {meaning}\n" in calls.__doc__ for name, meaning in table.items())


@pytest.mark.parametrize("name", [name for name, text in calls.OF_PREDICT.items() if text.startswith(calls.REFUSED)])
def test_what_is_refused_says_what_to_use(embedder, reranker, name):
    instead = calls.OF_PREDICT[name].removeprefix(calls.REFUSED)
    with pytest.raises(InputError) as error:
        reranker.predict(PAIRS, **{name: "x"})
    assert str(error.value) == f"{name}: expected none, found 'x': {instead}"
    assert reranker.predict([], **{name: None}).shape == (0,)
    if name in calls.BOTH:
        with pytest.raises(InputError, match=f"^{name}: expected none, found 'x': "):
            embedder.encode_query(TEXTS, **{name: "x"})


@pytest.mark.parametrize("device", ["cuda", "meta", "nonsense", "cpu:1", 3.5])
def test_another_device_is_refused(embedder, reranker, device):
    for call, inputs in ((embedder.encode, TEXTS), (reranker.predict, PAIRS)):
        with pytest.raises(InputError, match=r"^device: expected the model's, cpu, found .*from_pretrained\(device="):
            call(inputs, device=device)
        for own in ("cpu", "cpu:0", torch.device("cpu")):
            assert len(call([], device=own)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_value": "words"}, "output_value: expected one of sentence_embedding, token_embeddings, None, found"),
        ({"precision": "int4"}, "precision: expected one of None, float32, int8, uint8, binary, ubinary, found 'int4'"),
        ({"task": "passage"}, "task: expected one of None, query, document, found 'passage'"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, found 0"),
        ({"precision": "int8", "grad": True}, "precision: expected float32 for tokens or gradients, found 'int8'"),
        ({"precision": "int8", "output_value": None}, "precision: expected float32 for tokens or gradients, found"),
    ],
)
def test_bad_options(embedder, options, message):
    with pytest.raises(InputError) as error:
        embedder.encode(TEXTS, **options)
    assert str(error.value).startswith(message)
    with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
        embedder.encode(TEXTS, normalise=True)


def test_the_first_argument_by_any_name(embedder, reranker):
    for method in (embedder.encode, embedder.encode_query, embedder.encode_document):
        for name in ("inputs", "sentences"):
            np.testing.assert_array_equal(method(**{name: TEXTS}), method(TEXTS))
    for name in ("inputs", "sentences", "pairs"):
        np.testing.assert_array_equal(reranker.predict(**{name: PAIRS}), reranker.predict(PAIRS))
    with pytest.raises(TypeError):
        embedder.encode(TEXTS, sentences=TEXTS)


# ----------------------------------------------------------------------------------------- the embedder


@pytest.mark.parametrize(("tensor", "array"), FLAGS)
@pytest.mark.parametrize(
    "inputs", ["rain fell", TEXTS, TEXTS[:1], np.array(TEXTS)], ids=["text", "list", "one", "array"]
)
def test_types_and_numbers_of_encode(embedder, peer, inputs, tensor, array):
    options = {"convert_to_tensor": tensor, "convert_to_numpy": array}
    for method in ("encode", "encode_query", "encode_document"):
        same(getattr(embedder, method)(inputs, **options), getattr(peer, method)(inputs, **options))


@pytest.mark.parametrize(("tensor", "array"), FLAGS)
@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_types_of_nothing(embedder, peer, tensor, array, precision):
    options = {"convert_to_tensor": tensor, "convert_to_numpy": array, "precision": precision}
    ours, theirs = embedder.encode([], **options), peer.encode([], **options)
    assert type(ours) is type(theirs)
    assert len(ours) == 0


@pytest.mark.filterwarnings("ignore:precision. .* takes the ranges of")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_as_theirs(precision):
    """Their formulas, bit for bit; widths that fill no byte, a component that never changes, ranges from elsewhere."""
    for n, width in ((1, 8), (3, 10), (120, 16)):
        vectors = np.random.default_rng(n).normal(size=(n, width)).astype(np.float32)
        vectors[:, 2] = 0.5
        for ranges in (None, np.stack([vectors.min(0) / 2, vectors.max(0) / 2])):
            if n == 1 and ranges is None and precision.endswith("int8"):
                with pytest.raises(InputError, match=f"ranges {precision} takes, found one"):
                    quantize(vectors, precision)
                continue
            found, right = quantize(vectors, precision, ranges), quantize_embeddings(vectors, precision, ranges)
            assert found.dtype == np.asarray(right).dtype
            np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("precision", ["int8", "ubinary"])
def test_precision_of_encode(embedder, precision):
    texts = [f"gold {n}" for n in range(100)]
    expected = quantize(embedder.encode(texts), precision)
    np.testing.assert_array_equal(embedder.encode(texts, precision=precision), expected)
    tensor = embedder.encode(texts, precision=precision, convert_to_tensor=True)
    rows = embedder.encode(texts, precision=precision, convert_to_numpy=False)
    assert isinstance(rows, list)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(torch.stack(rows).numpy(), expected)
    if precision.endswith("int8"):
        with pytest.warns(UserWarning, match=f"{precision} takes the ranges of 2 vectors") as caught:
            embedder.encode(texts[:2], precision=precision)
        assert [w.filename for w in caught] == [__file__]
    else:
        np.testing.assert_array_equal(embedder.encode(texts[0], precision=precision), expected[0])


@pytest.mark.parametrize("prompt", [None, "Find: "])
def test_token_embeddings(embedder, peer, prompt):
    """The last hidden states, raw, of all tokens, those of the prompt too; whatever is cut of whole vectors."""
    options = {"output_value": "token_embeddings", "prompt": prompt, "truncate_dim": 64}
    ours, theirs = embedder.encode(TEXTS, **options), peer.encode(TEXTS, **options)
    tolerance = HIDDEN_FP32 * max(float(x.abs().max()) for x in theirs)
    same(ours, theirs, tolerance)
    same(embedder.encode(TEXTS[0], **options), ours[0], tolerance)
    both = embedder.encode(TEXTS, output_value=None, prompt=prompt)
    same([row["token_embeddings"] for row in both], ours, tolerance)
    same([row["sentence_embedding"] for row in both], embedder.encode(TEXTS, prompt=prompt, convert_to_numpy=False))
    assert set(embedder.encode(TEXTS[0], output_value=None)) == set(both[0])


def test_a_capture_stops_these_calls_too(embedder):
    for options in ({"output_value": None}, {"output_value": "token_embeddings"}, {"precision": "binary"}):
        with capture(embedder, "embed", stop_at="layers.0.resid_post") as found:
            assert embedder.encode(TEXTS, **options) is None
        assert len(found.tokens) == len(TEXTS)


def batches(monkeypatch, opened):
    """Texts and tokens of each batch that it computes, from here on."""
    found = []
    compute = opened.compute

    def spy(batch, **options):
        found.append((len(batch.indices), len(batch.input_ids)))
        return compute(batch, **options)

    monkeypatch.setattr(opened, "compute", spy)
    return found


def test_batch_size_bounds_the_texts_of_a_batch(embedder, reranker, monkeypatch):
    expected, scores = embedder.encode_query(TEXTS), reranker.predict(PAIRS)
    found, scored = batches(monkeypatch, embedder), batches(monkeypatch, reranker)
    np.testing.assert_allclose(embedder.encode_query(TEXTS, batch_size=2), expected, atol=SAME_TEXT_FP32)
    assert [n for n, _ in found] == [2, 2, 1]
    both = embedder.encode_query(TEXTS, batch_size=2, batch_tokens=40)
    np.testing.assert_allclose(both, expected, atol=SAME_TEXT_FP32)
    assert all(n <= 2 and tokens <= 40 for n, tokens in found[3:])
    assert len(embedder.encode_tokens(TEXTS, batch_size=1)) == len(TEXTS)
    assert [n for n, _ in found[-5:]] == [1] * 5
    np.testing.assert_allclose(reranker.predict(PAIRS, batch_size=3), scores, atol=SAME_TEXT_FP32)
    reranker.rank(QUERY, TEXTS, batch_size=1)
    assert [n for n, _ in scored] == [3, 2] + [1] * 5


def test_truncate_dim_of_the_object(embedder, peer):
    whole = embedder.encode(TEXTS)
    assert embedder.get_embedding_dimension() == embedder.get_sentence_embedding_dimension() == whole.shape[1]
    with embedder.truncate_embeddings(64), peer.truncate_embeddings(64):
        assert embedder.get_embedding_dimension() == peer.get_embedding_dimension() == 64
        same(embedder.encode(TEXTS), peer.encode(TEXTS, normalize_embeddings=True))
        assert embedder.encode(TEXTS, truncate_dim=32).shape[1] == 32
        with embedder.truncate_embeddings(10_000):
            np.testing.assert_allclose(embedder.encode(TEXTS), whole, atol=SAME_TEXT_FP32)
    assert embedder.truncate_dim is None


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarities(embedder, peer, monkeypatch, name):
    monkeypatch.setattr(embedder, "similarity_fn_name", SimilarityFunction(name))
    monkeypatch.setattr(peer, "similarity_fn_name", name)
    assert embedder.similarity_fn_name == name
    a, b = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    for x, y in ((a, b), (torch.tensor(a), b), (list(a), [torch.tensor(row) for row in b]), (a.tolist(), b)):
        same(embedder.similarity(x, y), peer.similarity(a, b), EMBEDDING_FP32 * 10)  # of vectors up to 3 long
        same(embedder.similarity_pairwise(x, y), peer.similarity_pairwise(a, b), EMBEDDING_FP32 * 10)
    assert embedder.similarity_pairwise(a[0], b[0]).shape == ()
    for x, y in ((a, b[:3]), (a, b[:, :3]), (a[None], b[None])):
        with pytest.raises(InputError, match="similarity_pairwise: expected as many rows of equal length"):
            embedder.similarity_pairwise(x, y)
    with pytest.raises(InputError, match="similarity_fn_name: expected one of cosine, dot"):
        embedder.similarity_fn_name = "angle"


def test_pairwise_of_token_vectors(embedder):
    a, b = embedder.encode_tokens(TEXTS), embedder.encode_tokens(TEXTS[::-1])
    assert torch.equal(embedder.similarity_pairwise(a, b), embedder.similarity(a, b).diagonal())


def test_what_is_set_is_saved_for_them(tmp_path):
    embedder = Embedder.from_pretrained("tiny-embedding", device="cpu")
    embedder.prompts["mine"], embedder.truncate_dim, embedder.similarity_fn_name = "Mine: ", 64, "euclidean"
    embedder.save(tmp_path / "saved")
    again = Embedder.from_pretrained(tmp_path / "saved", device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    for name in ("prompts", "truncate_dim", "similarity_fn_name"):
        assert getattr(again, name) == getattr(theirs, name) == getattr(embedder, name)


def test_prompts_are_chosen_as_by_them(embedder, monkeypatch):
    """Also where a method of one's own takes the place of encode."""
    found = []
    monkeypatch.setattr(embedder, "encode", lambda **options: found.append(options))
    for prompts, document in (
        ({"query": "q", "document": "d", "passage": "p"}, "document"),
        ({"query": "q", "corpus": "c", "passage": "p"}, "passage"),
        ({"query": "q", "corpus": "c"}, "corpus"),
        ({"query": "q"}, None),
    ):
        monkeypatch.setattr(embedder, "prompts", prompts)
        embedder.encode_query(TEXTS)
        embedder.encode_document(TEXTS, batch_size=3)
        embedder.encode_query(TEXTS, prompt="mine")
        of_query, of_document, own = found[-3:]
        assert of_query == {"inputs": TEXTS, "prompt": None, "prompt_name": "query", "task": "query"}
        assert (of_document["prompt_name"], of_document["task"], of_document["batch_size"]) == (document, "document", 3)
        assert (own["prompt"], own["prompt_name"]) == ("mine", None)


def test_max_seq_length(embedder, reranker):
    for opened in (embedder, reranker):
        before = opened.max_seq_length
        assert before == opened.max_length
        opened.max_seq_length = 100
        assert opened.max_length == 100
        for wrong in (0, -1, 2.5, None, 10**9):
            with pytest.raises(InputError, match="max_length: expected"):
                opened.max_seq_length = wrong
        assert opened.max_length == 100
        opened.max_seq_length = before


# ----------------------------------------------------------------------------------------- the reranker


@pytest.mark.parametrize(("tensor", "array"), FLAGS)
@pytest.mark.parametrize(
    "inputs",
    [PAIRS[0], PAIRS, PAIRS[:1], np.array(PAIRS), np.array(PAIRS[0])],
    ids=["pair", "list", "one", "array", "row"],
)
def test_types_and_numbers_of_predict(reranker, cross_peer, inputs, tensor, array):
    """Theirs is the logit by default, of this checkpoint; ours P(yes)."""
    options = {"convert_to_tensor": tensor, "convert_to_numpy": array}
    theirs = cross_peer.predict(inputs, activation_fn=torch.nn.Sigmoid(), **options)
    same(reranker.predict(inputs, **options), theirs, SCORE_FP32)
    same(reranker.predict(inputs, activation_fn=torch.nn.Sigmoid(), **options), theirs, SCORE_FP32)
    logits = reranker.predict(inputs, activation_fn=torch.nn.Identity(), **options)
    same(logits, cross_peer.predict(inputs, **options), LOGIT_FP32 * 20)
    same(logits, reranker.predict(inputs, logit=True, **options), SAME_TEXT_FP32)
    assert len(reranker.predict([], **options)) == len(cross_peer.predict([], **options)) == 0


def test_one_pair_is_a_number(reranker):
    score = reranker.predict(PAIRS[0])
    assert isinstance(score, np.float32)
    assert round(score, 2) == round(float(score), 2)
    assert {score: "hashed"}[score] == "hashed"
    assert f"{score:.3f}" == f"{float(score):.3f}"


def test_an_instruction_as_their_prompt(reranker, cross_peer):
    theirs = cross_peer.predict(PAIRS, prompt="Find music", activation_fn=torch.nn.Sigmoid())
    same(reranker.predict(PAIRS, prompt="Find music"), theirs, SCORE_FP32)
    same(reranker.predict(PAIRS, instruction="Find music"), theirs, SCORE_FP32)
    with pytest.raises(InputError, match="prompt: expected none beside instruction"):
        reranker.predict(PAIRS, prompt="a", instruction="b")


def test_rank_as_theirs(reranker, cross_peer):
    options = {"top_k": 3, "return_documents": True, "activation_fn": torch.nn.Tanh()}
    ours, theirs = (model.rank(QUERY, TEXTS, **options) for model in (reranker, cross_peer))
    assert [(hit["corpus_id"], hit["text"]) for hit in ours] == [(hit["corpus_id"], hit["text"]) for hit in theirs]
    a, b = ([hit["score"] for hit in hits] for hits in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=0, atol=LOGIT_FP32)
    assert all(type(hit["score"]) is float for hit in ours)


def test_softmax_of_several_labels(bases, tmp_path):
    directory = layouts.copy(bases["reranker"], tmp_path / "labels")
    layouts.classifier(directory, 3)
    ours = Reranker.from_pretrained(directory, device="cpu")
    theirs = sentence_transformers.CrossEncoder(str(directory), device="cpu")
    several: list[dict[str, Any]] = [{}, {"apply_softmax": True}, {"activation_fn": torch.nn.Softmax(dim=1)}]
    for inputs in (PAIRS, PAIRS[:1]):
        for options in several:
            same(ours.predict(inputs, **options), theirs.predict(inputs, **options), LOGIT_FP32 * 20)
    assert ours.predict(PAIRS, apply_softmax=True).sum(1) == pytest.approx(1, abs=1e-6)
    assert reranked(ours) == "rank: expected a checkpoint of one score, found 3: bad, fair, good"


def reranked(reranker):
    with pytest.raises(InputError) as error:
        reranker.rank(QUERY, TEXTS)
    return str(error.value)


# -------------------------------------------------------------------------------------- what text may be


class Arrow(list[object]):
    """As pyarrow's arrays, whose items are scalars of its own, and no text."""

    def __iter__(self):
        return iter([object()] * len(self))

    def to_pylist(self):
        return [self[i] for i in range(len(self))]


class Table(dict[str, object]):
    columns = ("text",)


GOOD = {
    "markup": lambda: [markupsafe.Markup(text) for text in TEXTS],
    "numpy": lambda: np.array(TEXTS),
    "numpy, objects": lambda: np.array(TEXTS, dtype=object),
    "generator": lambda: (text for text in TEXTS),
    "deque": lambda: collections.deque(TEXTS),
    "as pyarrow": lambda: Arrow(TEXTS),
    "pandas": lambda: importlib.import_module("pandas").Series(TEXTS),
    "pyarrow": lambda: importlib.import_module("pyarrow").array(TEXTS),
    "polars": lambda: importlib.import_module("polars").Series(TEXTS),
    "datasets": lambda: importlib.import_module("datasets").Dataset.from_dict({"text": TEXTS})["text"],
}
BAD = {
    "table": (lambda: Table(text=TEXTS), "inputs: expected a list, found Table, a table: pass one of its columns"),
    "bytes": (lambda: np.array(TEXTS, dtype="S"), "input 0: expected text (str), found bytes_"),
    "UserString": (lambda: [collections.UserString("a")], "input 0: expected text (str), found UserString"),
    "one UserString": (lambda: collections.UserString("a"), "input 0: expected text (str), found UserString"),
    "Path": (lambda: [TEXTS[0], Path("a")], "input 1: expected text (str), found PosixPath"),
    "one Path": (lambda: Path("a"), "inputs: expected a list, found PosixPath"),
    "nested": (lambda: [TEXTS], "input 0: expected text (str), found list"),
    "pandas": (lambda: importlib.import_module("pandas").DataFrame({"text": TEXTS}), "inputs: expected a list, found"),
    "pyarrow": (lambda: importlib.import_module("pyarrow").table({"text": TEXTS}), "inputs: expected a list, found"),
    "polars": (lambda: importlib.import_module("polars").DataFrame({"text": TEXTS}), "inputs: expected a list, found"),
}


def made(name, make):
    if name in ("pandas", "pyarrow", "polars", "datasets"):
        pytest.importorskip(name)
    return make()


@pytest.mark.parametrize("name", GOOD)
def test_any_container_of_text(embedder, reranker, name):
    """Under a prompt, since a str of another class may add in ways of its own."""
    prompt = "Find <b> & more: "
    expected = embedder.encode(TEXTS, prompt=prompt)
    np.testing.assert_allclose(
        embedder.encode(made(name, GOOD[name]), prompt=prompt), expected, rtol=0, atol=SAME_TEXT_FP32
    )
    tokens = embedder.encode_tokens(made(name, GOOD[name]), prompt=prompt)
    assert tokens.lengths == embedder.encode_tokens(TEXTS, prompt=prompt).lengths
    hits = reranker.rank(QUERY, made(name, GOOD[name]), return_documents=True)
    assert hits == reranker.rank(QUERY, TEXTS, return_documents=True)


def test_a_prompt_that_escapes(embedder):
    for text in ("a < b & c", markupsafe.Markup("a < b & c")):
        found = embedder.encode(text, prompt=markupsafe.Markup("<i>: "))
        np.testing.assert_array_equal(found, embedder.encode("<i>: a < b & c"))


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused(embedder, name):
    make, message = BAD[name]
    for method in (embedder.encode, embedder.encode_document, embedder.encode_tokens):
        with pytest.raises(InputError) as error:
            method(made(name, make))
        assert str(error.value).startswith(message)


def test_pairs_in_any_container(reranker):
    expected = reranker.predict(PAIRS)
    for pairs in (np.array(PAIRS), [np.array(pair) for pair in PAIRS], [list(pair) for pair in PAIRS], iter(PAIRS)):
        np.testing.assert_array_equal(reranker.predict(pairs), expected)
    marked = [(markupsafe.Markup(query), markupsafe.Markup(text)) for query, text in PAIRS]
    np.testing.assert_array_equal(reranker.predict(marked), expected)
    with pytest.raises(InputError, match="pairs: expected a list, found Table, a table"):
        reranker.predict(Table(query=TEXTS))
