"""What does an attention head look at? One that finds names which the vocabulary has only in pieces.

A head's pattern has a row for each token: how much it takes from that token and from each one before, which sums to 1.
In layer 2 of the reranker, head 1, the last token takes all from the name in the query and the same name in the
document; but only where the name is in pieces, such as "min" "er", whose meaning no single embedding holds.
"""

import torch
from lab import heatmap

from qwen3core import Reranker, capture

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
names, on_names = {"miner": "worker", "diary": "journal", "sword": "weapon"}, {}
with capture(reranker, "layers.2.pattern") as acts:
    reranker.predict([(f"{kind} called {name}", f"{name}: a good {kind}") for name, kind in names.items()])
for name, pattern, tokens in zip(names, acts.per_text("layers.2.pattern"), acts.tokens, strict=True):
    assert torch.allclose(pattern.sum(2), torch.ones(()))
    assert not pattern.triu(1).any()
    called, document, colon = tokens.index(" called"), tokens.index("<Document"), tokens.index(":")
    of_name = [*range(called + 1, document - 1), *range(document + 2, colon)]  # of the query, of the document
    on_names[name] = float(pattern[1, -1, of_name].sum())
query, first = acts.tokens[0].index("<Query"), acts.per_text("layers.2.pattern")[0][1]
heatmap(first[query:, query:], acts.tokens[0][query:], acts.tokens[0][query:], "Layer 2, head 1: rows look at columns")
assert on_names["sword"] < 0.2 < 0.95 < min(on_names["miner"], on_names["diary"])
