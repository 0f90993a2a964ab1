"""An app on a real socket, and an HTTP proxy that loses what passes through it."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import uvicorn

# "request" never reaches the server, of "half" so much does; "answer" is lost after the server gave
# it; "wait": there is no answer until the proxy stops. A number of bytes: so much of the answer's
# body comes through.
Fault = Literal["request", "half", "answer", "wait"] | int | bytes


@contextmanager
def serve(app: Any, port: int = 0) -> Iterator[str]:
    """Yield the URL at which uvicorn serves an app, from a thread."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an answer that a proxy or a gateway might give."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named |= {"content-length": str(len(body)), "connection": "close"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status} Said by the proxy\r\n{lines}\r\n".encode() + body


@dataclass
class FaultyProxy:
    """Passes on requests to ``target``, each on a connection of its own.

    ``faults``: method and what goes wrong (``None``: nothing) with the next request that has it.
    ``requests``: method, path and headers of all that came.
    """

    target: str
    faults: list[tuple[str, Fault | None]] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def seen(self, method: str) -> int:
        """Return how many requests had that method."""
        return sum(request[0] == method for request in self.requests)

    @contextmanager
    def running(self) -> Iterator[None]:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threads: list[threading.Thread] = []
        accepting = threading.Thread(target=self._accept, args=(listener, threads))
        accepting.start()
        try:
            yield
        finally:
            self.stopping.set()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            listener.close()
            for thread in threads:
                thread.join()

    def _accept(self, listener: socket.socket, threads: list[threading.Thread]) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            head, body = _read_request(client)
            first, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            self.requests.append((method, path, headers))
            fault = self._fault(method)
            if fault == "wait":
                self.stopping.wait(60)
            if isinstance(fault, bytes):
                client.sendall(fault)
            if fault in {"request", "wait"} or isinstance(fault, bytes):
                return
            self._pass_on(client, b"\r\n".join((head, b"connection: close", b"", body)), fault)

    def _fault(self, method: str) -> Fault | None:
        if self.faults and self.faults[0][0] == method:
            return self.faults.pop(0)[1]
        return None

    def _pass_on(self, client: socket.socket, request: bytes, fault: Fault | None) -> None:
        parts = urlsplit(self.target)
        with socket.create_connection((parts.hostname, parts.port)) as server:
            if fault == "half":
                server.sendall(request[: len(request) // 2])
                return
            server.sendall(request)
            server.settimeout(0.1)
            passed = b""
            while True:
                try:
                    data = server.recv(1 << 16)
                except TimeoutError:
                    if self.stopping.is_set():
                        return
                    continue
                if not data:
                    return
                if fault == "answer":
                    continue
                if isinstance(fault, int):
                    passed += data
                    head, found, body = passed.partition(b"\r\n\r\n")
                    if found and len(body) >= fault:
                        client.sendall(head + found + body[:fault])
                        return
                    continue
                client.sendall(data)


def _read_request(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        received = client.recv(1 << 16)
        if not received:
            raise OSError
        data += received
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line[15:])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        ),
        0,
    )
    while len(body) < length:
        body += client.recv(1 << 16)
    head = b"\r\n".join(
        line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")
    )
    return head, body


@contextmanager
def proxied(target: str) -> Iterator[FaultyProxy]:
    """Yield a running proxy to ``target``."""
    proxy = FaultyProxy(target)
    with proxy.running():
        yield proxy
