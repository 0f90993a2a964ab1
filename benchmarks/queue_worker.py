"""A worker process for ``benchmarks.queue``: pgscribe's, or plain procrastinate's.

With ``--jobs`` it drains that many no-op jobs and prints how long that took, from the start of the
worker to the commit of the last end. Without, it prints when it starts each job, and when one ends
that takes time. It ends with its standard input, so never later than the benchmark.
"""

import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import click
import procrastinate
import psycopg

from jobs import database
from jobs.errors import EngineCrashed
from jobs.queue import QUEUE_NAME
from jobs.settings import Settings
from jobs.tasks import TASK_NAME
from jobs.worker import make_app

UNFINISHED = {
    "pgscribe": "select exists (select from procrastinate.procrastinate_jobs"
    " where status in ('todo', 'doing'))",
    "procrastinate": "select exists (select from procrastinate_jobs"
    " where status in ('todo', 'doing'))",
}
HANG = 3600.0  # seconds
WHILE = 0.1  # seconds

RunJob = Callable[[procrastinate.JobContext], Awaitable[object]]
RunWorker = Callable[[], Coroutine[Any, Any, None]]


class Transcript:
    """The result of a no-op job."""

    duration = 10.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {"text": "hello", "segments": [], "language": "en"}


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


@asynccontextmanager
async def pgscribe(
    url: str, concurrency: int, stall_timeout: float, run_job: RunJob
) -> AsyncIterator[RunWorker]:
    """Provide pgscribe's worker."""
    settings = Settings.load(
        database_url=url, worker_concurrency=concurrency, stall_timeout=stall_timeout
    )
    pool = database.make_pool(settings, name="benchmark", for_queue=True)
    app = make_app(settings)
    async with pool, app.open_async(pool):
        add_task(app, run_job)
        yield app.new_worker(concurrency=concurrency).run


@asynccontextmanager
async def plain(
    url: str, concurrency: int, _stall_timeout: float, run_job: RunJob
) -> AsyncIterator[RunWorker]:
    """Provide the worker that procrastinate comes with, as it comes."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
    async with app.open_async():
        add_task(app, run_job)
        yield lambda: app.run_worker_async(concurrency=concurrency)


SYSTEMS = {"pgscribe": pgscribe, "procrastinate": plain}


async def drain(system: str, url: str, concurrency: int, stall_timeout: float, jobs: int) -> None:
    """Run ``jobs`` no-op jobs; print the seconds that took, and the processor's."""
    started, all_started = 0, asyncio.Event()
    transcript = Transcript()

    async def run_job(_: procrastinate.JobContext) -> object:
        nonlocal started
        started += 1
        if started == jobs:
            all_started.set()
        return transcript

    async with (
        SYSTEMS[system](url, concurrency, stall_timeout, run_job) as run_worker,
        await psycopg.AsyncConnection.connect(url, autocommit=True) as conn,
    ):
        begin, cpu = time.perf_counter(), time.process_time()
        worker = asyncio.create_task(run_worker())
        await all_started.wait()
        await until_finished(conn, system)
        say({"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu})
        await worker


async def until_finished(conn: psycopg.AsyncConnection[Any], system: str) -> None:
    """Wait for the last commit."""
    unfinished = True
    while unfinished:
        row = await (await conn.execute(UNFINISHED[system].encode())).fetchone()
        assert row is not None
        (unfinished,) = row
        await asyncio.sleep(0.002)


async def hang(context: procrastinate.JobContext) -> None:
    """First attempts never end."""
    if context.job.attempts == 0:
        await asyncio.sleep(HANG)


async def fail(context: procrastinate.JobContext) -> None:
    """First attempts fail."""
    if context.job.attempts == 0:
        raise EngineCrashed


async def take_time(_: procrastinate.JobContext) -> None:
    """Each attempt takes a while."""
    await asyncio.sleep(WHILE)
    say({"ended": time.monotonic()})


async def nothing(_: procrastinate.JobContext) -> None:
    """Jobs do nothing."""


BEHAVIOURS = {"hang": hang, "fail": fail, "take-time": take_time, "nothing": nothing}


async def serve(
    system: str, url: str, concurrency: int, stall_timeout: float, behaviour: str
) -> None:
    """Print when each job starts."""
    transcript = Transcript()

    async def run_job(context: procrastinate.JobContext) -> object:
        say({"started": time.monotonic()})
        await BEHAVIOURS[behaviour](context)
        return transcript

    async with SYSTEMS[system](url, concurrency, stall_timeout, run_job) as run_worker:
        await run_worker()


def say(message: dict[str, Any]) -> None:
    """Tell the benchmark."""
    click.echo(json.dumps(message))


def end_with_stdin() -> None:
    """Exit when whoever started this process closes the pipe, or is gone."""
    sys.stdin.buffer.read()
    os._exit(0)


@click.command()
@click.argument("system", type=click.Choice(list(SYSTEMS)))
@click.option("--url", required=True)
@click.option("--concurrency", type=int, required=True)
@click.option("--jobs", type=int)
@click.option("--stall-timeout", type=float, default=30.0)
@click.option("--behaviour", type=click.Choice(list(BEHAVIOURS)), default="nothing")
def main(  # noqa: PLR0913, PLR0917 - one per option
    system: str, url: str, concurrency: int, jobs: int | None, stall_timeout: float, behaviour: str
) -> None:
    """Work."""
    logging.basicConfig(level=logging.ERROR)
    threading.Thread(target=end_with_stdin, daemon=True).start()
    asyncio.run(
        drain(system, url, concurrency, stall_timeout, jobs)
        if jobs
        else serve(system, url, concurrency, stall_timeout, behaviour)
    )


if __name__ == "__main__":
    main()
