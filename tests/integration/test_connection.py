"""The connection on which a worker calls and listens."""

import asyncio
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from jobs import connection, database
from jobs.connection import QueueConnection
from jobs.settings import Settings

pytestmark = pytest.mark.anyio

TERMINATE = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
    " where application_name = 'pgscribe test' and datname = current_database()"
)
PATIENCE = 60.0  # seconds for what takes a few on an idle machine


@dataclass
class Heard:
    """What the connection has reported."""

    notifications: asyncio.Queue[tuple[str, str]] = field(default_factory=asyncio.Queue)
    connects: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def on_connect(self) -> None:
        self.connects += 1


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def listening(settings: Settings, heard: Heard) -> AsyncIterator[QueueConnection]:
    line = QueueConnection(functools.partial(database.connect, settings, name="test"))
    line.listen(
        ["a channel"],
        on_notify=lambda *notification: heard.notifications.put_nowait(notification),
        on_connect=heard.on_connect,
        on_loss=heard.lost.set,
    )
    await register(line)
    yield line
    await line.close()


async def register(line: QueueConnection) -> int:
    row = await line.call("register", {})
    worker_id: int = row["worker_id"]
    return worker_id


def beat(line: QueueConnection, worker_id: int) -> Any:
    return line.call(
        "beat",
        {
            "worker_id": worker_id,
            "held": [],
            "attempts": [],
            "queue_jobs": [],
            "stall_timeout": 30.0,
            "max_attempts": 3,
            "sweep": False,
            "echo_channel": line.echo_channel,
        },
    )


async def test_it_hears_between_calls(
    listening: QueueConnection, heard: Heard, conn: psycopg.Connection
) -> None:
    async with asyncio.timeout(PATIENCE):
        for payload in ("one", "two"):
            conn.execute("select pg_notify('a channel', %s)", (payload,))
            assert await heard.notifications.get() == ("a channel", payload)
            await register(listening)
    assert heard.connects == 1


async def test_it_hears_what_comes_during_a_call(
    listening: QueueConnection, heard: Heard, conn: psycopg.Connection
) -> None:
    worker_id = await register(listening)
    with conn.transaction():
        conn.execute("select from procrastinate.procrastinate_workers for update")
        call = asyncio.create_task(beat(listening, worker_id))
        await asyncio.sleep(0.1)  # it waits for the row
        with psycopg.connect(conn.info.dsn, password=conn.info.password, autocommit=True) as other:
            other.execute("notify \"a channel\", 'meanwhile'")
    async with asyncio.timeout(PATIENCE):
        await call
        assert await heard.notifications.get() == ("a channel", "meanwhile")


async def test_the_end_of_the_connection_is_noticed_at_once_and_the_next_call_opens_another(
    listening: QueueConnection, heard: Heard, conn: psycopg.Connection
) -> None:
    async with asyncio.timeout(PATIENCE):
        for times in (1, 2, 3):
            heard.lost.clear()
            terminated = conn.execute(TERMINATE).fetchone()
            assert terminated in {(1,), (2,)}, "the one before may be about to end"
            await heard.lost.wait()
            assert heard.connects == times
            worker_id = await register(listening)
            listening.expect_echo()
            await beat(listening, worker_id)
            await listening.check_echo()
            assert listening.hears
            conn.execute("notify \"a channel\", 'again'")
            assert await heard.notifications.get() == ("a channel", "again")


async def test_a_missing_echo_closes_the_connection(
    listening: QueueConnection, heard: Heard
) -> None:
    listening.expect_echo()
    await listening.check_echo()
    assert not listening.hears
    await register(listening)
    assert heard.connects == 2


async def test_statements_stay_prepared_only_where_notifications_arrive(
    listening: QueueConnection,
) -> None:
    async def prepared() -> int:
        worker_id = await register(listening)
        listening.expect_echo()
        await beat(listening, worker_id)
        await beat(listening, worker_id)
        assert listening._conn is not None  # noqa: SLF001 - what it prepared, it alone can tell
        cursor = await listening._conn.execute("select count(*) from pg_prepared_statements")  # noqa: SLF001
        row = await cursor.fetchone()
        assert row is not None
        count: int = row[0]
        return count

    assert await prepared() > 0
    await listening.close()
    listening.echo_channel = "an echo that nobody hears"
    assert await prepared() == 0


async def test_a_call_without_an_answer_is_given_up(
    listening: QueueConnection, conn: psycopg.Connection
) -> None:
    worker_id = await register(listening)
    listening.call_timeout = 0.2
    with conn.transaction():
        conn.execute("select from procrastinate.procrastinate_workers for update")
        with pytest.raises(psycopg.OperationalError):
            await beat(listening, worker_id)
    listening.call_timeout = connection.CALL_TIMEOUT
    await beat(listening, await register(listening))


async def test_a_server_that_ends_between_the_rows_and_the_commit_has_not_answered(
    settings: Settings, conn: psycopg.Connection
) -> None:
    conn.execute(
        """
        create table ends (at timestamptz default now());
        create function end_it() returns trigger language plpgsql as
            'begin perform pg_terminate_backend(pg_backend_pid()); return null; end';
        create constraint trigger ends after insert on ends
            deferrable initially deferred for each row execute function end_it();
        create function insert_one() returns integer language sql as
            'insert into public.ends default values; select 1';
        """
    )
    queries = {"insert_one": b"select public.insert_one() as one"}
    line = QueueConnection(functools.partial(database.connect, settings, name="test"), queries)
    with pytest.raises(psycopg.errors.AdminShutdown):
        await line.call("insert_one", {})
    await line.close()
