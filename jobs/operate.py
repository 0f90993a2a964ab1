"""What operators see and do. The database decides, at each call, whether somebody is one.

The asynchronous functions run on a connection that acts as the user and raise ``NotAnOperator``;
the others are the command line's, which connects as the tables' owner.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal
from uuid import UUID

import psycopg
from psycopg.rows import class_row, scalar_row
from pydantic import BaseModel, ConfigDict

from jobs.errors import InvalidInput, NotAnOperator, UserNotFound
from jobs.models import Cursor, JobStatus
from jobs.sql import OPERATE
from jobs.webhooks import Delivery

Connection = psycopg.AsyncConnection[Any]
Action = Literal["cancel", "retry"]
OpenStatus = Literal["queued", "sending", "failed"]

MAX_HOURS = 720
MAX_CHANGED = 1000
CHANGEABLE: dict[Action, tuple[JobStatus, ...]] = {
    "cancel": (JobStatus.QUEUED, JobStatus.PROCESSING),
    "retry": (JobStatus.FAILED, JobStatus.CANCELLED),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class States(_Frozen):
    """Jobs that have not ended: that may start, that wait for their time, that run."""

    queued: int
    scheduled: int
    processing: int


class QueueNow(_Frozen):
    """The queue. Audio that waits is estimated where its length is not known."""

    paused_at: datetime | None
    states: States
    oldest_queued_seconds: float | None
    queued_audio_seconds: float


class Ended(_Frozen):
    """How many jobs ended in which way, and the audio of those that completed."""

    completed: int
    failed: int
    cancelled: int
    audio_seconds: float


class Bucket(Ended):
    """What ended within ``bucket_seconds`` from ``at`` on."""

    at: datetime


class Median(_Frozen):
    """Half of the jobs had no more than ``p50``."""

    p50: float | None


class Spread(Median):
    """As ``Median``; 95 of 100 jobs had no more than ``p95``."""

    p95: float | None


class Times(_Frozen):
    """Seconds, of the newest ``jobs`` that ended in the window: at most 10,000.

    ``wait``: until the start, of jobs that one attempt was made at. ``run`` and
    ``real_time_factor`` (audio-seconds by seconds) are of the last attempt of completed jobs.
    """

    jobs: int
    wait: Spread
    run: Spread
    real_time_factor: Median


class Failure(_Frozen):
    """Jobs that failed for one reason. ``example`` is the newest one's error."""

    error_code: str
    jobs: int
    last_at: datetime
    example: str


class HeldJob(_Frozen):
    """A job that a worker runs."""

    job_id: UUID
    owner_id: UUID
    email: str | None
    file_path: str
    started_at: datetime
    progress: float
    attempt: int


class WorkerNow(_Frozen):
    """A worker; ``holds`` has the first 100 of the jobs that it is ``running``."""

    id: int
    last_heartbeat: datetime
    alive: bool
    running: int
    holds: list[HeldJob]


class OwnerNow(_Frozen):
    """An owner. ``share`` is their part, 0 to 1, of the audio that was done in the window."""

    owner_id: UUID
    email: str | None
    queued: int
    processing: int
    waiting_audio_seconds: float
    share: float
    audio_seconds: float
    weight: float
    max_running: int
    paused_at: datetime | None


class DayCosts(_Frozen):
    """What the jobs took that ended on a day, in UTC."""

    day: date
    jobs: int
    audio_seconds: float
    gpu_seconds: float
    cpu_seconds: float
    estimated_cost: float


class WebhooksNow(_Frozen):
    """Deliveries that are ready (``queued``), ``waiting`` for another attempt, or ``sending``.

    ``delivered``, ``failed``, and the seconds from a job's end to the receiver's answer are of the
    window. ``disabled_endpoints``: those that were disabled because they answered 410, or not.
    """

    queued: int
    waiting: int
    sending: int
    oldest_queued_seconds: float | None
    delivered: int
    failed: int
    seconds: Spread
    disabled_endpoints: int


