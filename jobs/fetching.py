"""Audio by a URL that a user gives: fetched from the public internet, and from nowhere else.

A name is resolved once, all of its addresses are checked, and one of those is connected to: what a
name server says a moment later has no effect. TLS is with the name. Redirects go through the same
checks. Nothing of this machine's environment is used: no proxy, no cookies, no credentials.
"""

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore2
import httpx2

from jobs.errors import UploadTooLarge, UrlRefused, UrlUnavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
AddressCheck = Callable[[Address], bool]

MAX_BYTES = 2 * 1024**3
TOTAL_TIMEOUT = 1800.0  # seconds
CONNECT_TIMEOUT = 10.0  # seconds, for each address
READ_TIMEOUT = 30.0  # seconds, for each wait
MAX_REDIRECTS = 5
MAX_URL = 2048  # characters
LONGEST_RETRY_AFTER = 3600.0  # seconds
# What recordings are served on; others would make this server a scanner of other people's ports.
PORTS = frozenset({80, 443, 8080, 8443})

_REDIRECTS = {301, 302, 303, 307, 308}
_PASSING = {408, 425, 429}
_PAGES = {"text/html", "application/xhtml+xml"}
_URL = re.compile(r"[!#-;=?-\[\]_a-z~]+")  # printable ASCII less what no URL may hold
_NAME = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

# IANA's special-purpose registries, and two services of clouds at addresses that look public.
_REFUSED_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32",
        "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24",
        "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
)  # fmt: skip
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, ORCHID and others that are no hosts
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet.

    Of IPv6 addresses with an IPv4 address in them only those of NAT64 count, which a network
    without IPv4 needs; and only if the IPv4 address is public.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_IPV4)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(address.packed[-4:]))
    return address in _PUBLIC_IPV6 and not any(address in network for network in _REFUSED_IPV6)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a name. Raises ``UrlUnavailable``."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError as exc:
        raise UrlUnavailable("its host's address was not found in time") from exc
    except (OSError, UnicodeError) as exc:
        unknown = isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME
        raise UrlUnavailable("its host is not found", retryable=not unknown) from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True, slots=True)
class Rules:
    """What may be fetched. Only tests have others than the default."""

    is_allowed: AddressCheck = is_public
    ports: frozenset[int] = PORTS
    resolve: Resolve = resolve
    ssl_context: ssl.SSLContext | None = None
    read_timeout: float = READ_TIMEOUT


