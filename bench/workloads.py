"""The workloads that the engines are timed on: each yields rows of results.

A row is {"workload", "size", "tokens", "engine", "cosine" or "dP", "p25", "p50", "p75" in ms, "ratio", "ratio_p25",
"ratio_p75"}. The ratio is this engine's time over qwen3core's, taken within each repeat; its median and quartiles are
over the repeats. An engine whose results differ from qwen3core's by more than ``AGREE`` has no times but {"differs"}.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from bench import engines
from bench.worker import Failed, Worker
from qwen3core.laboratory import timing
from qwen3core.samples import LONG_DOCUMENT
from qwen3core.tokenizer import Tokenizer

OURS = "qwen3core"
QUERY = "how does gravity move the planets around the sun"
AGREE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-3, 6e-2), "int8": (1e-2, 1e-1)}
"""How much 1 - cosine and P(yes) may differ from qwen3core's. Float32: rounding gives 1e-6, a float16 cache of keys
2e-4. Bfloat16: on random weights transformers' own error is 3e-2 of a vector's length and of P(yes), so two engines
differ by up to 6e-2, which is 2e-3 of cosine. Int8, ours and llama.cpp's: twice what 8 bits gave. A wrong pooling, mask
or template is beyond all of them."""
WARM_UP = 10
"""Calls before any is timed, or two for each repeat: what an engine does at its first ones is seen in ``startup``."""
BATCHED = ("sentence-transformers", "OpenVINO")
"""Engines whose best batch size is looked for."""
BATCH_SIZES = {"cpu": (1, 2, 4, 8), "cuda": (16, 64, 256)}
SETTLED = 0.25
"""Seconds before each call: Intel's OpenMP lets the threads of the last engine spin for 0.2."""
BUDGET = 120e3
"""Milliseconds that a workload's repeats may take, unless there are 3."""
Row = dict[str, Any]
Run = Callable[[], tuple[float, numpy.ndarray]]


@dataclass
class Setup:
    """The checkpoints, the precision and the size of the workloads; the processes of the engines."""

    embedding: Path
    reranker: Path
    dtype: str
    device: str
    repeats: int
    scale: float
    """Share of the full workload's texts."""
    length: int
    """Tokens of the long text."""
    pythons: dict[str, str]
    """The interpreter of an environment, by how the names of its engines begin, in lower case."""
    engines: list[str] = field(default_factory=list)
    """Those to compare with; all if empty."""
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of the packages of every engine that was opened."""
    job: str = ""
    workers: dict[str, Worker] = field(default_factory=dict)
    """The open engines that do this job."""

    def texts(self, lengths: list[int]) -> tuple[list[str], int]:
        """Return texts of about these lengths in tokens, no two alike, and the number of their tokens in all."""
        words, chance = LONG_DOCUMENT.split(), random.Random(0)
        tokenizer = Tokenizer(self.embedding / "tokenizer.json")
        texts = []
        for n in lengths:
            [ids] = tokenizer.encode([" ".join(chance.choices(words, k=n))])
            texts.append(tokenizer.decode(ids[: n - 1]).replace("\ufffd", "").strip())
        return texts, sum(map(len, tokenizer.embedding(texts, 2**31)))

    def options(self, job: str) -> dict[str, Any]:
        """What a worker is opened with, and its engine's name beside."""
        directory = self.reranker if job == "rerank" else self.embedding
        length = max(self.length, engines.MAX_LENGTH)
        return {"directory": directory, "dtype": self.dtype, "device": self.device, "length": length}

    def open(self, job: str, engine: str) -> Worker:
        """Start an engine's process. Raises Failed."""
        fitting = [path for start, path in self.pythons.items() if engine.lower().startswith(start)]
        worker = Worker([*fitting, sys.executable][0], job=job, engine=engine, **self.options(job))
        self.versions[engine] = worker.versions
        return worker

    def opened(self, job: str) -> dict[str, Worker]:
        """All engines that do this job, still open since they were last asked for; those that fail are printed."""
        if job != self.job:
            self.close()
            self.job = job
            for name in engines.OPENERS[job](**self.options(job)):
                if self.engines and name not in [OURS, *self.engines]:
                    continue
                try:
                    self.workers[name] = self.open(job, name)
                    call = [QUERY, ["gravity"]] if job == "rerank" else [["gravity"]]
                    self.workers[name].call([call] * min(WARM_UP, 2 * self.repeats))
                except Failed as error:
                    print(f"{name}: {error}", flush=True)
        return self.workers

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers, self.job = {}, ""


