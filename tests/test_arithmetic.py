"""What config.json may say of attention and RoPE: bit for bit what transformers computes, or refused by name."""

import shutil
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from checkpoint_files import edit_json
from test_parity import check_bit_identity
from tolerances import EMBEDDING_FP32, SAME_TEXT_FP32

from qwen3core import (
    CheckpointError,
    Embedder,
    InputError,
    Layout,
    Ops,
    Qwen3Config,
    Qwen3Model,
    capture,
    load_model,
    pack,
    reference,
)
from qwen3core.config import Yarn
from qwen3core.model import rope_cos_sin

pytest.importorskip("transformers")
from transformers import AutoModel
from transformers import Qwen3Config as TransformersConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

NUMBERS: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
LONG: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN: dict[str, dict[str, Any]] = {
    "as the model cards say": LONG,
    "type": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "of the whole length": {"rope_type": "yarn", "factor": 2},
    "betas": LONG | {"beta_fast": 16, "beta_slow": 2.5},
    "equal betas": LONG | {"beta_fast": 4, "beta_slow": 4, "truncate": False},
    "attention_factor": LONG | {"attention_factor": 1.25},
    "two mscales": LONG | {"mscale": 0.707, "mscale_all_dim": 1.5},
    "one mscale": LONG | {"mscale": 0.707},
    "not truncated": LONG | {"truncate": False},
    "factor 1": LONG | {"factor": 1.0},
    "shrunk": LONG | {"factor": 0.5},
    "short, so that the range is cut": LONG | {"original_max_position_embeddings": 16},
    "nulls": LONG | {"beta_fast": None, "attention_factor": None, "mscale": None},
}


