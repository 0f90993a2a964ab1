"""A job from audio to transcript."""

import asyncio
import contextlib
import logging
from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from jobs.compute.base import Compute
from jobs.database import Pool
from jobs.errors import AttemptLost, DatabaseUnavailable, JobTimeout, PgscribeError
from jobs.models import ProcessingJob, Transcript, TranscriptionOptions
from jobs.sql import ATTEMPTS
from jobs.storage.base import Storage

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.5  # seconds between two writes of an attempt's progress


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a queue job by a worker: the fence that late writers run into."""

    queue_job_id: int
    worker_id: int
    attempts: int


class _Progress:
    """The latest progress that an engine has reported."""

    fraction = 0.0

    def report(self, fraction: float) -> None:
        self.fraction = fraction


class Transcriber:
    """Carries out attempts: reads the job, transcribes its audio, writes the result."""

    def __init__(self, pool: Pool, storage: Storage, compute: Compute, *, timeout: float) -> None:
        self._pool = pool
        self._storage = storage
        self._compute = compute
        self._timeout = timeout

    async def run(self, attempt: Attempt) -> None:
        """Transcribe the attempt's job. Whatever fails is on the job's row before it is raised.

        Raises ``PgscribeError``; its ``retryable`` says whether another attempt makes sense.
        """
        try:
            async with asyncio.timeout(self._timeout):
                job = await self._load(attempt)
                transcript = await self._transcribe(attempt, job)
            await self._write_result(attempt, transcript)
        except AttemptLost:
            raise
        except PgscribeError as exc:
            await self._write_error(attempt, exc)
            raise
        except TimeoutError as exc:
            timeout = JobTimeout(
                f"The attempt took longer than the limit of {self._timeout:g} s; "
                "split the recording or raise PGSCRIBE_JOB_TIMEOUT"
            )
            await self._write_error(attempt, timeout)
            raise timeout from exc
        except psycopg.OperationalError as exc:
            unavailable = DatabaseUnavailable()
            with contextlib.suppress(psycopg.OperationalError):  # it may still be out of reach
                await self._write_error(attempt, unavailable)
            raise unavailable from exc
        except Exception as exc:
            logger.exception("Unexpected error in attempt %s", attempt)
            await self._write_error(attempt, PgscribeError())
            raise PgscribeError from exc

    async def _load(self, attempt: Attempt) -> ProcessingJob:
        async with (
            self._pool.connection() as conn,
            conn.cursor(row_factory=class_row(ProcessingJob)) as cursor,
        ):
            await cursor.execute(ATTEMPTS["load"], asdict(attempt))
            job = await cursor.fetchone()
        if job is None:
            raise AttemptLost
        return job

    async def _transcribe(self, attempt: Attempt, job: ProcessingJob) -> Transcript:
        source = await self._storage.locate(job.file_path)
        progress = _Progress()
        writer = asyncio.create_task(self._write_progress(attempt, progress))
        try:
            return await self._compute.transcribe(
                source, TranscriptionOptions.from_dict(job.options), progress.report
            )
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write_progress(self, attempt: Attempt, progress: _Progress) -> None:
        written = 0.0
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            if progress.fraction > written:
                written = progress.fraction
                try:
                    await self._execute("write_progress", attempt, progress=written)
                except psycopg.OperationalError as exc:  # the next one may get through
                    logger.warning("Progress not written: %s", exc)

    async def _write_result(self, attempt: Attempt, transcript: Transcript) -> None:
        held = await self._execute(
            "write_result",
            attempt,
            result=Jsonb(transcript.to_dict()),
            audio_seconds=transcript.duration,
        )
        if not held:
            raise AttemptLost

    async def _write_error(self, attempt: Attempt, exc: PgscribeError) -> None:
        await self._execute("write_error", attempt, error_code=exc.code, error=str(exc))

    async def _execute(self, query: str, attempt: Attempt, **values: Any) -> bool:
        """Run a fenced statement; return whether the attempt still held its job."""
        async with self._pool.connection() as conn:
            cursor = await conn.execute(ATTEMPTS[query], {**asdict(attempt), **values})
            return cursor.rowcount > 0
