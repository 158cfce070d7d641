"""The engines that are compared: each opens one checkpoint directory in the official layout.

    openers = embedders(Path("Qwen3-Embedding-0.6B"), "float32")
    embed = openers["transformers"]()  # ImportError, with what is missing, where a package is not installed
    vectors = embed(["a text", "another"])  # the engine's own default batches
    vectors = embed(["a text", "another"], batch_size=1)

Every engine reads text and returns numpy on the host, so that a timed call includes tokenisation, batching and copies.
onnxruntime and llama.cpp run on the CPU only and need the checkpoint in another format: the first opening writes it,
into a folder beside the checkpoint, and no timed call does.
"""

import ctypes
import hashlib
import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from qwen3core import Embedder, Reranker, Tokenizer
from qwen3core.config import Qwen3Config
from qwen3core.prompts import DEFAULT_TASK, NO, RERANKER, RERANKER_BODY, RERANKER_PREFIX, RERANKER_SUFFIX, YES
from qwen3core.weights.build import open_model

Embed = Callable[..., np.ndarray]
"""(texts, batch_size=None) to unit vectors, float32 [n, H]. No prompt is added. A batch_size of None is the engine's
default; qwen3core, which plans its batches by tokens, takes no other."""
Rerank = Callable[..., np.ndarray]
"""(query, documents, batch_size=None) to P(yes) for the default instruction, float32 [n]."""

MAX_LENGTH = 8192
"""Tokens of a text, or of a query with its document and template; the rest is truncated."""
LONG_TEXT_LENGTH = 32768
"""The same for the two engines that embed long texts."""
CACHE = "bench-cache"
"""Folder of converted checkpoints, beside the checkpoint."""
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16"}
LLAMA_SEQUENCES = 64
"""Sequences that llama.cpp decodes at once, at most."""


def embedders(directory: Path, dtype: str, *, device: str = "cpu") -> dict[str, Callable[[], Embed]]:
    """Functions that open an engine, by its name: all engines that know this dtype and device."""
    cache = directory.parent / CACHE
    engines: dict[str, Callable[[], Embed]] = {
        "qwen3core": lambda: _qwen3core_embed(directory, dtype, device),
        "transformers": lambda: _transformers_embed(directory, dtype, device),
        "sentence-transformers": lambda: _sentence_transformers_embed(directory, dtype, device),
    }
    if device == "cpu":
        engines["qwen3core, prepacked"] = lambda: _qwen3core_embed(directory, dtype, device, ops="prepacked")
        engines["llama.cpp"] = lambda: _llama_embed(directory, GGUF_TYPES[dtype], cache)
        engines["llama.cpp Q8_0"] = lambda: _llama_embed(directory, "Q8_0", cache)
    if device == "cpu" and dtype == "float32":  # its CPU kernels know no bfloat16
        engines["onnxruntime"] = lambda: _onnxruntime_embed(directory, cache)
    return engines


def rerankers(directory: Path, dtype: str, *, device: str = "cpu") -> dict[str, Callable[[], Rerank]]:
    """Functions that open an engine, by its name: all engines that know this dtype and device."""
    cache = directory.parent / CACHE
    engines: dict[str, Callable[[], Rerank]] = {
        "qwen3core": lambda: _qwen3core_rerank(directory, dtype, device),
        "transformers": lambda: _transformers_rerank(directory, dtype, device),
        "sentence-transformers": lambda: _cross_encoder_rerank(directory, dtype, device),
    }
    if device == "cpu":
        engines["llama.cpp"] = lambda: _llama_rerank(directory, GGUF_TYPES[dtype], cache)
        engines["llama.cpp Q8_0"] = lambda: _llama_rerank(directory, "Q8_0", cache)
    return engines


def _split(items: Sequence[Any], batch_size: int | None) -> list[Sequence[Any]]:
    size = batch_size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


# qwen3core: packed batches, planned by tokens. A bfloat16 checkpoint is opened with dtype="auto", as by default: on a
# CPU without bfloat16 instructions that is float32 arithmetic on the bfloat16 weights.


