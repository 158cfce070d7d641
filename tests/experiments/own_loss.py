"""Train with a loss of your own: half of the layers learn to give the vectors that all of them gave.

The loss is 1 - cosine with those. Each text is seen once, so that the loss is always of new ones; it more than halves.
What was learned is then saved, and opened again by three libraries, which give the same vector.
"""

import tempfile

import torch
from lab import bars, by_three_libraries, held_out

from qwen3core import Embedder

embedder, losses = Embedder.from_pretrained("tiny-embedding", dtype="float32"), []
texts = list(held_out(queries=1, documents=1200).corpus.values())
targets = embedder.encode(texts, convert_to_tensor=True)
embedder.model.layers = embedder.model.layers[:2]
optimizer = torch.optim.AdamW(embedder.model.parameters(), lr=5e-4)
for rows in [slice(start, start + 40) for start in range(0, 1200, 40)]:
    losses.append(1 - (embedder.encode(texts[rows], grad=True) * targets[rows]).sum(1).mean())
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
with tempfile.TemporaryDirectory() as folder:
    embedder.save(f"{folder}/half")
    ours, *theirs = by_three_libraries(f"{folder}/half", texts[0])
bars({"before": losses[0].item(), "after": losses[-1].item()}, "1 - cosine, of texts not yet seen")
assert losses[-1] < 0.6 * losses[0]
assert max(abs(ours - vector).max() for vector in theirs) < 1e-5 < 0.999 < ours @ embedder.encode(texts[0])
