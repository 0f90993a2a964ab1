"""Notifications from Postgres, from one connection that is replaced whenever it fails."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

import psycopg
from psycopg import sql

from jobs.backoff import Backoff

logger = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[psycopg.AsyncConnection[tuple[object, ...]]]]
OnNotify = Callable[[str, str], None]

CONNECT_TIMEOUT = 10.0  # seconds


class Listener:
    """Calls ``on_notify(channel, payload)`` for what arrives, and ``on_connect`` after each gap.

    Notifications are hints: anybody who may connect can send any, so the receiver looks into the
    tables. A connection can be dead without an error, or belong to a pooler that drops LISTEN: send
    a notification to ``echo_channel`` and call ``check_echo`` some time later.
    """

    def __init__(
        self,
        connect: Connect,
        channels: Sequence[str],
        *,
        on_notify: OnNotify,
        on_connect: Callable[[], None],
    ) -> None:
        self._connect = connect
        self.echo_channel = f"pgscribe_echo_{secrets.token_hex(8)}"
        self._channels = [*channels, self.echo_channel]
        self._on_notify = on_notify
        self._on_connect = on_connect
        self._session: asyncio.Task[None] | None = None
        self._echoed = False
        self.hears = False  # whether the last echo arrived

    async def run(self) -> None:
        """Listen until cancelled."""
        backoff = Backoff()
        while True:
            self._session = asyncio.create_task(self._listen(backoff.reset))
            try:
                await asyncio.wait({self._session})
            finally:
                self._session.cancel()
                with contextlib.suppress(asyncio.CancelledError, psycopg.Error, OSError):
                    await self._session
            self.hears = False
            await backoff.sleep()

    async def _listen(self, on_success: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                conn = await self._connect()
        except (psycopg.Error, OSError, TimeoutError) as exc:
            logger.debug("The listener could not connect: %s", exc)
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                for channel in self._channels:
                    await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
            on_success()
            self._on_connect()
            async for notification in conn.notifies():
                if notification.channel == self.echo_channel:
                    self._echoed = self.hears = True
                else:
                    self._on_notify(notification.channel, notification.payload)
        except (psycopg.Error, OSError, TimeoutError) as exc:
            logger.warning("The listener lost its connection: %s", str(exc).strip())
        finally:
            await conn.close()

    def expect_echo(self) -> None:
        """Say that an echo is about to be sent."""
        self._echoed = False

    def check_echo(self) -> None:
        """Replace the connection if the expected echo has not arrived."""
        if self._echoed:
            return
        self.hears = False
        if self._session is not None:
            self._session.cancel()
