# %% [markdown]
# # 2. The packed batch, RoPE, attention
#
# Ids become rows of numbers, one row a token. Attention is the only place where rows meet. Afterwards you can say
#
# - how texts of different lengths share one tensor without padding; what `cu_seqlens` and `position_ids` are for;
# - how RoPE makes the product of two vectors depend on the distance between their tokens;
# - what causal grouped-query attention computes, and write it from its formula.

# %%
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qwen3core import Embedder, Ops, Reranker, capture, pack
from qwen3core.model import rope_cos_sin
from qwen3core.weights.find import find

specification = Ops.reference()  # the functions of qwen3core/reference.py
embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu", ops=specification)
config = json.loads((find("tiny-embedding") / "config.json").read_text("utf-8"))
D, Hq, Hkv = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]

# %% [markdown]
# ## The packed batch
# All rows stand end to end: text n is the rows from `cu_seqlens[n]` up to `cu_seqlens[n + 1]`. Positions begin at 0 in
# each text.

# %%
sequences = embedder.tokenizer.embedding(["gravity pulls two bodies", "a violin"], max_length=512)
batch = pack(sequences)
text_of_row = torch.tensor([n for n, ids in enumerate(sequences) for _ in ids])
tokens = [embedder.tokenizer.decode([i]) for i in batch.input_ids.tolist()]
print("row text position token")
for row, (text, position, token) in enumerate(zip(text_of_row, batch.position_ids, tokens, strict=True)):
    print(f"{row:3} {text:4} {position:8} {token!r}")

first = len(sequences[0])  # where the second text begins
assert batch.input_ids.tolist() == sequences[0] + sequences[1]
assert batch.cu_seqlens.tolist() == [0, first, len(batch.input_ids)]
assert batch.position_ids.tolist() == [*range(first), *range(len(sequences[1]))]

# %% [markdown]
# ## RoPE: rotary position embedding
# For attention, each row makes a query (what it looks for), a key (what it can be found by) and a value (what it passes
# on), for each of several heads. Lesson 3 makes them; here they are random numbers.
#
# So that positions count, queries and keys are rotated. Their D = 64 components are taken as 32 points in the plane:
# components i and i + D/2 are one point. At position p, point i is rotated about the origin:
#
#     angle(p, i) = p / theta^(2i / D),   theta = 1,000,000
#     x'[i]       = x[i] cos(angle) - x[i + D/2] sin(angle)
#     x'[i + D/2] = x[i + D/2] cos(angle) + x[i] sin(angle)
#
# Point 0 goes round once in about six tokens, point 31 once in four million.
#
# Planted mistakes: `rope theta 1e4`; `rope interleaved`, which takes the neighbours 2i and 2i + 1 as a point.


# %%
def angles(positions):
    return positions[:, None] * (1 / config["rope_theta"] ** (torch.arange(0, D, 2) / D))


def my_rope(x, angle):  # x [T, heads, D], angle [T, D / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # the same for every head
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


angle = angles(batch.position_ids)
cos, sin = rope_cos_sin(batch.position_ids, embedder.model.config, torch.float32)  # the model's own, [T, D]
assert torch.equal(torch.cat([angle.cos(), angle.cos()], dim=-1), cos), "the angles of every position"

torch.manual_seed(0)
q, k, v = (torch.randn(len(batch.input_ids), heads, D) for heads in (Hq, Hkv, Hkv))
assert torch.equal(my_rope(q, angle), specification.rope(q, cos, sin)), "RoPE, to the bit"

# %% [markdown]
# `torch.equal` means every bit: both do the same float32 operations in the same order. What is RoPE good for? The
# product of a query at position m with a key at position n depends on m - n alone.


# %%
def product(m, n):
    rotated_q, rotated_k = (my_rope(x[:1, :1], angles(torch.tensor([p]))) for x, p in ((q, m), (k, n)))
    return (rotated_q * rotated_k).sum()


assert abs(product(5, 2) - product(105, 102)) < 1e-4 < abs(product(5, 2) - product(5, 4))

# %% [markdown]
# ## Attention
# Row i compares its query with the keys of the rows j <= i of its own text (causal: no row sees a later one), and takes
# the average of their values, weighted by how well they fit:
#
#     score(i, j)  = q_i . k_j / sqrt(D)
#     weight(i, j) = exp(score(i, j)) / (exp(score(i, 0)) + ... + exp(score(i, i)))
#     z_i          = weight(i, 0) v_0 + ... + weight(i, i) v_i
#
# Each of the Hq = 4 query heads does so for itself, with fewer key heads, Hkv = 2 (grouped-query attention): query
# heads 0 and 1 read key head 0, heads 2 and 3 read key head 1.


