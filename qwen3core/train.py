"""Training: contrastive for embeddings, yes or no for rerankers; all weights, or LoRA through peft.

    embedder = Embedder.from_pretrained(path, dtype="float32")
    train(embedder.model, embedding_task(examples, embedder.tokenizer), Options(), "out")

A batch of any size fits: outputs of all its texts first, without gradients, then the loss and its gradient by each
output, then text by text the gradients of the weights (GradCache, arXiv:2101.06983). So every text of a batch, of
every process under ``torchrun``, is a negative of every query, whatever memory there is.
"""

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from . import losses
from .batch import PackedBatch, pack
from .data import Example, read_jsonl
from .errors import InputError, check_int
from .losses import Groups
from .model import Qwen3Model
from .planning import plan, shared_prefixes
from .prompts import DEFAULT_TASK, embedding_query, reranker_body
from .reference import yes_minus_no
from .tokenizer import Tokenizer

Sequences = list[list[int]]


@dataclass(frozen=True)
class Options:
    epochs: float = 1.0
    batch_size: int = 32
    """Examples of one step, over all processes."""
    batch_tokens: int = 8192
    """Tokens computed at a time."""
    learning_rate: float = 1e-5
    """At its peak: after the warm-up it falls as a cosine, to nothing at the end."""
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bfloat16: bool = False
    """Matrix products in bfloat16, by autocast; weights, sums and norms stay float32."""
    recompute: bool = False
    """Keep of each layer its input alone, and compute it again for the gradients: less memory, a third more time."""
    save_every: int = 500
    """Steps between states to resume from."""
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What to train for. ``embedding_task``, ``reranking_task``, or one of your own."""

    size: int
    """Examples."""
    batch: Callable[[list[int]], tuple[Sequences, list[tuple[int, ...]], Any]]
    """Examples, by number, to sequences of ids; for each the prefix that it may share; and what ``loss`` wants."""
    outputs: Callable[[Qwen3Model, PackedBatch], Tensor]
    """Of each sequence: float32 [n, ...]."""
    loss: Callable[[Tensor, Any], Tensor]
    """Outputs of a batch's sequences, in their order, and what ``batch`` gave for it, to a scalar."""


def embedding_task(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    instruction: str = DEFAULT_TASK,
    max_length: int = 512,
    dims: Sequence[int] | None = None,
    temperature: float = 0.02,
    margin: float = 0.1,
) -> Task:
    """InfoNCE over the first ``dims`` components of vectors (all, by default); queries carry the instruction."""

    def batch(indices: list[int]) -> tuple[Sequences, list[tuple[int, ...]], Groups]:
        texts: dict[tuple[str, str], int] = {}

        def number(prompt: str, text: str) -> int:
            return texts.setdefault((prompt, text), len(texts))

        chosen = [examples[i] for i in indices]
        query = [number(embedding_query(e.instruction or instruction), e.query) for e in chosen]
        groups = _groups(query, [[number("", text) for text in (e.positive, *e.negatives)] for e in chosen])
        prompts = dict.fromkeys(prompt for prompt, _ in texts)
        prefix = dict(zip(prompts, map(tuple, tokenizer.encode(list(prompts))), strict=True))
        sequences = tokenizer.embedding([prompt + text for prompt, text in texts], max_length)
        return sequences, [prefix[prompt] for prompt, _ in texts], groups

    def loss(outputs: Tensor, groups: Groups) -> Tensor:
        widths = dims or [outputs.shape[1]]
        return losses.matryoshka(outputs, groups, dims=widths, temperature=temperature, margin=margin)

    return Task(len(examples), batch, lambda model, packed: model.embed(packed, normalize=False), loss)


