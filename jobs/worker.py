"""The worker process: start, supervise, drain, stop."""

import asyncio
import contextlib
import logging
import signal

import procrastinate

from jobs import database, queue, tasks
from jobs.compute.local import LocalCompute
from jobs.settings import Settings
from jobs.storage.local import LocalStorage
from jobs.transcription import Transcriber

logger = logging.getLogger(__name__)

SIGN_OFF_TIMEOUT = 3.0  # seconds that a stopping worker tries to tell the database
RESTART_DELAY = 1.0  # seconds before procrastinate's worker is started again


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Work until ``stop`` is set, then let running jobs finish for ``shutdown_timeout`` seconds.

    Jobs that take longer go back to the queue.
    """
    pool = database.make_pool(settings, name="worker", for_queue=True)
    storage = LocalStorage(settings.storage_dir, max_bytes=settings.max_upload_bytes)
    async with pool, LocalCompute(settings) as compute:
        app = await queue.open_app(pool)
        transcriber = Transcriber(pool, storage, compute, timeout=settings.job_timeout)
        tasks.add_tasks(app, transcriber, max_attempts=settings.max_attempts)
        while not stop.is_set():
            await _run_until_stopped(app, settings, stop)


async def _run_until_stopped(
    app: procrastinate.App, settings: Settings, stop: asyncio.Event
) -> None:
    """Run procrastinate's worker once; it also ends by itself when the database goes away."""
    worker = asyncio.create_task(
        app.run_worker_async(
            queues=[queue.QUEUE_NAME],
            concurrency=settings.worker_concurrency,
            shutdown_graceful_timeout=settings.shutdown_timeout,
            install_signal_handlers=False,
        )
    )
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({worker, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if stop.is_set():
        worker.cancel()
        done, _ = await asyncio.wait({worker}, timeout=settings.shutdown_timeout + SIGN_OFF_TIMEOUT)
        if worker not in done or (not worker.cancelled() and worker.exception()):
            logger.warning("The worker could not sign off; the database seems out of reach")
        return
    logger.error("The worker ended by itself and is started again", exc_info=worker.exception())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), RESTART_DELAY)


async def run_until_signalled(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(settings, stop)
