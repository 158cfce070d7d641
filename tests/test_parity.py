"""Equal to transformers: embeddings and scores in batches of mixed lengths, hidden states bit for bit.

The checks are functions of a checkpoint alone, so that test_mutations.py can plant mistakes under them.
"""

import functools
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import layouts
import pytest
import torch
from layouts import (
    NORMALIZE,
    OFFICIAL,
    QUERY_IN_SYSTEM,
    WIDTH,
    adapter,
    classifier,
    closing,
    dense,
    edit,
    late_interaction,
    logit_score,
    modules,
    pooled_score,
    pooling,
)
from tolerances import BF16_RATIO, EMBEDDING_FP32, SCORE_FP32
from torch.nn import functional as F

from qwen3core import Embedder, InputError, Reranker, Tokenizer, capture, load_model, pack
from qwen3core.model import DenseLayer
from qwen3core.parity import parity
from qwen3core.weights.layout import read_layout

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

SLOW_SETS = ["torch", *(pytest.param(ops, marks=pytest.mark.slow) for ops in ("reference", "prepacked"))]
TASK = "Given a question, retrieve the passage that answers it"
SENTENCES = (
    "Gravity pulls two bodies towards each other. ",
    "Brot braucht Mehl, Wasser, Salz und Zeit. ",
    "北京是中国的首都。",
    "def f(x): return x**2  # square\n",
)
# 1 token (EOS alone) to about 600 tokens of the small vocabulary.
TEXTS = ["", "a", "yes", *SENTENCES, *(SENTENCES[i % 4] * (i + 2) for i in range(9)), SENTENCES[0] * 22]
MAX_LENGTH = 400  # of the reranker's check: the longest pair is truncated
PAIRS = [(query, text) for query in ("what is gravity?", "Brot") for text in TEXTS]


@functools.lru_cache
def transformers_embeddings(directory, dtype, dim, task=TASK):
    """The model card's recipe: prompts, left padding, last token, cut, normalise."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModel.from_pretrained(directory, dtype=dtype).eval()
    inputs = [f"Instruct: {task}\nQuery:{text}" for text in TEXTS] + TEXTS
    batch = tokenizer(inputs, padding=True, truncation=True, max_length=8192, return_tensors="pt")
    assert batch["attention_mask"].sum(1).min() == 1
    assert batch["attention_mask"].sum(1).max() >= 600
    with torch.no_grad():
        last = model(**batch).last_hidden_state[:, -1]
    return F.normalize(last[:, :dim], p=2, dim=1).float()


@functools.lru_cache
def transformers_scores(directory, dtype, task=TASK):
    """The model card's recipe, verbatim in behaviour: logits of all positions, log_softmax over (no, yes)."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    no, yes = tokenizer.convert_tokens_to_ids("no"), tokenizer.convert_tokens_to_ids("yes")
    prefix = tokenizer.encode(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        add_special_tokens=False,
    )
    suffix = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", add_special_tokens=False)
    bodies = [f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}" for query, document in PAIRS]
    longest = MAX_LENGTH - len(prefix) - len(suffix)
    inputs = tokenizer(
        bodies, padding=False, truncation="longest_first", return_attention_mask=False, max_length=longest
    )
    assert max(map(len, inputs["input_ids"])) == longest
    inputs["input_ids"] = [prefix + ids + suffix for ids in inputs["input_ids"]]
    batch = tokenizer.pad(inputs, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, -1, :]
    return torch.stack([logits[:, no], logits[:, yes]], dim=1).log_softmax(dim=1)[:, 1].exp().float()


def our_embeddings(directory, dtype, ops, dim):
    embedder = Embedder.from_pretrained(directory, dtype=dtype, ops=ops, device="cpu")
    options = {"truncate_dim": dim, "convert_to_tensor": True, "batch_tokens": 1500}
    queries = embedder.encode_query(TEXTS, instruction=TASK, **options)
    return torch.cat([queries, embedder.encode_document(TEXTS, **options)])


def our_scores(directory, dtype, ops):
    reranker = Reranker.from_pretrained(directory, dtype=dtype, ops=ops, device="cpu", max_length=MAX_LENGTH)
    with pytest.warns(UserWarning, match="longer than max_length=400"):
        return reranker.predict(PAIRS, instruction=TASK, convert_to_tensor=True, batch_tokens=3000)


def check_embedding_fp32(directory, ops, dim=48):
    theirs = transformers_embeddings(directory, torch.float32, dim)
    ours = our_embeddings(directory, torch.float32, ops, dim)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= EMBEDDING_FP32


