"""The processes of pgscribe and of plain procrastinate in ``benchmarks.queue``.

``python -m benchmarks.queue_worker SYSTEM ROLE``; queue_child.py has the roles.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import procrastinate
import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks.queue_child import Drained, Producer, System, Work, run, say
from db import migrate
from jobs import database, retention, tasks, worker
from jobs.database import Pool
from jobs.errors import EngineCrashed
from jobs.queue import QUEUE_NAME
from jobs.settings import Settings
from jobs.storage.base import Storage
from jobs.storage.choose import make_storage
from jobs.tasks import TASK_NAME

OWNERS = [UUID(int=number) for number in range(1, 11)]
HANG = 3600.0  # seconds
WHILE = 0.1  # seconds
STALL_TIMEOUT = 30.0  # pgscribe's default

RunJob = Callable[[procrastinate.JobContext], Awaitable[object]]
Upkeep = Callable[[], Awaitable[object]]
RunWorker = Callable[[], Coroutine[Any, Any, None]]
Connection = psycopg.Connection[tuple[Any, ...]]


class Transcript:
    """The result of a no-op job."""

    duration = 10.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {"text": "hello", "segments": [], "language": "en"}


def without_negotiation(url: str) -> str:
    """Return a URL whose first message is the start-up message, which the proxy counts on."""
    return make_conninfo(url, gssencmode="disable")


async def install_pgscribe(url: str) -> None:
    """Migrate, and add owners."""
    migrate.migrate(url)
    with psycopg.connect(url) as conn:
        conn.execute(
            "insert into auth.users (id, email) select id, id || '@example.org'"
            " from unnest(%s::uuid[]) id",
            (OWNERS,),
        )


async def install_procrastinate(url: str) -> None:
    """Install procrastinate's schema, in the schema that it likes best."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


def insert_rows(conn: Connection, number: int) -> None:
    """Insert rows of ``processing_jobs`` as a client would."""
    rows = [(OWNERS[n % len(OWNERS)], f"{OWNERS[n % len(OWNERS)]}/a.mp3") for n in range(number)]
    if number == 1:
        conn.execute(
            "insert into public.processing_jobs (user_id, file_path) values (%s, %s)", rows[0]
        )
        return
    conn.execute(
        "insert into public.processing_jobs (user_id, file_path)"
        " select * from unnest(%s::uuid[], %s::text[])",
        tuple(map(list, zip(*rows, strict=True))),
    )


def defer_jobs(conn: Connection, number: int) -> None:
    """Insert with the function that procrastinate's App calls."""
    conn.execute(
        "select procrastinate_defer_jobs_v1(array_agg(row('transcription', 'transcribe', 0,"
        " null, null, jsonb_build_object('processing_job_id', id), null)"
        "::procrastinate_job_to_defer_v1)) from unnest(%s::text[]) id",
        ([str(uuid4()) for _ in range(number)],),
    )


class SqlProducer:
    """Enqueues by SQL."""

    def __init__(self, url: str, insert: Callable[[Connection, int], None]) -> None:
        self._conn: Connection = psycopg.connect(url, autocommit=True)
        self._insert = insert

    async def insert(self, number: int) -> None:
        """Enqueue so many jobs in one statement."""
        self._insert(self._conn, number)

    async def commit(self) -> tuple[float, float]:
        """Enqueue one; return when its commit was sent and when that had returned."""
        with self._conn.transaction():
            self._insert(self._conn, 1)
            committing = time.monotonic()
        return committing, time.monotonic()

    async def close(self) -> None:
        """Close the connection."""
        self._conn.close()


def add_task(app: procrastinate.App, run_job: RunJob) -> None:
    """Register the task that the jobs of both systems name."""

    @app.task(
        name=TASK_NAME,
        queue=QUEUE_NAME,
        pass_context=True,
        retry=procrastinate.RetryStrategy(max_attempts=3, wait=1),
    )
    async def transcribe(
        context: procrastinate.JobContext,
        processing_job_id: str,  # noqa: ARG001
    ) -> object:
        return await run_job(context)


def upkeep(pool: Pool, storage: Storage, settings: Settings) -> tuple[Upkeep, Upkeep]:
    """Return what a worker of pgscribe's does every minute, and every ten, whatever waits."""
    clean_up = worker._clean_up  # noqa: SLF001 - what the product's worker passes on
    return (
        partial(clean_up, pool, storage, worker.make_compute(settings)),
        partial(retention.prune, pool, storage, settings),
    )


