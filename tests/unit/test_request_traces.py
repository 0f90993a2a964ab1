"""The trace that a request is in, and what a stranger can make of its span."""

import socket
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from jobs import telemetry
from tests.live import serve
from tests.spans import made_here
from web.traces import Traces

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def where(_: Request) -> PlainTextResponse:
    return PlainTextResponse(f"<{telemetry.traceparent()}>")


APP = Starlette(routes=[Route("/", where)], middleware=[Middleware(Traces)])


def ask(request: str) -> str:
    """Send this on one connection to a server, and return all that it says."""
    said = b""
    with (
        serve(APP) as url,
        socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), 10) as connection,
    ):
        connection.sendall(request.encode())
        while part := connection.recv(9999):
            said += part
    return said.decode()


def test_a_connections_next_request_is_not_in_the_trace_of_the_last() -> None:
    said = ask(
        f"GET / HTTP/1.1\r\nHost: x\r\nTraceparent: {CALLER}\r\n\r\n"
        "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    assert said.count(f"<{CALLER}>") == 1
    assert said.endswith("<None>")


def test_spans_have_no_name_that_strangers_invent() -> None:
    with made_here() as spans:
        assert "405" in ask(f"{'A' * 1000} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    (span,) = spans.get_finished_spans()
    assert span.name == "_OTHER /"
