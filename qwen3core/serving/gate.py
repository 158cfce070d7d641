"""What every request passes first: the key, the body's size and time, metrics; and what every error looks like."""

import asyncio
import hmac
import logging
import time
import traceback
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .schemas import ErrorResponse, Fault

BODY_SECONDS = 30.0
"""In which a body must arrive."""
OPEN_PATHS = ("/health", "/docs", "/openapi.json")
"""Paths that need no key."""
CLIENT_GONE = 499
"""Status, in the metrics alone, of what nobody waits for any more."""
logger = logging.getLogger("uvicorn.error")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        self.fault = Fault(message=message, type=kind, param=param, code=code)
        self.status, self.headers = status, headers

    def response(self) -> Response:
        """The answer."""
        return Response(to_json(ErrorResponse(error=self.fault)), self.status, self.headers, "application/json")


class Metrics:
    """What ``/metrics`` shows, in a registry of its own; no label says anything about texts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels, registry = ("route", "status"), self.registry
        self.requests = Counter("qwen3core_requests", "Answers, by route and status", labels, registry=registry)
        seconds = "From a request's headers to its answer"
        self.seconds = Histogram("qwen3core_request_seconds", seconds, labels[:1], registry=registry)
        self.unfinished = Gauge("qwen3core_unfinished_requests", "Taken and not answered yet", registry=registry)
        tokens = [2**n for n in range(4, 16)]
        about = "Tokens of the batches that were computed"
        self.batch_tokens = Histogram("qwen3core_batch_tokens", about, registry=registry, buckets=tokens)
        self.texts = Counter("qwen3core_texts", "Texts that were computed", registry=registry)

    def batch(self, texts: int, tokens: int) -> None:
        """Count a batch."""
        self.texts.inc(texts)
        self.batch_tokens.observe(tokens)


@dataclass(frozen=True)
class Gate:
    """ASGI middleware: refuses a wrong key and a body too large or too slow, counts answers, and logs no text."""

    app: ASGIApp
    api_key: str | None
    max_body: int
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read(receive)
            await self.app(scope, _again(body, receive), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        except Exception as error:  # whose message may hold a text
            frames = "".join(traceback.format_tb(error.__traceback__, limit=-4))
            logger.error("%s, message left out:\n%s", type(error).__name__, frames)
            if not status:
                await ApiError(500, f"internal error ({type(error).__name__})").response()(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "Authorization: expected Bearer and the key", code="invalid_api_key", headers=headers)

    async def _read(self, receive: Receive) -> bytes:
        """The body. Raises ApiError, and waits for no more of one that is too large."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(CLIENT_GONE, "the client has left")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_body:
                        raise ApiError(413, f"body: expected at most {self.max_body} bytes, found more")
        except TimeoutError:
            found = f"body: expected all of it within {BODY_SECONDS:g} seconds, found {len(body)} bytes"
            raise ApiError(408, found, headers={"Connection": "close"}) from None
        return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """``receive`` with the whole body first, then what comes after it: that the client has left."""
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