def add_upkeep(app: procrastinate.App, every_minute: Upkeep, every_ten: Upkeep) -> None:
    """Register the periodic tasks."""
    nothing_runs: Any = None
    tasks.add_tasks(app, nothing_runs, nothing_runs, every_ten, every_minute)
    del app.tasks[TASK_NAME]  # jobs are the benchmark's


@asynccontextmanager
async def pgscribe(work: Work, run_job: RunJob) -> AsyncIterator[RunWorker]:
    """Provide pgscribe's worker."""
    settings = Settings.load(
        database_url=without_negotiation(work.url),
        worker_concurrency=work.concurrency,
        stall_timeout=work.stall or STALL_TIMEOUT,
    )
    pool = database.make_pool(settings, name="benchmark", for_queue=True)
    app = worker.make_app(settings)
    async with pool, app.open_async(pool), aclosing(make_storage(settings)) as storage:
        if work.behaviour == "idle":
            add_upkeep(app, *upkeep(pool, storage, settings))
        add_task(app, run_job)
        yield app.new_worker(concurrency=work.concurrency).run


@asynccontextmanager
async def plain(work: Work, run_job: RunJob) -> AsyncIterator[RunWorker]:
    """Provide the worker that procrastinate comes with, as it comes."""
    connector = procrastinate.PsycopgConnector(conninfo=without_negotiation(work.url))
    app = procrastinate.App(connector=connector)
    async with app.open_async():
        add_task(app, run_job)
        yield lambda: app.run_worker_async(concurrency=work.concurrency)


OpenWorker = Callable[[Work, RunJob], Any]


async def work_on(open_worker: OpenWorker, jobs_table: str, work: Work) -> None:
    """Drain the queue, or say when each job starts."""
    await (drain(open_worker, jobs_table, work) if work.jobs else serve(open_worker, work))


async def drain(open_worker: OpenWorker, jobs_table: str, work: Work) -> None:
    """Run no-op jobs."""
    drained, transcript = Drained(work.jobs), Transcript()
    unfinished = f"select exists (select from {jobs_table} where status in ('todo', 'doing'))"  # noqa: S608

    async def run_job(_: procrastinate.JobContext) -> object:
        drained.start()
        return transcript

    begin = time.monotonic()  # with connecting, as for all systems
    async with (
        open_worker(work, run_job) as run_worker,
        await psycopg.AsyncConnection.connect(work.url, autocommit=True) as conn,
    ):

        async def is_unfinished() -> bool:
            row = await (await conn.execute(unfinished.encode())).fetchone()
            return row is not None and bool(row[0])

        running = asyncio.create_task(run_worker())
        await drained.wait(begin, is_unfinished)
        await running


async def hang(_: procrastinate.JobContext) -> None:
    """Never end."""
    await asyncio.sleep(HANG)


async def fail(context: procrastinate.JobContext) -> None:
    """Fail at first."""
    if context.job.attempts == 0:
        raise EngineCrashed


async def take_time(_: procrastinate.JobContext) -> None:
    """Take a while."""
    await asyncio.sleep(WHILE)
    say({"ended": time.monotonic()})


async def nothing(_: procrastinate.JobContext) -> None:
    """Do nothing."""


BEHAVIOURS = {
    "hang": hang,
    "fail": fail,
    "take-time": take_time,
    "nothing": nothing,
    "idle": nothing,  # and, as a real worker, what is done every minute
}


async def serve(open_worker: OpenWorker, work: Work) -> None:
    """Say when each job starts."""
    transcript = Transcript()

    async def run_job(context: procrastinate.JobContext) -> object:
        say({"started": time.monotonic()})
        await BEHAVIOURS[work.behaviour](context)
        return transcript

    async with open_worker(work, run_job) as run_worker:
        say({"ready": True})
        await run_worker()


def by_sql(insert: Callable[[Connection, int], None]) -> Callable[[str], Awaitable[Producer]]:
    """Return what connects a producer."""

    async def connect(url: str) -> Producer:
        return SqlProducer(url, insert)

    return connect


SYSTEMS = {
    "pgscribe": System(
        packages=(),
        install=install_pgscribe,
        connect=by_sql(insert_rows),
        work=lambda work: work_on(pgscribe, "procrastinate.procrastinate_jobs", work),
    ),
    "procrastinate": System(
        packages=("procrastinate",),
        install=install_procrastinate,
        connect=by_sql(defer_jobs),
        work=lambda work: work_on(plain, "procrastinate_jobs", work),
    ),
}


if __name__ == "__main__":
    run(SYSTEMS[sys.argv[1]], sys.argv[2:])
