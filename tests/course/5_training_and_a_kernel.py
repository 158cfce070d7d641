# %% [markdown]
# # 5. Training, and a kernel of your own
#
# A loss that says which texts belong together, and a few steps that lower it; then an operation written again for a
# GPU, tested, and put into the model. Afterwards you can say
#
# - what InfoNCE rewards, and which texts of a batch it compares;
# - what a training step does, and how to see whether it helped with texts it never saw;
# - how a kernel computes, what to test it against, and what such a test can and cannot show.

# %%
import os
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels on the CPU; read when triton is imported, which training does, too

import triton
import triton.language as tl
from held_out import read, recall_at_10

from qwen3core import Embedder, Ops
from qwen3core.training.losses import Groups, info_nce

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32", ops="torch")
queries, documents, relevant = read(500)

# %% [markdown]
# ## InfoNCE
# A batch has B queries q_i and the documents d_i that answer them. Each q_i should be nearer to its own d_i than to the
# others. With cosines s, and a temperature t that makes small differences count,
#
#     loss = mean over i of -log(e^(s(q_i, d_i) / t) / Z_i)
#     Z_i  = e^(s(q_i, d_i) / t) + sum over j != i of (e^(s(q_i, d_j) / t) + e^(s(q_i, q_j) / t) + e^(s(d_i, d_j) / t))
#
# It is the cross-entropy of a choice: which of the candidates is the right one? A candidate that is nearer than the
# right one by more than 0.1 is left out, since it is probably right as well (arXiv:2506.05176, section 3.1).


# %%
def my_info_nce(q, d, t, margin=0.1):  # unit vectors [B, H] each
    losses = []
    for i in range(len(q)):
        others = [j for j in range(len(q)) if j != i]
        candidates = torch.cat([q[i] @ d[[i]].T, q[i] @ d[others].T, q[i] @ q[others].T, d[i] @ d[others].T])
        candidates = candidates[candidates <= candidates[0] + margin]
        losses.append(-torch.log_softmax(candidates / t, dim=0)[0])
    return torch.stack(losses).mean()


def batch(numbers, **options):
    q = embedder.encode_query([queries[n] for n in numbers], **options)
    return q, embedder.encode_document([documents[relevant[n]] for n in numbers], **options)


q, d = batch(range(16), convert_to_tensor=True)
rows = torch.arange(16, device=embedder.device)
groups = Groups(query=rows, positive=16 + rows, negative=rows[:0], owner=rows[:0])
theirs = info_nce(torch.cat([q, d]), groups, temperature=0.05, margin=0.1)
assert abs(my_info_nce(q, d, 0.05) - theirs) < 1e-5, "InfoNCE"
print(f"loss {theirs:.3f}; of a blind choice among 46 candidates {torch.tensor(46.0).log():.3f}")
assert my_info_nce(q, d, 0.05) < my_info_nce(q, d.roll(1, dims=0), 0.05)  # every query with a wrong document

# %% [markdown]
# ## A few steps
# `grad=True` gives vectors that remember how they were made. `backward` follows that graph to the weights: for each of
# five million numbers, how the loss would change with it. The optimizer moves each a little the other way. We train on
# 128 pairs, and measure on the other 119 queries, which no step has seen: a loss falls on what it is trained on anyway.


# %%
def recall():
    vectors = embedder.encode_query(queries[128:], convert_to_tensor=True)
    return recall_at_10(vectors, embedder.encode_document(documents, convert_to_tensor=True), relevant[128:])


before, losses = recall(), []
optimizer = torch.optim.AdamW(embedder.model.requires_grad_().parameters(), lr=1e-4, weight_decay=0)
for step in range(16):
    q, d = batch(range(step * 16 % 128, step * 16 % 128 + 16), grad=True)
    loss = my_info_nce(q, d, 0.05)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
after = recall()
print("loss", [f"{x:.2f}" for x in losses])
print(f"recall@10 of queries that were not trained on: {before:.3f} before, {after:.3f} after")
assert sum(losses[8:]) < sum(losses[:8]) / 2, "the loss of the second round"
assert after > before + 0.05, "recall on unseen queries"

