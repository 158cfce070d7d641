"""Write checkpoints in the official repository layout, at any of the six sizes or small, from a seed.

They stand in for the official weights where those are not at hand: same files, names, shapes, tokenizer conventions.
Weights are scaled so that every part matters to the output: activations of unit variance after each norm, attention
neither uniform nor one-hot, norm weights away from 1, embeddings as small as the real ones (so that eps counts),
answers of the reranker that do not saturate. On plain N(0, 0.02) weights, half the possible bugs do not show.
"""

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from qwen3core import prompts
from qwen3core.config import OFFICIAL_SIZES, Qwen3Config
from qwen3core.errors import InputError
from qwen3core.model import Qwen3Model
from qwen3core.tokenizer import Tokenizer
from qwen3core.writing import writing_into

from .tensors import INDEX, SAFETENSORS_DTYPES, SINGLE


@dataclass(frozen=True)
class Layout:
    """What sets one repository apart from the others."""

    config: Qwen3Config
    kind: str
    shards: int = 1


SMALL = Qwen3Config(0, 64, 160, 4, 4, 2, 40960, 1e6, tie_word_embeddings=True, dtype="bfloat16")
LAYOUTS = {
    "Qwen3-Embedding-small": Layout(replace(SMALL, max_position_embeddings=32768), "embedding"),
    "Qwen3-Reranker-small": Layout(SMALL, "reranker"),
    "Qwen3-Embedding-0.6B": Layout(replace(OFFICIAL_SIZES["0.6B"], max_position_embeddings=32768), "embedding"),
    "Qwen3-Reranker-0.6B": Layout(OFFICIAL_SIZES["0.6B"], "reranker"),
    "Qwen3-Embedding-4B": Layout(replace(OFFICIAL_SIZES["4B"], vocab_size=151665), "embedding", shards=2),
    "Qwen3-Reranker-4B": Layout(OFFICIAL_SIZES["4B"], "reranker", shards=2),
    "Qwen3-Embedding-8B": Layout(replace(OFFICIAL_SIZES["8B"], vocab_size=151665), "embedding", shards=4),
    "Qwen3-Reranker-8B": Layout(OFFICIAL_SIZES["8B"], "reranker", shards=5),
}
"""The official repositories, and two small ones whose vocabulary is their tokenizer's."""


