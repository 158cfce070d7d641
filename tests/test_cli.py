"""The command: inputs, outputs, exit codes, messages; files whole or not at all."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from qwen3core import Embedder, Ops, Reranker, samples
from qwen3core.commands import files, main


@pytest.fixture(scope="module")
def vectors(embedding_dir):
    return Embedder.from_pretrained(embedding_dir).encode_document(["one text", "two", "three\u2028 3"])


@pytest.fixture
def inputs(tmp_path):
    """The same three texts as an argument, a .txt line and a .jsonl row."""
    (tmp_path / "two.txt").write_text("two\n", encoding="utf-8")
    (tmp_path / "three.jsonl").write_text('{"text": "three\u2028 3", "id": 7}\n', encoding="utf-8")
    return ["one text", str(tmp_path / "two.txt"), str(tmp_path / "three.jsonl")]


def test_demo_runs_from_a_checkout_without_installing_or_network(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "qwen3core", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    start = lines.index("P(yes)  cosine  document") + 1
    ranked = lines[start : start + len(samples.DEMO_DOCUMENTS)]
    scores = [float(line.split()[0]) for line in ranked]
    assert scores == sorted(scores, reverse=True)
    # By meaning: no document has a word of the query's that says anything.
    assert all("violin" in line or "guitar" in line for line in ranked[:2])
    cosines = [float(line.split()[1]) for line in ranked]
    assert min(cosines[:2]) > max(cosines[2:])


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_embed_writes_each_format(embedding_dir, vectors, inputs, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    assert main(["embed", str(embedding_dir), *inputs, "-o", str(out)]) == 0
    if suffix == ".npy":
        found = np.load(out)
    elif suffix == ".safetensors":
        found = load_file(out)["embeddings"]
    else:
        rows = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
        assert [row["text"] for row in rows] == ["one text", "two", "three\u2028 3"]
        found = np.array([row["embedding"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(found, vectors)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["two.txt", "three.jsonl", out.name])


def test_embed_options_and_standard_input(embedding_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"first\nsecond\n")))
    assert (
        main(["embed", str(embedding_dir), "-", "--instruction", "Find it", "--dim", "40", "--dtype", "float32"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32")
    expected = embedder.encode_query(["first", "second"], instruction="Find it", truncate_dim=40)
    np.testing.assert_array_equal(np.array([row["embedding"] for row in rows], dtype=np.float32), expected)


def test_rerank_one_query(reranker_dir, inputs, capsys):
    assert main(["rerank", str(reranker_dir), *inputs, "--query", "which?", "--top-k", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    expected = Reranker.from_pretrained(reranker_dir).rank("which?", ["one text", "two", "three\u2028 3"], top_k=2)
    assert [(row["corpus_id"], row["score"]) for row in rows] == [(e["corpus_id"], e["score"]) for e in expected]


def test_rerank_pairs(reranker_dir, tmp_path):
    pairs = [("a?", "b"), ("c?", "d e f")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in pairs))
    assert main(["rerank", str(reranker_dir), str(file), "-o", str(tmp_path / "s.npy")]) == 0
    expected = Reranker.from_pretrained(reranker_dir).predict(pairs)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), expected)


def test_parity_exit_code(embedding_dir, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert (
        main(
            [
                "parity",
                str(embedding_dir),
                "--dtype",
                "float32",
                "--ops",
                "reference",
                "--inputs",
                "one text",
                "--text",
                "x",
            ]
        )
        == 0
    )
    assert "2 texts" in capsys.readouterr().out
    parity_fails(embedding_dir, "float32", capsys, monkeypatch)


@pytest.mark.slow
def test_parity_of_both_kinds_and_dtypes(embedding_dir, reranker_dir, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert main(["parity", str(reranker_dir), "--dtype", "float32"]) == 0
    assert "| score |" in capsys.readouterr().out
    parity_fails(embedding_dir, "bfloat16", capsys, monkeypatch)


def parity_fails(directory, dtype, capsys, monkeypatch):
    """With another activation than SwiGLU's, the command says so and fails."""
    wrong = dataclasses.replace(Ops.reference(), swiglu=lambda gate, up: gate * up)
    monkeypatch.setattr(Ops, "torch", staticmethod(lambda: wrong))
    assert main(["parity", str(directory), "--dtype", dtype]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "NOT equal" in out


def test_inspect(reranker_dir, tmp_path, capsys):
    assert main(["inspect", str(reranker_dir)]) == 0
    out = capsys.readouterr().out
    assert "46 tensors" in out
    assert out.count("  ok ") == 5
    shutil.copytree(reranker_dir, tmp_path / "broken")
    tokenizer = tmp_path / "broken" / "tokenizer.json"
    data = json.loads(tokenizer.read_text("utf-8"))
    data["normalizer"] = {"type": "Lowercase"}  # the template's capitals are lost
    tokenizer.write_text(json.dumps(data), encoding="utf-8")
    assert main(["inspect", str(tmp_path / "broken")]) == 1
    assert "FAIL the reranker's prefix" in capsys.readouterr().out


def test_synthesize(tmp_path, capsys):
    assert main(["synthesize", str(tmp_path / "new"), "--layout", "Qwen3-Reranker-small", "--seed", "3"]) == 0
    assert (tmp_path / "new" / "model.safetensors").exists()
    assert main(["synthesize", str(tmp_path)]) == 2  # would mix with what is there
    assert "expected a new or an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "{model}", "missing.txt"], "missing.txt"),
        (["embed", "{model}", "{tmp}/rows.jsonl"], "rows.jsonl, line 2: expected JSON, found '{oops'"),
        (["embed", "{model}", "{tmp}/numbers.jsonl"], "numbers.jsonl, line 1: expected a text, or an object with"),
        (["embed", "{model}", "{tmp}/latin.txt"], "latin.txt, line 1: expected UTF-8 text, found byte 0xe9"),
        (
            ["embed", "{tmp}/absent", "x y"],
            "absent: expected a checkpoint directory, one of tiny-embedding, tiny-reranker, or a hub id",
        ),
        (["embed", "{model}", "x y", "--dim", "65"], "truncate_dim: expected an integer from 1 to 64, found 65"),
        (["embed", "{model}", "x y z", "--batch-tokens", "1"], "batch_tokens: expected at least"),
        (
            ["rerank", "{model}", "x y", "--query", "q", "--top-k", "-1"],
            "top_k: expected an integer of at least 0, found -1",
        ),
        (["rerank", "{model}", "no query"], "argument 'no query': expected --query, or .jsonl rows with query"),
        (["rerank", "{model}", "{tmp}/half.jsonl"], "half.jsonl, line 1: expected a text, or an object"),
    ],
)
def test_bad_input_is_said_and_leaves_nothing(embedding_dir, tmp_path, capsys, arguments, message):
    (tmp_path / "rows.jsonl").write_text('"fine"\n{oops\n')
    (tmp_path / "numbers.jsonl").write_text("17\n")
    (tmp_path / "half.jsonl").write_text('{"query": "q"}\n')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    arguments = [a.format(model=embedding_dir, tmp=tmp_path) for a in arguments]
    assert main([*arguments, "-o", str(tmp_path / "out.npy")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_output_is_checked_before_any_work(embedding_dir, tmp_path, capsys):
    for out, message in (
        ("x.csv", "expected a name ending in .jsonl, .npy, .safetensors"),
        ("no/dir/x.npy", "expected a directory to write in, found none at no/dir"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["embed", "not-even-opened", "x", "-o", out])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_a_failing_write_keeps_the_old_file(embedding_dir, tmp_path, monkeypatch):
    out = tmp_path / "out.npy"
    out.write_bytes(b"old")

    def fail(path, array):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(files.np, "save", fail)
    assert main(["embed", str(embedding_dir), "--text", "x", "-o", str(out)]) == 2
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("redirected", "status", "said"),
    [("> /dev/full", 2, "qwen3core: [Errno 28] No space left on device\n"), ("| true", 1, "")],
)
def test_what_standard_output_does_not_take_is_said(embedding_dir, redirected, status, said):
    """Also the little that it holds until the end."""
    command = f"{sys.executable} -m qwen3core embed {embedding_dir} --text gold --dim 32 {redirected}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_closed_standard_output_is_said(embedding_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["embed", str(embedding_dir), "--text", "gold"]) == 2
    assert capsys.readouterr().err == "qwen3core: standard output: expected an open one, found it closed\n"
