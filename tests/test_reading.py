"""The one reader: what a line is, what a file is, and that no text is lost between a file and what a command writes."""

import codecs
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_files import tiny
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3core import Embedder, InputError, Reranker, stream
from qwen3core.commands import main
from qwen3core.evaluation import read_retrieval, read_sts
from qwen3core.reading import as_list, read_jsonl, read_lines, read_rows
from qwen3core.training import Example, read_examples

PARTS = [
    "a",
    "é",
    "\n",
    "\r\n",
    "\r",
    "\u2028",
    "\u0085",
    "\x0b",
    "\x1c",
    "\ufeff",
    "\0",
    "\t",
    " ",
    "<|im_end|>",
    "x" * 9000,
]
CHARACTERS = st.one_of(st.sampled_from(PARTS), st.characters(exclude_categories=["Cs"]))
CONTENT = st.lists(CHARACTERS, max_size=12).map("".join)
SETTINGS = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def lines_of(content):
    """What the lines of a file are, by another way."""
    lines = re.split("\r\n|\r|\n", content.removeprefix("\ufeff"))
    return lines if lines[-1] else lines[:-1]


def run(capsys, *arguments):
    """Status, rows on standard output, standard error."""
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.split("\n")[:-1]], err


@SETTINGS
@given(content=CONTENT)
def test_lines_of_any_file(tmp_path, content):
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode())
    assert [line for line, _ in read_lines(path)] == lines_of(content)
    assert [where for _, where in read_lines(path)] == [f"{path}, line {n + 1}" for n in range(len(lines_of(content)))]
    with path.open(encoding="utf-8") as file:
        assert as_list("inputs", file) == lines_of(content)


@SETTINGS
@given(content=CONTENT)
def test_every_line_comes_out_of_embed_and_rerank(embedding_dir, reranker_dir, tmp_path, capsys, content):
    path = tmp_path / "x.txt"
    path.write_bytes(content.encode())
    texts = lines_of(content)
    status, rows, _ = run(capsys, "embed", embedding_dir, path, "--max-length", "64")
    assert status == 0
    assert [row["text"] for row in rows] == texts
    status, rows, _ = run(capsys, "rerank", reranker_dir, path, "--query", "which?", "--max-length", "128")
    assert status == 0
    assert [row["text"] for row in sorted(rows, key=lambda row: row["corpus_id"])] == texts


@SETTINGS
@given(texts=st.lists(st.one_of(CONTENT, st.just("\ud800"), st.just(17)), max_size=6), blank=st.integers(0, 6))
def test_every_row_comes_out_or_its_line_is_named(embedding_dir, reranker_dir, tmp_path, capsys, texts, blank):
    def written(name, rows):
        lines = [json.dumps(row, ensure_ascii="\ud800" in row.values()) + "\n" for row in rows]
        lines.insert(min(blank, len(lines)), " \n")
        (tmp_path / name).write_text("".join(lines), "utf-8", newline="")
        return tmp_path / name

    blanks = min(blank, len(texts))
    broken = [n + 1 + (n >= blanks) for n, text in enumerate(texts) if text in ("\ud800", 17)]
    documents = written("documents.jsonl", [{"text": text} for text in texts])
    pairs = written("pairs.jsonl", [{"query": "q", "document": text} for text in texts])
    for command, field in (
        (["embed", embedding_dir, documents, "--max-length", "64"], "text"),
        (["rerank", reranker_dir, pairs, "--max-length", "128"], "text"),
    ):
        status, rows, said = run(capsys, *command)
        assert status == (2 if broken else 0)
        if broken:
            assert f"jsonl, line {broken[0]}: " in said
            assert not rows
        else:
            assert [row[field] for row in rows] == texts

    examples = written("examples.jsonl", [{"query": "q", "response": text} for text in texts])
    unfit = [n + 1 + (n >= blanks) for n, text in enumerate(texts) if text in ("\ud800", 17) or not text.strip()]
    if unfit or not texts:
        with pytest.raises(InputError, match=f"line {unfit[0]}: " if unfit else "expected rows"):
            read_examples([examples])
    else:
        assert read_examples([examples]) == [Example("q", text) for text in texts]

    written("corpus.jsonl", [{"_id": n, "text": text} for n, text in enumerate([*texts, "last"])])
    written("queries.jsonl", [{"_id": "q", "text": "which?"}])
    (tmp_path / "qrels.tsv").write_text(f"q\t{len(texts)}\t1\n")
    scored = written("sts.jsonl", [{"sentence1": text, "sentence2": "b", "score": 1} for text in texts])
    if broken:
        for read in (lambda: read_retrieval(tmp_path, tmp_path / "qrels.tsv"), lambda: read_sts(scored)):
            with pytest.raises(InputError, match=f"line ({'|'.join(map(str, broken))}): "):
                read()
    else:
        assert list(read_retrieval(tmp_path, tmp_path / "qrels.tsv").corpus.values()) == [
            t.strip() for t in [*texts, "last"]
        ]
        assert [pair[0] for pair in read_sts(scored)] == texts


