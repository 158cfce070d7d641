"""The web: routes and what they answer. ``create_app(models)`` is an ASGI application."""

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import prometheus_client
from fastapi import APIRouter, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from ..embedder import Embedder
from ..errors import CheckpointError, InputError
from ..pretrained import Pretrained
from ..reranker import Reranker, ranked
from . import requests, schemas
from .batching import Batcher, Closed, QueueFull, Result, Work
from .gate import CLIENT_GONE, ApiError, Gate, Metrics

Kind = TypeVar("Kind", bound=Pretrained)
DESCRIPTIONS = {
    400: "The body is not JSON",
    401: "The key is missing or wrong",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    422: "A field is wrong, and named",
    429: "The queue is full; Retry-After says when to come again",
    500: "The server is wrong",
    503: "The server is shutting down",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorResponse, "description": text} for status, text in DESCRIPTIONS.items()
}
openai = APIRouter(responses=ERRORS)
"""Routes that Docker's Model Runner has below other prefixes as well."""
others = APIRouter(responses=ERRORS)


class Service:
    """Open checkpoints, by the names that requests call them, and what computes for them.

    Raises CheckpointError for a checkpoint whose result is not one vector, or one score, a text.
    """

    def __init__(self, models: Mapping[str, Embedder | Reranker], batcher: Batcher) -> None:
        self.models, self.batcher, self.started = models, batcher, int(time.time())
        self.weights = {}
        for name, model in models.items():
            if isinstance(model, Reranker):
                self.weights[name] = model.model.score_weight(model.answers)
            if len(model.layout.labels) > 1 or (isinstance(model, Embedder) and not model.layout.pooling):
                raise CheckpointError(f"{name}: expected one vector or one score a text, found {model.layout}")

    def find(self, name: str | None, kind: type[Kind]) -> tuple[str, Kind]:
        """The model of this name, or the first of this kind. Raises ApiError."""
        if name is not None and name not in self.models:
            expected = f"model: expected one of {', '.join(self.models)}"
            raise ApiError(404, f"{expected}, found {name!r}", param="model", code="model_not_found")
        for found, model in self.models.items():
            if isinstance(model, kind) and name in (None, found):
                return found, model
        raise ApiError(422, f"model: expected one for the job {kind.jobs[0]!r}, found {name!r}", param="model")

    async def compute(self, request: Request, prepare: Callable[[], Work]) -> Result:
        """A request's results, unless its client leaves before. Raises ApiError, InputError."""
        try:
            future = asyncio.wrap_future(self.batcher.submit(prepare))
        except QueueFull:
            raise ApiError(429, "the queue is full: come again later", headers={"Retry-After": "1"}) from None
        except Closed:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"}) from None
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait((future, left), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ApiError(CLIENT_GONE, "the client has left")
            return future.result()
        finally:
            left.cancel()
            future.cancel()

    async def score(
        self, request: Request, body: Any, pairs: list[tuple[str, str]], field: str, *, logit: bool = False
    ) -> tuple[str, Result]:
        """The reranker's name, and its scores of the pairs."""
        name, reranker = self.find(body.model, Reranker)
        options = {"instruction": body.instruction, "truncate": body.truncate, "logit": logit, "field": field}
        return name, await self.compute(
            request, partial(requests.ranking, reranker, pairs, self.weights[name], **options)
        )


async def _left(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _service(request: Request) -> Service:
    return request.app.state.service


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _usage(tokens: int) -> schemas.Usage:
    return schemas.Usage(prompt_tokens=tokens, total_tokens=tokens)


@openai.post("/v1/embeddings", response_model=schemas.EmbeddingResponse)
async def embeddings(request: Request, body: schemas.EmbeddingRequest) -> Response:
    """Vectors of texts, as ``encode`` gives them."""
    service = _service(request)
    name, embedder = service.find(body.model, Embedder)
    single = isinstance(body.input, str) or isinstance(body.input[0], int)
    prepare = partial(
        requests.embedding,
        embedder,
        [body.input] if single else body.input,
        task=body.input_type,
        prompt_name=body.prompt_name,
        instruction=body.instruction,
        dim=body.dimensions,
        truncate=body.truncate,
    )
    result = await service.compute(request, prepare)
    content = await asyncio.to_thread(_embedding_response, name, result, body.encoding_format == "base64")
    return Response(content, media_type="application/json")


def _embedding_response(name: str, result: Result, as_base64: bool) -> bytes:
    """The JSON of an EmbeddingResponse, made vector by vector, so that other threads have their turns."""
    rows = []
    for index, vector in enumerate(result.rows):
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
        rows.append(to_json({"object": "embedding", "index": index, "embedding": value}))
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    around = to_json({"object": "list", "data": [], "model": name, "usage": usage})
    start, end = around.split(b"[]", 1)
    return b"".join((start, b"[", b",".join(rows), b"]", end))


@openai.get("/v1/models")
async def models(request: Request) -> schemas.ModelList:
    """The checkpoints that are open."""
    return schemas.ModelList(data=[_card(_service(request), name) for name in _service(request).models])


@openai.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> schemas.ModelCard:
    """One of them."""
    found, _ = _service(request).find(name, Pretrained)
    return _card(_service(request), found)


def _card(service: Service, name: str) -> schemas.ModelCard:
    model = service.models[name]
    return schemas.ModelCard(id=name, created=service.started, max_model_len=model.max_length, job=model.jobs[0])


@others.post("/v1/rerank", response_model_exclude_none=True)
async def rerank(request: Request, body: schemas.RerankRequest) -> schemas.RerankResponse:
    """Documents by P(yes), in the shape of Jina's and of Cohere's v1."""
    return await _rerank(request, body, body.return_documents is not False)


@others.post("/v2/rerank", response_model_exclude_none=True)
async def rerank_v2(request: Request, body: schemas.RerankRequest) -> schemas.RerankResponse:
    """The same in the shape of Cohere's v2, without the documents unless asked for."""
    return await _rerank(request, body, bool(body.return_documents))


@others.post("/rerank", response_model_exclude_none=True)
async def rerank_any(
    request: Request, body: schemas.AnyRerankRequest
) -> schemas.RerankResponse | list[schemas.TextRanked]:
    """The same, of ``documents``; of ``texts``, in the shape of text-embeddings-inference."""
    if isinstance(body, schemas.RerankRequest):
        return await _rerank(request, body, body.return_documents is not False)
    pairs = [(body.query, text) for text in body.texts]
    _, result = await _service(request).score(request, body, pairs, "texts", logit=body.raw_scores)
    return [
        schemas.TextRanked(index=i, score=result.rows[i], text=body.texts[i] if body.return_text else None)
        for i in ranked(result.rows)
    ]


async def _rerank(request: Request, body: schemas.RerankRequest, documents: bool) -> schemas.RerankResponse:
    texts = [item if isinstance(item, str) else item.text for item in body.documents]
    name, result = await _service(request).score(request, body, [(body.query, text) for text in texts], "documents")
    results = [
        schemas.Ranked(
            index=i, relevance_score=result.rows[i], document=schemas.Document(text=texts[i]) if documents else None
        )
        for i in ranked(result.rows, body.top_n)
    ]
    meta = {"billed_units": {"search_units": 1}}
    return schemas.RerankResponse(id=_id("rerank"), model=name, results=results, usage=_usage(result.tokens), meta=meta)


@others.post("/v1/score")
async def score(request: Request, body: schemas.ScoreRequest) -> schemas.ScoreResponse:
    """P(yes) of pairs, in their order, in the shape of vLLM's."""
    first, second = ([x] if isinstance(x, str) else x for x in (body.text_1, body.text_2))
    if len(first) not in (1, len(second)):
        expected = f"text_1: expected 1 or {len(second)} texts, as text_2 has, found {len(first)}"
        raise ApiError(422, expected, param="text_1")
    pairs = list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))
    name, result = await _service(request).score(request, body, pairs, "text_2")
    data = [schemas.Score(index=i, score=float(value)) for i, value in enumerate(result.rows)]
    return schemas.ScoreResponse(
        id=_id("score"), created=int(time.time()), model=name, data=data, usage=_usage(result.tokens)
    )


