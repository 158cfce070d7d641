"""What the two jobs share: an open checkpoint (model and tokenizer), and the run of many texts in batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batch import PackedBatch, Prefix, pack
from .config import read_json
from .errors import CheckpointError, InputError, check_int, check_texts, warn
from .forks import use_threads
from .hooks import Stopped, edit
from .layout import LAST_TOKEN, Layout
from .model import Qwen3Model
from .ops import OPERATIONS, Ops
from .planning import plan, shared_prefixes
from .points import Where
from .pool import Pool
from .prefix_cache import PrefixCache
from .prompts import EOS
from .reading import as_iterator
from .tokenizer import Tokenizer
from .weights.build import load_model
from .weights.find import base_directory, find
from .weights.layout import read_layout
from .weights.save import save_model

MAX_LENGTH = 8192
"""Tokens of an input, unless the checkpoint or the caller says."""
BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a batch, unless the caller says: enough for the matrix products, and no more memory than that takes."""
TEXTS_PER_BLOCK = 1024
"""Texts that are tokenised at a time."""
Self = TypeVar("Self", bound="Pretrained")
A = TypeVar("A")
B = TypeVar("B")


class Pretrained:
    """A model with its tokenizer; ``Embedder`` and ``Reranker`` say how texts become sequences, and batches results.

    Threads may share one object while nobody changes its model, its options or its prompts; ``capture`` and ``edit``
    concern the calls of all of them. A process forked from one that has computed has one thread, and a warning says so.
    """

    jobs: tuple[str, ...]
    """What checkpoints of this class are for, as ``Layout.job`` has it."""

    def __init__(
        self, model: Qwen3Model, tokenizer: Tokenizer, *, max_length: int | None = None, prefix_cache_tokens: int = 0
    ) -> None:
        limit = model.config.position_limit
        if max_length is None:
            max_length = min(MAX_LENGTH, limit, model.layout.max_length or limit)
        check_int("prefix_cache_tokens", prefix_cache_tokens, 0)
        tokenizer.check_vocabulary(model.embed_tokens.num_embeddings)
        self.directory = tokenizer.path.parent
        """The checkpoint's, whose files ``save`` takes over."""
        self.model = model
        """The decoder, with its ops and its layout."""
        self.tokenizer = tokenizer
        """The checkpoint's tokenizer."""
        self.max_length = max_length
        """Tokens per input, template included."""
        self.max_seq_length = max_length  # which checks it
        self.prefix_cache = PrefixCache(prefix_cache_tokens)
        """Keys and values of prompts and queries, from one call to the next; empty unless asked for."""
        if any(weight.untyped_storage().resizable() for weight in model.parameters()):
            use_threads()  # weights that are not pages of a file were converted, by threads

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        ops: str | Ops = "auto",
        job: str | None = None,
        max_length: int | None = None,
        split_special_tokens: bool = False,
        prefix_cache_tokens: int = 0,
    ) -> Self:
        """Open a checkpoint.

        Args:
            path_or_id: a directory, ``"tiny-embedding"``, ``"tiny-reranker"``, or a hub id (local cache first,
                downloaded otherwise).
            revision: branch, tag or commit of the hub id.
            dtype: compute dtype. ``"auto"`` is the checkpoint's; but where that is bfloat16 or float16 and a CPU has no
                instructions for bfloat16, it is float32 with the weights as stored, which is faster there and exact.
                ``"int8"``: weights, and what they multiply, rounded to 8 bits, for CPUs; ``qwen3core parity --dtype
                int8`` shows the price.
            device: None is the first GPU, else the CPU.
            ops: a set of operations, or its name (``ops.resolve``).
            job: ``"embedding"`` or ``"reranker"``, where the files declare another or none: with the model cards'
                surroundings, then.
            max_length: tokens per input, template included; longer inputs lose content. By default the checkpoint's, at
                most 8192.
            split_special_tokens: see ``Tokenizer``.
            prefix_cache_tokens: size of the LRU cache of prompts' and queries' keys and values (``PrefixCache``); 0.6B
                takes 0.2 MB a token in float32.

        Raises:
            CheckpointError: for what is wrong with the files.
            InputError: for the options.
        """
        directory = find(path_or_id, revision=revision)
        layout = read_layout(directory, job=job)
        cls.check_job(layout, directory)
        tokenizer = open_tokenizer(directory, layout, split_special_tokens=split_special_tokens)
        layout = with_tokens(layout, tokenizer)
        lm_head = cls.jobs == ("reranker",) and layout.score == "lm_head"
        opened = cls(
            load_model(directory, dtype=dtype, device=device, ops=ops, lm_head=lm_head, layout=layout),
            tokenizer,
            max_length=max_length,
            prefix_cache_tokens=prefix_cache_tokens,
        )
        opened.directory = directory
        return opened

    def save(self, directory: str | Path) -> None:
        """Write the checkpoint as it is now, in the layout that it was opened in, for this library and the others.

        Files and the weights' dtype are those of ``self.directory``; config.json gets the numbers of layers, heads and
        widths that the modules have. Swapped operations are not saved, and a warning says so. directory: another than
        the one it was opened from; it is written whole or not at all.

        Raises:
            InputError: for what that layout cannot hold: modules of one's own, layers of different widths, weights that
                are int8 or not finite; and where the checkpoint is an adapter.
            CheckpointError, OSError: where the files cannot be read, or written.

        Example:
            >>> embedder = Embedder.from_pretrained("tiny-embedding")
            >>> embedder.model.layers = embedder.model.layers[:2]
            >>> from tempfile import TemporaryDirectory
            >>> with TemporaryDirectory() as folder:
            ...     embedder.save(f"{folder}/half")
            ...     print(len(Embedder.from_pretrained(f"{folder}/half").model.layers))
            2
        """
        own = (name for name in OPERATIONS if not getattr(self.model.ops, name).__module__.startswith(__package__))
        if names := ", ".join(own):
            warn(f"save: ops: {names}: swapped operations are not saved: the checkpoint opens with the usual ones")
        save_model(self.model, self.directory, Path(directory), self._declared())

    def _declared(self) -> dict[str, dict[str, Any]]:
        """By file, what differs from what the checkpoint declared, beside its configuration."""
        return {}

    @classmethod
    def check_job(cls, layout: Layout, directory: Path) -> None:
        """Raise CheckpointError where the files declare a job that is not of this class; warn where they say none."""
        job = cls.jobs[0]
        if layout.job is None or (layout.job == "chat" and job == "embedding"):
            warn(
                f"{directory}: expected modules.json, which says what a checkpoint is for, found none: it is opened as "
                f"the model cards do for the job {job!r}, and base and chat models are not trained for that "
                f"(job={job!r} says that it is right)"
            )
        elif layout.job not in cls.jobs:
            raise CheckpointError(
                f"{directory}: expected a checkpoint for the job {job!r}, found one for {layout.job!r} "
                f"(job={job!r} opens it all the same, as the model cards do)"
            )

    def start_multi_process_pool(self, target_devices: Sequence[str | torch.device] | None = None) -> Pool:
        """``Pool(self, target_devices)``: a process on each device, for the keyword ``pool``."""
        return Pool(self, target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: Pool) -> None:
        """``pool.close()``."""
        pool.close()

    def to_sequences(self, texts: list[str]) -> list[list[int]]:
        """Token ids of whole sequences, ready for the model. Called in a thread for the next texts."""
        raise NotImplementedError

    def compute(self, batch: PackedBatch, **options: Any) -> Any:
        """One result for each text of a batch: [N, ...], or a list."""
        raise NotImplementedError

    @property
    def layout(self) -> Layout:
        """What surrounds the decoder."""
        return self.model.layout

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.model.dtype or self.model.embed_tokens.weight.dtype

    @property
    def max_seq_length(self) -> int:
        """``max_length`` by sentence-transformers' name; it may be set."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limit = self.model.config.position_limit
        check_int("max_length", value, 1)
        if value > limit:
            raise InputError(f"max_length: expected at most {limit}, the model's limit, found {value}")
        self.max_length = value

    def __repr__(self) -> str:
        weights = max(self.model.layers.parameters(), key=Tensor.numel, default=self.model.norm.weight).dtype
        return (
            f"{type(self).__name__}(dtype={self.dtype}, weights={weights}, device={str(self.device)!r}, "
            f"max_length={self.max_length}, ops={self.model.ops}, layout={self.layout})"
        )

    def run(
        self,
        texts: Sequence[str],
        prefixes: Sequence[Prefix],
        shape: tuple[int, ...] | None,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        grad: bool = False,
        **options: Any,
    ) -> Any:
        """``compute(batch, **options)`` of all texts, in batches: rows [N, *shape] float32, in the order given.

        prefixes: for each text, ids that its sequence may begin with; what all sequences of one prefix begin with is
        computed once. shape: None for results of different shapes, of which a list is made. batch_tokens, batch_size:
        most tokens and texts of a batch. grad: record gradients; each text is then computed by itself, whatever it
        shares with others. None where a capture stopped the model.

        Raises InputError for texts or options, and where a result is not finite, naming the text and the point.
        """
        use_threads()
        self._check_call(texts, batch_tokens, batch_size, grad, options)
        first_equal = _first_equal(texts) if self.model.shortcuts and not grad else list(range(len(texts)))
        prefixes = [()] * len(texts) if grad else prefixes
        distinct = list(dict.fromkeys(first_equal))
        out: Any = [None] * len(texts)
        if shape is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            out = torch.empty(len(texts), *shape, dtype=dtype, device=self.device)
        disable = None if show_progress_bar is None else not show_progress_bar  # None: unless on a terminal
        progress = tqdm(total=len(distinct), disable=disable, delay=1, unit="text", leave=False)
        stopped = False
        with torch.set_grad_enabled(grad), progress as bar:
            for batch in self._batches(texts, prefixes, distinct, batch_tokens, batch_size):
                bar.update(len(batch.indices))
                try:
                    results = self.compute(batch, **options)
                except Stopped:
                    stopped = True
                    continue
                out = _put(out, batch.indices, results, grad)
        if stopped:
            return None
        if len(distinct) != len(texts):
            out = out[first_equal] if shape is not None else [out[i] for i in first_equal]
        if not (is_finite(out) if shape is not None else all(map(is_finite, out))):
            self._raise_not_finite(texts, out, **options)
        return out

    def _check_call(
        self,
        texts: Sequence[str],
        batch_tokens: int | None,
        batch_size: int | None,
        grad: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Raise InputError for texts, an option, or weights behind the layers: a sigmoid would make 0 or 1 of inf."""
        for name, bound in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
            if bound is not None:
                check_int(name, bound, 1)
        check_texts(texts)
        if grad and not all(weight.is_floating_point() for weight in self.model.parameters()):
            raise InputError("grad: expected weights with gradients, found int8")
        for name, x in {**dict(self.model.norm.named_parameters("model.norm")), **options}.items():
            if isinstance(x, Tensor) and not is_finite(x):
                raise InputError(f"{name}: expected finite numbers, found inf or nan")

    def _raise_not_finite(self, texts: Sequence[str], out: Iterable[Tensor], **options: Any) -> NoReturn:
        """Raise InputError for the first row of ``out`` that is not finite, whose text is computed again, alone."""
        index = next(i for i, row in enumerate(out) if not is_finite(row))
        batch = pack(self.to_sequences([texts[index]]), device=self.device, indices=[index])
        points: list[str] = []

        def look(x: Tensor, where: Where) -> Tensor:
            # Not capture, which would hold all points at once.
            if where.batch is batch and not points and not is_finite(x):
                points.append(where.name)
            return x

        with torch.no_grad(), edit(self.model, {"*": look}):
            again = self.compute(batch, **options)
        if points:
            where = f"first in {points[0]}"
        elif all(map(is_finite, again)):
            where = "but none when it is computed alone: they come from its batch, or from chance"
        else:
            where = "first after the layers"
        dtype = str(self.dtype).removeprefix("torch.")
        limit = f", whose largest number is {torch.finfo(self.dtype).max:.0f}" if self.dtype == torch.float16 else ""
        raise InputError(
            f"input {index} (it ends in {texts[index][-40:]!r}): expected a result of finite numbers, "
            f"found inf or nan, {where} ({dtype}{limit})"
        )

    def _batches(
        self,
        texts: Sequence[str],
        prefixes: Sequence[Prefix],
        indices: list[int],
        batch_tokens: int | None,
        batch_size: int | None,
    ) -> Iterator[PackedBatch]:
        """Packed batches of the texts at these indices; the next block is tokenised while one is computed."""
        blocks = [indices[i : i + TEXTS_PER_BLOCK] for i in range(0, len(indices), TEXTS_PER_BLOCK)]
        tokenised = prefetch(([texts[i] for i in block] for block in blocks), self.to_sequences)
        for block, sequences in zip(blocks, tokenised, strict=True):
            self._check(block, sequences, batch_tokens)
            yield from self.pack_block(block, sequences, [prefixes[i] for i in block], batch_tokens, batch_size)

    def _check(self, indices: list[int], sequences: list[list[int]], batch_tokens: int | None) -> None:
        """Raise InputError for a sequence that is empty, or that the model or the batch cannot hold."""
        rows = self.model.embed_tokens.num_embeddings
        for index, ids in zip(indices, sequences, strict=True):
            if not ids:
                raise InputError(f"input {index}: expected at least one token, found none: this checkpoint adds none")
            if max(ids) >= rows:
                raise InputError(f"input {index}: expected token ids below {rows} (embed_tokens), found {max(ids)}")
        longest = max(sequences, key=len)
        if batch_tokens is not None and len(longest) > batch_tokens:
            raise InputError(
                f"batch_tokens: expected at least {len(longest)}, the length in tokens of the longest input "
                f"(index {indices[sequences.index(longest)]}), found {batch_tokens}"
            )

    def shared(self, sequences: list[list[int]], prefixes: Sequence[Prefix]) -> list[Prefix]:
        """For each sequence what of its prefix is computed once: nothing for one alone, or where the model says so."""
        alone = len(sequences) < 2 and not self.prefix_cache.max_tokens
        return shared_prefixes(sequences, [()] * len(sequences) if alone or not self.model.shortcuts else prefixes)

    def pack_block(
        self,
        indices: list[int],
        sequences: list[list[int]],
        prefixes: Sequence[Prefix],
        batch_tokens: int | None,
        batch_size: int | None = None,
    ) -> Iterator[PackedBatch]:
        """Packed batches of these sequences; what they share of their prefixes comes from the cache or once."""
        shared = self.shared(sequences, prefixes)
        limit = batch_tokens or BATCH_TOKENS.get(self.device.type, 4096)
        groups = plan([len(ids) for ids in sequences], limit, shared, batch_size)
        cached = self.prefix_cache.get(shared, self.model)
        for group in groups:
            yield pack(
                [sequences[i] for i in group],
                device=self.device,
                indices=[indices[i] for i in group],
                prefixes=[shared[i] for i in group],
                prefix_kv=cached,
            )


