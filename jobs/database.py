"""Connections to Postgres: pools, and transactions that run as a given user."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any, TypeVar

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from jobs.errors import DatabaseUnavailable
from jobs.settings import Settings
from jobs.sql import SESSIONS

logger = logging.getLogger(__name__)

CONNECTION_TIMEOUT = 10.0  # seconds to wait for a connection from a pool
# Seconds after which a pool is not waited for, whatever it does: its own time-out knows of neither
# its locks nor the check of a connection.
STUCK_TIMEOUT = 2 * CONNECTION_TIMEOUT + 5
WORKER_USE_TIMEOUT = 60.0  # seconds for which a worker may use a connection of its pool

# A peer that is gone without a word is noticed in about half a minute, not in hours.
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
T = TypeVar("T")

_left_behind: set[asyncio.Task[Any]] = set()


class Pool(AsyncConnectionPool[Connection]):
    """A pool of which every wait ends, and in which a task that is cancelled is cancelled.

    psycopg_pool waits by ``asyncio.wait_for``, which in Python 3.11 forgets a cancellation that
    comes while a connection is being handed over: the task goes on, and whoever waits for its end
    waits for ever. So that wait is a task of its own here. ``use_timeout``: seconds for which a
    connection may be used; then it is closed.
    """

    use_timeout: float | None = None

    async def getconn(self, timeout: float | None = None) -> Connection:  # noqa: ASYNC109 - psycopg's own
        """Return a connection. Raises ``PoolTimeout``."""
        getting = asyncio.create_task(super().getconn(timeout))
        try:
            return await _patiently(getting, STUCK_TIMEOUT)
        except BaseException as exc:
            getting.cancel()
            _leave_behind(getting)
            getting.add_done_callback(self._take_back)
            if isinstance(exc, TimeoutError):
                raise PoolTimeout(f"the pool hung for {STUCK_TIMEOUT:g} s") from exc
            raise

    async def putconn(self, conn: Connection) -> None:
        """Give a connection back. If that hangs, it is only logged."""
        putting = asyncio.create_task(super().putconn(conn))
        _leave_behind(putting)
        with contextlib.suppress(TimeoutError):
            await _patiently(putting, STUCK_TIMEOUT)

    @asynccontextmanager
    async def connection(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 - psycopg's own
    ) -> AsyncIterator[Connection]:
        """Lend a connection, for a transaction unless it is in autocommit mode."""
        conn = await self.getconn(timeout)
        try:
            with deadline(conn, self.use_timeout) if self.use_timeout else nullcontext():
                async with conn:
                    yield conn
        finally:
            await self.putconn(conn)

    def _take_back(self, getting: asyncio.Task[Connection]) -> None:
        """Give back what nobody waits for any more."""
        if not getting.cancelled() and getting.exception() is None:
            _leave_behind(asyncio.create_task(super().putconn(getting.result())))


async def promptly(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return what asking the database returns. Raises ``DatabaseUnavailable``, at once or in time.

    What hangs is cancelled and not waited for.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            _leave_behind(task)
    if not task.done():
        raise DatabaseUnavailable
    try:
        return task.result()
    except psycopg.OperationalError as exc:
        raise DatabaseUnavailable from exc


async def _patiently(task: asyncio.Task[T], seconds: float) -> T:
    """Wait for a task without cancelling it. Raises ``TimeoutError``, and logs where it hangs."""
    await asyncio.wait([task], timeout=seconds)
    if task.done():
        return task.result()
    logger.error("The pool hangs for %g s: %s", seconds, " > ".join(_where(task)))
    raise TimeoutError


def _where(task: asyncio.Task[Any]) -> Iterator[str]:
    """Yield the functions in which a task waits, the outermost first."""
    awaited: Any = task.get_coro()
    while isinstance(awaited, Coroutine):
        frame = getattr(awaited, "cr_frame", None)
        if frame is not None:
            yield f"{frame.f_code.co_qualname}:{frame.f_lineno}"
        awaited = getattr(awaited, "cr_await", None)
    yield repr(awaited)


def _leave_behind(task: asyncio.Task[Any]) -> None:
    """Let a task go on although nobody may wait for it."""
    _left_behind.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()


async def _use_queue_schema(conn: psycopg.AsyncConnection[Any]) -> None:
    with deadline(conn, CONNECTION_TIMEOUT):
        await conn.set_autocommit(True)
        await conn.execute(SESSIONS["use_queue_schema"])


async def _check(conn: psycopg.AsyncConnection[Any]) -> None:
    with deadline(conn, CONNECTION_TIMEOUT):
        await AsyncConnectionPool.check_connection(conn)


@contextmanager
def deadline(conn: psycopg.AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Give what is awaited on a connection so long, then end it as if the server had closed it.

    Nobody says that a half-open connection is dead. Not ``asyncio.timeout``: psycopg, when
    cancelled, waits for the server to cancel the query.
    """
    handle = asyncio.get_running_loop().call_later(seconds, _hang_up, conn, seconds)
    try:
        yield
    finally:
        handle.cancel()


def _hang_up(conn: psycopg.AsyncConnection[Any], waited: float) -> None:
    logger.warning("No answer from the database for %g s", waited)
    with contextlib.suppress(OSError, psycopg.Error):  # it may be closed already
        connection = socket.socket(fileno=conn.fileno())
        try:
            connection.shutdown(socket.SHUT_RDWR)
        finally:
            connection.detach()  # it is psycopg's to close


def _parameters(name: str) -> dict[str, Any]:
    return {
        "application_name": f"pgscribe {name}",
        "prepare_threshold": None,
        "connect_timeout": int(CONNECTION_TIMEOUT),
        "tcp_user_timeout": int(CONNECTION_TIMEOUT * 1000),
        **_KEEPALIVES,
    }


async def connect(settings: Settings, *, name: str) -> Connection:
    """Return a connection of its own, outside any pool; each statement is a transaction."""
    return await psycopg.AsyncConnection.connect(
        settings.database_url.get_secret_value(), autocommit=True, **_parameters(name)
    )


def make_pool(settings: Settings, *, name: str, for_queue: bool = False) -> Pool:
    """Return a pool that is not open yet. ``for_queue``: procrastinate works on it.

    A connection that the database has closed is replaced when it is asked for. Prepared
    statements are off, so that a transaction-mode pooler can't break a query.
    """
    pool = Pool(
        settings.database_url.get_secret_value(),
        kwargs=_parameters(name),
        min_size=1,
        max_size=settings.database_pool_size,
        timeout=CONNECTION_TIMEOUT,
        name=name,
        open=False,
        check=_check,
        configure=_use_queue_schema if for_queue else None,
    )
    pool.use_timeout = WORKER_USE_TIMEOUT if for_queue else None
    return pool


@asynccontextmanager
async def as_user(
    pool: Pool, claims: Mapping[str, Any]
) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
    """Run a transaction as the user of a verified token's ``claims``, under row level security."""
    async with pool.connection() as conn, conn.transaction():
        await conn.execute(SESSIONS["act_as_user"], {"claims": json.dumps(dict(claims))})
        yield conn
