"""Checkpoints whose decoder stands in other surroundings, the numbers that they declare, and ours.

A change writes files into the directory of a checkpoint. ``truth`` is sentence-transformers' or transformers' answer to
the questions that ``ours`` answers. Nothing here knows qwen3core's reading of the files.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from checkpoint_files import edit_json, edit_tensors
from safetensors.torch import load_file, save_file
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from torch import Tensor

from qwen3core import Embedder, InputError, Reranker, prompts
from qwen3core.weights.synthesize import LAYOUTS, Layout, synthesize

WIDTH = 32
TEMPLATE = "chat_template.jinja"
TEXTS = [
    "The capital of China is Beijing.",
    "Gravity pulls two bodies towards each other, and planets around the sun; UPPER case, Ünïcode, 北京.\n",
    "What is gravity?",
    " ",
]
PAIRS = [
    ("What is the capital of China?", TEXTS[0]),
    ("What is the capital of China?", TEXTS[1]),
    ("Explain Gravity", TEXTS[1] * 4),
    ("", "x"),
]
PROMPT = "Instruct: find\nQuery:"
INSTRUCTION = "Find case law that supports the claim"

OFFICIAL = """\
{%- set instruction = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}
{%- set query_text = messages | selectattr("role", "eq", "query") | map(attribute="content") | first -%}
{%- set document_text = messages | selectattr("role", "eq", "document") | map(attribute="content") | first -%}
<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer \
can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ instruction | default(DEFAULT) }}
<Query>: {{ query_text }}
<Document>: {{ document_text }}<|im_end|>
<|im_start|>assistant
<think>

</think>


