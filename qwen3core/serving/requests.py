"""What a request says, as work of ``batching.py``: the sequences and prefixes of ``Embedder`` and ``Reranker``."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..embedder import Embedder
from ..errors import InputError
from ..pretrained import Pretrained
from ..reference import cut
from ..reranker import Reranker
from .batching import Work

Ids = list[int]


def embedding(
    embedder: Embedder,
    inputs: Sequence[Any],
    *,
    task: str | None = None,
    prompt_name: str | None = None,
    instruction: str | None = None,
    dim: int | None = None,
    truncate: bool = False,
) -> Work:
    """What ``encode`` computes of texts; ``encode_query`` and ``encode_document`` for their task.

    inputs: texts; or token ids of texts, with or without the tokens that the checkpoint puts around a text, and those
    of the prompt are put before them. dim: length of the vectors. truncate: cut what is longer than ``max_length``.

    Raises InputError, whose message begins with the field.
    """
    width = embedder.layout.width(embedder.model.config.hidden_size)
    if dim is not None and dim > width:
        raise InputError(f"dimensions: expected an integer from 1 to {width}, found {dim}")
    if task == "query" or instruction is not None:
        prompt = embedder.query_prompt(instruction)
    else:
        prompt = embedder.prompt_named(task or prompt_name)
    tokenizer, (prefix, prompt_length) = embedder.tokenizer, embedder.prefix(prompt)
    if isinstance(inputs[0], str):
        token_ids = tokenizer.encode([f"{prompt}{text}" for text in inputs])
    else:
        token_ids = [[*prefix[len(tokenizer.opening) :], *_alone(embedder, ids)] for ids in inputs]
    token_ids = _fitting(embedder, "input", token_ids, tokenizer.opening, tokenizer.closing, truncate)
    dim = dim or embedder.get_embedding_dimension()
    return Work(
        embedder,
        tokenizer.close(token_ids, embedder.max_length),
        [prefix] * len(token_ids),
        {"normalize": False, "prompt_length": prompt_length},
        partial(cut, dim=dim, normalize=embedder.layout.normalize),
    )


def _alone(embedder: Embedder, ids: Ids) -> Ids:
    """A text's ids without the tokens that the checkpoint puts around a text."""
    opening, closing = embedder.tokenizer.opening, embedder.tokenizer.closing
    ids = ids[len(opening) :] if opening and ids[: len(opening)] == opening else ids
    return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids


def ranking(
    reranker: Reranker,
    pairs: Sequence[tuple[str, str]],
    weight: Tensor | None,
    *,
    instruction: str | None = None,
    logit: bool = False,
    truncate: bool = False,
    field: str = "documents",
) -> Work:
    """What ``predict`` computes of (query, document) pairs.

    weight: of ``Qwen3Model.score_weight``. logit: the score before the sigmoid. field: what the request calls the
    documents.

    Raises InputError, whose message begins with the field.
    """
    tokenizer, (texts, prefixes) = reranker.tokenizer, reranker.fill(pairs, instruction)
    token_ids = _fitting(reranker, field, tokenizer.encode(texts), tokenizer.prefix, tokenizer.suffix, truncate)
    sequences = tokenizer.apply_template(token_ids, reranker.max_length)
    return Work(reranker, sequences, prefixes, {"weight": weight, "logit": logit})


def _fitting(
    pretrained: Pretrained, field: str, token_ids: list[Ids], before: Ids, after: Ids, truncate: bool
) -> list[Ids]:
    """Token ids that leave place for those around them: cut, or all short enough. Raises InputError."""
    around, rows = len(before) + len(after), pretrained.model.embed_tokens.num_embeddings
    for index, ids in enumerate(token_ids):
        if len(ids) + around > pretrained.max_length and not truncate:
            raise InputError(
                f"{field}.{index}: expected at most {pretrained.max_length} tokens, or truncate: true, found "
                f"{len(ids) + around}"
            )
        if len(ids) + around == 0:
            raise InputError(f"{field}.{index}: expected at least one token, found none: this checkpoint adds none")
        if ids and max(ids) >= rows:
            raise InputError(f"{field}.{index}: expected token ids below {rows}, found {max(ids)}")
    return [ids[: pretrained.max_length - around] for ids in token_ids]
