"""Search what ``qwen3core embed MODEL corpus.jsonl -o vectors/`` has embedded: faiss finds, a reranker orders."""

import faiss
import numpy as np
import pyarrow.parquet as pq

from qwen3core import Embedder, Reranker
from qwen3core.reading import read_jsonl

table = pq.read_table("vectors")
index = faiss.IndexFlatIP(table["embedding"].type.list_size)
index.add(np.stack(table["embedding"].to_numpy()))
texts = {row["id"]: row["text"] for row, _ in read_jsonl("corpus.jsonl")}
query = "a musical instrument"
_, [nearest] = index.search(Embedder.from_pretrained("Qwen/Qwen3-Embedding-0.6B").encode_query([query]), 20)
documents = [texts[table["id"][int(i)].as_py()] for i in nearest if i >= 0]
for hit in Reranker.from_pretrained("Qwen/Qwen3-Reranker-0.6B").rank(query, documents, top_k=3, return_documents=True):
    print(f"{hit['score']:.3f}  {hit['text']}")
