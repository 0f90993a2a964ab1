"""What a web server counts of itself and reads of the database, as Prometheus has it.

docs/metrics.md lists all of it. No label names a user, a path or a URL.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs import metrics
from jobs.metrics import Figures, Values, counter, gauge
from web.auth import Authenticator
from web.throttle import Throttle

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_STATES = ("state", "owners")


class WebMetrics:
    """The figures of one web server."""

    def __init__(self) -> None:
        self.registry = metrics.new_registry()
        self.requests = Counter(
            "pgscribe_http_requests",
            "Requests that were answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "pgscribe_http_request_seconds",
            "Until an answer began; of an upload that is its end.",
            ["method", "route"],
            buckets=metrics.SHORT,
            registry=self.registry,
        )
        self.sign_ins = Counter(
            "pgscribe_sign_ins",
            "Attempts to sign in to the web app.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in ("succeeded", "refused"):
            self.sign_ins.labels(outcome)

    def watch(self, app: Starlette) -> None:
        """From now on, tell also what an app's parts do."""

        def read() -> Iterator[Metric]:
            yield from metrics.of_pool(app.state.pool)
            yield from _of_streams_and_refusals(app)

        self.registry.register(Figures(read))

    def render(self, accept: str, figures: Mapping[str, Any] | None) -> tuple[bytes, str]:
        """Return all of it and its type. ``figures``: the database's, if it answered."""
        of_database = Figures(lambda: _of_database(figures))
        self.registry.register(of_database)
        try:
            return metrics.render(self.registry, accept)
        finally:
            self.registry.unregister(of_database)


class Measured:
    """Counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: WebMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request as an ASGI app does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"], time.perf_counter() - started)
            await send(message)

        await self._app(scope, receive, watched)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = scope.get("route")
        template = route.path if isinstance(route, Route | Mount) else "none"
        self._metrics.requests.labels(method, template, f"{status // 100}xx").inc()
        self._metrics.seconds.labels(method, template).observe(seconds)


def _of_streams_and_refusals(app: Starlette) -> Iterator[Metric]:
    authenticator: Authenticator = app.state.authenticator
    attempts: Throttle = app.state.attempts
    limited = authenticator.rate_limited | {"sign_in": attempts.refused}
    yield gauge(
        "pgscribe_streams_open", "Streams of events that are open.", {(): app.state.events.streams}
    )
    yield counter(
        "pgscribe_http_rate_limited",
        "Requests that were too many in a minute, by what was counted.",
        {(what,): count for what, count in limited.items()},
        ("what",),
    )
    yield counter(
        "pgscribe_http_unauthenticated",
        "Requests that did not say, or not validly, whose they were.",
        {(): authenticator.refused},
    )


def _of_database(figures: Mapping[str, Any] | None) -> Iterable[Metric]:
    yield gauge(
        "pgscribe_database_up",
        "1 if the database told its figures in time.",
        {(): figures is not None},
    )
    if figures is not None:
        yield from _of_jobs(figures)
        yield from _of_light_jobs(figures)


def _of_jobs(figures: Mapping[str, Any]) -> Iterator[Metric]:
    jobs = figures["jobs"]
    yield gauge(
        "pgscribe_jobs",
        "Jobs that have not ended.",
        {(row["state"], row["owners"]): row["jobs"] for row in jobs},
        _STATES,
    )
    yield gauge(
        "pgscribe_jobs_oldest_seconds",
        "How old the oldest of them is; 0: there is none.",
        {(row["state"], row["owners"]): row["oldest"] or 0 for row in jobs},
        _STATES,
    )
    yield gauge(
        "pgscribe_queue_paused", "1 while no job is started.", {(): bool(figures["paused"])}
    )
    yield gauge(
        "pgscribe_jobs_ended_10m",
        "Jobs that ended in the last ten minutes.",
        _by_name(figures["ended"]),
        ("status",),
    )
    yield gauge(
        "pgscribe_jobs_failed_10m",
        "Jobs that failed in the last ten minutes, by error: the 50 most frequent.",
        _by_name(figures["failures"]),
        ("error_code",),
    )
    yield gauge(
        "pgscribe_workers",
        "Workers that were heard of lately (alive), and those that fell silent (stalled).",
        _by_name(figures["workers"]),
        ("state",),
    )


def _of_light_jobs(figures: Mapping[str, Any]) -> Iterator[Metric]:
    deliveries = figures["deliveries"]
    yield gauge(
        "pgscribe_webhook_deliveries",
        "Webhooks that have not ended.",
        {(row["state"],): row["count"] for row in deliveries},
        ("state",),
    )
    yield gauge(
        "pgscribe_webhook_oldest_seconds",
        "How old the oldest of them is; 0: there is none.",
        {(row["state"],): row["oldest"] or 0 for row in deliveries},
        ("state",),
    )
    yield gauge(
        "pgscribe_webhooks_ended_10m",
        "Webhooks that were delivered or given up in the last ten minutes.",
        _by_name(figures["delivered"]),
        ("status",),
    )
    yield gauge(
        "pgscribe_webhook_endpoints_disabled",
        "Endpoints that pgscribe has disabled.",
        {(): figures["disabled_endpoints"]},
    )
    yield gauge(
        "pgscribe_maintenance_jobs",
        "Maintenance that is due or runs.",
        _by_name(figures["maintenance"]),
        ("state",),
    )


def _by_name(values: Mapping[str, float]) -> Values:
    return {(name,): value for name, value in values.items()}
