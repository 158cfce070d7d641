"""Last token, mean, or late interaction: which vectors of the same hidden states retrieve best?

The model was trained for its last token. The mean of all tokens, and late interaction (for each token of the query,
its best match among the document's), do about as well without training, but only without the query's prompt: its many
tokens, the same in all queries, drown the few that differ.
"""

from dataclasses import replace

from lab import bars, held_out, ndcg

from qwen3core import Embedder

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
data, last, quality = held_out(queries=100, documents=400), embedder.layout, {}
queries, documents = list(data.queries.values()), list(data.corpus.values())
mean = replace(last, pooling=("mean",))
for name, layout in {"last": last, "mean": mean, "mean, no prompt": replace(mean, include_prompt=False)}.items():
    embedder.model.layout = layout
    similarity = embedder.similarity(embedder.encode_query(queries), embedder.encode_document(documents))
    quality[name] = ndcg(data, similarity)
of_documents = embedder.encode_tokens(documents)
for name, task in {"late interaction": "query", "late interaction, no prompt": None}.items():
    quality[name] = ndcg(data, embedder.similarity(embedder.encode_tokens(queries, task=task), of_documents))
bars(quality, "nDCG@10 by pooling")
assert max(quality["mean"], quality["late interaction"]) < 0.3 * quality["last"]
assert min(quality["mean, no prompt"], quality["late interaction, no prompt"]) > 0.9 * quality["last"]
