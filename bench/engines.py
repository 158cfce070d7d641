"""The engines that are compared: each opens one checkpoint directory in the official layout.

    openers = embedders(Path("Qwen3-Embedding-0.6B"), "float32")
    embed = openers["transformers"]()  # ImportError, with what is missing, where a package is not installed
    vectors = embed(["a text", "another"])  # the engine's own default batches
    vectors = embed(["a text", "another"], batch_size=1)

Every engine reads text and returns numpy on the host, so that a timed call includes tokenisation, batching and copies.
onnxruntime, OpenVINO and llama.cpp run on the CPU only and need the checkpoint in another format: the first opening
writes it, into a folder beside the checkpoint, and no timed call does. Packages are imported by what opens an engine:
no environment has them all.
"""

from __future__ import annotations

import atexit
import base64
import ctypes
import functools
import hashlib
import http.client
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Embed = Callable[..., np.ndarray]
"""(texts, batch_size=None) to unit vectors, float32 [n, H]. No prompt is added. A batch_size of None is the engine's
default; qwen3core, which plans its batches by tokens, takes no other."""
Rerank = Callable[..., np.ndarray]
"""(query, documents, batch_size=None) to P(yes) for the default instruction, float32 [n]."""

MAX_LENGTH = 8192
"""Tokens of a text, or of a query with its document and template; the rest is truncated."""
CACHE = "bench-cache"
"""Folder of converted checkpoints, beside the checkpoint."""
LLAMA_SEQUENCES = 64
"""Sequences that llama.cpp decodes at once, at most."""
PRODUCTS = "its matrix products alone"
CLIENTS = 16
"""Clients of a server, each with a request of one text at a time."""
SERVED_MODEL = "model"
SERVED_NAME = ("--served-model-name", SERVED_MODEL)


def embedders(
    directory: Path, dtype: str, *, device: str = "cpu", length: int = MAX_LENGTH
) -> dict[str, Callable[[], Embed]]:
    """Functions that open an engine, by its name: all engines that know this dtype and device."""
    cache = directory.parent / CACHE
    engines: dict[str, Callable[[], Embed]] = {
        "qwen3core": lambda: _qwen3core_embed(directory, dtype, device, length),
        "transformers": lambda: _transformers_embed(directory, dtype, device, length),
        "sentence-transformers": lambda: _sentence_transformers_embed(directory, dtype, device, length),
        "vLLM": lambda: _vllm_embed(directory, dtype, device, length),
    }
    if device == "cuda" and dtype != "float32":
        engines["transformers, flash-attention"] = lambda: _transformers_embed(
            directory, dtype, device, length, attention="flash_attention_2"
        )
    if device == "cpu":
        if dtype == "float32":  # bfloat16 weights are packed without being asked
            engines["qwen3core, prepacked"] = lambda: _qwen3core_embed(
                directory, dtype, device, length, ops="prepacked"
            )
        engines["qwen3core, batch_invariant"] = lambda: _qwen3core_embed(
            directory, dtype, device, length, ops="batch_invariant"
        )
        engines["qwen3core, int8"] = lambda: _qwen3core_embed(directory, "int8", device, length)
        engines["OpenVINO"] = lambda: _openvino_embed(directory, dtype, length, cache)
        engines["llama.cpp"] = lambda: _llama_embed(directory, dtype, length, cache)
        engines["llama.cpp Q8_0"] = lambda: _llama_embed(directory, "int8", length, cache)
    if device == "cpu" and dtype == "float32":  # its CPU kernels know no bfloat16
        engines["onnxruntime"] = lambda: _onnxruntime_embed(directory, length, cache)
    return engines


def rerankers(
    directory: Path, dtype: str, *, device: str = "cpu", length: int = MAX_LENGTH
) -> dict[str, Callable[[], Rerank]]:
    """Functions that open an engine, by its name: all engines that know this dtype and device."""
    cache = directory.parent / CACHE
    engines: dict[str, Callable[[], Rerank]] = {
        "qwen3core": lambda: _qwen3core_rerank(directory, dtype, device, length),
        "transformers": lambda: _transformers_rerank(directory, dtype, device, length),
        "transformers, last logits": lambda: _transformers_rerank(directory, dtype, device, length, logits=1),
        "sentence-transformers": lambda: _cross_encoder_rerank(directory, dtype, device, length),
        "vLLM": lambda: _vllm_rerank(directory, dtype, device, length),
    }
    if device == "cuda" and dtype != "float32":
        engines["transformers, last logits, flash-attention"] = lambda: _transformers_rerank(
            directory, dtype, device, length, logits=1, attention="flash_attention_2"
        )
    if device == "cpu":
        engines["llama.cpp"] = lambda: _llama_rerank(directory, dtype, length, cache)
        engines["llama.cpp Q8_0"] = lambda: _llama_rerank(directory, "int8", length, cache)
    return engines