PUBLIC = Rules()


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a server sends: its headers' word on type and size, and the body as it comes."""

    content_type: str | None
    size: int | None
    chunks: AsyncIterator[bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL that passed the checks. ``target`` is what is asked for, path and query."""

    url: str = field(repr=False)
    scheme: str
    host: str
    port: int
    target: str = field(repr=False)

    @property
    def literal(self) -> Address | None:
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None


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

    async def _follow(self, stack: AsyncExitStack, target: _Target) -> httpcore2.Response:
        for _ in range(MAX_REDIRECTS + 1):
            async with AsyncExitStack() as hop:
                response = await self._ask(hop, target)
                location = _header(response, b"location")
                if response.status not in _REDIRECTS or location is None:
                    stack.push_async_exit(hop.pop_all())
                    _check_status(response)
                    return response
            target = _redirected(target, location, self.rules.ports)
        raise UrlRefused(f"it leads to more than {MAX_REDIRECTS} redirects")

    async def _ask(self, stack: AsyncExitStack, target: _Target) -> httpcore2.Response:
        rules = self.rules
        addresses = await _addresses(target, rules)
        pool = httpcore2.AsyncConnectionPool(
            ssl_context=rules.ssl_context or _trusted(),
            max_connections=1,
            network_backend=_Pinned(addresses),
        )
        host = target.host.encode()
        default = target.port == (443 if target.scheme == "https" else 80)
        named = b"[%b]" % host if b":" in host else host
        headers = [
            (b"Host", named if default else b"%b:%d" % (named, target.port)),
            (b"Accept", b"audio/*, video/*, application/octet-stream;q=0.9, */*;q=0.5"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", b"pgscribe"),
            (b"Connection", b"close"),
        ]
        waits = dict.fromkeys(("read", "write", "pool"), rules.read_timeout)
        url = httpcore2.URL(
            scheme=target.scheme.encode(),
            host=host,
            port=target.port,
            target=target.target.encode(),
        )
        await stack.enter_async_context(pool)
        with _explained():
            return await stack.enter_async_context(
                pool.stream(
                    "GET",
                    url,
                    headers=headers,
                    extensions={"timeout": waits | {"connect": CONNECT_TIMEOUT}},
                )
            )

    def _fetched(self, response: httpcore2.Response) -> Fetched:
        encoding = (_header(response, b"content-encoding") or "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise UrlRefused("its server compresses the file, although it was asked not to")
        kind = (_header(response, b"content-type") or "").partition(";")[0].strip().lower()
        if kind in _PAGES:
            raise UrlRefused("it leads to a web page; give the URL of the recording itself")
        length = _header(response, b"content-length") or ""
        size = int(length) if length.isascii() and length.isdigit() else None
        if size is not None and size > self.max_bytes:
            raise _too_large(self.max_bytes)
        return Fetched(kind or None, size, self._chunks(response))

    async def _chunks(self, response: httpcore2.Response) -> AsyncIterator[bytes]:
        received = 0
        with _explained():
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


def check_url(url: str, ports: Iterable[int] = PORTS) -> _Target:
    """Read a URL strictly, so that nobody reads it otherwise. Raises ``UrlRefused``."""
    if len(url) > MAX_URL:
        raise UrlRefused(f"has {len(url)} characters; the limit is {MAX_URL}")
    if not _URL.fullmatch(url):
        raise UrlRefused(
            "may hold no spaces, backslashes or control characters; write other letters than "
            "English ones as %XX, in its host as xn--…"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise UrlRefused("is no URL") from exc
    if parts.scheme not in {"http", "https"}:
        raise UrlRefused("must begin with https:// or http://")
    if "@" in parts.netloc:
        raise UrlRefused("may hold no user name or password; use a signed URL")
    port = port if port is not None else (443 if parts.scheme == "https" else 80)
    if port not in ports:
        raise UrlRefused(f"its port must be one of {', '.join(map(str, sorted(ports)))}")
    return _Target(url, parts.scheme, _host(parts), port, _target(parts))


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    if "[" in parts.netloc:
        whole = re.fullmatch(r"\[[0-9a-fA-F:.]+\](:\d*)?", parts.netloc)
        try:
            return str(ipaddress.IPv6Address(host if whole else ""))
        except ValueError as exc:
            raise UrlRefused("its host is no IPv6 address") from exc
    if len(host) > 253 or not _NAME.fullmatch(host):  # noqa: PLR2004 - DNS's limit
        raise UrlRefused("its host is no name")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):  # then it is an address, however written
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as exc:
            raise UrlRefused("its host is no IPv4 address in the form 192.0.2.1") from exc
    return host


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _redirected(source: _Target, location: str, ports: Iterable[int]) -> _Target:
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


async def _addresses(target: _Target, rules: Rules) -> list[Address]:
    """Return where the host is, once for all. Raises ``UrlRefused`` if that is not public."""
    literal = target.literal
    if literal is not None:
        found = [literal]
    else:
        try:
            texts = await rules.resolve(target.host, target.port)
            found = [ipaddress.ip_address(text) for text in texts]
        except ValueError as exc:
            raise UrlRefused(_NOT_PUBLIC) from exc
    if not found:
        raise UrlUnavailable("its host is not found", retryable=False)
    if not all(rules.is_allowed(address) for address in found):
        raise UrlRefused(_NOT_PUBLIC)
    return found


@functools.cache
def _trusted() -> ssl.SSLContext:
    return httpx2.create_ssl_context(trust_env=False)


_NOT_PUBLIC = "its host is not on the public internet"


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to these addresses, whatever name is to be connected to."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - resolved and checked already
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failed: Exception | None = None
        for address in self._addresses:
            try:
                return await self._backend.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as exc:
                failed = exc
        assert failed is not None
        raise failed


class _explained:  # noqa: N801 - used as a function
    """Turns what the network does into ``UrlUnavailable``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if isinstance(exc, httpcore2.TimeoutException):
            raise UrlUnavailable("its server does not answer in time") from exc
        if isinstance(exc, httpcore2.NetworkError | httpcore2.ProtocolError):
            raise UrlUnavailable(
                "its server can't be reached or trusted, or broke the connection"
            ) from exc


def _header(response: httpcore2.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("latin-1")
    return None


def _check_status(response: httpcore2.Response) -> None:
    status = response.status
    if status == HTTPStatus.OK:
        return
    passing = status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    wait = _header(response, b"retry-after") or ""
    after = min(float(wait), LONGEST_RETRY_AFTER) if wait.isascii() and wait.isdigit() else None
    raise UrlUnavailable(
        f"its server answers with HTTP {status}", retryable=passing, retry_after=after
    )


def _too_large(limit: int) -> UploadTooLarge:
    return UploadTooLarge(f"audio_url: the file is larger than the limit of {limit} bytes")
