"""qwen3core beside the other engines, on one machine and one checkpoint: how fast, how much memory, how soon.

    python -m bench.run --quick                     # small random checkpoints: proves that the bench runs
    python -m bench.run --full [--dtype float32]    # 0.6B checkpoints; JSON, charts and the README's table

Sides that are not installed are left out, and said so. Every time is wall clock around a call that takes texts and
gives numpy, sides in turn within each repeat; ratios are taken within a repeat. Start-up, peak memory and long texts
are measured in a process of their own for each side.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from torch.nn import functional as F

from bench import harness, sides
from qwen3core import Embedder
from qwen3core.samples import LONG_DOCUMENT
from qwen3core.tokenizer import Tokenizer
from qwen3core.weights.synthesize import synthesize

ROOT = Path(__file__).parents[1]
OURS = "qwen3core"
QUERY = "how does gravity move the planets around the sun"
Row = dict


@dataclass(frozen=True)
class Setup:
    """What the questions are asked of."""

    embedding: Path
    reranker: Path
    dtype: str
    device: str
    repeats: int
    scale: float
    """Share of the full workload's texts."""
    quick: bool

    def texts(self, lengths: list[int]) -> tuple[list[str], int]:
        """Texts of about these lengths in tokens, no two alike, and their tokens in all."""
        words, chance = LONG_DOCUMENT.split(), random.Random(0)
        tokenizer = Tokenizer(self.embedding / "tokenizer.json")
        texts = []
        for n in lengths:
            [ids] = tokenizer.encode([" ".join(chance.choices(words, k=n))])
            texts.append(tokenizer.decode(ids[: n - 1]).replace("\ufffd", ""))
        return texts, sum(map(len, tokenizer.embedding(texts, 2**31)))


# Questions: rows of {"question", "workload", "side", "tokens", "p20", "p50", "p80" in ms, "ratio", ...}


def corpus(setup: Setup) -> Iterator[Row]:
    """Lognormal lengths: median 90 tokens, sigma 0.8, at most 1024."""
    texts, tokens = spread_texts(setup)
    runs: dict[str, Callable] = {}
    for name, embed in opened_embedders(setup).items():
        runs[name] = partial(embed, texts)
        if name == "sentence-transformers":
            sizes = {str(n): partial(embed, texts, batch_size=n) for n in (1, 2, 4, 8)}
            times = harness.alternate(sizes, repeats=1)
            best = min(sizes, key=lambda size: times[size])
            print(f"{name}: its best batches are of {best}, {times}", flush=True)
            runs[f"{name}, best batches"] = sizes[best]
    yield from rows("corpus", f"{len(texts)} texts", tokens, runs, setup)


def spread_texts(setup: Setup) -> tuple[list[str], int]:
    drawn = numpy.random.default_rng(0).lognormal(numpy.log(90), 0.8, round(512 * setup.scale))
    return setup.texts([min(1024, max(2, round(n))) for n in drawn])


def lengths(setup: Setup) -> Iterator[Row]:
    """Batches of equal lengths, and the model's matrix products alone at the first of them."""
    embedders = opened_embedders(setup)
    for count, length in ((8, 128), (4, 512), (1, 2048)):
        texts, tokens = setup.texts([length] * count)
        runs = {name: partial(embed, texts) for name, embed in embedders.items()}
        if length == 128:
            runs["its matrix products alone"] = linear_only(setup, tokens)
        yield from rows("equal lengths", f"{count} x {length}", tokens, runs, setup)


def linear_only(setup: Setup, tokens: int) -> Callable[[], None]:
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
    """One query, 50 documents of about 120 tokens. Tokens: those of the documents."""
    count = round(min(50, 256 * setup.scale))
    documents, tokens = setup.texts([random.Random(i).randint(90, 150) for i in range(count)])
    rerankers = opened(sides.rerankers(setup.reranker, setup.dtype, device=setup.device), QUERY, ["a", "b"])
    runs = {name: partial(score, QUERY, documents) for name, score in rerankers.items()}
    yield from rows("rerank", f"1 query, {count} documents", tokens, runs, setup)


