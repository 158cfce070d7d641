"""Comparison with transformers, ids and layer by layer: same texts, same checkpoint, a float64 oracle to judge both.

    report = parity("Qwen/Qwen3-Embedding-0.6B", dtype="bfloat16")
    print(report); assert report.ok

transformers runs as in the model cards: one left-padded batch, its default attention. Weights are streamed, one layer
in memory at a time on either side, so that an 8B checkpoint is compared within 24 GiB. Needs transformers, which
nothing else here does.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import samples
from .batch import PackedBatch, pack
from .config import read_json
from .hooks import capture
from .layout import Layout
from .model import Qwen3Model
from .ops import Ops, resolve
from .prompts import DEFAULT_TASK, RERANKER, embedding_query
from .tokenizer import Tokenizer
from .weights.build import open_model
from .weights.find import find
from .weights.precision import as_device, as_dtype, quantize
from .weights.tensors import Tensors

FP32_TOLERANCE = 1e-5
"""float32: largest relative difference of a layer, largest absolute one of vectors and scores. transformers' own
left-padded batch differs from its single run by about 2e-6; the smallest planted mistake, a wrong eps, by 3e-4."""

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
    max_abs: float
    """max |ours - transformers|"""
    relative: float
    """|ours - transformers| / |transformers|, Frobenius norms"""
    error_transformers: float
    """|transformers - float64| / |float64|"""
    error_ours: float
    """|ours - float64| / |float64|"""
    ok: bool


@dataclass(frozen=True)
class Report:
    title: str
    rows: list[Row]

    @property
    def ok(self) -> bool:
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
    kind: ``"embedding"``, ``"reranker"``, or ``"auto"`` (embedding where modules.json names a Pooling). texts: inputs
    with their prompts, or bodies of the reranker's template; a few real ones by default. Raises CheckpointError and
    InputError; a difference beyond tolerance does not raise, it makes ``report.ok`` false.
    """
    directory = find(path_or_id, revision=revision)
    layout = Layout.from_directory(directory, job=job)
    reranker = layout.job != "embedding"
    max_length = max_length or 8192
    device = as_device(device)
    model, tensors = open_model(directory, ops=resolve(ops, device), lm_head=reranker)
    int8 = dtype == "int8"
    dtype = torch.float32 if int8 else as_dtype(dtype, model, tensors)
    tokenizer = Tokenizer(directory / "tokenizer.json")
    tokenizer.check_vocabulary(model.config.vocab_size)
    texts = texts or _default_texts(reranker)
    sequences = (tokenizer.reranking if reranker else tokenizer.embedding)(texts, max_length)
    yes_no = tensors[model.lm_head_name][list(tokenizer.yes_no())] if reranker else None
    batch = pack(sequences, device=device)

    oracle = copy.deepcopy(model)
    oracle.ops = Ops.reference()
    theirs = _transformers(directory, tensors, sequences, yes_no, dtype, device)
    ours = _ours(model, tensors, batch, yes_no, dtype, int8)
    exact = _ours(oracle, tensors, batch, yes_no, torch.float64)
    their_ids = _transformers_ids(directory, texts, reranker, max_length)
    different = sum(a != b for a, b in zip(sequences, their_ids, strict=True))
    rows = [Row("token ids", different, different / len(sequences), 0, 0, ok=different == 0)]
    rows += [_row(name, dtype, int8, theirs[name], ours[name], exact[name]) for name in theirs]
    precision = f"int8 against {dtype}" if int8 else dtype
    tokens = len(batch.input_ids)
    return Report(f"{Path(path_or_id).name}, {precision}, {len(sequences)} texts, {tokens} tokens, {device.type}", rows)


def _default_texts(reranker: bool) -> list[str]:
    """A few real texts: prompts and texts of an embedder, or bodies of the reranker's template."""
    documents = [*samples.DOCUMENTS, samples.LONG_DOCUMENT]
    if reranker:
        return [RERANKER.fill(DEFAULT_TASK, samples.QUERIES[1], document) for document in documents]
    return [*(embedding_query(DEFAULT_TASK) + query for query in samples.QUERIES), *documents]


