"""One HTML file that explains decisions: all data inside, opened from disk, without a network (``page.html``)."""

import base64
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from ..embedder import Embedder
from ..errors import InputError
from ..hooks import capture
from ..reading import as_list
from ..reranker import Reranker
from .attribution import contributions, integrated_gradients, lens, tokens

LARGEST = 1_990_000
"""Bytes of a page up to which the attention of more heads is put into it."""
LONGEST = 1024
"""Tokens of a text, template included, whose attention a page can hold and show."""


def explain(
    of: Embedder | Reranker, query: str, documents: Sequence[str], *, name: str, instruction: str | None = None
) -> str:
    """A page about the decisions on a query and one or more documents, as HTML under 2 MB.

    Attention is stored for as many heads as fit, those first that add or take most in the decisions.

    Args:
        name: of the checkpoint, shown on the page.

    Raises:
        InputError: as ``contributions`` does, where there is no document, and for a text of over 1024 tokens.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
        >>> page = explain(embedder, "an instrument", ["a violin", "rain"], name="tiny-embedding")
        >>> page[:15], len(page) < 100_000
        ('<!doctype html>', True)
    """
    documents = as_list("documents", documents)
    if not documents:
        raise InputError("documents: expected one or more, found none")
    layers, heads = len(of.model.layers), of.model.config.num_attention_heads
    texts = _texts(of, query, documents, instruction)
    explained = [
        _explain_one(of, query, document, instruction) | {"texts": [n] if isinstance(of, Reranker) else [0, n + 1]}
        for n, document in enumerate(documents)
    ]
    data = {
        "model": name,
        "layers": layers,
        "heads": heads,
        "query": query,
        "decision": "logit" if isinstance(of, Reranker) else "cosine",
        "score": f"P({of.layout.labels[0]})" if of.layout.activation == "Sigmoid" else "score",
        "texts": texts,
        "documents": explained,
    }
    template = files(__package__).joinpath("page.html").read_text("utf-8")
    space = LARGEST - len((template + _json(data)).encode())
    packed = _patterns(of, query, documents, instruction)
    for name in _by_size(torch.tensor([each["contributions"] for each in explained]), layers, heads):
        space -= sum(len(patterns[name]) + len(name) + 6 for patterns in packed)
        if space < 0:
            break
        for text, patterns in zip(texts, packed, strict=True):
            text["patterns"][name] = patterns[name]
    return template.replace("@DATA@", _json(data))


def _by_size(added: Tensor, layers: int, heads: int) -> list[str]:
    """Every head's "layer.head", those first that add or take most, by ``contributions``, a row for each document."""
    sizes = added[:, 1:].view(-1, layers, heads + 1)[..., :-1].abs().sum(0)
    return [f"{i // heads}.{i % heads}" for i in sizes.flatten().argsort(descending=True).tolist()]


def _json(data: Any) -> str:
    """JSON for a script element, which nothing in it can close."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _rounded(x: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in x.tolist()]


def _explain_one(of: Embedder | Reranker, query: str, document: str, instruction: str | None) -> dict[str, Any]:
    """All numbers of one document but attention."""
    by_layer = lens(of, query, document, instruction=instruction)
    found = integrated_gradients(of, query, document, instruction=instruction)
    explained = {
        "text": document,
        "decision": found.decision,
        "score": found.decision,
        "baseline": found.baseline,
        "error": found.error,
        "attribution": [_rounded(values) for values in found.values],
        "contributions": _rounded(contributions(of, query, document, instruction=instruction)),
        "lens": _rounded(by_layer),
    }
    if isinstance(of, Reranker):
        activation = getattr(nn, of.layout.activation)()
        explained["score"] = activation(torch.tensor(found.decision)).item()
        if of.layout.activation == "Sigmoid":
            explained["lens_score"] = _rounded(activation(by_layer))
    return explained


def _texts(
    of: Embedder | Reranker, query: str, documents: Sequence[str], instruction: str | None
) -> list[dict[str, Any]]:
    """The tokens of every text that is read, without attention: of an embedder the query first."""
    pairs = [tokens(of, query, document, instruction) for document in documents]
    names = ["pair"] * len(pairs) if isinstance(of, Reranker) else ["query", *["document"] * len(pairs)]
    texts = [*pairs[0][:-1], *(pair[-1] for pair in pairs)]
    longest = max(map(len, texts))
    if longest > LONGEST:
        raise InputError(f"explain: expected texts of at most {LONGEST} tokens (max_length cuts), found {longest}")
    return [
        {
            "name": name,
            "tokens": [token.text for token in text],
            "parts": [token.part for token in text],
            "patterns": {},
        }
        for name, text in zip(names, texts, strict=True)
    ]


def _patterns(
    of: Embedder | Reranker, query: str, documents: Sequence[str], instruction: str | None
) -> list[dict[str, str]]:
    """Of each text the attention of every head, by "layer.head": bytes [keys, queries] through zlib and base64."""
    packed: list[dict[str, str]] = []

    def add(call: Any, *args: Any, **options: Any) -> None:
        with capture(of, "layers.*.pattern", detach=True, dtype=torch.float16) as acts:
            call(*args, **options)
        # The root gives small weights more of the 128 steps; a row for each key packs best.
        steps = {name: (x.float().sqrt() * 127).round().to(torch.uint8).mT.contiguous() for name, x in acts.items()}
        packed.append(
            {
                f"{name.split('.')[1]}.{head}": base64.b64encode(zlib.compress(keys.numpy().tobytes(), 9)).decode()
                for name, x in steps.items()
                for head, keys in enumerate(x.cpu())
            }
        )

    if isinstance(of, Embedder):
        add(of.encode_query, query, instruction=instruction)
    for document in documents:
        if isinstance(of, Embedder):
            add(of.encode_document, document)
        else:
            add(of.predict, (query, document), instruction=instruction)
    return packed
