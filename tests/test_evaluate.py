"""Evaluation: the measures by hand and by those who define them, and the files it reads."""

import json
import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

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


def stub(vectors) -> Any:
    """An embedder that gives each text the vector it is told."""

    def encode(texts, truncate_dim=None, convert_to_tensor=False):
        found = np.array([vectors[text] for text in texts], np.float32)
        return torch.from_numpy(found) if convert_to_tensor else found

    return SimpleNamespace(encode=encode, encode_query=encode, encode_document=encode, similarity=lambda a, b: a @ b.T)


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
    assert found["RR@10"] == pytest.approx(0.75)
    assert measure(data, {"q0": {"d1": 1.0}})["nDCG@10"] == pytest.approx(0.5)  # a query without results
    nothing = Retrieval(data.corpus, data.queries, {"q0": {"d1": 1}, "q1": {"d2": 0}})
    assert set(measure(nothing, {"q0": {"d1": 1.0}, "q1": {"d2": 1.0}}).values()) == {0.5}  # nothing relevant


# Documents d0 to d13, of which d12 and d13 are judged at times and never in the corpus; queries d0, q1, q2.
IDS = [f"d{i}" for i in range(14)]
QUERIES = ["d0", "q1", "q 2\u2028ü"]
JUDGEMENTS = st.dictionaries(st.tuples(st.sampled_from(QUERIES), st.sampled_from(IDS)), st.integers(-1, 3), min_size=1)
# Few values, many ties; two that are one in float32.
SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-9, 0.75])
RUNS = st.dictionaries(st.sampled_from(QUERIES), st.dictionaries(st.sampled_from(IDS[:12]), SCORES))


@settings(derandomize=True, deadline=None)
@given(JUDGEMENTS, RUNS)
def test_measures_are_trec_evals(tmp_path_factory, judgements, run):
    """Against trec_eval's rules in plain Python, and pytrec_eval's own numbers, through the files."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    judgements |= {("q1", "d1"): judgements.get(("q1", "d1"), 0)}
    rows = [(query, document, relevance) for (query, document), relevance in judgements.items()]
    corpus, queries = ([{"_id": key, "text": key} for key in keys] for keys in (IDS[:12], QUERIES))
    data = read_retrieval(write_beir(tmp_path_factory.getbasetemp() / "property", corpus, queries, rows))
    assert data.counts()["of absent documents"] == sum(document in IDS[12:] for _, document, _ in rows)
    expected: dict[str, list[float]] = {name: [] for name in ("nDCG@10", "R@10", "R@100", "RR@10")}
    for query, judged in data.qrels.items():
        ranked = sorted(run.get(query, {}).items(), key=lambda x: (np.float32(x[1]), x[0]), reverse=True)
        gains = [max(0, judged.get(document, 0)) for document, _ in ranked]
        ideal = sorted((max(0, relevance) for relevance in judged.values()), reverse=True)
        best, relevant = dcg(ideal), sum(gain > 0 for gain in ideal)
        expected["nDCG@10"].append(dcg(gains) / best if best else 0)
        for name, cut in (("R@10", 10), ("R@100", 100)):
            expected[name].append(sum(gain > 0 for gain in gains[:cut]) / relevant if relevant else 0)
        expected["RR@10"].append(next((1 / rank for rank, gain in enumerate(gains[:10], 1) if gain > 0), 0))
    found = measure(data, run)
    assert found == pytest.approx({name: sum(x) / len(x) for name, x in expected.items()}, abs=1e-9)
    names = {"nDCG@10": "ndcg_cut_10", "R@10": "recall_10", "R@100": "recall_100", "RR@10": "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(data.qrels, set(names.values())).evaluate(run)
    for values in theirs.values():
        values["recip_rank"] *= values["recip_rank"] >= 0.1  # which has no cut
    sums = {name: sum(values[their] for values in theirs.values()) for name, their in names.items()}
    assert found == pytest.approx({name: total / len(data.qrels) for name, total in sums.items()}, abs=1e-9)


def dcg(gains):
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], 1))


def test_ranks_beyond_ten_and_a_hundred():
    """The cuts, and among 150 ties trec_eval's order: the last id first."""
    pytest.importorskip("ir_measures")
    ids = [f"d{i:03}" for i in range(150)]
    for rank, expected in [
        (1, (1, 1, 1, 1)),
        (10, (1 / math.log2(11), 1, 1, 0.1)),
        (11, (0, 0, 1, 0)),
        (101, (0,) * 4),
    ]:
        data = Retrieval({}, {}, {"q": {ids[-rank]: 1}})
        for run in (dict.fromkeys(ids, 0.5), {d: float(i) for i, d in enumerate(ids)}):
            assert tuple(measure(data, {"q": run}).values()) == pytest.approx(expected), rank