@pytest.fixture
def changed(embedding_dir, tmp_path):
    """A function that copies the small checkpoint with another config.json."""

    def change(*removed, **options):
        directory = shutil.copytree(embedding_dir, tmp_path / "changed", dirs_exist_ok=True)
        edit_json(directory / "config.json", *removed, **options)
        return directory

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", YARN)
def test_cos_and_sin_of_yarn_are_bit_identical(name, dtype):
    data = {**NUMBERS, "rope_scaling": YARN[name]}
    positions = torch.tensor([*range(300), 4095, 32767, 32768, 70001, 131071])
    expected = Qwen3RotaryEmbedding(TransformersConfig(**data))(torch.empty(0, dtype=dtype), positions[None])
    found = rope_cos_sin(positions, Qwen3Config.from_dict(data), dtype)
    plain = rope_cos_sin(positions, Qwen3Config.from_dict(NUMBERS), dtype)
    for ours, theirs, other in zip(found, expected, plain, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs[0])
        assert torch.equal(ours, other) == (name == "factor 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_yarn_is_bit_identical(changed, dtype):
    directory = changed(rope_scaling={**LONG, "original_max_position_embeddings": 64})
    assert load_model(directory, device="cpu").config.rope_scaling == Yarn(4.0, 64)
    check_bit_identity(directory, dtype)


def test_yarn_stretches_the_longest_text(changed):
    directory = changed(rope_scaling=LONG)
    assert Embedder.from_pretrained(directory, device="cpu", max_length=131_072).max_length == 131_072
    with pytest.raises(InputError, match="max_length: expected at most 131072, the model's limit, found 131073"):
        Embedder.from_pretrained(directory, device="cpu", max_length=131_073)
    for original, limit in ((8192, 40960), (None, 4 * 40960)):
        data = {**NUMBERS, "rope_scaling": {**LONG, "original_max_position_embeddings": original}}
        assert Qwen3Config.from_dict(data).position_limit == limit


def spelled(**changes):
    return Qwen3Config.from_dict({name: value for name, value in {**NUMBERS, **changes}.items() if value is not None})


def test_spellings_read_alike():
    """transformers 4 and 5, and both at once where they agree."""
    theta = {"rope_theta": 1e6}
    same: dict[str, list[dict[str, Any]]] = {
        "default": [
            {"rope_parameters": {"rope_type": "default"}},
            {"rope_theta": None, "rope_parameters": theta},
            {"rope_parameters": {**theta, "rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}},
        ],
        "yarn": [
            {"rope_scaling": YARN["type"]},
            {"rope_parameters": LONG},
            {"rope_theta": None, "rope_parameters": LONG | theta},
            {"rope_scaling": LONG, "rope_parameters": LONG},
            {"rope_scaling": LONG, "original_max_position_embeddings": 32768},
            {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32768},
        ],
        "dtype": [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "float16", "torch_dtype": "float16"}],
    }
    expected = {"default": spelled(), "yarn": replace(spelled(), rope_scaling=Yarn(4.0, 32768))}
    expected["dtype"] = replace(spelled(), dtype="float16")
    for name, spellings in same.items():
        for changes in spellings:
            assert spelled(**changes) == expected[name], changes
    config = spelled(rope_scaling=LONG, is_causal=False)
    assert Qwen3Config.from_dict({"model_type": "qwen3", **asdict(config)}) == config


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "dtype: 'float16', torch_dtype: 'bfloat16'": {"dtype": "float16", "torch_dtype": "bfloat16"},
    "rope_theta: 1000000.0, rope_parameters.rope_theta: 10000.0": {"rope_parameters": {"rope_theta": 1e4}},
    "rope_theta: 1000000.0, rope_scaling.rope_theta: 10000.0": {"rope_scaling": LONG | {"rope_theta": 1e4}},
    "rope_scaling.rope_type: 'yarn', rope_scaling.type: 'default'": {"rope_scaling": LONG | {"type": "default"}},
    "rope_scaling: {.*}, rope_parameters: {.*}": {"rope_scaling": LONG, "rope_parameters": {"rope_type": "default"}},
    "original_max_position_embeddings: 4096, rope_scaling.original_max_position_embeddings: 32768": {
        "rope_scaling": LONG,
        "original_max_position_embeddings": 4096,
    },
    "use_bidirectional_attention: expected False, as is_causal is True, found True": {
        "use_bidirectional_attention": True
    },
    "use_bidirectional_attention: expected True, as is_causal is False, found False": {
        "use_bidirectional_attention": False,
        "is_causal": False,
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_contradictions_are_refused(message):
    with pytest.raises(CheckpointError, match=message):
        Qwen3Config.from_dict(NUMBERS | CONTRADICTIONS[message])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("also", [{}, {"use_bidirectional_attention": True}, {"layer_types": ["full_attention"] * 4}])
def test_attention_both_ways_is_bit_identical(changed, also, dtype):
    check_bit_identity(changed(is_causal=False, **also), dtype)


@pytest.mark.parametrize(
    ("declared", "read"),
    [
        ({"is_causal": False}, {"is_causal": True}),
        ({"rope_scaling": LONG}, {"rope_scaling": None}),
        ({"rope_scaling": LONG}, {"rope_scaling": Yarn(4.0, 40960)}),
        ({"rope_scaling": LONG}, {"rope_scaling": Yarn(4.0, 32768, attention_factor=1.0)}),
        ({"rope_scaling": LONG}, {"rope_scaling": Yarn(4.0, 32768, truncate=False)}),
    ],
)
def test_a_declaration_read_wrong_is_noticed(changed, monkeypatch, declared, read):
    right = Qwen3Config.from_dict
    monkeypatch.setattr(Qwen3Config, "from_dict", lambda *args: replace(right(*args), **read))
    with pytest.raises(AssertionError, match=r"layers\.0\.resid_post"):
        check_bit_identity(changed(**declared), torch.float32)


@pytest.mark.parametrize("ops", ["reference", "torch", "prepacked", "triton"])
def test_attention_both_ways_takes_no_shortcut(changed, ops):
    """Prompts and equal texts are computed in full, and right: as while all is captured, and as by transformers."""
    embedder = Embedder.from_pretrained(changed(is_causal=False), dtype="float32", device="cpu", ops=ops)
    model, texts = embedder.model, ["gravity", "bread and water", "gravity", "x" * 40]
    assert not model.shortcuts
    found = embedder.encode_query(texts, convert_to_tensor=True)
    with capture(model, "pooled"):
        assert (embedder.encode_query(texts, convert_to_tensor=True) - found).abs().max() <= SAME_TEXT_FP32
    theirs = AutoModel.from_pretrained(changed(is_causal=False), dtype=torch.float32).eval()
    for text, vector in zip(texts, found, strict=True):
        ids = embedder.tokenizer.embedding([embedder.prompts["query"] + text], 512)
        with torch.no_grad():
            last = theirs(torch.tensor(ids)).last_hidden_state[0, -1]
        assert (torch.nn.functional.normalize(last, dim=0) - vector).abs().max() <= EMBEDDING_FP32
    batch = pack([[1, 2, 3], [1, 2, 4]], prefixes=[(1, 2), (1, 2)])
    with pytest.raises(InputError, match="pack: prefixes: expected a causal model, found is_causal false"):
        model.embed(batch)


def test_an_attention_that_knows_no_causal_serves_causal_models_alone(embedding_dir, changed):
    def mine(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        return reference.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    model = load_model(embedding_dir, dtype="float32", device="cpu", ops=replace(Ops.reference(), attention=mine))
    assert model.embed(pack([[1, 2, 3]])).shape == (1, 64)
    both_ways = load_model(changed(is_causal=False), dtype="float32", device="cpu", ops=model.ops)
    with pytest.raises(InputError, match=r"ops: expected a function that takes causal= .*mine"):
        both_ways.embed(pack([[1, 2, 3]]))
    mean = Qwen3Model(
        both_ways.config,
        replace(Ops.reference(), pool=lambda *args: reference.pool(*args)),
        layout=Layout(pooling=("mean",)),
    )
    with pytest.raises(InputError, match=r"ops: expected a function that takes modes= .*lambda"):
        mean.embed(pack([[1, 2, 3]]))