# %% [markdown]
# ## A kernel
# On a GPU many programs run at once, and reading memory takes longer than computing. An RMSNorm of several PyTorch
# operations reads and writes every row several times; a kernel does so once. In Triton one writes what a single program
# does, here for one row: its number is `tl.program_id(0)`, and memory is a pointer and offsets. A block has a power of
# two of offsets: `mask` says which of them exist in the row.
#
# Without a GPU, `TRITON_INTERPRET=1` runs the programs one after another on the CPU.


# %%
@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    row = tl.program_id(0) * size + offsets
    x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=mask)
    normed = x * tl.rsqrt(tl.sum(x * x) / size + eps)
    tl.store(out_ptr + row, normed.to(weight.dtype) * weight, mask=mask)  # rounded before the weight, see lesson 3


def my_rms_norm(x, weight, eps):
    x, size = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    rms_norm_kernel[(x.numel() // size,)](x, weight, out, size, eps, BLOCK=triton.next_power_of_2(size))
    return out


# %% [markdown]
# What is right? Not the reference to the bit: the sums of a kernel have another order. The rule here: against the same
# formula in float64, the error is at most twice that of the reference in float32. The model's rows have 256 and 64
# numbers; 100 leaves a part of its block of 128 empty. A kernel can make the mistakes of lesson 3 again: does the test
# see `eps 1e-5`?

# %%
specification = Ops.reference()


def passes(op, size):
    x, weight = torch.randn(7, size).to(embedder.device), torch.randn(size).to(embedder.device)
    exact = specification.rms_norm(x.double(), weight.double(), 1e-6)
    ours, plain = ((f(x, weight, 1e-6) - exact).norm() for f in (op, specification.rms_norm))
    return bool(ours <= 2 * plain)


torch.manual_seed(0)
assert all(passes(my_rms_norm, size) for size in (256, 64, 100, 1)), "the kernel's error against float64"
assert not passes(lambda x, weight, eps: my_rms_norm(x, weight, 1e-5), 256)  # a test must be able to fail

# %% [markdown]
# Now into the model, in place of the norms of every layer and of every head. It can encode, but not train: it has no
# backward.

# %%
plain = embedder.encode("gravity")
embedder.model.ops = replace(embedder.model.ops, rms_norm=my_rms_norm)
print(embedder.model.ops)
assert abs(embedder.encode("gravity") - plain).max() < 1e-6, "a vector with the kernel"

# %% [markdown]
# The interpreter shows that indices, masks and formulas are right. It says nothing of speed, of the compiler, or of
# programs that disturb each other: for those, see [kernels/README.md](../../kernels/README.md) and a GPU.
#
# ## Exercises
# 1. What is the loss where all vectors of a batch are equal?
# 2. Write SwiGLU as an operation of your own, in plain PyTorch, with gate and up swapped. Does the test by float64 see
#    it? Does the embedding?
# 3. Leave `other=0.0` out of the kernel: what may stand in the offsets that do not exist, and which size would show it?

# %%
# Solutions
equal = torch.nn.functional.normalize(torch.ones(16, 4), dim=1)
assert abs(my_info_nce(equal, equal, 0.05) - torch.tensor(46.0).log()) < 1e-5  # 1. that of a blind choice
gate, up = torch.randn(2, 5, 8)
exact = specification.swiglu(gate.double(), up.double())
print(f"2. error against float64 {(specification.swiglu(up, gate) - exact).norm():.2f}: seen at once")
embedder.model.ops = replace(embedder.model.ops, swiglu=lambda gate, up: specification.swiglu(up, gate))
cosine = embedder.similarity(embedder.encode("gravity"), plain).item()
print(f"   cosine of the embeddings {cosine:.2f}: wrong, and by eye all is well")
assert 0.5 < cosine < 0.99
print("3. anything, and the sum would have it in; 256 and 64 fill their blocks and could not show it, 100 could")