def check_reranker_fp32(directory, ops):
    theirs = transformers_scores(directory, torch.float32)
    assert theirs.std() > 0.05  # scores that differ, or nothing would be tested
    assert (our_scores(directory, torch.float32, ops) - theirs).abs().max() <= SCORE_FP32


def check_bit_identity(directory, dtype):
    """One sequence, reference ops against transformers' eager attention, every layer."""
    model = load_model(directory, dtype=dtype, ops="reference", device="cpu")
    theirs = AutoModel.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    tokenizer = Tokenizer(directory / "tokenizer.json")
    states = {}
    for i, layer in enumerate(theirs.layers):
        layer.register_forward_hook(lambda _, args, out, i=i: states.update({f"layers.{i}.resid_post": out}))
    for text in ("", SENTENCES[1], SENTENCES[0] * 12):
        ids = tokenizer.embedding([text], 8192)
        with torch.no_grad(), capture(model, "embed", "layers.*.resid_post", "final_norm") as acts:
            model(pack(ids))
        states.clear()
        with torch.no_grad():
            out = theirs(torch.tensor(ids), output_hidden_states=True)
        states |= {"embed": out.hidden_states[0], "final_norm": out.last_hidden_state}
        assert states.keys() == acts.keys()
        for name, state in states.items():
            assert torch.equal(acts[name], state[0]), name


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
def test_embeddings_equal_transformers(embedding_dir, ops):
    check_embedding_fp32(embedding_dir, ops)


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
def test_scores_equal_transformers(reranker_dir, ops):
    check_reranker_fp32(reranker_dir, ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_are_bit_identical(embedding_dir, dtype):
    check_bit_identity(embedding_dir, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked"])
def test_bf16_error_is_no_larger_than_transformers(embedding_dir, reranker_dir, ops):
    exact = our_embeddings(embedding_dir, torch.float64, "reference", 64)
    theirs = (transformers_embeddings(embedding_dir, torch.bfloat16, 64) - exact).norm()
    assert (our_embeddings(embedding_dir, torch.bfloat16, ops, 64) - exact).norm() <= BF16_RATIO * theirs

    exact = our_scores(reranker_dir, torch.float64, "reference")
    theirs = (transformers_scores(reranker_dir, torch.bfloat16) - exact).norm()
    assert (our_scores(reranker_dir, torch.bfloat16, ops) - exact).norm() <= BF16_RATIO * theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", SLOW_SETS)
@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_parity_report(request, kind, ops, dtype):
    directory = request.getfixturevalue(f"{kind}_dir")
    report = parity(directory, dtype=dtype, ops=ops)
    assert report.ok, str(report)
    assert [row.point for row in report.rows] == [
        "token ids",
        "embed",
        *(f"layers.{i}.resid_post" for i in range(4)),
        "final_norm",
        "pooled" if kind == "embedding" else "score",
    ]
    assert all(0 < row.error_ours < 0.1 for row in report.rows[2:])


def test_parity_report_sees_wrong_ids(embedding_dir, tmp_path):
    """A tokenizer.json that does not append EOS: sentence-transformers then pools another token than we do."""
    directory = layouts.copy(embedding_dir, tmp_path / "no-eos")
    layouts.closing(directory)
    with pytest.warns(UserWarning, match="post_processor"):
        report = parity(directory, dtype="float32", texts=["one", "two"])
    assert [row.point for row in report.rows] == ["token ids", "pooled"]  # no text has rows to compare
    assert report.rows[0].max_abs == 2
    assert not any(row.ok for row in report.rows)


def undeclared(directory, template=None):
    """No modules.json, and perhaps a template of pairs."""
    if template:
        logit_score(directory, template=template)
    (directory / "modules.json").unlink(missing_ok=True)


SCORE = dense(WIDTH, 1, "Identity", module_output_name="scores")
LAYOUTS: dict[str, tuple[str, Any]] = {
    "mean pooling": ("embedding", lambda d: modules(d, pooling("mean"), NORMALIZE)),
    "prompt not pooled": ("embedding", lambda d: modules(d, pooling("mean", include_prompt=False))),
    "Dense": ("embedding", lambda d: modules(d, pooling(), dense(WIDTH, 24))),
    "closing token": ("embedding", lambda d: closing(d, "<|im_end|>")),
    "truncate_dim": ("embedding", lambda d: edit(d, "config_sentence_transformers.json", truncate_dim=16)),
    "bidirectional": ("embedding", lambda d: edit(d, "config.json", is_causal=False)),
    "YaRN": ("embedding", lambda d: edit(d, "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})),
    "adapter": ("embedding", adapter),
    "late interaction": ("embedding", late_interaction),
    "undeclared embedding": ("embedding", undeclared),
    "answers": ("reranker", lambda d: logit_score(d, "1", "0")),
    "template": ("reranker", lambda d: logit_score(d, template=QUERY_IN_SYSTEM)),
    "score head": ("reranker", classifier),
    "Pooling and Dense": ("reranker", lambda d: pooled_score(d, pooling(), SCORE)),
    "undeclared reranker": ("reranker", lambda d: None),
    "undeclared template": ("reranker", lambda d: undeclared(d, OFFICIAL.replace("meets", "fits"))),
    "undeclared score head": ("reranker", lambda d: classifier(d, 3, declared=False)),
}
"""What stands around the decoder, and is compared with what sentence-transformers or transformers makes of it."""


@pytest.fixture
def checkpoint(tmp_path):
    """A function of a row of LAYOUTS that gives its directory."""

    def write(name):
        kind, change = LAYOUTS[name]
        directory = layouts.base(tmp_path / "checkpoint", kind)
        change(directory)
        return directory

    return write


@pytest.mark.parametrize("name", LAYOUTS)
def test_parity_with_what_is_declared(checkpoint, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = parity(checkpoint(name), job=LAYOUTS[name][0] if "undeclared" in name else None, dtype="float32")
    assert report.ok, str(report)
    assert ("sentence-transformers" in report.title) == ("undeclared" not in name)
    points = {"late interaction": "token vectors", "embedding": "pooled", "reranker": "score"}
    assert report.rows[-1].point == points.get(name, points[LAYOUTS[name][0]])
    assert len(report.rows) == 6


def of_template(change):
    return lambda layout: replace(layout, template=replace(layout.template, body=change(layout.template.body)))


MISTAKES = {
    "another pooling": ("mean pooling", ["pooled"], lambda layout: replace(layout, pooling=("max",))),
    "prompt pooled": ("prompt not pooled", ["pooled"], lambda layout: replace(layout, include_prompt=True)),
    "normalised": ("prompt not pooled", ["pooled"], lambda layout: replace(layout, normalize=True)),
    "truncated less": ("truncate_dim", ["pooled"], lambda layout: replace(layout, truncate_dim=17)),
    "activation of Dense": (
        "Dense",
        ["pooled"],
        lambda layout: replace(layout, modules=(replace(layout.modules[0], activation="ReLU"),)),
    ),
    "answers swapped": ("answers", ["score"], lambda layout: replace(layout, answers=layout.answers[::-1])),
    "a newline more": ("template", ["token ids", "score"], of_template(lambda body: (*body[:-1], body[-1] + "\n"))),
    "activation of the score": ("score head", ["score"], lambda layout: replace(layout, activation="Identity")),
    "a space more, transformers": (
        "undeclared score head",
        ["token ids", "score"],
        of_template(lambda body: (body[0] + " ", *body[1:])),
    ),
    "query prompt": (
        "undeclared embedding",
        ["token ids", "pooled"],
        lambda layout: replace(layout, prompts={"query": "Q: "}),
    ),
}
"""A row of LAYOUTS, the points that must fail, and what we make of the layout by mistake."""


@pytest.mark.parametrize("name", MISTAKES)
def test_parity_sees_a_layout_misread(checkpoint, monkeypatch, name):
    row, points, mistake = MISTAKES[name]
    directory = checkpoint(row)
    monkeypatch.setattr("qwen3core.parity.read_layout", lambda *args, **options: mistake(read_layout(*args, **options)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = parity(directory, job=LAYOUTS[row][0] if "undeclared" in row else None, dtype="float32")
    assert [row.point for row in report.rows if not row.ok] == points, str(report)


def test_parity_sees_a_bias_left_out(checkpoint, monkeypatch):
    monkeypatch.setattr(DenseLayer, "forward", lambda self, x: F.linear(x, self.linear.weight).tanh())
    report = parity(checkpoint("Dense"), dtype="float32")
    assert [row.point for row in report.rows if not row.ok] == ["pooled"], str(report)


def test_parity_names_the_library_that_is_missing(embedding_dir, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("qwen3core.parity.version", missing)
    with pytest.raises(InputError, match=r"expected sentence-transformers .* pip install sentence-transformers"):
        parity(embedding_dir)
