"""Loading with files changed at random: a model, or a clear CheckpointError, and nothing else."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from checkpoint_files import SHARD_1, SHARD_2, clear, join, relayout, split, tiny

from qwen3core import CheckpointError
from qwen3core.weights import tensors
from qwen3core.weights.build import load_model
from qwen3core.weights.tensors import INDEX, SINGLE

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBERS = [
    *(0, 1, -1, 2, 7, 8, 16, 255, 2**31, 2**32, 2**40, 2**53),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)),
]
ODD = st.sampled_from(NUMBERS)
JUNK = st.recursive(
    st.none() | st.booleans() | ODD | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
ST_DTYPES = [
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "C64", "F64", "I64", "U64", "X"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints for examples to overwrite, the same again in ``good``, and a good file outside of all."""
    root = tmp_path_factory.mktemp("fuzz")
    for name, shards in (("single", 1), ("sharded", 2)):
        shutil.copytree(tiny(root / "good" / name, shards=shards), root / name)
    shutil.copy(root / "sharded" / SHARD_2, root / "outside.safetensors")
    return root


def loads_or_is_refused(root: Path, name: str, content: bytes) -> bool:
    """With one file changed: a model, every weight of it readable, or a clear CheckpointError, and nothing else."""
    file, message = root / name, None
    file.unlink()  # a new file: models of earlier examples keep the pages of theirs
    file.write_bytes(content)
    try:
        model = load_model(file.parent, device="cpu")
        assert all(p.double().sum().numel() == 1 for p in model.parameters())
    except CheckpointError as error:
        message = str(error)
    finally:
        file.unlink()
        shutil.copy(root / "good" / name, file)
    assert message is None or clear(message), message
    return message is None


def fuzz_bytes(root, data):
    original = (root / "good" / "single" / SINGLE).read_bytes()
    end = 8 + struct.unpack("<Q", original[:8])[0]
    file = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end) | st.integers(0, 8))
        kind = data.draw(st.sampled_from(["flip", "set", "insert", "delete", "length", "shift", "cut", "extend"]))
        if kind == "flip":
            file[at : at + 1] = bytes(b ^ 1 << data.draw(st.integers(0, 7)) for b in file[at : at + 1])
        elif kind == "set":
            file[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1) | st.sampled_from([b'"', b"9", b"{", b"]"]))
        elif kind == "insert":
            file[at:at] = data.draw(st.binary(min_size=1, max_size=9) | st.sampled_from([b"-", b"0", b" ", b",", b"["]))
        elif kind == "delete":
            del file[at : at + data.draw(st.integers(1, 40))]
        elif kind == "length":
            file[:8] = struct.pack("<Q", data.draw(ODD.filter(lambda n: 0 <= n < 2**64) | st.integers(0, 2**64 - 1)))
        elif kind == "shift":
            file[:8] = struct.pack("<Q", max(0, end - 8 + data.draw(st.integers(-9, 9))))
        elif kind == "cut":
            del file[data.draw(st.integers(0, len(file))) :]
        else:
            file += data.draw(st.binary(min_size=1, max_size=99))
    loads_or_is_refused(root, f"single/{SINGLE}", bytes(file))


