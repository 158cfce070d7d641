"""The server: real clients, equal to offline, errors by name, many at once, whoever leaves or is slow.

All traffic is on 127.0.0.1. ``SOAK_SECONDS=600 pytest -m slow -s -k soak tests/test_serving.py`` is the long run.
"""

import base64
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import uvicorn
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from tolerances import SAME_TEXT_FP32, SERVER_GROWTH

from qwen3core import Embedder, Reranker, pack
from qwen3core.commands import arguments, main
from qwen3core.serving import gate
from qwen3core.serving.app import create_app
from qwen3core.serving.batching import Batcher, Closed, QueueFull, Work

TEXTS = ["the violin is an instrument", "rain fell on the roof", "", "北京 is a city", "bread " * 90]
QUERY = "a musical instrument"


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("tiny-embedding", dtype="float32", device="cpu", max_length=512)


@pytest.fixture(scope="module")
def reranker():
    return Reranker.from_pretrained("tiny-reranker", dtype="float32", device="cpu", max_length=512)


@contextmanager
def listening(models, **options):
    """A server in a thread; yields its address and its application."""
    app = create_app(models, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(embedder, reranker):
    with listening({"tiny-embedding": embedder, "tiny-reranker": reranker}, max_body=2**16) as (address, _):
        yield address


def ask(url, path, body=None, *, method=None, **headers):
    """(status, answer, headers); body: JSON, or bytes as they are."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, data, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(content) if is_json else content.decode(), response.headers


def embed(url, texts, **fields):
    status, answer, _ = ask(url, "/v1/embeddings", {"input": texts, "encoding_format": "base64"} | fields)
    assert status == 200, answer
    return np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]])


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME_TEXT_FP32)


# Clients.


def test_openai(url, embedder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    expected = embedder.encode(TEXTS)

    def vectors(**options):
        return np.array([item.embedding for item in client.embeddings.create(model="tiny-embedding", **options).data])

    same(vectors(input=TEXTS), expected)  # the client asks for base64
    same(vectors(input=TEXTS, encoding_format="float"), expected)
    same(vectors(input=TEXTS[0]), expected[:1])
    same(vectors(input=TEXTS, dimensions=40, user="me"), embedder.encode(TEXTS, truncate_dim=40))
    bare, whole = embedder.tokenizer.encode(TEXTS[:2]), embedder.to_sequences(TEXTS[:2])
    same(vectors(input=bare), expected[:2])
    same(vectors(input=whole), expected[:2])  # which have their EOS
    same(vectors(input=whole[0]), expected[:1])
    queries = embedder.encode_query(TEXTS)
    same(vectors(input=TEXTS, extra_body={"input_type": "query"}), queries)
    same(vectors(input=TEXTS, extra_body={"prompt_name": "query"}), queries)
    same(vectors(input=bare, extra_body={"input_type": "query"}), queries[:2])
    same(
        vectors(input=TEXTS, extra_body={"instruction": "Find it"}), embedder.encode_query(TEXTS, instruction="Find it")
    )
    usage = client.embeddings.create(model="tiny-embedding", input=TEXTS).usage
    assert usage.prompt_tokens == usage.total_tokens == sum(map(len, embedder.to_sequences(TEXTS)))
    assert [model.id for model in client.models.list()] == ["tiny-embedding", "tiny-reranker"]
    assert client.models.retrieve("tiny-reranker").id == "tiny-reranker"
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="other", input="x")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.embeddings.create(model="tiny-embedding", input="x", dimensions=257)
    assert error.value.param == "dimensions"
    engine = openai.OpenAI(base_url=f"{url}/engines/llama.cpp/v1", api_key="none", max_retries=0)
    assert len(engine.embeddings.create(model="tiny-embedding", input="x").data[0].embedding) == 256


def test_cohere(url, reranker):
    cohere = pytest.importorskip("cohere")
    expected = reranker.rank(QUERY, TEXTS, top_k=3)
    one, two = cohere.Client("key", base_url=url), cohere.ClientV2("key", base_url=url)
    for client in (one, two):
        found = client.rerank(model="tiny-reranker", query=QUERY, documents=TEXTS, top_n=3).results
        assert [hit.index for hit in found] == [hit["corpus_id"] for hit in expected]
        same([hit.relevance_score for hit in found], [hit["score"] for hit in expected])
    with pytest.raises(cohere.errors.UnprocessableEntityError) as error:
        two.rerank(model="tiny-reranker", query=QUERY, documents=TEXTS, max_tokens_per_doc=9)
    assert error.value.body["error"]["param"] == "max_tokens_per_doc"
    found = one.rerank(model="tiny-reranker", query=QUERY, documents=[{"text": "rain"}, "bread"], return_documents=True)
    assert {hit.document.text for hit in found.results} == {"rain", "bread"}


def test_langchain(url, embedder, monkeypatch):
    langchain_openai = pytest.importorskip("langchain_openai")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    client = langchain_openai.OpenAIEmbeddings(
        model="tiny-embedding", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    same(client.embed_documents(TEXTS), embedder.encode(TEXTS))
    same(client.embed_query(TEXTS[0]), embedder.encode(TEXTS[0]))


def test_llama_index(url, embedder):
    """Not in the ``test`` extra: it brings 90 MB, nltk, sqlalchemy and aiohttp among them."""
    openai_like = pytest.importorskip("llama_index.embeddings.openai_like")
    client = openai_like.OpenAILikeEmbedding(model_name="tiny-embedding", api_base=f"{url}/v1", api_key="none")
    texts = [text for text in TEXTS if text]
    same(client.get_text_embedding_batch(texts), embedder.encode(texts))
    same(client.get_query_embedding(texts[0]), embedder.encode(texts[0]))


# Shapes.


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_rerank(url, reranker, path):
    body = {"query": QUERY, "documents": TEXTS, "instruction": "Judge", "top_n": 2}
    _, answer, _ = ask(url, path, body)
    expected = reranker.rank(QUERY, TEXTS, instruction="Judge", top_k=2)
    assert [hit["index"] for hit in answer["results"]] == [hit["corpus_id"] for hit in expected]
    same([hit["relevance_score"] for hit in answer["results"]], [hit["score"] for hit in expected])
    texts = [hit.get("document", {}).get("text") for hit in answer["results"]]
    assert texts == ([None] * 2 if path == "/v2/rerank" else [TEXTS[hit["corpus_id"]] for hit in expected])
    [tokens] = {answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]}
    template = reranker.tokenizer.template
    assert tokens == sum(map(len, reranker.to_sequences([template.fill("Judge", QUERY, text) for text in TEXTS])))


def test_rerank_as_text_embeddings_inference(url, reranker):
    _, answer, _ = ask(url, "/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    logits = reranker.predict([(QUERY, text) for text in TEXTS], logit=True)
    same([hit["score"] / 10 for hit in answer], sorted(logits / 10, reverse=True))
    assert [hit["text"] for hit in answer] == [TEXTS[hit["index"]] for hit in answer]
    _, answer, _ = ask(url, "/rerank", {"query": QUERY, "texts": ["rain"]})
    assert answer == [{"index": 0, "score": pytest.approx(float(reranker.predict((QUERY, "rain"))), abs=1e-6)}]


def test_score(url, reranker):
    for first in (QUERY, [QUERY], [QUERY, "rain", "x", "y", "z"]):
        _, answer, _ = ask(url, "/v1/score", {"text_1": first, "text_2": TEXTS})
        queries = first if len(first) == len(TEXTS) else [QUERY] * len(TEXTS)
        expected = reranker.predict(list(zip(queries, TEXTS, strict=True)))
        same([item["score"] for item in answer["data"]], expected)


def test_tokenize(url, embedder):
    _, answer, _ = ask(url, "/tokenize", {"prompt": TEXTS[0]})
    assert answer == {"tokens": embedder.to_sequences(TEXTS[:1])[0], "count": 6, "max_model_len": 512}
    _, answer, _ = ask(url, "/tokenize", {"prompt": TEXTS[0], "add_special_tokens": False})
    assert answer["tokens"] == embedder.tokenizer.encode(TEXTS[:1])[0]


@pytest.mark.parametrize("path", ["/engines/v1/embeddings", "/engines/llama.cpp/v1/embeddings"])
def test_docker_model_runners_paths(url, path):
    status, answer, _ = ask(url, path, {"model": "tiny-embedding", "input": "x"})
    assert (status, len(answer["data"])) == (200, 1)


# What is wrong.

LONG = "bread " * 600


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("/v1/embeddings", b'{"input": "x"', 400, None, "body: expected JSON"),
        ("/v1/embeddings", b"[" * 30000, 400, None, "body"),
        ("/v1/embeddings", b'{"input": "\\ud800"}', 422, "input", "input: expected Unicode text, found a lone surr"),
        ("/v1/embeddings", b'{"input": "x", "\\ud800": 1}', 422, "body", "body: input should be a valid string"),
        ("/v1/embeddings", [], 422, "body", "body: "),
        ("/v1/embeddings", {}, 422, "input", "input: field required"),
        ("/v1/embeddings", {"input": []}, 422, "input", "input: list should have at least 1 item"),
        ("/v1/embeddings", {"input": [[]]}, 422, "input.0", "input.0: list should have at least 1 item"),
        ("/v1/embeddings", {"input": ["x", 3]}, 422, "input.1", "input.1: input should be a valid string"),
        ("/v1/embeddings", {"input": [3, True]}, 422, "input.1", "input.1: input should be a valid integer"),
        ("/v1/embeddings", {"input": [-1]}, 422, "input.0", "input.0: input should be greater than or equal to 0"),
        ("/v1/embeddings", {"input": [[3], [20000]]}, 422, "input.1", "input.1: expected token ids below 12026, found"),
        ("/v1/embeddings", {"input": ["x"] * 2049}, 422, "input", "input: list should have at most 2048 items"),
        ("/v1/embeddings", {"input": ["x", LONG]}, 422, "input.1", "input.1: expected at most 512 tokens, or truncate"),
        (
            "/v1/embeddings",
            {"input": "x", "dimensions": 257},
            422,
            "dimensions",
            "dimensions: expected an integer from",
        ),
        ("/v1/embeddings", {"input": "x", "dimensions": "9"}, 422, "dimensions", "dimensions: input should be"),
        ("/v1/embeddings", {"input": "x", "prompt_name": "y"}, 422, "prompt_name", "prompt_name: expected one of"),
        ("/v1/embeddings", {"input": "x", "late": 1}, 422, "late", "late: extra inputs are not permitted"),
        ("/v1/embeddings", {"input": "x", "model": "y"}, 404, "model", "model: expected one of tiny-embedding, tiny-r"),
        ("/v1/embeddings", {"input": "x", "model": "tiny-reranker"}, 422, "model", "model: expected one for the job"),
        ("/v1/rerank", {"query": "x", "documents": []}, 422, "documents", "documents: list should have at least 1"),
        ("/v1/rerank", {"query": "x", "documents": [{"t": ""}]}, 422, "documents.0.text", "documents.0.text: field"),
        (
            "/v1/rerank",
            {"query": LONG, "documents": ["x"], "truncate": False},
            422,
            "documents.0",
            "documents.0: expec",
        ),
        ("/rerank", {"query": "x", "texts": ["x", LONG]}, 422, "texts.1", "texts.1: expected at most 512 tokens"),
        ("/v1/score", {"text_1": ["x"] * 2, "text_2": ["x"] * 3}, 422, "text_1", "text_1: expected 1 or 3 texts"),
        ("/v1/embeddings", {"input": "x" * 2**16}, 413, None, "body: expected at most 65536 bytes"),
        ("/v1/embeddings", None, 405, None, "Method Not Allowed"),
        ("/v1/models/none", None, 404, "model", "model: expected one of"),
        ("/nowhere", None, 404, None, "Not Found"),
    ],
)
def test_errors(url, path, body, status, param, message):
    found, answer, _ = ask(url, path, body)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert answer["error"]["message"].startswith(message)
    assert answer["error"]["type"] == "invalid_request_error"


def test_truncate(url, embedder, reranker):
    with pytest.warns(UserWarning, match="truncated"):
        expected = embedder.encode([LONG, "x"])
    same(embed(url, [LONG, "x"], truncate=True), expected)
    with pytest.warns(UserWarning, match="truncated"):
        score = reranker.predict((QUERY, LONG))
    _, answer, _ = ask(url, "/v2/rerank", {"query": QUERY, "documents": [LONG]})
    same(answer["results"][0]["relevance_score"], score)


def test_a_large_body_is_refused_while_it_is_sent(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 2**17
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_key(embedder):
    with listening({"tiny": embedder}, api_key="geheim\u00e9") as (url, _):
        for given in ({}, {"Authorization": "Bearer geheim"}, {"Authorization": "Basic geheim\u00e9"}):
            status, answer, headers = ask(url, "/v1/embeddings", {"input": "x"}, **given)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert headers["WWW-Authenticate"] == "Bearer"
        assert ask(url, "/metrics")[0] == 401
        assert ask(url, "/health")[0] == ask(url, "/docs")[0] == 200
        right = "Bearer geheim\u00e9".encode().decode("latin-1")
        assert ask(url, "/v1/embeddings", {"input": "x"}, Authorization=right)[0] == 200
        assert "HTTPBearer" in ask(url, "/openapi.json")[1]["components"]["securitySchemes"]


def test_a_slow_body(embedder, monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)
    with listening({"tiny": embedder}) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            found = connection.makefile("rb").read()  # to the end: the server closes it
    assert found.startswith(b"HTTP/1.1 408")
    assert b"within 0.2 seconds, found 1 bytes" in found


# Many at once.


class Held(Embedder):
    """An embedder whose batches wait until they are let go, and are counted."""

    def hold(self):
        self.go, self.started, self.batches = threading.Event(), threading.Event(), []

    def compute(self, batch, **options):
        self.batches.append(len(batch.indices))
        self.started.set()
        assert self.go.wait(60)
        if any(id_ == 77 for id_ in batch.input_ids.tolist()):
            raise ArithmeticError("text 77")
        return super().compute(batch, **options)


@pytest.fixture
def held():
    embedder = Held.from_pretrained("tiny-embedding", dtype="float32", device="cpu", max_length=512)
    embedder.hold()
    yield embedder
    embedder.go.set()


def work(embedder, sequences):
    return lambda: Work(embedder, sequences, [()] * len(sequences), {})


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(batcher, n):
    until(lambda: len(batcher._waiting) == n)


def test_requests_share_batches_and_large_ones_take_turns(held):
    batcher, order = Batcher(batch_tokens=100), []
    first = batcher.submit(work(held, [[5]]))
    held.started.wait()
    large = batcher.submit(work(held, [[5] * 60] * 3))
    waiting(batcher, 1)
    small = [batcher.submit(work(held, [[6] * n] * 2)) for n in range(1, 9)]
    waiting(batcher, 9)
    for name, future in [("large", large), *(("small", one) for one in small)]:
        future.add_done_callback(partial(lambda name, _: order.append(name), name))
    held.go.set()
    batcher.close()
    assert first.result().rows.shape == (1, 256)
    # 60 rows, and 2, 4, ... 10 beside them; then 12, 14 and 16, beside which the next 60 do not fit.
    assert held.batches[:3] == [1, 1 + 2 * 5, 3 * 2]
    assert order == ["small"] * 8 + ["large"]
    assert large.result().tokens == 180
    with pytest.raises(Closed):
        batcher.submit(work(held, [[5]]))


def test_one_faulty_request_fails_alone(held):
    batcher = Batcher()
    first = batcher.submit(work(held, [[5]]))
    held.started.wait()
    good, bad = batcher.submit(work(held, [[5, 6], [7]])), batcher.submit(work(held, [[5], [77]]))
    worse = batcher.submit(lambda: work(held, [[5]])().no_such_thing)
    waiting(batcher, 2)
    held.go.set()
    batcher.close()
    assert held.batches == [1, 4, 2, 2]
    assert first.result().tokens == 1
    same(good.result().rows, held.model.embed(pack([[5, 6], [7]])).detach().numpy())
    with pytest.raises(ArithmeticError):
        bad.result()
    with pytest.raises(AttributeError):
        worse.result()


def test_cancelled_requests_are_not_computed(held):
    batcher = Batcher(max_requests=3)
    batcher.submit(work(held, [[5]]))
    held.started.wait()
    futures = [batcher.submit(work(held, [[5]] * 9)) for _ in range(2)]
    waiting(batcher, 2)
    with pytest.raises(QueueFull):
        batcher.submit(work(held, [[5]]))
    assert all(future.cancel() for future in futures)
    last = batcher.submit(work(held, [[5]] * 2))
    held.go.set()
    batcher.close()
    assert last.result().tokens == 2
    assert held.batches == [1, 2]


def test_what_is_said_while_the_model_computes(held):
    """Health answers; a full queue refuses; a client that leaves is not computed; what was taken is answered."""
    with ThreadPoolExecutor(4) as pool, listening({"tiny": held}, max_requests=2) as (url, app):
        batcher = app.state.service.batcher
        first = pool.submit(embed, url, ["x"])
        held.started.wait()
        assert ask(url, "/health")[0] == 200
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            body = b'{"input": ["a", "b", "c", "d", "e"]}'
            head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: batcher.unfinished == 2)
            status, answer, headers = ask(url, "/v1/embeddings", {"input": "x"})
            assert (status, answer["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        until(lambda: batcher.unfinished == 1)
        second = pool.submit(embed, url, ["x", "y"])
        until(lambda: batcher.unfinished == 2)
        batcher.accepting = False  # as when told to stop
        assert ask(url, "/v1/embeddings", {"input": "x"})[0] == ask(url, "/health")[0] == 503
        held.go.set()
        assert (len(first.result()), len(second.result())) == (1, 2)
        _, found, _ = ask(url, "/metrics")
        assert 'qwen3core_requests_total{route="/v1/embeddings",status="499"} 1.0' in found
        assert "qwen3core_texts_total 3.0" in found
    assert held.batches == [1, 2]


def test_errors_of_the_servers_own_say_no_text(held, capsys):
    held.go.set()
    with listening({"tiny": held}) as (url, _):
        status, answer, _ = ask(url, "/v1/embeddings", {"input": [77]})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "77" not in answer["error"]["message"]
    logged = capsys.readouterr().err
    assert "ArithmeticError, message left out" in logged
    assert not re.search(r"text 77$", logged, re.MULTILINE)


def test_results_that_are_not_finite_are_errors(embedder):
    class Broken(Embedder):
        def compute(self, batch, **options):
            return super().compute(batch, **options).log()

    broken = Broken(embedder.model, embedder.tokenizer)
    with listening({"tiny": broken}) as (url, _):
        assert ask(url, "/v1/embeddings", {"input": "x"})[0] == 500


# Load.


class Load:
    """Clients that send what is right, wrong, too large or slow, or leave, until the time is out."""

    def __init__(self, url, embedder, reranker, seed=0):
        self.url, self.chance, self.sent = url, random.Random(seed), []
        words = ["gravity", "violin", "rain", "北京", "bread", "which?", "sixty-four", "the", "of"]
        texts = [" ".join(self.chance.choices(words, k=self.chance.randint(0, 60))) for _ in range(60)]
        self.vectors = dict(zip(texts, embedder.encode(texts), strict=True))
        self.queries = dict(zip(texts, embedder.encode_query(texts), strict=True))
        self.scores = dict(zip(texts, reranker.predict([(QUERY, text) for text in texts]), strict=True))
        self.texts = texts
        rare = (self.malformed, self.oversized, self.leaves, self.slow)
        self.kinds = {self.embeds: 6, self.asks: 3, self.ranks: 3} | dict.fromkeys(rare, 1)

    def run(self, clients, seconds=0):
        """How often what was sent had which answer: each client sends each kind once, then more until the time is out.

        Raises what a client raised.
        """
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(self._client, random.Random(n), end) for n in range(clients)]:
                future.result()
        return Counter(self.sent)

    def _client(self, chance, end):
        kinds = chance.sample(list(self.kinds), len(self.kinds))
        while kinds or time.monotonic() < end:
            [kind] = [kinds.pop()] if kinds else chance.choices(list(self.kinds), list(self.kinds.values()))
            self.sent.append(f"{kind.__name__} {kind(chance)}")

    def _accepted(self, chance, path, body, check):
        """200, or 429 where the queue is full."""
        status, answer, headers = ask(self.url, path, body)
        if status == 429:
            assert headers["Retry-After"] == "1"
            time.sleep(0.05)
        else:
            assert status == 200, answer
            check(answer)
        return status

    def _some(self, chance):
        return chance.choices(self.texts, k=chance.choice([1, 1, 4, 12]))

    def embeds(self, chance, expected=None, **fields):
        texts = self._some(chance)
        vectors = self.vectors if expected is None else expected

        def check(answer):
            found = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
            same(found, [vectors[text] for text in texts])

        return self._accepted(chance, "/v1/embeddings", {"input": texts, "encoding_format": "base64"} | fields, check)

    def asks(self, chance):
        return self.embeds(chance, self.queries, input_type="query")

    def ranks(self, chance):
        texts = self._some(chance)

        def check(answer):
            assert {hit["index"] for hit in answer["results"]} == set(range(len(texts)))
            same([hit["relevance_score"] for hit in answer["results"]],
                 [self.scores[texts[hit["index"]]] for hit in answer["results"]])  # fmt: skip

        return self._accepted(chance, "/v1/rerank", {"query": QUERY, "documents": texts}, check)

    def malformed(self, chance):
        body = chance.choice(
            [b"{", b"", b"\xff\xfe", b'{"input": 3}', b'{"input": [1, "x"]}', b'{"input": "x", "n": 1}']
        )
        status, answer, _ = ask(self.url, "/v1/embeddings", body, method="POST")
        assert status in (400, 422), answer
        assert answer["error"]["message"]
        return status

    def oversized(self, chance):
        body = {"input": "x" * 2**17} if chance.random() < 0.5 else {"input": ["x"] * 2049}
        status, answer, _ = ask(self.url, "/v1/embeddings", body)
        assert status in (413, 422), answer
        return status

    def _raw(self, chance, seconds):
        """A connection on which most of a request was sent, slowly, and its end is not yet."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        body = json.dumps({"input": self._some(chance)}).encode()
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        time.sleep(seconds)
        connection.sendall(b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:-1])
        return connection, body[-1:]

    def leaves(self, chance):
        """Before the end of the body, or while it is computed."""
        connection, end = self._raw(chance, 0)
        with connection:
            if chance.random() < 0.7:
                connection.sendall(end)
                time.sleep(chance.random() / 50)

    def slow(self, chance):
        connection, end = self._raw(chance, chance.random() / 2)
        with connection:
            time.sleep(chance.random() / 2)
            connection.sendall(end)
            status = int(connection.makefile("rb").read().split()[1])
        assert status in (200, 429)
        return status


