"""Comparison with transformers, ids and layer by layer: same texts, same checkpoint, a float64 oracle to judge both.

    report = parity("Qwen/Qwen3-Embedding-0.6B", dtype="bfloat16")
    print(report); assert report.ok

The truth is what the checkpoint declares: sentence-transformers opens it where it has a modules.json, else transformers
follows the model cards; one padded batch, default attention. Weights are streamed, one layer in memory at a time on
either side, so that an 8B checkpoint is compared within 24 GiB; an adapter is opened whole, by peft. Needs transformers
and sentence-transformers, which nothing else here does.
"""

import copy
import functools
import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import samples
from .embedder import Embedder
from .errors import InputError
from .hooks import Activations, capture
from .ops import Ops, resolve
from .pretrained import Pretrained, open_tokenizer
from .prompts import DEFAULT_TASK, EMBEDDING_PROMPTS, NO, RERANKER, YES
from .reading import as_list
from .reranker import Reranker
from .weights.build import open_model
from .weights.find import find
from .weights.layout import read_layout
from .weights.precision import as_device, as_dtype, quantize
from .weights.tensors import Tensors

States = dict[str, dict[tuple[int, ...], Tensor]]
"""By point and by a text's ids, its rows."""
Calls = list[tuple[str, list[Any]]]
"""Methods that both implementations have, and their inputs."""
Run = Callable[[str, list[Any]], Tensor]
"""A function of a method's name and its inputs to the results."""
CLASSES = {"embedding": "SentenceTransformer", "reranker": "CrossEncoder", "late interaction": "MultiVectorEncoder"}
"""sentence-transformers' class, by job."""
RESULTS = {"embedding": "pooled", None: "score", "reranker": "score", "late interaction": "token vectors"}
"""The name of the last row of a report, by job."""

FP32_TOLERANCE = 1e-5
"""float32: largest relative difference of a layer; of vectors and scores the largest absolute one, over their largest
number where that is above 1. transformers' own left-padded batch differs from its single run by about 2e-6; the
smallest planted mistake, a wrong eps, by 3e-4."""

LOW_PRECISION_RATIO = 1.5
"""bfloat16, float16: our error against float64, as a multiple of transformers' own. Where a row has few numbers
(a score per text), chance alone spreads the quotient of two such norms by 1 / sqrt(n): two deviations are allowed."""

INT8_TOLERANCE = 0.2
"""int8: our error against float64, the price of quantisation rather than of a mistake, which would give about 1. Seen
with random weights: 0.07 for vectors."""


@dataclass(frozen=True)
class Row:
    """One point, all errors over its whole tensor; for ``token ids``, the number and share of texts that differ."""

    point: str
    """One of ``hooks.POINTS``, ``token ids``, or the result."""
    max_abs: float
    """max |ours - transformers|"""
    relative: float
    """|ours - transformers| / |transformers|, Frobenius norms"""
    error_transformers: float
    """|transformers - float64| / |float64|"""
    error_ours: float
    """|ours - float64| / |float64|"""
    ok: bool
    """Whether the error is within tolerance."""