def query(setup: Setup) -> Iterator[Row]:
    """One short text at a time."""
    texts, tokens = setup.texts([16] * 8)
    embedders = opened_embedders(setup)
    runs = {name: partial(lambda embed: [embed([text]) for text in texts], embed) for name, embed in embedders.items()}
    for row in rows("one query", "16 tokens", tokens, runs, setup):
        yield row | {p: row[p] / len(texts) for p in ("p20", "p50", "p80") if p in row}


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
    """A process from its start to its end after one vector, files in the page cache, the checkpoint's own dtype."""
    runs = {
        name: partial(run_script, f"directory, text = {str(setup.embedding)!r}, {QUERY!r}{script}")
        for name, script in SCRIPTS.items()
    }
    found = harness.alternate(runs, repeats=setup.repeats, warmup=1)
    yield from statistics({"question": "start-up", "workload": "first vector"}, found)


def run_script(script: str) -> None:
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def memory(setup: Setup) -> Iterator[Row]:
    """Peak resident memory of a process that embeds the corpus, and how many times that of the weights."""
    texts, _ = spread_texts(setup)
    stored = sum(file.stat().st_size for file in setup.embedding.glob("*.safetensors")) / 2**20
    weights = stored * (2 if setup.dtype == "float32" else 1)  # stored in bfloat16
    for name in (OURS, "transformers", "sentence-transformers"):
        peak = child(setup, name, {"texts": texts})["peak"]
        yield {"question": "memory", "workload": "corpus", "side": name, "MiB": peak, "weights": peak / weights}


def long(setup: Setup) -> Iterator[Row]:
    """One long text: time and peak memory."""
    for length in (32, 64) if setup.quick else (2048, 8192, 32768):
        texts, tokens = setup.texts([length])
        for name in (OURS, "transformers"):
            done = child(setup, name, {"texts": texts})
            row = {"question": "long", "workload": f"{length} tokens", "side": name, "tokens": tokens}
            yield row | {"p50": done["ms"], "MiB": done["peak"]}


def growth(setup: Setup) -> Iterator[Row]:
    """The cost per token as texts grow in number, and in length; ours alone."""
    embedder = Embedder.from_pretrained(setup.embedding, dtype=setup.dtype, device=setup.device)
    counts = [(f"{n} texts", [32] * n) for n in (round(1024 * setup.scale * 4**i) for i in range(4))]
    sizes = [(f"1 x {n}", [n]) for n in ((128, 256) if setup.quick else (128, 512, 2048, 8192))]
    for workload, sequence in counts + sizes:
        texts, tokens = setup.texts(sequence)
        yield from rows("growth", workload, tokens, {OURS: partial(embedder.encode, texts)}, setup)


# The run


def opened(openers: dict[str, Callable], *first: object) -> dict[str, Callable]:
    """Every side that opens and serves a first call, untimed; the others are named with their reason."""
    found = {}
    for name, opener in openers.items():
        try:
            side = opener()
            side(*first)
            found[name] = side
        except Exception as error:
            print(f"{name}: {harness.failure(error)['error']} ({error})".splitlines()[0][:300], flush=True)
    return found


def opened_embedders(setup: Setup) -> dict[str, Callable]:
    return opened(sides.embedders(setup.embedding, setup.dtype, device=setup.device), ["a", "b"])


def rows(question: str, workload: str, tokens: int, runs: dict[str, Callable], setup: Setup) -> Iterator[Row]:
    found = harness.alternate(runs, repeats=setup.repeats)
    yield from statistics({"question": question, "workload": workload, "tokens": tokens}, found)


def statistics(labels: Row, found: dict[str, list[float]]) -> Iterator[Row]:
    """Percentiles of each side, and how many times our time it took: the median over repeats, p20 and p80."""
    for side, times in found.items():
        ratios = [a / b for a, b in zip(times, found[OURS], strict=True)]
        low, middle, high = (float(numpy.percentile(ratios, p)) for p in (20, 50, 80))
        percentiles = {f"p{p}": float(numpy.percentile(times, p)) for p in (20, 50, 80)}
        yield labels | {"side": side, **percentiles, "ratio": middle, "ratio_p20": low, "ratio_p80": high}


