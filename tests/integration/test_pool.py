"""Every wait for a pool ends, and a task that is cancelled while it waits is cancelled."""

import asyncio
import logging
from collections.abc import AsyncIterator

import psycopg
import pytest
from psycopg_pool import PoolTimeout

from jobs import database
from jobs.database import Pool
from jobs.settings import Settings

pytestmark = pytest.mark.anyio

STUCK = 0.3  # seconds
HANDING_OVER = range(6)  # in so many rounds of the event loop a connection is handed over


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    """A pool of one connection."""
    small = settings.model_copy(update={"database_pool_size": 1})
    async with database.make_pool(small, name="test", for_queue=True) as opened:
        yield opened


async def use(pool: Pool) -> None:
    async with pool.connection() as conn:
        await conn.execute("select 1")


async def waits(pool: Pool) -> None:
    async with asyncio.timeout(10):
        while not pool.get_stats()["requests_waiting"]:  # noqa: ASYNC110 - has no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("rounds", HANDING_OVER)
async def test_a_cancellation_is_heard_while_a_connection_is_handed_over(
    pool: Pool, rounds: int
) -> None:
    """What goes on for ever, as the writer of a job's progress does, would never be told again."""

    async def use_for_ever() -> None:
        while True:
            await use(pool)

    conn = await pool.getconn()
    waiting = asyncio.create_task(use_for_ever())
    await waits(pool)
    asyncio.get_running_loop().call_soon(_after, rounds, waiting)
    await super(Pool, pool).putconn(conn)
    await asyncio.wait([waiting], timeout=60)
    assert waiting.cancelled()
    await use(pool)  # the connection is back in the pool


def _after(rounds: int, waiting: "asyncio.Task[None]") -> None:
    if rounds:
        asyncio.get_running_loop().call_soon(_after, rounds - 1, waiting)
    else:
        waiting.cancel()


async def test_a_pool_that_hangs_is_not_waited_for(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await use(pool)
    monkeypatch.setattr(database, "STUCK_TIMEOUT", STUCK)
    async with pool._lock:  # noqa: SLF001 - no time-out of the pool's own covers it
        with pytest.raises(PoolTimeout, match="the pool hung"):
            await use(pool)
    assert "Lock.acquire" in caplog.text, "the log says where"
    await use(pool)  # nothing is lost by it


async def test_a_pool_that_does_not_take_a_connection_back_is_not_waited_for(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database, "STUCK_TIMEOUT", STUCK)
    async with pool.connection() as conn:
        await pool._lock.acquire()  # noqa: SLF001
    assert "Lock.acquire" in caplog.text
    pool._lock.release()  # noqa: SLF001
    async with pool.connection() as again:
        assert again is conn


async def test_a_connection_is_not_used_for_ever(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    """As if it were half open: the wait for an answer has no end of its own."""
    pool.use_timeout = STUCK
    caplog.set_level(logging.WARNING)
    with pytest.raises(psycopg.OperationalError):
        async with pool.connection() as conn:
            await conn.execute("select pg_sleep(30)")
    assert "No answer from the database" in caplog.text
    await use(pool)
