"""Does a token's stream say whether the definition has begun?

Texts are "words: definition". A linear probe learns from the stream whether the colon has passed, while the model
runs: ``into`` hands each batch's activations over and holds none, so that any number of texts would do. Accuracy is
that on a batch before it is learned from. From the embeddings, which know the token alone, the probe gets some right,
since definitions use other words; after two layers many more.
"""

import torch
from lab import bars, held_out
from torch.nn.functional import binary_cross_entropy_with_logits

from qwen3core import Embedder, capture

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
probes = {name: torch.nn.Linear(256, 1) for name in ("embed", "layers.1.resid_post")}
optimizer = torch.optim.Adam(torch.nn.ModuleList(probes.values()).parameters(), lr=0.01)
accuracy: dict[str, list[float]] = {name: [] for name in probes}


def learn(acts) -> None:
    colon_passed = [torch.tensor([token == ":" for token in tokens]).cumsum(0) > 0 for tokens in acts.tokens]
    for name, probe in probes.items():
        logits, labels = probe(torch.cat(acts.per_text(name)))[:, 0], torch.cat(colon_passed).float()
        accuracy[name].append(float(((logits > 0) == labels).float().mean()))
        binary_cross_entropy_with_logits(logits, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


with capture(embedder, *probes, into=learn, stop_at="layers.1.resid_post"):
    embedder.encode(held_out(queries=1, documents=3000).corpus.values(), batch_tokens=1024)
bars({name: sum(values[30:]) / len(values[30:]) for name, values in accuracy.items()}, "Accuracy of the later batches")
assert sum(accuracy["layers.1.resid_post"][30:]) > 1.05 * sum(accuracy["embed"][30:])
