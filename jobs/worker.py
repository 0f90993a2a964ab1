"""The worker process: start, run, drain, stop."""

import asyncio
import contextlib
import functools
import logging
import signal

import procrastinate

from jobs import __version__, database, health, retention, tasks, telemetry
from jobs.backoff import Backoff
from jobs.compute.base import Compute
from jobs.database import Pool
from jobs.deliveries import Deliverer
from jobs.fetching import Fetcher
from jobs.outbound import Rules
from jobs.queue import Queue
from jobs.queue_worker import App, Worker
from jobs.settings import Settings
from jobs.storage.base import Storage
from jobs.storage.choose import make_storage
from jobs.tracing import JobTraces
from jobs.transcription import Limits, Transcriber, clean_up

logger = logging.getLogger(__name__)


def make_app(settings: Settings) -> App:
    """Return the procrastinate app, without tasks; open it with a pool made for the queue."""
    connect = functools.partial(database.connect, settings, name="worker")
    return App(
        connector=procrastinate.PsycopgConnector(),
        queue=lambda: Queue(
            connect,
            max_attempts=settings.max_attempts,
            stall_timeout=settings.stall_timeout,
        ),
        stall_timeout=settings.stall_timeout,
        light_slots=settings.worker_light_slots,
    )


def make_compute(settings: Settings) -> Compute:
    """Return what the settings name. Each needs packages that the other does not."""
    if settings.compute == "modal":
        from jobs.compute.modal import ModalCompute

        return ModalCompute(settings)
    from jobs.compute import local

    return local.LocalCompute(settings)


async def run(settings: Settings, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
    """Work until ``stop`` is set, then let running jobs finish for ``shutdown_timeout`` seconds.

    Jobs that take longer, or that still run when ``stop_now`` is set, go back to the queue.
    """
    pool = database.make_pool(settings, name=f"tasks {__version__}", for_queue=True)
    monitor = health.Monitor(pool)
    app = make_app(settings)
    fetch = Fetcher(settings.max_upload_bytes, settings.fetch_timeout)
    async with (
        health.serve(settings, monitor),
        contextlib.aclosing(make_storage(settings)) as storage,
        make_compute(settings) as compute,
        pool,
        app.open_async(pool),
    ):
        tasks.add_tasks(
            app,
            Transcriber(pool, storage, compute, Limits.of(settings), fetch),
            Deliverer(pool, settings.public_url, Rules(networks=settings.webhook_networks)),
            functools.partial(retention.prune, pool, storage, settings),
            functools.partial(_clean_up, pool, storage, compute),
        )
        backoff = Backoff(1.0, 60.0)
        traces = JobTraces(pool, settings.max_attempts)
        traced = {"worker_middleware": [traces.middleware], "on_ended": traces.on_ended}
        while not stop.is_set():
            worker = app.new_worker(
                concurrency=settings.worker_concurrency,
                shutdown_graceful_timeout=settings.shutdown_timeout,
                install_signal_handlers=False,
                **(traced if telemetry.is_on() else {}),
            )
            monitor.watch(worker)
            try:
                await _run_until_stopped(worker, stop, stop_now)
            except Exception:
                logger.exception("The worker failed and is started again")
                await backoff.sleep()


async def _clean_up(pool: Pool, storage: Storage, compute: Compute) -> None:
    answers = await asyncio.gather(
        clean_up(pool, compute),
        retention.delete_audio(pool, storage),
        retention.add_up_usage(pool),
        return_exceptions=True,  # none keeps the others from their work
    )
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


async def _run_until_stopped(worker: Worker, stop: asyncio.Event, stop_now: asyncio.Event) -> None:
    async def pass_on() -> None:
        await stop.wait()
        worker.stop()
        await stop_now.wait()
        worker.stop_now()

    stopping = asyncio.create_task(pass_on())
    try:
        await worker.run()
    finally:
        stopping.cancel()


async def run_until_signalled(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT; a second one doesn't wait for running jobs."""
    stop, stop_now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop_now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await run(settings, stop, stop_now)