def products(
    directory: Path, dtype: str, *, device: str = "cpu", length: int = MAX_LENGTH
) -> dict[str, Callable[[], Callable[[int], np.ndarray]]]:
    """The same for the model's matrix products, of a number of tokens; what they give is nothing to compare."""
    return {PRODUCTS: lambda: _products(directory, dtype, device)}


def served(
    directory: Path, dtype: str, *, device: str = "cpu", length: int = MAX_LENGTH
) -> dict[str, Callable[[], Embed]]:
    """qwen3core in one call, and servers, each asked by CLIENTS at a time."""
    place = ("--device", device)
    ours = ("qwen3core", "serve", f"{SERVED_MODEL}={directory}", "--max-length", str(length), *place)
    infinity = ("infinity_emb.cli", "v2", "--model-id", str(directory), "--url-prefix", "/v1", *place)
    plain = ("--no-bettertransformer", "--no-model-warmup")  # its warm-up is a batch of 32 texts of 512 tokens
    engines: dict[str, Callable[[], Embed]] = {
        "qwen3core": lambda: _qwen3core_embed(directory, dtype, device, length),
        "qwen3core, served": lambda: _served_embed(*ours, "--dtype", "auto" if dtype == "bfloat16" else dtype),
        "infinity, served": lambda: _served_embed(*infinity, *SERVED_NAME, "--dtype", dtype, *plain),
    }
    if device == "cpu":
        engines["vLLM, served"] = lambda: _vllm_served_embed(directory, dtype, device, length)
    return engines


OPENERS: dict[str, Callable[..., dict[str, Callable[[], Any]]]] = {
    "embed": embedders,
    "rerank": rerankers,
    "products": products,
    "served": served,
}


def _split(items: Sequence[Any], batch_size: int | None) -> list[Sequence[Any]]:
    size = batch_size or len(items)
    return [items[i : i + size] for i in range(0, len(items), size)]


# qwen3core: packed batches, planned by tokens. A bfloat16 checkpoint is opened with dtype="auto", as by default: on a
# CPU without bfloat16 instructions that is float32 arithmetic on the bfloat16 weights.


def _qwen3core_embed(directory: Path, dtype: str, device: str, length: int, ops: str = "auto") -> Embed:
    from qwen3core import Embedder

    stored = "auto" if dtype == "bfloat16" else dtype
    embedder = Embedder.from_pretrained(directory, dtype=stored, device=device, ops=ops, max_length=length)
    return lambda texts: embedder.encode(texts, prompt="")


def _qwen3core_rerank(directory: Path, dtype: str, device: str, length: int) -> Rerank:
    from qwen3core import Reranker

    stored = "auto" if dtype == "bfloat16" else dtype
    reranker = Reranker.from_pretrained(directory, dtype=stored, device=device, max_length=length)
    return lambda query, documents: reranker.predict([(query, document) for document in documents])


def _products(directory: Path, dtype: str, device: str) -> Callable[[int], np.ndarray]:
    """Random rows by random weights of the model's shapes; q, k and v as one, gate and up as one. On a CPU that
    has instructions for the dtype, the weights are in oneDNN's own layout: nothing else in PyTorch is as fast."""
    import torch
    from torch.nn import functional as F

    from qwen3core.config import Qwen3Config

    config = Qwen3Config.from_file(directory / "config.json")
    heads, key_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = [(heads + 2 * key_heads, hidden), (hidden, heads), (2 * wide, hidden), (hidden, wide)]
    kind = getattr(torch, dtype)
    weights = [torch.randn(shape, device=device, dtype=kind) for shape in shapes * config.num_hidden_layers]
    widths = [weight.shape[1] for weight in weights]
    packed = device == "cpu" and (kind == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if packed:
        weights = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]

    @functools.cache
    def rows(tokens: int, width: int) -> torch.Tensor:
        return torch.randn(tokens, width, device=device, dtype=kind)

    @torch.no_grad()
    def run(tokens: int) -> np.ndarray:
        for width, weight in zip(widths, weights, strict=True):
            if packed:
                torch.ops.mkldnn._linear_pointwise(rows(tokens, width), weight, None, "none", [], "")
            else:
                F.linear(rows(tokens, width), weight)
        if device == "cuda":
            torch.cuda.synchronize()
        return np.zeros(0)

    return run


