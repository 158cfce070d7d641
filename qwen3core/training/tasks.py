"""What a model is trained for: sequences of a batch, outputs of the model, and their loss."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch import PackedBatch
from ..errors import InputError, check_int, check_number
from ..layout import LAST_TOKEN
from ..model import Qwen3Model
from ..prompts import DEFAULT_TASK, embedding_query
from ..tokenizer import Tokenizer
from . import losses
from .data import Example
from .files import digest
from .losses import Groups

Batch = tuple[list[list[int]], list[tuple[int, ...]], Any]
"""Token ids of sequences; for each, a prefix that it may share with others; and the targets, which ``loss`` gets."""


@dataclass(frozen=True)
class Task:
    """A task of ``size`` examples: ``embedding_task``, ``reranking_task``, or one of your own."""

    size: int
    """How many examples there are."""
    batch: Callable[[list[int]], Batch]
    """The sequences of some examples, given by number."""
    outputs: Callable[[Qwen3Model, PackedBatch], Tensor]
    """The output of each sequence: float32 [n, ...]."""
    loss: Callable[[Tensor, Any], Tensor]
    """A scalar from the outputs of a batch's sequences, in their order, and the targets that ``batch`` gave."""
    identity: dict[str, Any]
    """All of the task that decides the numbers, by name, as JSON values: ``train`` resumes no state that differs."""
    check: Callable[[Qwen3Model, int], None] = lambda model, batch_size: None
    """Raises InputError where nothing can be learned from the examples, for this model and batch size."""


def embedding_task(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    instruction: str | None = DEFAULT_TASK,
    query_prompt: Callable[[str | None], str] = lambda instruction: embedding_query(instruction or DEFAULT_TASK),
    document_prompt: str = "",
    max_length: int = 512,
    dims: Sequence[int] | None = None,
    temperature: float = 0.02,
    margin: float = 0.1,
) -> Task:
    """InfoNCE over the first ``dims`` components of vectors (all, by default); queries carry the instruction.

    instruction: for examples that have none of their own; None is the prompt without one. query_prompt: a function of
    the instruction, such as ``Embedder.query_prompt``. max_length: tokens per text, prompt included. temperature,
    margin: see ``losses.info_nce``. Raises InputError.
    """
    check_number("temperature", temperature, 0, above=True)
    check_number("margin", margin, 0)
    prompts = [*{query_prompt(e.instruction or instruction) for e in examples}, document_prompt]
    around = len(tokenizer.opening) + len(tokenizer.closing)
    check_int("max_length", max_length, max(map(len, tokenizer.encode(prompts))) + around + 1)

    def batch(indices: list[int]) -> Batch:
        texts: dict[tuple[str, str], int] = {}

        def number(prompt: str, text: str) -> int:
            return texts.setdefault((prompt, text), len(texts))

        chosen = [examples[i] for i in indices]
        query = [number(query_prompt(e.instruction or instruction), e.query) for e in chosen]
        groups = _groups(
            query, [[number(document_prompt, text) for text in (e.positive, *e.negatives)] for e in chosen]
        )
        prompts = dict.fromkeys(prompt for prompt, _ in texts)
        ids = tokenizer.encode(list(prompts))
        prefix = {prompt: (*tokenizer.opening, *start) for prompt, start in zip(prompts, ids, strict=True)}
        sequences = tokenizer.embedding([prompt + text for prompt, text in texts], max_length)
        return sequences, [prefix[prompt] for prompt, _ in texts], groups

    def loss(outputs: Tensor, groups: Groups) -> Tensor:
        widths = dims or [outputs.shape[1]]
        return losses.matryoshka(outputs, groups, dims=widths, temperature=temperature, margin=margin)

    def outputs(model: Qwen3Model, packed: PackedBatch) -> Tensor:
        return model.embed(packed, normalize=False)

    def check(model: Qwen3Model, batch_size: int) -> None:
        layout = model.layout
        if not layout.pooling or not (layout.include_prompt or layout.pooling == LAST_TOKEN):
            raise InputError("train: expected a checkpoint that pools whole inputs, found one that leaves prompts out")
        for dim in dims or []:
            check_int("dims", dim, 1, layout.width(model.config.hidden_size))
        queries = {(e.instruction or instruction, e.query) for e in examples}
        if (batch_size == 1 or len(queries) == 1) and not any(e.negatives for e in examples):
            raise InputError(
                "examples: expected negatives (rejected_response), or several queries in a batch, found no negatives, "
                f"batch_size {batch_size} and different queries {len(queries)}: nothing to tell a positive from"
            )

    identity = _identity("embedding", examples, tokenizer, instruction, max_length)
    identity |= {"prompts": sorted(prompts), "dims": dims and list(dims), "temperature": temperature, "margin": margin}
    return Task(len(examples), batch, outputs, loss, identity, check)


