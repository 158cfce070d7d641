"""The workloads that the engines are timed on: each yields rows of results.

A row is {"workload", "size", "tokens", "engine", "p20", "p50", "p80" in ms, "ratio", "ratio_p20", "ratio_p80"}: the
ratio is this engine's time over qwen3core's, taken within each repeat; its median and percentiles are over the repeats.
Start-up, memory and long texts get a process of their own for each engine.

    python -m bench.workloads < job.json    # that process: see embed_in_child
"""

import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.nn import functional as F

from bench import engines, harness
from qwen3core import Embedder
from qwen3core.samples import LONG_DOCUMENT
from qwen3core.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
OURS = "qwen3core"
QUERY = "how does gravity move the planets around the sun"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The checkpoints, the precision and the size of the workloads."""

    embedding: Path
    reranker: Path
    dtype: str
    device: str
    repeats: int
    scale: float
    """Share of the full workload's texts."""
    quick: bool

    def texts(self, lengths: list[int]) -> tuple[list[str], int]:
        """Return texts of about these lengths in tokens, no two alike, and the number of their tokens in all."""
        words, chance = LONG_DOCUMENT.split(), random.Random(0)
        tokenizer = Tokenizer(self.embedding / "tokenizer.json")
        texts = []
        for n in lengths:
            [ids] = tokenizer.encode([" ".join(chance.choices(words, k=n))])
            texts.append(tokenizer.decode(ids[: n - 1]).replace("\ufffd", ""))
        return texts, sum(map(len, tokenizer.embedding(texts, 2**31)))


def corpus(setup: Setup) -> Iterator[Row]:
    """A corpus of texts of lognormal lengths: median 90 tokens, sigma 0.8, at most 1024."""
    texts, tokens = corpus_texts(setup)
    runs: dict[str, Callable[[], object]] = {}
    for name, embed in opened_embedders(setup).items():
        runs[name] = partial(embed, texts)
        if name == "sentence-transformers":
            batches = {str(n): partial(embed, texts, batch_size=n) for n in (1, 2, 4, 8)}
            times = harness.wall_times(batches, 1)
            best = min(batches, key=lambda size: times[size])
            print(f"{name}: its best batches are of {best}, {times}", flush=True)
            runs[f"{name}, best batches"] = batches[best]
    yield from rows("corpus", f"{len(texts)} texts", tokens, runs, setup)


def corpus_texts(setup: Setup) -> tuple[list[str], int]:
    drawn = numpy.random.default_rng(0).lognormal(numpy.log(90), 0.8, round(512 * setup.scale))
    return setup.texts([min(1024, max(2, round(n))) for n in drawn])


def lengths(setup: Setup) -> Iterator[Row]:
    """Batches of texts of equal length, and the time of the model's matrix products alone for the first of them."""
    embedders = opened_embedders(setup)
    for count, length in ((8, 128), (4, 512), (1, 2048)):
        texts, tokens = setup.texts([length] * count)
        runs: dict[str, Callable[[], object]] = {name: partial(embed, texts) for name, embed in embedders.items()}
        if length == 128:
            runs["its matrix products alone"] = matrix_products(setup, tokens)
        yield from rows("equal lengths", f"{count} x {length}", tokens, runs, setup)


def matrix_products(setup: Setup, tokens: int) -> Callable[[], None]:
    """Return a function that multiplies random [tokens, inputs] by every weight of the model's linear layers."""
    model = Embedder.from_pretrained(setup.embedding, dtype=setup.dtype, device=setup.device).model
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {n: torch.randn(tokens, n).to(weights[0]) for n in {w.shape[1] for w in weights}}

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)
        if setup.device == "cuda":
            torch.cuda.synchronize()

    return run


def rerank(setup: Setup) -> Iterator[Row]:
    """One query with 50 documents of about 120 tokens; only the documents' tokens are counted."""
    count = round(min(50, 256 * setup.scale))
    documents, tokens = setup.texts([random.Random(i).randint(90, 150) for i in range(count)])
    rerankers = opened(engines.rerankers(setup.reranker, setup.dtype, device=setup.device), QUERY, ["a", "b"])
    runs = {name: partial(score, QUERY, documents) for name, score in rerankers.items()}
    yield from rows("rerank", f"1 query, {count} documents", tokens, runs, setup)


def query(setup: Setup) -> Iterator[Row]:
    """One short text at a time."""
    texts, tokens = setup.texts([16] * 8)
    embedders = opened_embedders(setup)
    runs = {name: partial(lambda embed: [embed([text]) for text in texts], embed) for name, embed in embedders.items()}
    for row in rows("one query", "16 tokens", tokens, runs, setup):
        yield row | {p: row[p] / len(texts) for p in ("p20", "p50", "p80")}


SCRIPTS = {
    OURS: """
from qwen3core import Embedder
Embedder.from_pretrained(directory).encode(text)""",
    "transformers": """
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
model = AutoModel.from_pretrained(directory, dtype="auto")
with torch.no_grad():
    model(**tokenizer(text, return_tensors="pt")).last_hidden_state[:, -1].float().numpy()""",
    "sentence-transformers": """
from sentence_transformers import SentenceTransformer
SentenceTransformer(directory, device="cpu").encode(text)""",
}