# transformers: the model cards' code. Without batch_size all texts are one padded batch, as in the cards. The only
# change is no_grad around the embedding model, which its card leaves out.


def _transformers_embed(directory: Path, dtype: str, device: str, length: int, attention: str | None = None) -> Embed:
    import torch
    from torch.nn import functional as F
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModel.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation=attention)
    model.to(device).eval()

    @torch.no_grad()
    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        vectors = []
        for part in _split(texts, batch_size):
            batch = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
            outputs = model(**batch)
            pooled = _last_token_pool(outputs.last_hidden_state, batch["attention_mask"])
            vectors.append(F.normalize(pooled, p=2, dim=1).float().cpu().numpy())
        return np.concatenate(vectors)

    return embed


def _last_token_pool(last_hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The hidden state of each text's last token; copied from the model card."""
    import torch

    if attention_mask[:, -1].sum() == attention_mask.shape[0]:  # left-padded
        return last_hidden_states[:, -1]
    lengths = attention_mask.sum(dim=1) - 1
    return last_hidden_states[torch.arange(len(lengths), device=last_hidden_states.device), lengths]


def _transformers_rerank(
    directory: Path, dtype: str, device: str, length: int, logits: int = 0, attention: str | None = None
) -> Rerank:
    """The model card's code: it forms the logits of every position, [n, L, vocabulary], and uses the last.

    logits: form those of as many last positions; 0: all.
    """
    import torch
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qwen3core.prompts import DEFAULT_TASK, NO, RERANKER, RERANKER_PREFIX, RERANKER_SUFFIX, YES

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    kind = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **kind)
    model.to(device).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(token) for token in (YES, NO))
    prefix, suffix = (tokenizer.encode(text, add_special_tokens=False) for text in (RERANKER_PREFIX, RERANKER_SUFFIX))
    body_length = length - len(prefix) - len(suffix)

    @torch.no_grad()
    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        scores = []
        for part in _split([RERANKER.fill(DEFAULT_TASK, query, document) for document in documents], batch_size):
            inputs = tokenizer(
                part, padding=False, truncation="longest_first", return_attention_mask=False, max_length=body_length
            )
            inputs["input_ids"] = [prefix + ids + suffix for ids in inputs["input_ids"]]
            inputs = tokenizer.pad(inputs, padding=True, return_tensors="pt", max_length=length).to(device)
            last = model(**inputs, logits_to_keep=logits).logits[:, -1, :]
            pair = torch.stack([last[:, no], last[:, yes]], dim=1)
            scores.append(F.log_softmax(pair, dim=1)[:, 1].exp().float().cpu().numpy())
        return np.concatenate(scores)

    return rerank


# sentence-transformers: sorts by length in characters, pads each batch (32 by default), and in its cross-encoder forms
# only the last position's logits.


def _sentence_transformers_embed(directory: Path, dtype: str, device: str, length: int) -> Embed:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), model_kwargs={"dtype": getattr(torch, dtype)}, device=device)
    model.max_seq_length = length

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        return model.encode(texts, prompt="", batch_size=batch_size or 32, show_progress_bar=False)

    return embed


def _cross_encoder_rerank(directory: Path, dtype: str, device: str, length: int) -> Rerank:
    """The checkpoint's own template and score, which is a logit."""
    import torch
    from sentence_transformers import CrossEncoder

    kind = {"dtype": getattr(torch, dtype)}
    sigmoid = torch.nn.Sigmoid()
    model = CrossEncoder(str(directory), model_kwargs=kind, max_length=length, device=device, activation_fn=sigmoid)

    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        pairs = [(query, document) for document in documents]
        return model.predict(pairs, batch_size=batch_size or 32, show_progress_bar=False)

    return rerank


# Servers, in a process of their own beside the clients, of the worker's environment.


