"""Which attention heads does a reranker need?

Each head in turn puts out its mean over all tokens, so that it says nothing of a text in particular. The share that is
lost of the margin between right and wrong documents ranks the heads: three of them lose half of it, and half of them
next to nothing.
"""

from lab import bars, right_and_wrong

from qwen3core import Reranker, capture, edit
from qwen3core.edits import mean_ablate, replace_head

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
right, wrong = right_and_wrong(20)


def margin() -> float:
    logits = reranker.predict(right + wrong, logit=True)
    return float(logits[:20].mean() - logits[20:].mean())


with capture(reranker, "layers.*.z") as usual:
    whole = margin()
lost = {}
for layer, head in [(layer, head) for layer in range(4) for head in range(4)]:
    with edit(reranker, replace_head(layer, head, mean_ablate(usual))):
        lost[f"layer {layer}, head {head}"] = 1 - margin() / whole
ranked = dict(sorted(lost.items(), key=lambda item: -item[1]))
bars(ranked, "Share of the margin that is lost without a head")
assert sum(share > 0.4 for share in ranked.values()) >= 3
assert sum(abs(share) < 0.15 for share in ranked.values()) >= 8
