"""What a decision comes from: which tokens, which heads and MLPs, and from which layer on.

The decision about a query and a document is a reranker's logit, the score before its sigmoid, or the cosine of an
embedder's two vectors. A reranker reads one text, the pair in its template; an embedder two, first the query.

Open checkpoints in float32: in bfloat16 the sums hold to about 1 % only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..embedder import Embedder
from ..errors import InputError, check_number
from ..hooks import Activations, by_head, capture, edit
from ..layout import LAST_TOKEN, Dense
from ..prompts import FIELDS
from ..reranker import Reranker

NODES = 16
"""Points of the quadrature on each stretch of the path."""
SHORTEST = 1 / 16
"""Stretches of the path that are not halved again."""


@dataclass(frozen=True)
class Token:
    """One token of a text: what it stands for, and of which part it is."""

    text: str
    """Of one that is only some bytes of a character, the character and which piece of it: ``é₁``, ``é₂``."""
    part: str
    """``"query"``, ``"document"``, or ``"template"`` for all that surrounds them."""


@dataclass(frozen=True)
class Attribution:
    """What each token adds to a decision: ``baseline`` and all ``values`` sum to it, but for ``error``."""

    values: list[Tensor]
    """[length] float32 on the CPU for each text, 0 for tokens of the template."""
    decision: float
    """The logit or the cosine."""
    baseline: float
    """The same without content."""
    error: float
    """Completeness error: what the values' sum misses of decision - baseline, as a share of it (of 1e-4, if less)."""


def integrated_gradients(
    of: Embedder | Reranker,
    query: str,
    document: str,
    *,
    instruction: str | None = None,
    tolerance: float = 0.001,
    batch_tokens: int = 1024,
) -> Attribution:
    """What each token of query and document adds to the decision, by integrated gradients (arXiv:1703.01365).

    The path goes straight from a baseline to the input embeddings, of query and document at once. In the baseline
    each of their tokens is the mean of all token embeddings, and the template's are as they are. Gauss-Legendre's rule
    integrates over it with 16 points, and over halves of each stretch that misses what the decision changes on it.

    Args:
        tolerance: what a stretch may miss, as a share of decision - baseline, before it is halved.
        batch_tokens: rows of the copies that are computed at once, which decides the memory; at least one copy.

    Raises:
        InputError: for what ``predict`` and ``encode`` refuse, several scores, or int8 weights.

    Example:
        >>> reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
        >>> found = integrated_gradients(reranker, "an instrument", "a violin")
        >>> text = tokens(reranker, "an instrument", "a violin")[0]
        >>> {token.text: round(value.item(), 1) for token, value in zip(text, found.values[0]) if value}
        {' an': 0.5, ' instrument': 0.4, ' a': 0.5, ' violin': 0.2}
        >>> found.error < 0.01
        True
    """
    check_number("tolerance", tolerance, 0)
    path = _Path(of, query, document, instruction, batch_tokens)
    whole = path.integrate(0, 1)
    baseline, decision = whole.decisions
    difference = max(abs(decision - baseline), 1e-4)
    values, pending = [torch.zeros(len(rows)) for rows in path.content], [whole]
    while pending:
        part = pending.pop()
        low, high = part.ends
        if part.gap > tolerance * difference and high - low > SHORTEST:
            middle = (low + high) / 2
            pending += [path.integrate(low, middle), path.integrate(middle, high)]
        else:
            values = [total + added for total, added in zip(values, part.values, strict=True)]
    return Attribution(values, decision, baseline, _Stretch((0, 1), whole.decisions, values).gap / difference)


@dataclass(frozen=True)
class _Stretch:
    """Part of the path: where it begins and ends, the decisions there, and what each token adds between them."""

    ends: tuple[float, float]
    decisions: tuple[float, float]
    values: list[Tensor]

    @property
    def gap(self) -> float:
        """What the values miss of the change of the decision."""
        return abs(sum(each.sum().item() for each in self.values) - (self.decisions[1] - self.decisions[0]))


