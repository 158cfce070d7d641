"""Synthesized checkpoints: the official files, open to the peers, dependent on every part, the same from a seed."""

import hashlib
import json

import numpy as np
import pytest
import torch
from tolerances import EMBEDDING_FP32

from qwen3core import Embedder, InputError, Reranker, capture, load_model, pack
from qwen3core.weights.synthesize import LAYOUTS, synthesize

TEXTS = ["Gravity is a force.", "北京是中国的首都。", "Brot braucht Zeit. " * 20]


def test_official_files(embedding_dir, reranker_dir, facts):
    for kind, directory in (("embedding", embedding_dir), ("reranker", reranker_dir)):
        official = {f.split(" | ")[0] for f in facts["repository_files"]["embedding"]}
        if kind == "reranker":  # as since 2026
            official -= {"1_Pooling/config.json"}
            official |= {"1_LogitScore/config.json", "sentence_bert_config.json", "chat_template.jinja"}
        files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
        assert files == official
    prompts = json.loads((embedding_dir / "config_sentence_transformers.json").read_text("utf-8"))
    assert prompts == facts["repository_files"]["config_sentence_transformers"]


def test_sentence_transformers_opens_it_with_equal_results(embedding_dir):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    options = {"device": "cpu", "model_kwargs": {"dtype": torch.float32}}
    peer = sentence_transformers.SentenceTransformer(str(embedding_dir), **options)
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    for theirs, ours in (
        (peer.encode_query(TEXTS), embedder.encode_query(TEXTS)),
        (peer.encode_document(TEXTS), embedder.encode_document(TEXTS)),
        (peer.encode(TEXTS, prompt_name="query"), embedder.encode(TEXTS, prompt_name="query")),
        (peer.encode(TEXTS, prompt="a: "), embedder.encode(TEXTS, prompt="a: ")),
        (peer.encode(TEXTS[0]), embedder.encode(TEXTS[0])),
    ):
        assert theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() <= EMBEDDING_FP32
    similarity = peer.similarity(peer.encode(TEXTS), peer.encode(TEXTS))
    ours = embedder.encode(TEXTS)
    assert (embedder.similarity(ours, ours) - similarity).abs().max() <= EMBEDDING_FP32


@pytest.mark.parametrize("name", ["Qwen3-Embedding-small", "Qwen3-Reranker-small"])
def test_activations_are_well_conditioned(tmp_path, name):
    """Unit variance after each norm, no part negligible: what a layer adds is felt in the stream."""
    model = load_model(synthesize(tmp_path, name, seed=1), dtype="float32", device="cpu")
    ids = torch.randint(0, 500, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(), capture(model, "*") as acts:
        model.pool(model(batch := pack([ids])), batch)
    for i in range(4):
        for point in ("attn_norm", "mlp_norm"):
            assert 0.7 < acts[f"layers.{i}.{point}"].std() < 1.5
        for point in ("attn_out", "mlp_out"):
            assert 0.05 < acts[f"layers.{i}.{point}"].std() / acts[f"layers.{i}.resid_pre"].std() < 2
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight - 1).abs().max() > 0.4, name


def test_scores_do_not_saturate(reranker_dir):
    scores = Reranker.from_pretrained(reranker_dir).predict([("what?", f"{t} {i}") for i in range(20) for t in TEXTS])
    assert scores.min() > 0.01
    assert scores.max() < 0.99
    assert scores.std() > 0.03


def digest(directory):
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes(tmp_path, embedding_dir):
    assert digest(synthesize(tmp_path / "same")) == digest(embedding_dir)
    other = digest(synthesize(tmp_path / "other", seed=1))
    assert {name for name, value in digest(embedding_dir).items() if other[name] != value} == {"model.safetensors"}


def test_untied_lm_head_opens_in_transformers(tmp_path):
    """lm_head.weight has no prefix, and is used by both."""
    transformers = pytest.importorskip("transformers")
    small = LAYOUTS["Qwen3-Reranker-small"]
    untied = type(small)(type(small.config)(**{**vars(small.config), "tie_word_embeddings": False}), "reranker", 2)
    synthesize(tmp_path, untied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    reranker = Reranker.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(theirs.lm_head.weight, reranker.model.get_parameter("lm_head.weight"))
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert np.isfinite(reranker.predict(("q", "d")))


def test_unknown_layout(tmp_path):
    with pytest.raises(InputError, match=r"layout: expected one of .*Qwen3-Embedding-8B.*, found 'Qwen3-1B'"):
        synthesize(tmp_path, "Qwen3-1B")
