"""Connections to Postgres: pools, and transactions that run as a given user."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from jobs.settings import Settings
from jobs.sql import SESSIONS

logger = logging.getLogger(__name__)

CONNECTION_TIMEOUT = 10.0  # seconds to wait for a connection from a pool

# A peer that is gone without a word is noticed in about half a minute, not in hours.
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Pool = AsyncConnectionPool[psycopg.AsyncConnection[tuple[Any, ...]]]


async def _use_queue_schema(conn: psycopg.AsyncConnection[Any]) -> None:
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
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(conn.fileno())) as connection,
    ):
        connection.shutdown(socket.SHUT_RDWR)


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
    return AsyncConnectionPool(
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


@asynccontextmanager
async def as_user(
    pool: Pool, claims: Mapping[str, Any]
) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
    """Run a transaction as the user of a verified token's ``claims``, under row level security."""
    async with pool.connection() as conn, conn.transaction():
        await conn.execute(SESSIONS["act_as_user"], {"claims": json.dumps(dict(claims))})
        yield conn