""".replace("DEFAULT", json.dumps(prompts.DEFAULT_TASK))  # jinja2 drops the last newline

QUERY_IN_SYSTEM = """\
<|im_start|>system
{{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}<|im_end|>
<|im_start|>user
{{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant

"""

LOOP = """\
{%- for message in messages %}
    {%- if message.role == "system" %}
{{- "<|im_start|>system\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif message.role == "query" %}
{{- "<|im_start|>user\\nQ: " + message.content + "\\n" }}
    {%- else %}
{{- "D: " + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
<|im_start|>assistant
"""

STRUCTURED = OFFICIAL.replace('map(attribute="content")', 'map(attribute="content.0.text")').replace(
    "{%- set instruction", '{#- content[0]["type"] == "text" #}{%- set instruction', 1
)

DOCUMENT_FIRST = """\
<|im_start|>user
{% set names = {"query": "Query", "document": "Passage"} %}
{%- for role in ("document", "query") %}

{{ names[role] }}: {{ messages | selectattr("role", "eq", role) | map(attribute="content") | first }}
{%- endfor %}
<|im_end|>
<|im_start|>assistant
{% if add_generation_prompt %}<think>{% endif %}"""

TEMPLATES = {
    "official": OFFICIAL,
    "other words": OFFICIAL.replace("meets the requirements", "answers"),
    "query in system turn": QUERY_IN_SYSTEM,
    "loop over messages": LOOP,
    "lists of parts": STRUCTURED,
    "document first": DOCUMENT_FIRST,
}
"""Chat templates that put the pair, as it is, between fixed texts."""

ST = "sentence_transformers"
SPELLINGS = {
    "Transformer": (f"{ST}.base.modules.transformer.Transformer", f"{ST}.models.Transformer"),
    "Pooling": (f"{ST}.sentence_transformer.modules.pooling.Pooling", f"{ST}.models.Pooling"),
    "Dense": (f"{ST}.base.modules.dense.Dense", f"{ST}.models.Dense"),
    "Normalize": (f"{ST}.base.modules.normalize.Normalize", f"{ST}.models.Normalize"),
    "Dropout": (f"{ST}.sentence_transformer.modules.dropout.Dropout", f"{ST}.models.Dropout"),
    "LayerNorm": (f"{ST}.sentence_transformer.modules.layer_norm.LayerNorm", f"{ST}.models.LayerNorm"),
    "LogitScore": (f"{ST}.cross_encoder.modules.logit_score.LogitScore",) * 2,
    "MultiVectorMask": (f"{ST}.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",) * 2,
}
"""Classes of modules.json: today's paths, and those of sentence-transformers 5 and before."""

Change = Callable[[Path], Any]
Module = tuple[str, dict[str, Any]]


def base(directory: Path, kind: str = "embedding") -> Path:
    """A float32 checkpoint of 100 KB: an embedder in the official layout, or a decoder that declares nothing."""
    config = replace(
        LAYOUTS[f"Qwen3-{kind.capitalize()}-small"].config,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32768,
        dtype="float32",
    )
    synthesize(directory, Layout(config, kind))
    if kind == "reranker":
        for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", TEMPLATE):
            (directory / name).unlink()
        shutil.rmtree(directory / "1_LogitScore")
    return directory


def copy(source: Path, directory: Path) -> Path:
    """A checkpoint to change; the weights are the same file until ``weights`` replaces it."""
    return Path(shutil.copytree(source, directory, copy_function=_copy))


def _copy(source: str, target: str) -> None:
    (os.link if source.endswith(".safetensors") else shutil.copyfile)(source, target)


def write(directory: Path, name: str, data: object) -> None:
    """A file of text, or of JSON."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data, indent=1), encoding="utf-8")


def edit(directory: Path, name: str, *removed: str, **changed: object) -> None:
    """Change keys of a JSON file, new where there is none."""
    if not (directory / name).exists():
        write(directory, name, {})
    edit_json(directory / name, *removed, **changed)


def weights(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Other tensors."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    file.unlink()  # it may be a link to the weights of another checkpoint
    file.write_bytes(content)
    edit_tensors(file, change)


def random(*shape: int, seed: int = 0, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def modules(directory: Path, *chain: Module, legacy: bool = False, seed: int = 0) -> None:
    """modules.json: a Transformer, then (class, config) each, with the weights of Dense and LayerNorm."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": SPELLINGS["Transformer"][legacy]}]
    for i, (name, config) in enumerate(chain, 1):
        folder = f"{i}_{name}"
        entries.append({"idx": i, "name": str(i), "path": folder, "type": SPELLINGS[name][legacy]})
        write(directory, f"{folder}/config.json", config)
        if name == "Dense":
            _write_dense(directory / folder, config, seed + 10 * i)
        elif name == "LayerNorm":
            tensors = {f"norm.{key}": random(config["dimension"], seed=seed) for key in ("weight", "bias")}
            save_file(tensors, directory / folder / "model.safetensors")
    write(directory, "modules.json", entries)


def _write_dense(folder: Path, config: dict[str, Any], seed: int) -> None:
    rows, columns = config["out_features"], config["in_features"]
    tensors = {"linear.weight": random(rows, columns, seed=seed)}
    if config.get("bias", True):
        tensors["linear.bias"] = random(rows, seed=seed + 1)
    if config.get("use_residual") and rows != columns:
        tensors["residual.weight"] = random(rows, columns, seed=seed + 2)
    save_file(tensors, folder / "model.safetensors")


def pooling(mode: object = "lasttoken", **more: object) -> Module:
    return "Pooling", {"embedding_dimension": WIDTH, "pooling_mode": mode, **more}


def dense(columns: int, rows: int, activation: str = "Tanh", **more: object) -> Module:
    path = f"torch.nn.modules.{'linear' if activation == 'Identity' else 'activation'}.{activation}"
    return "Dense", {"in_features": columns, "out_features": rows, "activation_function": path, **more}


NORMALIZE: Module = ("Normalize", {})


def closing(directory: Path, *tokens: str, opening: Iterable[str] = ()) -> None:
    """The tokens that tokenizer.json puts around a text."""
    path = directory / "tokenizer.json"
    tok = tokenizers.Tokenizer.from_file(str(path))
    apart = [(token, tok.token_to_id(token)) for token in {*opening, *tokens}]
    template = TemplateProcessing(single=[*opening, "$A", *tokens], special_tokens=apart)
    tok.post_processor = Sequence([ByteLevel(trim_offsets=False), *([template] if apart else [])])
    tok.save(str(path))


def token_id(directory: Path, token: str) -> int:
    found = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id(token)
    assert found is not None, token
    return found


def cross_encoder(
    directory: Path,
    *chain: Module,
    task: str,
    output: tuple[str, str],
    template: str = OFFICIAL,
    prompts: dict[str, str | None] | None = None,
    default: str | None = None,
    activation: str | None = None,
    **transformer: object,
) -> None:
    """The files of a CrossEncoder around its modules; prompts by name, and the one that is used by default."""
    modules(directory, *chain)
    method = {"method": "forward", "method_output_name": output[0]}
    modality = {"text": method, "message": {**method, "format": "structured" if "content[0]" in template else "flat"}}
    settings: dict[str, Any] = {"transformer_task": task, "modality_config": modality, "module_output_name": output[1]}
    write(directory, "sentence_bert_config.json", settings | transformer)
    settings = {"model_type": "CrossEncoder", "prompts": prompts or {}, "default_prompt_name": default}
    if activation:
        settings["activation_fn"] = f"torch.nn.modules.{activation}"
    write(directory, "config_sentence_transformers.json", settings)
    write(directory, TEMPLATE, template)


def logit_score(directory: Path, yes: str = "yes", no: str | None = "no", **options: Any) -> None:
    """The official rerankers' files since spring 2026: the score is a logit, or the difference of two."""
    ids = {"true_token_id": token_id(directory, yes), "false_token_id": token_id(directory, no) if no else None}
    options = {"activation": "linear.Identity"} | options
    cross_encoder(directory, ("LogitScore", ids), task="text-generation", output=("logits", "causal_logits"), **options)


def pooled_score(directory: Path, *chain: Module, **options: Any) -> None:
    """A CrossEncoder of Pooling and Dense, which gives the score."""
    output = ("last_hidden_state", "token_embeddings")
    cross_encoder(directory, *chain, task="feature-extraction", output=output, **options)


def classifier(directory: Path, labels: int = 1, *, declared: bool = True, **options: Any) -> None:
    """Qwen3ForSequenceClassification: a score head; declared: with the files of a CrossEncoder, not alone."""
    names = {str(i): name for i, name in enumerate(("bad", "fair", "good")[:labels])}
    config = {"architectures": ["Qwen3ForSequenceClassification"], "id2label": names, "num_labels": labels}
    edit(directory, "config.json", **config, label2id={name: int(i) for i, name in names.items()})
    weights(directory, lambda tensors: tensors.update({"score.weight": random(labels, WIDTH)}))
    if declared:
        cross_encoder(directory, task="sequence-classification", output=("logits", "scores"), **options)


def late_interaction(directory: Path, width: int = 24, mask: dict[str, Any] | None = None, **settings: object) -> None:
    """ColBERT-style: a vector of every token."""
    of_tokens = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    projection = dense(WIDTH, width, "Identity", bias=False, **of_tokens)
    modules(directory, projection, ("Normalize", of_tokens), ("MultiVectorMask", mask or {}))
    shutil.rmtree(directory / "1_Pooling", ignore_errors=True)
    stored = {"query": "[Q] ", "document": "[D] "}
    settings = {"model_type": "MultiVectorEncoder", "prompts": stored, "similarity_fn_name": "maxsim"} | settings
    write(directory, "config_sentence_transformers.json", settings)


def adapter(directory: Path, target: Path | None = None, **changed: object) -> None:
    """A LoRA of q_proj and down_proj, in peft's layout, for the checkpoint itself or for another."""
    tensors = load_file(directory / "model.safetensors")
    lora, rank = {}, 4
    for i, (name, weight) in enumerate(sorted(tensors.items())):
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            lora[f"{prefix}.lora_A.weight"] = random(rank, weight.shape[1], seed=i)
            lora[f"{prefix}.lora_B.weight"] = random(weight.shape[0], rank, seed=100 + i)
    save_file(lora, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config |= {"base_model_name_or_path": str(target or directory), "task_type": "FEATURE_EXTRACTION", "bias": "none"}
    write(directory, "adapter_config.json", {**config, "inference_mode": True, **changed})


# What sentence-transformers and transformers compute, and what we do: a list of arrays each.


def embedding_truth(directory: Path, texts: list[str] = TEXTS) -> list[np.ndarray]:
    """Vectors of encode, encode with a prompt, encode_query and encode_document, and similarities.

    A cut to ``truncate_dim`` comes after Normalize in sentence-transformers; we normalise again, as the model cards do.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    names = [
        module["type"].rpartition(".")[2] for module in json.loads((directory / "modules.json").read_text("utf-8"))
    ]
    unit = [name for name in names if name != "Dropout"][-1] == "Normalize"
    options: dict[str, Any] = {"normalize_embeddings": unit}
    plain, prompted = model.encode(texts, **options), model.encode(texts, prompt=PROMPT, **options)
    queries, documents = model.encode_query(texts, **options), model.encode_document(texts, **options)
    return [plain, prompted, queries, documents, model.similarity(queries, documents).numpy()]


def embedding_ours(directory: Path, texts: list[str] = TEXTS, **options: Any) -> list[np.ndarray]:
    model = Embedder.from_pretrained(directory, device="cpu", **options)
    queries, documents = model.encode_query(texts), model.encode_document(texts)
    similarity = model.similarity(queries, documents).numpy()
    return [model.encode(texts), model.encode(texts, prompt=PROMPT), queries, documents, similarity]


def reranker_truth(directory: Path, pairs: list[tuple[str, str]] = PAIRS) -> list[np.ndarray]:
    """Scores by the default instruction, and by another; of LogitScore the sigmoid.

    Where modules.json is missing, transformers' score of the model card's template.
    """
    if not (directory / "modules.json").exists():
        return model_card_scores(directory, pairs)
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    options: dict[str, Any] = {"activation_fn": torch.nn.Sigmoid() if "LogitScore" in repr(model) else None}
    options["batch_size"] = 1  # a score head reads padding where the tokenizer's pad_token is not config.json's
    return [model.predict(pairs, **options), model.predict(pairs, prompt=INSTRUCTION, **options)]


def model_card_scores(directory: Path, pairs: list[tuple[str, str]] = PAIRS) -> list[np.ndarray]:
    """The model card's template by transformers, one sequence at a time; the sigmoid of a single number."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    model: Any
    if config["architectures"] == ["Qwen3ForSequenceClassification"]:
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def score(instruction: str, query: str, document: str) -> Tensor:
        body = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        parts = (prompts.RERANKER_PREFIX, body, prompts.RERANKER_SUFFIX)
        ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        logits = logits if logits.dim() == 1 else logits[-1, yes] - logits[-1, no]
        return logits.flatten()[0].sigmoid() if logits.numel() == 1 else logits

    tasks = (prompts.DEFAULT_TASK, INSTRUCTION)
    return [torch.stack([score(task, *pair) for pair in pairs]).numpy() for task in tasks]


def reranker_ours(directory: Path, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> list[np.ndarray]:
    model = Reranker.from_pretrained(directory, device="cpu", **options)
    scores = [model.predict(pairs)]
    with contextlib.suppress(InputError):  # where the template has no place for an instruction
        scores.append(model.predict(pairs, instruction=INSTRUCTION))
    return scores


def late_truth(directory: Path, texts: list[str] = TEXTS) -> list[np.ndarray]:
    """The vectors of all tokens of queries, of documents and of texts without a task, then MaxSim."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(directory), device="cpu", local_files_only=True)
    found = [model.encode_query(texts), model.encode_document(texts), model.encode(texts)]
    vectors = [torch.cat([torch.as_tensor(vectors) for vectors in rows]).numpy() for rows in found]
    return [*vectors, model.similarity(*found[:2]).numpy()]


def late_ours(directory: Path, texts: list[str] = TEXTS, **options: Any) -> list[np.ndarray]:
    model = Embedder.from_pretrained(directory, device="cpu", **options)
    found = [model.encode_tokens(texts, task=task) for task in ("query", "document", None)]
    return [*(tokens.vectors.numpy() for tokens in found), model.similarity(*found[:2]).numpy()]


TRUTH: dict[str, Callable[..., list[np.ndarray]]] = {
    "embedding": embedding_truth,
    "reranker": reranker_truth,
    "late interaction": late_truth,
}
OURS: dict[str, Callable[..., list[np.ndarray]]] = {
    "embedding": embedding_ours,
    "reranker": reranker_ours,
    "late interaction": late_ours,
}


def difference(ours: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest value of an array that is not within 1 (no unit vectors, sums).

    Infinite where a shape differs or a number is not finite. Only the first arrays are compared where ours are fewer.
    """
    found = 0.0
    for mine, true in zip(ours, truth, strict=False):
        if mine.shape != true.shape or not (np.isfinite(mine).all() and np.isfinite(true).all()):
            return np.inf
        found = max(found, float(np.abs(mine.astype(np.float64) - true).max() / max(1.0, np.abs(true).max())))
    return found
