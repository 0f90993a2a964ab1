"""Audio by a URL that a user gives: fetched from the public internet, and from nowhere else.

Redirects go through the same checks as the URL itself; ``jobs.outbound`` says which.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urljoin

import httpcore2

from jobs.errors import UploadTooLarge, UrlRefused, UrlUnavailable
from jobs.outbound import PUBLIC, Rules, Target, ask, check_url, explained, header

MAX_BYTES = 2 * 1024**3
TOTAL_TIMEOUT = 1800.0  # seconds
MAX_REDIRECTS = 5
LONGEST_RETRY_AFTER = 3600.0  # seconds

_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}
_ACCEPT = [(b"Accept", b"audio/*, video/*, application/octet-stream;q=0.9, */*;q=0.5")]
_PAGES = {"text/html", "application/xhtml+xml"}


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a server sends: its headers' word on type and size, and the body as it comes."""

    content_type: str | None
    size: int | None
    chunks: AsyncIterator[bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches URLs: each at most ``max_bytes`` bytes, in at most ``timeout`` seconds."""

    max_bytes: int = MAX_BYTES
    timeout: float = TOTAL_TIMEOUT
    rules: Rules = PUBLIC

    @asynccontextmanager
    async def __call__(self, url: str) -> AsyncIterator[Fetched]:
        """Ask for ``url``; see ``fetch``."""
        timer = asyncio.timeout(self.timeout)
        try:
            async with timer, AsyncExitStack() as stack:
                response = await self._follow(stack, check_url(url, self.rules.ports))
                yield self._fetched(response)
        except TimeoutError as exc:
            if not timer.expired():
                raise
            raise UrlUnavailable(
                f"it was not there within the limit of {self.timeout:g} s"
            ) from exc

    async def _follow(self, stack: AsyncExitStack, target: Target) -> httpcore2.Response:
        for _ in range(MAX_REDIRECTS + 1):
            async with AsyncExitStack() as hop:
                response = await ask(hop, target, self.rules, _ACCEPT)
                location = header(response, b"location")
                if response.status not in _REDIRECTS or location is None:
                    stack.push_async_exit(hop.pop_all())
                    _check_status(response)
                    return response
            target = _redirected(target, location, self.rules.ports)
        raise UrlRefused(f"it leads to more than {MAX_REDIRECTS} redirects")

    def _fetched(self, response: httpcore2.Response) -> Fetched:
        encoding = (header(response, b"content-encoding") or "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise UrlRefused("its server compresses the file, although it was asked not to")
        kind = (header(response, b"content-type") or "").partition(";")[0].strip().lower()
        if kind in _PAGES:
            raise UrlRefused("it leads to a web page; give the URL of the recording itself")
        length = header(response, b"content-length") or ""
        size = int(length) if length.isascii() and length.isdigit() else None
        if size is not None and size > self.max_bytes:
            raise _too_large(self.max_bytes)
        return Fetched(kind or None, size, self._chunks(response))

    async def _chunks(self, response: httpcore2.Response) -> AsyncIterator[bytes]:
        received = 0
        with explained():
            async for chunk in response.aiter_stream():
                received += len(chunk)
                if received > self.max_bytes:
                    raise _too_large(self.max_bytes)
                yield chunk
        if received == 0:
            raise UrlUnavailable("its server sends an empty file", retryable=False)


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout: float,
    rules: Rules = PUBLIC,
) -> AbstractAsyncContextManager[Fetched]:
    """Ask for a URL; an async context manager that gives ``Fetched``.

    ``timeout`` is in seconds and holds for everything until the context's end. Raises
    ``UrlRefused`` for what may not be fetched, ``UrlUnavailable`` for what can't be, and
    ``UploadTooLarge`` before more than ``max_bytes`` bytes are handed out. No message has an
    address, or of the URL more than its host.
    """
    return Fetcher(max_bytes, timeout, rules)(url)


def _redirected(source: Target, location: str, ports: Iterable[int]) -> Target:
    try:
        url = urljoin(source.url, location)
        target = check_url(url, ports)
    except ValueError as exc:
        raise UrlRefused("a redirect of its server leads to no URL") from exc
    except UrlRefused as exc:
        raise UrlRefused("a redirect of its server leads to a URL that may not be fetched") from exc
    if source.scheme == "https" and target.scheme != "https":
        raise UrlRefused("a redirect of its server leads from https:// to http://")
    return target


def _check_status(response: httpcore2.Response) -> None:
    status = response.status
    if status == HTTPStatus.OK:
        return
    passing = status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    wait = header(response, b"retry-after") or ""
    after = min(float(wait), LONGEST_RETRY_AFTER) if wait.isascii() and wait.isdigit() else None
    raise UrlUnavailable(
        f"its server answers with HTTP {status}", retryable=passing, retry_after=after
    )


def _too_large(limit: int) -> UploadTooLarge:
    return UploadTooLarge(f"audio_url: the file is larger than the limit of {limit} bytes")
