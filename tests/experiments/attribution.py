"""Which tokens make one document better than another? By gradient x input, and by integrated gradients.

Both share out the difference of two documents' logits among the tokens in which they differ. Gradient x input looks at
one point only, and what it gives does not sum to that difference. Integrated gradients (arXiv:1703.01365) average the
gradient along the straight line from the worse document's embeddings to the better one's; their sum is the difference,
but for the finite steps (the completeness error). Nearly all of it belongs to the word that the query asks for.
"""

import torch
from lab import bars

from qwen3core import Reranker, capture, edit

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
query, documents = "worker called miner", ["miner: a worker who digs coal", "weaver: a person who weaves cloth"]
with capture(reranker, "embed", detach=True) as acts:
    better, worse = reranker.predict([(query, document) for document in documents], logit=True)
[x, baseline], tokens = acts.per_text("embed"), acts.tokens[0]


def gradient(embeddings: torch.Tensor) -> torch.Tensor:
    embeddings = embeddings.clone().requires_grad_()
    with edit(reranker, {"embed": lambda _: embeddings}):
        return torch.autograd.grad(reranker.predict((query, documents[0]), logit=True, grad=True), embeddings)[0]


by_input = (gradient(x) * (x - baseline)).sum(1)
path = [gradient(baseline + (x - baseline) * (step + 0.5) / 32) for step in range(32)]
integrated = (torch.stack(path).mean(0) * (x - baseline)).sum(1)
shares = {token: float(share) for token, share in zip(tokens, integrated, strict=True) if share}
bars(shares, "Share of each token in the difference of the logits")
assert abs(integrated.sum() / (better - worse) - 1) < 0.01 < 0.5 < abs(by_input.sum() / (better - worse) - 1)
assert integrated[tokens.index(":") - 2 : tokens.index(":")].sum() > 0.9 * (better - worse)
