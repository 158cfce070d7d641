"""Planted mistakes in what surrounds the decoder: each must make the comparison of a row of HONOURED fail."""

from dataclasses import replace

import pytest
import torch
from test_layouts import HONOURED, check

from qwen3core import Embedder, Qwen3Config, Tokenizer, pretrained, prompts, reference
from qwen3core.model import DenseLayer, Qwen3Model
from qwen3core.prompts import Template

pytest.importorskip("sentence_transformers")


def declared(**wrong):
    """Read other values than the files have; functions change the right ones."""

    def plant(patch):
        right = pretrained.read_layout

        def mutated(*args, **options):
            layout = right(*args, **options)
            values = {name: value(getattr(layout, name)) if callable(value) else value for name, value in wrong.items()}
            assert any(getattr(layout, name) != value for name, value in values.items())
            return replace(layout, **values)

        patch.setattr(pretrained, "read_layout", mutated)

    return plant


def config(**wrong):
    right = Qwen3Config.from_dict
    return lambda patch: patch.setattr(Qwen3Config, "from_dict", staticmethod(lambda *a: replace(right(*a), **wrong)))


def result(owner, name, change):
    """Change what a function gives."""

    def plant(patch):
        right = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: change(right(*args, **options)))

    return plant


def no_activation(modules):
    return tuple(
        replace(module, activation="Identity") if hasattr(module, "activation") else module for module in modules
    )


def no_bias(layer):
    layer.linear.bias = None


def no_residual(layer):
    layer.use_residual = False


def dense(change):
    """Change a Dense once it has its weights."""

    def plant(patch):
        right = DenseLayer.forward

        def wrong(self, x):
            change(self)
            return right(self, x)

        patch.setattr(DenseLayer, "forward", wrong)

    return plant


def embeddings_for_lm_head(patch):
    patch.setattr(Qwen3Model, "lm_head_rows", lambda self, ids: self.embed_tokens.weight[list(ids)])


def cut_after_normalise(patch):
    right = Embedder.encode

    def wrong(self, inputs, **options):
        with self.truncate_embeddings(None):
            return right(self, inputs, **options)[:, : self.layout.truncate_dim]

    patch.setattr(Embedder, "encode", wrong)


def weights_from_one(patch):
    """The weighted mean counts from the prompt's end."""
    right = reference.pool_text
    patch.setattr(reference, "pool_text", lambda x, modes, length: right(x[length:], modes, 0))


def without_its_last_newline(template: Template) -> Template:
    body = (*template.body[:-1], template.body[-1].removesuffix("\n"))
    return replace(template, body=body)


def plus_one(number):
    return number + 1


MUTATIONS = {
    "mode swapped": ("pooling mean", declared(pooling=("max",))),
    "several modes in another order": ("pooling of several", declared(pooling=lambda modes: modes[::-1])),
    "prompt pooled": ("prompt not pooled, mean", declared(include_prompt=True)),
    "one token more of the prompt pooled": (
        "prompt not pooled, closed by <|im_start|>",
        declared(special_tokens=("<|im_start|>",)),
    ),
    "weights counted from the prompt's end": ("prompt not pooled, weightedmean", weights_from_one),
    "Normalize ignored": ("official", declared(normalize=False)),
    "Normalize invented": ("no Normalize", declared(normalize=True)),
    "Normalize in the middle left out": ("Normalize, then Dense", declared(modules=lambda found: found[1:])),
    "Dense without its bias": ("Dense", dense(no_bias)),
    "Dense without its activation": ("Dense", declared(modules=no_activation)),
    "Dense without its residual": ("Dense, residual", dense(no_residual)),
    "causal after all": ("bidirectional, is_causal", config(is_causal=True)),
    "RoPE not stretched": ("YaRN", config(rope_scaling=None)),
    "closing token swapped": (
        "closing token <|im_end|>",
        result(Tokenizer, "_post_processor", lambda found: (found[0], [found[1][0] - 1])),
    ),
    "closing token invented": ("no closing token, mean", result(Tokenizer, "_post_processor", lambda _: ([], [0]))),
    "opening token left out": ("opening token", result(Tokenizer, "_post_processor", lambda found: ([], found[1]))),
    "truncation off by one": ("max_seq_length", declared(max_length=plus_one)),
    "truncation off by one, template": ("long documents", declared(max_length=plus_one)),
    "model_max_length ignored": ("model_max_length", declared(max_length=None)),
    "upper case left": ("do_lower_case", declared(lower_case=False)),
    "query prompt invented": ("no prompts", declared(prompts=prompts.EMBEDDING_PROMPTS)),
    "default prompt ignored": ("default prompt", declared(default_prompt_name=None)),
    "truncate_dim ignored": ("truncate_dim", declared(truncate_dim=None)),
    "normalised before the cut": ("truncate_dim", cut_after_normalise),
    "another similarity": ("similarity dot", declared(similarity="cosine")),
    "wrong token": ("LogitScore 1 and 0", declared(answers=lambda ids: (ids[0], ids[1] + 1))),
    "answers swapped": ("LogitScore 1 and 0", declared(answers=lambda ids: ids[::-1])),
    "second answer invented": ("LogitScore 1 alone", declared(answers=lambda ids: (*ids, 1))),
    "tied lm_head": ("untied lm_head", embeddings_for_lm_head),
    "template without its last newline": ("template, official", declared(template=without_its_last_newline)),
    "the model card's template": ("template, other words", declared(template=prompts.RERANKER)),
    "the model card's instruction": ("template, official", declared(instruction=prompts.DEFAULT_TASK)),
    "labels swapped": ("score head, 3 labels", result(Qwen3Model, "score_weight", lambda rows: rows.flip(0))),
    "sigmoid of several labels": ("score head, 3 labels", declared(activation="Sigmoid")),
    "sigmoid left out": ("score head", declared(activation="Identity")),
    "sigmoid of the score left out": ("Pooling and Dense", declared(activation="Identity")),
    "skipped words in the result": ("late interaction, skiplist", declared(skiplist=())),
    "length of queries for documents": ("late interaction, lengths", declared(document_length=12)),
    "MaxSim summed as a mean": ("late interaction", declared(similarity="meanmaxsim")),
    "tokens not normalised": (
        "late interaction",
        result(Qwen3Model, "tokens", lambda vectors: vectors * torch.linspace(1, 2, len(vectors))[:, None]),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_fails_the_comparison(bases, monkeypatch, name):
    row, plant = MUTATIONS[name]
    assert row in HONOURED
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=f"^{row}: differs"):
        check(bases, row)
