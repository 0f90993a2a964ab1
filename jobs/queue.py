"""The procrastinate app: its connection to our pool, and a job manager that fences late writers."""

import logging
from datetime import datetime
from typing import Any

import procrastinate
from procrastinate import jobs as queue_jobs
from procrastinate import manager

from jobs.database import Pool
from jobs.sql import QUEUE

logger = logging.getLogger(__name__)

QUEUE_NAME = "transcription"


class FencedJobManager(manager.JobManager):
    """Ends a queue job only for the worker and attempt that hold it.

    procrastinate's own functions end any running job, whoever asks.
    """

    connector: procrastinate.PsycopgConnector

    async def finish_job(
        self,
        job: queue_jobs.Job,
        status: queue_jobs.Status,
        delete_job: bool,  # noqa: FBT001 - as in procrastinate
    ) -> None:
        """End ``job`` with ``status``, unless this attempt has lost it."""
        await self._end(job, "finish", status=status.value, delete_job=delete_job)

    async def retry_job(
        self,
        job: queue_jobs.Job,
        retry_at: datetime | None = None,
        priority: int | None = None,
        queue: str | None = None,
        lock: str | None = None,
    ) -> None:
        """Put ``job`` back in the queue, unless this attempt has lost it."""
        await self._end(job, "retry", retry_at=retry_at, priority=priority, queue=queue, lock=lock)

    async def _end(self, job: queue_jobs.Job, query: str, **values: Any) -> None:
        fence = {
            "queue_job_id": job.id,
            "worker_id": job.worker_id,
            "attempts": job.attempts,
        }
        async with self.connector.pool.connection() as conn:
            cursor = await conn.execute(QUEUE[query], {**fence, **values})
            if cursor.rowcount == 0:
                logger.warning("Queue job %s is no longer this attempt's; left as it is", job.id)


async def open_app(pool: Pool) -> procrastinate.App:
    """Return an app that works on ``pool``, which must be open and made for the queue."""
    connector = procrastinate.PsycopgConnector()
    app = procrastinate.App(connector=connector)
    app.job_manager = FencedJobManager(connector)
    await app.open_async(pool)
    return app
