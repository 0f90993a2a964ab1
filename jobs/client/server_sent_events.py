"""Reading a stream of server-sent events (https://html.spec.whatwg.org/#server-sent-events).

httpx2 has a reader as well; it shows its user nothing of the pings that a time limit needs to see.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.errors import PgscribeError

MAX_EVENT = 16 * 1024 * 1024  # characters; the text of a day is less


class StreamUnreadable(PgscribeError):
    """The stream of events has an event that is too large."""

    code = "stream_unreadable"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """An event; ``id`` is the last one that the stream has named."""

    name: str
    data: str
    id: str


class EventReader:
    """Makes events of bytes. ``last_id`` and ``retry`` (seconds) are what the stream said last."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        self.retry: float | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._id = last_id
        self._name = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        """Yield the events that are complete with these bytes. Raises ``StreamUnreadable``."""
        text = self._rest + self._decoder.decode(data)
        held = "\r" if text.endswith("\r") else ""  # the other half of the line's end may follow
        lines = text.removesuffix(held).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + held
        for line in lines:
            if line:
                self._field(line)
            elif event := self._dispatch():
                yield event
        if self._size + len(self._rest) > MAX_EVENT:
            raise StreamUnreadable

    def _field(self, line: str) -> None:
        self._size += len(line)
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value) / 1000

    def _dispatch(self) -> ServerSentEvent | None:
        name, data, self.last_id = self._name or "message", self._data, self._id
        self._name, self._data, self._size = "", [], 0
        return ServerSentEvent(name, "\n".join(data), self.last_id) if data else None