def synthesize(
    directory: str | Path,
    layout: str | Layout = "Qwen3-Embedding-small",
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    sparse: bool = False,
) -> Path:
    """Write a whole checkpoint into ``directory`` (made if need be) and return it.

    layout: a name of ``LAYOUTS``, or a Layout of one's own. tokenizer: a tokenizer.json; None builds a small byte-level
    BPE, and vocab_size becomes its size. sparse: the layout's full headers and sizes over holes (all weights zero), for
    tests of loading that take no disk. Raises InputError, and CheckpointError for the tokenizer.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise InputError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
        layout = LAYOUTS[layout]
    tok = small_tokenizer() if tokenizer is None else Tokenizer(tokenizer).backend
    if not sparse and (tokenizer is None or layout.config.vocab_size == 0):
        layout = replace(layout, config=replace(layout.config, vocab_size=tok.get_vocab_size()))
    directory = Path(directory)
    official = Path(tokenizer).with_name("tokenizer_config.json") if tokenizer else None
    with writing_into(directory) as part:
        for name, data in _json_files(layout, tok).items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if layout.kind == "reranker":
            (part / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        _write_tokenizer(part, layout, tok)
        if official and official.exists():
            shutil.copyfile(official, part / official.name)
        _write_weights(part, layout, None if sparse else seed)
    return directory


def _json_files(layout: Layout, tok: tokenizers.Tokenizer) -> dict[str, Any]:
    numbers = asdict(layout.config)
    dtype = numbers.pop("dtype")
    eos = tok.encode(prompts.EOS, add_special_tokens=False).ids[0]
    ids = {"bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
    fixed = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "torch_dtype": dtype}
    unused = {"attention_bias": False, "attention_dropout": 0.0, "rope_scaling": None, "use_sliding_window": False}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False}
    settings |= {"eos_token": "<|im_end|>", "pad_token": prompts.EOS, "model_max_length": 131072}
    files: dict[str, Any] = {
        "config.json": {**fixed, **unused, **ids, **numbers},
        "generation_config.json": ids,
        "tokenizer_config.json": settings,
    }
    if layout.kind == "embedding":
        modules = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Normalize": "models.Normalize"}
        # The mean, which sentence-transformers 5 takes where the file does not say.
        modes = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}
        files["1_Pooling/config.json"] = {"word_embedding_dimension": layout.config.hidden_size, **modes}
        stored = {"prompts": prompts.EMBEDDING_PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    else:
        scoring = "cross_encoder.modules.logit_score.LogitScore"
        modules = {"": "base.modules.transformer.Transformer", "1_LogitScore": scoring}
        yes, no = (tok.encode(text, add_special_tokens=False).ids[0] for text in (prompts.YES, prompts.NO))
        files["1_LogitScore/config.json"] = {"true_token_id": yes, "false_token_id": no}
        output = {"method": "forward", "method_output_name": "logits"}
        files["sentence_bert_config.json"] = {
            "transformer_task": "text-generation",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "causal_logits",
        }
        stored = {
            "activation_fn": "torch.nn.modules.linear.Identity",
            "default_prompt_name": "query",
            "model_type": "CrossEncoder",
            "prompts": {"query": prompts.DEFAULT_TASK},
        }
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{name}"}
        for i, (path, name) in enumerate(modules.items())
    ]
    files["config_sentence_transformers.json"] = stored
    return files


def _write_weights(directory: Path, layout: Layout, seed: int | None) -> None:
    """Each shard as a header and then tensor after tensor: constant memory at any size, holes where seed is None."""
    reranker = layout.kind == "reranker"
    with torch.device("meta"):
        lm_head = reranker and not layout.config.tie_word_embeddings
        parameters = Qwen3Model(layout.config, "reference", lm_head=lm_head).state_dict()
    total = sum(p.numel() for p in parameters.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(layout.shards)]
    done = 0
    for name, parameter in parameters.items():
        shards[done * layout.shards // total][name] = parameter
        done += parameter.numel()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if layout.shards == 1 else f"model-{number:05d}-of-{layout.shards:05d}.safetensors"
        keys = {name: f"model.{name}" if reranker and name != "lm_head.weight" else name for name in shard}
        weight_map |= dict.fromkeys(keys.values(), file)
        _write_shard(directory / file, shard, keys, layout.config, seed)
    if layout.shards > 1:
        index = {"metadata": {"total_size": total * _dtype(layout.config).itemsize}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, shard: dict[str, Tensor], keys: dict[str, str], config: Qwen3Config, seed: int | None
) -> None:
    dtype = _dtype(config)
    code = next(key for key, value in SAFETENSORS_DTYPES.items() if value == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in shard.items():
        start, end = end, end + parameter.numel() * dtype.itemsize
        header[keys[name]] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if seed is None:
            out.truncate(8 + len(text) + end)
            return
        for name, parameter in shard.items():
            weight = _weight(name, parameter.shape, seed, config).to(dtype)
            out.write(weight.view(torch.uint8).numpy().data)


def _dtype(config: Qwen3Config) -> torch.dtype:
    return getattr(torch, config.dtype or "float32")


def _weight(name: str, shape: torch.Size, seed: int, config: Qwen3Config) -> Tensor:
    """One tensor, from the seed and its name alone, so that no order of writing matters."""
    generator = torch.Generator().manual_seed(int.from_bytes(f"{seed} {name}".encode(), "little") % (2**63 - 25))
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return torch.rand(shape, generator=generator) + 1.0  # attention logits of deviation about 2.3
    if name.endswith("norm.weight") or "layernorm" in name:
        return torch.rand(shape, generator=generator) + 0.5
    residual = config.hidden_size**-0.5  # deviation of the residual stream, as of real embeddings
    scale = shape[1] ** -0.5
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        scale = residual
    elif name.endswith(("o_proj.weight", "down_proj.weight")):  # all layers together add as much as the embedding
        scale *= 2 * residual * config.num_hidden_layers**-0.5
    return torch.randn(shape, generator=generator) * scale


_CONTENT = '{{ messages | selectattr("role", "eq", "%s") | map(attribute="content") | first%s }}'
CHAT_TEMPLATE = (
    prompts.RERANKER_PREFIX
    + prompts.RERANKER.fill(
        _CONTENT % ("system", f' | default("{prompts.DEFAULT_TASK}")'),
        _CONTENT % ("query", ""),
        _CONTENT % ("document", ""),
    )
    + prompts.RERANKER_SUFFIX
    + "\n"  # which jinja2 takes away
)
"""The reranker's template for sentence-transformers, which asks for it."""

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenizer."""

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
ADDED = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
"""Qwen's added tokens that tokenizer.json does not mark as special."""


def small_tokenizer(texts: Sequence[str] = (), vocab_size: int = 576) -> tokenizers.Tokenizer:
    """A byte-level BPE, trained on our templates and ``texts``, with Qwen's normalizer, pre-tokenizer, added tokens
    beside the ``vocab_size``, and yes and no.
    """
    tok = tokenizers.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    templates = [prompts.RERANKER_PREFIX, prompts.RERANKER_BODY, prompts.DEFAULT_TASK, __doc__]
    text = [*(templates if not texts else templates[:3] * 1000), *["yes", "no"] * 100, *texts]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(text, trainer)
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tok.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tok


def _write_tokenizer(directory: Path, layout: Layout, tok: tokenizers.Tokenizer) -> None:
    if layout.kind == "embedding":  # the official embedding checkpoints append EOS in the post-processor
        eos = (prompts.EOS, tok.encode(prompts.EOS, add_special_tokens=False).ids[0])
        append = processors.TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), append])
    try:
        tok.save(str(directory / "tokenizer.json"))
        tok.model.save(str(directory))  # vocab.json, merges.txt
    except Exception as error:  # the library raises bare Exception
        raise OSError(str(error)) from error