def corpus(setup: Setup) -> Iterator[Row]:
    """A corpus of texts of lognormal lengths: median 90 tokens, sigma 0.8, at most 1024."""
    texts, tokens = corpus_texts(setup)
    runs: dict[str, Run] = {}
    for name, worker in setup.opened("embed").items():
        runs[name] = partial(worker.call, [[texts]])
        if name in BATCHED:
            sizes = {n: partial(worker.call, [[texts]], batch_size=n) for n in BATCH_SIZES[setup.device]}
            times = {n: min(run()[0] for _ in range(2)) for n, run in sizes.items()}
            best = min(times, key=lambda n: times[n])
            print(f"{name}: its best batches are of {best}, {times}", flush=True)
            runs[f"{name}, best batches"] = sizes[best]
    products = setup.open("products", engines.PRODUCTS)
    runs[engines.PRODUCTS] = partial(products.call, [[tokens]])
    yield from compared({"workload": "corpus", "size": f"{len(texts)} texts", "tokens": tokens}, runs, setup)
    products.close()


def corpus_texts(setup: Setup, times: int = 1) -> tuple[list[str], int]:
    count = round((512 if setup.device == "cuda" else 24) * times * setup.scale)
    drawn = numpy.random.default_rng(0).lognormal(numpy.log(90), 0.8, count)
    return setup.texts([min(1024, max(2, round(n))) for n in drawn])


def lengths(setup: Setup) -> Iterator[Row]:
    """Batches of texts of equal length; for the first, as for the corpus, the model's matrix products alone, too."""
    workers = setup.opened("embed")
    products = setup.open("products", engines.PRODUCTS)
    for count, length in ((8, 128), (4, 512), (1, 2048)):
        texts, tokens = setup.texts([length] * count)
        runs: dict[str, Run] = {name: partial(worker.call, [[texts]]) for name, worker in workers.items()}
        if length == 128:
            runs[engines.PRODUCTS] = partial(products.call, [[tokens]])
        labels = {"workload": "equal lengths", "size": f"{count} x {length}", "tokens": tokens}
        yield from compared(labels, runs, setup)
    products.close()


def query(setup: Setup) -> Iterator[Row]:
    """One short text at a time."""
    texts, tokens = setup.texts([14] * 8)
    runs = {name: partial(worker.call, [[[text]] for text in texts]) for name, worker in setup.opened("embed").items()}
    for row in compared({"workload": "one query", "size": "14 tokens", "tokens": tokens}, runs, setup):
        yield row | {p: row[p] / len(texts) for p in ("p25", "p50", "p75") if p in row}


def long(setup: Setup) -> Iterator[Row]:
    """One long text: time and peak memory."""
    texts, tokens = setup.texts([setup.length])
    workers = setup.opened("embed")
    for worker in workers.values():
        worker.peak()
    runs = {name: partial(worker.call, [[texts]]) for name, worker in workers.items()}
    for row in compared({"workload": "long", "size": f"{setup.length} tokens", "tokens": tokens}, runs, setup):
        yield row | {"MiB": workers[row["engine"]].peak()}


def growth(setup: Setup) -> Iterator[Row]:
    """Time as texts grow in number, and in length; qwen3core only."""
    worker = setup.opened("embed")[OURS]
    counts = [(f"{n} texts", [32] * n) for n in (max(1, round(setup.scale * 4**i)) for i in range(1, 5))]
    singles = [(f"1 x {n}", [n]) for n in (128, 512, 2048, 8192) if n <= setup.length]
    for size, token_counts in counts + singles:
        texts, tokens = setup.texts(token_counts)
        labels = {"workload": "growth", "size": size, "tokens": tokens}
        yield from compared(labels, {OURS: partial(worker.call, [[texts]])}, setup)


def served(setup: Setup) -> Iterator[Row]:
    """Four times the corpus from 16 clients at a time, a text a request, beside the same texts in one call."""
    texts, tokens = corpus_texts(setup, 4)
    runs = {name: partial(worker.call, [[texts]]) for name, worker in setup.opened("served").items()}
    yield from compared({"workload": "served", "size": f"{len(texts)} texts", "tokens": tokens}, runs, setup)


