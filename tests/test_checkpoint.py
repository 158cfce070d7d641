"""Loading: the official layouts at full size, every accepted form, and every broken file refused in clear words."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_files import SHARD_1, SHARD_2, clear, edit_header, edit_json, edit_tensors, join, relayout, split, tiny
from huggingface_hub import constants
from limits import umask
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from tokenizers import Tokenizer as Backend
from tokenizers import models

from qwen3core import CheckpointError, Embedder, InputError, Qwen3Config, Reranker
from qwen3core.layout import Layout
from qwen3core.weights import find, precision, tensors
from qwen3core.weights.build import load_model, open_model
from qwen3core.weights.synthesize import LAYOUTS, synthesize
from qwen3core.weights.tensors import INDEX, SINGLE, Tensors, rewrite

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = [name for name in LAYOUTS if not name.endswith("-small")]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, read by the safetensors library alone, without the prefix."""
    files = [parse(file.read_bytes()) for file in directory.glob("*.safetensors")]
    return {key.removeprefix("model."): tensor for tensors in files for key, tensor in tensors.items()}


def reprefix(directory: Path, prefix: str) -> None:
    """Give every key of the decoder the prefix, in files and index."""

    def rename(values: dict) -> dict:
        bare = {key.removeprefix("model."): value for key, value in values.items()}
        return {key if key in ("lm_head.weight", "__metadata__") else prefix + key: v for key, v in bare.items()}

    for file in directory.glob("*.safetensors"):
        header, data = split(file.read_bytes())
        file.write_bytes(join(rename(header), data))
    if (directory / INDEX).exists():
        edit_json(directory / INDEX, weight_map=rename(json.loads((directory / INDEX).read_text())["weight_map"]))


def in_files(model: torch.nn.Module, directory: Path) -> list[bool]:
    """Whether each parameter lies in pages of a file of the directory."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(x, 16) for x in m[0].split("-")] for m in maps if len(m) == 6 and Path(m[5]).parent == directory]
    return [any(a <= p.data_ptr() and p.data_ptr() + p.nbytes <= b for a, b in ranges) for p in model.parameters()]


def refused(call: Callable[[], object], *parts: str, error: type[Exception] = CheckpointError) -> None:
    """The call raises ``error``, whose message is clear and has every part."""
    with pytest.raises(error) as info:
        call()
    absent = [part for part in parts if part not in str(info.value)]
    assert not absent, f"{absent} not in: {info.value}"
    assert clear(str(info.value)), info.value


def run_python(code: str, *args: object) -> dict:
    """What a fresh Python prints, as JSON."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


# ------------------------------------------------------------------------------------------- official layouts


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Directory of an official layout by name: real headers over holes; no disk, read only."""
    root = tmp_path_factory.mktemp("official")
    return lambda name: root / name if (root / name).exists() else synthesize(root / name, name, sparse=True)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.endswith("0.6B") else pytest.mark.slow) for name in OFFICIAL]
)
def test_official_layouts_load_strictly(official, name):
    directory, layout = official(name), LAYOUTS[name]
    reranker, config = "Reranker" in name, layout.config
    model = load_model(directory, lm_head=reranker, device="cpu")
    state = model.state_dict()
    untied = reranker and not config.tie_word_embeddings
    assert len(state) == 11 * config.num_hidden_layers + 2 + untied
    assert (model.lm_head is not None) == untied == (name == "Qwen3-Reranker-8B")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert list(model.embed_tokens.weight.shape) == [config.vocab_size, config.hidden_size]
    assert model.config == config
    files = list(directory.glob("*.safetensors"))
    assert len(files) == layout.shards
    assert sum(file.stat().st_blocks * 512 for file in files) < 2**20
    if name == "Qwen3-Embedding-0.6B":
        assert abs(files[0].stat().st_size - 1_191_586_416) < 4096  # the official file, up to its header


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layouts_agree_with_the_facts(official, facts, name):
    directory, fact = official(name), facts["models"][f"Qwen/{name}"]
    config = json.loads((directory / "config.json").read_text("utf-8"))
    files = list(directory.glob("*.safetensors"))
    keys = []
    for file in files:
        with tensors.safe_open(file, framework="pt") as handle:
            keys += handle.keys()
    decoder = [key for key in keys if key != "lm_head.weight"]
    found = {
        **config,
        "shards": len(files),
        "tensors": len(keys),
        "key_prefix": "model." if all(key.startswith("model.") for key in decoder) else "",
        "has_lm_head": "lm_head.weight" in keys,
    }
    if not found["key_prefix"]:
        assert not any(key.startswith("model.") for key in decoder)
    if "file_bytes" in fact:
        assert abs(sum(file.stat().st_size for file in files) - fact["file_bytes"]) < 4096
    listed = {**facts["common"], **fact}
    compared = [k for k in listed if k in found and k not in fact["unsure"] and not k.endswith("_token_id")]
    assert len(compared) >= 14
    assert {k: found[k] for k in compared} == {k: listed[k] for k in compared}


@pytest.mark.slow
def test_opening_16_gigabytes_takes_no_memory(official, tmp_path):
    """Counted from after a first, tiny load, which has torch import its own modules."""
    code = """
