"""What an owner can do with jobs. Every function runs on a connection that acts as that user."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import class_row, dict_row, scalar_row
from psycopg.types.json import Jsonb

from jobs.errors import InvalidInput, JobConflict, JobNotFound, NotAllowed
from jobs.models import JobStatus, JobSummary, ProcessingJob
from jobs.sql import JOBS

Connection = psycopg.AsyncConnection[Any]

MAX_LIST = 100
REPEATS_WITHIN = timedelta(minutes=10)


async def submit(  # noqa: PLR0913 - what a job may say
    conn: Connection,
    file_path: str,
    options: dict[str, Any],
    *,
    scheduled_at: datetime | None = None,
    priority: int = 0,
    max_attempts: int | None = None,
    idempotency_key: str | None = None,
) -> UUID:
    """Insert a job for audio at ``file_path`` and return its id; its queue job commits with it.

    With an ``idempotency_key`` that the user has used before, it returns the job of that time.
    The database checks the input: ``InvalidInput`` names the field, also where the key was used
    for another job; ``NotAllowed`` says that the path is not in the user's own folder.
    """
    values = {
        "file_path": file_path,
        "options": Jsonb(options),
        "scheduled_at": scheduled_at,
        "priority": priority,
        "max_attempts": max_attempts,
        "idempotency_key": idempotency_key,
    }
    try:
        async with conn.cursor(row_factory=scalar_row) as cursor:
            await cursor.execute(JOBS["submit"], values)
            job_id: UUID | None = await cursor.fetchone()
            if job_id is None:
                await cursor.execute(JOBS["get_by_key"], values)
                job_id = await cursor.fetchone()
    except psycopg.errors.CheckViolation as exc:
        text = ". ".join(filter(None, (exc.diag.message_primary, exc.diag.message_hint)))
        raise InvalidInput(text, field=exc.diag.column_name) from exc
    except psycopg.errors.InsufficientPrivilege as exc:
        raise NotAllowed(
            "file_path: must lie in your own folder, <your user id>/…; "
            "use the path that the upload returned"
        ) from exc
    except psycopg.errors.ForeignKeyViolation as exc:
        raise NotAllowed("This token's user does not exist in auth.users.") from exc
    except (psycopg.DataError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidInput(
            "The request holds what Postgres can't store: a NUL character, half a surrogate pair, "
            "an infinite number, or objects nested very deeply"
        ) from exc
    assert job_id is not None
    return job_id


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


async def get(conn: Connection, job_id: UUID) -> ProcessingJob:
    """Return a job of the user's. Raises ``JobNotFound``, also when it is somebody else's."""
    async with conn.cursor(row_factory=class_row(ProcessingJob)) as cursor:
        await cursor.execute(JOBS["get"], {"id": job_id})
        job = await cursor.fetchone()
    if job is None:
        raise JobNotFound
    return job


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

    Raises ``JobNotFound``, and ``JobConflict`` where it has completed or has not ended.
    """
    before = await get(conn, job_id)
    if before.status not in {JobStatus.FAILED, JobStatus.CANCELLED}:
        raise JobConflict(
            f"status: the job is {before.status}; only failed and cancelled jobs can be retried"
        )
    return await _change(conn, "retry", job_id)


async def _change(conn: Connection, query: str, job_id: UUID) -> ProcessingJob:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(JOBS[query], {"id": job_id})
        row = await cursor.fetchone()
    if row is None or row["id"] is None:
        raise JobNotFound
    return ProcessingJob(**row)


async def list_jobs(
    conn: Connection, *, status: JobStatus | None = None, limit: int = 50
) -> list[JobSummary]:
    """Return the user's newest jobs, without results. ``limit`` is 1 to ``MAX_LIST``."""
    async with conn.cursor(row_factory=class_row(JobSummary)) as cursor:
        await cursor.execute(JOBS["list"], {"status": status, "limit": limit})
        return await cursor.fetchall()
