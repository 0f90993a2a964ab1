"""A connection to Postgres for calls and notifications, replaced when it fails."""

import asyncio
import contextlib
import functools
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import psycopg
from psycopg import errors, generators, pq, sql

from jobs.database import deadline
from jobs.sql import QUEUE

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
CALL_TIMEOUT = 10.0  # seconds; the server gives a statement up after 8

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Connect = Callable[[], Awaitable[Connection]]


_PLACEHOLDER = re.compile(rb"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class _Statement:
    """A query as Postgres itself takes it: its parameters have numbers, its rows become JSON.

    That and ``_encode`` save a tenth of the time from a commit to the start of its job: psycopg
    looks for how to send and read each value, and makes a cursor.
    """

    query: bytes
    parameters: tuple[str, ...]

    @classmethod
    @functools.cache
    def of(cls, query: bytes) -> Self:
        """Return a named query as a statement."""
        parameters: list[str] = []

        def number(match: re.Match[bytes]) -> bytes:
            parameters.append(match[1].decode())
            return b"$%d" % len(parameters)

        query = _PLACEHOLDER.sub(number, query)
        return cls(b"select to_json(r) from (" + query + b") r", tuple(parameters))

    def arguments(self, values: Mapping[str, Any]) -> list[bytes | None]:
        """Return the values in the parameters' order, as text that Postgres reads."""
        return [_encode(values[name]) for name in self.parameters]


def _encode(value: str | float | list[str] | list[int] | None) -> bytes | None:
    """Return a value as text: an array's are numbers or plain names."""
    if value is None:
        return None
    if isinstance(value, list):
        return ("{" + ",".join(map(str, value)) + "}").encode()
    return str(value).encode()


class QueueConnection:
    """Calls functions, one at a time, and hears what is notified meanwhile and in between.

    Notifications are hints: anybody who may connect can send any, so the receiver looks into the
    tables. Listening on the same connection saves the database a connection for each worker, and a
    worker the time to wake two of them. It may belong to a pooler that drops LISTEN: send a
    notification to ``echo_channel`` and call ``check_echo`` some time later.
    """

    def __init__(self, connect: Connect, queries: Mapping[str, bytes] = QUEUE) -> None:
        self._connect = connect
        self._queries = queries
        self._conn: Connection | None = None
        self._channels: Sequence[str] = ()
        self._on_notify: Callable[[str, str], None] = lambda _channel, _payload: None
        self._on_connect: Callable[[], None] = lambda: None
        self._on_loss: Callable[[], None] = lambda: None
        self.call_timeout = CALL_TIMEOUT
        self.echo_channel = f"pgscribe_echo_{secrets.token_hex(8)}"
        self._echoed = False
        self.hears = False  # whether the last echo arrived
        self._prepared: set[str] = set()

    def listen(
        self,
        channels: Sequence[str],
        *,
        on_notify: Callable[[str, str], None],
        on_connect: Callable[[], None],
        on_loss: Callable[[], None],
    ) -> None:
        """From the next call on, listen.

        ``on_notify(channel, payload)`` is called for what arrives, ``on_connect`` after each gap,
        ``on_loss`` when the connection has ended between two calls: the next one opens another.
        """
        self._channels = [*channels, self.echo_channel]
        self._on_notify = on_notify
        self._on_connect = on_connect
        self._on_loss = on_loss

    async def call(self, query: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Execute one of the queries and return its row, as JSON has it.

        Raises what psycopg raises, and ``TimeoutError`` where no connection could be opened.
        """
        if self._conn is None or self._conn.closed:
            await self.close()
            self._conn = await self._open()
        with self._calling(self._conn):
            row: dict[str, Any] = await self._execute(self._conn, query, values)
        return row

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, as far as anybody knows."""
        return self._conn is not None and not self._conn.closed

    async def close(self) -> None:
        """Close the connection. A later call opens another one."""
        conn, self._conn = self._conn, None
        if conn is not None:
            self._stop_reading(conn)
            with contextlib.suppress(psycopg.Error, OSError):
                await conn.close()

    async def _open(self) -> Connection:
        self.hears = False
        async with asyncio.timeout(CONNECT_TIMEOUT):
            conn = await self._connect()
        try:
            conn.add_notify_handler(lambda notify: self._hear(notify.channel, notify.payload))
            with self._calling(conn):
                await conn.execute(QUEUE["prepare_connection"])
                if self._channels:
                    listens = map(sql.SQL("listen {}").format, map(sql.Identifier, self._channels))
                    await conn.execute(sql.SQL("; ").join(listens))
            if self._channels:
                self._on_connect()
        except BaseException:
            self._stop_reading(conn)
            await conn.close()
            raise
        self._prepared.clear()
        return conn

    @contextmanager
    def _calling(self, conn: Connection) -> Iterator[None]:
        """Leave the connection to psycopg, which gets no longer than the time-out."""
        self._stop_reading(conn)
        try:
            with deadline(conn, self.call_timeout):
                yield
        finally:
            if self._channels and not conn.closed:
                self._start_reading(conn)

    async def _execute(self, conn: Connection, name: str, values: Mapping[str, Any]) -> Any:
        statement = _Statement.of(self._queries[name])
        arguments = statement.arguments(values)
        # A pooler that passes notifications on keeps prepared statements, too.
        if not self.hears:
            conn.pgconn.send_query_params(statement.query, arguments)
        else:
            if name not in self._prepared:
                conn.pgconn.send_prepare(name.encode(), statement.query)
                await self._result(conn, pq.ExecStatus.COMMAND_OK)
                self._prepared.add(name)
            conn.pgconn.send_query_prepared(name.encode(), arguments)
        result = await self._result(conn, pq.ExecStatus.TUPLES_OK)
        value = result.get_value(0, 0)
        assert value is not None
        return json.loads(value.decode(conn.info.encoding))

    @staticmethod
    async def _result(conn: Connection, expected: pq.ExecStatus) -> pq.abc.PGresult:
        result: pq.abc.PGresult
        results = await conn.wait(generators.execute(conn.pgconn))
        if not results:
            raise psycopg.OperationalError("the connection ended without an answer")
        # What fails after the last row, as a commit or the server's end, comes behind the rows.
        result = results[-1]
        if result.status != expected:
            raise errors.error_from_result(result, conn.info.encoding)
        return result

    # Between calls

    def _start_reading(self, conn: Connection) -> None:
        asyncio.get_running_loop().add_reader(conn.fileno(), self._read, conn)
        self._read_buffered(conn)

    @staticmethod
    def _stop_reading(conn: Connection) -> None:
        with contextlib.suppress(psycopg.Error):
            asyncio.get_running_loop().remove_reader(conn.fileno())

    def _read(self, conn: Connection) -> None:
        file = conn.fileno()
        try:
            conn.pgconn.consume_input()
        except psycopg.OperationalError as exc:
            logger.warning("The connection was lost: %s", str(exc).strip())
            asyncio.get_running_loop().remove_reader(file)
            self._on_loss()
        else:
            self._read_buffered(conn)

    def _read_buffered(self, conn: Connection) -> None:
        while notification := conn.pgconn.notifies():
            self._hear(
                notification.relname.decode(errors="replace"),
                notification.extra.decode(errors="replace"),
            )

    def _hear(self, channel: str, payload: str) -> None:
        if channel == self.echo_channel:
            self._echoed = self.hears = True
        else:
            self._on_notify(channel, payload)

    # Echoes

    def expect_echo(self) -> None:
        """Say that an echo is about to be sent."""
        self._echoed = False

    async def check_echo(self) -> None:
        """Close the connection if the expected echo has not arrived."""
        if not self._echoed:
            self.hears = False
            await self.close()
