"""A span of each request, in the trace of whoever sent it."""

from opentelemetry.trace import INVALID_SPAN_CONTEXT, Span, SpanKind
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import logs, telemetry

_UNTRACED = ("/healthz", "/readyz", "/metrics", "/app/static/")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SERVER_ERROR = 500


class Traces:
    """Traces requests; one with a ``traceparent`` belongs to its caller's trace.

    Of the URL only the route is noted: paths and queries hold ids, names and secrets. A stream of
    events counts until it begins.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        if scope["type"] != "http" or scope["path"].startswith(_UNTRACED):
            await self._app(scope, receive, send)
            return
        caller = telemetry.caller(Headers(scope=scope).getlist("traceparent"))
        if not telemetry.is_on():
            with telemetry.going_on(caller):
                await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        named = {
            "http.request.method": method,
            "pgscribe.request.id": str(logs.context().get("request_id", "")),
        }
        # Not in what is current: a connection's next request may begin in the context of the last.
        parent = caller or INVALID_SPAN_CONTEXT
        with telemetry.span(method, named, kind=SpanKind.SERVER, within=parent) as span:

            async def watched(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _note_answer(span, method, scope.get("route"), message)
                await send(message)

            await self._app(scope, receive, watched)


def _note_answer(span: Span, method: str, found: object, answer: Message) -> None:
    route = getattr(found, "path", None)
    if route is not None:
        span.update_name(f"{method} {route}")
        span.set_attribute("http.route", route)
    status = answer["status"]
    span.set_attribute("http.response.status_code", status)
    if status >= _SERVER_ERROR:
        telemetry.failed(span, str(status))
    if Headers(raw=answer["headers"]).get("content-type", "").startswith("text/event-stream"):
        span.end()