# %%
def my_attention(q, k, v):
    weights, z = torch.zeros(Hq, len(q), len(q)), []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        keys, values = (torch.stack([x[start:end, h // (Hq // Hkv)] for h in range(Hq)]) for x in (k, v))
        scores = q[start:end].transpose(0, 1) @ keys.transpose(1, 2) * D**-0.5  # [Hq, length, length]
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(later, -torch.inf).softmax(dim=-1)
        weights[:, start:end, start:end] = pattern
        z.append((pattern @ values).transpose(0, 1))
    return weights, torch.cat(z)


def attention(q, k, v):  # the specification's: where queries stand, where keys stand, and the longest text of each
    return specification.attention(q, k, v, batch.cu_seqlens, batch.cu_seqlens, first, first)


# %% [markdown]
# Change one row of the values, and see which rows of the result change. Each line below is broken by one planted
# mistake: `no causal mask`, `attention across sequences`, `wrong KV group` (head h reads key head h % Hkv).


# %%
def changed(*where):
    y = v.clone()
    y[where] += 1
    return y


z = attention(q, k, v)
assert torch.equal(attention(q, k, changed(first - 1))[: first - 1], z[: first - 1]), "no row depends on a later one"
assert torch.equal(attention(q, k, changed(0))[first:], z[first:]), "no row depends on another text"
assert torch.equal(attention(q, k, changed(slice(None), 1))[:, :2], z[:, :2]), "heads 0 and 1 read key head 0"
assert torch.equal(my_attention(q, k, v)[1], z), "attention, to the bit"

# %% [markdown]
# The q, k and v of the model's first layer give what the model itself computed (z). In the figure, left: the product of
# two equal vectors falls, in waves, with their distance. Right: the weights of one head are a triangle for each text,
# and nothing between texts. In this head, EOS gathers what the text says and hardly looks at itself.

# %%
with torch.no_grad(), capture(embedder, "layers.0.[qkvz]") as acts:
    embedder.model(batch)
weights, z = my_attention(*(acts[f"layers.0.{name}"] for name in "qkv"))
assert torch.equal(z, acts["layers.0.z"])
assert weights[1, first - 1, first - 1] < 0.1 < weights[1, first - 1, tokens.index(" pull")]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
left.plot(2 * angles(torch.arange(200)).cos().sum(dim=1))
left.set(xlabel="distance in tokens", ylabel="product", title="RoPE: two vectors of ones")
right.imshow(weights[1], cmap="Blues")
right.set_xticks(range(len(tokens)), tokens, rotation=90)
right.set_yticks(range(len(tokens)), tokens)
right.set(xlabel="key", ylabel="query", title="Attention weights, layer 0, head 1")
path = Path(tempfile.gettempdir()) / "qwen3core_attention.png"
figure.savefig(path)
print(path)

# %% [markdown]
# ## A shared beginning
# All queries begin with the same prompt P, and no row sees a later one: the rows of P are the same in each, and are
# computed once. The positions go on where P ends, and the rows of a text see keys outside their own:
#
#     row       0   1   2   3   4
#     token     p0  p1  a0  b0  b1      a0 sees rows 0 1 2; b0 sees 0 1 3; b1 sees 0 1 3 4
#     position  0   1   2   2   3
#
# Planted mistakes: `positions from 0 behind a shared prompt`, `positions from 0 behind a shared query`,
# `keys of another text`. All three show beside the same texts in a batch where nothing is shared, as while a capture is
# active.

# %%
shared = pack([[7, 8, 1], [7, 8, 2, 3]], prefixes=[(7, 8), (7, 8)])
assert shared.position_ids.tolist() == [0, 1, 2, 2, 3]

queries = ["gravity", "a musical instrument", "where does rain come from"]
with capture(embedder, "pooled"):
    unshared = embedder.encode_query(queries)
assert abs(embedder.encode_query(queries) - unshared).max() < 1e-6, "queries of one prompt, shared or not"

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu", ops=specification)
pairs = [("gravity", "a force"), ("gravity", "a violin")]
with capture(reranker, "score"):
    unshared = reranker.predict(pairs)
assert abs(reranker.predict(pairs) - unshared).max() < 1e-6, "pairs of one query, shared or not"

# %% [markdown]
# ## Exercises
# 1. Which rows see which, for the whole batch, as one expression of `text_of_row` and `batch.position_ids`?
# 2. What is z of the first token of a text, and why?

# %%
# Solutions
p = batch.position_ids
assert torch.equal((text_of_row[:, None] == text_of_row) & (p[:, None] >= p), weights[0] > 0)  # 1.
assert torch.equal(z[0, 0], acts["layers.0.v"][0, 0])  # 2. its own value: it sees no other
