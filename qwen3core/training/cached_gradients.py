"""Gradients of a batch of any size in the memory of a small one (GradCache, arXiv:2101.06983).

A contrastive loss needs the outputs of all texts of a batch at once, its gradients need not:

    outputs   of all texts, pass by pass, without gradients
    loss      of the outputs, and its gradient by each output
    weights   pass by pass again, each backward from its outputs' gradients

So every text of a batch, of every process under ``torchrun``, is a negative of every query, whatever memory there is.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..batch import PackedBatch, pack
from ..errors import InputError
from ..model import Qwen3Model
from ..planning import plan, shared_prefixes
from .tasks import Task


class CachedGradients:
    """The gradients of one task's batches: ``compute(examples)`` adds those of a batch to ``grad`` of the weights.

    Under ``torchrun`` each process computes every ``world``-th sequence; gradients and loss are those of all.
    """

    def __init__(self, model: Qwen3Model, task: Task, batch_tokens: int, *, bfloat16: bool = False) -> None:
        """batch_tokens: tokens computed at a time. bfloat16: matrix products in it, by autocast."""
        self.task = task
        self.batch_tokens = batch_tokens
        self.bfloat16 = bfloat16
        self.device = model.embed_tokens.weight.device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.model = model
        self.module: nn.Module = _Outputs(model, task)
        if self.world > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.module = DistributedDataParallel(self.module)

    def compute(self, examples: list[int]) -> tuple[float, int]:
        """Add the gradients of these examples; their loss and number of tokens. Raises InputError for too few texts."""
        sequences, prefixes, targets = self.task.batch(examples)
        batches = self.pack(sequences, prefixes)
        single = len(batches) == 1  # fits as it is: nothing is computed twice
        with torch.set_grad_enabled(single):
            results = [self._forward(batch) for batch in batches]
        outputs = results[0].new_zeros(len(sequences), *results[0].shape[1:])
        for batch, result in zip(batches, results, strict=True):
            outputs[batch.indices] = result.detach()
        if self.world > 1:
            dist.all_reduce(outputs)  # each process has filled its own rows
        outputs.requires_grad_()
        loss = self.task.loss(outputs, targets.to(self.device))
        [gradient] = torch.autograd.grad(loss, outputs)
        for batch in batches:
            sync = batch is batches[-1] or not isinstance(self.module, DistributedDataParallel)
            with nullcontext() if sync else self.module.no_sync():  # type: ignore[operator]
                # DDP divides by the number of processes, but each has the gradient of the whole loss by its rows.
                (results[0] if single else self._forward(batch)).backward(gradient[batch.indices] * self.world)
        return loss.item(), sum(map(len, sequences))

    def pack(self, sequences: Sequence[list[int]], prefixes: Sequence[tuple[int, ...]]) -> list[PackedBatch]:
        """This process's sequences in batches of at most ``batch_tokens``, each shared prefix once in a batch."""
        if len(sequences) < self.world:
            raise InputError(f"batch_size: expected a text for each of {self.world} processes, found {len(sequences)}")
        indices = range(self.rank, len(sequences), self.world)
        own = [sequences[i] for i in indices]
        shared = shared_prefixes(own, [prefixes[i] for i in indices]) if self.model.shortcuts else None
        return [
            pack(
                [own[i] for i in group],
                device=self.device,
                indices=[indices[i] for i in group],
                prefixes=shared and [shared[i] for i in group],
            )
            for group in plan([len(sequence) for sequence in own], self.batch_tokens, shared)
        ]

    def _forward(self, batch: PackedBatch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.module(batch)


class _Outputs(nn.Module):
    """``task.outputs(model, batch)`` as a module, which is what PyTorch's data parallelism takes."""

    def __init__(self, model: Qwen3Model, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.task.outputs(self.model, batch)