def _served_embed(module: str, *arguments: str) -> Embed:
    importlib.import_module(module.partition(".")[0])  # or it is not installed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", module, *arguments, "--port", str(port)], start_new_session=True)
    atexit.register(os.killpg, server.pid, signal.SIGKILL)  # with the processes that it started
    while not _healthy(port):
        if server.poll() is not None:
            raise RuntimeError(f"{module}: its server ended with {server.returncode}")
        time.sleep(0.5)

    def client(left: Iterator[tuple[int, str]]) -> list[tuple[int, np.ndarray]]:
        connection, found = http.client.HTTPConnection("127.0.0.1", port), []
        for index, text in left:  # of all clients
            body = json.dumps({"model": SERVED_MODEL, "input": text, "encoding_format": "base64"})
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            [item] = json.load(connection.getresponse())["data"]
            found.append((index, np.frombuffer(base64.b64decode(item["embedding"]), np.float32)))
        connection.close()
        return found

    def embed(texts: list[str]) -> np.ndarray:
        left = enumerate(texts)
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = [pair for pairs in pool.map(client, [left] * CLIENTS) for pair in pairs]
        return np.stack([vector for _, vector in sorted(found, key=lambda pair: pair[0])])

    return embed


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# vLLM: its own scheduler and kernels, on a CPU bound to the cores that it may use. It compiles the model at the first
# opening, and finds the result in its cache later: slower to open than enforce_eager=True, faster at every workload.


def _vllm(directory: Path, dtype: str, device: str, length: int, **options: Any) -> Any:
    """An LLM."""
    _vllm_environment(dtype, device, length)
    if device != "cpu":
        options["gpu_memory_utilization"] = 0.4  # other engines are open at the same time
    from vllm import LLM

    return LLM(str(directory), runner="pooling", dtype=dtype, max_model_len=length, seed=0, **options)


def _vllm_environment(dtype: str, device: str, length: int) -> None:
    """Its manual asks for the preloaded libraries on a CPU, which the process of its engine inherits."""
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # vLLM 0.32 cannot load what that stored, and compiles at every opening
    if device != "cpu":
        return
    library = Path(sys.prefix) / "lib"
    found = [*library.glob("libtcmalloc*.so*"), *library.glob("libiomp5.so")]
    os.environ["LD_PRELOAD"] = ":".join(map(str, found))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    gigabytes = length // MAX_LENGTH * (2 if dtype == "float32" else 1)  # keys and values of one text of MAX_LENGTH
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, gigabytes))


def _vllm_embed(directory: Path, dtype: str, device: str, length: int) -> Embed:
    model = _vllm(directory, dtype, device, length)

    def embed(texts: list[str]) -> np.ndarray:
        found = model.embed(texts, use_tqdm=False)
        return np.array([output.outputs.embedding for output in found], np.float32)

    return _forgetful(model, embed)


def _vllm_served_embed(directory: Path, dtype: str, device: str, length: int) -> Embed:
    """Without the cache of prefixes, which ``_forgetful`` cannot reach there."""
    _vllm_environment(dtype, device, length)
    model = ("--model", str(directory), "--max-model-len", str(length), "--dtype", dtype, "--runner", "pooling")
    return _served_embed("vllm.entrypoints.openai.api_server", *model, *SERVED_NAME, "--no-enable-prefix-caching")


def _vllm_rerank(directory: Path, dtype: str, device: str, length: int) -> Rerank:
    """The model card's code for vLLM's score. Blocks of 128 tokens, its default, would be longer than what documents
    share, which is 72 tokens or so."""
    from qwen3core.prompts import DEFAULT_TASK, NO, RERANKER_BODY, RERANKER_PREFIX, RERANKER_SUFFIX, YES

    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": [NO, YES],
        "is_original_qwen3_reranker": True,
    }
    model = _vllm(directory, dtype, device, length, hf_overrides=overrides, enable_prefix_caching=True, block_size=32)
    start, mark, rest = (RERANKER_PREFIX + RERANKER_BODY + RERANKER_SUFFIX).partition("<Document>")

    def rerank(query: str, documents: list[str]) -> np.ndarray:
        filled = start.format(instruction=DEFAULT_TASK, query=query)
        found = model.score(filled, [mark + rest.format(document=document) for document in documents], use_tqdm=False)
        return np.array([output.outputs.score for output in found], np.float32)

    return _forgetful(model, rerank)


def _forgetful(model: Any, run: Any) -> Any:
    run.forget = model.reset_prefix_cache
    return run


# OpenVINO and onnxruntime: our exports (qwen3core/export); texts sorted by length in tokens, batches padded.


def _openvino_embed(directory: Path, dtype: str, length: int, cache: Path) -> Embed:
    import openvino

    folder = _exported(directory, cache, "openvino", "openvino", "float32")
    hint = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    model = openvino.compile_model(folder / "openvino" / "openvino_model.xml", "CPU", hint)
    return _sorted_batches(directory, length, lambda batch: model(batch)["sentence_embedding"])