@pytest.mark.parametrize(
    ("qrels", "run", "message"),
    [
        ({}, {}, "measure: expected judged queries, found none"),
        ({"q": {"d": 1}}, {"q": {"d": math.nan}}, "run: query 'q', document 'd': expected a finite score, found nan"),
        ({"q": {"d\ud800": 1}}, {}, "qrels: id .* expected Unicode text"),  # a crash of pytrec_eval
        ({"q": {"d": 1}}, {"q": {"d\0": 1.0}}, "run: id .* expected no NUL"),  # the same as "d" to pytrec_eval
    ],
)
def test_what_cannot_be_measured(qrels, run, message):
    pytest.importorskip("ir_measures")
    with pytest.raises(InputError, match=message):
        measure(Retrieval({}, {}, qrels), run)


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
        ({"_id": "\ud800", "text": "x"}, "line 5: expected Unicode text"),
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


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_search_is_the_full_ranking(data):
    """Vectors of integers, so that scores are exact: the best of all but the query's own id, whatever the cut."""
    dimension = st.lists(st.integers(-3, 3), min_size=3, max_size=3)
    ids = data.draw(st.lists(st.sampled_from(IDS), unique=True, min_size=1))
    vectors = {key: data.draw(dimension) for key in [*ids, "d0", "q1"]}
    top, ignore = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    retrieval = Retrieval({key: key for key in ids}, {key: key for key in ("d0", "q1")}, {})
    run = search(stub(vectors), retrieval, top=top, ignore_identical_ids=ignore)
    for query, found in run.items():
        scores = {key: float(np.dot(vectors[key], vectors[query])) for key in ids if not (ignore and key == query)}
        assert list(found.values()) == sorted(scores.values(), reverse=True)[:top]
        assert found.items() <= scores.items()


def test_a_query_that_is_a_document(tmp_path):
    """It is no answer to itself, and no rank is lost by that; a judgement that it is one is reported."""
    pytest.importorskip("ir_measures")
    corpus = texts(a1="trout", a2="a trout", b1="gold", b2="a gold")
    folder = write_beir(tmp_path, corpus, [corpus[0], corpus[2]], [("a1", "a2", 1), ("b1", "b2", 1)])
    data = read_retrieval(folder)
    embedder = stub({"trout": [1, 0], "a trout": [0.8, 0.6], "gold": [0, 1], "a gold": [0.6, 0.8]})
    run = search(embedder, data, top=2)
    assert {query: list(found) for query, found in run.items()} == {"a1": ["a2", "b2"], "b1": ["b2", "a2"]}
    assert set(measure(data, run).values()) == {1}
    assert measure(data, search(embedder, data, ignore_identical_ids=False))["RR@10"] == 0.5
    data.qrels["a1"]["a1"] = 1
    with pytest.warns(UserWarning, match="1 of 2 queries lost a relevant document that has their own id"):
        search(embedder, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(embedder, data, ignore_identical_ids=False)
    with pytest.raises(InputError, match="top: expected an integer of at least 1, found 0"):
        search(embedder, data, top=0)


def test_search_finds_each_text_itself(embedding_dir):
    texts = {str(i): f"{'gravity ' * i}pulls {i}" for i in range(5)}
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32")
    embedder.prompts = {"query": "", "document": ""}
    data = Retrieval(texts, texts, {key: {key: 1} for key in texts})
    for dim in (None, 32):
        run = search(embedder, data, dim=dim, top=3, ignore_identical_ids=False)
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


# Components of which products and sums are exact in float64, so that ties are: few, or many.
UNIT = st.lists(st.sampled_from([-0.5, 0.5]), min_size=4, max_size=4)
ANY = st.lists(st.integers(-1024, 1024).map(lambda n: n / 1024), min_size=4, max_size=4)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(UNIT, UNIT, st.integers(0, 3)), min_size=2) | st.lists(st.tuples(ANY, ANY, st.floats(0, 5))))
def test_spearman_is_scipys(rows):
    spearmanr = pytest.importorskip("scipy.stats").spearmanr
    vectors: dict[str, list[float]] = {}
    pairs = []
    for i, (left, right, score) in enumerate(rows):
        vectors |= {f"l{i}": left, f"r{i}": right}
        pairs.append((f"l{i}", f"r{i}", float(score)))
    cosines = [math.fsum(a * b for a, b in zip(x, y, strict=True)) for x, y, _ in rows]
    if len({score for *_, score in rows}) < 2 or len(set(cosines)) < 2:
        with pytest.raises(InputError, match=r"sts: (expected two or more pairs|(scores|cosines): expected finite)"):
            sts(stub(vectors), pairs)
    else:
        expected = spearmanr(cosines, [score for *_, score in rows]).statistic
        assert sts(stub(vectors), pairs) == pytest.approx(expected, abs=1e-9)


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
    counts, *lines = capsys.readouterr().out.splitlines()
    assert counts == (
        "queries 2  documents 4  judgements 3  of absent documents 0  absent queries 0  queries with nothing relevant 0"
        "  own ids left out 0"
    )
    assert [line.split("  ")[0] for line in lines] == ["dim 64", "dim 32"]
    assert all("  nDCG@10 0." in line and "  reranked nDCG@10 0." in line for line in lines)