import json, re, sys
from pathlib import Path
from qwen3core.weights.build import load_model, open_model
def memory():
    status = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"(VmRSS|RssAnon):\\s+(\\d+)", status)}
load_model(sys.argv[1], lm_head=True, device="cpu")
before = memory()
model = load_model(sys.argv[2], lm_head=True, device="cpu")
after = memory()
print(json.dumps({**{k: after[k] - before[k] for k in after}, "bytes": sum(p.nbytes for p in model.parameters())}))
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status to read the resident memory from")
    growth = run_python(code, tiny(tmp_path), official("Qwen3-Reranker-8B"))
    assert growth["bytes"] > 16e9
    assert growth["VmRSS"] < 200e6
    assert growth["RssAnon"] < 20e6  # copies would be anonymous


# ---------------------------------------------------------------------------------------------- accepted forms


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("prefix", ["", "model."], ids=["bare", "prefixed"])
@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_every_form_loads_as_stored(tmp_path, kind, prefix, shards, tied):
    directory = tiny(tmp_path, kind, tied=tied, shards=shards)
    reprefix(directory, prefix)
    stored = weights_of(directory)
    model = load_model(directory, lm_head=kind == "reranker", device="cpu")
    state = model.state_dict()
    assert len(list(directory.glob("*.safetensors"))) == shards
    assert state.keys() == stored.keys()
    assert ("lm_head.weight" in state) == (kind == "reranker" and not tied)
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert not model.training


def test_three_shards_equal_one_file(tmp_path):
    layout = LAYOUTS["Qwen3-Embedding-small"]
    one = load_model(synthesize(tmp_path / "1", layout), device="cpu").state_dict()
    three = load_model(synthesize(tmp_path / "3", replace(layout, shards=3)), device="cpu").state_dict()
    assert len(list((tmp_path / "3").glob("*.safetensors"))) == 3
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps to find the file's pages in")
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_are_pages_of_the_file_unless_the_dtype_changes(tmp_path, shards):
    directory = tiny(tmp_path, "reranker", tied=False, shards=shards)
    assert all(in_files(load_model(directory, lm_head=True, device="cpu"), directory))
    assert not any(in_files(load_model(directory, lm_head=True, device="cpu", dtype="float32"), directory))


@pytest.mark.parametrize("claimed", [1, 151_936])
def test_the_embedding_matrix_outranks_vocab_size(tmp_path, claimed):
    directory = tiny(tmp_path)
    rows = len(weights_of(directory)["embed_tokens.weight"])
    edit_json(directory / "config.json", vocab_size=claimed)
    model = load_model(directory, device="cpu")
    assert model.config.vocab_size == model.embed_tokens.num_embeddings == rows != claimed


def test_an_lm_head_that_is_not_needed_stays_on_disk(tmp_path):
    directory = tiny(tmp_path)
    extra = torch.full((3, 8), torch.nan, dtype=torch.bfloat16)
    edit_tensors(directory / SINGLE, lambda tensors: tensors.update({"lm_head.weight": extra}))
    model = load_model(directory, device="cpu")
    assert model.lm_head is None
    assert model.state_dict().keys() == weights_of(directory).keys() - {"lm_head.weight"}


