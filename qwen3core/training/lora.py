"""LoRA (arXiv:2106.09685) through peft: adapters on every projection of the decoder, in peft's own format."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, check_int
from ..model import Qwen3Model
from ..reference import declare
from ..weights.find import ADAPTER, INDEX
from ..weights.tensors import beside_weights, copy_within
from ..writing import writing_into

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Modules that get an adapter: every projection."""


def add_lora(model: Qwen3Model, rank: int, *, seed: int = 0) -> None:
    """Put adapters into the decoder, which then are the model's only parameters that require gradients.

    rank: of each adapter's two matrices; they count twice (alpha = 2 rank). seed: of their first values.
    Raises InputError, also where peft is not installed.
    """
    check_int("lora", rank, 1)
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise InputError(f"peft is not installed: pip install peft ({error})") from error
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS), model)
    declare(row_wise=True)(Linear)


def save_lora(
    model: Qwen3Model, folder: Path, *, lm_head: bool, source: Path, base: str, revision: str | None = None
) -> None:
    """Write the adapters in peft's format, whole or not at all, with the tokenizer and modules of their checkpoint.

    lm_head: for transformers' model that has one, not for the bare decoder. source: the checkpoint's directory; base:
    its hub id (and revision) or absolute path, by which peft's ``AutoPeftModelForCausalLM`` and
    ``AutoPeftModelForFeatureExtraction``, and sentence-transformers, find it. Raises OSError.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    prefix = "base_model.model.model." if lm_head else "base_model.model."
    adapters = get_peft_model_state_dict(model)
    config: Any = model.peft_config["default"]  # type: ignore[index]
    config.task_type = "SEQ_CLS" if model.score is not None else "CAUSAL_LM" if lm_head else "FEATURE_EXTRACTION"
    config.base_model_name_or_path, config.revision = base, revision
    with writing_into(folder) as part:
        for path in beside_weights(source):
            if path.name not in ("config.json", INDEX, "README.md") or path.parent != source:  # those of the base alone
                copy_within(source, path, part)
        save_file({prefix + name: x.contiguous() for name, x in adapters.items()}, part / ADAPTER)
        config.save_pretrained(part)


def merged_weights(model: Qwen3Model) -> dict[str, Tensor]:
    """Add the adapters to the model's weights, in place; the weights under the checkpoint's names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {name.replace(".base_layer", ""): x for name, x in model.state_dict().items() if ".lora_" not in name}
