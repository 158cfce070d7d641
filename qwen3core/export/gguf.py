"""GGUF, as llama.cpp reads it: one file with the decoder, the tokenizer, and what closes a text.

Of an embedder, the last token is pooled and EOS is added (llama.cpp then normalises). Of a reranker, pooling is by
rank: the graph of Qwen3 ends in a softmax over the rows of ``cls.output``, here the direction of P(yes) and zeros, so
that the first is P(yes); the template of pairs has the name ``rerank``, with the checkpoint's own instruction. Prompts
of queries have no place in the file: put them before the text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..layout import LAST_TOKEN
from ..model import Qwen3Model
from ..reranker import Reranker
from ..tokenizer import Tokenizer
from ..writing import writing
from .source import Source, check_held, converted, describe

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
"""What matrices are stored in; vectors are F32."""
HELD: dict[str, Any] = {
    "causal": True,
    "pooling": LAST_TOKEN,
    "include_prompt": True,
    "modules": (),
    "normalize": True,
    "truncate_dim": None,
    "lower_case": False,
    "opening": (),
    "activation": "Sigmoid",
}
"""Fields of a layout that llama.cpp computes one value of, and that value."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits texts into words, which llama.cpp knows by the name ``qwen2``."""


def write(source: Source, output: Path, dtype: str) -> None:
    """Write the file, a tensor in memory. Raises InputError for what it cannot hold, and OSError."""
    if len(source.layout.labels) > 1:
        raise InputError(f"gguf: labels: expected one, found {', '.join(source.layout.labels)}")
    check_held(source, "gguf", HELD)
    if yarn := source.model.config.rope_scaling:
        raise InputError(f"gguf: rope_scaling: expected none, since llama.cpp scales by its own rules, found {yarn}")
    import gguf

    tensors = {name: (x, gguf.GGMLQuantizationType[_kind(name, x, dtype)]) for name, x in _tensors(source)}
    with writing(output) as part:
        writer = gguf.GGUFWriter(part, "qwen3")
        _add_config(writer, source.model)
        _add_tokenizer(writer, source.tokenizer, len(source.model.embed_tokens.weight))
        _add_job(writer, source)
        for name, value in describe(source).items():
            writer.add_string(name, value)
        for name, (x, kind) in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if x.shape[-1] % block:
                raise InputError(f"gguf: {name}: expected rows of a multiple of {block}, found {x.shape[-1]}")
            writer.add_tensor_info(name, x.shape, np.dtype(np.float32), x.numel() // block * size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (x, kind) in tensors.items():
            as_stored = converted(name, x, torch.float16 if kind.name == "F16" else torch.float32)
            writer.write_tensor_data(gguf.quantize(as_stored.float().numpy(), kind))
        writer.close()


def _kind(name: str, x: Tensor, dtype: str) -> str:
    """The type that a weight is stored in; a score's few rows are nothing to save on."""
    return TYPES[dtype] if x.dim() == 2 and not name.startswith("cls.") else "F32"


def _tensors(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in the file, as stored."""
    import gguf

    model = source.model
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    for name, x in model.state_dict().items():
        if not name.startswith(("lm_head", "score")):  # of which a few rows are all that is needed
            yield names.get_name(f"model.{name}", try_suffixes=(".weight",)), x
    if isinstance(source, Reranker):
        direction = model.score_weight(source.answers)
        assert direction is not None
        yield "cls.output.weight", torch.cat([direction, torch.zeros_like(direction)])


def _add_config(writer: Any, model: Qwen3Model) -> None:
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """A token for each row of the embeddings, whether the tokenizer has more or fewer of them.

    Raises InputError for one that splits texts in another way than Qwen2's. What it does not hold is the normalizer
    (NFC), which llama.cpp leaves to its callers.
    """
    import gguf

    data = json.loads(tokenizer.backend.to_str())
    pattern = [part.get("pattern") for part in (data["pre_tokenizer"] or {}).get("pretokenizers", [])]
    if data["model"]["type"] != "BPE" or {"Regex": PATTERN} not in pattern:
        raise InputError(f"{tokenizer.path}: expected BPE that splits texts as Qwen2's does, found {pattern!r:.200}")
    words = {i: word for word, i in tokenizer.backend.get_vocab().items()}
    added = tokenizer.backend.get_added_tokens_decoder()
    types = {i: gguf.TokenType.CONTROL if x.special else gguf.TokenType.USER_DEFINED for i, x in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(rows)])
    unused = gguf.TokenType.UNUSED
    writer.add_token_types([types.get(i, gguf.TokenType.NORMAL if i in words else unused) for i in range(rows)])
    writer.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in data["model"]["merges"]])


def _add_job(writer: Any, source: Source) -> None:
    """Pooling, what closes a text, and a reranker's template. Raises InputError for texts closed by several tokens."""
    import gguf

    tokenizer, layout = source.tokenizer, source.layout
    closing = layout.closing if layout.job == "embedding" else ()
    if len(closing) > 1:
        raise InputError(f"gguf: closing: expected one token at most, found {closing}")
    writer.add_eos_token_id(closing[0] if closing else tokenizer.eos)
    writer.add_pad_token_id(tokenizer.eos)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(bool(closing))
    if isinstance(source, Reranker):
        template = layout.template
        pair = template.prefix + template.fill(layout.instruction, "{query}", "{document}") + template.suffix
        writer.add_pooling_type(gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_chat_template([{"name": "rerank", "template": pair}])
    else:
        writer.add_pooling_type(gguf.PoolingType.LAST)
