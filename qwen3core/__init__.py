"""Qwen3-Embedding and Qwen3-Reranker in plain PyTorch.

Reading order: prompts -> tokenizer -> batch -> model (config, ops, reference) -> embedder | reranker.
"""

from .batch import PackedBatch, pack
from .config import Qwen3Config
from .embedder import Embedder
from .errors import CheckpointError, InputError, Qwen3CoreError
from .hooks import capture, edit
from .layout import Layout
from .model import Qwen3Model
from .ops import Ops
from .pretrained import stream
from .reranker import Reranker
from .tokenizer import Tokenizer
from .weights.build import load_model

__all__ = [
    "CheckpointError",
    "Embedder",
    "InputError",
    "Layout",
    "Ops",
    "PackedBatch",
    "Qwen3Config",
    "Qwen3CoreError",
    "Qwen3Model",
    "Reranker",
    "Tokenizer",
    "capture",
    "edit",
    "load_model",
    "pack",
    "stream",
]
