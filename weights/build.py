"""Build a model for a checkpoint: on the meta device, strictly checked, then its tensors assigned, memory-mapped."""

from dataclasses import replace
from pathlib import Path

import torch

from qwen3core.config import Qwen3Config
from qwen3core.errors import CheckpointError
from qwen3core.layout import Layout
from qwen3core.model import Qwen3Model
from qwen3core.ops import Ops, resolve

from .find import base_directory
from .layout import read_layout
from .precision import as_device, choose, quantize
from .tensors import Tensors


def load_model(
    directory: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    ops: str | Ops = "auto",
    lm_head: bool = False,
    layout: Layout | None = None,
) -> Qwen3Model:
    """A model with the checkpoint's weights, in eval mode; every key, shape and dtype is checked.

    Args:
        directory: as ``find`` gives it.
        dtype: a torch dtype or its name; ``"auto"`` is config.json's, else the tensors'. What ``"auto"``, bfloat16,
            float16 and ``"int8"`` mean on a CPU: see ``Pretrained.from_pretrained``.
        device: None is the first GPU, else the CPU.
        ops: a set of operations, or its name (``ops.resolve``).
        lm_head: load an output matrix of its own too, as rerankers need it.
        layout: what surrounds the decoder; by default, what the directory declares.

    Returns:
        A model whose tensors are pages of the file where dtype and device leave them as stored: opening copies nothing.

    Raises:
        CheckpointError: for what is wrong with the files.
        InputError: for the options.

    Example:
        >>> model = load_model(find("tiny-embedding"), dtype="float32", device="cpu")
        >>> model.layers[0].self_attn.q_proj.weight.shape
        torch.Size([256, 256])
    """
    where = as_device(device)
    model, tensors = open_model(directory, ops=resolve(ops, where), lm_head=lm_head, layout=layout)
    target, model.dtype = choose(dtype, where, model, tensors)
    model.load_state_dict({name: tensors[name].to(where, target) for name in model.state_dict()}, assign=True)
    if dtype == "int8":
        quantize(model)
    return model


def open_model(
    directory: str | Path, *, ops: str | Ops = "auto", lm_head: bool = False, layout: Layout | None = None
) -> tuple[Qwen3Model, Tensors]:
    """A model on the meta device and the tensors that fit it, strictly checked, none of them read yet.

    layout: as for ``load_model``; what follows the decoder in the files, and not in it, stays on disk. Raises
    CheckpointError.
    """
    layout = layout or read_layout(directory)
    config = Qwen3Config.from_file(base_directory(directory) / "config.json")
    tensors = Tensors(directory)
    tensors.require_layers(config.num_hidden_layers)
    rows, *_ = tensors.shape("embed_tokens.weight") or (0,)  # the tensor is right; config.json may be padded
    tensors.check("embed_tokens.weight", (rows, config.hidden_size))
    untied = lm_head and not ties_lm_head(config, tensors)
    try:
        with torch.device("meta"):
            model = Qwen3Model(replace(config, vocab_size=rows), ops, lm_head=untied, layout=layout)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{directory}/config.json: expected the sizes of a model, found {config}") from error
    for name, parameter in model.state_dict().items():
        tensors.check(name, tuple(parameter.shape))
    decoder_only = not layout.modules and layout.score != "score"
    tensors.check_none_left(model.state_dict(), decoder_only=decoder_only)
    return model.eval(), tensors


def ties_lm_head(config: Qwen3Config, tensors: Tensors) -> bool:
    """Whether the embeddings are the lm_head, too; as in transformers 5, never where another lm_head is stored."""
    lm_head, embeddings = "lm_head.weight", "embed_tokens.weight"
    if not config.tie_word_embeddings or lm_head not in tensors:
        return config.tie_word_embeddings
    return tensors.dtype(lm_head) == tensors.dtype(embeddings) and torch.equal(tensors[lm_head], tensors[embeddings])