@pytest.mark.parametrize("scale", [1, 2])
def test_an_lm_head_is_tied_only_where_it_equals_the_embeddings(tmp_path, scale):
    """Whatever config.json says, as in transformers."""
    transformers = pytest.importorskip("transformers")
    directory = tiny(tmp_path, "reranker")
    lm_head = scale * weights_of(directory)["embed_tokens.weight"]
    edit_tensors(directory / SINGLE, lambda tensors: tensors.update({"lm_head.weight": lm_head}))
    model = load_model(directory, lm_head=True, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert (model.lm_head is None) == (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (scale == 1)
    assert torch.equal(model.get_parameter(model.lm_head_name), theirs.lm_head.weight)
    edit_tensors(directory / SINGLE, lambda tensors: tensors.update({"lm_head.weight": lm_head[:3].clone()}))
    refused(lambda: load_model(directory, lm_head=True, device="cpu"), "lm_head.weight", "[3, 8]")


@pytest.mark.parametrize("in_rope", [True, False])
def test_transformers_5_spelling_loads_equal(tmp_path, in_rope):
    directory = tiny(tmp_path)
    before = load_model(directory, device="cpu")
    rope = {"rope_type": "default"} | ({"rope_theta": 1e6} if in_rope else {})
    gone = ("torch_dtype", "rope_scaling", *(["rope_theta"] if in_rope else []))
    edit_json(directory / "config.json", *gone, dtype="bfloat16", rope_parameters=rope)
    after = load_model(directory, device="cpu")
    assert after.config == before.config
    assert after.config.rope_theta == 1e6
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("stored", "named", "option", "result"),
    [
        ("bfloat16", "bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", "auto", torch.float32),
        ("float16", None, "auto", torch.float16),
        ("bfloat16", "bfloat16", "float64", torch.float64),
        ("bfloat16", "bfloat16", "torch.float32", torch.float32),
        ("float16", "float32", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_is_the_option_else_the_config_else_the_tensors(tmp_path, monkeypatch, stored, named, option, result):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)  # tests/test_precision.py on what that decides
    directory = tiny(tmp_path)

    def cast(tensors):
        tensors.update({key: tensor.to(getattr(torch, stored)) for key, tensor in tensors.items()})

    edit_tensors(directory / SINGLE, cast)
    edit_json(directory / "config.json", torch_dtype=named)
    model = load_model(directory, device="cpu", dtype=option)
    assert {p.dtype for p in model.parameters()} == {result}
    exact = weights_of(directory)["norm.weight"].to(result)
    assert torch.equal(model.norm.weight, exact)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub: Path, checkpoint_dir: Path, name: str) -> Path:
    """Put a checkpoint in the cache as the hub's client does, files as links to blobs; the snapshot."""
    repo = hub / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(checkpoint_dir, repo / "blobs")
    snapshot.mkdir(parents=True)
    for file in (repo / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    return snapshot


@pytest.fixture
def downloads(monkeypatch):
    """Of each call for a snapshot, whether only the cache was asked."""
    local, download = [], find.huggingface_hub.snapshot_download

    def record(*args, **options):
        local.append(options["local_files_only"])
        return download(*args, **options)

    monkeypatch.setattr(find.huggingface_hub, "snapshot_download", record)
    return local


def test_a_cached_hub_id_opens_offline_and_asks_the_cache_alone(tmp_path, hub, downloads):
    snapshot = cache(hub, tiny(tmp_path / "local", shards=2), "someone/tiny")
    assert find.find("someone/tiny") == snapshot
    assert downloads == [True]
    found = Embedder.from_pretrained("someone/tiny", device="cpu").encode("text")
    assert (found == Embedder.from_pretrained(tmp_path / "local", device="cpu").encode("text")).all()


# -------------------------------------------------------------------------------------------- refused: options


NAMES = [
    ("nowhere", ("nowhere", "nothing there")),
    ("./no/where", ("no/where", "nothing there")),
    ("/no/where", ("/no/where", "nothing there")),
    ("a/b/c", ("a/b/c", "nothing there")),
    ("nul\0byte", ("nul",)),
    ("someone/absent", ("someone/absent", "cached")),
    ("double/da--sh", ("double/da--sh",)),
    ("someone/.hidden", ("someone/.hidden",)),
    ("long/" + "x" * 97, ("long/xxx",)),
    ("x" * 300, ("xxx",)),
]


@pytest.mark.parametrize(("name", "parts"), NAMES, ids=[repr(case)[1:20] for case, _ in NAMES])
def test_no_such_checkpoint(hub, name, parts):
    refused(lambda: Embedder.from_pretrained(name), *parts)


def test_a_file_instead_of_a_directory(tmp_path):
    file = tiny(tmp_path) / SINGLE
    refused(lambda: Embedder.from_pretrained(file), str(file), "directory", "a file")


def test_a_cached_hub_id_in_part_is_refused_offline(tmp_path, hub):
    snapshot = cache(hub, tiny(tmp_path / "local", shards=2), "someone/tiny")
    (snapshot / SHARD_2).unlink()
    with pytest.raises(CheckpointError, match=f"someone/tiny|{SHARD_2}"):
        Embedder.from_pretrained("someone/tiny", device="cpu")


OPTIONS = [
    ({"dtype": "int4"}, ("dtype", "bfloat16", "'int4'")),
    ({"dtype": "floaty"}, ("dtype", "'floaty'")),
    ({"dtype": torch.int8}, ("dtype", "torch.int8")),
    ({"ops": "floaty"}, ("ops", "reference", "'floaty'")),
    ({"device": "floaty"}, ("device", "'floaty'")),
    ({"revision": "main"}, ("revision", "'main'")),
    ({"max_length": 32_769}, ("max_length", "32768", "32769")),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS, ids=[str(case)[:60] for case, _ in OPTIONS])
def test_options_refused(tmp_path, options, parts):
    directory = tiny(tmp_path)
    options = {"device": "cpu", **options}
    refused(lambda: Embedder.from_pretrained(directory, **options), *parts, error=InputError)


# --------------------------------------------------------------------------------------------- refused: config


CONFIGS = [
    ({"model_type": "llama"}, ("model_type", "'qwen3'", "'llama'")),
    ({"model_type": "qwen3_vl"}, ("model_type", "text decoder", "no images", "'qwen3_vl'")),
    ({"model_type": None}, ("model_type", "'qwen3'", "None")),
    ({"architectures": ["JinaForRanking"]}, ("architectures", "Qwen3Model", "listwise", "'JinaForRanking'")),
    ({"architectures": ["Qwen3Model", "Qwen3ForTokenClassification"]}, ("architectures", "TokenClassification")),
    ({"architectures": "JinaForRanking"}, ("architectures", "'JinaForRanking'")),
    ({"auto_map": {"AutoModel": "modeling.Mine"}}, ("auto_map", "own code", "'modeling.Mine'")),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ("quantization_config", "'awq'", "vLLM")),
    ({"quantization_config": {"load_in_8bit": True}}, ("quantization_config", "load_in_8bit", "vLLM")),
    ({"quantization_config": "fp8"}, ("quantization_config", "'fp8'", "vLLM")),
    ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, ("quantization", "MLX", "mlx-lm")),
    ({"per_layer_config": {"0": {"rms_norm_eps": 1}}}, ("per_layer_config", "alike", "'rms_norm_eps'")),
    ({"is_causal": None}, ("is_causal", "true or false", "None")),
    ({"is_causal": "false"}, ("is_causal", "true or false", "'false'")),
    ({"use_bidirectional_attention": "yes"}, ("use_bidirectional_attention", "False", "'yes'")),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ("rope_scaling", "RoPE", "'yarn'", "'linear'")),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_parameters", "RoPE", "'dynamic'")),
    ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, ("rope_parameters", "no parameters", "'factor'")),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ("rope_parameters", "'full_attention'")),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mystery": 1}}, ("rope_scaling", "'mystery'")),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5}}, ("'partial_rotary_factor'",)),
    ({"rope_scaling": {"type": "yarn"}}, ("rope_scaling: factor", "positive number", "None")),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": None}}, ("truncate", "true or false", "None")),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": "32"}}, ("beta_fast", "'32'")),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0}}, ("attention_factor", "0")),
    ({"rope_scaling": "yarn"}, ("RoPE", "'yarn'")),
    ({"rope_parameters": ["yarn"]}, ("RoPE", "'yarn'")),
    ({"rope_theta": None}, ("rope_theta", "positive number", "None")),
    ({"rope_theta": "1e6"}, ("rope_theta", "positive number", "'1e6'")),
    ({"rope_theta": float("nan")}, ("rope_theta", "nan")),
    ({"rms_norm_eps": float("inf")}, ("rms_norm_eps", "inf")),
    ({"rms_norm_eps": 0}, ("rms_norm_eps", "0")),
    ({"hidden_size": None}, ("hidden_size", "positive integer", "None")),
    ({"hidden_size": 8.0}, ("hidden_size", "positive integer", "8.0")),
    ({"hidden_size": [8]}, ("hidden_size", "positive integer", "[8]")),
    ({"hidden_size": 2**62}, (str(2**62),)),
    ({"intermediate_size": 10**30}, (str(10**30),)),
    ({"num_hidden_layers": True}, ("num_hidden_layers", "positive integer", "True")),
    ({"num_hidden_layers": -1}, ("num_hidden_layers", "positive integer", "-1")),
    ({"num_hidden_layers": 0}, ("num_hidden_layers", "positive integer", "0")),
    ({"num_hidden_layers": "1"}, ("num_hidden_layers", "positive integer", "'1'")),
    ({"num_hidden_layers": float("nan")}, ("num_hidden_layers", "positive integer", "nan")),
    ({"num_key_value_heads": 3}, ("num_attention_heads", "multiple", "3", "2")),
    ({"head_dim": 7}, ("head_dim", "even", "7")),
    ({"hidden_act": "gelu"}, ("hidden_act", "'silu'", "'gelu'")),
    ({"attention_bias": True}, ("attention_bias", "False", "True")),
    ({"use_sliding_window": True}, ("use_sliding_window", "False", "True")),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "'sliding_attention'")),
    ({"layer_types": 5}, ("layer_types", "5")),
    ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings", "true or false", "'yes'")),
    ({"torch_dtype": 16}, ("dtype", "16")),
    ({"torch_dtype": "int8"}, ("dtype", "'int8'")),
]


