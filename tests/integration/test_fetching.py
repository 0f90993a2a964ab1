"""Audio by URL: real servers on loopback; only the answers of name servers are made up.

Loopback is allowed by an argument, on the test's own ports; what is refused stays refused.
"""

import asyncio
import contextlib
import gzip
import ipaddress
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs import outbound
from jobs.errors import UploadTooLarge, UrlRefused, UrlUnavailable
from jobs.fetching import Fetched, fetch
from jobs.outbound import Address, Rules, check_url, is_public

pytestmark = pytest.mark.anyio

AUDIO = b"sound" * 5000
Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """An HTTP server: ``answers`` by path; what it was asked is in ``heads``."""

    port: int = 0
    answers: dict[str, bytes | Handler] = field(default_factory=dict)
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                answer = self.answers[head.split(b" ")[1].decode()]
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await answer(head, writer)
        finally:
            self.hung_up.set()
            writer.close()


@asynccontextmanager
async def serving(context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    server = Server()
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        server.answers["/a.mp3"] = ok(AUDIO)
        yield server


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: audio/mpeg", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def status(code: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {code} Said", "Content-Length: 0", *headers, "", ""]).encode()


def redirect(to: str, code: int = 302) -> bytes:
    return status(code, f"Location: {to}")


@dataclass
class Names:
    """A name server: for each name, the answers of one lookup after the other."""

    answers: dict[str, list[list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers.get(host, [["127.0.0.1"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]


def loopback_too(address: Address) -> bool:
    """127.0.0.1 stands for a public address; all other private ones stay private."""
    return str(address) == "127.0.0.1" or is_public(address)


def rules(*servers: Server, names: Names | None = None, context: ssl.SSLContext | None = None,
          read_timeout: float = 5.0) -> Rules:  # fmt: skip
    ports = outbound.PORTS | {server.port for server in servers}
    return Rules(loopback_too, ports, names or Names(), context, read_timeout)


async def read(
    url: str, allowed: Rules, *, max_bytes: int = 1_000_000, seconds: float = 10
) -> tuple[Fetched, bytes]:
    async with fetch(url, max_bytes=max_bytes, timeout=seconds, rules=allowed) as fetched:
        return fetched, b"".join([chunk async for chunk in fetched.chunks])


async def test_a_recording_is_fetched(server: Server) -> None:
    fetched, body = await read(
        f"http://audio.test:{server.port}/a.mp3", rules(server), max_bytes=len(AUDIO)
    )
    assert (fetched.content_type, fetched.size, body) == ("audio/mpeg", len(AUDIO), AUDIO)
    head = server.heads[0].lower()
    assert f"host: audio.test:{server.port}".encode() in head
    assert b"accept-encoding: identity" in head
    for unwanted in (b"cookie", b"authorization", b"referer", b"proxy"):
        assert unwanted not in head


async def test_query_and_escapes_are_sent_as_they_are(server: Server) -> None:
    path = "/a%20b/%e2%82%ac.mp3?sig=a%2Fb&x=[1]"
    server.answers[path] = ok(AUDIO)
    url = f"http://audio.test:{server.port}{path}#fragment"
    assert (await read(url, rules(server)))[1] == AUDIO


async def test_no_proxy_of_the_environment_is_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        await read(f"http://audio.test:{server.port}/a.mp3", rules(server))
    assert proxy.connections == 0


# Which addresses

REFUSED = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200",
    "100.127.255.255", "127.0.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254",
    "169.254.0.1", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1",
    "192.88.99.1", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1",
    "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::8.8.8.8", "100::1",
    "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::1",
    "2002:808:808::1", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1",
    "febf::1", "fec0::1", "ff02::1", "ff0e::1", "4000::1",
]  # fmt: skip
ALLOWED = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0",
    "126.255.255.255", "128.0.0.1", "169.253.255.255", "172.15.255.255", "172.32.0.0",
    "192.167.255.255", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2606:4700::1111",
    "2a00:1450:4001::200e", "64:ff9b::8.8.8.8", "2001:4860:4860::8888", "2003::1",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
async def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    names = Names({"audio.test": [["8.8.8.8", address]]})
    with pytest.raises(UrlRefused) as caught:
        await read("https://audio.test/a.mp3", Rules(resolve=names))
    assert (caught.value.code, caught.value.field) == ("url_refused", "audio_url")
    assert str(caught.value) == "audio_url: its host is not on the public internet"
    assert not caught.value.retryable


@pytest.mark.parametrize("address", ALLOWED)
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_real_names_and_literals_of_this_machine(server: Server) -> None:
    """By the default rules and the real resolver; the port is one that may be used."""
    allowed = Rules(ports=frozenset({server.port}))
    for host in ("localhost", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"):
        with pytest.raises(UrlRefused, match="not on the public internet"):
            await read(f"http://{host}:{server.port}/a.mp3", allowed)
    assert server.connections == 0


async def test_unknown_names() -> None:
    with pytest.raises(UrlUnavailable, match="not found"):
        await read("http://nowhere.invalid/a.mp3", Rules())
    with pytest.raises(UrlUnavailable, match="not found"):
        await read("http://audio.test/a.mp3", Rules(resolve=Names({"audio.test": [[]]})))


async def test_a_name_that_changes_its_mind(server: Server) -> None:
    """DNS rebinding: the second answer is never asked for; the checked address is used."""
    names = Names({"audio.test": [["127.0.0.1"], ["10.0.0.1"]]})
    assert (await read(f"http://audio.test:{server.port}/a.mp3", rules(server, names=names)))[1]
    assert names.asked == ["audio.test"]
    with pytest.raises(UrlRefused):
        await read(f"http://audio.test:{server.port}/a.mp3", rules(server, names=names))
    assert server.connections == 1


async def test_each_address_is_tried_once_checked(server: Server) -> None:
    """The first is this test's, and nobody listens there."""
    names = Names({"audio.test": [["127.0.0.9", "127.0.0.1"]]})

    def allowed(address: Address) -> bool:
        return address.is_loopback

    own = Rules(allowed, frozenset({server.port}), names)
    assert (await read(f"http://audio.test:{server.port}/a.mp3", own))[1] == AUDIO


# Which URLs


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.mp3",
        "//audio.test/a.mp3",
        "ftp://audio.test/a.mp3",
        "file:///etc/passwd",
        "data:audio/mpeg;base64,AAAA",
        "javascript:alert(1)",
        "gopher://audio.test/",
        "http:/audio.test/a.mp3",
        "http:///a.mp3",
        "http://",
        "http://user@audio.test/a.mp3",
        "http://user:password@audio.test/a.mp3",
        "http://@audio.test/a.mp3",
        "http://audio.test@127.0.0.1/a.mp3",
        "http://audio.test\\@127.0.0.1/a.mp3",
        "http:\\\\audio.test\\a.mp3",
        "http://audio.test/a b.mp3",
        " http://audio.test/a.mp3",
        "http://audio.test/a.mp3\r\nHost: other",
        "http://audio.test/a.mp3\r\n\r\nGET /",
        "http://audio.test/\ta.mp3",
        "http://audio.test/\0",
        "http://audio.test:22/a.mp3",
        "http://audio.test:0/a.mp3",
        "http://audio.test:65536/a.mp3",
        "http://audio.test:-1/a.mp3",
        "http://audio.test:8_0/a.mp3",
        "http://audio.test:abc/a.mp3",
        "http://audio.test:6379/a.mp3",
        "http://audio.test./a.mp3",
        "http://127.0.0.1./a.mp3",
        "http://.audio.test/a.mp3",
        "http://audio..test/a.mp3",
        "http://-audio.test/a.mp3",
        "http://audio.te%73t/a.mp3",
        "http://%31%32%37.0.0.1/a.mp3",
        "http://2130706433/a.mp3",
        "http://0x7f000001/a.mp3",
        "http://0x7f.0.0.1/a.mp3",
        "http://0x7f.1/a.mp3",
        "http://017700000001/a.mp3",
        "http://0177.0.0.1/a.mp3",
        "http://127.1/a.mp3",
        "http://127.0.1/a.mp3",
        "http://127.0.0.01/a.mp3",
        "http://127.0.0.256/a.mp3",
        "http://127.0.0.1.1/a.mp3",
        "http://1.0x/a.mp3",
        "http://audio.test.127/a.mp3",
        "http://①②⑦.⓪.⓪.①/a.mp3",
        "http://\uff11\uff12\uff17.0.0.1/a.mp3",
        "http://127。0。0。1/a.mp3",
        "http://loc\u212aalhost/a.mp3",
        "http://bücher.test/a.mp3",
        "http://[::1/a.mp3",
        "http://::1/a.mp3",
        "http://[]/a.mp3",
        "http://audio.test[2606:4700::1111]/a.mp3",
        "http://[2606:4700::1111]audio.test/a.mp3",
        "http://[fe80::1%25eth0]/a.mp3",
        "http://[fe80::1%eth0]/a.mp3",
        "http://[v1.1]/a.mp3",
        "http://[::1.2.3.4.5]/a.mp3",
        "http://" + "a" * 64 + ".test/",
        "http://" + "a." * 130 + "test/",
        "http://audio.test/" + "a" * 2048,
        "http://audio.test/\ud800",
    ],
)
async def test_odd_urls(url: str) -> None:
    names = Names({"audio.test": [["8.8.8.8"]]})
    with pytest.raises(UrlRefused) as caught:
        await read(url, Rules(resolve=names))
    assert str(caught.value).startswith("audio_url: ")
    assert names.asked == []


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("http://Audio.TEST", "audio.test", 80, "/"),
        ("HTTPS://audio.test:/a", "audio.test", 443, "/a"),
        ("https://audio.test:8443?q#f", "audio.test", 8443, "/?q"),
        ("https://xn--bcher-kva.test/", "xn--bcher-kva.test", 443, "/"),
        ("https://a_b.test/", "a_b.test", 443, "/"),
        ("http://8.8.8.8/a", "8.8.8.8", 80, "/a"),
        ("http://[2606:4700:0::1111]/a", "2606:4700::1111", 80, "/a"),
    ],
)
def test_usual_urls(url: str, host: str, port: int, target: str) -> None:
    found = check_url(url)
    assert (found.host, found.port, found.target) == (host, port, target)


# Redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_followed(code: int, server: Server) -> None:
    server.answers["/start"] = redirect(f"http://other.test:{server.port}/next", code)
    server.answers["/next"] = redirect("a.mp3")
    names = Names()
    url = f"http://audio.test:{server.port}/start"
    assert (await read(url, rules(server, names=names)))[1] == AUDIO
    assert names.asked == ["audio.test", "other.test", "other.test"]


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.2:{port}/secret",
        "http://10.0.0.1/secret",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]/secret",
        "http://[::ffff:169.254.169.254]/",
        "http://private.test/secret",
        "//private.test/secret",
        "http://0x7f000001/",
        "http://audio.test:22/",
        "http://user:password@audio.test/",
        "file:///etc/passwd",
        "\\\\private.test\\secret",
        "http://[/",
        "http://h\u00f6r.test/",
    ],
)
async def test_redirects_go_through_the_same_checks(to: str, server: Server) -> None:
    async with serving() as private:
        names = Names({"private.test": [["10.0.0.1"]]})
        target = to.format(port=private.port)
        server.answers["/start"] = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode(
            "latin-1"
        )
        with pytest.raises(UrlRefused) as caught:
            await read(
                f"http://audio.test:{server.port}/start", rules(server, private, names=names)
            )
    assert private.connections == 0
    for told in ("10.0.0.1", "169.254", "127.0.0", "private", "password", "secret"):
        assert told not in str(caught.value)