def reranking_task(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    instruction: str = DEFAULT_TASK,
    max_length: int = 512,
    loss: Callable[[Tensor, Groups], Tensor] = losses.pointwise,
) -> Task:
    """Yes for positives, no for negatives; ``losses.listwise`` ranks each positive above its negatives instead.

    instruction: for examples that have none of their own. max_length: tokens per pair, template included. Raises
    InputError.
    """
    template = tokenizer.template
    bodies = [template.fill(text, "", "") for text in _instructions(examples, instruction)]
    around = max(map(len, tokenizer.encode(bodies)), default=0) + len(tokenizer.prefix) + len(tokenizer.suffix)
    check_int("max_length", max_length, around + 1)

    def batch(indices: list[int]) -> Batch:
        bodies: dict[str, int] = {}

        def number(example: Example, document: str) -> int:
            body = template.fill(example.instruction or instruction, example.query, document)
            return bodies.setdefault(body, len(bodies))

        chosen = [examples[i] for i in indices]
        groups = _groups([0] * len(chosen), [[number(e, d) for d in (e.positive, *e.negatives)] for e in chosen])
        [start] = tokenizer.encode([template.start(instruction)])
        sequences = tokenizer.reranking(list(bodies), max_length)
        return sequences, [(*tokenizer.prefix, *start)] * len(bodies), groups

    def outputs(model: Qwen3Model, packed: PackedBatch) -> Tensor:
        answers = model.layout.answers or (tokenizer.yes_no() if model.layout.score == "lm_head" else ())
        return model.logits(packed, model.score_weight(answers))

    def check(model: Qwen3Model, batch_size: int) -> None:
        if len(model.layout.labels) > 1 or model.layout.activation != "Sigmoid":
            raise InputError(f"train: expected a checkpoint whose score is P(yes), found {model.layout}")
        if not any(e.negatives for e in examples):
            raise InputError("examples: expected negatives (rejected_response), found none: yes would be right always")

    identity = _identity("reranking", examples, tokenizer, instruction, max_length)
    identity["loss"] = repr(loss)
    return Task(len(examples), batch, outputs, loss, identity, check)


def _instructions(examples: Sequence[Example], instruction: str) -> list[str]:
    return sorted({e.instruction or instruction for e in examples})


def _identity(
    name: str, examples: Sequence[Example], tokenizer: Tokenizer, instruction: Any, max_length: int
) -> dict[str, Any]:
    rows = (json.dumps([e.query, e.positive, e.negatives, e.instruction]) for e in examples)
    return {
        "task": name,
        "examples": digest(rows),
        "tokenizer": digest([tokenizer.backend.to_str(), str(tokenizer.split_special_tokens), str(tokenizer.template)]),
        "instruction": instruction,
        "max_length": max_length,
    }


def _groups(query: list[int], documents: list[list[int]]) -> Groups:
    """Groups from the row of each query, and the rows of its documents, the positive first."""
    positive = torch.tensor([first for first, *_ in documents])
    negative = torch.tensor([i for _, *others in documents for i in others], dtype=torch.int64)
    owner = torch.tensor([row for row, ids in enumerate(documents) for _ in ids[1:]], dtype=torch.int64)
    return Groups(torch.tensor(query), positive, negative, owner)
