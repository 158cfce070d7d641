"""Files of evaluation sets: pairs of sentences with scores; a corpus, queries and qrels."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, check_text, check_unicode
from ..reading import read_jsonl, read_lines

Pair = tuple[str, str, float]
"""Two sentences and how alike people found them."""


@dataclass(frozen=True)
class Retrieval:
    """Texts of documents and of queries by id, and which documents are relevant to each query."""

    corpus: dict[str, str]
    """Document id to text, its title first."""
    queries: dict[str, str]
    """Query id to text."""
    qrels: dict[str, dict[str, int]]
    """Query id to document id to relevance; above 0 is relevant. A document need not be in the corpus."""
    absent_queries: int = 0
    """How many queries of the qrels file have no text and were left out."""

    def counts(self) -> dict[str, int]:
        """What is in it, in words, and what the measures have to do without."""
        return {
            "queries": len(self.queries),
            "documents": len(self.corpus),
            "judgements": sum(len(judged) for judged in self.qrels.values()),
            "of absent documents": sum(d not in self.corpus for judged in self.qrels.values() for d in judged),
            "absent queries": self.absent_queries,
            "queries with nothing relevant": sum(max(j.values(), default=0) < 1 for j in self.qrels.values()),
        }


def read_sts(path: str | Path) -> list[Pair]:
    """Pairs of STSbenchmark's own files, or of .jsonl rows of sentence1, sentence2 and score. Raises InputError.

    STSbenchmark's are tab-separated, with score, sentence1 and sentence2 in columns 5 to 7. Blank lines are skipped.
    """
    pairs: list[Pair] = []
    rows: list[tuple[Any, str]]
    fields = ("sentence1", "sentence2", "score")
    if Path(path).suffix.lower() == ".jsonl":
        rows = [([row.get(k) for k in fields] if isinstance(row, dict) else [row], at) for row, at in read_jsonl(path)]
    else:
        split = ((line.split("\t"), where) for line, where in read_lines(path) if line.strip())
        rows = [([*columns[5:7], *columns[4:5]], where) for columns, where in split]
    for row, where in rows:
        try:
            left, right, score = row
            pair = (left, right, float(score))
            if not math.isfinite(pair[2]):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: expected sentence1, sentence2 and a score, found {str(row)[:200]}") from None
        check_text(f"{where}: sentence1", left)
        check_text(f"{where}: sentence2", right)
        pairs.append(pair)
    return pairs


def read_retrieval(folder: str | Path, qrels: str | Path | None = None) -> Retrieval:
    """A folder as BEIR has them: corpus.jsonl, queries.jsonl, and qrels/test.tsv unless ``qrels`` names another.

    qrels: lines of query, document and relevance, or TREC's of four columns; columns end at tabs where a line has any,
    else at spaces. Judged documents that corpus.jsonl lacks count as not found, as in trec_eval; judged queries that
    queries.jsonl lacks are left out and counted, and so are, without a count, queries that are not judged.
    Raises InputError, also where no query or no judged document is left.
    """
    folder = Path(folder)
    # As in BEIR, a query has no title.
    corpus, queries = _texts(folder / "corpus.jsonl", title=True), _texts(folder / "queries.jsonl", title=False)
    path = Path(qrels or folder / "qrels" / "test.tsv")
    found: dict[str, dict[str, int]] = {}
    places: dict[tuple[str, str], str] = {}
    for number, (line, where) in enumerate(read_lines(path)):
        columns = line.split("\t") if "\t" in line else [column for column in line.split(" ") if column]
        if not line.strip() or (number == 0 and columns[-1] == "score"):
            continue
        # Of six digits at most: trec_eval's memory grows with the highest relevance.
        if len(columns) not in (3, 4) or not all(columns) or not re.fullmatch(r"[+-]?[0-9]{1,6}", columns[-1].strip()):
            raise InputError(f"{where}: expected a query's id, a document's and a whole number, found {line[:80]!r}")
        query, document, relevance = columns[0], columns[-2], int(columns[-1])
        check_id(where, query)
        check_id(where, document)
        judged = found.setdefault(query, {})
        before = places.setdefault((query, document), where)
        if judged.setdefault(document, relevance) != relevance:
            raise InputError(
                f"{where}: query {query!r}, document {document!r}: expected relevance {judged[document]} as in "
                f"{before}, found {relevance}"
            )
    asked = {query: queries[query] for query in found if query in queries}
    data = Retrieval(corpus, asked, {query: found[query] for query in asked}, len(found) - len(asked))
    if not asked:
        raise InputError(f"{path}: expected judged queries that are in queries.jsonl, found none of {len(found)}")
    counts = data.counts()
    if counts["judgements"] == counts["of absent documents"]:
        raise InputError(
            f"{path}: expected judged documents that are in corpus.jsonl, found none of {counts['judgements']}"
        )
    return data


def _texts(path: Path, *, title: bool) -> dict[str, str]:
    """Texts by id; title: each with its title before it."""
    texts: dict[str, str] = {}
    for row, where in read_jsonl(path):
        right = isinstance(row, dict) and type(row.get("_id")) in (str, int) and isinstance(row.get("text"), str)
        if not right or not isinstance(row.get("title") or "", str):
            raise InputError(f"{where}: expected an object with _id and text, found {str(row)[:80]}")
        key = str(row["_id"])
        check_id(where, key)
        text = f"{row.get('title') or ''} {row['text']}".strip() if title else row["text"]
        if texts.setdefault(key, text) != text:
            before = next(at for other, at in read_jsonl(path) if str(other["_id"]) == key)
            raise InputError(f"{where}: _id {key!r}: expected the text that it has in {before}, found another")
    return texts


def check_id(where: str, key: str) -> None:
    """Raise InputError for what trec_eval cannot hold: it crashes on a lone surrogate and reads up to a NUL."""
    check_unicode(f"{where}: id {key!r}", key)
    if "\0" in key:
        raise InputError(f"{where}: id {key!r}: expected no NUL character, found one")