async def test_redirects_have_an_end(server: Server) -> None:
    for number in range(6):
        server.answers[f"/{number}"] = redirect(f"/{number + 1}")
    server.answers["/6"] = ok(AUDIO)
    assert (await read(f"http://audio.test:{server.port}/1", rules(server)))[1] == AUDIO
    with pytest.raises(UrlRefused, match="5 redirects"):
        await read(f"http://audio.test:{server.port}/0", rules(server))
    server.answers["/loop"] = redirect("/loop")
    with pytest.raises(UrlRefused, match="5 redirects"):
        await read(f"http://audio.test:{server.port}/loop", rules(server))


async def test_the_body_of_a_redirect_is_not_read(server: Server) -> None:
    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /a.mp3\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            await writer.drain()

    server.answers["/start"] = endless
    assert (await read(f"http://audio.test:{server.port}/start", rules(server)))[1] == AUDIO


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For audio.test and 192.0.2.1, not for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=audio.test", "-addext",
         "subjectAltName=DNS:audio.test", "-keyout", folder / "key.pem", "-out",
         folder / "cert.pem"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder


async def test_certificates_are_checked_against_the_name(certificate: Path) -> None:
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    seen: list[str | None] = []
    own.sni_callback = lambda _, name, __: seen.append(name)
    trusting = ssl.create_default_context(cafile=certificate / "cert.pem")
    async with serving(own) as server, serving() as plain:
        server.answers |= {
            "/a.mp3": ok(AUDIO),
            "/down": redirect(f"http://audio.test:{plain.port}/a.mp3"),
        }
        plain.answers |= {
            "/a.mp3": ok(AUDIO),
            "/up": redirect(f"https://audio.test:{server.port}/a.mp3"),
        }
        allowed = rules(server, plain, context=trusting)
        base = f"https://audio.test:{server.port}"
        assert (await read(f"{base}/a.mp3", allowed))[1] == AUDIO
        assert seen == ["audio.test"]
        up = f"http://audio.test:{plain.port}/up"
        assert (await read(up, allowed))[1] == AUDIO
        with pytest.raises(UrlRefused, match="from https:// to http://"):
            await read(f"{base}/down", allowed)
        with pytest.raises(UrlUnavailable, match="trusted"):
            await read(f"https://other.test:{server.port}/a.mp3", allowed)
        with pytest.raises(UrlUnavailable, match="trusted"):
            await read(f"{base}/a.mp3", rules(server))


