"""HTTP to URLs that users give: to the public internet, and to nowhere else.

A name is resolved once, all of its addresses are checked, and one of those is connected to: what a
name server says a moment later has no effect. TLS is with the name. Nothing of this machine's
environment is used: no proxy, no cookies, no credentials. Redirects are not followed.
"""

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpcore2
import httpx2

from jobs.errors import UrlRefused, UrlUnavailable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
AddressCheck = Callable[[Address], bool]

CONNECT_TIMEOUT = 10.0  # seconds, for each address
READ_TIMEOUT = 30.0  # seconds, for each wait
MAX_URL = 2048  # characters
# Others would make this server a scanner of other people's ports.
PORTS = frozenset({80, 443, 8080, 8443})

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


# A look-up that nobody waits for any more goes on for as long as a name server is silent. In the
# threads that all share, a few such names would stop whatever else is done in threads.
_LOOK_UPS = ThreadPoolExecutor(64, thread_name_prefix="look-up")


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a name. Raises ``UrlUnavailable``."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            found = await loop.run_in_executor(_LOOK_UPS, look_up)
    except TimeoutError as exc:
        raise UrlUnavailable("its host's address was not found in time") from exc
    except (OSError, UnicodeError) as exc:
        unknown = isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_NONAME
        raise UrlUnavailable("its host is not found", retryable=not unknown) from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True, slots=True)
class Rules:
    """Whom may be asked. Only tests have another check, other ports, or another name server."""

    is_allowed: AddressCheck = is_public
    ports: frozenset[int] = PORTS
    resolve: Resolve = resolve
    ssl_context: ssl.SSLContext | None = None
    read_timeout: float = READ_TIMEOUT
    networks: tuple[Network, ...] = ()  # these, too, on any port


PUBLIC = Rules()


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that passed the checks. ``target`` is what is asked for, path and query."""

    url: str = field(repr=False)
    scheme: str
    host: str
    port: int
    target: str = field(repr=False)

    @property
    def literal(self) -> Address | None:
        """The address, where no name is in its place."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None


def check_url(url: str, ports: Iterable[int] | None = PORTS) -> Target:
    """Read a URL strictly, so that nobody reads it otherwise. Raises ``UrlRefused``.

    ``ports``: those that it may have; ``None``: any, until it is asked.
    """
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
    if ports is not None:
        _check_port(port, ports)
    return Target(url, parts.scheme, _host(parts), port, _target(parts))


def _check_port(port: int, ports: Iterable[int]) -> None:
    if port not in ports:
        raise UrlRefused(f"its port must be one of {', '.join(map(str, sorted(ports)))}")


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


async def _addresses(target: Target, rules: Rules) -> list[Address]:
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
    if not all(any(address in network for network in rules.networks) for address in found):
        _check_port(target.port, rules.ports)
        if not all(rules.is_allowed(address) for address in found):
            raise UrlRefused(_NOT_PUBLIC)
    return found


async def ask(
    stack: AsyncExitStack,
    target: Target,
    rules: Rules,
    headers: Iterable[tuple[bytes, bytes]],
    content: bytes | None = None,
) -> httpcore2.Response:
    """Send one request, a POST of ``content`` or a GET, and return the answer's beginning.

    ``stack`` ends the connection. Raises ``UrlRefused`` where nobody may be asked, and
    ``UrlUnavailable`` where nobody answers.
    """
    addresses = await _addresses(target, rules)
    pool = httpcore2.AsyncConnectionPool(
        ssl_context=rules.ssl_context or _trusted(),
        max_connections=1,
        network_backend=_Pinned(addresses),
    )
    host = target.host.encode()
    default = target.port == (443 if target.scheme == "https" else 80)
    named = b"[%b]" % host if b":" in host else host
    waits = dict.fromkeys(("read", "write", "pool"), rules.read_timeout)
    url = httpcore2.URL(
        scheme=target.scheme.encode(), host=host, port=target.port, target=target.target.encode()
    )
    await stack.enter_async_context(pool)
    with explained():
        response: httpcore2.Response = await stack.enter_async_context(
            pool.stream(
                "GET" if content is None else "POST",
                url,
                headers=[
                    (b"Host", named if default else b"%b:%d" % (named, target.port)),
                    *headers,
                    (b"Accept-Encoding", b"identity"),
                    (b"User-Agent", b"pgscribe"),
                    (b"Connection", b"close"),
                ],
                content=content,
                extensions={"timeout": waits | {"connect": CONNECT_TIMEOUT}},
            )
        )
    return response


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


class explained:  # noqa: N801 - used as a function
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


def header(response: httpcore2.Response, name: bytes) -> str | None:
    """Return the first header of that name, which is in small letters."""
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("latin-1")
    return None