def test_what_is_not_utf8_is_named_by_its_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"gold\n\n" + "café\n".encode("latin-1"))
    lines = read_lines(path)
    assert [next(lines)[0], next(lines)[0]] == ["gold", ""]  # as it is read, not the whole file first
    with pytest.raises(InputError, match=r"x\.txt, line 3: expected UTF-8 text, found byte 0xe9"):
        next(lines)
    path.write_bytes("gold".encode("utf-16"))
    with pytest.raises(InputError, match="line 1: expected UTF-8 text, found byte 0xff"):
        list(read_lines(path))


def test_a_byte_order_mark_is_no_text(embedding_dir, tmp_path, capsys, monkeypatch):
    texts = ["gold is a metal", "bread is food"]
    plain = "".join(text + "\n" for text in texts).encode()
    rows = "".join(json.dumps({"text": text, "query": text, "response": "b"}) + "\n" for text in texts).encode()
    (tmp_path / "x.txt").write_bytes(codecs.BOM_UTF8 + plain)
    (tmp_path / "x.jsonl").write_bytes(codecs.BOM_UTF8 + rows)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + plain), "ascii"))
    for source in (tmp_path / "x.txt", tmp_path / "x.jsonl", "-"):
        assert [row["text"] for row in run(capsys, "embed", embedding_dir, source)[1]] == texts
    assert [example.query for example in read_examples([tmp_path / "x.jsonl"])] == texts


@pytest.mark.parametrize("name", ["texts.csv", "texts.json", "texts.jsonl.gz", "corpus", "two words"])
def test_no_files_name_is_taken_for_a_text(tmp_path, capsys, name):
    """Nor that of a file that is not there."""
    path = tmp_path / name
    message = "expected a file, or a text by --text, found nothing of this name"
    if name != "two words":
        assert run(capsys, "embed", "not-even-opened", path) == (2, [], f"qwen3core: {path}: {message}\n")
    path.write_text("gold is a metal\n")
    status, _, said = run(capsys, "embed", "not-even-opened", path)
    assert status == 2
    assert f"{path}: expected a file ending in .jsonl, .parquet, .txt, found " in said


def test_what_is_a_text_is_said(embedding_dir, tmp_path, capsys):
    (tmp_path / "TEXTS.TXT").write_text("in a file\n")
    arguments = ["embed", embedding_dir, "of two words", tmp_path / "TEXTS.TXT", "--text", "x.csv", "--text", ""]
    assert [row["text"] for row in run(capsys, *arguments)[1]] == ["of two words", "in a file", "x.csv", ""]
    assert "expected an INPUT or a --text, found neither" in run(capsys, "embed", embedding_dir)[2]


def test_an_open_files_lines_are_texts(embedding_dir, reranker_dir, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"gold is a metal\r\n\nwhat is chess?\n")
    texts = ["gold is a metal", "", "what is chess?"]
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32")
    expected = embedder.encode(texts)
    for call in (embedder.encode, lambda file: np.concatenate(list(stream(embedder.encode, file, block_size=2)))):
        with path.open(encoding="utf-8") as file:
            np.testing.assert_allclose(call(file), expected, atol=1e-6)
    with path.open(encoding="utf-8") as file:
        hits = Reranker.from_pretrained(reranker_dir).rank("which?", file, return_documents=True)
    assert sorted(hit["text"] for hit in hits) == sorted(texts)
    with pytest.raises(InputError, match="inputs: expected a list, found str"):
        next(stream(embedder.encode, "gold"))


def test_blank_lines_of_rows_are_none_in_every_command(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"query": "a", "response": "b"}\n  \n\n')
    assert len(list(read_jsonl(path))) == len(list(read_rows(path))) == len(read_examples([path])) == 1


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_no_locale_changes_a_text(locale):
    """Neither those of standard input and arguments, nor what is written."""
    texts = ["Käse ist Nahrung", "金"]
    command = [sys.executable, "-m", "qwen3core", "embed", "tiny-embedding", "-", "--text", texts[1]]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **locale}
    done = subprocess.run([*command], input=texts[0].encode(), capture_output=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.decode("utf-8").splitlines()] == texts


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "rerank"])
def test_of_20_000_lines_none_is_lost(tmp_path, command):
    """One of 10 MB, a byte order mark, both line ends, and equal ones among them."""
    model = tiny(tmp_path / "model", "embedding" if command == "embed" else "reranker")
    texts = [f"text {n % 15_000}" for n in range(20_000)]
    texts[777] = "gold is a metal " * 650_000
    ends = ["\n", "\r\n"]
    content = "".join(text + ends[n % 2] for n, text in enumerate(texts))
    (tmp_path / "x.txt").write_bytes(codecs.BOM_UTF8 + content.encode())
    out = tmp_path / "out.jsonl"
    query = ["--query", "which?"] if command == "rerank" else []
    call = [command, str(model), str(tmp_path / "x.txt"), "-o", str(out), "--max-length", "128", *query]
    assert main([*call, "--ops", "reference"]) == 0
    with out.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows.sort(key=lambda row: row.get("corpus_id", 0))
    assert len(rows) == len(texts)
    assert all(row["text"] == text for row, text in zip(rows, texts, strict=True))
