"""The queue: what a worker gets from it and gives back to it, on one connection.

procrastinate is the engine: its tables, tasks, retries and periodic jobs. Claims and ends go
through functions of ours in the database, many jobs in one transaction; see
docs/decisions/0002-queue.md.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar
from uuid import UUID

import psycopg

from jobs.errors import DatabaseUnavailable
from jobs.models import Attempt
from jobs.sql import QUEUE

logger = logging.getLogger(__name__)

QUEUE_NAME = "transcription"
MAINTENANCE = "maintenance"
OTHER_QUEUES = (MAINTENANCE,)

CONNECT_TIMEOUT = 10.0  # seconds
CALL_TIMEOUT = 10.0  # seconds; the server gives a statement up after 8

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Connect = Callable[[], Awaitable[Connection]]
T = TypeVar("T")

#: What Postgres raises for a result that it can't store, however often that is tried.
UNUSABLE = (
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.InternalError,
    psycopg.errors.ProgramLimitExceeded,
)

OutcomeName = Literal["succeeded", "failed", "cancelled", "retry", "released"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended, as ``pgscribe.ended_attempt`` has it. ``retry_after`` is in seconds."""

    queue_job_id: int
    job_id: UUID | None
    attempt: int
    outcome: OutcomeName
    result: dict[str, Any] | None = None
    audio_seconds: float | None = None
    error_code: str | None = None
    error: str | None = None
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A queue job that this worker holds. ``attempt`` is ``None`` where it is no transcription."""

    queue_job_id: int
    task_name: str
    queue_name: str
    args: dict[str, Any]
    priority: int
    attempts: int
    lock: str | None
    attempt: Attempt | None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "ClaimedJob":
        """Read what ``pgscribe.turn`` returns."""
        attempt = None
        if "id" in row:
            attempt = Attempt(
                job_id=UUID(row["id"]),
                number=row["attempt"],
                user_id=UUID(row["user_id"]),
                file_path=row["file_path"],
                options=row["options"],
            )
        return cls(
            row["queue_job_id"],
            row["task_name"],
            row["queue_name"],
            row["args"] if isinstance(row["args"], dict) else {},
            row["priority"],
            row["attempts"],
            row.get("lock"),
            attempt,
        )

    @property
    def key(self) -> tuple[int, int]:
        """The queue job's id and the number of this claim of it."""
        return self.queue_job_id, self.attempt.number if self.attempt else self.attempts

    def end(self, outcome: OutcomeName, **values: Any) -> Ended:
        """Return how this attempt ended."""
        if self.attempt is None:
            return Ended(self.queue_job_id, None, self.attempts, outcome, **values)
        return Ended(self.queue_job_id, self.attempt.job_id, self.attempt.number, outcome, **values)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn brought. ``due``: when a job falls due, seconds since the epoch and from now."""

    jobs: list[ClaimedJob]
    more: bool
    missed: int
    due: tuple[float, float] | None
    busy: frozenset[UUID]
    abort: frozenset[int]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat brought. ``stall``: seconds until another worker may be presumed dead."""

    lost: frozenset[UUID]
    orphans: int
    swept: int
    workers: int
    rank: int
    stall: float | None


class Queue:
    """A worker's side of the queue. One call at a time; each is tried once.

    Every method raises ``DatabaseUnavailable`` where the database did not answer, or broke the
    transaction off: try again. What was sent may have been done all the same.
    """

    def __init__(self, connect: Connect, *, max_attempts: int, stall_timeout: float) -> None:
        self._connect = connect
        self._max_attempts = max_attempts
        self._stall_timeout = stall_timeout
        self._conn: Connection | None = None
        self._strays: set[asyncio.Task[Any]] = set()

    async def register(self) -> int:
        """Register a worker and return its id."""
        worker_id: int = await self._call("register", {})
        return worker_id

    async def turn(
        self, worker_id: int, ended: Sequence[Ended], wanted: int, announcement: str | None
    ) -> Turn:
        """End attempts and claim jobs for ``wanted`` free slots, in one transaction.

        Raises one of ``UNUSABLE`` where Postgres can't store a result; then nothing was done.
        """
        answer = await self._call(
            "turn",
            {
                "worker_id": worker_id,
                "ended": json.dumps([asdict(e) for e in ended], default=str),
                "wanted": wanted,
                "other_queues": list(OTHER_QUEUES),
                "max_attempts": self._max_attempts,
                "announcement": announcement,
            },
        )
        return Turn(
            [ClaimedJob.from_row(row) for row in answer["jobs"]],
            answer["more"],
            answer["missed"],
            None if answer["due"] is None else (answer["due"], answer["due_in"]),
            frozenset(map(UUID, answer["busy"])),
            frozenset(answer["abort"]),
        )

    async def beat(
        self, worker_id: int, held: Iterable[ClaimedJob], *, sweep: bool, echo_channel: str
    ) -> Beat | None:
        """Send a heartbeat; ``None``: this worker has been presumed dead and holds nothing."""
        jobs = list(held)
        attempts = [job.attempt for job in jobs if job.attempt is not None]
        answer = await self._call(
            "beat",
            {
                "worker_id": worker_id,
                "held": [attempt.job_id for attempt in attempts],
                "attempts": [attempt.number for attempt in attempts],
                "queue_jobs": [job.queue_job_id for job in jobs],
                "stall_timeout": self._stall_timeout,
                "max_attempts": self._max_attempts,
                "sweep": sweep,
                "echo_channel": echo_channel,
            },
        )
        if answer is None:
            return None
        return Beat(
            frozenset(map(UUID, answer["lost"])),
            answer["orphans"],
            answer["swept"],
            answer["workers"],
            answer["rank"],
            answer["stall"],
        )

    async def sign_off(self, worker_id: int) -> None:
        """Give back what the worker still holds, and forget the worker."""
        await self._call("sign_off", {"worker_id": worker_id})

    async def _call(self, query: str, values: dict[str, Any]) -> Any:
        try:
            if self._conn is None or self._conn.closed:
                self._conn = await self._bounded(self._open(), CONNECT_TIMEOUT)
            return await self._bounded(self._execute(self._conn, query, values), CALL_TIMEOUT)
        except UNUSABLE:
            raise
        except (psycopg.Error, OSError, TimeoutError) as exc:
            await self.close()
            raise DatabaseUnavailable(str(exc).strip() or None) from exc

    async def _open(self) -> Connection:
        conn = await self._connect()
        await conn.execute(QUEUE["prepare_connection"])
        return conn

    @staticmethod
    async def _execute(conn: Connection, query: str, values: dict[str, Any]) -> Any:
        row = await (await conn.execute(QUEUE[query], values)).fetchone()
        assert row is not None
        return row[0]

    async def _bounded(self, call: Coroutine[Any, Any, T], timeout: float) -> T:  # noqa: ASYNC109
        """Like ``asyncio.timeout``, without waiting for the cancellation.

        psycopg asks the server to cancel the query, which takes long when nothing answers.
        """
        task = asyncio.create_task(call)
        try:
            await asyncio.wait({task}, timeout=timeout)
        finally:
            if not task.done():
                task.cancel()
                self._strays.add(task)
                task.add_done_callback(self._forget)
        if not task.done():
            raise TimeoutError(f"no answer for {timeout:g} s")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._strays.discard(task)
        if not task.cancelled():
            task.exception()  # it is of no interest, but asyncio would complain

    async def close(self) -> None:
        """Close the connection. A later call opens another one."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                await conn.close()
