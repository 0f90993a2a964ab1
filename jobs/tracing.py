"""The spans of jobs, as the worker that runs them makes them."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from opentelemetry.trace import Span
from procrastinate import job_context, worker
from psycopg_pool import PoolTimeout

from jobs import logs, telemetry
from jobs.database import Pool, deadline
from jobs.execution import Job
from jobs.models import Attempt
from jobs.queue import ClaimedJob, Ended
from jobs.sql import TRACING
from jobs.telemetry import SECOND, JobTrace

logger = logging.getLogger(__name__)

STATEMENT_TIMEOUT = 2.0  # seconds; then the attempt goes untraced
PROMPT = 10_000_000  # nanoseconds: an answer that is soon enough for the times of spans
MOST_READS = 3
MOST_OPEN = 10_000  # jobs whose end may still come


@dataclass(slots=True)
class _Open:
    """A job whose attempt was run here, until its end is in the database."""

    span: Span
    max_attempts: int
    run_until: int


@dataclass(frozen=True, slots=True)
class Read:
    """What the database says of an attempt, whose ages it counted while we waited for it."""

    row: dict[str, Any] | None
    before: int  # nanoseconds since 1970, by our clock
    after: int

    @property
    def waited(self) -> int:
        """Nanoseconds."""
        return self.after - self.before

    @property
    def middle(self) -> int:
        """Our time at which the ages are true, give or take half of ``waited``."""
        return self.before + self.waited // 2


class JobTraces:
    """Traces attempts: give a worker ``middleware`` and ``on_ended``."""

    def __init__(self, pool: Pool, max_attempts: int) -> None:
        self._pool = pool
        self._max_attempts = max_attempts
        self._open: dict[tuple[int, int], _Open] = {}  # by ClaimedJob.key
        self._promptest = 0  # nanoseconds: the database's best answer, which may be far away

    async def middleware(
        self,
        call_next: Callable[[], Awaitable[Any]],
        context: job_context.JobContext,
        _: worker.Worker,
    ) -> Any:
        """Run a job's task in a span of the attempt."""
        job = context.job
        assert isinstance(job, Job)
        read = job.attempt and telemetry.is_on() and await self.read(job.attempt)
        if not (job.attempt and read and read.row):
            return await call_next()
        return await self._traced(call_next, job, job.attempt, read.row, read.middle)

    async def read(self, attempt: Attempt) -> Read | None:
        """Return what an attempt's spans follow from; ``None``, and a warning, if nobody answers.

        A slow answer is asked for again: by half of the wait its times may be wrong.
        """
        values = {"job_id": attempt.job_id, "attempt": attempt.number}
        reads: list[Read] = []
        try:
            async with self._pool.connection() as conn:
                with deadline(conn, STATEMENT_TIMEOUT):
                    while len(reads) < MOST_READS:
                        reads.append(await _read_once(conn, values))
                        if reads[-1].waited <= max(PROMPT, 2 * self._promptest):
                            break
        except (psycopg.Error, PoolTimeout) as exc:
            if not reads:
                logger.warning("An attempt goes untraced: %s", exc)
                return None
        best = min(reads, key=lambda read: read.waited)
        self._promptest = min(self._promptest or best.waited, best.waited)
        return best

    async def _traced(
        self,
        call_next: Callable[[], Awaitable[Any]],
        job: Job,
        attempt: Attempt,
        row: dict[str, Any],
        now: int,
    ) -> Any:
        trace = JobTrace.from_row(row)
        logs.bind(trace_id=f"{trace.place().trace_id:032x}")  # also of what is logged afterwards
        named = {"pgscribe.job.id": str(attempt.job_id)}
        # Its age, not its time: our clock may be wrong, differences of times are right on any.
        whole = trace.start("job", named, start=_ago(now, row["age"]))
        numbered = named | {"pgscribe.attempt": attempt.number}
        _add_lost(trace, attempt, row["lost"], now)
        telemetry.past_span("queued", whole, _ago(now, row["waited"]), now, numbered)
        span = trace.start("attempt", numbered, attempt=attempt.number)
        span.set_attribute("pgscribe.worker.id", job.worker_id or 0)
        try:
            with telemetry.current(span):
                return await call_next()
        finally:
            while len(self._open) >= MOST_OPEN:  # what was lost never ends
                del self._open[next(iter(self._open))]
            assert job.id is not None
            self._open[job.id, attempt.number] = _Open(
                whole, row["max_attempts"] or self._max_attempts, time.time_ns()
            )

    def on_ended(self, claimed: ClaimedJob, end: Ended) -> None:
        """Make the last spans of an attempt whose end is in the database now."""
        job = self._open.pop(claimed.key, None)
        if job is None:
            return
        now = time.time_ns()
        telemetry.past_span("finish", job.span, job.run_until, now)
        last = end.outcome == "retry" and claimed.attempts + 1 >= job.max_attempts
        if end.outcome in {"retry", "released"} and not last:
            return  # whoever runs it next starts this span again
        job.span.set_attribute("pgscribe.outcome", "failed" if last else end.outcome)
        if end.audio_seconds is not None:
            job.span.set_attribute("pgscribe.audio_seconds", end.audio_seconds)
        if end.error_code is not None:
            telemetry.failed(job.span, end.error_code)
        job.span.end()


async def _read_once(conn: psycopg.AsyncConnection[Any], values: Mapping[str, Any]) -> Read:
    before = time.time_ns()
    cursor = await conn.execute(TRACING["job_trace"], values)
    row = await cursor.fetchone()
    return Read(row[0] if row else None, before, time.time_ns())


def _ago(now: int, seconds: float) -> int:
    return now - int(max(seconds, 0.0) * SECOND)


def _add_lost(trace: JobTrace, attempt: Attempt, lost: dict[str, float] | None, now: int) -> None:
    """Make the span of the attempt before, whose worker can't, so that its children have it."""
    if lost is None:
        return
    number = attempt.number - 1
    named: telemetry.Attributes = {
        "pgscribe.job.id": str(attempt.job_id),
        "pgscribe.attempt": number,
    }
    span = trace.start("attempt", named, attempt=number, start=_ago(now, lost["began"]))
    telemetry.failed(span, "worker_lost")
    span.end(_ago(now, lost["ended"]))
