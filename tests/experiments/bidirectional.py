"""What if a token also saw those after it? Attention without its causal mask, swapped in.

Two texts differ in one word. With causal attention the tokens before it are the same in both; with attention both
ways, each of them changes. The model, which was trained with the mask, still retrieves nearly as well without it.
"""

from dataclasses import replace
from functools import partial

from lab import bars, held_out

from qwen3core import Embedder, capture
from qwen3core.evaluation import measure, search
from qwen3core.reference import attention

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
data, before_the_word, quality = held_out(queries=100, documents=400), {}, {}
both_ways = replace(embedder.model.ops, attention=partial(attention, causal=False))
for name, ops in {"causal": embedder.model.ops, "both ways": both_ways}.items():
    embedder.model.ops = ops
    with capture(embedder, "final_norm") as acts:
        embedder.encode(["The cat sleeps on the sofa.", "The cat sleeps on the roof."])
    sofa, roof = acts.per_text("final_norm")
    before_the_word[name] = (sofa - roof)[:5].norm(dim=1)
    quality[name] = measure(data, search(embedder, data))["nDCG@10"]
bars(quality, "nDCG@10 by attention")
assert before_the_word["causal"].max() < 1e-3 < 0.5 < before_the_word["both ways"].min()
assert 0.85 * quality["causal"] < quality["both ways"] < quality["causal"]