def _qwen3core_embed(directory: Path, dtype: str, device: str, ops: str = "auto") -> Embed:
    stored = "auto" if dtype == "bfloat16" else dtype
    embedder = Embedder.from_pretrained(directory, dtype=stored, device=device, ops=ops, max_length=LONG_TEXT_LENGTH)
    return lambda texts: embedder.encode(texts, prompt="")


def _qwen3core_rerank(directory: Path, dtype: str, device: str) -> Rerank:
    reranker = Reranker.from_pretrained(directory, dtype="auto" if dtype == "bfloat16" else dtype, device=device)
    return lambda query, documents: reranker.predict([(query, document) for document in documents])


# transformers: the model cards' code. Without batch_size all texts are one padded batch, as in the cards. The only
# change is no_grad around the embedding model, which its card leaves out.


def _transformers_embed(directory: Path, dtype: str, device: str) -> Embed:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()

    @torch.no_grad()
    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        vectors = []
        for part in _split(texts, batch_size):
            batch = tokenizer(part, padding=True, truncation=True, max_length=LONG_TEXT_LENGTH, return_tensors="pt")
            batch = batch.to(device)
            outputs = model(**batch)
            pooled = _last_token_pool(outputs.last_hidden_state, batch["attention_mask"])
            vectors.append(F.normalize(pooled, p=2, dim=1).float().cpu().numpy())
        return np.concatenate(vectors)

    return embed


def _last_token_pool(last_hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The hidden state of each text's last token; copied from the model card."""
    if attention_mask[:, -1].sum() == attention_mask.shape[0]:  # left-padded
        return last_hidden_states[:, -1]
    lengths = attention_mask.sum(dim=1) - 1
    return last_hidden_states[torch.arange(len(lengths), device=last_hidden_states.device), lengths]


def _transformers_rerank(directory: Path, dtype: str, device: str) -> Rerank:
    """The model card's code: it forms the logits of every position, [n, L, vocabulary], and uses the last."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    model.to(device).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(token) for token in (YES, NO))
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (RERANKER_PREFIX, RERANKER_SUFFIX))
    body_length = MAX_LENGTH - len(prefix) - len(suffix)

    @torch.no_grad()
    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        scores = []
        for part in _split([RERANKER.fill(DEFAULT_TASK, query, document) for document in documents], batch_size):
            inputs = tokenizer(
                part, padding=False, truncation="longest_first", return_attention_mask=False, max_length=body_length
            )
            inputs["input_ids"] = [prefix + ids + suffix for ids in inputs["input_ids"]]
            inputs = tokenizer.pad(inputs, padding=True, return_tensors="pt", max_length=MAX_LENGTH).to(device)
            logits = model(**inputs).logits[:, -1, :]
            pair = torch.stack([logits[:, no], logits[:, yes]], dim=1)
            scores.append(F.log_softmax(pair, dim=1)[:, 1].exp().float().cpu().numpy())
        return np.concatenate(scores)

    return rerank


# sentence-transformers: sorts by length in characters, pads each batch (32 by default), and in its cross-encoder forms
# only the last position's logits.


def _sentence_transformers_embed(directory: Path, dtype: str, device: str) -> Embed:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), model_kwargs={"dtype": getattr(torch, dtype)}, device=device)
    model.max_seq_length = MAX_LENGTH

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        return model.encode(texts, prompt="", batch_size=batch_size or 32, show_progress_bar=False)

    return embed


def _cross_encoder_rerank(directory: Path, dtype: str, device: str) -> Rerank:
    """CrossEncoder's defaults for a checkpoint without its files (Transformer, LogitScore), with the card's template.

    The tokenizer's own chat template has no place for a query and a document.
    """
    from sentence_transformers import CrossEncoder

    content = '{{{{ messages | selectattr("role", "eq", "{}") | map(attribute="content") | first }}}}'
    body = RERANKER_BODY.format(
        instruction=DEFAULT_TASK, query=content.format("query"), document=content.format("document")
    )
    prefix, suffix = (f"{{{{ {json.dumps(text)} }}}}" for text in (RERANKER_PREFIX, RERANKER_SUFFIX))
    model = CrossEncoder(
        str(directory),
        model_kwargs={"dtype": getattr(torch, dtype)},
        processor_kwargs={"chat_template": prefix + body + suffix},
        max_length=MAX_LENGTH,
        device=device,
    )

    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        pairs = [(query, document) for document in documents]
        return model.predict(pairs, batch_size=batch_size or 32, show_progress_bar=False)

    return rerank


# onnxruntime: transformers' model exported to ONNX, float32; texts sorted by length in tokens, batches padded.


def _onnxruntime_embed(directory: Path, cache: Path) -> Embed:
    """An export of our own. optimum-onnx's last release needs transformers < 4.58, and its graph of Qwen3 needs
    position_ids, which sentence-transformers' backend="onnx" does not pass."""
    import onnxruntime
    from transformers import AutoTokenizer

    folder = _converted(directory, cache, "onnx", lambda target: _write_onnx(directory, target))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its threads slow the engine after it
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        sequences = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(sequences[i]))
        vectors = []
        for part in _split(order, batch_size or 32):
            batch = tokenizer.pad({"input_ids": [sequences[i] for i in part]}, return_tensors="np")
            vectors.append(session.run(None, dict(batch))[0])
        result = np.empty((len(texts), vectors[0].shape[1]), np.float32)
        result[order] = np.concatenate(vectors)
        return result

    return embed


