"""In which layer does a reranker come to its answer?

The logit lens reads the stream out of each layer as if the model ended there: final norm, then the direction of
P(yes), the difference of two rows of the lm_head. Its mean is compared between right and wrong documents: before the
first layer they are equal, each layer pulls them further apart, and after the last one it is the reranker's own logit.
"""

import torch
from lab import bars, right_and_wrong

from qwen3core import Reranker, capture

reranker = Reranker.from_pretrained("tiny-reranker", dtype="float32")
model = reranker.model
yes, no = model.lm_head_rows(reranker.layout.answers)
right, wrong = right_and_wrong(50)
with capture(reranker, "embed", "layers.*.resid_post") as acts:
    logits = reranker.predict(right + wrong, logit=True, convert_to_tensor=True)
gap = {}
for name in acts:
    lens = (model.norm(acts.at(name, text=None)) @ (yes - no)).detach()
    gap[name] = float(lens[:50].mean() - lens[50:].mean())
bars(gap, "Logit of yes, right minus wrong documents")
assert abs(gap["embed"]) < 1e-4
assert list(gap.values()) == sorted(gap.values())
assert torch.allclose(lens, logits, atol=1e-3)
