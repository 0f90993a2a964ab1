"""One claimed queue job: its task is run, and what comes of it becomes how the attempt ended."""

import inspect
import logging
import time
from datetime import UTC, datetime
from typing import Any, Protocol, cast

import attr
import psycopg
from procrastinate import exceptions, job_context, middleware, tasks, utils, worker
from procrastinate import jobs as queue_jobs

from jobs.errors import DatabaseUnavailable, PgscribeError
from jobs.models import Attempt
from jobs.queue import ClaimedJob, Ended

logger = logging.getLogger(__name__)


class Transcribed(Protocol):
    """What a transcription task returns."""

    @property
    def duration(self) -> float:
        """Length of the audio in seconds."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""


@attr.dataclass(frozen=True, kw_only=True)
class Job(queue_jobs.Job):
    """procrastinate's job, with what a transcription task needs to know of its processing job."""

    attempt: Attempt | None = None


async def execute(claimed: ClaimedJob, by: worker.Worker, context: dict[str, Any]) -> Ended:
    """Run the task of a claimed job, in procrastinate's middleware, and return how it ended.

    ``context`` is what the task's ``JobContext`` holds besides the job. Raises cancellation only.
    """
    job = _queue_job(claimed, by.worker_id)
    task = by.app.tasks.get(claimed.task_name)
    if task is None:
        return _failed(claimed, job, None, exceptions.TaskNotFound(claimed.task_name))
    try:
        full_context = job_context.JobContext(job=job, start_timestamp=time.time(), **context)
        result = await _call(task, full_context, by)
        if claimed.attempt is None:
            return claimed.end("succeeded")
        transcript = cast("Transcribed", result)
        return claimed.end(
            "succeeded", result=transcript.to_dict(), audio_seconds=transcript.duration
        )
    except exceptions.JobAborted:
        return claimed.end("cancelled")
    except Exception as exc:  # noqa: BLE001 - whatever a task raises ends its job only
        return _failed(claimed, job, task, exc)


def _queue_job(claimed: ClaimedJob, worker_id: int | None) -> Job:
    return Job(
        id=claimed.queue_job_id,
        status="doing",
        queue=claimed.queue_name,
        priority=claimed.priority,
        lock=claimed.lock,
        queueing_lock=None,
        task_name=claimed.task_name,
        task_kwargs=claimed.args,
        attempts=claimed.attempts,
        worker_id=worker_id,
        attempt=claimed.attempt,
    )


async def _call(
    task: tasks.Task[Any, Any, Any], context: job_context.JobContext, by: worker.Worker
) -> Any:
    async def call() -> Any:
        arguments = (context,) if task.pass_context else ()
        if inspect.iscoroutinefunction(task.func):
            return await task(*arguments, **context.job.task_kwargs)
        return await utils.sync_to_async(task, *arguments, **context.job.task_kwargs)

    wrapped = middleware.compose(task.task_middleware, call, context, by)
    return await middleware.compose(by.worker_middleware, wrapped, context, by)()


def _failed(
    claimed: ClaimedJob, job: Job, task: tasks.Task[Any, Any, Any] | None, exc: Exception
) -> Ended:
    if isinstance(exc, psycopg.OperationalError):
        exc = DatabaseUnavailable()
    elif not isinstance(exc, PgscribeError):
        logger.error("Queue job %s failed", claimed.queue_job_id, exc_info=exc)
        exc = PgscribeError()
    error = {"error_code": exc.code, "error": str(exc)} if claimed.attempt else {}
    retry = task.get_retry_exception(exception=exc, job=job) if task else None
    if retry is None:
        logger.info("Queue job %s failed: %s", claimed.queue_job_id, exc.code)
        return claimed.end("failed", **error)
    # Our clock may be wrong: the difference is right on any clock.
    at = retry.retry_decision.retry_at
    seconds = max(0.0, (at - datetime.now(UTC)).total_seconds()) if at else 0.0
    logger.info("Queue job %s failed: %s; again in %.1f s", claimed.queue_job_id, exc.code, seconds)
    return claimed.end("retry", retry_after=seconds, **error)
