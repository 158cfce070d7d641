"""Whatever surrounds the decoder: the numbers of sentence-transformers or transformers, or a refusal that says why.

A row of ``HONOURED`` is a checkpoint whose numbers are compared with its truth; a row of ``REFUSED`` one that is not
opened. The table of weights/README.md has the same rows. test_layouts_mutations.py plants mistakes under ``check``.
"""

import functools
import json
import warnings
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import layouts
import numpy as np
import pytest
from checkpoint_files import clear
from layouts import (
    NORMALIZE,
    OFFICIAL,
    TEMPLATES,
    WIDTH,
    adapter,
    classifier,
    closing,
    copy,
    dense,
    edit,
    late_interaction,
    logit_score,
    modules,
    pooled_score,
    pooling,
    random,
    token_id,
    weights,
    write,
)
from tolerances import EMBEDDING_FP32, SCORE_FP32

from qwen3core import CheckpointError, Embedder, Reranker

pytest.importorskip("sentence_transformers")

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
LEGACY = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
TOLERANCE = {"embedding": EMBEDDING_FP32, "reranker": SCORE_FP32, "late interaction": EMBEDDING_FP32}


def edited(name, *removed, **changed):
    return lambda d: edit(d, name, *removed, **changed)


in_config = partial(edited, "config.json")
in_settings = partial(edited, "config_sentence_transformers.json")
in_transformer = partial(edited, "sentence_bert_config.json")


def closed(*tokens, **options):
    return lambda d: closing(d, *tokens, **options)


def steps(*changes: layouts.Change) -> layouts.Change:
    def change(d):
        for step in changes:
            step(d)

    return change


def chain(*modules_, **options):
    return lambda d: modules(d, *modules_, **options)


def legacy_pooling(**flags):
    keys = {f"pooling_mode_{key}": flags.get(mode, False) for key, mode in zip(LEGACY, MODES, strict=True)}
    return "Pooling", {"word_embedding_dimension": WIDTH, **keys}


def of_transformer(**more):
    """sentence_bert_config.json, as sentence-transformers 6 writes it."""
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    whole = {"transformer_task": "feature-extraction", "modality_config": {"text": text}}
    return lambda d: write(d, "sentence_bert_config.json", {**whole, "module_output_name": "token_embeddings", **more})


def untied(d):
    logit_score(d)
    weights(d, lambda t: t.update({"lm_head.weight": random(*t["model.embed_tokens.weight"].shape, seed=1)}))


def adapter_alone(d):
    """A directory of the adapter, with the files of sentence-transformers; its base lies elsewhere."""
    base = copy(d, d.with_name(d.name + "-base"))
    adapter(d, base)
    for name in ("config.json", "model.safetensors"):
        (d / name).unlink()


def adapter_of_nothing(d):
    adapter(d, d / "nowhere")
    (d / "model.safetensors").unlink()


def template_in_tokenizer_config(d):
    logit_score(d)
    edit(d, "tokenizer_config.json", chat_template=(d / "chat_template.jinja").read_text("utf-8"))
    (d / "chat_template.jinja").unlink()


SCORE = dense(WIDTH, 1, "Identity", bias=False, module_output_name="scores")
DEFAULT: dict[str, Any] = {"prompts": {"query": "Find what helps"}, "default": "query"}

