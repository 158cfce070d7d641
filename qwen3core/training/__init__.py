"""Training: contrastive for embeddings, yes or no for rerankers; all weights, or LoRA through peft.

    from qwen3core import Embedder
    from qwen3core.training import Options, embedding_task, read_examples, train

    embedder = Embedder.from_pretrained(path, dtype="float32")
    train(embedder.model, embedding_task(read_examples([file]), embedder.tokenizer), Options(), "out")

Reading order: data -> losses -> files -> tasks -> cached_gradients -> loop; lora beside it.
"""

from . import lora, losses
from .data import Example, read_examples
from .loop import Options, train
from .tasks import Task, embedding_task, reranking_task

__all__ = ["Example", "Options", "Task", "embedding_task", "lora", "losses", "read_examples", "reranking_task", "train"]