def rerank(setup: Setup) -> Iterator[Row]:
    """One query with documents of about 120 tokens; only the documents' tokens are counted."""
    count = round((50 if setup.device == "cuda" else 12) * min(1, setup.scale))
    documents, tokens = setup.texts([random.Random(i).randint(90, 150) for i in range(count)])
    runs = {name: partial(worker.call, [[QUERY, documents]]) for name, worker in setup.opened("rerank").items()}
    yield from compared({"workload": "rerank", "size": f"1 query, {count} documents", "tokens": tokens}, runs, setup)


def startup(setup: Setup) -> Iterator[Row]:
    """From the start of a process to its first vector: files in the page cache, whatever an engine compiles, too."""
    names = list(setup.opened("embed"))
    setup.close()
    times = timing.alternate({name: partial(first_vector, setup, name) for name in names}, min(3, setup.repeats))
    yield from statistics({"workload": "start-up", "size": "first vector"}, times)


def first_vector(setup: Setup, engine: str) -> float:
    start = time.perf_counter()
    worker = setup.open("embed", engine)
    worker.call([[[QUERY]]])
    elapsed = (time.perf_counter() - start) * 1e3
    worker.close()
    return elapsed


def memory(setup: Setup) -> Iterator[Row]:
    """Peak resident memory in MiB, while an engine opens, then serves one text at a time, then the corpus."""
    names = list(setup.opened("embed"))
    setup.close()
    queries, corpus = setup.texts([14] * 16)[0], corpus_texts(setup)[0]
    calls = {"first vector": [[[QUERY]]], "queries": [[[text]] for text in queries], "corpus": [[corpus]]}
    ours: dict[str, float] = {}
    for name in names:
        worker = setup.open("embed", name)
        for size, found in calls.items():
            worker.call(found)
            peak = worker.peak()
            row = {"workload": "memory", "size": size, "engine": name, "MiB": peak}
            yield row | {"ratio": peak / ours.setdefault(size, peak)}  # the first engine is ours
        worker.close()


WORKLOADS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    f.__name__: f for f in (corpus, lengths, query, long, growth, startup, memory, rerank, served)
}


def compared(labels: Row, runs: Mapping[str, Run], setup: Setup) -> Iterator[Row]:
    """Rows of those engines that agree with the first, timed, and of those that do not."""
    found: dict[str, Row] = {}
    expected = None
    total = 0.0
    for name, run in runs.items():
        try:
            elapsed, result = run()
            total += elapsed
            expected = result if expected is None else expected
            found[name] = agreement(result, expected, setup.dtype, name) if len(result) else {}
        except Failed as error:
            found[name] = {"differs": str(error)}
    agreeing = {name: partial(settled, runs[name]) for name, row in found.items() if "differs" not in row}
    times = timing.alternate(agreeing, min(setup.repeats, max(3, int(BUDGET / total))))
    for row in statistics(labels, times):
        found[row["engine"]] = row | found[row["engine"]]
    for name, row in found.items():
        yield labels | {"engine": name} | row


def settled(run: Run) -> float:
    time.sleep(SETTLED)
    return run()[0]


def agreement(found: numpy.ndarray, expected: numpy.ndarray, dtype: str, engine: str) -> Row:
    """The least cosine of vectors, or the largest difference of scores; and whether it is too far from ours."""
    limits = AGREE["int8" if "int8" in engine or "Q8_0" in engine else dtype]
    if found.shape != expected.shape:
        return {"differs": f"shape {found.shape}"}
    if found.ndim == 1:
        row = {"dP": float(abs(found - expected).max())}
        close = row["dP"] <= limits[1]
    else:
        unit, other = (x / numpy.linalg.norm(x, axis=1, keepdims=True) for x in (found, expected))
        row = {"cosine": float((unit * other).sum(1).min())}
        close = row["cosine"] >= 1 - limits[0]  # False for NaN
    return row if close else row | {"differs": ", ".join(f"{name} {value:.4g}" for name, value in row.items())}


def statistics(labels: Row, times: dict[str, list[float]]) -> Iterator[Row]:
    """Quartiles of each engine's time, and of its ratio to qwen3core's within the same repeat."""
    for engine, own in times.items():
        ratios = timing.quartiles([a / b for a, b in zip(own, times[OURS], strict=True)])
        ratio = {"ratio": ratios["p50"], "ratio_p25": ratios["p25"], "ratio_p75": ratios["p75"]}
        yield labels | {"engine": engine, **timing.quartiles(own), **ratio}
