"""What stays in a process: oneDNN's code for numbers of rows, and the threads that a forked process has not."""

import os
import subprocess
import sys

import pytest
import torch
from tolerances import REORDERED_FP32
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3core import products

needs_onednn = pytest.mark.skipif(not mkldnn.is_available(), reason="torch without oneDNN")


class Rows(TorchDispatchMode):
    """Records the numbers of rows that oneDNN meets."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.add(len(args[0]))
        return func(*args, **(kwargs or {}))


@needs_onednn
@pytest.mark.parametrize("op", ["linear", "prepacked_linear"])
def test_onednn_meets_few_numbers_of_rows(op, monkeypatch):
    monkeypatch.setattr(products, "MET", set())
    torch.manual_seed(0)
    x, weight = torch.randn(1100, 32), torch.nn.Parameter(torch.randn(16, 32))
    with torch.no_grad():
        expected = x.double() @ weight.double().T
        with Rows() as rows:
            results = {n: getattr(products, op)(x[:n], weight) for n in (500, *range(1101), 500)}
    for n, result in results.items():
        assert result.shape == (n, 16)
        assert (result - expected[:n]).norm() <= REORDERED_FP32 * expected[:n].norm()
    sizes = [n for n in products.PACKED_SIZES if op != "linear" or n <= products.ONEDNN_ROWS]
    assert len(products.MET) == products.FIRST_NUMBERS
    assert 500 in products.MET
    assert rows.seen == {*sizes, *products.MET}


@needs_onednn
@pytest.mark.parametrize("op", ["linear", "prepacked_linear"])
def test_onednn_takes_rows_of_any_shape(op):
    x, weight = torch.randn(9, 5, 32), torch.nn.Parameter(torch.randn(16, 32))
    with torch.no_grad():
        torch.testing.assert_close(getattr(products, op)(x, weight), x @ weight.T)


GROWTH = """
import random, sys
from pathlib import Path
import torch
from qwen3core import Embedder

torch.set_num_threads(1)
def mebibytes():
    return int(next(x for x in Path("/proc/self/status").open() if x.startswith("VmRSS")).split()[1]) / 1024
embedder = Embedder.from_pretrained("tiny-embedding", device="cpu", dtype="float32", ops=sys.argv[1])
for words in (300, 200, 100, 50, 20):
    embedder.encode("word " * words)
before = mebibytes()
for words in random.Random(0).sample(range(1, 301), 150):
    embedder.encode("word " * words)
print(mebibytes() - before)
"""


@needs_onednn
@pytest.mark.slow
def test_memory_does_not_grow_with_each_length():
    """Before, 335 MB; a size of ``ONEDNN_SIZES`` takes 2 MB with this model, and they are few."""
    ops = ("reference", "torch", "prepacked")
    grown = {name: float(run(GROWTH, name)) for name in ops}
    assert max(grown.values()) < grown["reference"] + 75, grown


FORK = """
import multiprocessing, signal, sys, warnings
import numpy, torch
from qwen3core import Embedder

def child(queue):
    signal.alarm(60)  # where it hangs, it shall not stay
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = [embedder.encode(texts) for _ in range(2)]
    queue.put((vectors[1], torch.get_num_threads(), [str(w.message) for w in caught if "forked" in str(w.message)]))

torch.set_num_threads(2)
texts = ["a violin " * 20, "rain fell " * 30, "gravity"]
before, dtype = sys.argv[1:]
embedder = Embedder.from_pretrained("tiny-embedding", device="cpu", dtype=dtype)
if before == "encode":
    expected = embedder.encode(texts)
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
process = context.Process(target=child, args=(queue,), daemon=True)
process.start()
vectors, threads, caught = queue.get()
assert numpy.abs(vectors - embedder.encode(texts)).max() < 1e-6
print(threads, len(caught), all('get_context("spawn")' in text for text in caught))
"""


@pytest.mark.parametrize(
    ("before", "dtype", "expected"),
    [("encode", "float32", "1 1 True"), ("load", "float32", "1 1 True"), ("load", "bfloat16", "2 0 True")],
)
def test_a_forked_process_computes(before, dtype, expected):
    """With the parent's threads it would hang, which the time limit shows; where the parent had none, it has them."""
    assert run(FORK, before, dtype).strip() == expected


def run(program, *args):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