# Bodies


async def test_announced_sizes_are_refused_before_the_body(server: Server) -> None:
    server.answers["/large"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n"
    with pytest.raises(UploadTooLarge, match="1000000 bytes"):
        await read(f"http://audio.test:{server.port}/large", rules(server))


@pytest.mark.parametrize("chunked", [True, False])
async def test_an_endless_body_is_left(chunked: bool, server: Server) -> None:  # noqa: FBT001
    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        head = b"HTTP/1.1 200 OK\r\n"
        writer.write(head + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        piece = bytes(65536)
        while True:
            writer.write(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            await writer.drain()

    server.answers["/endless"] = endless
    received = 0

    async def count() -> None:
        nonlocal received
        url = f"http://audio.test:{server.port}/endless"
        async with fetch(url, max_bytes=1_000_000, timeout=10, rules=rules(server)) as fetched:
            async for chunk in fetched.chunks:
                received += len(chunk)

    with pytest.raises(UploadTooLarge):
        await count()
    assert 0 < received <= 1_000_000
    await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_a_gzip_bomb_is_not_opened(server: Server) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    for encoding in ("gzip", "deflate", "br", "identity, gzip"):
        server.answers["/bomb"] = ok(bomb, f"Content-Encoding: {encoding}")
        with pytest.raises(UrlRefused, match="compresses"):
            await read(f"http://audio.test:{server.port}/bomb", rules(server))
    server.answers["/bomb"] = ok(bomb, "Content-Encoding: identity")
    assert (await read(f"http://audio.test:{server.port}/bomb", rules(server)))[1] == bomb


async def test_a_slow_server_is_left_in_the_end(server: Server) -> None:
    """Each byte comes in time, and all of them never would."""

    async def drip(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def drip_head(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    for answer in (drip, drip_head):
        server.answers["/slow"] = answer
        with pytest.raises(UrlUnavailable, match=r"limit of 0\.3 s") as caught:
            await read(f"http://audio.test:{server.port}/slow", rules(server), seconds=0.3)
        assert caught.value.retryable
        await asyncio.wait_for(server.hung_up.wait(), 5)


async def test_a_silent_server_is_left(server: Server) -> None:
    async def silent(_: bytes, __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async def silent_body(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
        await asyncio.sleep(3600)

    for answer in (silent, silent_body):
        server.answers["/silent"] = answer
        with pytest.raises(UrlUnavailable, match="in time"):
            await read(f"http://audio.test:{server.port}/silent", rules(server, read_timeout=0.1))


async def test_a_body_that_breaks_off(server: Server) -> None:
    server.answers["/cut"] = ok(AUDIO)[:-1]
    with pytest.raises(UrlUnavailable, match="broke") as caught:
        await read(f"http://audio.test:{server.port}/cut", rules(server))
    assert caught.value.retryable


async def test_what_is_no_http_and_endless_headers(server: Server) -> None:
    server.answers["/smtp"] = b"220 mail.test ESMTP\r\n"
    server.answers["/head"] = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000
    for path in ("smtp", "head"):
        with pytest.raises(UrlUnavailable):
            await read(f"http://audio.test:{server.port}/{path}", rules(server))


async def test_an_empty_file_and_a_web_page(server: Server) -> None:
    server.answers["/empty"] = ok(b"")
    with pytest.raises(UrlUnavailable, match="empty") as caught:
        await read(f"http://audio.test:{server.port}/empty", rules(server))
    assert not caught.value.retryable
    server.answers["/page"] = b"HTTP/1.1 200 OK\r\nContent-Type: Text/HTML; charset=x\r\n\r\n<"
    with pytest.raises(UrlRefused, match="web page"):
        await read(f"http://audio.test:{server.port}/page", rules(server))


@pytest.mark.parametrize(
    ("code", "retryable"),
    [(204, False), (206, False), (304, False), (400, False), (401, False), (403, False),
     (404, False), (410, False), (408, True), (425, True), (429, True), (500, True), (503, True)],
)  # fmt: skip
async def test_refusals(code: int, retryable: bool, server: Server) -> None:  # noqa: FBT001
    server.answers["/x?token=secret"] = status(code, "Retry-After: 7")
    with pytest.raises(UrlUnavailable, match=f"HTTP {code}") as caught:
        await read(f"http://audio.test:{server.port}/x?token=secret", rules(server))
    assert (caught.value.retryable, caught.value.retry_after) == (retryable, 7)
    assert caught.value.code == "url_unavailable"
    assert "secret" not in str(caught.value)


async def test_retry_after_is_bounded(server: Server) -> None:
    for said, after in (("999999999999", 3600), ("Wed, 21 Oct 2026 07:28:00 GMT", None)):
        server.answers["/x"] = status(503, f"Retry-After: {said}")
        with pytest.raises(UrlUnavailable) as caught:
            await read(f"http://audio.test:{server.port}/x", rules(server))
        assert caught.value.retry_after == after


async def test_an_error_of_the_reader_is_its_own(server: Server) -> None:
    with pytest.raises(TimeoutError):
        async with fetch(
            f"http://audio.test:{server.port}/a.mp3",
            max_bytes=1_000_000,
            timeout=10,
            rules=rules(server),
        ):
            raise TimeoutError
    await asyncio.wait_for(server.hung_up.wait(), 5)