def fuzz_header(root, data):
    """Values of the header replaced; half of the time with offsets that agree, so that the parser accepts them."""
    fields, rest = split((root / "good" / "single" / SINGLE).read_bytes())
    keys = [key for key in fields if key != "__metadata__"]
    consistent = data.draw(st.booleans())
    sizes = ODD.filter(lambda n: n >= 0)
    for key in data.draw(st.lists(st.sampled_from(["embed_tokens.weight", *keys]), min_size=1, max_size=3)):
        kind = data.draw(st.sampled_from(["shape", "dtype", "rename"] + ["data_offsets", "entry"] * (not consistent)))
        if kind == "rename":
            other = data.draw(st.sampled_from(["model.", "layers.", "", "layers.0", "\0", "model." + key]) | st.text())
            fields[other] = fields.pop(key, {"dtype": "F32", "shape": [], "data_offsets": [0, 0]})
        elif kind == "entry":
            fields[key] = data.draw(JUNK)
        elif isinstance(fields.get(key), dict):
            choices = {
                "shape": st.lists(sizes, max_size=3) if consistent else st.lists(ODD, max_size=3) | JUNK,
                "dtype": st.sampled_from(ST_DTYPES) if consistent else st.sampled_from(ST_DTYPES) | JUNK,
                "data_offsets": st.tuples(ODD, ODD) | st.tuples(st.integers(0, 99), st.integers(0, 99)) | JUNK,
            }
            fields[key][kind] = data.draw(choices[kind])
    if consistent:
        relayout(fields)
        total = max((fields[key]["data_offsets"][1] for key in fields if key != "__metadata__"), default=0)
        rest = (rest + bytes(max(0, min(total, 2**20) - len(rest))))[: min(total, 2**20)]
    loads_or_is_refused(root, f"single/{SINGLE}", join(fields, rest))


def fuzz_index_opens_nothing_outside(root, data):
    index = json.loads((root / "good" / "sharded" / INDEX).read_text("utf-8"))
    weight_map = index["weight_map"]
    outside = str(root / "outside.safetensors")
    names = [
        *(SHARD_1, SHARD_2, "outside.safetensors", "../outside.safetensors", outside, f"/{outside}", f"./{SHARD_1}"),
        *("../sharded/" + SHARD_1, "x/../../outside.safetensors", "..\\outside.safetensors", "~/outside.safetensors"),
        *("..", ".", "", "/", "\0", "../outside.safetensors\0.safetensors", "file://" + outside, "../single/" + SINGLE),
    ]
    value = st.sampled_from(names) | st.text(max_size=300).map(lambda t: t + ".safetensors") | st.text() | JUNK
    for key in data.draw(st.lists(st.sampled_from([*weight_map, "", "model.", "other"]), min_size=1, max_size=3)):
        weight_map[key] = data.draw(value)
    whole = data.draw(st.sampled_from([True] * 8 + [False]))
    content = json.dumps(index if whole else {"weight_map": data.draw(JUNK)}).encode()
    opened = []
    original = tensors.safe_open

    def record(file, **options):
        opened.append(Path(file))
        return original(file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "safe_open", record)
        loaded = loads_or_is_refused(root, f"sharded/{INDEX}", content)
    assert len(opened) >= 2 * loaded  # the recorder is in place
    assert {Path(os.path.abspath(file)).parent for file in opened} <= {root / "sharded"}
    assert {file.name for file in opened} <= {SHARD_1, SHARD_2}


def fuzz_config(root, data):
    config = json.loads((root / "good" / "single" / "config.json").read_text("utf-8"))
    odd = (
        "dtype",
        "rope_parameters",
        "layer_types",
        "partial_rotary_factor",
        "is_causal",
        "use_bidirectional_attention",
    )
    names = st.sampled_from([*config, *odd, "auto_map", "quantization_config", "original_max_position_embeddings"])
    keys = ("rope_type", "type", "rope_theta", "factor", "beta_fast", "original_max_position_embeddings", "truncate")
    yarn = {"type": "yarn", "factor": 4.0}
    rope = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, JUNK)).map(lambda r: yarn | r if len(r) % 2 else r)
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        config[name] = data.draw(ODD | JUNK | (rope if "rope" in name else ODD))
    loads_or_is_refused(root, "single/config.json", json.dumps(config).encode())


@pytest.mark.parametrize("examples", [30, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", [fuzz_bytes, fuzz_header, fuzz_index_opens_nothing_outside, fuzz_config])
def test_fuzz(root, change, examples):
    """Many changes of one kind, the same in every run."""
    options = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @options
    @given(data=st.data())
    def every(data):
        change(root, data)

    every()