@pytest.mark.parametrize(("changed", "parts"), CONFIGS, ids=[str(case)[:60] for case, _ in CONFIGS])
def test_config_refused(tmp_path, changed, parts):
    directory = tiny(tmp_path)
    edit_json(directory / "config.json", **changed)
    refused(lambda: load_model(directory, device="cpu"), str(directory), *parts)


@pytest.mark.parametrize("field", ["vocab_size", "num_attention_heads", "max_position_embeddings", "rope_theta"])
def test_config_field_missing(tmp_path, field):
    directory = tiny(tmp_path)
    edit_json(directory / "config.json", field)
    refused(lambda: load_model(directory, device="cpu"), "config.json", field, "None")
    with pytest.raises(CheckpointError, match=f"mine: {field}"):
        Qwen3Config.from_dict(json.loads((directory / "config.json").read_text()), "mine")


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("nothing",)),
        (b"", ("JSON",)),
        (b"{'model_type': 'qwen3'}", ("JSON",)),
        (b"\xff\xfe{}", ("JSON",)),
        (b"[1, 2]", ("object", "list")),
        (b'{"a": ' + b"9" * 5000 + b"}", ("JSON",)),
        (b"[" * 10**6, ("JSON",)),
    ],
    ids=["missing", "empty", "quotes", "bytes", "list", "number", "nested"],
)
def test_json_refused(tmp_path, file, content, parts):
    directory = tiny(tmp_path, shards=2)
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_bytes(content)
    parts = ("neither",) if content is None and file == INDEX else parts
    refused(lambda: load_model(directory, device="cpu"), str(directory), file, *parts)


# -------------------------------------------------------------------------------------------- refused: weights


def on_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d / SINGLE, change)


def on_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda d: edit_header(d / SINGLE, change)


def on_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda d: (d / SINGLE).write_bytes(change((d / SINGLE).read_bytes()))


def moved_to(name: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / SINGLE).rename(directory / name)

    return change


def embedding_of_shape(*shape: int) -> Callable[[Path], object]:
    """A file that is valid, with an embedding matrix that no model has."""

    def change(file: bytes) -> bytes:
        fields, data = split(file)
        size = fields["embed_tokens.weight"]["data_offsets"][1]
        fields["embed_tokens.weight"]["shape"] = list(shape)
        end = relayout(fields)["embed_tokens.weight"]["data_offsets"][1]
        return join(fields, bytes(end) + data[size:])

    return on_bytes(change)


