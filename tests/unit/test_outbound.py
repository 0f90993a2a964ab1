"""Names of hosts whose name servers are silent."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jobs import outbound
from jobs.errors import UrlUnavailable

pytestmark = pytest.mark.anyio


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Have look-ups of names under ``silent.example`` take until this is set."""
    over = threading.Event()
    look_up = socket.getaddrinfo

    def wait(host: str, *args: Any, **options: Any) -> Any:
        if host.endswith(".silent.example"):
            over.wait()
        return look_up("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    monkeypatch.setattr(outbound, "CONNECT_TIMEOUT", 0.2)
    yield over
    over.set()


async def test_names_whose_servers_are_silent_hold_up_neither_others_nor_other_threads(
    silent: threading.Event,
) -> None:
    try:
        dead = [outbound.resolve(f"{number}.silent.example", 443) for number in range(40)]
        for error in await asyncio.gather(*dead, return_exceptions=True):
            assert isinstance(error, UrlUnavailable)
        assert await outbound.resolve("example.org", 443) == ["127.0.0.1"]
        async with asyncio.timeout(0.2):
            assert await asyncio.to_thread(threading.active_count) > 40
    finally:
        silent.set()