def startup(setup: Setup) -> Iterator[Row]:
    """A process from its start to its end after one vector: files in the page cache, the checkpoint's own dtype."""
    given = f"directory, text = {str(setup.embedding)!r}, {QUERY!r}"
    runs = {name: partial(run_script, given + SCRIPTS[name]) for name in installed(SCRIPTS)}
    times = harness.wall_times(runs, setup.repeats, warmup=1)
    yield from statistics({"workload": "start-up", "size": "first vector"}, times)


def run_script(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def memory(setup: Setup) -> Iterator[Row]:
    """Peak resident memory of a process that embeds the corpus, in MiB and as a multiple of the weights' bytes."""
    texts, _ = corpus_texts(setup)
    stored = sum(file.stat().st_size for file in setup.embedding.glob("*.safetensors")) / 2**20
    weights = stored * (2 if setup.dtype == "float32" else 1)  # stored in bfloat16
    for name in installed((OURS, "transformers", "sentence-transformers")):
        peak = embed_in_child(setup, name, texts)["peak"]
        yield {"workload": "memory", "size": "corpus", "engine": name, "MiB": peak, "weights": peak / weights}


def long(setup: Setup) -> Iterator[Row]:
    """One long text: time and peak memory."""
    for length in (32, 64) if setup.quick else (2048, 8192, 32768):
        texts, tokens = setup.texts([length])
        for name in installed((OURS, "transformers")):
            found = embed_in_child(setup, name, texts)
            row = {"workload": "long", "size": f"{length} tokens", "engine": name, "tokens": tokens}
            yield row | {"p50": found["ms"], "MiB": found["peak"]}


def growth(setup: Setup) -> Iterator[Row]:
    """Time as texts grow in number, and in length; qwen3core only."""
    embedder = Embedder.from_pretrained(setup.embedding, dtype=setup.dtype, device=setup.device)
    counts = [(f"{n} texts", [32] * n) for n in (round(1024 * setup.scale * 4**i) for i in range(4))]
    singles = [(f"1 x {n}", [n]) for n in ((128, 256) if setup.quick else (128, 512, 2048, 8192))]
    for size, token_counts in counts + singles:
        texts, tokens = setup.texts(token_counts)
        yield from rows("growth", size, tokens, {OURS: partial(embedder.encode, texts)}, setup)


WORKLOADS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    f.__name__: f for f in (corpus, lengths, rerank, query, startup, memory, long, growth)
}


def opened(openers: dict[str, Callable[[], Callable]], *first: object) -> dict[str, Callable]:
    """Open every engine and call it once, untimed; engines that fail are left out, and printed with the reason."""
    found = {}
    for name, opener in openers.items():
        try:
            engine = opener()
            engine(*first)
            found[name] = engine
        except Exception as error:
            print(f"{name}: {harness.failure(error)['error']} ({error})".splitlines()[0][:300], flush=True)
    return found


def opened_embedders(setup: Setup) -> dict[str, Callable]:
    return opened(engines.embedders(setup.embedding, setup.dtype, device=setup.device), ["a", "b"])


def installed(names: Iterable[str]) -> list[str]:
    """Those of the engines, named as their packages, that can be imported."""
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_"))]


def rows(workload: str, size: str, tokens: int, runs: harness.Runs, setup: Setup) -> Iterator[Row]:
    times = harness.wall_times(runs, setup.repeats)
    yield from statistics({"workload": workload, "size": size, "tokens": tokens}, times)


def statistics(labels: Row, times: dict[str, list[float]]) -> Iterator[Row]:
    """Percentiles of each engine's time, and of its ratio to qwen3core's within the same repeat."""
    for engine, own in times.items():
        ratios = harness.percentiles([a / b for a, b in zip(own, times[OURS], strict=True)])
        ratio = {"ratio": ratios["p50"], "ratio_p20": ratios["p20"], "ratio_p80": ratios["p80"]}
        yield labels | {"engine": engine, **harness.percentiles(own), **ratio}


def embed_in_child(setup: Setup, engine: str, texts: list[str]) -> dict[str, float]:
    """Start a process that opens the engine and embeds the texts: {"ms", "peak" in MiB}."""
    job = {"engine": engine, "directory": str(setup.embedding), "dtype": setup.dtype, "device": setup.device}
    command = [sys.executable, "-m", "bench.workloads"]
    done = subprocess.run(command, input=json.dumps(job | {"texts": texts}), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child() -> None:
    job = json.load(sys.stdin)
    embed = engines.embedders(Path(job["directory"]), job["dtype"], device=job["device"])[job["engine"]]()
    start = time.perf_counter()
    embed(job["texts"])
    elapsed = (time.perf_counter() - start) * 1e3
    status = Path("/proc/self/status").read_text("utf-8")  # getrusage would count the parent's memory at the fork
    print(json.dumps({"ms": elapsed, "peak": int(status.split("VmHWM:")[1].split()[0]) / 1024}))


if __name__ == "__main__":
    run_child()
