"""The training loop: AdamW over cached gradients, resumed where it was interrupted."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..errors import InputError, check_int, check_number
from ..model import Qwen3Model
from ..writing import locked
from .cached_gradients import CachedGradients
from .files import RunFiles, digest
from .tasks import Task


@dataclass(frozen=True)
class Options:
    """How to train. Raises InputError for a number that is none."""

    epochs: float = 1.0
    """Passes over all examples; 0.5 is half of one."""
    batch_size: int = 32
    """Examples of one step, over all processes."""
    batch_tokens: int = 8192
    """Tokens computed at a time."""
    learning_rate: float = 1e-5
    """Peak rate, reached after the warm-up; it then falls as half a cosine, to 0 at the end."""
    warmup: float = 0.05
    """Share of the steps."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Longer gradients are cut to this length."""
    bfloat16: bool = False
    """Matrix products in bfloat16, by autocast; weights, sums and norms stay float32."""
    recompute: bool = False
    """Store each layer's input alone, and compute the rest again for the gradients: less memory, a third more time."""
    save_every: int = 500
    """Steps between states to resume from."""
    seed: int = 0
    """Decides the order of the examples."""

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 0, 1e6, above=True)
        for name in ("batch_size", "batch_tokens", "save_every"):
            check_int(name, getattr(self, name), 1, 2**31 - 1)
        for name in ("learning_rate", "max_grad_norm"):
            check_number(name, getattr(self, name), 0, above=True)
        check_number("warmup", self.warmup, 0, 1)
        check_number("weight_decay", self.weight_decay, 0)
        check_int("seed", self.seed, 0, 2**32 - 1)


def train(
    model: Qwen3Model, task: Task, options: Options, folder: str | Path, *, write: Callable[[], None] | None = None
) -> None:
    """Train, in place, those parameters of ``model`` that require gradients; they are float32.

    In ``folder``: ``loss.jsonl``, a row a step; ``loss.png`` where matplotlib is; and ``state.pt`` until the end, from
    which the same call goes on after a kill or a full disk, on one machine with the same result to the bit. write:
    called at the end, in the first process, to put the result on disk; the state is removed once it has returned.

    Raises InputError before anything is written where the options leave no step or nothing to learn; also where the
    state is of another training, another process trains in the folder, or loss or gradient are no longer finite.
    Raises OSError for what cannot be written.
    """
    parameters = _trained(model)
    steps = _steps(task.size, options)
    task.check(model, options.batch_size)
    gradients = CachedGradients(model, task, options.batch_tokens, bfloat16=options.bfloat16)
    first_process = gradients.rank == 0
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=options.weight_decay, fused=True)
    files = RunFiles(Path(folder), _identity(model, task, options, gradients.world), writes=first_process)
    disable = None if first_process else True  # None: unless on a terminal
    with (
        locked(Path(folder)) if first_process else nullcontext(),
        deterministic(model),
        recomputing(model) if options.recompute else nullcontext(),
    ):
        first = files.resume(parameters, optimizer)
        bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=disable)
        for step in bar:
            loss, tokens = gradients.compute(_examples(step, task.size, options))
            norm = nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm).item()
            for name, value in (("loss", loss), ("gradient", norm)):
                if not math.isfinite(value):
                    raise InputError(
                        f"learning_rate {options.learning_rate}: expected a finite {name}, found {value} at {step=}"
                    )
            rate = options.learning_rate * _schedule(step, steps, options.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss:.4f}")
            files.log({"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "tokens": tokens})
            if (step + 1) % options.save_every == 0 or step + 1 == steps:
                files.save(step + 1, parameters, optimizer)
        files.finish(write)


def _trained(model: Qwen3Model) -> dict[str, nn.Parameter]:
    """The parameters that require gradients. Raises InputError unless there are some and they are float32."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if wrong or not parameters:
        raise InputError(f"train: expected float32 parameters that require gradients, found {wrong[:3] or 'none'}")
    return parameters


def _steps(size: int, options: Options) -> int:
    steps = options.epochs * size / options.batch_size
    if steps < 1:
        raise InputError(
            f"epochs {options.epochs} x {size} examples / batch_size {options.batch_size}: expected one step or more, "
            f"found {steps:.3g}"
        )
    return round(steps)


def _identity(model: Qwen3Model, task: Task, options: Options, processes: int) -> dict[str, Any]:
    """All that decides the numbers, and nothing else: how often a state is saved may change."""
    weights = dict(model.named_parameters())
    named = (x for name, p in weights.items() for x in (f"{name} {list(p.shape)} {p.dtype} {p.requires_grad}", p))
    trained = [p for p in weights.values() if p.requires_grad]
    return {
        **task.identity,
        **{name: value for name, value in asdict(options).items() if name != "save_every"},
        "trained": f"{len(trained)} tensors, {sum(p.numel() for p in trained)} numbers",
        "model": digest([str(model.config), *named]),
        "ops": str(model.ops),
        "device": model.embed_tokens.weight.device.type,
        "processes": processes,
    }


@contextmanager
def deterministic(model: Qwen3Model) -> Iterator[None]:
    """Have gradients of rows that are used twice summed in one order: on a CPU, the same bits again."""
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
    """Have each layer store only its input for the gradients."""
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward


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