class _Path:
    """From the baseline to the input embeddings of all texts of a decision."""

    def __init__(
        self, of: Embedder | Reranker, query: str, document: str, instruction: str | None, batch_tokens: int
    ) -> None:
        if not all(weight.is_floating_point() for weight in of.model.parameters()):
            raise InputError("explain: expected weights with gradients, found int8")
        if len(of.layout.labels) > 1:
            raise InputError(f"explain: expected a checkpoint of one score, found {', '.join(of.layout.labels)}")
        texts = tokens(of, query, document, instruction)
        self.of, self.pair, self.instruction = of, (query, document), instruction
        self.content = [torch.tensor([[t.part != "template"] for t in text], device=of.device) for text in texts]
        self.baseline = of.model.embed_tokens.weight.detach().mean(0, dtype=torch.float32).to(of.dtype)
        self.copies = max(1, batch_tokens // max(map(len, texts)))

    def integrate(self, low: float, high: float) -> _Stretch:
        """Gauss-Legendre's rule on part of the path."""
        nodes, node_weights = np.polynomial.legendre.leggauss(NODES)
        # The ends, too, with no weight: what the decision is there.
        ways = torch.tensor([low, high, *low + (high - low) * (nodes + 1) / 2]).to(self.baseline)
        weights = torch.tensor([0, 0, *(high - low) * node_weights / 2]).to(self.baseline)
        decisions, values = [], [torch.zeros(len(rows)) for rows in self.content]
        for some, their_weights in zip(ways.split(self.copies), weights.split(self.copies), strict=True):
            texts = [_Copies(self.baseline, rows, some) for rows in self.content]
            found = self.decide(texts)
            gradients = torch.autograd.grad(found.sum(), [copies.inputs for copies in texts])
            for value, copies, gradient in zip(values, texts, gradients, strict=True):
                value += (torch.einsum("c,cth->th", their_weights, gradient) * copies.difference).sum(-1).cpu()
            decisions += found.tolist()
        return _Stretch((low, high), (decisions[0], decisions[1]), values)

    def decide(self, texts: Sequence["_Copies"]) -> Tensor:
        """The decision of each copy, [copies] with its graph."""
        of, instruction = self.of, self.instruction
        queries, documents = ([text] * len(texts[0].ways) for text in self.pair)
        if isinstance(of, Reranker):
            pairs = [*zip(queries, documents, strict=True)]
            with edit(of, {"embed": texts[0]}):
                return of.predict(pairs, instruction=instruction, logit=True, grad=True)
        with edit(of, {"embed": texts[0]}):
            rows = of.encode_query(queries, instruction=instruction, grad=True)
        with edit(of, {"embed": texts[1]}):
            return F.cosine_similarity(rows, of.encode_document(documents, grad=True))


class _Copies:
    """An edit of ``embed`` where one text stands n times: each copy goes some way from the baseline to the input."""

    def __init__(self, baseline: Tensor, content: Tensor, ways: Tensor) -> None:
        self.baseline, self.content, self.ways = baseline, content, ways

    def __call__(self, x: Tensor) -> Tensor:
        copies = x.detach().unflatten(0, (len(self.ways), -1))
        self.difference = (copies[0] - self.baseline) * self.content
        self.inputs = (copies - (1 - self.ways)[:, None, None] * self.difference).requires_grad_()
        return self.inputs.flatten(0, 1)


@torch.no_grad()
def contributions(of: Embedder | Reranker, query: str, document: str, *, instruction: str | None = None) -> Tensor:
    """What the embedding, each head and each MLP adds to the decision at the last token: direct logit attribution.

    Each writes a vector to the residual stream; it is multiplied as the final norm multiplies their sum, and by the
    direction of the decision: w_yes - w_no of a reranker; of an embedder the query's unit vector, over the length of
    the document's.

    Returns:
        [1 + L * (Hq + 1)] float32, which sums to the decision: the token's embedding, then for each layer its heads and
        its MLP.

    Raises:
        InputError: where the decision is no product of the last token's hidden state and one direction: Dense modules,
            several scores, other pooling.

    Example:
        >>> reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
        >>> added = contributions(reranker, "an instrument", "a violin")
        >>> logit = float(reranker.predict(("an instrument", "a violin"), logit=True))
        >>> added.shape, abs(added.sum().item() - logit) < 1e-4
        (torch.Size([21]), True)
    """
    direction = _direction(of, query, instruction)
    points = ("embed", "layers.*.z", "layers.*.mlp_out")
    acts = _captured(of, query, document, instruction, points)
    rows = [acts.at("embed")[None]]
    for i in range(len(of.model.layers)):
        rows += [by_head(of, i, acts.at(f"layers.{i}.z")), acts.at(f"layers.{i}.mlp_out")[None]]
    written = torch.cat(rows).float()
    return _project(of, written, written.sum(0, keepdim=True), direction)


@torch.no_grad()
def lens(of: Embedder | Reranker, query: str, document: str, *, instruction: str | None = None) -> Tensor:
    """The decision that the last token's residual stream would give after the embedding and each layer (logit lens).

    [L + 1] float32; the last one is the decision. Raises InputError as ``contributions`` does.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
        >>> [round(cosine, 1) for cosine in lens(embedder, "an instrument", "a violin").tolist()]
        [-0.0, 0.5, 0.6, 0.6, 0.7]
    """
    direction = _direction(of, query, instruction)
    acts = _captured(of, query, document, instruction, ("embed", "layers.*.resid_post"))
    streams = torch.stack([acts.at(name) for name in acts]).float()
    return _project(of, streams, streams, direction)


def _captured(
    of: Embedder | Reranker, query: str, document: str, instruction: str | None, points: Sequence[str]
) -> Activations:
    """Points of the text whose last token decides: the pair of a reranker, the document of an embedder."""
    with capture(of, *points, detach=True) as acts:
        if isinstance(of, Reranker):
            of.predict((query, document), instruction=instruction)
        else:
            of.encode_document([document])
    return acts


def _direction(of: Embedder | Reranker, query: str, instruction: str | None) -> Tensor:
    """What the last token's hidden state is multiplied by, [H] float32, or the first of them."""
    layout = of.layout
    if layout.pooling != LAST_TOKEN or len(layout.labels) > 1 or any(isinstance(m, Dense) for m in layout.modules):
        raise InputError(
            "explain: expected a decision by the last token's hidden state and one direction, found "
            f"pooling {', '.join(layout.pooling) or 'none'}, {len(layout.labels)} scores, modules {layout.modules}"
        )
    if isinstance(of, Embedder):
        return F.normalize(of.encode_query(query, instruction=instruction, convert_to_tensor=True), dim=0)
    weight = of.model.score_weight(of.answers)
    if weight is None:
        raise InputError("explain: expected a score of one direction, found one of the checkpoint's modules")
    return weight[0]


def _project(of: Embedder | Reranker, rows: Tensor, streams: Tensor, direction: Tensor) -> Tensor:
    """Rows [n, H] through the final norm of the streams [n or 1, H] that they are part of, along a direction: [n]."""
    norm, width = of.model.norm, len(direction)
    scale = torch.rsqrt(streams.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
    decisions = (rows * scale)[:, :width] @ direction
    return decisions if isinstance(of, Reranker) else decisions / (streams * scale)[:, :width].norm(dim=-1)


def tokens(of: Embedder | Reranker, query: str, document: str, instruction: str | None = None) -> list[list[Token]]:
    """The tokens of each text that the decision reads, the template's included.

    Example:
        >>> embedder = Embedder.from_pretrained("tiny-embedding")
        >>> [(token.text, token.part) for token in tokens(embedder, "an instrument", "a violin")[1]]
        [('a', 'document'), (' violin', 'document'), ('<|endoftext|>', 'template')]
    """
    tokenizer = of.tokenizer
    if isinstance(of, Reranker):
        task = of.layout.instruction if instruction is None else instruction
        names = dict(zip(FIELDS, ("template", "query", "document"), strict=True))
        values = dict(zip(FIELDS, (task, query, document), strict=True))
        body = [(values.get(part, part), names.get(part, "template")) for part in tokenizer.template.body]
        return [_tokens(of, body, tokenizer.prefix, tokenizer.suffix)]
    prompts = {"query": of.query_prompt(instruction), "document": of.prompts.get("document", "")}
    return [
        _tokens(of, [(prompts[part], "template"), (text, part)], tokenizer.opening, tokenizer.closing)
        for part, text in (("query", query), ("document", document))
    ]


def _tokens(
    of: Embedder | Reranker, pieces: Sequence[tuple[str, str]], before: Sequence[int], after: Sequence[int]
) -> list[Token]:
    """The tokens of a text put together of (text, part), between ids of the template."""
    decode = of.tokenizer.decode
    text = "".join(piece for piece, _ in pieces)
    parts = [part for piece, part in pieces for _ in piece]
    ids = of.to_sequences([text])[0]
    encoded = of.tokenizer.backend.encode(text, add_special_tokens=False)
    inner, piece, last = [], 0, None
    for i, (start, end) in zip(encoded.ids[: len(ids) - len(before) - len(after)], encoded.offsets, strict=False):
        shown = decode([i])
        if "\ufffd" in shown and text[start:end] != shown:
            piece = piece + 1 if (start, end) == last else 1
            shown = text[start:end] + "".join(chr(0x2080 + int(digit)) for digit in str(piece))
        last = (start, end)
        # A token with the template's space before a text is the text's.
        inner.append(Token(shown, next((part for part in parts[start:end] if part != "template"), "template")))
    around = [[Token(decode([i]), "template") for i in fixed] for fixed in (before, after)]
    return [*around[0], *inner, *around[1]]