def _onnxruntime_embed(directory: Path, length: int, cache: Path) -> Embed:
    import onnxruntime

    path = _exported(directory, cache, "onnx", "onnx", "float32") / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _sorted_batches(directory, length, lambda batch: session.run(["sentence_embedding"], batch)[0])


def _sorted_batches(directory: Path, length: int, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Embed:
    """Left-padded batches, longest texts first, 32 by default; ``run`` gives a batch's unit vectors."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        sequences = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: -len(sequences[i]))
        parts = [
            tokenizer.pad({"input_ids": [sequences[i] for i in part]}, return_tensors="np")
            for part in _split(order, batch_size or 32)
        ]
        vectors = np.concatenate([run(dict(part)) for part in parts])
        return vectors[np.argsort(order)]

    return embed


# llama.cpp: our export to GGUF, every matrix in one type; it gets our ids. Its graph multiplies every position by the
# whole lm_head, even where only embeddings are asked for.


def _llama_embed(directory: Path, dtype: str, length: int, cache: Path) -> Embed:
    from qwen3core import Tokenizer

    run = _llama(directory, dtype, length, cache, reranker=False)
    tokenizer = Tokenizer(directory / "tokenizer.json")

    def embed(texts: list[str], batch_size: int | None = None) -> np.ndarray:
        pooled = run(tokenizer.embedding(texts, length), batch_size)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    return embed


def _llama_rerank(directory: Path, dtype: str, length: int, cache: Path) -> Rerank:
    from qwen3core import Tokenizer
    from qwen3core.prompts import DEFAULT_TASK, RERANKER

    run = _llama(directory, dtype, length, cache, reranker=True)
    tokenizer = Tokenizer(directory / "tokenizer.json")

    def rerank(query: str, documents: list[str], batch_size: int | None = None) -> np.ndarray:
        bodies = [RERANKER.fill(DEFAULT_TASK, query, document) for document in documents]
        return run(tokenizer.reranking(bodies, length), batch_size)[:, 0]

    return rerank


def _llama(
    directory: Path, dtype: str, length: int, cache: Path, *, reranker: bool, tokens: int = 512
) -> Callable[[list[list[int]], int | None], np.ndarray]:
    """Return a function from sequences of ids to pooled rows [n, H], or [n, 2] of a reranker (yes, no).

    Sequences are sorted by length and decoded in groups of at most ``tokens`` tokens, or of batch_size sequences.
    """
    import llama_cpp as ll

    folder = _exported(directory, cache, f"gguf-{dtype}", "gguf", dtype)
    ll.llama_log_set(_drop_log, ctypes.c_void_p(0))
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(folder / "model.gguf").encode(), ll.llama_model_default_params())
    context = ll.llama_init_from_model(model, _llama_options(ll, reranker, length, tokens))
    batch = ll.llama_batch_init(length, 0, 1)
    width = 2 if reranker else ll.llama_model_n_embd(model)

    def run(sequences: list[list[int]], batch_size: int | None) -> np.ndarray:
        rows = np.empty((len(sequences), width), np.float32)
        for group in _groups([len(ids) for ids in sequences], batch_size, length, tokens):
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


def _llama_options(ll: ModuleType, reranker: bool, length: int, tokens: int) -> Any:
    import torch

    options = ll.llama_context_default_params()
    options.n_ctx = options.n_batch = length
    options.n_ubatch = tokens
    options.n_seq_max = LLAMA_SEQUENCES
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.embeddings = options.kv_unified = True
    options.pooling_type = ll.LLAMA_POOLING_TYPE_RANK if reranker else ll.LLAMA_POOLING_TYPE_LAST
    return options


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _drop_log(*_: object) -> None:
    """Ignore a line of llama.cpp's log."""


def _groups(lengths: list[int], batch_size: int | None, length: int, tokens: int) -> list[list[int]]:
    """Indices by falling length, in groups of batch_size sequences or, without it, of at most ``tokens`` tokens.

    A sequence longer than that is a group of its own.
    """
    sequences = min(batch_size or LLAMA_SEQUENCES, LLAMA_SEQUENCES)
    groups: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = len(groups[-1]) == sequences if groups else True
        if full or used + lengths[i] > (length if batch_size else tokens):
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return groups


def _exported(directory: Path, cache: Path, name: str, format: str, dtype: str) -> Path:
    """The cached folder of directory's weights in another format: its folder, or ``model.gguf`` in it."""
    from qwen3core.export import export

    file = "model.gguf" if format == "gguf" else "."
    return _converted(directory, cache, name, lambda x: export(directory, x / file, format=format, dtype=dtype))


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
