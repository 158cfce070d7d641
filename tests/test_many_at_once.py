"""Processes, workers of a DataLoader, threads and tasks: many calls at once give what they give one after the other.

A process forked from one that has computed is tested in test_memory.py, threads on a cache in test_shortcuts.py.
"""

import asyncio
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tolerances import SAME_TEXT_FP32

from qwen3core import Embedder, Reranker

TEXTS = [f"{text} {n}" for n in range(6) for text in ("the violin is an instrument", "rain fell", "gold", "")]
QUERY = "a musical instrument"

PROGRAM = """
import multiprocessing, signal, sys

import numpy as np
import torch
from torch.utils.data import DataLoader
from qwen3core import Embedder, Reranker
from test_many_at_once import QUERY, TEXTS

BLOCKS = [TEXTS[i : i + 5] for i in range(0, len(TEXTS), 5)]


def opened():
    kinds = ((Embedder, "tiny-embedding"), (Reranker, "tiny-reranker"))
    return [kind.from_pretrained(name, device="cpu", dtype="float32") for kind, name in kinds]


def work(block, embedder, reranker):
    return np.column_stack([embedder.encode_query(block), reranker.predict([(QUERY, text) for text in block])])


def work_alone(block):
    return work(block, *opened())


def limited(worker=0):
    signal.alarm(100)  # where it hangs, it shall not stay


class Collate:
    def __init__(self, *opened):
        self.opened = opened

    def __call__(self, block):
        return torch.from_numpy(work(block, *self.opened))


if __name__ == "__main__":
    limited()
    start = sys.argv[1]
    found = []
    if start == "fork":  # before this process has computed; each opens its own
        with multiprocessing.get_context(start).Pool(2, limited) as pool:
            found.append(np.concatenate(pool.map(work_alone, BLOCKS)))
    both = opened()
    expected = work(TEXTS, *both)
    loader = DataLoader(
        TEXTS, 5, num_workers=2, collate_fn=Collate(*both), multiprocessing_context=start, worker_init_fn=limited
    )
    found.append(torch.cat(list(loader)).numpy())
    print(max(np.abs(x - expected).max() for x in found))
"""


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_and_workers_of_a_loader(tmp_path, start):
    """Forked ones open a model each; a loader's workers collate by one that was forked with them, or sent to them."""
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    paths = [os.path.dirname(__file__), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, tmp_path / "program.py", start]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= SAME_TEXT_FP32


@pytest.fixture(scope="module")
def jobs():
    """Calls of every kind, on one object each, and what each gives alone."""
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "prefix_cache_tokens": 60}
    embedder = Embedder.from_pretrained("tiny-embedding", **options)
    reranker = Reranker.from_pretrained("tiny-reranker", **options)
    calls = [
        lambda: embedder.encode(TEXTS),
        lambda: embedder.encode_query(TEXTS, truncate_dim=64),
        lambda: embedder.encode_query(TEXTS, instruction="Find music", batch_size=3),
        lambda: embedder.encode_document(TEXTS[:7], normalize_embeddings=False),
        lambda: embedder.encode_tokens(TEXTS, task="query").vectors.numpy(),
        lambda: reranker.predict([(QUERY, text) for text in TEXTS]),
        lambda: reranker.predict([(text, QUERY) for text in TEXTS], instruction="Find music", batch_tokens=200),
        lambda: np.array([hit["score"] for hit in reranker.rank(QUERY, TEXTS[::-1], top_k=9)]),
    ]
    return [(call, call()) for call in calls] * 4


def check(found, jobs):
    assert len(found) == len(jobs) == 32
    for result, (_, expected) in zip(found, jobs, strict=True):
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(result, expected, rtol=0, atol=SAME_TEXT_FP32 * scale)


def test_eight_threads(jobs):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda job: job[0](), jobs))
    finally:
        sys.setswitchinterval(interval)
    check(found, jobs)


def test_asyncio(jobs):
    async def together():
        return await asyncio.gather(*(asyncio.to_thread(call) for call, _ in jobs))

    check(asyncio.run(together()), jobs)