class _PooledModel(torch.nn.Module):
    """The exported graph: ids and mask, left-padded, to unit vectors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return F.normalize(outputs.last_hidden_state[:, -1], p=2, dim=1)


def _write_onnx(directory: Path, folder: Path) -> None:
    """Write model.onnx. Opset 23 has operators for RMSNorm, RoPE and grouped-query attention, for which onnxruntime has
    CPU kernels."""
    import onnxscript  # noqa: F401 (torch.onnx needs it; if it is missing, fail before minutes of work)
    from transformers import AutoModel

    model = _PooledModel(AutoModel.from_pretrained(directory, dtype=torch.float32)).eval()
    input_ids = torch.arange(100, 151).view(3, 17)
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with torch.no_grad():
        torch.onnx.export(
            model,
            (input_ids, mask),
            folder / "model.onnx",
            dynamo=True,
            opset_version=23,
            external_data=True,
            optimize=False,  # onnxruntime does, in seconds
            input_names=["input_ids", "attention_mask"],
            dynamic_shapes=(dynamic, dynamic),
            verbose=False,
        )


# llama.cpp: GGUF with every matrix in one type, as convert_hf_to_gguf.py --outtype writes it, without a tokenizer: it
# gets our ids. Its graph multiplies every position by the whole lm_head, even where only embeddings are asked for.


def _llama_embed(directory: Path, gguf_type: str, cache: Path) -> Embed:
    run = _llama(directory, gguf_type, cache, reranker=False)
    tokenizer = Tokenizer(directory / "tokenizer.json")

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        pooled = run(tokenizer.embedding(texts, MAX_LENGTH), batch_size)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    return embed


def _llama_rerank(directory: Path, gguf_type: str, cache: Path) -> Rerank:
    run = _llama(directory, gguf_type, cache, reranker=True)
    tokenizer = Tokenizer(directory / "tokenizer.json")

    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        bodies = [RERANKER.fill(DEFAULT_TASK, query, document) for document in documents]
        return run(tokenizer.reranking(bodies, MAX_LENGTH), batch_size)[:, 0]

    return rerank


def _llama(
    directory: Path, gguf_type: str, cache: Path, *, reranker: bool, tokens: int = 512
) -> Callable[[list[list[int]], int | None], np.ndarray]:
    """Return a function from sequences of ids to pooled rows [n, H], or [n, 2] of a reranker (yes, no).

    Sequences are sorted by length and decoded in groups of at most ``tokens`` tokens, or of batch_size sequences.
    """
    import llama_cpp as ll

    folder = _converted(directory, cache, gguf_type, lambda target: _write_gguf(directory, target, gguf_type, reranker))
    ll.llama_log_set(_drop_log, ctypes.c_void_p(0))
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(folder / "model.gguf").encode(), ll.llama_model_default_params())
    context = ll.llama_init_from_model(model, _llama_options(ll, reranker, tokens))
    batch = ll.llama_batch_init(MAX_LENGTH, 0, 1)
    width = 2 if reranker else ll.llama_model_n_embd(model)

    def run(sequences: list[list[int]], batch_size: int | None) -> np.ndarray:
        rows = np.empty((len(sequences), width), np.float32)
        for group in _groups([len(ids) for ids in sequences], batch_size, tokens):
            flat = [(id_, position, i) for i, n in enumerate(group) for position, id_ in enumerate(sequences[n])]
            batch.n_tokens = len(flat)
            for k, (token, position, sequence) in enumerate(flat):
                batch.token[k], batch.pos[k], batch.n_seq_id[k], batch.logits[k] = token, position, 1, 1
                batch.seq_id[k][0] = sequence
            ll.llama_memory_clear(ll.llama_get_memory(context), False)
            if status := ll.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode: {status}")
            for i, n in enumerate(group):
                rows[n] = np.ctypeslib.as_array(ll.llama_get_embeddings_seq(context, i), (width,))
        return rows

    weakref.finalize(run, lambda: (ll.llama_batch_free(batch), ll.llama_free(context), ll.llama_model_free(model)))
    return run


def _llama_options(ll: ModuleType, reranker: bool, tokens: int) -> Any:
    options = ll.llama_context_default_params()
    options.n_ctx = options.n_batch = MAX_LENGTH
    options.n_ubatch = tokens
    options.n_seq_max = LLAMA_SEQUENCES
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.embeddings = options.kv_unified = True
    options.pooling_type = ll.LLAMA_POOLING_TYPE_RANK if reranker else ll.LLAMA_POOLING_TYPE_LAST
    return options


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _drop_log(*_: object) -> None:
    """Ignore a line of llama.cpp's log."""


