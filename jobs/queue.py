"""The queue: what a worker gets from it and gives back to it, on one connection.

procrastinate is the engine: its tables, tasks, retries and periodic jobs. Claims and ends go
through functions of ours in the database, many jobs in one transaction; see
docs/decisions/0002-queue.md.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import psycopg

from jobs.connection import Connect, QueueConnection
from jobs.errors import DatabaseUnavailable
from jobs.models import Attempt

QUEUE_NAME = "transcription"
MAINTENANCE = "maintenance"
WEBHOOKS = "webhooks"
LIGHT_QUEUES = (MAINTENANCE, WEBHOOKS)  # whose jobs have slots of their own

#: What Postgres raises for a result that it can't store, however often that is tried.
UNUSABLE = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)

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

    def to_row(self) -> dict[str, Any]:
        """Return it as JSON. The result is not copied: it can be large."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "job_id": str(self.job_id) if self.job_id else None
        }


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

    @property
    def context(self) -> dict[str, object]:
        """What lines of the log that are about it name."""
        if self.attempt is None:
            return {"task": self.task_name, "queue_job": self.queue_job_id}
        return {"job_id": self.attempt.job_id, "attempt": self.attempt.number}

    def end(self, outcome: OutcomeName, **values: Any) -> Ended:
        """Return how this attempt ended."""
        if self.attempt is None:
            return Ended(self.queue_job_id, None, self.attempts, outcome, **values)
        return Ended(self.queue_job_id, self.attempt.job_id, self.attempt.number, outcome, **values)


Due = tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn brought. ``due``: when a job falls due, seconds since the epoch and from now.

    ``more`` and ``due`` are of transcriptions, ``light_more`` and ``light_due`` of light jobs.
    ``busy``, ``light_busy``: jobs, and queue jobs of light ones, to be ended later.
    """

    jobs: list[ClaimedJob]
    more: bool
    missed: int
    due: Due
    busy: frozenset[UUID]
    abort: frozenset[int]
    light_more: bool
    light_due: Due
    light_busy: frozenset[int]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a heartbeat brought. ``stall``: seconds until another worker may be presumed dead.

    ``lost``: keys of the claims that this worker no longer holds. ``abort``: as in ``Turn``.
    """

    lost: frozenset[tuple[int, int]]
    abort: frozenset[int]
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
        self.connection = QueueConnection(connect)
        self._max_attempts = max_attempts
        self._stall_timeout = stall_timeout

    async def register(self) -> int:
        """Register a worker and return its id."""
        row = await self._call("register", {})
        worker_id: int = row["worker_id"]
        return worker_id

    async def turn(  # noqa: PLR0913 - two kinds of slots
        self,
        worker_id: int,
        ended: Sequence[Ended],
        wanted: int,
        announcement: str | None,
        *,
        light: int = 0,
        light_announcement: str | None = None,
        running: bool = True,
    ) -> Turn:
        """End attempts and claim jobs for free slots, in one transaction.

        ``wanted``: slots for transcriptions; ``light``: slots for light jobs; ``running``: others
        run on, so it is worth a look which of them are to stop. Raises one of ``UNUSABLE`` where
        Postgres can't store a result; then nothing was done.
        """
        row = await self._call(
            "turn",
            {
                "worker_id": worker_id,
                "ended": json.dumps([end.to_row() for end in ended]) if ended else None,
                "wanted": wanted,
                "running": running,
                "other_queues": [MAINTENANCE],
                "max_attempts": self._max_attempts,
                "announcement": announcement,
                "wanted_light": light,
                "light_announcement": light_announcement,
            },
            raises=UNUSABLE if ended else (),
        )
        return Turn(
            [ClaimedJob.from_row(job) for job in (*(row["jobs"] or ()), *(row["others"] or ()))],
            bool(row["more"]),
            row["missed"] or 0,
            None if row["due"] is None else (row["due"], row["due_in"]),
            frozenset(map(UUID, row["busy"] or ())),
            frozenset(row["abort"] or ()),
            bool(row["light_more"]),
            None if row["light_due"] is None else (row["light_due"], row["light_due_in"]),
            frozenset(row["light_busy"] or ()),
        )

    async def beat(self, worker_id: int, held: Iterable[ClaimedJob], *, sweep: bool) -> Beat | None:
        """Send a heartbeat; ``None``: this worker has been presumed dead and holds nothing."""
        jobs = list(held)
        transcriptions = [job for job in jobs if job.attempt is not None]
        self.connection.expect_echo()
        row = await self._call(
            "beat",
            {
                "worker_id": worker_id,
                "held": [job.key[0] for job in transcriptions],
                "attempts": [job.key[1] for job in transcriptions],
                "queue_jobs": [job.queue_job_id for job in jobs],
                "stall_timeout": self._stall_timeout,
                "max_attempts": self._max_attempts,
                "sweep": sweep,
                "echo_channel": self.connection.echo_channel,
            },
        )
        answer = row["beat"]
        if answer is None:
            return None
        return Beat(
            frozenset(map(tuple, answer["lost"])),
            frozenset(answer["abort"]),
            answer["orphans"],
            answer["swept"],
            answer["workers"],
            answer["rank"],
            answer["stall"],
        )

    async def sign_off(self, worker_id: int) -> None:
        """Give back what the worker still holds, and forget the worker."""
        await self._call("sign_off", {"worker_id": worker_id})

    async def _call(
        self,
        query: str,
        values: dict[str, Any],
        *,
        raises: tuple[type[psycopg.Error], ...] = (),
    ) -> dict[str, Any]:
        try:
            return await self.connection.call(query, values)
        except raises:
            raise
        except (psycopg.Error, OSError, TimeoutError) as exc:
            await self.connection.close()
            raise DatabaseUnavailable(str(exc).strip() or None) from exc

    async def close(self) -> None:
        """Close the connection. A later call opens another one."""
        await self.connection.close()