QUERY = "layers.0.self_attn.q_proj.weight"
SINGLE_FILE = {
    "no weights": (lambda d: (d / SINGLE).unlink(), (SINGLE, INDEX, "neither")),
    "only a pickle": (moved_to("pytorch_model.bin"), (SINGLE, "pytorch_model.bin", "pickle", "save_pretrained")),
    "only GGUF": (moved_to("Q8_0.gguf"), (SINGLE, "Q8_0.gguf", "GGUF", "llama.cpp")),
    "only MLX": (moved_to("weights.npz"), (SINGLE, "weights.npz", "mlx-lm")),
    "only ONNX": (moved_to("onnx/model.onnx"), (SINGLE, "model.onnx", "onnxruntime")),
    "directory": (lambda d: ((d / SINGLE).unlink(), (d / SINGLE).mkdir()), (SINGLE, "something else")),
    "empty": (on_bytes(lambda file: b""), (SINGLE, "0 bytes")),
    "seven bytes": (on_bytes(lambda file: file[:7]), (SINGLE, "7 bytes")),
    "header cut": (on_bytes(lambda file: file[:100]), (SINGLE, "100 bytes")),
    "truncated": (on_bytes(lambda file: file[:-1]), (SINGLE, "bytes that are not")),
    "extended": (on_bytes(lambda file: file + b"\0"), (SINGLE, "bytes that are not")),
    "header length 2**63": (on_bytes(lambda file: struct.pack("<Q", 2**63) + file[8:]), (SINGLE, "bytes that are not")),
    "header length 2**40": (on_bytes(lambda file: struct.pack("<Q", 2**40) + file[8:]), (SINGLE, "bytes that are not")),
    "header length 0": (on_bytes(lambda file: bytes(8) + file[8:]), (SINGLE, "bytes that are not")),
    "header not JSON": (on_bytes(lambda file: join(b"{nonsense", split(file)[1])), (SINGLE, "bytes that are not")),
    "header a list": (on_bytes(lambda file: join([], split(file)[1])), (SINGLE, "bytes that are not")),
    "pickle inside": (
        on_bytes(lambda file: b"\x80\x02ccollections\nOrderedDict\nq\0)Rq\1."),
        (SINGLE, "bytes that are"),
    ),
    "overlap": (on_header(lambda h: h["norm.weight"].update(data_offsets=[0, 16])), (SINGLE, "weight")),
    "out of range": (on_header(lambda h: h["norm.weight"].update(data_offsets=[10**9, 10**9 + 16])), (SINGLE, "norm")),
    "backwards": (on_header(lambda h: h["norm.weight"].update(data_offsets=[16, 0])), (SINGLE, "norm.weight")),
    "negative": (on_header(lambda h: h["norm.weight"].update(data_offsets=[-16, 0])), (SINGLE,)),
    "with and without prefix": (
        on_tensors(lambda t: t.update({"model.norm.weight": t["norm.weight"].clone()})),
        (SINGLE, "'norm.weight'", "'model.norm.weight'", "once"),
    ),
    "key missing": (on_tensors(lambda t: t.pop(QUERY)), (f"missing tensor '{QUERY}'", SINGLE)),
    "no embedding": (on_tensors(lambda t: t.pop("embed_tokens.weight")), ("missing tensor 'embed_tokens.weight'",)),
    "key unknown": (on_tensors(lambda t: t.update(extra=torch.ones(1))), (SINGLE, "unexpected tensor 'extra'")),
    "bias": (
        on_tensors(lambda t: t.update({QUERY.replace("weight", "bias"): torch.ones(16)})),
        ("unexpected tensor", "q_proj.bias"),
    ),
    "layer misnumbered": (
        on_tensors(lambda t: [t.update({k.replace("0", "1"): t.pop(k)}) for k in list(t) if ".0." in k]),
        ("missing tensor 'layers.0.",),
    ),
    "layer too many": (on_tensors(lambda t: t.update({"layers.1.x": torch.ones(1)})), ("layers", "1", "2")),
    "wrong shape": (on_tensors(lambda t: t.update({QUERY: t[QUERY][:8].clone()})), (QUERY, "[16, 8]", "[8, 8]")),
    "transposed": (on_tensors(lambda t: t.update({QUERY: t[QUERY].T.contiguous()})), (QUERY, "[16, 8]", "[8, 16]")),
    "integers": (on_tensors(lambda t: t.update({QUERY: t[QUERY].int()})), (QUERY, "BF16", "I32")),
    "integer embedding": (
        on_tensors(lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"].to(torch.int8)})),
        ("embed_tokens.weight", "BF16", "I8"),
    ),
    "float8": (on_tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})), (QUERY, "BF16", "F8_E4M3")),
    "scalar embedding": (embedding_of_shape(), ("embed_tokens.weight",)),
    "flat embedding": (embedding_of_shape(8), ("embed_tokens.weight", "[8]")),
    "empty embedding": (embedding_of_shape(2**40, 0), ("embed_tokens.weight", "[1099511627776, 0]")),
    "more rows than numbers": (embedding_of_shape(2**62, 0), ("embed_tokens.weight", str(2**62))),
    "more rows than int64": (embedding_of_shape(2**63, 0), ("embed_tokens.weight", str(2**63))),
}


