"""What an owner can do with jobs. Every function runs on a connection that acts as that user."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import class_row, dict_row, scalar_row, tuple_row
from psycopg.types.json import Jsonb

from jobs import telemetry
from jobs.errors import (
    InvalidInput,
    JobConflict,
    JobNotFound,
    NotAllowed,
    RequestInFlight,
)
from jobs.models import (
    Cursor,
    JobPage,
    JobStatus,
    JobSummary,
    Limit,
    NewJob,
    ProcessingJob,
    SearchPage,
    SearchResult,
    Waveform,
)
from jobs.refusals import refusals
from jobs.sql import JOBS

Connection = psycopg.AsyncConnection[Any]

MAX_LIST = 100
REPEATS_WITHIN = timedelta(minutes=10)
MAX_BATCH = 100

_COLUMNS = tuple(field.name for field in fields(NewJob))
_Item = TypeVar("_Item", JobSummary, SearchResult)


async def submit(  # noqa: PLR0913 - what a job may say
    conn: Connection,
    file_path: str,
    options: dict[str, Any],
    *,
    audio_url: str | None = None,
    webhook_url: str | None = None,
    scheduled_at: datetime | None = None,
    priority: int = 0,
    max_attempts: int | None = None,
    idempotency_key: str | None = None,
) -> UUID:
    """Insert a job for audio at ``file_path`` and return its id; its queue job commits with it.

    With an ``idempotency_key`` that the user has used before, it returns the job of that time;
    ``RequestInFlight`` says that it is being inserted. The database checks the input:
    ``InvalidInput`` names the field, also where the key was used for another job; ``NotAllowed``
    says that the path is not in the user's own folder, and ``LimitReached`` that the user has as
    much as they may have.
    """
    job = NewJob(
        file_path,
        options,
        audio_url=audio_url,
        webhook_url=webhook_url,
        scheduled_at=scheduled_at,
        priority=priority,
        max_attempts=max_attempts,
        idempotency_key=idempotency_key,
    )
    with refusals():
        await _hold_keys(conn, [job])
        return await _insert(conn, job)


async def submit_many(conn: Connection, jobs: Sequence[NewJob]) -> list[UUID]:
    """Insert up to ``MAX_BATCH`` jobs, all or none of them, and return their ids in order.

    Keys count as with ``submit``. Raises as ``submit`` does, naming the job that is to blame:
    ``jobs[3].options.model``.
    """
    if not 1 <= len(jobs) <= MAX_BATCH:
        raise InvalidInput(f"jobs: must be 1 to {MAX_BATCH}; send more in turn", field="jobs")
    try:
        async with conn.transaction():
            with refusals():
                await _hold_keys(conn, jobs)
                return await _insert_many(conn, jobs)
    except (InvalidInput, NotAllowed):
        async with conn.transaction(force_rollback=True):
            for index, job in enumerate(jobs):
                with refusals(f"jobs[{index}]."):
                    await _insert(conn, job)
        raise


async def _hold_keys(conn: Connection, jobs: Sequence[NewJob]) -> None:
    """Keep other requests with the same keys out. Raises ``RequestInFlight``."""
    keys = [job.idempotency_key for job in jobs if job.idempotency_key is not None]
    if not keys:
        return
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(JOBS["hold_keys"], {"keys": keys})
        if not await cursor.fetchone():
            raise RequestInFlight


async def _insert(conn: Connection, job: NewJob) -> UUID:
    values = {name: getattr(job, name) for name in _COLUMNS}
    values |= {"options": Jsonb(job.options), "traceparent": telemetry.traceparent()}
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(JOBS["submit"], values)
        job_id: UUID | None = await cursor.fetchone()
        if job_id is None:
            await cursor.execute(JOBS["get_by_key"], values)
            job_id = await cursor.fetchone()
    assert job_id is not None
    return job_id


async def _insert_many(conn: Connection, jobs: Sequence[NewJob]) -> list[UUID]:
    columns: dict[str, Any] = {name: [getattr(job, name) for job in jobs] for name in _COLUMNS}
    columns["options"] = [Jsonb(job.options) for job in jobs]
    columns["traceparent"] = telemetry.traceparent()
    async with conn.cursor(row_factory=tuple_row) as cursor:
        await cursor.execute(JOBS["submit_many"], columns)
        inserted = await cursor.fetchall()
        keys = [job.idempotency_key for job in jobs if job.idempotency_key is not None]
        await cursor.execute(JOBS["get_by_keys"], {"keys": keys})
        by_key: dict[str, UUID] = dict(await cursor.fetchall())
    others = iter([job_id for job_id, key in inserted if key is None])
    return [
        next(others) if job.idempotency_key is None else by_key[job.idempotency_key] for job in jobs
    ]


@dataclass(frozen=True, slots=True)
class Repeatable:
    """What says whether a request was made before: its ``fingerprint``, in hexadecimal.

    ``key`` is the caller's own name for the request. Without one, ``is_repeat`` says that the
    caller has made this request before and lost the answer.
    """

    fingerprint: str
    key: str | None = None
    is_repeat: bool = False


async def submit_once(
    conn: Connection, file_path: str, options: dict[str, Any], request: Repeatable
) -> tuple[UUID, bool]:
    """Insert a job, unless the request was made before; return its id and whether it is new.

    Two requests with one key are one, however their job ended; a key with another fingerprint is
    ``InvalidInput``. A repeat without a key belongs to the newest job of the same fingerprint that
    runs, or has completed within ``REPEATS_WITHIN``; what failed is tried again. Simultaneous
    requests wait for each other. Raises what ``submit`` raises.
    """
    if request.key is None:
        prefix, suffix = f"v1r{request.fingerprint[:64]}", uuid4().hex
    else:
        digest = hashlib.sha256(request.key.encode(errors="surrogatepass")).hexdigest()
        prefix, suffix = f"v1k{digest}", request.fingerprint[:64]
    values = {"prefix": prefix, "ended_within": None if request.key else REPEATS_WITHIN}
    await conn.execute(JOBS["lock_requests"], values)
    if request.key is not None or request.is_repeat:
        found = await (await conn.execute(JOBS["find_request"], values)).fetchone()
        if found is not None:
            _check_fingerprint(request, found[1] == prefix + suffix)
            return found[0], False
    return await submit(conn, file_path, options, idempotency_key=prefix + suffix), True


def _check_fingerprint(request: Repeatable, is_same: bool) -> None:  # noqa: FBT001
    if request.key is not None and not is_same:
        raise InvalidInput(
            "Idempotency-Key: was used for another file or with other options; "
            "send what was sent first, or use another key",
            field="Idempotency-Key",
        )


async def status(conn: Connection, job_id: UUID) -> tuple[JobStatus, float]:
    """Return a job's status and progress, from 0 to 1. Raises ``JobNotFound``."""
    row = await (await conn.execute(JOBS["status"], {"id": job_id})).fetchone()
    if row is None:
        raise JobNotFound
    return JobStatus(row[0]), row[1]


