"""Waiting for a job: everything here that waits does it by ``follow``."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from uuid import UUID

import psycopg
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request

from jobs import service, transcripts
from jobs.database import as_user
from jobs.errors import TooManyStreams
from jobs.models import JobStatus, ProcessingJob
from web.auth import Principal

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 1.0  # seconds between two looks
_PATIENCE = 30.0  # seconds that the database may be away
_LOOKS = 3  # at a time, so that those who wait leave connections to those who ask
MOST = 100  # jobs that a user may wait for at a time


@dataclass(frozen=True, slots=True)
class JobUpdate:
    """How far a job is. ``text``: what there is of its transcript, if that was asked for."""

    status: JobStatus
    progress: float
    text: str = ""


class Waiters:
    """Who waits for jobs on this server, and how many of them look at one at a time."""

    def __init__(self) -> None:
        self.by_user: Counter[UUID] = Counter()
        self.looks = asyncio.Semaphore(_LOOKS)

    def check(self, user: Principal) -> None:
        """Raise ``TooManyStreams`` if the user waits for as many jobs as they may."""
        if self.by_user[user.user_id] >= MOST:
            raise TooManyStreams(f"You wait for {MOST} jobs already; submit them by POST /process")

    @contextmanager
    def waiting(self, user: Principal) -> Iterator[None]:
        """Count the user as one who waits."""
        self.by_user[user.user_id] += 1
        try:
            yield
        finally:
            self.by_user[user.user_id] -= 1
            if not self.by_user[user.user_id]:
                del self.by_user[user.user_id]


async def follow(
    app: Starlette, user: Principal, job_id: UUID, *, with_text: bool = False
) -> AsyncGenerator[JobUpdate]:
    """Yield how far a job is now and whenever that changes; ends with the job.

    Raises ``JobNotFound`` and, where the database stays away, ``psycopg.OperationalError``.
    """
    waiters: Waiters = app.state.waiters
    updates = _follow(app, user, job_id, with_text=with_text)
    with waiters.waiting(user):
        async with aclosing(updates):
            async for update in updates:
                yield update


async def _follow(
    app: Starlette, user: Principal, job_id: UUID, *, with_text: bool
) -> AsyncGenerator[JobUpdate]:
    last: JobUpdate | None = None
    pause, clock = _FIRST_PAUSE, asyncio.get_running_loop().time
    seen = clock()
    while last is None or not last.status.ended:
        update = last
        try:
            update = await _look(app, user, job_id, with_text=with_text)
            seen = clock()
        except psycopg.OperationalError as exc:
            if clock() - seen > _PATIENCE:
                raise
            logger.warning("Waiting for job %s while the database is away: %s", job_id, exc)
        if update is not None and update != last:
            yield update
            last, pause = update, _FIRST_PAUSE
        if last is None or not last.status.ended:
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 1.5)


async def _look(app: Starlette, user: Principal, job_id: UUID, *, with_text: bool) -> JobUpdate:
    async with app.state.waiters.looks, as_user(app.state.pool, user.claims) as conn:
        status, progress = await service.status(conn, job_id)
        partial = await transcripts.partial(conn, job_id) if with_text else None
    return JobUpdate(status, progress, partial.text if partial else "")


async def end_of(request: Request, user: Principal, job_id: UUID) -> ProcessingJob:
    """Return a job once it has ended, which it does also if nobody waits for it.

    Raises ``ClientDisconnect`` if the client goes away first; the request's body must have been
    read. Raises what ``follow`` raises.
    """
    waiting = asyncio.create_task(_ended(request.app, user, job_id))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
        await asyncio.gather(waiting, leaving, return_exceptions=True)


async def _ended(app: Starlette, user: Principal, job_id: UUID) -> ProcessingJob:
    async with aclosing(follow(app, user, job_id)) as updates:
        async for _ in updates:
            pass
    return await get(app, user, job_id)


async def get(app: Starlette, user: Principal, job_id: UUID) -> ProcessingJob:
    """Return a job as it is. Raises ``JobNotFound``."""
    async with as_user(app.state.pool, user.claims) as conn:
        return await service.get(conn, job_id)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