def reranking_task(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    instruction: str = DEFAULT_TASK,
    max_length: int = 512,
    loss: Callable[[Tensor, Groups], Tensor] = losses.pointwise,
) -> Task:
    """Yes for positives, no for negatives; ``losses.listwise`` ranks each positive above its negatives instead."""
    yes_no = tokenizer.yes_no()

    def batch(indices: list[int]) -> tuple[Sequences, list[tuple[int, ...]], Groups]:
        bodies: dict[str, int] = {}

        def number(example: Example, document: str) -> int:
            body = reranker_body(example.instruction or instruction, example.query, document)
            return bodies.setdefault(body, len(bodies))

        chosen = [examples[i] for i in indices]
        groups = _groups([0] * len(chosen), [[number(e, d) for d in (e.positive, *e.negatives)] for e in chosen])
        [start] = tokenizer.encode([reranker_body(instruction, "", "")])
        sequences = tokenizer.reranking(list(bodies), max_length)
        return sequences, [(*tokenizer.prefix, *start)] * len(bodies), groups

    def outputs(model: Qwen3Model, packed: PackedBatch) -> Tensor:
        return model.embed(packed, normalize=False) @ yes_minus_no(model.lm_head_rows(yes_no))

    return Task(len(examples), batch, outputs, loss)


def _groups(query: list[int], documents: list[list[int]]) -> Groups:
    positive = torch.tensor([first for first, *_ in documents])
    negative = torch.tensor([i for _, *others in documents for i in others], dtype=torch.int64)
    owner = torch.tensor([row for row, ids in enumerate(documents) for _ in ids[1:]], dtype=torch.int64)
    return Groups(torch.tensor(query), positive, negative, owner)