def child(setup: Setup, side: str, task: dict) -> dict:
    """A new process that opens the side and embeds the texts: {"ms", "peak" in MiB}."""
    job = {"side": side, "directory": str(setup.embedding), "dtype": setup.dtype, "device": setup.device, **task}
    command = [sys.executable, "-m", "bench.run", "--child"]
    done = subprocess.run(command, input=json.dumps(job), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child() -> None:
    job = json.load(sys.stdin)
    embed = sides.embedders(Path(job["directory"]), job["dtype"], device=job["device"])[job["side"]]()
    start = time.perf_counter()
    embed(job["texts"])
    elapsed = (time.perf_counter() - start) * 1e3
    status = Path("/proc/self/status").read_text("utf-8")  # getrusage would count the parent's memory at the fork
    print(json.dumps({"ms": elapsed, "peak": int(status.split("VmHWM:")[1].split()[0]) / 1024}))


QUESTIONS = {f.__name__: f for f in (corpus, lengths, rerank, query, startup, memory, long, growth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="small checkpoints, few texts; nothing is written")
    size.add_argument(
        "--full", action="store_true", help="0.6B checkpoints; writes bench/results and the README's table"
    )
    size.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full workload's texts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoints", type=Path, help="folder to keep the synthesized checkpoints in")
    args = parser.parse_args()
    if args.child:
        return run_child()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for kind in ("Embedding", "Reranker"):
            layout = f"Qwen3-{kind}-{'small' if args.quick else '0.6B'}"
            path = (args.checkpoints or Path(folder)) / layout
            if not path.exists():
                synthesize(path, layout)
            paths.append(path)
        scale, repeats = (1 / 32, 2) if args.quick else (args.scale, args.repeats)
        setup = Setup(*paths, args.dtype, device, repeats, scale, args.quick)
        environment = harness.environment(torch.device(device))
        print(environment, flush=True)
        for name in args.question:
            found = []
            for row in QUESTIONS[name](setup):
                print(line(row), flush=True)
                found.append(row)
            if args.full:
                ceilings = harness.ceilings(torch.device(device), getattr(torch, args.dtype))
                path = harness.save(harness.RESULTS, f"{name}_{args.dtype}", found, environment, ceilings)
        if args.full:
            from bench import plot

            plot.engines(path.parent, environment["device"], ratios(path.parent))
            write_table(path.parent)


def line(row: Row) -> str:
    return "  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())


def ratios(results: Path) -> list[Row]:
    """The rows of all results in a folder that compare times, with their dtype."""
    return [
        row | {"dtype": path.stem.rpartition("_")[2]}
        for path in sorted(results.glob("*_*.json"))
        for row in json.loads(path.read_text("utf-8"))["rows"]
        if "ratio" in row
    ]


def table(results: Path) -> str:
    """The README's table: how many times our time each side took, from all results in a folder."""
    found = [row for row in ratios(results) if row["question"] != "growth"]
    names = dict.fromkeys(row["side"] for row in found if row["side"] != OURS)
    lines = [f"| workload | {OURS} | " + " | ".join(names) + " |", "|---|---:" + "|---:" * len(names) + "|"]
    for key in dict.fromkeys((row["question"], row["workload"], row["dtype"]) for row in found):
        cells = {r["side"]: r for r in found if (r["question"], r["workload"], r["dtype"]) == key}
        ours = cells[OURS]
        speed = (
            f"{ours['tokens'] / ours['p50'] * 1e3:.0f} tokens/s" if "tokens" in ours else f"{ours['p50'] / 1e3:.1f} s"
        )
        if key[0] == "one query":
            speed = f"{ours['p50']:.0f} ms"
        cells_of_sides = (f"{cells[n]['ratio']:.2f}x" if n in cells else "" for n in names)
        lines.append(f"| {key[0]}, {key[1]}, {key[2]} | {speed} | " + " | ".join(cells_of_sides) + " |")
    return "\n".join(lines)


def write_table(results: Path) -> None:
    """Put it between the README's two marks."""
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text("utf-8").partition("<!-- bench -->\n")
    _, end, after = rest.partition("<!-- /bench -->")
    readme.write_text(f"{before}{mark}{table(results)}\n{end}{after}", "utf-8")


if __name__ == "__main__":
    main()
