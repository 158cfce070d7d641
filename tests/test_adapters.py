"""PEFT LoRA directories: the numbers of transformers with peft, and every form that is not honoured refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from checkpoint_files import clear, edit_json, edit_tensors
from huggingface_hub import constants

from qwen3core import CheckpointError, Embedder, InputError
from qwen3core.batch import pack
from qwen3core.commands import main
from qwen3core.weights.build import load_model
from qwen3core.weights.find import ADAPTER, ADAPTER_CONFIG, SINGLE, base_directory, find
from qwen3core.weights.merge import merge
from qwen3core.weights.synthesize import LAYOUTS, synthesize
from qwen3core.weights.tensors import Tensors, rewrite

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = list(range(300, 320))
Q_PROJ = "layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = LORA_A.replace("lora_A", "lora_B")


def checkpoint(directory: Path, kind: str = "Reranker", *, tied: bool = True) -> Path:
    """In float32, of two layers."""
    layout = LAYOUTS[f"Qwen3-{kind}-small"]
    config = replace(layout.config, dtype="float32", num_hidden_layers=2, tie_word_embeddings=tied)
    return synthesize(directory, replace(layout, config=config))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Checkpoints by whether the lm_head is tied; read only."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: checkpoint(root / f"tied {tied}", tied=tied) for tied in (True, False)}


def adapt(base: Path, folder: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> Path:
    """An adapter of random values, written by peft."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(getattr(transformers, auto).from_pretrained(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(bases, tmp_path):
    """An adapter of a tied base, to be changed."""
    return adapt(bases[True], tmp_path / "adapter")