def _first_equal(texts: Sequence[str]) -> list[int]:
    """For each text the index of the first one equal to it."""
    first: dict[str, int] = {}
    return [first.setdefault(text, i) for i, text in enumerate(texts)]


def _put(out: Any, indices: Tensor, results: Any, grad: bool) -> Any:
    """``out``, a tensor or a list, with results of a batch at the indices of their texts; in place without grad."""
    if isinstance(out, Tensor) and grad:
        return out.index_copy(0, indices, results)
    for index, result in [(indices, results)] if isinstance(out, Tensor) else zip(indices, results, strict=True):
        out[index] = result
    return out


def as_asked(results: Tensor | None, *, single: bool, tensor: bool, numpy: bool = True) -> Any:
    """Results of ``run`` as a call returns them: the row of a single input, a numpy array unless a tensor is wanted.

    One number is a numpy scalar, which can be rounded and hashed, unlike an array of no dimensions. Neither tensor nor
    numpy: a list of tensors.
    """
    if results is None:
        return None
    results = results[0] if single else results
    if tensor or (single and not numpy):
        return results
    return results.cpu().numpy()[()] if numpy else list(results)


def open_tokenizer(directory: Path, layout: Layout, *, split_special_tokens: bool = False) -> Tokenizer:
    """A checkpoint's tokenizer with what its layout says; an adapter without one has its base's.

    Raises CheckpointError. Warns where tokenizer.json closes texts by nothing and ``<|endoftext|>`` is appended.
    """
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer(
        path if path.exists() else base_directory(directory) / path.name,
        split_special_tokens=split_special_tokens,
        template=layout.template,
        lower_case=layout.lower_case,
        closes=layout.pooling == LAST_TOKEN,
    )
    if tokenizer.appends_eos and layout.job == "embedding":
        warn(
            f"{path}: expected a post_processor that closes texts by {EOS}, found none: it is appended here, as the "
            "official checkpoints do, and not in sentence-transformers"
        )
    if layout.score == "score":  # which transformers reads at the last token that is no padding
        padding = read_json(base_directory(directory) / "config.json").get("pad_token_id")
        if not tokenizer.suffix or tokenizer.suffix[-1] == padding:
            raise CheckpointError(
                f"{directory}: chat template: expected an end other than padding (pad_token_id {padding}), "
                f"found {tokenizer.template.suffix!r}"
            )
    return tokenizer