@others.post("/tokenize")
async def tokenize(request: Request, body: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
    """A text's token ids, in the shape of vLLM's."""
    _, model = _service(request).find(body.model, Pretrained)
    tokenizer = model.tokenizer
    [ids] = await asyncio.to_thread(tokenizer.encode, [body.prompt])
    if body.add_special_tokens and isinstance(model, Embedder):
        ids = [*tokenizer.opening, *ids, *tokenizer.closing]
    return schemas.TokenizeResponse(count=len(ids), max_model_len=model.max_length, tokens=ids)


@others.get("/health")
async def health(request: Request) -> schemas.Health:
    """Whether requests are taken."""
    if not _service(request).batcher.alive:
        raise ApiError(503, "the server is shutting down")
    return schemas.Health()


@others.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Prometheus's text."""
    found: Metrics = request.app.state.metrics
    found.unfinished.set(_service(request).batcher.unfinished)
    return Response(prometheus_client.generate_latest(found.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)


def create_app(
    models: Mapping[str, Embedder | Reranker],
    *,
    batch_tokens: int | None = None,
    max_requests: int = 256,
    max_body: int = 2**21,
    api_key: str | None = None,
) -> FastAPI:
    """An application that computes with these open checkpoints, by name, from its start on.

    Args:
        models: checkpoints by the names that requests call them.
        batch_tokens: most tokens of a batch; by default those of ``encode``.
        max_requests: requests that may wait or be computed; more are answered 429.
        max_body: bytes of a request.
        api_key: the bearer key that requests must have; None: no key.

    Raises:
        CheckpointError: for one of several scores, or of late interaction.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="qwen3core", summary="Embeddings, scores and ranks of Qwen3 checkpoints", lifespan=lifespan)
    batcher = Batcher(batch_tokens=batch_tokens, max_requests=max_requests, observe=metrics.batch)
    app.state.service, app.state.metrics = Service(models, batcher), metrics
    security = [Security(HTTPBearer(auto_error=False))] if api_key is not None else []
    for prefix in ("", "/engines", "/engines/{engine}"):
        app.include_router(openai, prefix=prefix, dependencies=security, include_in_schema=not prefix)
    app.include_router(others, dependencies=security)
    app.add_middleware(Gate, api_key=api_key, max_body=max_body, metrics=metrics)
    app.add_exception_handler(ApiError, lambda _, error: error.response())
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _input_error(_: Request, error: Any) -> Response:
    """The core's own, whose messages begin with the name."""
    return ApiError(422, str(error), param=str(error).partition(":")[0]).response()


def _validation_error(_: Request, error: Any) -> Response:
    """Pydantic's first: the field, without the names of alternatives, and never the value."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: expected JSON, found something else at character {first['loc'][1]}").response()
    name = ".".join(str(part) for part in first["loc"][1:] if not str(part).startswith("<")) or "body"
    message = first["msg"].removeprefix("Value error, text: ")
    return ApiError(422, f"{name}: {message[:1].lower()}{message[1:]}", param=name).response()


def _http_error(_: Request, error: Any) -> Response:
    found = "body: expected JSON, found what cannot be read" if error.status_code == 400 else str(error.detail)
    return ApiError(error.status_code, found, headers=error.headers).response()
