# %% [markdown]
# # 3. One layer, and the residual stream
#
# The rows that go through the model are called the residual stream. A layer adds to each row what attention found in
# other rows, and then what an MLP makes of the row itself. We compute a layer by hand from the checkpoint's matrices,
# and compare every step with the model's own. Afterwards you can say
#
# - what RMSNorm, the norms of q and k, and SwiGLU compute, and where a number is rounded in bfloat16;
# - which parts of the model wrote the vector that stands in the stream at the end, and how much each;
# - how to find the first step at which two implementations differ.

# %%
import json

import torch
from safetensors.torch import load_file

from qwen3core import Embedder, Ops, capture, pack
from qwen3core.model import rope_cos_sin
from qwen3core.weights.find import find

specification = Ops.reference()
directory = find("tiny-embedding")
config = json.loads((directory / "config.json").read_text("utf-8"))
D, Hq, Hkv, eps = (config[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"))
matrices = {name: x.float() for name, x in load_file(directory / "model.safetensors").items()}
print(*(f"{name} {list(x.shape)}" for name, x in matrices.items() if "layers.0" in name), sep="\n")

# %% [markdown]
# `capture` records named points while the model runs; `qwen3core/hooks.py` lists them. `same` compares a step of ours
# with the model's point: equal up to the rounding of float32, whose sums depend on their order in the last bits.

# %%
embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu", ops=specification)
texts = ["gravity pulls two bodies", "a violin"]
batch = pack(embedder.tokenizer.embedding(texts, max_length=512))
with torch.no_grad(), capture(embedder, "*", "layers.0.pattern") as acts:
    embedder.model(batch)
print(acts.tokens)


def same(name, ours):
    assert abs(ours - acts[name]).max() <= 1e-5 * abs(acts[name]).max(), name


same("embed", matrices["embed_tokens.weight"][batch.input_ids])  # the token's own row of the matrix

# %% [markdown]
# ## RMSNorm
# Each row is divided by its root mean square, so that its size no longer matters, and multiplied by learned weights:
#
#     y = x / sqrt(mean(x^2) + eps) * w
#
# The rows here are small, mean(x^2) is about 0.006, so that eps counts: with 1e-5 for 1e-6, all would be 7e-4 smaller.
# In bfloat16 the mean and the division are float32, and the result is rounded *before* it is multiplied by w.
#
# Planted mistakes: `eps 1e-5`, `norm weight applied before the cast`.


# %%
def rms_norm(x, name):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * matrices[name].to(x.dtype)


same("layers.0.attn_norm", rms_norm(acts["layers.0.resid_pre"], "layers.0.input_layernorm.weight"))

x16, w16 = acts["embed"].bfloat16(), matrices["norm.weight"].bfloat16()
assert torch.equal(rms_norm(x16, "norm.weight"), specification.rms_norm(x16, w16, eps)), "RMSNorm in bfloat16"

# %% [markdown]
# ## Queries, keys, values
# Three matrices make q, k and v of each row. Each head of q and k then goes through an RMSNorm and RoPE (lesson 2).
#
# Planted mistakes: `q_norm dropped`, `k_norm dropped`.


# %%
def linear(x, name):
    return x @ matrices[name].T


def qkv(x, layer):
    return [linear(x, f"{layer}.self_attn.{p}_proj.weight").unflatten(1, (-1, D)) for p in "qkv"]


cos, sin = rope_cos_sin(batch.position_ids, embedder.model.config, torch.float32)
q_pre, k_pre, v = qkv(acts["layers.0.attn_norm"], "layers.0")
same("layers.0.q_pre", q_pre)
same("layers.0.k_pre", k_pre)
same("layers.0.v", v)
same("layers.0.q", specification.rope(rms_norm(q_pre, "layers.0.self_attn.q_norm.weight"), cos, sin))
same("layers.0.k", specification.rope(rms_norm(k_pre, "layers.0.self_attn.k_norm.weight"), cos, sin))

# %% [markdown]
# ## What attention adds
# z is the average of values, for each head (lesson 2); `pattern` has its weights. `o_proj` maps all heads together to
# the stream. That is a sum: each head adds a vector of its own, by its own columns of the matrix.

# %%
groups = torch.arange(Hq) // (Hq // Hkv)  # the key head that each query head reads
values = [x[:, groups].transpose(0, 1) for x in acts.per_text("layers.0.v")]  # [Hq, length, D] of each text
patterns = acts.per_text("layers.0.pattern")
z = torch.cat([(weights @ x).transpose(0, 1) for weights, x in zip(patterns, values, strict=True)])
same("layers.0.z", z)
same("layers.0.attn_out", linear(z.flatten(1), "layers.0.self_attn.o_proj.weight"))
columns = matrices["layers.0.self_attn.o_proj.weight"].split(D, dim=1)
same("layers.0.attn_out", sum(z[:, h] @ columns[h].T for h in range(Hq)))
same("layers.0.resid_mid", acts["layers.0.resid_pre"] + acts["layers.0.attn_out"])

# %% [markdown]
# ## SwiGLU
# The MLP sees one row at a time: `gate` and `up` are 512 numbers each, and silu(gate) says how much of `up` goes on:
#
#     silu(g) = g / (1 + e^(-g)),   mlp_act = silu(gate) * up
#
# Planted mistakes: `gate and up swapped`, `residual stream dropped`.


# %%
def mlp_act(x, layer):
    gate, up = linear(x, f"{layer}.mlp.gate_proj.weight"), linear(x, f"{layer}.mlp.up_proj.weight")
    return gate / (1 + torch.exp(-gate)) * up


same("layers.0.mlp_norm", rms_norm(acts["layers.0.resid_mid"], "layers.0.post_attention_layernorm.weight"))
same("layers.0.mlp_act", mlp_act(acts["layers.0.mlp_norm"], "layers.0"))
same("layers.0.mlp_out", linear(acts["layers.0.mlp_act"], "layers.0.mlp.down_proj.weight"))
same("layers.0.resid_post", acts["layers.0.resid_mid"] + acts["layers.0.mlp_out"])
same("layers.1.resid_pre", acts["layers.0.resid_post"])

# %% [markdown]
# ## All of it
# Four layers and a last norm: the whole decoder.


# %%
def attend(x, layer):
    q, k, v = qkv(x, layer)
    q, k = (rms_norm(y, f"{layer}.self_attn.{p}_norm.weight") for y, p in ((q, "q"), (k, "k")))
    q, k = (specification.rope(y, cos, sin) for y in (q, k))
    z = specification.attention(q, k, v, batch.cu_seqlens, batch.cu_seqlens, len(x), len(x))
    return linear(z.flatten(1), f"{layer}.self_attn.o_proj.weight")


x = matrices["embed_tokens.weight"][batch.input_ids]
for layer in (f"layers.{i}" for i in range(config["num_hidden_layers"])):
    x = x + attend(rms_norm(x, f"{layer}.input_layernorm.weight"), layer)
    act = mlp_act(rms_norm(x, f"{layer}.post_attention_layernorm.weight"), layer)
    x = x + linear(act, f"{layer}.mlp.down_proj.weight")
same("final_norm", rms_norm(x, "norm.weight"))

# %% [markdown]
# ## The residual stream
# No layer replaces the rows, each adds to them. So the last row of a text is a sum of nine vectors, and we can say how
# much of it, in its own direction, each of them wrote. EOS has the same embedding in every text: what it knows of this
# text was brought by attention.

# %%
end = acts.at("layers.3.resid_post", text=0)
writers = ["embed", *(f"layers.{i}.{part}" for i in range(4) for part in ("attn_out", "mlp_out"))]
shares = {name: float(acts.at(name, text=0) @ end / (end @ end)) for name in writers}
for name, share in shares.items():
    print(f"{name:18} {share:6.1%} {'#' * round(100 * share)}")
assert abs(sum(shares.values()) - 1) < 1e-5
assert shares["embed"] < 0.01 < 0.5 < sum(share for name, share in shares.items() if "attn" in name)

# %% [markdown]
# ## Exercises
# 1. Multiply `q_pre` by 10. What happens to q? (So a test that scales `q_proj` proves nothing.)
# 2. Which head of layer 0 adds the longest vector to the EOS of the first text, and which tokens does it come from?
# 3. With eps = 1e-5 in `rms_norm`, which `same` is the first to fail, and is that step the cause?

# %%
# Solutions
scaled = rms_norm(10 * acts["layers.0.q_pre"], "layers.0.self_attn.q_norm.weight")
same("layers.0.q", specification.rope(scaled, cos, sin))  # 1. nothing: the norm takes the size away
lengths = torch.stack([acts.at("layers.0.z")[h] @ columns[h].T for h in range(Hq)]).norm(dim=1)
pattern = acts.at("layers.0.pattern")[lengths.argmax()]
print(f"2. head {lengths.argmax()}, length {lengths.max():.1f}, from EOS itself: so it is the same for every text")
assert pattern[-1] > 0.99
eps = 1e-5
wrong = rms_norm(acts["layers.0.resid_pre"], "layers.0.input_layernorm.weight") - acts["layers.0.attn_norm"]
print(f"3. layers.0.attn_norm, and it is the cause, since what came before was equal; off by {abs(wrong).max():.4f}")
assert abs(wrong).max() > 1e-4 * acts["layers.0.attn_norm"].max()
