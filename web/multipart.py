"""Forms with files, read as they come: a file of any size passes through, nothing is spooled.

Starlette's own parser puts what is over a megabyte into a temporary file, however long it gets.
"""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from jobs.errors import BodyTooLarge, InvalidInput

MAX_PARTS = 64
MAX_FIELD = 64 * 1024  # bytes

# Of a part's headers only one counts; the limits leave room for the others that clients send.
_MAX_HEADERS, _MAX_HEADER = 8, 4096


@dataclass(slots=True)
class _Begin:
    """A part begins."""

    headers: dict[bytes, bytes] = field(default_factory=dict)


class _End:
    """A part is complete."""


_Event = _Begin | bytes | _End


class _Events:
    """Turns the parser's callbacks into events, in their order."""

    def __init__(self, boundary: bytes) -> None:
        self.found = deque[_Event]()
        self.complete = False
        self._begin = _Begin()
        self._name, self._value = bytearray(), bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": lambda: self.found.append(self._begin),
                "on_part_data": lambda data, start, end: self.found.append(data[start:end]),
                "on_part_end": lambda: self.found.append(_End()),
                "on_end": self._on_end,
            },
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER,
        )

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises ``InvalidInput``."""
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise InvalidInput(f"body: is not a usable form: {exc}", field="body") from exc

    def _on_part_begin(self) -> None:
        self._begin = _Begin()

    def _on_header_end(self) -> None:
        self._begin.headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_end(self) -> None:
        self.complete = True


class Part:
    """A field or a file of a form. Read it before the next one."""

    def __init__(self, headers: Mapping[bytes, bytes], data: AsyncIterator[bytes]) -> None:
        disposition = parse_options_header(headers.get(b"content-disposition", b""))[1]
        name, file_name = (disposition.get(key) for key in (b"name", b"filename"))
        if not name:
            raise InvalidInput("body: a part of the form has no name", field="body")
        self.name = _text(name)
        self.file_name = None if file_name is None else _text(file_name)
        self.content_type = _text(headers.get(b"content-type", b"")) or None
        self._data = data

    def data(self) -> AsyncIterator[bytes]:
        """Return the bytes as they come. Raises ``InvalidInput`` where the form ends too early."""
        return self._data

    async def text(self) -> str:
        """Return a field's value. Raises ``InvalidInput``, also for more than ``MAX_FIELD``."""
        value = bytearray()
        async for data in self._data:
            value += data
            if len(value) > MAX_FIELD:
                raise InvalidInput(
                    f"{self.name}: is longer than the limit of {MAX_FIELD} bytes", field=self.name
                )
        try:
            return value.decode()
        except UnicodeDecodeError as exc:
            raise InvalidInput(f"{self.name}: is not UTF-8", field=self.name) from exc


class FormReader:
    """Reads the parts of a form. ``limit``: of the whole body, in bytes."""

    def __init__(self, content_type: str, body: AsyncIterable[bytes], *, limit: int) -> None:
        self._body = aiter(body)
        self._limit = limit
        self._size = 0
        self._events = _Events(_boundary(content_type))

    async def parts(self) -> AsyncGenerator[Part]:
        """Yield the parts as they come; what is not read of one is skipped.

        Raises ``InvalidInput`` for what is no form, and ``BodyTooLarge``.
        """
        count = 0
        while (event := await self._next()) is not None:
            if not isinstance(event, _Begin):
                continue
            count += 1
            if count > MAX_PARTS:
                raise InvalidInput(f"body: has more than {MAX_PARTS} parts", field="body")
            data = self._part_data()
            yield Part(event.headers, data)
            async for _ in data:
                pass

    async def _part_data(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), bytes):
            yield event

    async def _next(self) -> _Event | None:
        """Return the next event, or None behind the last boundary and what follows it."""
        while not self._events.found:
            chunk = await anext(self._body, None)
            if chunk is None:
                if self._events.complete:
                    return None
                raise InvalidInput("body: the form ends before its last boundary", field="body")
            self._size += len(chunk)
            if self._size > self._limit:
                raise BodyTooLarge(
                    f"body: is larger than the limit of {self._limit} bytes", limit=self._limit
                )
            self._events.feed(chunk)
        return self._events.found.popleft()


def _boundary(content_type: str) -> bytes:
    kind, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 70:  # noqa: PLR2004 - RFC 2046
        raise InvalidInput(
            "body: must be a form: Content-Type multipart/form-data with a boundary", field="body"
        )
    return boundary


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