def _groups(lengths: list[int], batch_size: int | None, tokens: int) -> list[list[int]]:
    """Indices by falling length, in groups of batch_size sequences or, without it, of at most ``tokens`` tokens.

    A sequence longer than that is a group of its own.
    """
    sequences = min(batch_size or LLAMA_SEQUENCES, LLAMA_SEQUENCES)
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = len(groups[-1]) == sequences if groups else True
        if full or used + lengths[i] > (MAX_LENGTH if batch_size else tokens):
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return groups


def _write_gguf(directory: Path, folder: Path, gguf_type: str, reranker: bool) -> None:
    import gguf

    model, tensors = open_model(directory, lm_head=reranker)
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    _write_gguf_config(writer, model.config, tensors.shape("embed_tokens.weight")[0])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, model.config.num_hidden_layers)
    for name in tensors:
        array = tensors[name].float().numpy()
        kind = gguf.GGMLQuantizationType[gguf_type if array.ndim == 2 else "F32"]
        target = names.get_name(name if name.startswith("lm_head") else f"model.{name}", try_suffixes=(".weight",))
        writer.add_tensor(target, gguf.quantize(array, kind), raw_dtype=kind)
    if reranker:
        yes_no = list(Tokenizer(directory / "tokenizer.json").yes_no())
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_tensor("cls.output.weight", tensors[model.lm_head_name][yes_no].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_gguf_config(writer: Any, config: Qwen3Config, vocab_size: int) -> None:
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
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(vocab_size)


def _converted(directory: Path, cache: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the cached folder of directory's weights in another format; if missing, write it, whole or not at all."""
    files = [
        (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(directory.glob("*.safetensors"))
    ]
    target = cache / f"{directory.name}-{name}-{hashlib.sha256(repr(files).encode()).hexdigest()[:8]}"
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(target)
    return target
