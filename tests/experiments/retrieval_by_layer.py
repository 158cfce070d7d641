"""How good an embedding would each layer give?

The stream out of each layer, at the last token, goes through the final norm as if the model ended there, and is
measured by nDCG@10 on held-out pairs. The token embedding knows nothing, since the last token is the same for all
texts; the first layer gives nine tenths of the quality already, so that others may be left out (pruning.py).
"""

from lab import bars, held_out, ndcg

from qwen3core import Embedder, capture

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
model, data, quality = embedder.model, held_out(queries=100, documents=400), {}
with capture(embedder, "embed", "layers.*.resid_post") as of_queries:
    queries = embedder.encode_query(data.queries.values())
with capture(embedder, "embed", "layers.*.resid_post") as of_documents:
    documents = embedder.encode_document(data.corpus.values())
for name in of_queries:
    vectors = [model.norm(acts.at(name, text=None)) for acts in (of_queries, of_documents)]
    quality[name] = ndcg(data, embedder.similarity(*vectors))
bars(quality, "nDCG@10 of the embedding that each layer would give")
assert abs(quality["layers.3.resid_post"] - ndcg(data, embedder.similarity(queries, documents))) < 0.001
assert quality["embed"] < 0.1 < 0.85 * quality["layers.3.resid_post"] < quality["layers.0.resid_post"]