@dataclass(frozen=True)
class Report:
    """What ``parity`` found; ``str`` of it is Markdown."""

    title: str
    """Checkpoint, dtype, size, device, and the library compared with."""
    rows: list[Row]
    """From the token ids to the result."""

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        """A Markdown table."""
        lines = [
            self.title,
            "",
            "| point | max abs diff | relative diff | transformers vs fp64 | qwen3core vs fp64 | |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for r in self.rows:
            numbers = (r.max_abs, r.relative, r.error_transformers, r.error_ours)
            cells = " | ".join(f"{x:.1e}" if x else "0" for x in numbers)
            lines.append(f"| {r.point} | {cells} | {'ok' if r.ok else 'FAIL'} |")
        return "\n".join(lines)


def parity(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    job: str | None = None,
    texts: Sequence[str] | None = None,
    dtype: str | torch.dtype = "auto",
    ops: str | Ops = "auto",
    device: str | torch.device | None = None,
    max_length: int | None = None,
) -> Report:
    """Compare a checkpoint in both implementations.

    dtype: as in ``from_pretrained``, but ``"auto"`` is the checkpoint's for both; int8 is compared with float32.
    job: as in ``from_pretrained``; the reranker's where neither this nor the files say. texts: inputs of ``encode``, or
    documents for one query; a few real queries and documents by default. max_length: at most the checkpoint's own.
    Raises CheckpointError and InputError; a difference beyond tolerance does not raise, it makes ``report.ok`` false.
    """
    directory = find(path_or_id, revision=revision)
    layout = read_layout(directory, job=job)
    kind = Embedder if layout.job in Embedder.jobs else Reranker
    kind.check_job(layout, directory)
    declared = (directory / "modules.json").exists() and read_layout(directory).job == layout.job
    truth = ", ".join(map(_version, ["sentence-transformers"] * declared + ["transformers"]))
    device = as_device(device)
    lm_head = kind is Reranker and layout.score == "lm_head"
    model, tensors = open_model(directory, ops=resolve(ops, device), lm_head=lm_head, layout=layout)
    oracle = copy.deepcopy(model)
    oracle.ops = Ops.reference()
    int8 = dtype == "int8"
    dtype = torch.float32 if int8 else as_dtype(dtype, model, tensors)
    _stream(model, tensors, dtype, device, int8)
    ours = kind(model, open_tokenizer(directory, layout), max_length=max_length)
    calls = _calls(kind, texts)

    with nullcontext() if (directory / "adapter_config.json").exists() else _streamed(tensors, device):
        opened = (_sentence_transformers if declared else _transformers)(directory, ours, dtype)
    results = [_theirs(*opened, calls), _ours(ours, calls)]
    del opened  # an output matrix of 8B takes 2.5 GB
    _stream(oracle, tensors, torch.float64, device)
    results.append(_ours(kind(oracle, ours.tokenizer, max_length=ours.max_length), calls))

    their_ids, our_ids, _ = (states["embed"].keys() for states, _ in results)
    different = max(len(our_ids - their_ids), len(their_ids - our_ids))
    rows = [Row("token ids", different, different / len(their_ids), 0, 0, ok=different == 0)]
    if common := their_ids & our_ids:
        for point in results[0][0]:
            at = (torch.cat([states[point][ids] for ids in common]) for states, _ in results)
            rows.append(_row(point, dtype, int8, *at))
    rows.append(_row(RESULTS[layout.job], dtype, int8, *(result for _, result in results)))
    precision = f"int8 against {dtype}" if int8 else dtype
    size = f"{sum(len(inputs) for _, inputs in calls)} texts, {sum(map(len, our_ids))} tokens"
    return Report(f"{Path(path_or_id).name}, {precision}, {size}, {device.type}, against {truth}", rows)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError as error:
        raise InputError(f"parity: expected {package} to compare with, found none: pip install {package}") from error


def _calls(kind: type[Pretrained], texts: Sequence[str] | None) -> Calls:
    """The texts, or a few real ones."""
    documents = as_list("texts", texts) if texts else [*samples.DOCUMENTS, samples.LONG_DOCUMENT]
    if kind is Reranker:
        return [("predict", [(samples.QUERIES[1], document) for document in documents])]
    return [("encode", documents)] if texts else [("encode_query", samples.QUERIES), ("encode_document", documents)]


def _row(point: str, dtype: torch.dtype, int8: bool, theirs: Tensor, ours: Tensor, oracle: Tensor) -> Row:
    if theirs.shape != ours.shape:
        return Row(point, math.inf, math.inf, math.inf, math.inf, ok=False)
    a, b, exact = theirs.double(), ours.double(), oracle.double()
    max_abs = (b - a).abs().max().item()
    relative, error_theirs, error_ours = (
        ((x - y).norm() / y.norm()).item() for x, y in ((b, a), (a, exact), (b, exact))
    )
    if int8:
        ok = error_ours <= INT8_TOLERANCE
    elif dtype in (torch.float32, torch.float64):
        absolute = max_abs / max(1, a.abs().max().item())
        ok = (absolute if point in RESULTS.values() else relative) <= FP32_TOLERANCE
    else:
        ok = error_ours <= LOW_PRECISION_RATIO * (1 + 2 / a.numel() ** 0.5) * error_theirs
    finite = all(map(math.isfinite, (max_abs, error_theirs, error_ours)))
    return Row(point, max_abs, relative, error_theirs, error_ours, ok and finite)


def _ours(pretrained: Any, calls: Calls) -> tuple[States, Tensor]:
    """Its rows at the points compared; its vectors or scores in the order of the inputs."""
    states: States = defaultdict(dict)

    def record(acts: Activations) -> None:
        ids = [tuple(ids.tolist()) for ids in acts.input_ids]
        for name in acts:
            states[name].update(zip(ids, acts.per_text(name), strict=True))

    def run() -> Tensor:
        if pretrained.model.layout.pooling or isinstance(pretrained, Reranker):
            return torch.cat([getattr(pretrained, method)(inputs, convert_to_tensor=True) for method, inputs in calls])
        tasks = ((method.partition("_")[2] or None, inputs) for method, inputs in calls)
        return torch.cat([pretrained.encode_tokens(inputs, task=task).vectors for task, inputs in tasks])

    with capture(pretrained, "embed", "layers.*.resid_post", "final_norm", into=record):
        run()
    # Again, without hooks: what is fused, and the last layer for last tokens only, is compared too.
    return states, run()


def _theirs(decoder: Any, run: Run, calls: Calls) -> tuple[States, Tensor]:
    """As ``_ours``: what transformers' decoder has at our points, without the padding, and the results."""
    states: States = defaultdict(dict)
    batch: list[Any] = []
    """Of the pass that runs, the texts' ids, and which positions are their own."""

    @functools.wraps(decoder.forward)  # no hook: sentence-transformers calls forward itself
    def forward(*args: Tensor, **options: Any) -> Any:
        input_ids = args[0] if args else options["input_ids"]
        mask = options["attention_mask"].bool()
        batch[:] = [tuple(ids[own].tolist()) for ids, own in zip(input_ids, mask, strict=True)], mask
        return forward.__wrapped__(*args, **options)

    def record(name: str, out: Tensor) -> None:
        states[name].update((ids, x[own]) for ids, own, x in zip(*batch, out, strict=True))

    decoder.forward = forward
    layers = {f"layers.{i}.resid_post": layer for i, layer in enumerate(decoder.layers)}
    for name, module in {"embed": decoder.embed_tokens, **layers, "final_norm": decoder.norm}.items():
        module.register_forward_hook(lambda _, args, out, name=name: record(name, out))
    return states, torch.cat([run(*call) for call in calls])


def _sentence_transformers(directory: Path, ours: Any, dtype: torch.dtype) -> tuple[Any, Run]:
    """Its decoder and its own methods."""
    library: Any = importlib.import_module("sentence_transformers")
    layout = ours.model.layout
    pipeline = getattr(library, CLASSES[layout.job])(
        str(directory), device=str(ours.device), local_files_only=True, model_kwargs={"dtype": dtype}
    )
    pipeline.max_seq_length = min(pipeline.max_seq_length or ours.max_length, ours.max_length)
    options: dict[str, Any] = {"convert_to_numpy": False, "show_progress_bar": False}
    if layout.job == "reranker" and layout.score == "lm_head":
        options["activation_fn"] = nn.Sigmoid()  # a score of tokens is a probability here, whatever is declared
    if layout.truncate_dim:
        options["normalize_embeddings"] = layout.normalize  # again after the cut, as the model cards do

    def run(method: str, inputs: list[Any]) -> Tensor:
        out = getattr(pipeline, method)(inputs, batch_size=len(inputs), **options)
        return torch.stack(out) if layout.pooling else torch.cat(out)

    return pipeline.transformers_model.base_model, run


def _transformers(directory: Path, ours: Any, dtype: torch.dtype) -> tuple[Any, Run]:
    """The model cards' recipe."""
    transformers: Any = importlib.import_module("transformers")
    layout = ours.model.layout
    classes = {"lm_head": "AutoModelForCausalLM", "score": "AutoModelForSequenceClassification"}
    kind = classes[layout.score] if isinstance(ours, Reranker) else "AutoModel"
    options = {"logits_to_keep": 1} if kind == "AutoModelForCausalLM" else {}
    model = getattr(transformers, kind).from_pretrained(directory, dtype=dtype, local_files_only=True).to(ours.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ours.tokenizer.path.parent, padding_side="left")
    model.config.pad_token_id = tokenizer.pad_token_id

    def tokens(texts: list[str], length: int, closed: bool = True) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=length, add_special_tokens=closed)["input_ids"]

    def sequences(method: str, inputs: list[Any]) -> list[list[int]]:
        if method != "predict":
            prompt = EMBEDDING_PROMPTS["query"] if method == "encode_query" else ""
            return tokens([prompt + text for text in inputs], ours.max_length)
        if "document" in (tokenizer.chat_template or ""):  # a template of pairs, not of a chat
            pairs = [[{"role": "query", "content": q}, {"role": "document", "content": d}] for q, d in inputs]
            return tokenizer.apply_chat_template(pairs, return_dict=True)["input_ids"]
        prefix, suffix = tokens([RERANKER.prefix, RERANKER.suffix], ours.max_length, closed=False)
        bodies = [RERANKER.fill(DEFAULT_TASK, *pair) for pair in inputs]
        longest = ours.max_length - len(prefix) - len(suffix)
        return [prefix + ids + suffix for ids in tokens(bodies, longest, closed=False)]

    @torch.no_grad()
    def run(method: str, inputs: list[Any]) -> Tensor:
        batch = tokenizer.pad({"input_ids": sequences(method, inputs)}, return_tensors="pt").to(ours.device)
        out = model(**batch, use_cache=False, **options)
        if method != "predict":
            return F.normalize(out.last_hidden_state[:, -1], dim=1)
        if layout.score == "score":
            return getattr(nn, layout.activation)()(out.logits).squeeze(1)
        answers = tokenizer.convert_tokens_to_ids([YES, NO])
        return out.logits[:, -1, answers].log_softmax(dim=1)[:, 0].exp()

    return model.base_model, run


