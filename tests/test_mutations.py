"""Planted mistakes: each must make a parity check fail. A check that no mistake fails proves nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_parity import check_bit_identity, check_embedding_fp32, check_reranker_fp32
from torch.nn import functional as F

from qwen3core import Embedder, Ops, Qwen3Config, Tokenizer, pack, pretrained, reference
from qwen3core.model import DecoderLayer
from qwen3core.prompts import Template
from qwen3core.weights.layout import _Reader

CHECKS = {
    "embedding": lambda dirs: check_embedding_fp32(dirs.embedding, "reference"),
    "reranker": lambda dirs: check_reranker_fp32(dirs.reranker, "reference"),
    "bits": lambda dirs: check_bit_identity(dirs.embedding, torch.bfloat16),
}


@pytest.fixture(scope="module")
def dirs(embedding_dir, reranker_dir):
    return SimpleNamespace(embedding=embedding_dir, reranker=reranker_dir)


def ops(**wrong):
    """Plant wrong operations in the reference set."""
    mutated = dataclasses.replace(Ops.reference(), **wrong)
    return lambda patch: patch.setattr(Ops, "reference", staticmethod(lambda: mutated))


def config(**wrong):
    right = Qwen3Config.from_dict
    mutated = staticmethod(lambda *args: dataclasses.replace(right(*args), **wrong))
    return lambda patch: patch.setattr(Qwen3Config, "from_dict", mutated)


def no_norm(heads):
    """rms_norm left out for tensors of this many heads: 4 is q_norm, 2 is k_norm in the small checkpoints."""
    return lambda x, w, eps: x if x.dim() == 3 and x.shape[1] == heads else reference.rms_norm(x, w, eps)


def weight_before_cast(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rope_interleaved(x, cos, sin):
    cos, sin = (c[:, None, : c.shape[1] // 2] for c in (cos, sin))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def not_causal(q, k, v, cu_q, cu_k, *lengths):
    parts = []
    for rows_q, rows_k in reference.sequences(cu_q, cu_k):
        x, y, z = (t[rows].transpose(0, 1)[None] for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        parts.append(F.scaled_dot_product_attention(x, y, z, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def across_sequences(q, k, v, cu_q, cu_k, *lengths):
    return reference.attention(q, k, v, cu_q[[0, -1]], cu_k[[0, -1]], *lengths)


def wrong_group(q, k, v, *rest):
    """Head h reads key head h % Hkv: repeat where repeat_interleave is right."""
    groups = q.shape[1] // k.shape[1]
    return reference.attention(q, k.repeat(1, groups, 1), v.repeat(1, groups, 1), *rest)


def batches(change):
    """Change the batches that are computed."""
    return lambda patch: patch.setattr(pretrained, "pack", lambda *a, **options: change(pack(*a, **options)))


def pooled_early(batch):
    early = dataclasses.replace(batch.last_token, queries=(batch.last_token.queries - 1).clamp(min=0))
    return dataclasses.replace(batch, last_token=early)


def restarting_positions(batch):
    lengths = batch.cu_seqlens.diff().tolist()
    return dataclasses.replace(batch, position_ids=torch.cat([torch.arange(n) for n in lengths]))


def prefix_of_another(batch):
    """Every text behind a shared prefix sees the same rows, of the first."""
    if not isinstance(batch.full.keys, torch.Tensor):
        return batch
    keys = batch.full.keys.clamp(max=int(batch.cu_seqlens[-2]))
    return dataclasses.replace(batch, full=dataclasses.replace(batch.full, keys=keys))


def cut_after_normalise(hidden_states, cu_seqlens, dim, normalize):
    return reference.pool(hidden_states, cu_seqlens, hidden_states.shape[1], normalize)[:, :dim]


def token_ids(change):
    """Change the sequences that are embedded."""
    right = Tokenizer.close
    return lambda patch: patch.setattr(Tokenizer, "close", lambda self, *a: [change(s) for s in right(self, *a)])


def layout(change):
    """Change what the files declare."""
    right = _Reader.read

    def wrong(self, job):
        found = right(self, job)
        changed = dataclasses.replace(found, **change(found))
        assert changed != found
        return changed

    return lambda patch: patch.setattr(_Reader, "read", wrong)


def template(old, new):
    def change(found):
        return {"template": Template("", tuple(part.replace(old, new) for part in found.template.body), "")}

    return layout(change)


def truncate_suffix(patch):
    right = Tokenizer._truncate

    def wrong(contents, prefix, suffix, max_length):
        return [[*ids, *suffix][:max_length] for ids in right(contents, prefix, [], max_length)]

    patch.setattr(Tokenizer, "_truncate", staticmethod(wrong))


def no_mlp_residual(patch):
    right = DecoderLayer.forward

    def wrong(self, x, layout, *args):
        return right(self, x, layout, *args) - x[layout.queries]

    patch.setattr(DecoderLayer, "forward", wrong)


MUTATIONS = {
    "q_norm dropped": ("embedding", ops(rms_norm=no_norm(4))),
    "k_norm dropped": ("embedding", ops(rms_norm=no_norm(2))),
    "rope interleaved": ("embedding", ops(rope=rope_interleaved)),
    "rope theta 1e4": ("embedding", config(rope_theta=1e4)),
    "eps 1e-5": ("embedding", config(rms_norm_eps=1e-5)),
    "norm weight applied before the cast": ("bits", ops(rms_norm=weight_before_cast)),
    "no causal mask": ("embedding", ops(attention=not_causal)),
    "attention across sequences": ("embedding", ops(attention=across_sequences)),
    "wrong KV group": ("embedding", ops(attention=wrong_group)),
    "gate and up swapped": ("embedding", ops(swiglu=lambda gate, up: reference.swiglu(up, gate))),
    "residual stream dropped": ("embedding", no_mlp_residual),
    "pooled one token early": ("embedding", batches(pooled_early)),
    "positions from 0 behind a shared prompt": ("embedding", batches(restarting_positions)),
    "positions from 0 behind a shared query": ("reranker", batches(restarting_positions)),
    "keys of another text": ("embedding", batches(prefix_of_another)),
    "EOS missing": ("embedding", token_ids(lambda ids: ids[:-1] or ids)),
    "EOS doubled": ("embedding", token_ids(lambda ids: [*ids, ids[-1]])),
    "normalised before the MRL cut": ("embedding", ops(pool=cut_after_normalise)),
    "space after Query:": ("embedding", layout(lambda found: {"prompts": {"query": found.prompts["query"] + " "}})),
    "no space after <Query>:": ("reranker", template("<Query>: ", "<Query>:")),
    "yes and no swapped": ("reranker", layout(lambda found: {"answers": found.answers[::-1]})),
    "suffix truncated": ("reranker", truncate_suffix),
    "suffix without its last newline": ("reranker", template("</think>\n\n", "</think>\n")),
}


@pytest.fixture(scope="module")
def passing(dirs):
    """The checks, each of which passes without a mistake."""
    for check in CHECKS.values():
        check(dirs)
    return CHECKS


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mistake_fails_parity(dirs, passing, monkeypatch, name):
    check, plant = MUTATIONS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        passing[check](dirs)


def test_the_mistakes_reach_the_call(dirs, monkeypatch):
    """A mutation that is never called would fail nothing for the wrong reason; this one raises where it is used."""

    def boom(*args):
        raise ZeroDivisionError

    ops(attention=boom)(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        Embedder.from_pretrained(dirs.embedding, ops="reference").encode("x")