def with_tokens(layout: Layout, tokenizer: Tokenizer) -> Layout:
    """The layout with what only the tokenizer knows: the tokens around a text, and where a template is split."""
    opening, closing = tuple(tokenizer.opening), tuple(tokenizer.closing)
    return replace(layout, template=tokenizer.template, opening=opening, closing=closing)


def is_finite(x: Tensor) -> bool:
    """Whether x holds neither inf nor nan; a sum of finite numbers, which says so sooner, may itself be too large."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())


def stream(
    call: Callable[..., Any], inputs: Iterable[Any], *, block_size: int = 16384, **options: Any
) -> Iterator[Any]:
    """Yield ``call(block, **options)`` for each block of an endless or lazy input, in order, holding one block.

    Args:
        call: ``encode``, ``encode_query``, ``encode_document`` or ``predict``.
        inputs: texts or pairs; of an open file, the lines without their ends.
        block_size: inputs of a block.

    Raises:
        InputError: naming the block.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> [block.shape for block in stream(embedder.encode, iter(["a", "b", "c"]), block_size=2)]
        [(2, 256), (1, 256)]
    """
    check_int("block_size", block_size, 1)
    source, start = as_iterator("inputs", inputs), 0
    while block := list(islice(source, block_size)):
        try:
            yield call(block, **options)
        except InputError as error:
            raise InputError(f"block of inputs from {start}: {error}") from error
        start += len(block)


def prefetch(blocks: Iterable[A], work: Callable[[A], B]) -> Iterator[B]:
    """Yield ``work(block)`` of each block; the next one's is done in a thread while the caller is busy with this."""
    source = iter(blocks)
    for first in source:
        result = work(first)
        with ThreadPoolExecutor(1) as thread:
            for block in source:
                future = thread.submit(work, block)
                yield result
                result = future.result()
        yield result