@contextmanager
def _streamed(tensors: Tensors, device: torch.device) -> Iterator[None]:
    """While it lasts, transformers and whoever calls it open the checkpoint with its weights streamed."""
    qwen3: Any = importlib.import_module("transformers.models.qwen3.modeling_qwen3")

    def from_pretrained(cls: Any, _: str, *, config: Any, dtype: torch.dtype, **options: Any) -> Any:
        config.vocab_size = tensors.shape("embed_tokens.weight")[0]
        with torch.device("meta"):
            model = cls(config).eval()
        model.base_model.rotary_emb = qwen3.Qwen3RotaryEmbedding(config).to(device)
        _stream(model, tensors, dtype, device)
        return model

    with mock.patch.object(qwen3.Qwen3PreTrainedModel, "from_pretrained", classmethod(from_pretrained)):
        yield


def _stream(model: Any, tensors: Tensors, dtype: torch.dtype, device: torch.device, int8: bool = False) -> None:
    """Give a model on the meta device its weights, but each layer only while it runs: else, numbers of no memory."""

    def read(name: str) -> Tensor:
        name = name.removeprefix("model.")
        return tensors[name if name in tensors else "embed_tokens.weight"].to(device, dtype)  # a tied lm_head

    def absent(x: Tensor) -> Tensor:
        return torch.empty((), dtype=dtype, device=device).expand(x.shape)

    def load(layer: nn.Module, prefix: str) -> None:
        layer.load_state_dict({name: read(prefix + name) for name in layer.state_dict()}, assign=True)
        if int8:
            quantize(layer)

    def unload(layer: nn.Module) -> None:
        layer.load_state_dict({name: absent(x) for name, x in layer.state_dict().items()}, assign=True)

    state = {name: absent(x) if "layers." in name else read(name) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    for i, layer in enumerate(getattr(model, "base_model", model).layers):
        layer.register_forward_pre_hook(lambda layer, _, i=i: load(layer, f"layers.{i}."))
        layer.register_forward_hook(lambda layer, *_: unload(layer))