class Overview(_Frozen):
    """What goes on, and what ended since ``since``: the bucket in which it was ``hours`` ago."""

    now: datetime
    hours: int
    since: datetime
    bucket_seconds: float
    queue: QueueNow
    ended: Ended
    throughput: list[Bucket]
    times: Times
    failures: list[Failure]
    workers: list[WorkerNow]
    owners: list[OwnerNow]
    costs: list[DayCosts]
    webhooks: WebhooksNow


class OperatorJob(_Frozen):
    """A job as operators see it: without transcript, and ``options`` without the prompt."""

    id: UUID
    owner_id: UUID
    email: str | None
    file_path: str
    options: dict[str, Any]
    status: JobStatus
    progress: float
    attempt: int
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    due_at: datetime | None
    audio_seconds: float | None
    error_code: str | None
    error: str | None
    usage: dict[str, float] | None


class OperatorDelivery(Delivery):
    """A delivery as operators see it: whose it is, but not what it says.

    ``url`` is its receiver's scheme, host and port.
    """

    owner_id: UUID
    email: str | None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs; ``None``: all."""

    status: JobStatus | None = None
    owner: UUID | None = None
    error_code: str | None = None

    def values(self) -> dict[str, Any]:
        """Return it as the queries want it."""
        return {"status": self.status, "owner": self.owner, "error_code": self.error_code}


class Changed(_Frozen):
    """How many jobs were changed, and whether the same request would change ``more``.

    ``refused``: those whose owners have as many jobs that wait as they may have. ``at``: when.
    """

    changed: int
    more: bool
    refused: int
    at: datetime


async def is_operator(conn: Connection) -> bool:
    """Return whether the user is an operator."""
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(OPERATE["is_operator"])
        return bool(await cursor.fetchone())


async def overview(conn: Connection, *, hours: int, stall_timeout: float) -> Overview:
    """Return what goes on, and what ended in the last 1 to ``MAX_HOURS`` hours.

    A worker is alive if it was heard of within ``stall_timeout`` seconds. Raises ``InvalidInput``
    where more jobs ended in that time than can be added up.
    """
    values = {"hours": hours, "stall_timeout": stall_timeout}
    try:
        async with conn.cursor(row_factory=scalar_row) as cursor:
            with _operators_only():
                await cursor.execute(OPERATE["operator_overview"], values)
            return Overview.model_validate(await cursor.fetchone())
    except psycopg.errors.QueryCanceled as exc:
        raise InvalidInput(
            "hours: so many jobs ended in that time that adding them up takes too long; ask for "
            "fewer hours",
            field="hours",
        ) from exc


async def metrics(conn: Connection, *, stall_timeout: float) -> dict[str, Any]:
    """Return figures for monitoring, as ``public.operator_metrics`` has them."""
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(OPERATE["limit_metrics_time"])
        with _operators_only():
            await cursor.execute(OPERATE["operator_metrics"], {"stall_timeout": stall_timeout})
        figures: dict[str, Any] | None = await cursor.fetchone()
    assert figures is not None
    return figures


async def list_jobs(
    conn: Connection, jobs: JobFilter, *, limit: int = 50, after: Cursor | None = None
) -> tuple[list[OperatorJob], Cursor | None]:
    """Return some of all owners' jobs, newest first, and where the list goes on, if it does.

    ``after`` is where it went on the last time.
    """
    at, job_id = after or (None, None)
    values = {**jobs.values(), "limit": limit + 1, "after_at": at, "after_id": job_id}
    async with conn.cursor(row_factory=class_row(OperatorJob)) as cursor:
        with _operators_only():
            await cursor.execute(OPERATE["operator_jobs"], values)
        found = await cursor.fetchall()
    page = found[:limit]
    return page, (page[-1].created_at, page[-1].id) if len(found) > limit else None


async def change_jobs(
    conn: Connection,
    action: Action,
    jobs: JobFilter | Sequence[UUID],
    *,
    ended_before: datetime | None = None,
) -> Changed:
    """Cancel or retry up to ``MAX_CHANGED`` jobs of any owners; what can't be is left as it is.

    Of jobs to retry, ``ended_before`` leaves out those that ended later: also those that were
    retried since, and failed again.
    What somebody has locked is not waited for: it is ``more``.
    """
    chosen = jobs if isinstance(jobs, JobFilter) else JobFilter()
    allowed = CHANGEABLE[action]
    if chosen.status not in {None, *allowed}:
        raise InvalidInput(
            f"filter.status: must be {' or '.join(allowed)}: no others can be changed so",
            field="filter.status",
        )
    ids = None if isinstance(jobs, JobFilter) else list(jobs)
    async with conn.cursor(row_factory=class_row(Changed)) as cursor:
        with _operators_only():
            values = {**chosen.values(), "ids": ids, "ended_before": ended_before}
            await cursor.execute(OPERATE[f"operator_{action}_jobs"], values)
        changed = await cursor.fetchone()
    assert changed is not None
    return changed


async def list_deliveries(
    conn: Connection,
    status: OpenStatus,
    *,
    owner: UUID | None = None,
    limit: int = 50,
    after: Cursor | None = None,
) -> tuple[list[OperatorDelivery], Cursor | None]:
    """Return some of all owners' deliveries, newest first, and where the list goes on."""
    at, delivery = after or (None, None)
    values = {"status": status, "owner": owner, "limit": limit + 1}
    async with conn.cursor(row_factory=class_row(OperatorDelivery)) as cursor:
        with _operators_only():
            await cursor.execute(
                OPERATE["operator_deliveries"], values | {"after_at": at, "after_id": delivery}
            )
        found = await cursor.fetchall()
    page = found[:limit]
    return page, (page[-1].created_at, page[-1].id) if len(found) > limit else None