async def get(conn: Connection, job_id: UUID, *, result: bool = True) -> ProcessingJob:
    """Return a job of the user's. Raises ``JobNotFound``, also when it is somebody else's.

    Without its ``result``, which may be megabytes, that is ``None``.
    """
    async with conn.cursor(row_factory=class_row(ProcessingJob)) as cursor:
        await cursor.execute(JOBS["get" if result else "get_without_result"], {"id": job_id})
        job = await cursor.fetchone()
    if job is None:
        raise JobNotFound
    return job


async def waveform(conn: Connection, job_id: UUID) -> Waveform:
    """Return what a job's recording looks like, as far as known. Raises ``JobNotFound``."""
    async with conn.cursor(row_factory=class_row(Waveform)) as cursor:
        await cursor.execute(JOBS["waveform"], {"id": job_id})
        found = await cursor.fetchone()
    if found is None:
        raise JobNotFound
    return found


async def attempts(conn: Connection, job_id: UUID) -> list[dict[str, Any]]:
    """Return the attempts at a job that did not complete it, oldest first."""
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(JOBS["attempts"], {"id": job_id})
        return await cursor.fetchall()


async def cancel(conn: Connection, job_id: UUID) -> ProcessingJob:
    """Cancel a job of the user's: at once while it waits, within seconds while it runs.

    Raises ``JobNotFound``, and ``JobConflict`` where it has completed or failed.
    """
    job = await _change(conn, "cancel", job_id)
    if job.status in {JobStatus.COMPLETED, JobStatus.FAILED}:
        raise JobConflict(f"status: the job is {job.status} already, so it can't be cancelled")
    return job


