"""What workers run."""

import asyncio
import random

import procrastinate
from procrastinate import exceptions, job_context
from procrastinate import jobs as queue_jobs

from jobs.errors import AttemptLost, PgscribeError
from jobs.queue import QUEUE_NAME
from jobs.transcription import Attempt, Transcriber

TASK_NAME = "transcribe"


class AttemptPolicy(procrastinate.BaseRetryStrategy):
    """Decides whether a failed attempt is followed by another one, and when."""

    def __init__(self, *, max_attempts: int) -> None:
        self._max_attempts = max_attempts

    def get_retry_decision(
        self, *, exception: BaseException, job: queue_jobs.Job
    ) -> procrastinate.RetryDecision | None:
        """Retry at once what a shutdown broke off, and later what may end better."""
        if isinstance(exception, asyncio.CancelledError):
            return procrastinate.RetryDecision()
        retryable = isinstance(exception, PgscribeError) and exception.retryable
        if not retryable or job.attempts + 1 >= self._max_attempts:
            return None
        delay = 2**job.attempts * random.uniform(1, 2)  # noqa: S311 - jitter is no secret
        return procrastinate.RetryDecision(retry_in={"seconds": delay})


def add_tasks(app: procrastinate.App, transcriber: Transcriber, *, max_attempts: int) -> None:
    """Register the tasks that the database's triggers defer."""

    @app.task(
        name=TASK_NAME,
        queue=QUEUE_NAME,
        pass_context=True,
        retry=AttemptPolicy(max_attempts=max_attempts),
    )
    async def transcribe(
        context: procrastinate.JobContext,
        processing_job_id: str,  # noqa: ARG001 - for people who read the queue
    ) -> None:
        job = context.job
        assert job.id is not None
        assert job.worker_id is not None
        try:
            await transcriber.run(Attempt(job.id, job.worker_id, job.attempts))
        except AttemptLost as exc:
            raise exceptions.JobAborted from exc
        except asyncio.CancelledError:
            if context.abort_reason() is job_context.AbortReason.USER_REQUEST:
                raise exceptions.JobAborted from None
            raise
