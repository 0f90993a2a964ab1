"""A job from audio to transcript."""

import asyncio
import logging
from typing import Any

import psycopg
from psycopg_pool import PoolTimeout

from jobs.compute.base import Compute
from jobs.database import Pool
from jobs.errors import JobTimeout
from jobs.models import Attempt, Transcript, TranscriptionOptions
from jobs.sql import ATTEMPTS
from jobs.storage.base import Storage

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.5  # seconds between two writes of an attempt's progress


class _Progress:
    """The latest progress that an engine has reported."""

    fraction = 0.0

    def report(self, fraction: float) -> None:
        self.fraction = fraction


class Transcriber:
    """Carries out attempts. ``timeout`` is the longest that one may take, in seconds."""

    def __init__(self, pool: Pool, storage: Storage, compute: Compute, *, timeout: float) -> None:
        self._pool = pool
        self._storage = storage
        self._compute = compute
        self._timeout = timeout

    async def run(self, attempt: Attempt) -> Transcript:
        """Transcribe the attempt's audio; meanwhile its progress is on the job's row.

        Raises ``PgscribeError``; its ``retryable`` says whether another attempt makes sense.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._transcribe(attempt)
        except TimeoutError as exc:
            raise JobTimeout(
                f"The attempt took longer than the limit of {self._timeout:g} s; "
                "split the recording or raise PGSCRIBE_JOB_TIMEOUT"
            ) from exc

    async def _transcribe(self, attempt: Attempt) -> Transcript:
        source = await self._storage.locate(attempt.file_path)
        progress = _Progress()
        writer = asyncio.create_task(self._write_progress(attempt, progress))
        try:
            return await self._compute.transcribe(
                source, TranscriptionOptions.from_dict(attempt.options), progress.report
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
                except (psycopg.OperationalError, PoolTimeout) as exc:
                    # The next one may get through.
                    logger.warning("Progress not written: %s", exc)

    async def _execute(self, query: str, attempt: Attempt, **values: Any) -> bool:
        """Run a fenced statement; return whether the attempt still held its job."""
        fence = {"job_id": attempt.job_id, "attempt": attempt.number}
        async with self._pool.connection() as conn:
            cursor = await conn.execute(ATTEMPTS[query], {**fence, **values})
            return cursor.rowcount > 0