async def retry(conn: Connection, job_id: UUID) -> ProcessingJob:
    """Run a failed or cancelled job of the user's again, with all its attempts.

    Raises ``JobNotFound``, ``JobConflict`` where it has completed or has not ended, and
    ``LimitReached``, since it waits like a new one.
    """
    before = await get(conn, job_id)
    if before.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
        raise JobConflict(
            f"status: the job is {before.status}; only failed and cancelled jobs can be retried"
        )
    return await _change(conn, "retry", job_id)


async def _change(conn: Connection, query: str, job_id: UUID) -> ProcessingJob:
    async with conn.cursor(row_factory=dict_row) as cursor:
        with refusals():
            await cursor.execute(JOBS[query], {"id": job_id})
        row = await cursor.fetchone()
    if row is None or row["id"] is None:
        raise JobNotFound
    return ProcessingJob(**row)


async def delete(conn: Connection, job_id: UUID, *, keep_audio: bool = False) -> None:
    """Delete a job of the user's; one that runs is stopped. Raises ``JobNotFound``.

    Its audio goes within minutes, unless another job names it or it lies in nobody's folder.
    """
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(JOBS["delete"], {"id": job_id, "keep_audio": keep_audio})
        if not await cursor.fetchone():
            raise JobNotFound


async def list_jobs(
    conn: Connection,
    *,
    status: JobStatus | None = None,
    limit: int = 50,
    after: Cursor | None = None,
) -> JobPage:
    """Return a page of the user's jobs, newest first, without results.

    ``limit`` is 1 to ``MAX_LIST``; ``after`` is the ``next`` of the page before.
    """
    values = {"status": status, **_page(limit, after)}
    async with conn.cursor(row_factory=class_row(JobSummary)) as cursor:
        await cursor.execute(JOBS["list"], values)
        return JobPage(*_cut(await cursor.fetchall(), limit))


async def search(
    conn: Connection, q: str, *, limit: int = 20, after: Cursor | None = None
) -> SearchPage:
    """Return completed jobs of the user's with such words in their transcripts, newest first.

    ``q``: 1 to 200 characters of words, ``"a phrase"``, ``or`` and ``-excluded``; of the last word
    the beginning will do. Raises ``InvalidInput``.
    """
    try:
        async with conn.cursor(row_factory=class_row(SearchResult)) as cursor:
            with refusals():
                await cursor.execute(JOBS["search"], {"q": q, **_page(limit, after)})
            return SearchPage(*_cut(await cursor.fetchall(), limit))
    except psycopg.errors.QueryCanceled as exc:
        raise InvalidInput("q: finds too much; add a word that is rarer", field="q") from exc


async def limits(conn: Connection) -> list[Limit]:
    """Return what the user may have, and what they have."""
    async with conn.cursor(row_factory=class_row(Limit)) as cursor:
        await cursor.execute(JOBS["limits"])
        return await cursor.fetchall()


def _page(limit: int, after: Cursor | None) -> dict[str, Any]:
    at, job_id = after or (None, None)
    return {"limit": limit + 1, "after_at": at, "after_id": job_id}


def _cut(found: list[_Item], limit: int) -> tuple[list[_Item], Cursor | None]:
    page = found[:limit]
    return page, (page[-1].created_at, page[-1].id) if len(found) > limit else None