async def replay_deliveries(conn: Connection, ids: Sequence[UUID]) -> int:
    """Send up to ``MAX_CHANGED`` deliveries again and return how many.

    Those that wait, or whose endpoint is disabled, are left as they are.
    """
    async with conn.cursor(row_factory=scalar_row) as cursor:
        with _operators_only():
            await cursor.execute(OPERATE["operator_replay_deliveries"], {"ids": list(ids)})
        count: int | None = await cursor.fetchone()
    assert count is not None
    return count


async def pause_or_resume_queue(conn: Connection, action: Literal["pause", "resume"]) -> None:
    """Start no more jobs, or start them again."""
    with _operators_only():
        await conn.execute(OPERATE[f"operator_{action}_queue"])


async def pause_or_resume_owner(
    conn: Connection, action: Literal["pause", "resume"], owner: UUID
) -> None:
    """Start no more jobs of an owner, or start them again. Raises ``UserNotFound``."""
    async with conn.cursor(row_factory=scalar_row) as cursor:
        with _operators_only():
            await cursor.execute(OPERATE[f"operator_{action}_owner"], {"owner": owner})
        if not await cursor.fetchone():
            raise UserNotFound


@contextmanager
def _operators_only() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as exc:
        raise NotAnOperator from exc


@dataclass(frozen=True, slots=True)
class Operator:
    """A user who is an operator, and since when."""

    user_id: UUID
    email: str | None
    added_at: datetime


def add(conn: psycopg.Connection[Any], user: str) -> UUID:
    """Make a user an operator, by id or e-mail address, and return the id.

    Raises ``UserNotFound``, and ``InvalidInput`` where several users have that address.
    """
    user_id = _find_user(conn, user)
    conn.execute(OPERATE["add_operator"], {"id": user_id})
    return user_id


def remove(conn: psycopg.Connection[Any], user: str) -> UUID:
    """Make a user an operator no more, at once, and return the id. Raises what ``add`` raises."""
    user_id = _find_user(conn, user)
    conn.execute(OPERATE["remove_operator"], {"id": user_id})
    return user_id


def list_all(conn: psycopg.Connection[Any]) -> list[Operator]:
    """Return all operators, in the order in which they were added."""
    with conn.cursor(row_factory=class_row(Operator)) as cursor:
        return cursor.execute(OPERATE["list_operators"]).fetchall()


def _find_user(conn: psycopg.Connection[Any], user: str) -> UUID:
    found = conn.execute(OPERATE["find_users"], {"user": user}).fetchall()
    if not found:
        raise UserNotFound(f"There is no user with the id or e-mail address {user!r} in auth.users")
    if len(found) > 1:
        raise InvalidInput(f"Several users have the e-mail address {user!r}; give an id")
    user_id: UUID = found[0][0]
    return user_id
