"""Where, and in which layer, does a reranker compare the query with the document?

Two pairs differ in one word of the query. Into a run of the wrong pair, the stream of the right one is patched at one
layer and one token; the map shows how much of the two logits' difference that brings back. Read it from top to bottom:
the information lies in the query's word, is taken up by the colon that ends the same word in the document, and goes
from there to the last token.
"""

import torch
from lab import heatmap

from qwen3core import Reranker, capture, edit
from qwen3core.edits import patch

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
document = "miner: a worker who digs coal"
with capture(reranker, "embed", "layers.*.resid_post") as acts:
    right = reranker.predict(("worker called miner", document), logit=True)
wrong = reranker.predict(("worker called plumber", document), logit=True)
tokens, names = acts.tokens[0], list(acts)
word, colon, restored = tokens.index(" min"), tokens.index(":"), torch.zeros(len(names), len(tokens))
for row, name in enumerate(names):
    for position in range(word, len(tokens)):
        with edit(reranker, {name: patch(acts, position)}):
            logit = reranker.predict(("worker called plumber", document), logit=True)
        restored[row, position] = float((logit - wrong) / (right - wrong))
heatmap(restored[:, word:], names, tokens[word:], "Share of the logits' difference that a patch brings back")
assert restored[1, colon] > 0.5
assert restored.argmax(1)[[0, 1, 2, 4]].tolist() == [word, colon, colon, len(tokens) - 1]