@pytest.mark.parametrize("case", SINGLE_FILE)
def test_weights_refused(tmp_path, case):
    change, parts = SINGLE_FILE[case]
    directory = tiny(tmp_path)
    change(directory)
    refused(lambda: load_model(directory, device="cpu"), str(directory), *parts)
    refused(lambda: load_model(directory, device="cpu", lm_head=True), str(directory), *parts)


def test_an_untied_reranker_needs_its_lm_head(tmp_path):
    directory = tiny(tmp_path, "reranker", tied=False)
    edit_tensors(directory / SINGLE, lambda t: t.pop("lm_head.weight"))
    refused(lambda: Reranker.from_pretrained(directory, device="cpu"), "missing tensor 'lm_head.weight'", SINGLE)
    embedder = Embedder.from_pretrained(directory, device="cpu", job="embedding")  # as such, it is whole
    assert embedder.model.lm_head is None


def mapped(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        weight_map = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        change(weight_map)
        edit_json(directory / INDEX, weight_map=weight_map)

    return edit


def shard_named(value: object) -> tuple[Callable[[Path], None], tuple[str, ...]]:
    return mapped(lambda m: m.update({"norm.weight": value})), (INDEX, "'norm.weight'", repr(value)[1:100])


SHARDED = {
    "shard missing": (lambda d: (d / SHARD_2).unlink(), (SHARD_2, "nothing")),
    "shard a directory": (lambda d: ((d / SHARD_2).unlink(), (d / SHARD_2).mkdir()), (SHARD_2, "something else")),
    "shard truncated": (lambda d: os.truncate(d / SHARD_2, 1000), (SHARD_2, "1000 bytes")),
    "shard a broken link": (lambda d: ((d / SHARD_2).unlink(), (d / SHARD_2).symlink_to("gone")), (SHARD_2, "nothing")),
    "shard of a name too long": (
        mapped(lambda m: m.update({"norm.weight": "x" * 300 + ".safetensors"})),
        ("x" * 300 + ".safetensors",),
    ),
    "key in two shards": (
        lambda d: edit_tensors(d / SHARD_1, lambda t: t.update({"norm.weight": torch.ones(8)})),
        (SHARD_1, SHARD_2, "'norm.weight'", "once"),
    ),
    "key in another shard": (
        mapped(lambda m: m.update({"norm.weight": SHARD_1})),
        (INDEX, "'norm.weight'", SHARD_1, SHARD_2),
    ),
    "key in no shard": (mapped(lambda m: m.update({"missing.weight": SHARD_1})), ("missing tensor 'missing.weight'",)),
    "shard not in the index": (
        mapped(lambda m: [m.pop(k) for k in list(m) if m[k] == SHARD_2]),
        ("missing tensor 'layers.0.", SHARD_1),
    ),
    "map a list": (lambda d: edit_json(d / INDEX, weight_map=[SHARD_1]), (INDEX, "weight_map", "object")),
    "map empty": (lambda d: edit_json(d / INDEX, weight_map={}), (INDEX, "weight_map", "{}")),
    "map missing": (lambda d: edit_json(d / INDEX, "weight_map"), (INDEX, "weight_map", "None")),
    **{
        f"shard {value!r:.30}": shard_named(value)
        for value in [
            *(5, None, [SHARD_2], "", ".", "..", "config.json", "model.bin", ".safetensors/", "a\0.safetensors"),
            *("../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", f"./{SHARD_2}", f"{SHARD_2}/"),
            *("a\\b.safetensors", "..\\x.safetensors", "C:x.safetensors"),
        ]
    },
}


@pytest.mark.parametrize("case", SHARDED)
def test_shards_refused(tmp_path, case):
    change, parts = SHARDED[case]
    directory = tiny(tmp_path / "inside", shards=2)
    shutil.copy(directory / SHARD_2, tmp_path / "x.safetensors")  # a way out of the directory would lead somewhere
    change(directory)
    refused(lambda: load_model(directory, device="cpu"), str(directory), *parts)


# ------------------------------------------------------------------------------------------ refused: tokenizer


def new_rows(rows: int) -> Callable[[Path], None]:
    return on_tensors(lambda t: t.update({"embed_tokens.weight": torch.ones(rows, 8, dtype=torch.bfloat16)}))


def word_level(directory: Path) -> None:
    Backend(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(directory / "tokenizer.json"))


BASE, TOTAL = 576, 602  # the small tokenizer's vocabulary, without and with added tokens; EOS is the first added
TOKENIZER = {
    "missing": (lambda d: (d / "tokenizer.json").unlink(), ("nothing",)),
    "directory": (lambda d: ((d / "tokenizer.json").unlink(), (d / "tokenizer.json").mkdir()), ("directory",)),
    "garbage": (lambda d: (d / "tokenizer.json").write_bytes(b"\xff\0 garbage"), ()),
    "empty": (lambda d: (d / "tokenizer.json").write_bytes(b""), ()),
    "another JSON": (lambda d: shutil.copy(d / "config.json", d / "tokenizer.json"), ()),
    "no <|endoftext|>": (
        lambda d: (d / "tokenizer.json").write_text(
            (d / "tokenizer.json").read_text("utf-8").replace("<|endoftext|>", "<|another|>"), "utf-8"
        ),
        ("<|endoftext|>", "one token"),
    ),
    "no unknown token": (word_level, ("<|endoftext|>",)),
    "larger than the matrix": (new_rows(100), ("vocabulary", "100", str(TOTAL))),
    "no row for EOS": (new_rows(BASE), ("vocabulary", str(BASE), str(TOTAL))),
    "far smaller than the matrix": (new_rows(151_669), ("vocabulary", "151669", str(TOTAL))),
    "too small by one": (new_rows(TOTAL + 1025), ("vocabulary", str(TOTAL + 1025), str(TOTAL))),
}


@pytest.mark.parametrize("case", TOKENIZER)
def test_tokenizer_refused(tmp_path, case):
    change, parts = TOKENIZER[case]
    directory = tiny(tmp_path)
    change(directory)
    refused(lambda: Embedder.from_pretrained(directory, device="cpu"), str(directory / "tokenizer.json"), *parts)


@pytest.mark.parametrize("rows", [BASE + 1, TOTAL, TOTAL + 1024])
def test_padded_and_slightly_short_matrices_are_accepted(tmp_path, rows):
    directory = tiny(tmp_path)
    new_rows(rows)(directory)
    assert Embedder.from_pretrained(directory, device="cpu").model.embed_tokens.num_embeddings == rows


# ------------------------------------------------------------------------------------ hangs, memory, other files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_are_refused_and_do_not_hang(tmp_path):
    """A pipe in the place of each file; in a process of its own, since a blocked read cannot be interrupted."""
    cases = {"config.json": 1, SINGLE: 1, "tokenizer.json": 1, INDEX: 2, SHARD_2: 2}
    for number, (name, shards) in enumerate(cases.items()):
        directory = tiny(tmp_path / str(number), shards=shards)
        (directory / name).unlink()
        os.mkfifo(directory / name)
    code = """
import json, sys
from qwen3core import CheckpointError, Embedder
found = {}
for directory in sys.argv[1:]:
    try:
        Embedder.from_pretrained(directory, device="cpu")
    except CheckpointError as error:
        found[directory] = str(error)
print(json.dumps(found))
"""
    found = run_python(code, *(tmp_path / str(number) for number in range(len(cases))))
    for number, name in enumerate(cases):
        message = found[str(tmp_path / str(number))]
        assert name in message
        assert "expected" in message
        assert "found" in message


def nasty(directory: Path) -> dict[str, bytes]:
    """Contents for ``SINGLE`` that promise far more than they hold."""
    fields, data = split((tiny(directory) / SINGLE).read_bytes())

    def norm(**changes: object) -> bytes:
        return join({**fields, "norm.weight": {**fields["norm.weight"], **changes}}, data)

    return {
        "shape": norm(shape=[2**40]),
        "shape and offsets": norm(shape=[2**40], data_offsets=[0, 2**41]),
        "shape beyond u64": norm(shape=[2**40, 2**40]),
        "shape zero": norm(shape=[2**63, 2**63, 0]),
        "many dimensions": norm(shape=[1] * 10**5),
        "length 2**40": struct.pack("<Q", 2**40) + data,
        "length 2**64 - 1": struct.pack("<Q", 2**64 - 1) + data,
        "length just allowed": struct.pack("<Q", 99_999_999) + data,
        "nested lists": join(b"[" * 10**6, data),
        "nested objects": join(b'{"a":' * 200_000, data),
        "nested shape": join(b'{"a":{"dtype":"F32","shape":' + b"[" * 10**6, data),
        "long key": join({**fields, "k" * 10**6: {}}, data),
        "much data": join(relayout({**fields, "norm.weight": {"dtype": "F32", "shape": [2**50]}}), data),
    }


def test_rewrite_copies_what_a_checkpoint_is(embedding_dir, tmp_path):
    """Not what lies about in its folder; each file as readable as the umask says."""
    source, out = shutil.copytree(embedding_dir, tmp_path / "source"), tmp_path / "out"
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "3_Dense").mkdir()
    dense = {"linear.weight": torch.ones(2, 64), "model.bias": torch.ones(2)}
    (source / "3_Dense" / SINGLE).write_bytes(serialise(dense))
    expected = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    for name in ("3_Dense/config.json", "additional_chat_templates/rag.jinja", "LICENSE"):
        expected.add(name)
    junk = ["training/state.pt", "adapter/adapter_model.safetensors", "mine/model.safetensors", "mine/config.json"]
    junk += [
        "vectors.npy",
        "texts.csv",
        "loss.png",
        "onnx/model.onnx",
        "pytorch_model.bin",
        "other.safetensors.part",
        ".gitattributes",
        ".cache/x",
        "a.gguf",
    ]
    for name in [*junk, *expected]:
        (source / name).parent.mkdir(exist_ok=True)
        if not (source / name).exists():
            (source / name).write_text(name)
    (source / SINGLE).chmod(0o600)
    stored = Tensors(source)
    with umask(0o027):
        rewrite(source, out, lambda name: 2 * stored[name])
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    assert set(files) == expected
    assert {p.stat().st_mode & 0o777 for p in files.values()} == {0o640}
    assert all(p.read_bytes() == (source / name).read_bytes() for name, p in files.items() if p.name != SINGLE)
    assert {"3_Dense.linear.weight", "3_Dense.model.bias"} <= set(stored)  # of a module's keys, no model. is stripped
    assert parse((out / "3_Dense" / SINGLE).read_bytes()).keys() == dense.keys()
    assert all(torch.equal(Tensors(out)[name], 2 * stored[name]) for name in stored)
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_weights_in_folders_of_modules(tmp_path):
    directory = tiny(tmp_path)
    modules = json.loads((directory / "modules.json").read_text())
    modules[2] = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    (directory / "modules.json").write_text(json.dumps(modules))
    dense = directory / "2_Dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"in_features": 8, "out_features": 4, "bias": false}')
    (dense / SINGLE).write_bytes(serialise({"linear.weight": torch.ones(4, 8)}))
    assert open_model(directory)[0].state_dict()["2_Dense.linear.weight"].shape == (4, 8)
    model, stored = open_model(directory, layout=Layout())  # for another job
    assert "2_Dense.linear.weight" in stored
    assert "2_Dense.linear.weight" not in model.state_dict()
    edit_tensors(dense / SINGLE, lambda t: t.update(extra=torch.ones(1)))
    refused(lambda: load_model(directory, device="cpu"), "2_Dense/model.safetensors: unexpected tensor 'extra'")
    edit_tensors(dense / SINGLE, lambda t: t.pop("extra"))
    edit_tensors(directory / SINGLE, lambda t: t.update(extra=torch.ones(1)))
    refused(lambda: open_model(directory, layout=Layout()), "unexpected tensor 'extra'")
    (dense / SINGLE).rename(dense / "pytorch_model.bin")
    refused(lambda: Tensors(directory), "2_Dense", SINGLE, "pytorch_model.bin", "pickle")


