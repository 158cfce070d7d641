"""Tensor parallelism: two processes, each with half of the heads and of the MLP, give what one gives."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tolerances
from conftest import ROOT

from qwen3core import Embedder, InputError
from qwen3core.parallel import tensor_parallel

PROGRAM = """
import json, sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from qwen3core import Embedder, InputError, Reranker, capture
from qwen3core.parallel import tensor_parallel

TEXTS = [f"text number {i} " * (i % 5 + 1) for i in range(12)]
PAIRS = [("a number", text) for text in TEXTS]

def results(embedder, reranker):
    grad = embedder.encode(TEXTS[:2], grad=True)
    embedder.model.zero_grad()
    grad[:, 0].sum().backward()
    norms = embedder.model.layers[1].self_attn.q_norm.weight.grad.clone()  # of this process's heads
    distributed.all_reduce(norms)
    return embedder.encode_query(TEXTS), reranker.predict(PAIRS), grad.detach(), norms

if __name__ == "__main__":
    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
    reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
    *alone, doubled = results(embedder, reranker)
    alone.append(doubled / 2)
    mesh = init_device_mesh("cpu", (2,))
    for opened in (embedder, reranker):
        tensor_parallel(opened.model, mesh)
    try:
        embedder.save(sys.argv[2] + "-saved")
    except InputError as error:
        refused = str(error)
    together = results(embedder, reranker)
    attn = embedder.model.layers[0].self_attn
    with capture(embedder, "layers.0.z") as acts:
        embedder.encode(TEXTS[0])
    print(json.dumps({
        "errors": [float(abs(torch.as_tensor(a) - torch.as_tensor(b)).max()) for a, b in zip(alone, together)],
        "local": [list(attn.q_proj.weight.to_local().shape), list(attn.o_proj.weight.to_local().shape)],
        "z": list(acts["layers.0.z"].shape[1:]),
        "refused": refused,
    }))
    distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        found = json.loads(out.splitlines()[-1])
        vectors, scores, grad, norms = found["errors"]
        assert vectors < tolerances.EMBEDDING_FP32
        assert scores < tolerances.SCORE_FP32
        assert grad < tolerances.EMBEDDING_FP32
        assert norms < tolerances.GRADIENT_FP32
        assert found["local"] == [[128, 256], [256, 128]]
        assert found["z"] == [2, 64]
        assert "q_proj.weight: expected a whole weight" in found["refused"]


def model(**changed: Any):
    embedder = Embedder.from_pretrained("tiny-embedding", **changed)
    return embedder.model


def test_what_cannot_be_shared_out():
    two: Any = SimpleNamespace(size=lambda: 2, device_type="cpu")
    three: Any = SimpleNamespace(size=lambda: 3, device_type="cpu")
    with pytest.raises(InputError, match="num_key_value_heads: expected a multiple of 3, the processes, found 2"):
        tensor_parallel(model(), three)
    with pytest.raises(InputError, match="expected weights in floating point, found int8"):
        tensor_parallel(model(dtype="int8"), two)
    mine = model()
    mine.ops = replace(mine.ops, linear=lambda x, weight: x @ weight.T)
    with pytest.raises(InputError, match="ops: linear: expected one of this package"):
        tensor_parallel(mine, two)
    other = model()
    other.layers[1] = other.layers[1].mlp
    with pytest.raises(InputError, match=r"layers\.1: expected Attention and MLP of this package"):
        tensor_parallel(other, two)
