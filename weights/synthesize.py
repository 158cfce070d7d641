"""Write checkpoints in the official repository layout, at any of the six sizes or small, from a seed.

They stand in for the official weights where those are not at hand: same files, names, shapes, tokenizer conventions.
Weights are scaled so that every part matters to the output: activations of unit variance after each norm, attention
neither uniform nor one-hot, norm weights away from 1, embeddings as small as the real ones (so that eps counts),
answers of the reranker that do not saturate. On plain N(0, 0.02) weights, half the possible bugs do not show.
"""

import json
import shutil
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from qwen3core import prompts
from qwen3core.config import Qwen3Config
from qwen3core.errors import InputError
from qwen3core.model import Qwen3Model

from .checkpoint import DTYPES, INDEX, SINGLE


@dataclass(frozen=True)
class Layout:
    """What sets one repository apart from the others."""

    config: Qwen3Config
    kind: str
    shards: int = 1


def _layouts() -> dict[str, Layout]:
    def config(v: int, h: int, i: int, layers: int, hq: int, hkv: int, positions: int, tied: bool) -> Qwen3Config:
        return Qwen3Config(v, h, i, layers, hq, hkv, positions, 1e6, tie_word_embeddings=tied, dtype="bfloat16")

    # vocabulary, hidden size, intermediate size, layers, query heads, key heads, positions
    return {
        "Qwen3-Embedding-small": Layout(config(0, 64, 160, 4, 4, 2, 32768, tied=True), "embedding"),
        "Qwen3-Reranker-small": Layout(config(0, 64, 160, 4, 4, 2, 40960, tied=True), "reranker"),
        "Qwen3-Embedding-0.6B": Layout(config(151669, 1024, 3072, 28, 16, 8, 32768, tied=True), "embedding"),
        "Qwen3-Reranker-0.6B": Layout(config(151669, 1024, 3072, 28, 16, 8, 40960, tied=True), "reranker"),
        "Qwen3-Embedding-4B": Layout(config(151665, 2560, 9728, 36, 32, 8, 40960, tied=True), "embedding", 2),
        "Qwen3-Reranker-4B": Layout(config(151669, 2560, 9728, 36, 32, 8, 40960, tied=True), "reranker", 2),
        "Qwen3-Embedding-8B": Layout(config(151665, 4096, 12288, 36, 32, 8, 40960, tied=False), "embedding", 4),
        "Qwen3-Reranker-8B": Layout(config(151669, 4096, 12288, 36, 32, 8, 40960, tied=False), "reranker", 5),
    }


LAYOUTS = _layouts()


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
    tests of loading that take no disk. Raises InputError.
    """
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise InputError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tok = tokenizers.Tokenizer.from_file(str(tokenizer)) if tokenizer else small_tokenizer()
    if not sparse and (tokenizer is None or layout.config.vocab_size == 0):
        layout = replace(layout, config=replace(layout.config, vocab_size=tok.get_vocab_size()))
    eos = tok.token_to_id(prompts.EOS)
    if eos is None:
        raise InputError(f"{tokenizer}: expected a tokenizer with {prompts.EOS}, found none")
    _write_config(directory, layout, eos)
    _write_tokenizer(directory, layout, tok, Path(tokenizer) if tokenizer else None)
    _write_weights(directory, layout, seed, sparse)
    return directory


def _write_json(path: Path, data: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_config(directory: Path, layout: Layout, eos: int) -> None:
    numbers = asdict(layout.config)
    numbers["torch_dtype"] = numbers.pop("dtype")
    fixed = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    _write_json(directory / "config.json", {**fixed, **numbers})
    _write_json(directory / "generation_config.json", {"bos_token_id": eos, "eos_token_id": eos})
    if layout.kind == "embedding":
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        _write_json(
            directory / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
                for i, (path, name) in enumerate(modules)
            ],
        )
        pooling = {"word_embedding_dimension": layout.config.hidden_size, "pooling_mode_lasttoken": True}
        _write_json(directory / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
        prompted = {"prompts": prompts.EMBEDDING_PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        _write_json(directory / "config_sentence_transformers.json", prompted)


# ---------------------------------------------------------------------------------------------------- weights


def _write_weights(directory: Path, layout: Layout, seed: int, sparse: bool) -> None:
    with torch.device("meta"):
        head = layout.kind == "reranker" and not layout.config.tie_word_embeddings
        model = Qwen3Model(layout.config, "reference", lm_head=head)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    prefix = {name: "" if layout.kind == "embedding" or name == "lm_head.weight" else "model." for name in shapes}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(layout.shards)]
    done = 0
    for name, shape in shapes.items():
        shards[min(done * layout.shards // total, layout.shards - 1)][name] = shape
        done += int(np.prod(shape))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if layout.shards == 1 else f"model-{number:05d}-of-{layout.shards:05d}.safetensors"
        weight_map.update({prefix[name] + name: file for name in shard})
        dtype = getattr(torch, layout.config.dtype or "float32")
        tensors = ((prefix[name] + name, shape, name) for name, shape in shard.items())
        _write_safetensors(directory / file, list(tensors), dtype, None if sparse else seed, layout.config)
    if layout.shards > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total * 2}, "weight_map": weight_map})


def _write_safetensors(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...], str]],
    dtype: torch.dtype,
    seed: int | None,
    config: Qwen3Config,
) -> None:
    """Header, then each tensor as it is made: constant memory at any size, and holes where seed is None."""
    names = {value: key for key, value in DTYPES.items()}
    header, offset = {}, 0
    for key, shape, _ in tensors:
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if seed is None:
            file.truncate(8 + len(text) + offset)
            return
        for _, shape, name in tensors:
            weight = _weight(name, shape, seed, config).to(dtype)
            file.write(weight.view(torch.uint8).numpy().tobytes())


def _weight(name: str, shape: tuple[int, ...], seed: int, config: Qwen3Config) -> Tensor:
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


# -------------------------------------------------------------------------------------------------- tokenizer

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


def small_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of about 600 tokens with Qwen's normalizer, pre-tokenizer, added tokens, and yes and no."""
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
    text = [prompts.RERANKER_PREFIX, prompts.RERANKER_BODY, prompts.DEFAULT_TASK, __doc__, *["yes", "no"] * 100]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=576, initial_alphabet=alphabet, show_progress=False))
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tok.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return tok


def _write_tokenizer(directory: Path, layout: Layout, tok: tokenizers.Tokenizer, source: Path | None) -> None:
    if layout.kind == "embedding":  # the official embedding checkpoints append EOS in the post-processor
        eos = (prompts.EOS, tok.token_to_id(prompts.EOS))
        append = processors.TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), append])
    tok.save(str(directory / "tokenizer.json"))
    model = json.loads(tok.to_str())["model"]
    _write_json(directory / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    official = source.with_name("tokenizer_config.json") if source else None
    if official and official.exists():
        shutil.copyfile(official, directory / "tokenizer_config.json")
        return
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": prompts.EOS,
        "split_special_tokens": False,
        "model_max_length": 131072,
    }
    _write_json(directory / "tokenizer_config.json", settings)