@pytest.mark.parametrize("whole", [False, True])
def test_a_snapshot_is_whole_with_the_weights_of_its_modules(tmp_path, hub, downloads, whole):
    local = tiny(tmp_path / "local")
    modules = json.loads((local / "modules.json").read_text())
    (local / "modules.json").write_text(json.dumps([*modules, {"path": "2_Dense", "type": "x.Dense"}]))
    if whole:
        (local / "2_Dense").mkdir()
        (local / "2_Dense" / SINGLE).write_bytes(b"")
    snapshot = cache(hub, local, "someone/dense")
    assert find.find("someone/dense") == snapshot
    assert downloads == ([True] if whole else [True, False])


def test_what_rewrite_refuses(embedding_dir, tmp_path):
    source, out = shutil.copytree(embedding_dir, tmp_path / "source"), tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    stored = Tensors(source)
    for inside in (source, source / "mine", tmp_path / "link" / "mine", source / "1_Pooling" / ".." / "mine"):
        refused(partial(rewrite, source, inside, stored.__getitem__), "other than", error=InputError)
    for value in (3.4e38, torch.nan):  # the first is finite in float32, not in bfloat16
        weights = {**{name: stored[name] for name in stored}, "norm.weight": torch.full((64,), value)}
        message = "expected weights that are finite in torch.bfloat16"
        refused(partial(rewrite, source, out, weights.__getitem__), "norm.weight", message, error=InputError)
    for modules in ("{", "[1]", '[{"path": 1}]', '[{"path": "../link"}]', '[{"path": "/etc"}]'):
        (source / "modules.json").write_text(modules)
        refused(partial(rewrite, source, out, stored.__getitem__), "modules.json", "expected modules with paths")
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.slow
def test_no_memory_beyond_the_size_of_the_file(tmp_path):
    """64 MiB of address space above what a good load needs; an abort, a kill or a MemoryError fails the test."""
    pytest.importorskip("resource")
    good = tiny(tmp_path / "good")
    directories = [good]
    for case, file in nasty(tmp_path / "model").items():
        directory = shutil.copytree(good, tmp_path / case)
        (directory / SINGLE).write_bytes(file)
        directories.append(directory)
    for layers in (10**9, 10**30):
        directories.append(shutil.copytree(good, tmp_path / f"layers {layers}"))
        edit_json(directories[-1] / "config.json", num_hidden_layers=layers)
    code = """
import json, re, resource, sys, time
from pathlib import Path
from qwen3core import CheckpointError, load_model
def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
found = {}
for directory in sys.argv[1:]:
    started = time.perf_counter()
    try:
        load_model(directory, device="cpu")
    except CheckpointError as error:
        found[Path(directory).name] = [str(error)[:1000], time.perf_counter() - started]
    if directory == sys.argv[1]:
        peak = memory("VmHWM")
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**26,) * 2)
print(json.dumps({"found": found, "growth": memory("VmHWM") - peak}))
"""
    result = run_python(code, *directories)
    found = result["found"]
    assert result["growth"] < 2**26
    assert set(found) == {directory.name for directory in directories[1:]}
    assert all("expected" in message for message, _ in found.values())
    assert max(seconds for _, seconds in found.values()) < 5
    for layers in (10**9, 10**30):
        message, _ = found[f"layers {layers}"]
        assert "num_hidden_layers" in message
        assert str(layers) in message
