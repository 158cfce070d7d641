"""Merging: one checkpoint out of several of the same shape, tensor by tensor, a shard in memory at a time."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from qwen3core.errors import CheckpointError, InputError, check_number, warn
from qwen3core.layout import Layout
from qwen3core.tokenizer import Tokenizer

from .build import open_model, ties_lm_head
from .tensors import check_rewritable, rewrite

SETTINGS = {
    *("prompts", "default_prompt_name", "instruction", "template", "max_length", "query_length", "document_length"),
    *("truncate_dim", "similarity", "labels"),
}
"""Parts of a layout whose differences a merger survives."""


def merge(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    linear: bool = False,
) -> None:
    """Write the merger of checkpoints, with the files of the first one.

    weights: the share of each, equal by default. Two tensors are merged by ``slerp``, a third into their result, and so
    on, as the model series was (arXiv:2506.05176, section 3.3). linear: the weighted mean instead.
    Raises InputError for the options, and for a merger that is not finite; CheckpointError for checkpoints that do not
    go together: of different shapes, arithmetic, vocabularies or jobs. Warns where the files do not say that the jobs
    are the same, or where texts are split into tokens in another way.
    """
    if len(directories) < 2:
        raise InputError(f"merge: expected two or more checkpoints, found {len(directories)}")
    shares = [1.0] * len(directories) if weights is None else list(weights)
    if len(shares) != len(directories):
        raise InputError(f"weights: expected {len(directories)} numbers, found {shares}")
    for share in shares:
        check_number("weights", share, 0, above=True)
    check_number("weights: their sum", sum(shares), 0)
    paths = [Path(directory) for directory in directories]
    for path in paths:
        check_rewritable(path, Path(output))
    models = [open_model(path) for path in paths]
    tied = [ties_lm_head(model.config, tensors) for model, tensors in models]
    (_, first), *others = models
    for (_, tensors), ties in zip(others, tied[1:], strict=True):
        for name in first:
            tensors.check(_stored(name, ties), first.shape(name))
        tensors.check_none_left(set(first))
    configs = [asdict(model.config) for model, _ in models]
    layouts = [model.layout for model, _ in models]
    _check_arithmetic(
        paths, layouts[0].job, [c | {"tie_word_embeddings": ties} for c, ties in zip(configs, tied, strict=True)]
    )
    _check_tokenizers(paths)
    _check_layouts(paths, layouts)

    def merged(name: str) -> Tensor:
        result, total = first[name].float(), shares[0]
        for (_, tensors), ties, share in zip(others, tied[1:], shares[1:], strict=True):
            total += share
            result = (torch.lerp if linear else slerp)(result, tensors[_stored(name, ties)].float(), share / total)
        return result

    rewrite(paths[0], output, merged)


def _check_arithmetic(paths: Sequence[Path], job: str | None, configs: Sequence[dict[str, object]]) -> None:
    """Raise CheckpointError where weights of the same shapes compute something else."""
    # A reranker reads the output matrix, an embedding model has no use for it.
    tied = [] if job == "embedding" else ["tie_word_embeddings"]
    names = ["rope_theta", "rope_scaling", "rms_norm_eps", "is_causal", *tied]
    for path, config in zip(paths, configs, strict=True):
        for name in names:
            if config[name] != configs[0][name]:
                raise CheckpointError(
                    f"{path / 'config.json'}: {name}: expected {configs[0][name]} as in {paths[0]}, "
                    f"found {config[name]}"
                )


def _check_tokenizers(paths: Sequence[Path]) -> None:
    """Raise CheckpointError where row n of the embedding matrices is another word; warn of other rules of splitting."""
    files = [path / "tokenizer.json" for path in paths]
    if all(file.is_file() and file.read_bytes() == files[0].read_bytes() for file in files):
        return  # which opening would take seconds to find out
    first, *others = [Tokenizer(file).backend for file in files]
    mine, rules = first.get_vocab(), _rules(first.to_str())
    for path, file, other in zip(paths[1:], files[1:], others, strict=True):
        theirs = other.get_vocab()
        words = {i: word for word, i in theirs.items()}
        for word, i in sorted(mine.items(), key=lambda item: item[1]):
            if theirs.get(word, i) != i or words.get(i, word) != word:  # a word that only one has is no contradiction
                raise CheckpointError(
                    f"{file}: {word!r}: expected token {i} as in {paths[0]}, found "
                    f"{theirs[word] if word in theirs else f'{words[i]!r} there'}"
                )
        changed = [name for name, rule in _rules(other.to_str()).items() if rule != rules[name]]
        if changed:
            warn(f"{path}: its {', '.join(changed)} differ from those of {paths[0]}, which the merged checkpoint has")


def _rules(tokenizer: str) -> dict[str, object]:
    """What of a serialized tokenizer decides how a text is split, by name."""
    data = json.loads(tokenizer)
    return {name: data[name] for name in ("normalizer", "pre_tokenizer")} | {"merges": data["model"].get("merges")}


def _check_layouts(paths: Sequence[Path], layouts: Sequence[Layout]) -> None:
    """Raise CheckpointError for another job or other surroundings; warn of other settings, and where no job is said."""
    mine = layouts[0]
    for path, layout in zip(paths[1:], layouts[1:], strict=True):
        if mine.job != layout.job and None in (mine.job, layout.job):
            warn(
                f"{path}: expected a checkpoint for {mine.job or 'no job'} as {paths[0]}, found {layout.job or 'none'}"
            )
            continue
        changed = [f.name for f in fields(Layout) if getattr(mine, f.name) != getattr(layout, f.name)]
        for name in changed:
            if name not in SETTINGS:
                raise CheckpointError(
                    f"{path}: {name}: expected {getattr(mine, name)!r} as in {paths[0]}, "
                    f"found {getattr(layout, name)!r:.300}"
                )
        if changed:
            warn(f"{path}: its {', '.join(changed)} differ from those of {paths[0]}, which the merged checkpoint has")


def _stored(name: str, ties: bool) -> str:
    """The tensor that a parameter is in a checkpoint, which may tie the lm_head to the embeddings."""
    return "embed_tokens.weight" if ties and name == "lm_head.weight" else name


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a (t = 0) to b (t = 1) along the great circle between them (slerp, Shoemake 1985), float32.

    ``(sin((1 - t) w) a + sin(t w) b) / sin(w)``, where w is the angle between the tensors, each read as one vector.
    Linear where w is within 1e-6 of 0 or 180 degrees, in which no great circle is defined.
    """
    dot, aa, bb = ((x * y).sum(-1, dtype=torch.float64).sum().item() for x, y in ((a, b), (a, a), (b, b)))
    angle = math.acos(max(-1.0, min(1.0, dot / math.sqrt(aa * bb)))) if aa and bb else 0.0
    if math.sin(angle) < 1e-6:
        return torch.lerp(a, b, t)
    return (a * math.sin((1 - t) * angle)).add_(b, alpha=math.sin(t * angle)).div_(math.sin(angle))
