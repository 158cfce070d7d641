"""The profile: FLOPs and bytes against hand counts and torch's counter; being timed changes nothing; its tables."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from qwen3core import Embedder, InputError, Reranker, profiling, reference
from qwen3core.commands import main
from qwen3core.profiling import Ceilings, profile

TEXTS = ["gravity", "a violin and two songs"]
PAIRS = [("which?", "a violin"), ("which?", "rain fell"), ("which?", "a violin"), ("what?", "bread")]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHERS = {"tokenizer", "embed_tokens", "rms_norm", "qk_norm_rope", "attention", "swiglu", "pool"}
APART = {*MATRICES, *OTHERS}
QKV, GATE_UP = "q_proj, k_proj, v_proj", "gate_proj, up_proj"
OPERATIONS = {QKV, "o_proj", GATE_UP, "down_proj", *OTHERS}
"""Where ops have one operation for several products; APART where they do not."""


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(profiling, "ceilings", lambda device, dtype: Ceilings(0.1, 10))


@pytest.fixture
def embedder(embedding_dir):
    return Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")


def by_name(report):
    return {row.operation: row for row in report.by_operation()}


@pytest.mark.parametrize("ops", ["torch", "reference", "prepacked"])
def test_flops_and_bytes_are_those_counted_by_hand(embedding_dir, ops):
    """Two texts; of the last layer, after q, k and v, one token each."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", ops=ops, device="cpu")
    c = embedder.model.config
    H, W, L, D = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.head_dim
    Hq, Hkv = c.num_attention_heads, c.num_key_value_heads
    lengths = [len(ids) for ids in embedder.to_sequences(TEXTS)]
    T, N = sum(lengths), len(lengths)
    rows = T * (L - 1) + N
    pairs = (L - 1) * sum(n * (n + 1) // 2 for n in lengths) + sum(lengths)
    expected = {
        "tokenizer": (0, 0),
        "embed_tokens": (0, T * (8 + 2 * 4 * H)),
        "q_proj": (2 * T * H * Hq * D * L, 4 * L * (T * H + H * Hq * D + T * Hq * D)),
        "k_proj": (2 * T * H * Hkv * D * L, 4 * L * (T * H + H * Hkv * D + T * Hkv * D)),
        "v_proj": (2 * T * H * Hkv * D * L, 4 * L * (T * H + H * Hkv * D + T * Hkv * D)),
        "attention": (
            4 * Hq * D * pairs,
            4 * D * (2 * Hq * rows + 2 * Hkv * T * L) + 4 * L * 2 * (N + 1),  # q, z; k, v; cu_seqlens
        ),
        "o_proj": (2 * rows * Hq * D * H, 4 * (rows * Hq * D + L * Hq * D * H + rows * H)),
        "gate_proj": (2 * rows * H * W, 4 * (rows * H + L * H * W + rows * W)),
        "up_proj": (2 * rows * H * W, 4 * (rows * H + L * H * W + rows * W)),
        "down_proj": (2 * rows * H * W, 4 * (rows * H + L * H * W + rows * W)),
        "swiglu": (5 * rows * W, 4 * 3 * rows * W),
        "rms_norm": (4 * H * (T * L + rows + N), 4 * (2 * H * (T * L + rows + N) + H * (2 * L + 1))),
        "qk_norm_rope": (  # two passes over q and k, with two weights, cos and sin
            7 * D * (Hq + Hkv) * T * L,
            4 * L * (4 * D * (Hq + Hkv) * T + 2 * D + 4 * T * D),
        ),
        "residual add": (2 * rows * H, 4 * 3 * 2 * rows * H),
        "pool": (3 * N * H, 4 * 2 * N * H + 4 * (N + 1)),
    }
    if ops != "reference":  # rows are read once, and q, k, cos and sin
        expected["qk_norm_rope"] = (expected["qk_norm_rope"][0], 4 * L * (2 * D * (Hq + Hkv) * T + 2 * D + 2 * T * D))
        for names, inputs, outputs in ((QKV, T * L, (Hq + 2 * Hkv) * D), (GATE_UP, rows, 2 * W)):
            for name in names.split(", "):
                del expected[name]
            expected[names] = (2 * inputs * H * outputs, 4 * (inputs * H + L * H * outputs + inputs * outputs))
    found = by_name(profile(embedder, TEXTS, repeats=1))
    assert {name: (row.flops, row.bytes) for name, row in found.items()} == expected


def test_products_are_those_of_torchs_counter(embedding_dir):
    """Which counts the masked half of attention as well."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", ops="reference", device="cpu")
    with FlopCounterMode(display=False) as counter:
        embedder.encode(TEXTS)
    counts = counter.get_flop_counts()["Global"]
    found = by_name(profile(embedder, TEXTS, repeats=1))
    assert sum(found[name].flops for name in MATRICES) == counts[torch.ops.aten.mm]
    c = embedder.model.config
    masked = sum(n * (n - 1) // 2 for n in map(len, embedder.to_sequences(TEXTS))) * (c.num_hidden_layers - 1)
    masked_flops = 4 * c.num_attention_heads * c.head_dim * masked
    assert found["attention"].flops + masked_flops == counts[torch.ops.aten.bmm]


@pytest.mark.parametrize("ops", ["torch", "reference"])
def test_being_timed_changes_no_bit_and_no_shortcut(embedding_dir, reranker_dir, ops):
    """Equal texts and shared beginnings are computed once, as ever; afterwards all is as before."""
    embedder = Embedder.from_pretrained(embedding_dir, ops=ops, device="cpu")
    reranker = Reranker.from_pretrained(reranker_dir, ops=ops, device="cpu")
    cases: list[tuple[Any, Any, list]] = [
        (embedder, embedder.encode, [*TEXTS, TEXTS[0]]),
        (reranker, reranker.predict, PAIRS),
    ]
    for opened, call, inputs in cases:
        model = opened.model
        before, ops_before = call(inputs), model.ops
        rows: list[int] = []
        handle = model.embed_tokens.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(out)))
        timer = profiling._Timer(torch.device("cpu"))
        with timer.on(model):
            assert model.ops != ops_before
            assert model.shortcuts
            np.testing.assert_array_equal(call(inputs), before)
        handle.remove()
        assert_untouched(model, ops_before)
        assert timer.tokens == sum(rows) < sum(map(len, sequences(opened, inputs)))


def sequences(opened, inputs):
    """The ids of every input by itself."""
    if isinstance(opened, Embedder):
        return opened.to_sequences(inputs)
    template = opened.tokenizer.template
    return opened.to_sequences([template.fill(opened.layout.instruction, *pair) for pair in inputs])


def assert_untouched(model, ops):
    assert model.ops is ops
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_after_an_error_all_is_as_before(embedder):
    def fail(gate, up):
        raise RuntimeError("mine")

    embedder.model.ops = ops = dataclasses.replace(embedder.model.ops, swiglu=fail)
    timer = profiling._Timer(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="mine"), timer.on(embedder.model):
        embedder.encode(TEXTS)
    assert_untouched(embedder.model, ops)


def test_fused_operations_stay_fused(embedding_dir, reranker_dir):
    pytest.importorskip("triton")
    for kind, directory, inputs, last in (
        (Embedder, embedding_dir, ["gravity"], "norm_pool"),
        (Reranker, reranker_dir, [("which?", "rain")], "norm_score"),
    ):
        opened = kind.from_pretrained(directory, dtype="float32", ops="triton")
        opened.model.layers = opened.model.layers[:1]
        found = by_name(profile(opened, inputs, repeats=1))
        assert set(found) == APART - {"pool"} | {"add_rms_norm", "residual add", last}
        H, n = opened.model.config.hidden_size, found["embed_tokens"].bytes // (8 + 8 * opened.model.config.hidden_size)
        assert found["rms_norm"].flops == 4 * n * H
        assert found["add_rms_norm"].flops == 5 * H  # one layer, its last token
        assert found[last].flops == (7 if last == "norm_pool" else 6) * H


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bytes_are_those_stored(embedding_dir, dtype):
    embedder = Embedder.from_pretrained(embedding_dir, dtype=dtype, device="cpu")
    found = by_name(profile(embedder, TEXTS, repeats=1))
    assert set(found) == (OPERATIONS if dtype == "bfloat16" else APART) | {"residual add"}
    c, T = embedder.model.config, sum(map(len, embedder.to_sequences(TEXTS)))
    width, size = c.num_attention_heads * c.head_dim, embedder.dtype.itemsize
    weight = c.hidden_size * width * 2 if dtype == "bfloat16" else c.hidden_size * width + 4 * width
    assert found["o_proj"].calls == found["q_proj" if dtype == "int8" else QKV].calls == c.num_hidden_layers
    embedder.model.ops = dataclasses.replace(embedder.model.ops, linears=None)
    found = by_name(profile(embedder, TEXTS, repeats=1))
    assert found["q_proj"].bytes == c.num_hidden_layers * (size * T * (c.hidden_size + width) + weight)


def test_late_interaction_is_timed_through_encode_tokens(embedder):
    embedder.model.layout = dataclasses.replace(embedder.layout, pooling=())
    found = by_name(profile(embedder, TEXTS, repeats=1))
    assert set(found) == OPERATIONS - {"pool"} | {"residual add"}


def test_pooling_counts_the_rows_that_it_reads(embedder):
    """Without shortcuts it gets all of them: of the last token it reads one for each text, of a mean each."""
    embedder.model.ops = dataclasses.replace(embedder.model.ops, rope=lambda *args: reference.rope(*args))
    H, T, N = embedder.model.config.hidden_size, sum(map(len, embedder.to_sequences(TEXTS))), len(TEXTS)
    pool = by_name(profile(embedder, TEXTS, repeats=1))["pool"]
    assert (pool.flops, pool.bytes) == (3 * N * H, 4 * 2 * N * H + 4 * (N + 1))
    embedder.model.layout = dataclasses.replace(embedder.layout, pooling=("mean",))
    pool = by_name(profile(embedder, TEXTS, repeats=1))["pool"]
    assert (pool.flops, pool.bytes) == (T * H + 3 * N * H, 4 * (T + N) * H + 4 * (N + 1))


def test_tables_add_up(embedder):
    report = profile(embedder, TEXTS, repeats=2)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in str(report).splitlines() if line[:1] == "|"]
    table = {row[0]: row[1:] for row in cells}
    assert OPERATIONS | {"residual add"} <= set(table)
    total = report.seconds * 1e3
    assert float(table["whole"][1]) == pytest.approx(total, abs=0.006)
    assert float(table["operations"][1]) + float(table["between the operations"][1]) == pytest.approx(total, abs=0.02)
    parts = [table[row.operation] for row in report.by_operation()]
    assert sum(float(row[1]) for row in parts) == pytest.approx(float(table["operations"][1]), abs=0.2)
    # Layers hold all but tokenizer, embedding, last norm and pooling.
    outside = {row.operation: row for row in report.rows if row.layer is None}
    assert set(outside) == {"tokenizer", "embed_tokens", "rms_norm", "pool"}
    layers = report.by_layer()
    assert [row.layer for row in layers] == list(range(embedder.model.config.num_hidden_layers))
    assert {str(row.layer) for row in layers} <= set(table)
    for number in ("calls", "flops", "bytes", "seconds", "limit"):
        inside = sum(getattr(row, number) for row in layers)
        whole = sum(getattr(row, number) for row in report.by_operation())
        assert inside + sum(getattr(row, number) for row in outside.values()) == pytest.approx(whole)
    qkv = by_name(report)[QKV]
    assert qkv.limit == pytest.approx(max(qkv.flops / 1e11, qkv.bytes / 1e10))
    assert float(table[QKV][4]) == pytest.approx(qkv.flops / qkv.seconds / 1e9, rel=0.01)
    assert float(table[QKV][6]) == pytest.approx(qkv.bytes / qkv.seconds / 1e9, rel=0.01)


def test_marks_on_a_gpu_are_events(monkeypatch):
    """As far as this can be seen without one: recorded in order, waited for, in milliseconds."""
    recorded: list[Any] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.done = False

        def record(self):
            recorded.append(self)

        def synchronize(self):
            self.done = True

        def elapsed_time(self, end):
            assert end.done
            return 1.5 * (recorded.index(end) - recorded.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    start, end = (profiling._mark(torch.device("cuda")) for _ in range(2))
    assert profiling._elapsed(start, end) == pytest.approx(1.5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "profile: expected one or more inputs, found none"),
        ({"inputs": "a text"}, "inputs: expected a list, found str"),
        ({"inputs": [("a", "pair")]}, "input 0: expected text"),
        ({"inputs": TEXTS, "repeats": 0}, "repeats: expected an integer of at least 1, found 0"),
    ],
)
def test_bad_input_is_said(embedder, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        profile(embedder, **arguments)


def test_command(embedding_dir, reranker_dir, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("gravity\na violin\n", encoding="utf-8")
    picture = tmp_path / "roofline.svg"
    options = ["--repeats", "1", "--dtype", "float32"]
    texts = ["--texts", str(tmp_path / "texts.txt"), "--text", "rain"]
    assert main(["profile", str(embedding_dir), *texts, "-o", str(picture), *options]) == 0
    out = capsys.readouterr().out
    assert "inputs: 3" in out
    assert "| gate_proj, up_proj | 4 |" in out
    assert "| 3 | 11 |" in out
    drawn = picture.read_text("utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in (QKV, GATE_UP, "o_proj", "attention", "between the operations"))
    assert main(["profile", str(reranker_dir), *options]) == 0
    assert "inputs: 7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["profile", "not-even-opened", "-o", str(tmp_path / "x.csv")])
    assert "expected a name ending in .png, .svg, .pdf" in capsys.readouterr().err
    report = profiling.Profile("", "", [], 1.0, Ceilings(1, 1))
    with pytest.raises(InputError, match=r"x\.csv: expected a name ending in .png, .svg, .pdf, found '.csv'"):
        report.draw(tmp_path / "x.csv")