def test_many_clients(url, embedder, reranker):
    counts = Load(url, embedder, reranker).run(clients=16)
    assert [counts[f"{name} 200"] for name in ("embeds", "asks", "ranks", "slow")] == [16] * 4
    assert counts.total() == 16 * 7


def resident(pid):
    """Memory of a process in MiB."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


@contextmanager
def command(*arguments, **environment):
    """``qwen3core serve``, as a process; yields it and its address, and stops it."""
    line = [sys.executable, "-m", "qwen3core", "serve", *arguments, "--port", "0", "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    lines = []
    try:
        for text in process.stderr:
            lines.append(text)
            if "running on" in text:
                break
        else:
            raise AssertionError("".join(lines))
        yield process, text.split("running on ")[1].split()[0]
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_the_command_finishes_what_it_took_and_logs_no_text(tmp_path):
    key = tmp_path / "key"
    key.write_text("geheim\n")
    limits = ("--api-key-file", str(key), "--max-requests", "9", "--batch-tokens", "200")
    with command("mine=tiny-embedding", *limits) as (process, url), ThreadPoolExecutor(4) as pool:
        asked = {"input": ["Geheimnis " * 60] * 40, "model": "mine", "dimensions": 32}
        answers = [pool.submit(ask, url, "/v1/embeddings", asked, Authorization="Bearer geheim") for _ in range(3)]
        wrong = pool.submit(ask, url, "/v1/embeddings?text=Geheimnis", {"input": "Geheimnis", "Geheimnis": 1})
        assert wrong.result()[0] == 401
        find = "qwen3core_unfinished_requests 3.0"
        until(lambda: find in ask(url, "/metrics", Authorization="Bearer geheim")[1])
        process.send_signal(signal.SIGINT)
        for answer in answers:
            assert (answer.result()[0], len(answer.result()[1]["data"])) == (200, 40)
        assert process.wait(60) == 0
        logged = process.stderr.read()
    assert "Finished server process" in logged
    assert "Geheimnis" not in logged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiny-embedding", "tiny-embedding"], "tiny-embedding: expected another name than 'tiny-embedding'"),
        (["tiny-embedding", "--max-requests", "0"], "--max-requests: expected an integer of at least 1, found 0"),
        (["tiny-embedding", "--api-key-file", "{tmp}/empty"], "empty: expected a key, found nothing"),
        (["tiny-embedding", "--api-key-file", "{tmp}/none"], "No such file"),
        (["{tmp}/none"], "none: expected a checkpoint directory"),
    ],
)
def test_bad_arguments_are_said(tmp_path, capsys, options, message):
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", *(option.format(tmp=tmp_path) for option in options)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_says_its_name(monkeypatch, capsys, package):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None if name == package else name)
    assert main(["serve", "tiny-embedding"]) == 2
    assert f"{package} is not installed: pip install {package}" in capsys.readouterr().err


@pytest.mark.parametrize("examples", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_no_request_of_the_openapi_document_breaks_the_server(url, examples):
    """Answers have the documented statuses and bodies."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.specs.openapi import checks

    chosen = [schemathesis.checks.not_a_server_error, checks.status_code_conformance]
    chosen += [checks.content_type_conformance, checks.response_schema_conformance]
    statuses = set()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    def check(case):
        response = case.call()
        case.validate_response(response, checks=chosen)
        statuses.add(response.status_code)

    for operation in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        given(case=operation.ok().as_strategy())(check)()
    assert statuses >= {200, 422}


@pytest.mark.slow
def test_soak(embedder, reranker):
    """Every answer as documented and equal to offline; at the end no request is left, and memory has not grown."""
    seconds = float(os.environ.get("SOAK_SECONDS", 30))
    limits = ("--max-body", "65536", "--max-requests", "12", "--max-length", "512")
    with command("tiny-embedding", "tiny-reranker", *limits, OMP_NUM_THREADS="1") as (process, url):
        load = Load(url, embedder, reranker)
        load.run(16, 0.2 * seconds)
        memory = [resident(process.pid)]
        for _ in range(4):
            load.run(16, 0.2 * seconds)
            memory.append(resident(process.pid))
        until(lambda: "qwen3core_unfinished_requests 0.0" in ask(url, "/metrics")[1])
        print(f"\n{seconds:g} s, MiB {[round(m) for m in memory]}", dict(sorted(Counter(load.sent).items())))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert "Error" not in process.stderr.read()
    assert memory[-1] - memory[0] < SERVER_GROWTH
