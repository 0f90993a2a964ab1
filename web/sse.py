"""Server-sent events: how an event is written, and the response that streams them."""

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

HEARTBEAT = 15.0  # seconds after which a silent stream says that it is alive
PATIENCE = 30.0  # seconds that a client may take to read before it is given up
RETRY = 2000  # milliseconds after which a client that lost its stream comes back

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes on at once what comes
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
# JSON escapes the others. These end no line of an event, but Python's splitlines ends one there.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def encode(event: str, data: Mapping[str, Any], *, position: str | None = None) -> bytes:
    """Return an event as bytes, its data on one line, whatever a client takes for a line's end."""
    line = f"id: {position}\n" if position else ""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).translate(_LINE_ENDS)
    return f"{line}event: {event}\ndata: {text}\n\n".encode(errors="replace")


class Source(Protocol):
    """What a stream sends."""

    async def next(self, seconds: float) -> bytes | None:
        """Return what there is to send, ``b""`` after so long without any, ``None`` at the end."""

    def close(self) -> None:
        """Forget the stream, which has ended."""


class EventStream:
    """The response that sends what ``source`` has, until that or the client has had enough.

    A task of its own, besides the request's, notices that the client is gone: a server tells that
    to who receives. A client that does not read is given up after ``PATIENCE`` seconds.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Stream."""
        leaving = asyncio.create_task(self._until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _RAW_HEADERS})
            await self._stream(send)
        except TimeoutError:
            return  # unfinished, so that the server closes the connection
        finally:
            self._source.close()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._source.close()

    async def _stream(self, send: Send) -> None:
        body = f"retry: {RETRY}\n\n".encode()
        while True:
            async with asyncio.timeout(PATIENCE):
                await send({"type": "http.response.body", "body": body, "more_body": True})
            following = await self._source.next(HEARTBEAT)
            if following is None:
                break
            body = following or b":\n\n"
        async with asyncio.timeout(PATIENCE):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
