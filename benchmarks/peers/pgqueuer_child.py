"""pgqueuer's processes: on uvloop as its own command, by asyncpg, its tables all durable.

``benchmarks.queue`` starts it with the packages of requirements.txt beside it; queue_child.py has
the roles. A worker claims batches of as many jobs as it is to run at a time.
"""

import asyncio
import json
import os
import sys
import time
from datetime import timedelta
from uuid import uuid4

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from benchmarks.queue_child import Drained, Producer, System, Work, run, say

ENTRYPOINT = "transcription"
UNFINISHED = "select exists (select from pgqueuer)"
HANG = 3600.0  # seconds


def payload() -> bytes:
    """Return what a job carries."""
    return json.dumps({"processing_job_id": str(uuid4())}).encode()


async def install(url: str) -> None:
    """Install its schema, and what its command line recommends for autovacuum."""
    connection = await asyncpg.connect(url)
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    await queries.optimize_autovacuum()
    await connection.close()


class AsyncpgProducer:
    """Enqueues with pgqueuer's own client."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._queries = Queries(AsyncpgDriver(connection))

    async def insert(self, number: int) -> None:
        """Enqueue so many jobs in one statement."""
        if number == 1:
            await self._queries.enqueue(ENTRYPOINT, payload())
            return
        payloads: list[bytes | None] = [payload() for _ in range(number)]
        await self._queries.enqueue([ENTRYPOINT] * number, payloads, [0] * number)

    async def commit(self) -> tuple[float, float]:
        """Enqueue one; return when its commit was sent and when that had returned."""
        async with self._connection.transaction():
            await self._queries.enqueue(ENTRYPOINT, payload())
            committing = time.monotonic()
        return committing, time.monotonic()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


async def connect(url: str) -> Producer:
    """Return a producer."""
    return AsyncpgProducer(await asyncpg.connect(url))


async def work_on(work: Work) -> None:
    """Drain the queue, or say when each job starts."""
    begin = time.monotonic()
    app = PgQueuer(AsyncpgDriver(await asyncpg.connect(work.url)))
    watcher = await asyncpg.connect(work.url)
    drained = Drained(work.jobs)

    async def start(_: Job) -> None:
        if work.jobs:
            drained.start()
            return
        say({"started": time.monotonic()})
        if work.behaviour == "hang":
            await asyncio.sleep(HANG)

    app.entrypoint(ENTRYPOINT)(start)
    stall = timedelta(seconds=work.stall) if work.stall else None
    sooner = {"heartbeat_timeout": stall, "dequeue_timeout": stall} if stall else {}
    worker = asyncio.create_task(app.run(batch_size=work.concurrency, **sooner))
    if not work.jobs:
        say({"ready": True})
        await worker
    await drained.wait(begin, lambda: watcher.fetchval(UNFINISHED))
    os._exit(0)


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    run(System(("pgqueuer", "asyncpg", "uvloop"), install, connect, work_on), sys.argv[1:])
