"""Which layers can be left out, and what is lost?

Without its first layer the model retrieves nothing; any other one it hardly misses, and the first two alone are nearly
as good as all four. nDCG@10 on held-out pairs; nothing is trained again (own_loss.py does).
"""

from lab import bars, held_out

from qwen3core import Embedder
from qwen3core.evaluation import measure, search

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
data, layers, quality = held_out(queries=100, documents=400), embedder.model.layers, {}
pruned = {f"without layer {i}": layers[:i] + layers[i + 1 :] for i in range(4)}
for name, chosen in {"all": layers, **pruned, "first two": layers[:2]}.items():
    embedder.model.layers = chosen
    quality[name] = measure(data, search(embedder, data))["nDCG@10"]
bars(quality, "nDCG@10 with fewer layers")
assert quality["without layer 0"] < 0.3 * quality["all"]
assert min(quality[f"without layer {i}"] for i in (1, 2, 3)) > 0.85 * quality["all"]
assert quality["first two"] > 0.9 * quality["all"]
