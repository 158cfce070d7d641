"""A server: embeddings, scores and ranks over HTTP, in the shapes of OpenAI, Cohere, Jina, vLLM and others.

``batching.py`` knows no web, ``requests.py`` makes its work of texts, ``schemas.py`` says what bodies may hold, and
``app.py`` is the web. None of it is imported by the core.
"""