HONOURED: dict[str, tuple[str, layouts.Change]] = {
    # embedding
    "official": ("embedding", lambda d: None),
    **{f"pooling {mode}": ("embedding", chain(pooling(mode), NORMALIZE)) for mode in MODES},
    "pooling of several": ("embedding", chain(pooling(["mean", "lasttoken", "cls"]), NORMALIZE)),
    **{f"pooling, legacy key {m}": ("embedding", chain(legacy_pooling(**{m: True}), NORMALIZE)) for m in MODES},
    "pooling, legacy keys, several": ("embedding", chain(legacy_pooling(mean=True, lasttoken=True), NORMALIZE)),
    "pooling, legacy keys, none": ("embedding", chain(legacy_pooling(), NORMALIZE)),
    "pooling, old and new keys": (
        "embedding",
        chain(("Pooling", {**legacy_pooling(cls=True)[1], "pooling_mode": "max"}), NORMALIZE),
    ),
    **{
        f"prompt not pooled, {mode}": ("embedding", chain(pooling(mode, include_prompt=False), NORMALIZE))
        for mode in ("cls", "max", "mean", "weightedmean", "lasttoken")
    },
    "old classes of modules.json": ("embedding", chain(pooling("mean"), NORMALIZE, legacy=True)),
    "no Normalize": ("embedding", chain(pooling())),
    "no Normalize, mean": ("embedding", chain(pooling("mean"))),
    "Dropout": ("embedding", chain(pooling(), ("Dropout", {"dropout": 0.5}), NORMALIZE)),
    "Dense": ("embedding", chain(pooling(), dense(WIDTH, 24), NORMALIZE)),
    "Dense, old class": ("embedding", chain(pooling(), dense(WIDTH, 24), NORMALIZE, legacy=True)),
    "Dense, identity, no bias": ("embedding", chain(pooling(), dense(WIDTH, WIDTH, "Identity", bias=False))),
    "Dense of several poolings": ("embedding", chain(pooling(["max", "mean"]), dense(2 * WIDTH, 40), NORMALIZE)),
    "Dense, residual": (
        "embedding",
        chain(pooling(), dense(WIDTH, 48, "GELU", use_residual=True), dense(48, 48, "ReLU", use_residual=True)),
    ),
    "Normalize, then Dense": ("embedding", chain(pooling("mean"), NORMALIZE, dense(WIDTH, 8, "Identity"))),
    "prompts without a query": ("embedding", in_settings(prompts={"web": "Instruct: W\nQuery: "})),
    "no prompts": ("embedding", in_settings(prompts={})),
    "prompts of its own": ("embedding", in_settings(prompts={"query": "Q: ", "document": "D: "})),
    "default prompt": ("embedding", in_settings(prompts={"web": "Search: "}, default_prompt_name="web")),
    "default prompt beside a query's": (
        "embedding",
        in_settings(prompts={"web": "Search: ", "query": "Q: "}, default_prompt_name="web"),
    ),
    "default prompt not pooled": (
        "embedding",
        steps(
            chain(pooling("mean", include_prompt=False)),
            in_settings(prompts={"web": "Search: "}, default_prompt_name="web"),
        ),
    ),
    "closing token <|im_end|>": ("embedding", closed("<|im_end|>")),
    "two closing tokens": ("embedding", closed("<|im_end|>", "<|endoftext|>")),
    **{
        f"prompt not pooled, closed by {token}": (
            "embedding",
            steps(
                closed(token),
                edited("tokenizer_config.json", additional_special_tokens=["<|box_end|>"]),
                chain(pooling("mean", include_prompt=False)),
            ),
        )
        for token in ("<|im_end|>", "<|im_start|>", "<|box_end|>", "<|fim_pad|>")
    },
    "closing token not special": ("embedding", closed("<|fim_pad|>")),
    "opening token": ("embedding", closed("<|endoftext|>", opening=["<|im_start|>"])),
    "opening token, prompt not pooled": (
        "embedding",
        steps(closed("<|endoftext|>", opening=["<|im_start|>"]), chain(pooling("mean", include_prompt=False))),
    ),
    "no closing token, mean": ("embedding", steps(closing, chain(pooling("mean"), NORMALIZE))),
    "max_seq_length": ("embedding", in_transformer(max_seq_length=24)),
    "max_seq_length, mean": (
        "embedding",
        steps(in_transformer(max_seq_length=24), chain(pooling("mean", include_prompt=False))),
    ),
    "model_max_length": ("embedding", edited("tokenizer_config.json", model_max_length=24)),
    "max_seq_length above model_max_length": (
        "embedding",
        steps(in_transformer(max_seq_length=40), edited("tokenizer_config.json", model_max_length=24)),
    ),
    "do_lower_case": ("embedding", in_transformer(do_lower_case=True)),
    "sentence_bert_config.json of version 6": ("embedding", of_transformer(max_seq_length=30)),
    "truncate_dim": ("embedding", in_settings(truncate_dim=16)),
    "truncate_dim, Normalize and Dropout": (
        "embedding",
        steps(chain(pooling(), NORMALIZE, ("Dropout", {"dropout": 0.5})), in_settings(truncate_dim=16)),
    ),
    "truncate_dim, no Normalize": ("embedding", steps(chain(pooling("mean")), in_settings(truncate_dim=16))),
    "truncate_dim above the width": ("embedding", in_settings(truncate_dim=999)),
    **{
        f"similarity {name}": ("embedding", steps(chain(pooling("mean")), in_settings(similarity_fn_name=name)))
        for name in ("cosine", "dot", "euclidean", "manhattan")
    },
    "bidirectional, is_causal": ("embedding", in_config(is_causal=False)),
    "bidirectional, both keys": ("embedding", in_config(is_causal=False, use_bidirectional_attention=True)),
    "bidirectional, mean": ("embedding", steps(in_config(is_causal=False), chain(pooling("mean"), NORMALIZE))),
    "rope_parameters": (
        "embedding",
        in_config("rope_theta", "rope_scaling", rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    ),
    "rope_theta": ("embedding", in_config(rope_theta=1e4)),
    "YaRN": ("embedding", in_config(rope_scaling=YARN)),
    "YaRN, old key": (
        "embedding",
        in_config(rope_scaling={"type" if k == "rope_type" else k: v for k, v in YARN.items()}),
    ),
    "YaRN, rope_parameters": (
        "embedding",
        in_config("rope_theta", "rope_scaling", rope_parameters={**YARN, "rope_theta": 1e6}),
    ),
    "dtype": ("embedding", in_config("torch_dtype", dtype="float32")),
    "keys that do not matter": (
        "embedding",
        steps(
            in_config(transformers_version="5.0", use_cache=False, attention_dropout=0.1, pretraining_tp=1),
            in_settings(__version__={"pytorch": "2.0"}, model_type="SentenceTransformer"),
        ),
    ),
    "adapter beside weights": ("embedding", adapter),
    "adapter beside weights, rslora": ("embedding", partial(adapter, use_rslora=True)),
    "adapter alone": ("embedding", adapter_alone),
    "late interaction": ("late interaction", late_interaction),
    "late interaction, skiplist": ("late interaction", partial(late_interaction, mask={"skiplist_words": [".", ";"]})),
    "late interaction, meanmaxsim": ("late interaction", partial(late_interaction, similarity_fn_name="meanmaxsim")),
    "late interaction, lengths": (
        "late interaction",
        steps(late_interaction, in_transformer(query_length=12, document_length=20)),
    ),
    "late interaction, bidirectional": ("late interaction", steps(late_interaction, in_config(is_causal=False))),
    # reranker
    "undeclared": ("reranker", lambda d: None),
    **{
        f"template, {name}": ("reranker", partial(logit_score, template=text, **DEFAULT))
        for name, text in TEMPLATES.items()
    },
    "template in tokenizer_config.json": ("reranker", template_in_tokenizer_config),
    "template with its own default": ("reranker", logit_score),
    "LogitScore 1 and 0": ("reranker", lambda d: logit_score(d, "1", "0")),
    "LogitScore 1 alone": ("reranker", lambda d: logit_score(d, "1", None)),
    "LogitScore, sigmoid": ("reranker", partial(logit_score, activation="activation.Sigmoid")),
    "instruction that no template takes": (
        "reranker",
        partial(logit_score, template=TEMPLATES["query in system turn"], **DEFAULT),
    ),
    "long documents": ("reranker", partial(logit_score, max_seq_length=150)),
    "long documents, other template": (
        "reranker",
        partial(logit_score, template=TEMPLATES["query in system turn"], max_seq_length=60),
    ),
    "untied lm_head": ("reranker", untied),
    "untied lm_head, declared": ("reranker", steps(untied, in_config(tie_word_embeddings=False))),
    "bidirectional reranker": ("reranker", steps(logit_score, in_config(is_causal=False))),
    "reranker with an adapter": ("reranker", steps(logit_score, adapter)),
    "score head": ("reranker", classifier),
    "score head, activation": ("reranker", partial(classifier, activation="linear.Identity")),
    "score head, 3 labels": ("reranker", lambda d: classifier(d, 3)),
    "score head, undeclared": ("reranker", partial(classifier, declared=False)),
    "score head, 3 labels, undeclared": ("reranker", lambda d: classifier(d, 3, declared=False)),
    "score head, padded by another token": (
        "reranker",
        steps(classifier, edited("tokenizer_config.json", pad_token="<|im_end|>")),
    ),
    "score head, bidirectional": ("reranker", steps(classifier, in_config(is_causal=False))),
    "Pooling and Dense": ("reranker", lambda d: pooled_score(d, pooling(), SCORE)),
    "Pooling and Dense, mean": ("reranker", lambda d: pooled_score(d, pooling("mean"), SCORE)),
    "Pooling and Dense, 3 labels": (
        "reranker",
        lambda d: pooled_score(d, pooling(), dense(WIDTH, 3, "Identity", module_output_name="scores")),
    ),
    "Pooling and two Dense": (
        "reranker",
        lambda d: pooled_score(d, pooling("max"), dense(WIDTH, 16), dense(16, 1, module_output_name="scores")),
    ),
}


@functools.lru_cache
def written(bases_root: Path, name: str):
    """The directory of a row of HONOURED, and its truth."""
    kind, change = HONOURED[name]
    directory = copy(bases_root, Path(mkdtemp(dir=bases_root.parent)) / name)
    change(directory)
    return directory, layouts.TRUTH[kind](directory)


def check(bases, name):
    """Our numbers of a row of HONOURED are the truth's."""
    kind, _ = HONOURED[name]
    directory, truth = written(bases[kind], name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = layouts.OURS[kind](directory)
    found = layouts.difference(ours, truth)
    assert found <= TOLERANCE[kind], f"{name}: differs from the truth by {found:.1e}"
    # Another instruction is refused where it would not change a thing.
    assert len(ours) == len(truth) or np.array_equal(*truth), name


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(bases, name):
    check(bases, name)


def test_the_truths_differ(bases):
    """A row whose numbers are those of the official layout shows nothing, but for those that say the same otherwise."""
    _, official = written(bases["embedding"], "official")
    same = {
        name
        for name, (kind, _) in HONOURED.items()
        if kind == "embedding" and layouts.difference(official, written(bases[kind], name)[1]) < 1e-3
    }
    assert same == {
        *("official", "pooling lasttoken", "pooling, legacy key lasttoken", "prompt not pooled, lasttoken", "Dropout"),
        *("truncate_dim above the width", "dtype", "keys that do not matter"),
    }


# What is refused: which class opens it, the change, and words of the message.

BROKEN_TEMPLATES = {
    "trimmed": OFFICIAL.replace("{{ document_text }}", "{{ document_text | trim }}"),
    "cut": OFFICIAL.replace("{{ document_text }}", "{{ document_text[:100] }}"),
    "in lower case": OFFICIAL.replace("{{ query_text }}", "{{ query_text | lower }}"),
    "document twice": OFFICIAL.replace("{{ document_text }}", "{{ document_text }}{{ document_text }}"),
    "no document": OFFICIAL.replace("{{ document_text }}", ""),
    "by length": OFFICIAL.replace("{{ query_text }}", "{{ query_text }}{% if query_text | length > 99 %}!{% endif %}"),
    "wrong syntax": "{% if %}",
    "raises": "{{ raise_exception('no roles query and document') }}",
    "unknown variable": "{{ date.today }}" + OFFICIAL,
    "instruction at the end": OFFICIAL.replace("<Instruct>: {{ instruction", "<Instruct>: {{ ''").replace(
        "{{ document_text }}", "{{ document_text }}{{ instruction }}"
    ),
    "text without a special token at the end": OFFICIAL.replace("{{ document_text }}", "{{ document_text }} ###"),
}


def gguf(d):
    (d / "model.safetensors").unlink()
    (d / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def pickled_dense(d):
    modules(d, pooling(), dense(WIDTH, 24))
    (d / "2_Dense" / "model.safetensors").rename(d / "2_Dense" / "pytorch_model.bin")


def text_pairs(d):
    logit_score(d)
    text = {"method": "forward", "method_output_name": "logits"}
    edit(d, "sentence_bert_config.json", modality_config={"text": text})


def message_embedder(d):
    message = {"method": "forward", "method_output_name": "last_hidden_state"}
    of_transformer(modality_config={"text": message, "message": {**message, "format": "flat"}})(d)
    write(d, "chat_template.jinja", OFFICIAL)


def other_class(name):
    def change(d):
        modules(d, pooling())
        first, second = json.loads((d / "modules.json").read_text("utf-8"))
        write(d, "modules.json", [first, {**second, "type": name}])

    return change


def moved_transformer(d):
    modules(d, pooling())
    first, second = json.loads((d / "modules.json").read_text("utf-8"))
    write(d, "modules.json", [{**first, "path": "0_Transformer"}, second])


def modules_gone(d):
    """A checkpoint that declares nothing."""
    (d / "modules.json").unlink()


def chat_model(d):
    edit(d, "generation_config.json", do_sample=True, temperature=0.6)


def no_template(d):
    logit_score(d)
    (d / "chat_template.jinja").unlink()


def scored(**changed):
    def change(d):
        classifier(d, 3)
        edit(d, "config.json", **changed)

    return change


REFUSED: dict[str, tuple[str, layouts.Change, list[str]]] = {
    # modules
    "LayerNorm": ("embedding", chain(pooling(), ("LayerNorm", {"dimension": WIDTH})), ["modules.json", "LayerNorm"]),
    "WordWeights": (
        "embedding",
        other_class("sentence_transformers.models.WordWeights"),
        ["modules.json", "WordWeights"],
    ),
    "code of the repository": ("embedding", other_class("custom_st.Pooling"), ["modules.json", "custom_st"]),
    "Transformer in a folder": ("embedding", moved_transformer, ["modules.json", "0_Transformer"]),
    "no Pooling": ("embedding", chain(), ["modules.json", "Pooling"]),
    "pooling mode": ("embedding", chain(pooling("attention")), ["1_Pooling", "pooling_mode", "attention"]),
    "key of Pooling": ("embedding", chain(pooling(layers=[1, 2])), ["1_Pooling", "layers"]),
    "size of Pooling": (
        "embedding",
        chain(pooling(embedding_dimension=99)),
        ["1_Pooling", "embedding_dimension", "99"],
    ),
    "activation": (
        "embedding",
        chain(pooling(), dense(WIDTH, 8, "Softmax")),
        ["2_Dense", "activation_function", "Softmax"],
    ),
    "activation of the repository": (
        "embedding",
        chain(pooling(), dense(WIDTH, 8, activation_function="my.Act")),
        ["2_Dense", "activation_function", "my.Act"],
    ),
    "key of Dense": ("embedding", chain(pooling(), dense(WIDTH, 8, dropout=0.1)), ["2_Dense", "dropout"]),
    "size of Dense": ("embedding", chain(pooling(), dense(99, 8)), ["2_Dense", "99", str(WIDTH)]),
    "pickled Dense": ("embedding", pickled_dense, ["2_Dense", "pytorch_model.bin"]),
    "input of Dense": (
        "embedding",
        chain(pooling(), dense(WIDTH, 8, module_input_name="token_embeddings")),
        ["2_Dense", "module_input_name", "token_embeddings"],
    ),
    # settings
    "SparseEncoder": ("embedding", in_settings(model_type="SparseEncoder"), ["model_type", "SparseEncoder"]),
    "similarity": ("embedding", in_settings(similarity_fn_name="tanimoto"), ["similarity_fn_name", "tanimoto"]),
    "prompts": ("embedding", in_settings(prompts={"query": 1}), ["prompts"]),
    "default prompt": ("embedding", in_settings(default_prompt_name="web"), ["default_prompt_name", "web"]),
    "truncate_dim": ("embedding", in_settings(truncate_dim=0), ["truncate_dim", "0"]),
    "max_seq_length": ("embedding", in_transformer(max_seq_length=-1), ["max_seq_length", "-1"]),
    "model_max_length": ("embedding", edited("tokenizer_config.json", model_max_length="x"), ["model_max_length", "x"]),
    "key of the Transformer": ("embedding", in_transformer(pad_to=8), ["pad_to"]),
    "arguments of the processor": (
        "embedding",
        in_transformer(processing_kwargs={"text": {"max_length": 8}}),
        ["processing_kwargs", "max_length"],
    ),
    "another task": ("embedding", in_transformer(transformer_task="text-generation"), ["transformer_task"]),
    "arguments of the config": ("embedding", in_transformer(config_args={"rope_theta": 1.0}), ["config_args"]),
    "chat template around texts": ("embedding", message_embedder, ["modality_config", "message"]),
    "query expansion": (
        "embedding",
        steps(late_interaction, in_transformer(query_expansion={"strategy": "fixed", "length": 32})),
        ["query_expansion"],
    ),
    "query expansion of PyLate": (
        "embedding",
        partial(late_interaction, query_length=32, do_query_expansion=True),
        ["do_query_expansion"],
    ),
    "tokens of images": (
        "embedding",
        partial(late_interaction, mask={"keep_only_token_ids": [1]}),
        ["3_MultiVectorMask", "keep_only_token_ids"],
    ),
    # config.json
    "attention that transformers does not read": (
        "embedding",
        in_config(use_bidirectional_attention=True),
        ["use_bidirectional_attention"],
    ),
    "auto_map": ("embedding", in_config(auto_map={"AutoModel": "modeling.Mine"}), ["auto_map", "modeling.Mine"]),
    "listwise": ("reranker", in_config(architectures=["JinaForRanking"]), ["architectures", "JinaForRanking"]),
    "vision": ("embedding", in_config(model_type="qwen3_vl"), ["model_type", "qwen3_vl"]),
    **{
        f"quantised, {name}": (
            "embedding",
            in_config(quantization_config={"quant_method": name}),
            ["quantization_config", name],
        )
        for name in ("awq", "gptq", "fp8", "bitsandbytes")
    },
    "quantised, MLX": ("embedding", in_config(quantization={"bits": 4, "group_size": 64}), ["quantization", "mlx-lm"]),
    "GGUF": ("embedding", gguf, ["GGUF"]),
    "RoPE": ("embedding", in_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ["rope_scaling", "dynamic"]),
    "RoPE of two minds": (
        "embedding",
        in_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
        ["rope_theta"],
    ),
    "sliding window": ("embedding", in_config(use_sliding_window=True), ["use_sliding_window"]),
    # adapters
    "adapter, other kind": (
        "embedding",
        partial(adapter, peft_type="IA3"),
        ["adapter_config.json", "peft_type", "IA3"],
    ),
    "adapter, DoRA": ("embedding", partial(adapter, use_dora=True), ["adapter_config.json", "use_dora"]),
    "adapter without a base": ("embedding", adapter_of_nothing, ["nowhere"]),
    # rerankers
    "text pairs": ("reranker", text_pairs, ["modality_config", "message"]),
    "no template": ("reranker", no_template, ["chat_template.jinja"]),
    **{
        f"template, {name}": ("reranker", partial(logit_score, template=text), ["template"])
        for name, text in BROKEN_TEMPLATES.items()
    },
    "activation of LogitScore": (
        "reranker",
        partial(logit_score, activation="activation.Tanh"),
        ["activation_fn", "Tanh"],
    ),
    "default instruction": ("reranker", partial(logit_score, default="query"), ["default_prompt_name", "query"]),
    "answer outside the vocabulary": (
        "reranker",
        steps(logit_score, edited("1_LogitScore/config.json", true_token_id=99999)),
        ["true_token_id", "99999"],
    ),
    "score head, template that ends in padding": (
        "reranker",
        lambda d: classifier(d, template=OFFICIAL.rstrip() + "<|endoftext|>"),
        ["chat template", "padding"],
    ),
    "score head, padding at the end": (
        "reranker",
        steps(
            partial(classifier, template=OFFICIAL + "<|fim_pad|>"),
            lambda d: edit(d, "config.json", pad_token_id=token_id(d, "<|fim_pad|>")),
        ),
        ["chat template", "pad_token_id"],
    ),
    "names of labels": ("reranker", scored(id2label={"0": "a", "7": "b", "2": "c"}), ["id2label"]),
    "number of labels": ("reranker", scored(id2label={"0": "a"}, num_labels=1), ["score.weight"]),
    "Pooling without Dense": ("reranker", lambda d: pooled_score(d, pooling()), ["modules.json", "Dense"]),
    # the wrong job
    "embedder as a Reranker": ("reranker", chain(pooling(), NORMALIZE), ["embedding", "reranker"]),
    "late interaction as a Reranker": ("reranker", late_interaction, ["late interaction"]),
    "reranker as an Embedder": ("embedding", logit_score, ["embedding", "reranker"]),
    "score head as an Embedder": ("embedding", classifier, ["embedding", "reranker"]),
    "score head, undeclared, as an Embedder": (
        "embedding",
        steps(modules_gone, partial(classifier, declared=False)),
        ["embedding", "reranker"],
    ),
    "Pooling and Dense as an Embedder": (
        "embedding",
        lambda d: pooled_score(d, pooling(), SCORE),
        ["embedding", "reranker"],
    ),
    "chat model as a Reranker": ("reranker", chat_model, ["chat", "reranker"]),
}


def opened(kind, directory, **options):
    return (Reranker if kind == "reranker" else Embedder).from_pretrained(directory, device="cpu", **options)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(bases, tmp_path, name):
    kind, change, words = REFUSED[name]
    directory = copy(bases[kind], tmp_path / "checkpoint")
    change(directory)
    with pytest.raises(CheckpointError) as info:
        opened(kind, directory)
    message = str(info.value)
    assert clear(message), message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.filterwarnings("ignore:.*post_processor")
def test_another_job_by_hand(bases, tmp_path):
    """The model cards' surroundings: those of a checkpoint that declares nothing."""
    embedder = copy(bases["embedding"], tmp_path / "embedder")
    modules(embedder, pooling("mean"))
    for name, kind in (("embedder", "reranker"), ("reranker", "embedding")):
        directory = tmp_path / name
        if name == "reranker":
            logit_score(copy(bases["reranker"], directory), "1", None, template=TEMPLATES["query in system turn"])
        with pytest.raises(CheckpointError, match=f"job='{kind}'"):
            opened(kind, directory)
        found = layouts.OURS[kind](directory, job=kind)
        bare = copy(directory, tmp_path / f"{name}-bare")
        for file in ("modules.json", layouts.TEMPLATE, "sentence_bert_config.json"):
            (bare / file).unlink(missing_ok=True)
        edit(bare, "config_sentence_transformers.json", "model_type")
        with pytest.warns(UserWarning, match="modules.json"):
            assert layouts.difference(found, layouts.OURS[kind](bare)) == 0
    model = opened("reranker", embedder, job="reranker")
    assert model.layout.job == "reranker"
    truth = layouts.model_card_scores(embedder)
    assert layouts.difference(layouts.OURS["reranker"](embedder, job="reranker"), truth) <= SCORE_FP32


@pytest.mark.filterwarnings("ignore:.*post_processor")
def test_undeclared_opens_with_one_warning(bases, tmp_path):
    directory = copy(bases["reranker"], tmp_path / "base")
    for kind in ("embedding", "reranker"):
        with pytest.warns(UserWarning, match=f"modules.json.*job='{kind}'") as found:
            opened(kind, directory)
        assert len(found) == 1
    chat_model(directory)
    with pytest.warns(UserWarning, match="not trained"):
        opened("embedding", directory)
    opened("reranker", directory, job="reranker")
    opened("embedding", directory, job="embedding")


def test_nothing_closes_the_text_of_a_last_token_checkpoint(bases, tmp_path):
    """<|endoftext|> does, with a warning: the model cards', where sentence-transformers pools what comes last."""
    directory = copy(bases["embedding"], tmp_path / "unclosed")
    closing(directory)
    with pytest.warns(UserWarning, match=r"<\|endoftext\|>"):
        found = layouts.embedding_ours(directory)
    assert layouts.difference(found, layouts.embedding_ours(bases["embedding"])) == 0


def test_labels_are_named(bases, tmp_path):
    for declared in (True, False):
        directory = copy(bases["reranker"], tmp_path / f"{declared}")
        classifier(directory, 3, declared=declared)
        assert opened("reranker", directory).layout.labels == ("bad", "fair", "good")


def test_layout_is_shown(bases, tmp_path):
    directory = copy(bases["embedding"], tmp_path / "shown")
    modules(directory, pooling(["mean", "cls"]), dense(2 * WIDTH, 24, "GELU"))
    shown = repr(opened("embedding", directory))
    assert all(text in shown for text in ("'mean', 'cls'", "2_Dense", "GELU", "normalize=False"))


def test_normalize_by_call_or_by_checkpoint(bases, tmp_path):
    """None is what the checkpoint declares."""
    directory = copy(bases["embedding"], tmp_path / "plain")
    modules(directory, pooling("mean"))
    plain, declared = opened("embedding", directory), opened("embedding", bases["embedding"])

    def length(model, **options):
        return float(np.linalg.norm(model.encode("gravity", **options)))

    assert length(declared) == pytest.approx(1)
    assert length(plain, normalize_embeddings=True) == pytest.approx(1)
    assert length(plain) == pytest.approx(length(plain, normalize_embeddings=False)) != pytest.approx(1, abs=0.1)
    assert length(declared, normalize_embeddings=False) != pytest.approx(1, abs=0.1)


def test_rewrite_carries_everything_over(bases, tmp_path):
    from qwen3core.weights.tensors import Tensors, rewrite

    directory, written_ = copy(bases["embedding"], tmp_path / "dense"), tmp_path / "rewritten"
    modules(directory, pooling(), dense(WIDTH, 24), NORMALIZE)
    rewrite(directory, written_, Tensors(directory).__getitem__)

    def files(root):
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    assert files(written_) == files(directory)
    assert layouts.difference(layouts.embedding_ours(written_), layouts.embedding_truth(directory)) <= EMBEDDING_FP32


def test_tokens_of_a_checkpoint_that_pools(bases, tmp_path):
    """The last hidden states, as sentence-transformers' token_embeddings, whatever follows the pooling."""
    from sentence_transformers import SentenceTransformer

    directory = copy(bases["embedding"], tmp_path / "pooled")
    modules(directory, pooling(["mean", "lasttoken"]), dense(2 * WIDTH, 24))
    model = SentenceTransformer(str(directory), device="cpu")
    found = opened("embedding", directory).encode_tokens(layouts.TEXTS)
    truth = model.encode(layouts.TEXTS, output_value="token_embeddings")
    for mine, theirs in zip(found.vectors.split(found.lengths), truth, strict=True):
        unit = theirs[-len(mine) :] / theirs[-len(mine) :].norm(dim=-1, keepdim=True)
        assert (mine - unit).abs().max() <= EMBEDDING_FP32
    assert opened("embedding", directory).encode_tokens([]).vectors.shape == (0, WIDTH)
