"""sentence-transformers' calls in ours: what each keyword of its ``encode``, ``predict`` and ``rank`` means here.

``theirs`` lets a call of ours take them; what cannot mean the same raises InputError and says what to use.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, check_one_of
from .pretrained import as_asked
from .quantize import PRECISIONS, quantize
from .reading import as_pairs, as_texts

FIRST = ("inputs", "sentences", "pairs")
"""Names of the first argument: theirs, theirs before version 6, and ours of ``predict``."""
REFUSED = "refused: "
"""How the meaning of a keyword begins that is refused; what to use follows."""
BOTH = {
    "inputs": "same, as sentences too; also an array, a Series, a generator; no pictures, sound or messages",
    "batch_size": "same, the most texts of a batch; None, the default here, leaves it to batch_tokens, which holds too",
    "show_progress_bar": "same; None shows it on a terminal, whatever the level of the log",
    "convert_to_numpy": "same",
    "convert_to_tensor": "same",
    "device": "the model's own, or a list of several; another is refused: from_pretrained(device=...) opens it there",
    "pool": "same",
    "chunk_size": "same",
    "processing_kwargs": REFUSED + "max_seq_length, or max_length= of from_pretrained, bounds an input",
}
"""Keywords of both jobs, and what each means here."""
OF_ENCODE = BOTH | {
    "prompt_name": "same",
    "prompt": "same",
    "output_value": "same; None computes twice, and its dicts hold the two embeddings alone",
    "precision": "same",
    "normalize_embeddings": "None, the default, is what the checkpoint declares, as their False; False is never",
    "truncate_dim": "cut and then of unit length again, as theirs with normalize_embeddings=True",
    "task": "same: it chooses a route, of which these checkpoints have one",
}
"""Those of ``encode``."""
OF_PREDICT = BOTH | {
    "prompt": "same, our instruction",
    "prompt_name": REFUSED + "instruction= takes the words themselves",
    "activation_fn": "same; None is P(yes), also where theirs gives the logit (torch.nn.Identity() here)",
    "apply_softmax": "same",
    "query": "same",
    "documents": "same",
    "top_k": "same",
    "return_documents": "same",
}
"""Those of ``predict`` and ``rank``."""
__doc__ += "".join(
    f"\n{title}:\n\n" + "".join(f"- ``{name}``: {meaning}\n" for name, meaning in table.items())
    for title, table in (("Embedder", OF_ENCODE), ("Reranker", OF_PREDICT))
)
Call = Callable[..., Any]


def theirs(finish: Call | None = None) -> Callable[[Call], Call]:
    """Decorate a method, so that its first argument has their names too.

    finish: takes their other keywords, as ``finish(self, method, inputs, **options)``: ``as_vectors``, ``as_scores``.
    """

    def decorate(call: Call) -> Call:
        @wraps(call)
        def method(self: Any, *args: Any, **options: Any) -> Any:
            args += tuple(options.pop(name) for name in FIRST if name in options)
            return finish(self, partial(call, self), *args, **options) if finish else call(self, *args, **options)

        return method

    return decorate


def as_vectors(
    embedder: Any,
    encode: Call,
    inputs: Any,
    *,
    output_value: str | None = "sentence_embedding",
    precision: str | None = None,
    convert_to_numpy: bool = True,
    **options: Any,
) -> Any:
    """``encode``, with what it returns as their keywords say."""
    check_one_of("output_value", output_value, ("sentence_embedding", "token_embeddings", None))
    check_one_of("precision", precision, (None, "float32", *PRECISIONS))
    check_one_of("task", options.pop("task", None), (None, "query", "document"))
    _refuse(OF_ENCODE, options, embedder.device)
    quantised = precision not in (None, "float32")
    if quantised and (output_value != "sentence_embedding" or options.get("grad")):
        raise InputError(f"precision: expected float32 for tokens or gradients, found {precision!r}")
    if output_value != "sentence_embedding" and (options.get("pool") or "device" in options):
        raise InputError(f"output_value: expected 'sentence_embedding' of several devices, found {output_value!r}")
    if output_value == "sentence_embedding" and convert_to_numpy and not quantised:
        return encode(inputs, **options)
    tensor, texts = options.pop("convert_to_tensor", False), as_texts("inputs", inputs)
    single = isinstance(inputs, str)
    if output_value != "sentence_embedding":
        found: Any = _tokens(embedder, texts, options)
        if len(found) != len(texts):  # a capture stopped the model
            return None
        if output_value is None:
            rows = encode(texts, convert_to_tensor=True, **options)
            found = [{"token_embeddings": x, "sentence_embedding": y} for x, y in zip(found, rows, strict=True)]
        return found[0] if single else found
    found = encode(texts, convert_to_tensor=True, **options)
    if quantised and found is not None:
        found = torch.from_numpy(quantize(found.cpu().numpy(), str(precision)))
    return as_asked(found, single=single, tensor=tensor or options.get("grad", False), numpy=convert_to_numpy)


def _tokens(embedder: Any, texts: list[str], options: Mapping[str, Any]) -> list[Tensor]:
    """The last hidden states of each text [tokens, H], float32, on which neither cut nor length have any bearing."""
    options = {name: x for name, x in options.items() if name not in ("truncate_dim", "normalize_embeddings")}
    tokens = embedder.encode_tokens(texts, normalize_embeddings=False, **options)
    return list(tokens.vectors.split(tokens.lengths))


def as_scores(
    reranker: Any,
    predict: Call,
    pairs: Any,
    *,
    activation_fn: Callable[[Tensor], Tensor] | None = None,
    apply_softmax: bool | None = False,
    convert_to_numpy: bool = True,
    **options: Any,
) -> Any:
    """``predict``, with what it returns as their keywords say."""
    _refuse(OF_PREDICT, options, reranker.device)
    if (prompt := options.pop("prompt", None)) is not None:
        if options.get("instruction") is not None:
            raise InputError("prompt: expected none beside instruction, which it is another name of")
        options["instruction"] = prompt
    if activation_fn is None and not apply_softmax and convert_to_numpy:
        return predict(pairs, **options)
    if activation_fn is not None:
        options["logit"] = True
    tensor, (pairs, single) = options.pop("convert_to_tensor", False), as_pairs(pairs)
    found = predict(pairs, convert_to_tensor=True, **options)
    if found is not None and activation_fn is not None:  # which expects a column for each label
        found = activation_fn(found[:, None])[:, 0] if found.dim() == 1 else activation_fn(found)
    if found is not None and apply_softmax and found.dim() > 1:
        found = found.softmax(dim=1)
    return as_asked(found, single=single, tensor=tensor or options.get("grad", False), numpy=convert_to_numpy)


def _refuse(table: Mapping[str, str], options: dict[str, Any], own: torch.device) -> None:
    """Take what the table refuses, and the device, out of the options; raise InputError where it is not the default."""
    for name, meaning in table.items():
        if meaning.startswith(REFUSED) and (found := options.pop(name, None)) is not None:
            raise InputError(f"{name}: expected none, found {found!r}: {meaning.removeprefix(REFUSED)}")
    if isinstance(device := options.pop("device", None), list | tuple):  # a process on each
        options["device"] = device
        return
    try:
        wanted = own if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        wanted = None
    if wanted is None or wanted.type != own.type or wanted.index not in (None, own.index or 0):
        raise InputError(
            f"device: expected the model's, {own}, found {device!r}: from_pretrained(device=...) opens it there"
        )
