"""A web server in a process of its own, as users have it, and requests to it as bytes."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from jobs.settings import TokenSettings
from tests import ports
from web.auth import issue_token

SECRET = "a secret of the benchmarks' own, long enough"  # noqa: S105 - it opens nothing
START_TIMEOUT = 60.0  # seconds
PGSCRIBE = ("jobs.cli", "web", "--stop-with-stdin")


@dataclass(frozen=True)
class WebProcess:
    """A web server that runs."""

    port: int
    pid: int


@contextmanager
def web_process(url: str, folder: Path, *module: str) -> Iterator[WebProcess]:
    """Run ``pgscribe web`` on a database, or another module that takes a port."""
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": url,
        "PGSCRIBE_JWT_SECRET": SECRET,
        "PGSCRIBE_STORAGE_DIR": str(folder / "storage"),
        "PGSCRIBE_RATE_LIMIT": "0",
    }
    with (
        ports.reserved() as port,
        subprocess.Popen(
            [sys.executable, "-m", *(module or PGSCRIBE), "--port", str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process,
    ):
        try:
            _wait_until_open(port, process)
            yield WebProcess(port, process.pid)
        finally:
            process.kill()


def _wait_until_open(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            asyncio.run(_connect(port))
            return
        time.sleep(0.05)
    raise RuntimeError("The web server did not start")


async def _connect(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()


def token(user: UUID) -> str:
    """Return a token of a user's."""
    return issue_token(TokenSettings.load(jwt_secret=SECRET), user, lifetime=3600)


def request(method: str, path: str, user_token: str, body: str = "") -> bytes:
    """Return a request: a client library would take longer than the server."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {user_token}\r\n"
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{head}{length}\r\n{body}".encode()


async def read_answer(reader: asyncio.StreamReader) -> None:
    """Read one answer. Raises ``RuntimeError`` unless it is a good one."""
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 202 ")):
        raise RuntimeError(f"The server answered {head[:200]!r}")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    await reader.readexactly(length)


@contextmanager
def open_stream(port: int, user_token: str) -> Iterator[None]:
    """Hold a stream of all events of a user's open, from when its snapshot has begun."""
    with socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT) as stream:
        stream.sendall(request("GET", "/jobs/events", user_token))
        with stream.makefile("rb") as lines:
            if not any(line.startswith(b"event: snapshot") for line in lines):
                raise RuntimeError("The stream ended before its snapshot")
            yield
