"""Evaluation: the measures by hand and by those who define them, and the files it reads."""

import json
import math

import pytest

from qwen3core import Embedder, InputError
from qwen3core.commands import main
from qwen3core.evaluation import Retrieval, measure, read_retrieval, read_sts, search, sts


@pytest.fixture
def beir(tmp_path):
    corpus = [{"_id": f"d{i}", "title": "T" if i == 0 else "", "text": f"text {i}"} for i in range(4)]
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)]
    return write_beir(tmp_path / "beir", corpus, queries, [("q0", "d1", 1), ("q1", "d2", 2), ("q1", "d3", 1)])


def write_beir(folder, corpus, queries, qrels):
    """The three files of BEIR from rows; qrels as rows of query, document and relevance."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    lines = ["query-id\tcorpus-id\tscore\n", *("\t".join(map(str, row)) + "\n" for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("".join(lines), "utf-8")
    return folder


def texts(**by_id):
    """Rows of a corpus or of queries."""
    return [{"_id": key, "text": text} for key, text in by_id.items()]


def test_measures_by_hand(beir):
    pytest.importorskip("ir_measures")
    data = read_retrieval(beir)
    assert data == Retrieval(
        {"d0": "T text 0", "d1": "text 1", "d2": "text 2", "d3": "text 3"},
        {"q0": "query 0", "q1": "query 1"},
        {"q0": {"d1": 1}, "q1": {"d2": 2, "d3": 1}},
    )
    run = {"q0": {"d0": 0.9, "d1": 0.5, "d2": 0.1}, "q1": {"d3": 0.9, "d2": 0.5}}
    first = 1 / math.log2(3)
    second = (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))
    found = measure(data, run)
    assert found["nDCG@10"] == pytest.approx((first + second) / 2)
    assert found["R@10"] == found["R@100"] == 1
    assert measure(data, {"q0": {"d1": 1.0}})["nDCG@10"] == pytest.approx(0.5)  # a query without results


def test_qrels_in_trecs_format(beir, tmp_path):
    trec = tmp_path / "qrels.txt"
    trec.write_text("q0 0 d1 1\nq1 0 d2 2\nq1 0 d3 1\n", "utf-8")
    assert read_retrieval(beir, trec) == read_retrieval(beir)


@pytest.mark.parametrize(
    "line",
    ["q0\td1\tyes", "q0", "q0 0 0 d1 1", "q0\td1\t1\t", "q0\t\t1", "q0\td1\t1_0", "q0 d1\x851", "q0\td1\t9999999"],
)
def test_broken_qrels(beir, line):
    path = beir / "qrels" / "test.tsv"
    path.write_text(f"q0\td1\t1\n{line}\n", "utf-8")
    with pytest.raises(InputError, match="line 2: expected a query's id, a document's and a whole number, found"):
        read_retrieval(beir)


def test_absent_documents_and_queries_are_counted(beir):
    pytest.importorskip("ir_measures")
    path = beir / "qrels" / "test.tsv"
    path.write_text("q0\td1\t1\nq0\td9\t1\nq9\td1\t1\nq1\td2\t0\n", "utf-8")
    data = read_retrieval(beir)
    assert data.counts() == {
        "queries": 2,
        "documents": 4,
        "judgements": 3,
        "of absent documents": 1,
        "absent queries": 1,
        "queries with nothing relevant": 1,
    }
    assert measure(data, {"q0": {"d1": 1.0}})["R@10"] == 0.25
    for lines, message in [
        ("q8\td1\t1\nq9\td1\t1\n", "expected judged queries that are in queries.jsonl, found none of 2"),
        ("q0\td8\t1\n", "expected judged documents that are in corpus.jsonl, found none of 1"),
        ("q0\td1\t1\nq0\td2\t1\nq0\td1\t2\n", "line 3: .* 'd1': expected relevance 1 as in .* line 1, found 2"),
    ]:
        path.write_text(lines, "utf-8")
        with pytest.raises(InputError, match=message):
            read_retrieval(beir)


def test_ids_of_all_kinds(tmp_path):
    """With spaces, of digits, of line ends that are none; a title is a document's alone."""
    strange = ["Animal rights 1", "7", "文 \u2028", "\x85", " x"]
    corpus = [{"_id": 7 if key == "7" else key, "title": "T", "text": "x"} for key in strange]
    queries = [{"_id": "a query", "title": "T", "text": "x"}, {"_id": 7, "text": "y"}]
    rows = [("a query", key, 1) for key in strange] + [("7", "7", 1)]
    data = read_retrieval(write_beir(tmp_path, corpus, queries, rows))
    assert data.corpus == dict.fromkeys(strange, "T x")
    assert data.queries == {"a query": "x", "7": "y"}
    assert data.qrels == {"a query": dict.fromkeys(strange, 1), "7": {"7": 1}}
    trec = tmp_path / "trec.tsv"
    trec.write_text("\ufeff" + "".join(f"{query}\t0\t{key}\t{n}\r\n" for query, key, n in rows), "utf-8")
    assert read_retrieval(tmp_path, trec) == data


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"_id": "d1", "text": "another"},
            "line 5: _id 'd1': expected the text that it has in .*line 2, found another",
        ),
        ({"text": "no id"}, "line 5: expected an object with _id and text"),
        ({"_id": 1.5, "text": "x"}, "line 5: expected an object with _id and text"),
        ({"_id": True, "text": "x"}, "line 5: expected an object with _id and text"),
        ({"_id": "x", "title": 3, "text": "x"}, "line 5: expected an object with _id and text"),
        ({"_id": "\ud800", "text": "x"}, "line 5: id .*: expected Unicode text"),
        ({"_id": "x", "text": "\ud800"}, "line 5: expected Unicode text"),
        ({"_id": "a\0", "text": "x"}, "line 5: id .*: expected no NUL"),
    ],
)
def test_broken_rows(beir, row, message):
    with (beir / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        read_retrieval(beir)


def test_the_same_row_twice(beir):
    rows = (beir / "corpus.jsonl").read_text("utf-8")
    (beir / "corpus.jsonl").write_text(rows + rows, "utf-8")
    assert len(read_retrieval(beir).corpus) == 4


def test_search_finds_each_text_itself(embedding_dir):
    texts = {str(i): f"{'gravity ' * i}pulls {i}" for i in range(5)}
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32")
    embedder.prompts = {"query": "", "document": ""}
    data = Retrieval(texts, texts, {key: {key: 1} for key in texts})
    for dim in (None, 32):
        run = search(embedder, data, dim=dim, top=3)
        assert all(len(found) == 3 and max(found, key=lambda key: found[key]) == query for query, found in run.items())


def test_pairs(embedding_dir, tmp_path, capsys):
    pytest.importorskip("scipy")
    tsv = tmp_path / "pairs.csv"
    rows = [("a cat", "a cat", 5.0), ("a cat", 'the "moon', 1.0), ("a dog", "prime numbers", 0.5)]
    tsv.write_text("".join(f"main\tx\t2012\t1\t{score}\t{a}\t{b}\n" for a, b, score in rows) + "\n", "utf-8")
    lines = tmp_path / "pairs.JSONL"
    fields = ("sentence1", "sentence2", "score")
    lines.write_text("".join(json.dumps(dict(zip(fields, row, strict=True))) + "\n" for row in rows), "utf-8")
    assert read_sts(tsv) == read_sts(lines) == rows
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32")
    cosines = [float(embedder.similarity(*embedder.encode([a, b]))) for a, b, _ in rows]
    ranks = [sorted(cosines).index(c) for c in cosines]
    expected = 1 - 6 * sum((r - e) ** 2 for r, e in zip(ranks, [2, 1, 0], strict=True)) / (3 * 8)
    assert sts(embedder, rows) == pytest.approx(expected)
    tsv.write_text("main\tx\t2012\t1\tmuch\ta\tb\n", "utf-8")
    with pytest.raises(InputError, match="line 1: expected sentence1, sentence2 and a score, found"):
        read_sts(tsv)


@pytest.mark.parametrize(
    "row",
    [
        {"sentence1": "a", "score": 1},
        *({"sentence1": "a", "sentence2": "b", "score": score} for score in ("nan", None, 10**400)),
        ["a"],
        "ab1",
    ],
)
def test_broken_pairs(tmp_path, row):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(row), "utf-8")
    with pytest.raises(
        InputError, match=r"line 2: (expected sentence1, sentence2 and a score|sentence2: expected text)"
    ):
        read_sts(path)


def test_the_command(embedding_dir, reranker_dir, beir, capsys):
    pytest.importorskip("ir_measures")
    command = ["eval", str(embedding_dir), "--retrieval", str(beir), "--dims", "64", "32"]
    assert main([*command, "--reranker", str(reranker_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["dim 64", "dim 32"]
    assert all("  nDCG@10 0." in line and "  reranked nDCG@10 0." in line for line in lines)
    assert main(["eval", str(embedding_dir)]) == 2
    assert "expected --sts or --retrieval" in capsys.readouterr().err
