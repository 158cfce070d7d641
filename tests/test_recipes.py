"""Recipes: qwen3core inside other libraries, a few lines of adapter each; run where those are installed."""

from typing import Any

import pytest
import tolerances

from qwen3core import Embedder, samples

DOCUMENTS, QUERY = samples.DEMO_DOCUMENTS, samples.DEMO_QUERY


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding")


@pytest.fixture(scope="module")
def expected(embedder):
    """Of each document, the cosine that qwen3core itself gives it."""
    cosines = embedder.similarity(embedder.encode_query(QUERY), embedder.encode_document(DOCUMENTS))[0]
    return pytest.approx(dict(zip(DOCUMENTS, cosines.tolist(), strict=True)), abs=tolerances.SAME_TEXT_FP32)


def test_langchain(embedder, expected):
    pytest.importorskip("langchain_core")
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import InMemoryVectorStore

    class Qwen3Embeddings(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embedder.encode_document(texts).tolist()

        def embed_query(self, text: str) -> list[float]:
            return embedder.encode_query(text).tolist()

    store = InMemoryVectorStore.from_texts(DOCUMENTS, Qwen3Embeddings())
    found = store.similarity_search_with_score(QUERY, k=len(DOCUMENTS))
    assert {document.page_content: score for document, score in found} == expected


def test_llama_index(embedder, expected):
    pytest.importorskip("llama_index.core")
    from llama_index.core import VectorStoreIndex
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.schema import TextNode

    class Qwen3Embedding(BaseEmbedding):
        def _get_text_embedding(self, text: str) -> list[float]:
            return embedder.encode_document(text).tolist()

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return embedder.encode_document(texts).tolist()

        def _get_query_embedding(self, query: str) -> list[float]:
            return embedder.encode_query(query).tolist()

        async def _aget_query_embedding(self, query: str) -> list[float]:
            return self._get_query_embedding(query)

    index = VectorStoreIndex([TextNode(text=text) for text in DOCUMENTS], embed_model=Qwen3Embedding())
    found = index.as_retriever(similarity_top_k=len(DOCUMENTS)).retrieve(QUERY)
    assert {node.text: node.score for node in found} == expected


def test_haystack(embedder, expected, monkeypatch):
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")  # which is read where it is imported
    pytest.importorskip("haystack")
    from haystack import Document, Pipeline, component
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    @component
    class Qwen3TextEmbedder:
        @component.output_types(embedding=list[float])
        def run(self, text: str) -> dict[str, Any]:
            return {"embedding": embedder.encode_query(text).tolist()}

    vectors = embedder.encode_document(DOCUMENTS).tolist()
    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    store.write_documents([Document(content=t, embedding=v) for t, v in zip(DOCUMENTS, vectors, strict=True)])
    pipeline = Pipeline()
    pipeline.add_component("embedder", Qwen3TextEmbedder())
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=len(DOCUMENTS)))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    found = pipeline.run({"embedder": {"text": QUERY}})["retriever"]["documents"]
    assert {document.content: document.score for document in found} == expected
