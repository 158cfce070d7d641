"""Checkpoints and paths that all tests share."""

import json
import os
from pathlib import Path

# Before torch is imported, which starts OpenMP: its threads wait for each other by spinning, unless told otherwise. On
# busy cores a test of small models then took 191 s, 72 s of CPU, in place of 28 s and 10 s (Zen 3, two cores, load 9).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from torch.backends import mkldnn

if not torch.cuda.is_available():  # before triton is imported, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

import layouts

from qwen3core.weights.synthesize import synthesize

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BFLOAT16 = mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether the CPU computes in bfloat16; others emulate it, in ten times the time."""
REAL_TOKENIZER = SHARED / "tokenizer" / "tokenizer.json"


@pytest.fixture(scope="session")
def embedding_dir(tmp_path_factory):
    """A small embedding checkpoint, official layout, bfloat16; read only."""
    return synthesize(tmp_path_factory.mktemp("checkpoints") / "embedding", "Qwen3-Embedding-small")


@pytest.fixture(scope="session")
def reranker_dir(tmp_path_factory):
    """A small reranker checkpoint, official layout, bfloat16; read only."""
    return synthesize(tmp_path_factory.mktemp("checkpoints") / "reranker", "Qwen3-Reranker-small")


@pytest.fixture(scope="session")
def real_tokenizer():
    """Path of the real Qwen3 tokenizer.json; skips, saying so, where the checkout has no shared folder beside it."""
    if not REAL_TOKENIZER.exists():
        pytest.skip(f"the real Qwen3 tokenizer is not at ../{REAL_TOKENIZER.relative_to(ROOT.parent)}")
    return REAL_TOKENIZER


@pytest.fixture(scope="session")
def facts():
    """facts.json on the official checkpoints; skips where absent."""
    path = SHARED / "official" / "facts.json"
    if not path.exists():
        pytest.skip(f"no facts at ../{path.relative_to(ROOT.parent)}")
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Float32 checkpoints to copy and change, by the job of what they become; read only."""
    root = tmp_path_factory.mktemp("layouts")
    embedding, reranker = (layouts.base(root / kind, kind) for kind in ("embedding", "reranker"))
    return {"embedding": embedding, "reranker": reranker, "late interaction": embedding}
