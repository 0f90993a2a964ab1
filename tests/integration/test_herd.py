"""Many idle workers: how many of them look when a job comes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs import database
from jobs.queue import Queue, Turn
from jobs.queue_worker import Worker
from jobs.settings import Settings
from jobs.worker import make_app

pytestmark = pytest.mark.anyio

JOBS = 20
# Two are the least: the one that starts the job, and the one with the turn that ends it. Plain
# procrastinate makes one more than there are workers. Here all workers share a processor, so
# that some hear late.
CLAIMS_PER_JOB = 5.0
ROUNDS = 4  # what else the machine does makes more of them hear late, never fewer


@pytest.fixture(scope="module")
def roomy_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("roomy"), settings={"max_connections": "150"})
    with server:
        migrate.migrate(server.url())
        yield server
    server.remove()


@pytest.fixture
async def conn(roomy_postgres: EmbeddedPostgres) -> AsyncIterator[database.Connection]:
    connection = await psycopg.AsyncConnection.connect(roomy_postgres.url(), autocommit=True)
    async with connection:
        yield connection


@pytest.fixture
async def user(conn: database.Connection) -> UUID:
    user_id = uuid4()
    await conn.execute(
        "insert into auth.users (id, email) values (%s, %s)", (user_id, f"{user_id}@example.org")
    )
    return user_id


class Transcript:
    duration = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {}


class Herd:
    """Idle workers in this process, and how often they have claimed."""

    def __init__(self) -> None:
        self.claims = 0
        self.started: asyncio.Queue[int] = asyncio.Queue()
        self.workers: list[Worker] = []

    async def open(self, settings: Settings, size: int, stack: AsyncExitStack) -> None:
        pool = database.make_pool(settings, name="test", for_queue=True)
        app = make_app(settings)
        await stack.enter_async_context(pool)
        await stack.enter_async_context(app.open_async(pool))

        @app.task(name="transcribe", queue="transcription")
        async def transcribe(processing_job_id: str) -> Transcript:  # noqa: ARG001
            self.started.put_nowait(1)
            return Transcript()

        for _ in range(size):
            worker = app.new_worker(concurrency=2)
            self.workers.append(worker)
            running = asyncio.create_task(worker.run())
            stack.push_async_callback(self._end, worker, running)

    @staticmethod
    async def _end(worker: Worker, running: asyncio.Task[None]) -> None:
        worker.stop()
        await running


@pytest.fixture
def herd(monkeypatch: pytest.MonkeyPatch) -> Herd:
    herd = Herd()
    turn = Queue.turn

    async def counted(
        self: Queue, worker_id: int, ended: Any, wanted: int, *arguments: Any, **options: Any
    ) -> Turn:
        herd.claims += wanted > 0
        return await turn(self, worker_id, ended, wanted, *arguments, **options)

    monkeypatch.setattr(Queue, "turn", counted)
    return herd


async def until_all_listen(conn: database.Connection, herd: Herd, size: int) -> None:
    """Wait until every worker knows of all others and has nothing left to look for."""
    quiet = 0
    while quiet < 5:
        claims = herd.claims
        await asyncio.sleep(0.1)
        cursor = await conn.execute(
            "select count(*) from pg_stat_activity"
            " where application_name = 'pgscribe worker' and state = 'idle'"
        )
        listening = await cursor.fetchone() == (size,)
        quiet = quiet + 1 if listening and claims == herd.claims else 0
    for worker in herd.workers:
        worker._next_beat = 0.0  # noqa: SLF001 - a beat tells how many workers there are
        worker._changed.set()  # noqa: SLF001
    await asyncio.sleep(0.5)


async def claims_per_job(conn: database.Connection, user: UUID, herd: Herd, size: int) -> float:
    await until_all_listen(conn, herd, size)
    herd.claims = 0
    for _ in range(JOBS):
        await conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, 'a/b.mp3')", (user,)
        )
        await herd.started.get()
        await asyncio.sleep(0.1)  # the last of them would have looked by now
    return herd.claims / JOBS


@pytest.mark.alone
@pytest.mark.parametrize("size", [10, 30])
async def test_claims_per_job_do_not_grow_with_the_workers(
    roomy_postgres: EmbeddedPostgres,
    conn: database.Connection,
    user: UUID,
    herd: Herd,
    size: int,
) -> None:
    settings = Settings.load(database_url=roomy_postgres.url())
    async with AsyncExitStack() as stack:
        await herd.open(settings, size, stack)
        for _ in range(ROUNDS):
            async with asyncio.timeout(60):
                claims = await claims_per_job(conn, user, herd, size)
            if claims <= CLAIMS_PER_JOB:
                break
    assert claims <= CLAIMS_PER_JOB, f"{claims} claims per job of {size} workers"
