"""What workers run."""

import random
from collections.abc import Awaitable, Callable
from uuid import UUID

import procrastinate
from procrastinate import jobs as queue_jobs
from procrastinate.job_context import AbortReason

from jobs.deliveries import Deliverer, DeliveryPolicy
from jobs.errors import PgscribeError
from jobs.execution import Job
from jobs.models import Transcript
from jobs.queue import MAINTENANCE, QUEUE_NAME, WEBHOOKS
from jobs.transcription import Transcriber

TASK_NAME = "transcribe"
FIRST_PAUSE = 2.0  # seconds before the second attempt; each later pause is twice as long
LONGEST_PAUSE = 300.0  # seconds


class AttemptPolicy(procrastinate.BaseRetryStrategy):
    """Says when a failed attempt is followed by another one; the error says whether.

    How many attempts a job has is decided in the database, which counts those that never reported.
    """

    def get_retry_decision(
        self, *, exception: BaseException, job: queue_jobs.Job
    ) -> procrastinate.RetryDecision | None:
        """Return a pause with jitter, no shorter than what the refusing side asked for."""
        if not (isinstance(exception, PgscribeError) and exception.retryable):
            return None
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**job.attempts)
        pause *= random.uniform(0.5, 1)  # noqa: S311 - jitter is no secret
        return procrastinate.RetryDecision(
            retry_in={"seconds": max(pause, exception.retry_after or 0.0)}
        )


def add_tasks(
    app: procrastinate.App,
    transcriber: Transcriber,
    deliverer: Deliverer,
    prune: Callable[[], Awaitable[object]],
    clean_up: Callable[[], Awaitable[object]],
) -> None:
    """Register the tasks that the database's triggers defer, and the periodic ones."""

    @app.task(name=TASK_NAME, queue=QUEUE_NAME, pass_context=True, retry=AttemptPolicy())
    async def transcribe(
        context: procrastinate.JobContext,
        processing_job_id: str,  # noqa: ARG001 - for people who read the queue
    ) -> Transcript:
        assert isinstance(context.job, Job)
        assert context.job.attempt is not None
        return await transcriber.run(
            context.job.attempt,
            is_cancelled=lambda: context.abort_reason() is AbortReason.USER_REQUEST,
        )

    @app.task(name="deliver_webhook", queue=WEBHOOKS, retry=DeliveryPolicy())
    async def deliver_webhook(delivery_id: str) -> None:
        await deliverer.deliver(UUID(delivery_id))

    @app.periodic(cron="* * * * *")
    @app.task(
        name="clean_up",
        aliases=["cancel_stray_calls"],  # as workers of the version before defer it
        queue=MAINTENANCE,
        queueing_lock="clean_up",
    )
    async def clean_up_after_ended_jobs(timestamp: int) -> None:  # noqa: ARG001
        await clean_up()

    @app.periodic(cron="*/10 * * * *")
    @app.task(name="prune", queue=MAINTENANCE, queueing_lock="prune")
    async def prune_what_is_old(timestamp: int) -> None:  # noqa: ARG001 - procrastinate gives it
        await prune()