def _row(point: str, dtype: torch.dtype, int8: bool, theirs: Tensor, ours: Tensor, oracle: Tensor) -> Row:
    a, b, exact = theirs.double(), ours.double(), oracle.double()
    difference = b - a
    row = Row(
        point,
        max_abs=difference.abs().max().item(),
        relative=(difference.norm() / a.norm()).item(),
        error_transformers=((a - exact).norm() / exact.norm()).item(),
        error_ours=((b - exact).norm() / exact.norm()).item(),
        ok=False,
    )
    if int8:
        ok = row.error_ours <= INT8_TOLERANCE
    elif dtype in (torch.float32, torch.float64):
        ok = (row.max_abs if point in ("pooled", "score") else row.relative) <= FP32_TOLERANCE
    else:
        ratio = LOW_PRECISION_RATIO * (1 + 2 / a.numel() ** 0.5)
        ok = row.error_ours <= ratio * row.error_transformers
    finite = all(map(math.isfinite, (row.max_abs, row.error_transformers, row.error_ours)))
    return Row(**{**vars(row), "ok": ok and finite})


def _ours(
    model: Qwen3Model,
    tensors: Tensors,
    batch: PackedBatch,
    yes_no: Tensor | None,
    dtype: torch.dtype,
    int8: bool = False,
) -> dict[str, Tensor]:
    _load_on_demand(model, tensors, dtype, batch.input_ids.device, int8)

    def run() -> Tensor:
        return (
            model.embed(batch)
            if yes_no is None
            else model.scores(batch, (yes_no[:1] - yes_no[1:]).to(batch.input_ids.device))
        )

    with torch.no_grad():
        with capture(model, "embed", "layers.*.resid_post", "final_norm") as acts:
            run()
        result = run()  # again, without hooks: what is fused, and the last layer for last tokens only, is compared too
    return dict(acts) | {"pooled" if yes_no is None else "score": result}


def _transformers_ids(directory: Path, texts: Sequence[str], reranker: bool, max_length: int) -> list[list[int]]:
    """The model cards' tokenisation."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    if not reranker:
        return tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    prefix, suffix = (tokenizer.encode(t, add_special_tokens=False) for t in (RERANKER.prefix, RERANKER.suffix))
    longest = max_length - len(prefix) - len(suffix)
    bodies = tokenizer(list(texts), truncation="longest_first", max_length=longest)["input_ids"]
    return [prefix + body + suffix for body in bodies]


def _transformers(
    directory: Path,
    tensors: Tensors,
    sequences: list[list[int]],
    yes_no: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model cards' recipe under our names, padding taken out: [T, H] each, and all in the model's dtype."""
    from transformers.models.qwen3 import Qwen3Config as HFConfig
    from transformers.models.qwen3 import modeling_qwen3

    config = HFConfig(**read_json(directory / "config.json"))
    config.vocab_size = tensors.shape("embed_tokens.weight")[0]
    with torch.device("meta"):
        model = modeling_qwen3.Qwen3Model(config).eval()
    model.rotary_emb = modeling_qwen3.Qwen3RotaryEmbedding(config).to(device)
    _load_on_demand(model, tensors, dtype, device)
    ones = [torch.ones(len(s), dtype=torch.long) for s in sequences]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left").to(device)
    real = mask.bool()
    input_ids = torch.zeros_like(mask)
    input_ids[real] = torch.tensor([i for s in sequences for i in s], device=device)
    modules = {"embed": model.embed_tokens}
    modules |= {f"layers.{i}.resid_post": layer for i, layer in enumerate(model.layers)}
    modules |= {"final_norm": model.norm}
    states: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, out, name=name: states.update({name: out[real]}))
    with torch.no_grad():
        last = model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
    if yes_no is None:
        return states | {"pooled": F.normalize(last, dim=1)}
    logits = F.linear(last, yes_no.to(last))
    return states | {"score": logits.log_softmax(dim=1)[:, 0].exp()}


def _load_on_demand(model: Any, tensors: Tensors, dtype: torch.dtype, device: torch.device, int8: bool = False) -> None:
    """Give each part of a model on the meta device its weights just before it runs, and take them after."""
    parts = {"embed_tokens": model.embed_tokens, "norm": model.norm}
    parts |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}

    def load(prefix: str, part: nn.Module) -> None:
        state = {name: tensors[f"{prefix}.{name}"].to(device, dtype) for name in part.state_dict()}
        part.load_state_dict(state, assign=True)
        if int8:
            quantize(part)

    for prefix, part in parts.items():
        part.register_forward_pre_hook(lambda part, _, prefix=prefix: load(prefix, part))
        part.register_forward_hook(lambda part, *_: part.to("meta") and None)
