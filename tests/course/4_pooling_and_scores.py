# %% [markdown]
# # 4. Pooling and scores
#
# The decoder gives one vector a token. A search needs one vector a text; a reranker needs one number a pair. After this
# lesson you can say
#
# - which row becomes the text's vector, and what the mean of all rows would be instead;
# - why a vector may be cut short (Matryoshka), and why it gets its unit length after the cut;
# - how two rows of a matrix make P(yes), and why their difference is taken in float32.

# %%
import torch
from held_out import read, recall_at_10
from torch.nn.functional import normalize

from qwen3core import Embedder, Ops, Reranker, capture

specification = Ops.reference()
embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu", ops=specification)
queries, documents, relevant = read(300)

# %% [markdown]
# ## The last row
# Only the last token has seen the whole text, since attention is causal: so its row is the text's vector, and the
# model was trained for that. It is brought to length 1, so that a dot product is a cosine.
#
# Planted mistake: `pooled one token early`.

# %%
with capture(embedder, "final_norm") as acts:
    embedder.encode_query(queries)
query_rows = acts.per_text("final_norm")  # one [length, H] a text
with capture(embedder, "final_norm") as acts:
    embedder.encode_document(documents)
document_rows = acts.per_text("final_norm")

last = [torch.stack([x[-1] for x in rows]) for rows in (query_rows, document_rows)]
vectors = last[1] / last[1].norm(dim=1, keepdim=True)
assert abs(vectors - embedder.encode_document(documents, convert_to_tensor=True)).max() < 1e-6, "the row of EOS"

# %% [markdown]
# Other ways to make one vector of the rows, compared by retrieval (recall@10, see lesson 1). The row before EOS is
# wrong, and nothing but the numbers says so. The mean of a query's rows is mostly its prompt, which all queries share.
# Without the prompt's rows the mean does better here than the last row, though the model was trained for the last row
# alone: measure, do not assume.


# %%
def compare(name, query_vectors, document_vectors):
    recall = recall_at_10(normalize(query_vectors, dim=1), normalize(document_vectors, dim=1), relevant)
    print(f"{name:36} {recall:.3f}")
    return recall


def pooled(function):
    return [torch.stack([function(x) for x in rows]) for rows in (query_rows, document_rows)]


(prompt,) = embedder.tokenizer.encode([embedder.prompts["query"]])
by_last = compare("last row, EOS", *last)
by_early = compare("row before EOS", *pooled(lambda x: x[-2]))
mean = pooled(lambda x: x.mean(dim=0))
by_mean = compare("mean", *mean)
text_mean = torch.stack([x[len(prompt) :].mean(dim=0) for x in query_rows])
by_text = compare("mean, without the rows of the prompt", text_mean, mean[1])
assert max(by_mean, by_early) < by_last / 2
assert by_text > by_last

# %% [markdown]
# ## Matryoshka
# The training asked the first 128 and the first 64 components to be good vectors by themselves, like a doll inside a
# doll. So one may cut, and store a quarter. Cut first, then bring to length 1. In the other order the lengths differ,
# and a dot product prefers documents that happen to be long in their first components. It shows most at 32, a width
# that nothing was trained for.
#
# Planted mistake: `normalised before the MRL cut`.

# %%
for dim in (256, 128, 64, 32):
    compare(f"first {dim}", *(x[:, :dim] for x in last))

ours = last[1][:, :32] / last[1][:, :32].norm(dim=1, keepdim=True)
theirs = embedder.encode_document(documents, truncate_dim=32, convert_to_tensor=True)
assert abs(ours - theirs).max() < 1e-6, "cut, then length 1"

wrong_queries, wrong_documents = (normalize(x, dim=1)[:, :32] for x in last)
lengths = wrong_documents.norm(dim=1)
wrong = recall_at_10(wrong_queries, wrong_documents, relevant)
right = recall_at_10(*(normalize(x[:, :32], dim=1) for x in last), relevant)
print(f"cut last: lengths {lengths.min():.2f} to {lengths.max():.2f}, recall@10 {wrong:.3f} in place of {right:.3f}")
assert wrong < right

# %% [markdown]
# ## P(yes)
# A language model scores every token as the next one: logit = (row of lm_head) . (last hidden state). A reranker needs
# two of the 12,026 rows, and the softmax of two numbers is the sigmoid of their difference:
#
#     e^a / (e^a + e^b) = 1 / (1 + e^(b - a)) = sigmoid(a - b) = sigmoid(h . (w_yes - w_no))
#
# Planted mistake: `yes and no swapped`.

# %%
reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu", ops=specification)
pairs = [("a musical instrument with strings", document) for document in documents[:200]]
with capture(reranker, "pooled") as acts:
    scores = reranker.predict(pairs, convert_to_tensor=True)
h = torch.stack(acts.per_text("pooled"))
answers = [ids[0] for ids in reranker.tokenizer.encode(["yes", "no"])]
w = reranker.model.embed_tokens.weight.detach()[answers]  # lm_head is tied to the embeddings: the same matrix
yes, no = (h @ w.T).unbind(dim=1)
assert abs(torch.sigmoid(yes - no) - scores).max() < 1e-6, "P(yes)"
assert abs(torch.softmax(torch.stack([yes, no]), dim=0)[0] - scores).max() < 1e-6

# %% [markdown]
# ## Why float32 there
# bfloat16 has 8 significant bits: between 2 and 4 its numbers are 1/64 apart. Two logits of that size, each rounded,
# then subtracted: many different documents get the same score, and the order among them is lost. Of the very same
# hidden states, rounded to bfloat16 as a model in bfloat16 gives them, the float32 difference loses none.

# %%
h16, w16 = h.bfloat16(), w.bfloat16()
yes16, no16 = (h16 @ w16.T).unbind(dim=1)
in_bfloat16, in_float32 = yes16 - no16, h16.float() @ (w16[0].float() - w16[1].float())
print(f"{len(in_float32.unique())} different scores in float32, {len(in_bfloat16.unique())} in bfloat16")
assert len(in_bfloat16.unique()) < 0.9 * len(pairs)
assert len(in_float32.unique()) == len(pairs)
order = in_float32.argsort(descending=True)
tie = next(i for i in range(len(pairs)) if in_bfloat16[order[i]] == in_bfloat16[order[i + 1]])
for i in order[tie : tie + 2]:
    exact, rounded = torch.sigmoid(in_float32[i]), torch.sigmoid(in_bfloat16[i])
    print(f"P(yes) {exact:.4f}, in bfloat16 {rounded:.4f}: {documents[i][:60]}")

# %% [markdown]
# ## Exercises
# 1. How good are the last 32 components, in place of the first?
# 2. Which is the smallest whole number whose sigmoid is exactly 1 in bfloat16? And in float32?
# 3. Add the same vector to both rows of `w`. What happens to P(yes)?

# %%
# Solutions
assert compare("1. last 32 components", *(x[:, -32:] for x in last)) < right
for dtype in (torch.bfloat16, torch.float32):
    print("2.", dtype, next(n for n in range(100) if torch.sigmoid(torch.tensor(float(n))).to(dtype) == 1))
yes, no = (h @ (w + 1).T).unbind(dim=1)
assert abs(torch.sigmoid(yes - no) - scores).max() < 1e-4  # 3. nothing: it cancels
