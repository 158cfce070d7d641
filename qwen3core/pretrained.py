"""What the two jobs share: an open checkpoint (model and tokenizer) and the run over batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batch import KeysValues, PackedBatch, pack, plan, shared_heads, to_device
from .config import read_json
from .errors import InputError, check_int
from .model import Qwen3Model
from .ops import Ops
from .tokenizer import Tokenizer
from .weights.checkpoint import find, load_model

MAX_LENGTH = 8192
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a batch, unless the caller says: enough for the matrix products, and no more memory than that takes."""
BLOCK = 1024
"""Texts that are tokenised at a time."""
Self = TypeVar("Self", bound="Pretrained")
A = TypeVar("A")
B = TypeVar("B")


class Pretrained:
    """A model with its tokenizer. Use ``Embedder`` or ``Reranker``."""

    needs_head = False

    def __init__(
        self,
        model: Qwen3Model,
        tokenizer: Tokenizer,
        *,
        max_length: int = MAX_LENGTH,
        keep_tokens: int = 0,
        sentence_transformers: dict[str, Any] | None = None,
    ) -> None:
        """sentence_transformers: the checkpoint's parsed config_sentence_transformers.json, where it has one."""
        limit = model.config.max_position_embeddings
        check_int("max_length", max_length, 1)
        check_int("keep_tokens", keep_tokens, 0)
        if max_length > limit and max_length != MAX_LENGTH:
            raise InputError(f"max_length: expected at most {limit}, the model's limit, found {max_length}")
        tokenizer.check_vocabulary(model.embed_tokens.num_embeddings)
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = min(max_length, limit)
        self.keep_tokens = keep_tokens
        self.kept: dict[tuple[int, ...], KeysValues] = {}
        """Prompts and queries that texts shared, the one used last at the end."""
        self.sentence_transformers = sentence_transformers or {}

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        ops: str | Ops = "auto",
        max_length: int = MAX_LENGTH,
        split_special_tokens: bool = False,
        keep_tokens: int = 0,
    ) -> Self:
        """Open a checkpoint directory, or a hub id (local cache first, downloaded otherwise).

        dtype: of the arithmetic. ``"auto"`` is the checkpoint's; but where that is bfloat16 or float16 and a CPU has no
        instructions for bfloat16, it is float32 with the weights as stored, which is faster there and exact.
        ``"int8"``: weights, and what they multiply, rounded to 8 bits, for CPUs; ``qwen3core parity --dtype int8``
        shows the price. device: None is the first GPU, else the CPU. max_length: tokens per input, template included;
        longer inputs lose content. split_special_tokens: see ``Tokenizer``. keep_tokens: keep the keys and values of
        prompts and queries for later calls, up to so many tokens (0.6B: 0.2 MB each in float32); for weights that do
        not change meanwhile, else ``kept.clear()``.
        Raises CheckpointError for what is wrong with the files, InputError for the options.
        """
        directory = find(path_or_id, revision=revision)
        model = load_model(directory, dtype=dtype, device=device, ops=ops, head=cls.needs_head)
        tokenizer = Tokenizer(directory / "tokenizer.json", split_special_tokens=split_special_tokens)
        extra = directory / "config_sentence_transformers.json"
        return cls(
            model,
            tokenizer,
            max_length=max_length,
            keep_tokens=keep_tokens,
            sentence_transformers=read_json(extra) if extra.exists() else None,
        )

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return self.model.dtype or self.model.embed_tokens.weight.dtype

    def __repr__(self) -> str:
        weights = self.model.get_parameter("layers.0.mlp.gate_proj.weight").dtype
        return (
            f"{type(self).__name__}(dtype={self.dtype}, weights={weights}, device={str(self.device)!r}, "
            f"max_length={self.max_length}, ops={self.model.ops})"
        )

    def run(
        self,
        texts: Sequence[str],
        prefixes: Sequence[tuple[int, ...]],
        assemble: Callable[[list[list[int]]], list[list[int]]],
        function: Callable[[PackedBatch], Tensor],
        *shape: int,
        batch_tokens: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> Tensor:
        """``function`` of every text, in batches: rows [N, *shape] float32, in the order given.

        prefixes: for each text, ids that its sequence may begin with. assemble: the texts' ids to whole sequences.
        Equal texts are computed once, and so is the beginning that all texts of one prefix share; but not while a
        point is watched, so that every text is seen.
        """
        if batch_tokens is not None:
            check_int("batch_tokens", batch_tokens, 1)
        self.tokenizer.check(texts)
        watched = bool(self.model.taps.active)
        first: dict[Any, int] = {}
        same = [first.setdefault(i if watched else text, i) for i, text in enumerate(texts)]
        distinct = list(first.values())
        blocks = [distinct[i : i + BLOCK] for i in range(0, len(distinct), BLOCK)]
        contents = ahead(([texts[i] for i in block] for block in blocks), self.tokenizer.encode)
        out = torch.empty(len(texts), *shape, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        disable = None if show_progress_bar is None else not show_progress_bar  # None: unless on a terminal
        with torch.no_grad(), tqdm(total=len(distinct), disable=disable, delay=1, unit="text", leave=False) as bar:
            for block, ids in zip(blocks, contents, strict=True):
                sequences = assemble(ids)
                self._check(block, sequences, batch_tokens)
                heads = None if watched else shared_heads(sequences, [prefixes[i] for i in block])
                past = self._past(heads) if heads and self.keep_tokens else None
                for group in plan(
                    [len(s) for s in sequences], batch_tokens or BATCH_TOKENS.get(self.device.type, 4096), heads
                ):
                    batch = pack(
                        [sequences[i] for i in group],
                        device=self.device,
                        indices=[block[i] for i in group],
                        heads=heads and [heads[i] for i in group],
                        past=past,
                    )
                    out[to_device(torch.tensor(batch.indices), self.device)] = function(batch)
                    bar.update(len(group))
        return out if len(distinct) == len(texts) else out[same]

    def _past(self, heads: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], KeysValues]:
        """As many of these heads as ``keep_tokens`` allows, those of the longest time ago dropped for them."""
        past: dict[tuple[int, ...], KeysValues] = {}
        room = self.keep_tokens
        for head in dict.fromkeys(heads):
            if 0 < len(head) <= room:
                room -= len(head)
                if head not in self.kept:
                    self.kept[head] = self.model.keys_values(pack([head], device=self.device))
                past[head] = self.kept.pop(head)
        self.kept |= past
        for head in list(self.kept):
            if sum(map(len, self.kept)) > self.keep_tokens:
                del self.kept[head]
        return past

    def _check(self, indices: list[int], sequences: list[list[int]], batch_tokens: int | None) -> None:
        """Raise InputError for a sequence that the model or the batch cannot hold."""
        rows = self.model.embed_tokens.num_embeddings
        for index, ids in zip(indices, sequences, strict=True):
            if max(ids) >= rows:
                raise InputError(f"input {index}: expected token ids below {rows} (embed_tokens), found {max(ids)}")
        longest = max(sequences, key=len)
        if batch_tokens is not None and len(longest) > batch_tokens:
            raise InputError(
                f"batch_tokens: expected at least {len(longest)}, the length in tokens of the longest input "
                f"(index {indices[sequences.index(longest)]}), found {batch_tokens}"
            )


def stream(
    call: Callable[..., Any], inputs: Iterable[Any], *, block_size: int = 16384, **options: Any
) -> Iterator[Any]:
    """``call(block, **options)`` for each block of an endless or lazy input, in order; no more than a block is held.

        for vectors in stream(embedder.encode_document, open("texts.txt")): ...

    call: ``encode``, ``encode_query``, ``encode_document`` or ``predict``. Raises InputError, naming the block.
    """
    check_int("block_size", block_size, 1)
    source, start = iter(inputs), 0
    while block := list(islice(source, block_size)):
        try:
            yield call(block, **options)
        except InputError as error:
            raise InputError(f"block of inputs from {start}: {error}") from error
        start += len(block)


def ahead(blocks: Iterable[A], work: Callable[[A], B]) -> Iterator[B]:
    """``work`` of each block, the next one's done in a thread while the caller is busy with this one's."""
    source = iter(blocks)
    for first in source:
        result = work(first)
        with ThreadPoolExecutor(1) as thread:
            for block in source:
                future = thread.submit(work, block)
                yield result
                result = future.result()
        yield result