def same_numbers(directory: Path, plain: Path, auto: str = "AutoModelForCausalLM") -> None:
    """Logits, or of AutoModel hidden states, are those of transformers, and others than those of ``plain``."""
    theirs = getattr(transformers, auto)
    model = load_model(directory, dtype="float32", device="cpu", lm_head=True)
    with torch.no_grad():
        expected, base = (theirs.from_pretrained(path)(torch.tensor([IDS]))[0][0] for path in (directory, plain))
        found = model(pack([IDS]))
        found = found if auto == "AutoModel" else found @ model.get_parameter(model.lm_head_name).T
    assert (found - expected).abs().max() <= tolerances.HIDDEN_FP32 * expected.abs().max()
    assert (expected - base).abs().max() > 0.01 * base.abs().max()


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 8, "layers.1.mlp.*": 6},
        "alpha_pattern": {
            "_proj": 90,
            "layers.0": 91,
            "down_proj": 3,
            "down_.*": 92,
        },  # the first two match no whole name
    },
    "patterns, rank-stabilised": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 1}},
    "by expression": {"target_modules": r".*\.1\.(self_attn\.[qkvo]_proj|mlp\.up_proj)"},
    "every matrix": {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    "of one layer": {"layers_to_transform": [1], "lora_dropout": 0.1},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "lm_head whole": {"modules_to_save": ["lm_head"]},
    "norms whole": {"modules_to_save": ["input_layernorm", "norm"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "lm_head": {"target_modules": ["lm_head", "v_proj"]},
    "embeddings and lm_head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_that_are_honoured(bases, tmp_path, form, tied):
    same_numbers(adapt(bases[tied], tmp_path / "adapter", **FORMS[form]), bases[tied])


@pytest.mark.parametrize("saved", ["AutoModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize("opened", ["AutoModel", "AutoModelForCausalLM"])
def test_keys_with_and_without_the_prefix(bases, tmp_path, saved, opened):
    same_numbers(adapt(bases[True], tmp_path / "adapter", saved), bases[True], opened)


def test_a_score_matrix_that_the_base_lacks(bases, tmp_path):
    auto = "AutoModelForSequenceClassification"
    adapter = adapt(bases[True], tmp_path / "adapter", auto, task_type="SEQ_CLS")
    theirs = getattr(transformers, auto).from_pretrained(adapter)
    assert torch.equal(Tensors(adapter)["score.weight"], theirs.score.modules_to_save["default"].weight)


def test_an_adapter_beside_full_weights(bases, tmp_path):
    """They are what it is for, whatever base_model_name_or_path says."""
    directory = checkpoint(tmp_path / "directory")
    changed = 2 * Tensors(directory)[Q_PROJ]
    edit_tensors(directory / SINGLE, lambda tensors: tensors.update({f"model.{Q_PROJ}": changed}))
    adapt(bases[True], directory)
    assert base_directory(directory) == directory
    same_numbers(directory, bases[True])
    assert (Tensors(directory)[Q_PROJ] - changed).abs().max() < (Tensors(directory)[Q_PROJ] - changed / 2).abs().max()


def test_only_what_it_touches_is_read(bases, adapter):
    stored, base = Tensors(adapter), Tensors(bases[True])
    changed = {name for name in base if not torch.equal(stored[name], base[name])}
    assert changed == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    model = load_model(adapter, device="cpu")
    pages = {name for name, weight in model.state_dict().items() if not weight.untyped_storage().resizable()}
    assert pages == set(base) - changed


def test_it_is_added_before_rounding(embedding_dir, tmp_path):
    """A base in bfloat16: float32 holds the sum, and any other dtype its rounding."""
    adapter = adapt(embedding_dir, tmp_path / "adapter", "AutoModel")
    merged = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(embedding_dir, dtype=torch.float32), adapter
    ).merge_and_unload()
    expected = merged.get_parameter(Q_PROJ)
    found = {
        dtype: load_model(adapter, dtype=dtype, device="cpu").get_parameter(Q_PROJ) for dtype in ("float32", "bfloat16")
    }
    assert (found["float32"] - expected).norm() <= tolerances.REORDERED_FP32 * expected.norm()
    assert torch.equal(found["bfloat16"], found["float32"].bfloat16())


def test_the_adapter_of_a_training_opens_as_its_merged_checkpoint(tmp_path):
    base = checkpoint(tmp_path / "base", "Embedding")
    rows = [{"query": f"what is {a}", "response": f"{a} is a thing"} for a in ("gold", "bread", "chess", "an owl")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    flags = ["--lora", "2", "--batch-size", "4", "--epochs", "3", "--learning-rate", "0.01"]
    assert main(["train", str(base), str(tmp_path / "data.jsonl"), "-o", str(out), *flags]) == 0
    plain, merged, adapted = (Embedder.from_pretrained(path).encode("gold") for path in (base, out, out / "adapter"))
    assert abs(adapted - merged).max() <= tolerances.SAME_TEXT_FP32
    assert abs(adapted - plain).max() > 1e-3


# ------------------------------------------------------------------------------------------- the base model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline; a function that puts a directory there as the main revision of a name."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(directory: Path, name: str, revision: str = "main") -> Path:
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        commit = f"{len(list((repo / 'refs').iterdir())):040d}"
        (repo / "refs" / revision).write_text(commit)
        return shutil.copytree(directory, repo / "snapshots" / commit)

    return put


def test_the_base_is_found_by_path_or_hub_id(bases, adapter, hub, tmp_path, monkeypatch):
    expected = Tensors(adapter)[Q_PROJ]
    monkeypatch.chdir(bases[True].parent)
    edit_json(
        adapter / ADAPTER_CONFIG, base_model_name_or_path=bases[True].name
    )  # from the working directory, as theirs
    assert torch.equal(Tensors(adapter)[Q_PROJ], expected)
    other = checkpoint(tmp_path / "other", tied=False)
    main, fork = hub(bases[True], "someone/base"), hub(other, "someone/base", "fork")
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="someone/base")
    assert base_directory(adapter) == main
    edit_json(adapter / ADAPTER_CONFIG, revision="fork")
    assert base_directory(adapter) == fork


def test_a_hub_id_of_an_adapter(bases, adapter, hub, tmp_path):
    """Alone it is found, without a tokenizer of its own; beside full weights, transformers makes two models of it."""
    snapshot = hub(adapter, "someone/adapter")
    assert find("someone/adapter") == snapshot
    shutil.copyfile(bases[True] / SINGLE, snapshot / SINGLE)
    with pytest.raises(CheckpointError, match=r"someone/adapter: expected .* found both"):
        find("someone/adapter")


# --------------------------------------------------------------------------------------------------- refused

CONFIGS: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"peft_type": "LOHA"}, ("peft_type", "'LORA'", "'LOHA'")),
    ({"peft_type": None}, ("peft_type", "None")),
    ({"use_dora": True}, ("use_dora", "True")),
    ({"bias": "all"}, ("bias", "'none'", "'all'")),
    ({"lora_bias": True}, ("lora_bias",)),
    ({"fan_in_fan_out": True}, ("fan_in_fan_out",)),
    ({"layer_replication": [[0, 1], [0, 2]]}, ("layer_replication",)),
    ({"trainable_token_indices": [3]}, ("trainable_token_indices",)),
    ({"alora_invocation_tokens": [3]}, ("alora_invocation_tokens",)),
    ({"megatron_config": {"a": 1}}, ("megatron_config",)),
    ({"init_lora_weights": "pissa"}, ("init_lora_weights", "'pissa'")),
    ({"use_qalora": True}, ("use_qalora",)),
    ({"target_parameters": ["a"]}, ("target_parameters",)),
    ({"an_option_of_the_future": 2}, ("an_option_of_the_future", "2")),
    ({"modules_to_save": "embed_tokens"}, ("modules_to_save", "'embed_tokens'")),
    ({"r": 8}, (".weight: expected matrices", "rank 8", "[4, ")),
    ({"r": 0}, ("r, rank_pattern: expected a positive number", "0")),
    ({"lora_alpha": float("nan")}, ("lora_alpha", "nan")),
    ({"lora_alpha": "6"}, ("lora_alpha", "'6'")),
    ({"rank_pattern": {"q_proj": 5}}, (Q_PROJ, "rank 5")),
    ({"rank_pattern": {"(": 5}}, ("rank_pattern", "regular expressions")),
    ({"alpha_pattern": ["q_proj"]}, ("alpha_pattern", "regular expressions")),
    ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}}, ("alpha_pattern", "'model.'", "64")),
    ({"base_model_name_or_path": None}, ("base_model_name_or_path", "None")),
    ({"base_model_name_or_path": "no/where/here"}, ("base_model_name_or_path", "no/where/here", "nothing there")),
]


