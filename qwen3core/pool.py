"""Several devices: a process on each, with a copy of one checkpoint, computes blocks of a call's inputs.

The names are sentence-transformers': ``pool = embedder.start_multi_process_pool(["cuda:0", "cuda:1"])``,
``embedder.encode(texts, pool=pool)``, ``embedder.stop_multi_process_pool(pool)``; or ``encode(texts, device=[...])``.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .errors import InputError, check_int, warn
from .reading import as_list

BLOCKS = 4
"""Of each process: so many that they end at about the same time, and few enough for batches of similar lengths."""
LARGEST = 5000
"""Inputs of a block at most."""

_opened: Any = None
"""In one of the processes: its copy of the checkpoint."""


class Pool:
    """Processes with a copy each of an open checkpoint: its modules, prompts and options as they are now.

    On CPUs, they share its weights, as shared memory. They are spawned, so that a script needs
    ``if __name__ == "__main__":``. Call ``close()`` in the end, or use a ``with`` statement.

    target_devices: one process for each, such as ``["cuda:0", "cuda:1"]`` or ``["cpu", "cpu"]``; None: all GPUs.
    Raises InputError for what are no devices, and where the checkpoint has a capture or an edit active.
    """

    def __init__(self, opened: Any, target_devices: Sequence[str | torch.device] | None = None) -> None:
        from concurrent.futures import ProcessPoolExecutor

        if target_devices is None:
            target_devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        devices = [_device(device) for device in target_devices]
        if not devices:
            raise InputError('target_devices: expected one or more, such as ["cuda:0"] or ["cpu", "cpu"], found none')
        _check_no_hooks(opened)
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        for device in devices:
            queue.put(device)
        self.devices = devices
        threads = max(1, torch.get_num_threads() // max(1, devices.count("cpu")))
        self.executor = ProcessPoolExecutor(len(devices), context, _start, (opened, queue, threads))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, once they have computed what they were asked for."""
        self.executor.shutdown()

    def run(self, name: str, inputs: list[Any], options: dict[str, Any], chunk_size: int | None = None) -> Any:
        """The rows of ``getattr(opened, name)(inputs, **options)``, as a numpy array, in the order given.

        Raises InputError, naming the block, and what else the processes raise.
        """
        size = min(-(-len(inputs) // (BLOCKS * len(self.devices))), LARGEST) if chunk_size is None else chunk_size
        check_int("chunk_size", size, 1)
        shown = options.pop("show_progress_bar", None)
        starts = range(0, len(inputs), size)
        futures = [
            self.executor.submit(_compute, name, inputs[i : i + size], {**options, "show_progress_bar": False})
            for i in starts
        ]
        results, messages = [], []
        disable = None if shown is None else not shown
        for start, future in zip(
            starts, tqdm(futures, disable=disable, delay=1, unit="block", leave=False), strict=True
        ):
            try:
                result, said = future.result()
            except InputError as error:
                for waiting in futures:
                    waiting.cancel()
                raise InputError(f"block of inputs from {start}: {error}") from error
            results.append(result)
            messages += said
        for message in messages:
            warn(message)
        return np.concatenate(results)


def pooled(call: Callable[..., Any]) -> Callable[..., Any]:
    """``encode`` or ``predict`` with the keywords ``pool``, ``device`` (a list of devices) and ``chunk_size``."""

    @wraps(call)
    def split(
        self: Any, inputs: Any, *, pool: Pool | None = None, chunk_size: int | None = None, **options: Any
    ) -> Any:
        devices = options.pop("device") if isinstance(options.get("device"), list | tuple) else None
        if pool is None and devices is None:
            if chunk_size is not None:
                raise InputError("chunk_size: expected none without pool or a list of devices, whose it is")
            return call(self, inputs, **options)
        predicts = call.__name__ == "predict"
        inputs = inputs if isinstance(inputs, str) else as_list("pairs" if predicts else "inputs", inputs)
        pair = predicts and len(inputs) == 2 and all(isinstance(part, str) for part in inputs)
        if isinstance(inputs, str) or pair or not inputs:
            return call(self, inputs, **options)
        if options.pop("grad", False):
            raise InputError("grad: expected none with several devices, whose processes return numbers alone")
        _check_no_hooks(self)
        tensor = options.pop("convert_to_tensor", False)
        with nullcontext(pool) if pool else Pool(self, devices) as processes:
            rows = processes.run(call.__name__, inputs, options, chunk_size)
        return torch.from_numpy(rows).to(self.device) if tensor else rows

    return split


def _start(opened: Any, devices: Any, threads: int) -> None:
    global _opened
    torch.set_num_threads(threads)
    opened.model.to(devices.get())
    _opened = opened


def _compute(name: str, inputs: list[Any], options: dict[str, Any]) -> tuple[Any, list[str]]:
    """Rows, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = getattr(_opened, name)(inputs, **options)
    return rows.cpu().numpy() if isinstance(rows, Tensor) else rows, [str(warning.message) for warning in caught]


def _device(device: str | torch.device) -> str:
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise InputError(f"target_devices: expected devices of torch, found {device!r}: {error}") from None


def _check_no_hooks(opened: Any) -> None:
    if opened.model.hooks:
        raise InputError("pool: expected no capture or edit active, which other processes would not see")
