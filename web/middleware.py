"""What every request and every answer has: an id, headers that browsers heed, and limits.

Plain ASGI, so that nothing of a streamed body or answer is held back.
"""

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import logs
from jobs.errors import BodyTooLarge
from jobs.settings import Settings
from web.auth import USER_HEADER
from web.openai_errors import in_openai_form
from web.problems import on_unexpected_error
from web.traces import Traces

REQUEST_ID = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Unless an answer says otherwise; a page has to loosen the content policy for itself.
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_HTTPS_HEADERS = {"Strict-Transport-Security": "max-age=31536000"}

# What pages of other origins may send and read, beside what they always may.
# The last ones are what OpenAI's package for JavaScript sends.
_STAINLESS = (
    "Arch", "Lang", "OS", "Package-Version", "Retry-Count", "Runtime", "Runtime-Version", "Timeout",
)  # fmt: skip
_REQUEST_HEADERS = (
    "Authorization",
    "Idempotency-Key",
    "If-None-Match",
    "Last-Event-ID",
    "Range",
    REQUEST_ID,
    "Traceparent",
    "Tus-Resumable",
    "Upload-Length",
    "Upload-Metadata",
    "Upload-Offset",
    USER_HEADER,
    *(f"X-Stainless-{name}" for name in _STAINLESS),
)
_ANSWER_HEADERS = (
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Location",
    "Pgscribe-Job-Id",
    "Pgscribe-Partial",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    REQUEST_ID,
    "Tus-Extension",
    "Tus-Max-Size",
    "Tus-Resumable",
    "Tus-Version",
    "Upload-Expires",
    "Upload-Length",
    "Upload-Offset",
)


def middleware(settings: Settings) -> list[Middleware]:
    """Return the app's middleware, outermost first."""
    origins = settings.cors_origins
    return [
        Middleware(RequestIds),
        Middleware(Traces),
        Middleware(ResponseHeaders),
        *([_cors(origins)] if origins else []),
        Middleware(LastResort),
        Middleware(BodyLimit, limit=settings.max_body_bytes),
    ]


def _cors(origins: tuple[str, ...]) -> Middleware:
    """Let pages of these origins use the API. No cookies: so ``*`` gives nobody's rights away."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
        allow_headers=_REQUEST_HEADERS,
        expose_headers=_ANSWER_HEADERS,
    )


class RequestIds:
    """Gives each request an id, or keeps the one it came with; answers and log records have it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid4().hex
        # And left so: a request has a context of its own, though it may begin as that of the last.
        logs.begin(request_id=request_id)

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, with_id)


class ResponseHeaders:
    """Adds the headers that an answer lacks, and those in ``request.state.response_headers``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own: dict[str, str] = {}
        scope.setdefault("state", {})["response_headers"] = own
        usual = _HEADERS | (_HTTPS_HEADERS if scope["scheme"] == "https" else {})

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (usual | own).items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)


class LastResort:
    """Answers what nobody expected, inside of the others, so that the answer has their headers.

    Starlette's own last resort stands outside of them. It still gets what breaks in the middle of
    an answer, which has to end in a broken connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        started = scope["type"] != "http"

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as exc:
            if started:
                raise
            answer = in_openai_form(on_unexpected_error)
            response = await answer(Request(scope), exc)
            await response(scope, receive, send)


def allow_body(request: Request, limit: int | None) -> None:
    """Let this request's body have so many bytes, or any number; call it before reading."""
    request.state.max_body = limit


class BodyLimit:
    """Ends the reading of a body that is larger than ``limit`` bytes with ``BodyTooLarge``."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["max_body"] = self._limit
        announced = Headers(scope=scope).get("content-length", "")
        size = 0

        def check(size: int) -> None:
            limit: int | None = state["max_body"]
            if limit is not None and size > limit:
                raise BodyTooLarge(
                    f"The body is larger than the limit of {limit} bytes", limit=limit
                )

        async def counted() -> Message:
            nonlocal size
            if announced.isdecimal():
                check(int(announced[:20]))  # which is too many, whatever follows
            message = await receive()
            size += len(message.get("body", b""))
            check(size)
            return message

        await self._app(scope, counted, send)