def refused(directory: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        load_model(directory, device="cpu")
    assert not [part for part in (ADAPTER_CONFIG[:7], *parts) if part not in str(info.value)], info.value
    assert clear(str(info.value)), info.value


@pytest.mark.parametrize(("changed", "parts"), CONFIGS, ids=[str(case)[:60] for case, _ in CONFIGS])
def test_config_refused(adapter, changed, parts):
    edit_json(adapter / ADAPTER_CONFIG, **changed)
    refused(adapter, *parts)


def renamed(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


KEYS = {
    "not LoRA's": (lambda t: t.update({"base_model.model.norm.weight": torch.ones(64)}), ("unexpected tensor", "norm")),
    "no prefix": (renamed(LORA_A, LORA_A.removeprefix("base_model.model.")), ("unexpected tensor", "lora_A")),
    "DoRA's": (
        lambda t: t.update({LORA_A.replace("A.weight", "magnitude_vector"): torch.ones(4)}),
        ("unexpected tensor", "magnitude"),
    ),
    "a bias": (
        lambda t: t.update({LORA_A.replace("A.weight", "B.bias"): torch.ones(4)}),
        ("unexpected tensor", "bias"),
    ),
    "A alone": (lambda t: t.pop(LORA_B), (Q_PROJ, "A and B")),
    "twice": (
        lambda t: t.update({LORA_A.replace("model.model.", "model.", 1): t[LORA_A].clone()}),
        ("once", repr(LORA_A)),
    ),
    "other rank": (lambda t: t.update({LORA_A: t[LORA_A][:3].clone()}), (Q_PROJ, "rank 4", "[3, 64]")),
    "other rank of B": (lambda t: t.update({LORA_B: t[LORA_B][:, :3].clone()}), (Q_PROJ, "rank 4", ", 3]]")),
    "one dimension": (lambda t: t.update({LORA_A: t[LORA_A][0].clone()}), (Q_PROJ, "rank 4", "[64]")),
    "other width": (lambda t: t.update({LORA_A: t[LORA_A][:, :60].clone()}), (Q_PROJ, "64]", "60]")),
    "other matrix": (
        lambda t: [renamed(k, k.replace("q_proj", "x_proj"))(t) for k in list(t) if "0.self_attn.q_proj" in k],
        ("missing tensor", "x_proj"),
    ),
    "other layer": (
        lambda t: [renamed(k, k.replace("layers.1", "layers.2"))(t) for k in list(t) if "layers.1" in k],
        ("missing tensor", "layers.2"),
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_tensors_refused(adapter, case):
    change, parts = KEYS[case]
    edit_tensors(adapter / ADAPTER, change)
    with pytest.raises(CheckpointError) as info:
        load_model(adapter, device="cpu")
    assert not [part for part in parts if part not in str(info.value)], info.value
    assert clear(str(info.value)), info.value


def test_files_refused(bases, adapter, tmp_path):
    (adapter / ADAPTER).rename(adapter / "adapter_model.bin")
    refused(adapter, "adapter_model.bin", "pickle")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, ADAPTER, "nothing")
    other = adapt(bases[True], tmp_path / "other")
    edit_json(other / ADAPTER_CONFIG, base_model_name_or_path=str(adapter))
    refused(other, "a full model", "an adapter in")


def test_nothing_is_made_from_an_adapter(bases, adapter, tmp_path, capsys):
    stored = Tensors(adapter)
    with pytest.raises(InputError, match=r"expected a checkpoint of full weights .*merge the adapter first"):
        rewrite(adapter, tmp_path / "out", stored.__getitem__)
    with pytest.raises(InputError, match="expected a checkpoint of full weights"):
        merge([bases[True], adapter], tmp_path / "out")
    assert main(["train", str(adapter), "absent.jsonl", "-o", str(tmp_path / "out")]) == 2
    assert "expected a checkpoint of full weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
