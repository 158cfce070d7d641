"""Files of evaluation sets: pairs of sentences with scores; a corpus, queries and qrels."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..reading import read_jsonl, read_lines

Pair = tuple[str, str, float]
"""Two sentences and how alike people found them."""


@dataclass(frozen=True)
class Retrieval:
    """Texts of documents and of queries by id, and which documents are relevant to each query."""

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    """Query id to document id to relevance."""


def read_sts(path: str | Path) -> list[Pair]:
    """Pairs of STSbenchmark's own files, or of .jsonl rows of sentence1, sentence2 and score. Raises InputError.

    STSbenchmark's are tab-separated, with score, sentence1 and sentence2 in columns 5 to 7.
    """
    pairs: list[Pair] = []
    if str(path).endswith(".jsonl"):
        rows = [(where, [row.get(k) for k in ("sentence1", "sentence2", "score")]) for row, where in read_jsonl(path)]
    else:
        split = ((where, line.split("\t")) for line, where in read_lines(path))
        rows = [(where, [*columns[5:7], *columns[4:5]]) for where, columns in split]
    for where, row in rows:
        try:
            left, right, score = row
            pairs.append((str(left), str(right), float(score)))
        except (TypeError, ValueError):
            raise InputError(f"{where}: expected sentence1, sentence2 and a score, found {row}") from None
    return pairs


def read_retrieval(folder: str | Path, qrels: str | Path | None = None) -> Retrieval:
    """A folder as BEIR has them: corpus.jsonl, queries.jsonl, and qrels/test.tsv unless ``qrels`` names another.

    qrels: lines of query, document and relevance, or TREC's of four columns. Only queries in it are read.
    Raises InputError.
    """
    folder = Path(folder)
    corpus, queries = _texts(folder / "corpus.jsonl"), _texts(folder / "queries.jsonl")
    path = Path(qrels or folder / "qrels" / "test.tsv")
    found: dict[str, dict[str, int]] = {}
    for number, (line, where) in enumerate(read_lines(path)):
        columns = line.split()
        if not columns or (number == 0 and columns[-1] == "score"):
            continue
        try:
            query, document = columns[0], columns[-2]
            relevance = int(columns[-1])
            if len(columns) not in (3, 4) or query not in queries or document not in corpus:
                raise ValueError
        except (ValueError, IndexError):
            raise InputError(
                f"{where}: expected a query's id, a document's and a whole number, found {line[:80]!r}"
            ) from None
        found.setdefault(query, {})[document] = relevance
    return Retrieval(corpus, {query: queries[query] for query in found}, found)


def _texts(path: Path) -> dict[str, str]:
    """Texts by id, each with its title before it."""
    texts = {}
    for row, where in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "_id" not in row:
            raise InputError(f"{where}: expected an object with _id and text, found {str(row)[:80]}")
        texts[str(row["_id"])] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts
