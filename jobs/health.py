"""How a worker is, over HTTP: for whoever restarts it, and for Prometheus.

The server has a thread of its own. So it still answers where the worker's event loop hangs, and
says so; the process that is stopped altogether answers nobody.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import uvicorn
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs import metrics
from jobs.database import Pool
from jobs.errors import SettingsError
from jobs.queue_worker import Condition, Worker
from jobs.settings import Settings

logger = logging.getLogger(__name__)

TICK = 1.0  # seconds between two signs of life of the event loop
LOOP_PATIENCE = 15.0  # seconds that something may keep the event loop from turning
# Seconds for a round of the worker's own loop, which waits for 10 s at most, but then may have to
# connect, call and hang up, each with a time-out of its own. A database that is away ends a round.
TURN_PATIENCE = 60.0
STOP_TIMEOUT = 2.0  # seconds
_KINDS = ("transcription", "light")


class Monitor:
    """What is known of this process's worker."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._worker: Worker | None = None
        self._ticked = time.monotonic()

    def watch(self, worker: Worker) -> None:
        """From now on, tell of this worker."""
        self._worker = worker

    async def tick(self) -> None:
        """Show for ever that the event loop turns."""
        while True:
            self._ticked = time.monotonic()
            await asyncio.sleep(TICK)

    @property
    def _condition(self) -> Condition | None:
        return self._worker.condition if self._worker is not None else None

    def hung(self) -> str | None:
        """Return what hangs, so that only a restart helps; ``None``: nothing does."""
        if time.monotonic() - self._ticked > LOOP_PATIENCE:
            return "event_loop"
        condition = self._condition
        if condition is not None and condition.turned > TURN_PATIENCE:
            return "worker"
        return None

    def unready(self) -> list[str]:
        """Return why the worker would not do a job well now, if it would not."""
        condition = self._condition
        if condition is None:
            return ["starting"]
        reasons = {
            "hangs": self.hung() is not None,
            "draining": condition.draining,
            "database": condition.away,
            "compute": not metrics.COMPUTE.holds,
        }
        return [reason for reason, holds in reasons.items() if holds]

    @property
    def wakeups(self) -> str:
        """How the worker hears of new jobs: by notifications, or only by looking every 2 s."""
        condition = self._condition
        return "notify" if condition is not None and condition.hears else "poll"

    def figures(self) -> Iterator[Metric]:
        """Yield how the worker is, as metrics."""
        yield from metrics.of_pool(self._pool)
        yield metrics.gauge(
            "pgscribe_worker_ready", "1 while the worker does jobs.", {(): not self.unready()}
        )
        yield metrics.gauge(
            "pgscribe_worker_loop_age_seconds",
            "Since the event loop turned: about 1 at most.",
            {(): time.monotonic() - self._ticked},
        )
        condition = self._condition
        if condition is None:
            return
        yield metrics.gauge(
            "pgscribe_worker_heartbeat_age_seconds",
            "Since the database answered the worker.",
            {(): condition.contact},
        )
        yield metrics.gauge(
            "pgscribe_worker_listening",
            "1 if notifications arrive, 0 if the worker has to look every 2 s.",
            {(): condition.hears},
        )
        yield metrics.gauge(
            "pgscribe_worker_draining",
            "1 while the worker stops and takes no more jobs.",
            {(): condition.draining},
        )
        for name, text, values in (
            ("running", "Jobs that run.", condition.running),
            ("slots", "Jobs that may run at a time.", condition.slots),
        ):
            by_kind: metrics.Values = {(kind,): n for kind, n in zip(_KINDS, values, strict=True)}
            yield metrics.gauge(f"pgscribe_worker_{name}", text, by_kind, ("kind",))


def make_app(monitor: Monitor) -> Starlette:
    """Return the app that answers for a worker."""

    async def healthz(_: Request) -> Response:
        hung = monitor.hung()
        if hung is None:
            return JSONResponse({"status": "ok"})
        answer = {"status": "hangs", "reason": hung}
        return JSONResponse(answer, HTTPStatus.SERVICE_UNAVAILABLE)

    async def readyz(_: Request) -> Response:
        reasons = monitor.unready()
        answer = {"status": "unready" if reasons else "ok", "reasons": reasons}
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        return JSONResponse(answer | {"wakeups": monitor.wakeups}, status)

    async def show_metrics(request: Request) -> Response:
        body, media_type = metrics.render(metrics.REGISTRY, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})

    routes = {"/healthz": healthz, "/readyz": readyz, "/metrics": show_metrics}
    return Starlette(routes=[Route(path, handler) for path, handler in routes.items()])


@asynccontextmanager
async def serve(settings: Settings, monitor: Monitor) -> AsyncIterator[None]:
    """Answer for a worker meanwhile, if a port is set. Raises ``SettingsError``: it is taken."""
    if settings.worker_health_port is None:
        yield
        return
    listener = _listen(settings.worker_health_host, settings.worker_health_port)
    config = uvicorn.Config(
        make_app(monitor),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="health", daemon=True)
    figures = metrics.Figures(monitor.figures)
    metrics.REGISTRY.register(figures)
    ticking = asyncio.create_task(monitor.tick())
    thread.start()
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("The worker's health is at http://%s:%s/healthz", shown, port)
    try:
        yield
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join, STOP_TIMEOUT)
        ticking.cancel()
        metrics.REGISTRY.unregister(figures)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener: socket.socket | None = None
    with contextlib.suppress(OSError):
        listener = socket.create_server((host, port), family=family)
    if listener is None:
        raise SettingsError(
            "Unusable settings:\n  PGSCRIBE_WORKER_HEALTH_HOST and PGSCRIBE_WORKER_HEALTH_PORT: "
            f"nothing can listen on {host} port {port}; it may be taken: choose another port"
        )
    return listener