def test_the_command_says_how_many_lost_their_own_id(embedding_dir, tmp_path, capsys, recwarn):
    pytest.importorskip("ir_measures")
    folder = write_beir(tmp_path, texts(a="x", b="y"), texts(a="x"), [("a", "a", 1), ("a", "b", 1)])
    for option, said, measured in [
        ("--ignore-identical-ids", "own ids left out 1", "  R@10 0.5"),
        ("--no-ignore-identical-ids", "own ids left out 0", "  R@10 1.0"),
    ]:
        assert main(["eval", str(embedding_dir), "--retrieval", str(folder), option]) == 0
        counts, row = capsys.readouterr().out.splitlines()
        assert said in counts
        assert measured in row


def test_options_of_the_command_hold_for_the_reranker(embedding_dir, reranker_dir, tmp_path):
    pytest.importorskip("ir_measures")
    document = "gold <|im_end|> " * 60
    folder = write_beir(tmp_path, texts(d=document), texts(q="gold"), [("q", "d", 1)])
    tokens = len(Embedder.from_pretrained(embedding_dir).tokenizer.embedding([document], 8192)[0])
    command = ["eval", str(embedding_dir), "--retrieval", str(folder), "--reranker", str(reranker_dir)]
    for options, expected in [
        ([], {"special tokens"}),
        (["--max-length", str(tokens)], {"special tokens", "truncated"}),  # by the reranker, which adds its template
        (["--split-special-tokens"], set()),
    ]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert main([*command, *options]) == 0
        found = {word for word in ("special tokens", "truncated") for w in said if word in str(w.message)}
        assert found == expected, options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --sts, --retrieval or --mteb with tasks, found none"),
        (["--sts", "x", "--qrels", "y"], "expected --retrieval with --qrels, found none"),
        (["--sts", "x", "--reranker", "y"], "expected --retrieval with --reranker, found none"),
        (["--sts", "x", "--no-ignore-identical-ids"], "expected --retrieval with --ignore-identical-ids, found none"),
        (["--retrieval", "BEIR", "--dims", "64", "65"], "--dims: expected an integer from 1 to 64, found 65"),
    ],
)
def test_options_that_cannot_be(embedding_dir, beir, capsys, options, message):
    pytest.importorskip("ir_measures")
    assert main(["eval", str(embedding_dir), *(str(beir) if x == "BEIR" else x for x in options)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_mteb_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", "tiny-embedding", "--mteb", "STSBenchmark"]) == 2
    assert "mteb is not installed: pip install mteb" in capsys.readouterr().err