def train(model: Qwen3Model, task: Task, options: Options, folder: str | Path) -> None:
    """Train, in place, those parameters of ``model`` that require gradients; they are float32.

    In ``folder``: ``loss.jsonl``, a row a step; ``loss.png`` where matplotlib is; and ``state.pt`` until the end, from
    which the same call goes on after a kill, on one machine with the same result to the bit. Raises InputError, also
    where the state is of another training, or the loss is no longer finite.
    """
    for name in ("batch_size", "batch_tokens", "save_every"):
        check_int(name, getattr(options, name), 1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if wrong or not parameters:
        raise InputError(f"train: expected float32 parameters that require gradients, found {wrong[:3] or 'none'}")
    steps = max(1, round(options.epochs * task.size / options.batch_size))
    rank, compute = _prepare(model, task, options)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=options.weight_decay, fused=True)
    run = Run(Path(folder), {"examples": task.size, "parameters": len(parameters), **asdict(options)}, rank == 0)
    first = run.resume(parameters, optimizer)
    with deterministic(model), recomputing(model) if options.recompute else nullcontext():
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=None if rank == 0 else True)
        for step in bar:
            loss, tokens = compute(_examples(step, task.size, options))
            if not math.isfinite(loss):
                raise InputError(
                    f"learning_rate {options.learning_rate}: expected a finite loss, found {loss} at {step=}"
                )
            norm = nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm).item()
            rate = options.learning_rate * _schedule(step, steps, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss:.4f}")
            run.log({"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens})
            if (step + 1) % options.save_every == 0 and step + 1 < steps:
                run.save(step + 1, parameters, optimizer)
    run.finish()


def _prepare(model: Qwen3Model, task: Task, options: Options) -> tuple[int, Callable[[list[int]], tuple[float, int]]]:
    """This process's rank, and the function that adds the gradients of a batch and gives its loss and its tokens."""
    device = model.embed_tokens.weight.device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    module: nn.Module = Outputs(model, task.outputs)
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        module = DistributedDataParallel(module)

    def forward(batch: PackedBatch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            return module(batch)

    def compute(examples: list[int]) -> tuple[float, int]:
        sequences, prefixes, targets = task.batch(examples)
        if len(sequences) < world:
            raise InputError(f"batch_size: expected a text for each of {world} processes, found {len(sequences)}")
        mine = list(range(rank, len(sequences), world))
        shared: list[tuple[int, ...]] = [()] * len(mine)
        if model.shortcuts:
            shared = shared_prefixes([sequences[i] for i in mine], [prefixes[i] for i in mine])
        batches = [
            pack(
                [sequences[mine[i]] for i in group],
                device=device,
                indices=[mine[i] for i in group],
                prefixes=[shared[i] for i in group],
            )
            for group in plan([len(sequences[i]) for i in mine], options.batch_tokens, shared)
        ]
        rows = [torch.tensor(batch.indices, device=device) for batch in batches]
        once = len(batches) == 1
        with torch.set_grad_enabled(once):
            results = [forward(batch) for batch in batches]
        outputs = results[0].new_zeros(len(sequences), *results[0].shape[1:])
        for row, result in zip(rows, results, strict=True):
            outputs[row] = result.detach()
        if world > 1:
            dist.all_reduce(outputs)  # each process has filled its own rows
        outputs.requires_grad_()
        loss = task.loss(outputs, targets.to(device))
        [gradient] = torch.autograd.grad(loss, outputs)
        for row, batch in zip(rows, batches, strict=True):
            sync = batch is batches[-1] or not isinstance(module, DistributedDataParallel)
            with nullcontext() if sync else module.no_sync():  # type: ignore[operator]
                # DDP divides by the number of processes, but each has the gradient of the whole loss by its rows.
                (results[0] if once else forward(batch)).backward(gradient[row] * world)
        return loss.item(), sum(map(len, sequences))

    return rank, compute


@contextmanager
def deterministic(model: Qwen3Model) -> Iterator[None]:
    """Gradients of rows that are used twice, summed in one order: on a CPU, the same bits again."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=model.embed_tokens.weight.is_cuda)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextmanager
def recomputing(model: Qwen3Model) -> Iterator[None]:
    """Layers that keep their input alone for the gradients."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward


class Outputs(nn.Module):
    """``outputs(model, batch)`` as a module, which is what PyTorch's data parallelism takes."""

    def __init__(self, model: Qwen3Model, outputs: Callable[[Qwen3Model, PackedBatch], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.outputs(self.model, batch)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: a line up, then half a cosine down."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def _examples(step: int, size: int, options: Options) -> list[int]:
    """Numbers of a step's examples: all in a new order each epoch, one epoch after the other."""
    places = range(step * options.batch_size, (step + 1) * options.batch_size)
    orders = {epoch: _order(size, epoch, options.seed) for epoch in {place // size for place in places}}
    return [orders[place // size][place % size] for place in places]


@lru_cache(2)
def _order(size: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


class Run:
    """The files of one training; only the first process writes."""

    def __init__(self, folder: Path, identity: dict[str, Any], writes: bool) -> None:
        self.folder, self.identity, self.writes = folder, identity, writes
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []

    def resume(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Take up the state in the folder, if one is there; the step to go on with."""
        first, log, path = 0, self.folder / "loss.jsonl", self.folder / "state.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["identity"] != self.identity:
                differ = [f"{k} {v!r}" for k, v in state["identity"].items() if self.identity.get(k) != v]
                raise InputError(
                    f"{path}: expected the state of this training, found one of {', '.join(differ)}; "
                    "use its options, or remove it to begin anew"
                )
            with torch.no_grad():
                for name, value in state["parameters"].items():
                    parameters[name].copy_(value)
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            self.rows = [row for row, _ in read_jsonl(log) if row["step"] < first]
        if self.writes:
            log.write_text("".join(json.dumps(row) + "\n" for row in self.rows), "utf-8")
        return first

    def save(self, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        if self.writes:
            state = {"step": step, "identity": self.identity, "optimizer": optimizer.state_dict()}
            part = self.folder / "state.pt.part"
            torch.save(state | {"parameters": {name: p.detach() for name, p in parameters.items()}}, part)
            os.replace(part, self.folder / "state.pt")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.writes:
            with (self.folder / "loss.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Draw the losses, and remove the state."""
        if not self.writes:
            return
        if importlib.util.find_spec("matplotlib"):
            draw(self.rows, self.folder / "loss.png")
        (self.folder / "state.pt").unlink(missing_ok=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss of every step, and the mean of those about it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, values = [row["step"] for row in rows], [row["loss"] for row in rows]
    width = max(1, len(rows) // 50)
    means = [sum(near) / len(near) for i in range(len(rows)) if (near := values[max(0, i - width) : i + width + 1])]
    axes.plot(steps, values, color="0.8", linewidth=0.8, label="one step")
    axes.plot(steps, means, color="C0", linewidth=1.8, label=f"mean of {2 * width + 1} steps")
    axes.set(xlabel="step", ylabel="loss", title=f"Loss by step, {means[0]:.3g} to {means[-1]:.3g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
