"""Products with weights that oneDNN lays out: right, made when they pay, of what the weights are, in place of them."""

import dataclasses
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import BFLOAT16
from safetensors import safe_open
from safetensors.torch import save_file
from tolerances import REORDERED_FP32
from torch.backends import mkldnn

from qwen3core import Embedder, Ops, products, reference
from qwen3core.products import PACKED, USES, linear, linears, prepacked_linear, prepacked_linears

pytestmark = pytest.mark.skipif(not mkldnn.is_available(), reason="torch without oneDNN")
bfloat16_is_laid_out = pytest.mark.skipif(not BFLOAT16, reason="oneDNN without bfloat16")
SHAPES = ((96, 64), (32, 64), (32, 64))


@pytest.fixture
def mapped(tmp_path):
    """A function that gives weights that are pages of a file."""

    def make(*shapes, dtype=torch.bfloat16):
        file = tmp_path / "weights.safetensors"
        save_file({str(i): torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}, file)
        handle = safe_open(file, framework="pt")
        return [torch.nn.Parameter(handle.get_tensor(str(i)), requires_grad=False) for i in range(len(shapes))]

    return make


@pytest.mark.parametrize("rows", [1, 5, 200, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_several_products_are_each_of_them(rows, dtype):
    """Packed side by side or one after the other, with the bits of a product alone."""
    x, weights = torch.randn(rows, 64).to(dtype), [torch.randn(shape).to(dtype) for shape in SHAPES]
    expected = [x.double() @ weight.double().T for weight in weights]
    for several, one in ((linears, linear), (prepacked_linears, prepacked_linear)):
        found = several(x, *weights)
        tolerance = REORDERED_FP32 if dtype == torch.float32 else 2**-8
        for y, z, weight in zip(found, expected, weights, strict=True):
            assert (y.double() - z).norm() <= tolerance * z.norm()
            torch.testing.assert_close(y, one(x, weight), rtol=tolerance, atol=tolerance)
    assert [y.shape for y in prepacked_linears(x, *weights)] == [(rows, n) for n, _ in SHAPES]


@bfloat16_is_laid_out
@torch.no_grad()
def test_pages_of_a_file_are_laid_out_when_that_pays(mapped):
    """bfloat16 ones at their 9th use; what lies in memory, and would be there twice, never."""
    x = torch.randn(3, 64).bfloat16()
    [weight], in_memory = mapped(SHAPES[0]), torch.randn(SHAPES[0]).bfloat16()
    for _ in range(USES):
        first = linear(x, weight), linear(x, in_memory)
    assert PACKED[weight].packed is None
    torch.testing.assert_close((linear(x, weight), linear(x, in_memory)), first, rtol=2**-7, atol=2**-7)
    assert PACKED[weight].packed is not None
    assert in_memory not in PACKED
    weights = mapped(SHAPES[0], dtype=torch.float32)
    for _ in range(USES + 1):
        linear(x.float(), *weights)
    assert weights[0] not in PACKED


@torch.no_grad()
def test_changes_of_any_of_the_weights_are_seen():
    """In place, and by another tensor in its stead."""
    x, weights = torch.randn(3, 64), [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    prepacked_linears(x, *weights)
    weights[1].mul_(2)
    torch.testing.assert_close(prepacked_linears(x, *weights)[1], reference.linear(x, weights[1]))
    weights[2] = torch.nn.Parameter(torch.randn(SHAPES[2]))
    torch.testing.assert_close(prepacked_linears(x, *weights)[2], reference.linear(x, weights[2]))
    torch.testing.assert_close(prepacked_linears(x, *weights[:2])[1], reference.linear(x, weights[1]))


def pages(weight):
    """For each page of a weight, whether it is in this process's memory."""
    size = products.mmap.PAGESIZE
    first, end = -(-weight.data_ptr() // size), (weight.data_ptr() + weight.nbytes) // size
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        return np.frombuffer(file.read(8 * (end - first)), "<u8") >> 63 != 0


@bfloat16_is_laid_out
@torch.no_grad()
def test_a_laid_out_weight_takes_the_place_of_the_files_pages(mapped):
    """They are read again when needed; where one was written to, all stay: it is nowhere else."""
    weight, changed = mapped((512, 1024), (512, 1024))
    x, expected, own = torch.randn(3, 1024).bfloat16(), weight.clone(), changed.clone().fill_(2)
    changed.fill_(2)
    other = mapped((512, 1024))[0]
    other[300, 7] = 5
    assert pages(weight).all()
    for each in (weight, changed, other):
        prepacked_linear(x, each)
    assert not pages(weight).any()
    assert pages(changed).all()
    assert pages(other).all()
    assert torch.equal(weight, expected)
    assert torch.equal(changed, own)
    assert other[300, 7] == 5
    del PACKED[other]
    for _ in range(2 * USES + 2):
        linear(x, other)  # which would be there twice
    assert PACKED[other].packed is None


def test_a_projection_that_is_looked_at_is_called(embedding_dir):
    """Torch's own hooks on one projection see it, and change it, whatever is computed together otherwise."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    before, seen = embedder.encode("gravity"), []

    def nothing(module, args, out):
        seen.append(out.shape)
        return out * 0

    projection = embedder.model.get_submodule("layers.1.self_attn.v_proj")
    handle = projection.register_forward_hook(nothing)
    after = embedder.encode("gravity")
    handle.remove()
    assert len(seen) == 1
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_array_equal(embedder.encode("gravity"), before)


def test_a_replaced_product_is_used_everywhere(embedding_dir):
    """``linears`` stands for ``linear`` alone of its set."""
    embedder = Embedder.from_pretrained(embedding_dir, dtype="float32", device="cpu")
    calls = []

    def mine(x, weight):
        calls.append(len(x))
        return reference.linear(x, weight)

    ops = dataclasses.replace(Ops.torch(), linear=mine)
    assert ops.linears is None
    embedder.model.ops = ops
    embedder.encode("gravity")
    assert len(calls) == 7 * embedder.model.config.num_hidden_layers


KILLED = """
import sys
from qwen3core import Embedder
print("open", flush=True)
while True:
    Embedder.from_pretrained(sys.argv[1], device="cpu", ops="prepacked").encode("gravity")
"""


@pytest.mark.parametrize("delay", [0, 0.03, 0.1])
def test_kill_9_leaves_the_checkpoint_as_it_was(embedding_dir, tmp_path, delay):
    """Weights are packed in memory alone: there is no file that could be half written."""
    before = {path: path.read_bytes() for path in embedding_dir.rglob("*") if path.is_file()}
    expected = Embedder.from_pretrained(embedding_dir, device="cpu", ops="prepacked").encode("gravity")
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", KILLED, str(embedding_dir)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        time.sleep(delay)
        process.kill()
    assert process.returncode == -9
    assert {path: path.read_bytes() for path in embedding_dir.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir())
    found = Embedder.from_pretrained(embedding_dir, device="cpu", ops="prepacked").encode("gravity")
    np.testing.assert_array_equal(found, expected)
