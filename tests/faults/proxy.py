"""A TCP proxy on loopback that can swallow, hold, delay, cut and refuse, and drop notifications."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any, Self, TypeVar

from tests import ports

T = TypeVar("T")

NOTIFICATION = ord("A")
READY = b"Z\0\0\0\5I"  # the server waits for a statement
PLAIN = "?sslmode=disable&gssencmode=disable"  # the proxy reads along
CONTROL_TIMEOUT = 60.0  # seconds


class _WithoutNotifications:
    """Passes on what a Postgres server sends, but for its notifications."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def __call__(self, data: bytes) -> bytes:
        self._buffer += data
        passed = bytearray()
        while len(self._buffer) >= 5:
            end = 1 + int.from_bytes(self._buffer[1:5])
            if len(self._buffer) < end:
                break
            if self._buffer[0] != NOTIFICATION:
                passed += self._buffer[:end]
            del self._buffer[:end]
        return bytes(passed)


class _Pair:
    """One client and its connection to the server."""

    def __init__(self, proxy: "Proxy", client: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.dead = proxy.swallowing  # what it carries is lost, for ever

    def cut(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader) -> None:
        if self.dead:
            await self._swallow_all(reader)
            return
        server_reader, self.server = await asyncio.open_connection("127.0.0.1", self._proxy.target)
        await asyncio.gather(
            self._pump(reader, self.server, drop_notifications=False),
            self._pump(
                server_reader, self.client, drop_notifications=self._proxy.drops_notifications
            ),
        )

    @staticmethod
    async def _swallow_all(reader: asyncio.StreamReader) -> None:
        while await reader.read(1 << 16):
            pass

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        drop_notifications: bool,
    ) -> None:
        passed = _WithoutNotifications() if drop_notifications else bytes
        try:
            while data := await reader.read(1 << 16):
                if self._proxy.delay:
                    await asyncio.sleep(self._proxy.delay)
                await self._proxy.flowing.wait()
                if not self.dead:
                    writer.write(passed(data))
                    await writer.drain()
                if self._proxy.silences_new and READY in data:
                    self.dead = True
            await self._proxy.flowing.wait()
        finally:
            if not self.dead:
                writer.close()


class Proxy:
    """Passes connections on to ``target`` on loopback. ``port`` stays the same for its life."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        self.drops_notifications = False
        self.silences_new = False  # connections are lost as soon as they are made
        self.swallowing = False
        self._pairs: dict[_Pair, asyncio.Task[Any]] = {}
        self._server: asyncio.Server | None = None
        self._place = ExitStack()  # where it listens is kept while it refuses
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self.port = self._place.enter_context(ports.reserved(port=self.port))
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONTROL_TIMEOUT)
        self._loop.close()
        self._place.close()

    def url(self, url: str) -> str:
        """Return a database's URL with the proxy in between."""
        return url.replace(f":{self.target}/", f":{self.port}/") + PLAIN

    def swallow(self) -> None:
        """Lose what all connections carry, for ever; also that of new ones, until ``heal``."""
        self._do(self._swallow())

    def hold(self) -> None:
        """Keep what connections carry until ``heal``, and deliver it then."""
        self._do(self._hold())

    def cut(self) -> None:
        """Reset all connections."""
        self._do(self._cut())

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones until ``heal``."""
        self._do(self._refuse())

    def heal(self) -> None:
        """Let new connections through, and what has been held."""
        self._do(self._heal())

    def _do(self, act: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(act, self._loop).result(CONTROL_TIMEOUT)

    async def _open(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(self, writer)
        task = asyncio.current_task()
        assert task is not None
        self._pairs[pair] = task
        try:
            with contextlib.suppress(OSError):
                await pair.carry(reader)
        finally:
            del self._pairs[pair]
            pair.cut()

    async def _swallow(self) -> None:
        self.swallowing = True
        for pair in self._pairs:
            pair.dead = True

    async def _hold(self) -> None:
        self.flowing.clear()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            pair.cut()

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _heal(self) -> None:
        self.swallowing = self.silences_new = False
        self.flowing.set()
        if self._server is None:
            await self._listen()

    async def _close(self) -> None:
        await self._heal()
        await self._refuse()
        if self._pairs:
            await asyncio.wait(self._pairs.values())
