"""What a worker counts, as Prometheus reads it; docs/metrics.md lists all of it.

One registry for the process, as a process has one worker. No label names a user, a path or a URL,
and each has few values.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jobs import __version__
from jobs.database import Pool
from jobs.errors import CallLost, CallTimeout, ComputeUnavailable, PgscribeError

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

UNREACHABLE_FOR = 300.0  # seconds after which nobody knows any more whether it still is
MAX_CODES = 100  # error codes that have a series of their own
Values = dict[tuple[str, ...], float]  # by the labels' values
_CODE = re.compile(r"[a-z][a-z0-9_]{0,59}")

#: Of a single answer, from a statement to a page.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Of a wait that should be short and may be hours.
WAIT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
#: Of what is transcribed.
LONG = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)
FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


def new_registry() -> CollectorRegistry:
    """Return a registry that tells of the process and of pgscribe's version."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    info = Gauge("pgscribe_build_info", "Always 1.", ["version"], registry=registry)
    info.labels(__version__).set(1)
    return registry


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Return what is in a registry, in a form that an ``Accept`` header takes, and its type."""
    try:
        encode, media_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it asks for a version that is none
        encode, media_type = choose_encoder("")
    return encode(registry), media_type


REGISTRY = new_registry()

_PICKUP = Histogram(
    "pgscribe_job_pickup_seconds",
    "From when a job could start until a worker had claimed it.",
    buckets=WAIT,
    registry=REGISTRY,
)
_ATTEMPT_SECONDS = Histogram(
    "pgscribe_attempt_seconds",
    "What attempts at jobs took.",
    ["outcome"],
    buckets=LONG,
    registry=REGISTRY,
)
_ATTEMPTS = Counter(
    "pgscribe_attempts",
    "Attempts at jobs that ended, by outcome and error.",
    ["outcome", "error_code"],
    registry=REGISTRY,
)
_FACTOR = Histogram(
    "pgscribe_real_time_factor",
    "Audio-seconds of a job by the seconds of its last attempt.",
    buckets=FACTORS,
    registry=REGISTRY,
)
_AUDIO = Counter(
    "pgscribe_audio_seconds", "Audio of the jobs that were completed.", registry=REGISTRY
)
_LIGHT = Counter(
    "pgscribe_light_attempts",
    "Attempts at webhooks and maintenance that ended.",
    ["queue", "outcome"],
    registry=REGISTRY,
)
CHUNKS = Counter("pgscribe_chunks", "Chunks that were transcribed and stored.", registry=REGISTRY)
_CALLS_STARTED = Counter(
    "pgscribe_calls_started", "Calls that were started.", ["kind"], registry=REGISTRY
)
_CALLS = Counter(
    "pgscribe_calls", "Calls that ended, or are waited for no more.", ["kind", "outcome"],
    registry=REGISTRY,
)  # fmt: skip
_CALL_SECONDS = Histogram(
    "pgscribe_call_seconds",
    "What it took to get what a call returned.",
    ["kind"],
    buckets=LONG,
    registry=REGISTRY,
)
_GPU = Counter(
    "pgscribe_gpu_seconds", "Seconds of machines with a GPU.", ["gpu"], registry=REGISTRY
)
_CPU = Counter("pgscribe_cpu_seconds", "Seconds of machines without one.", registry=REGISTRY)
_COST = Counter(
    "pgscribe_estimated_cost_dollars",
    "What calls cost by the prices in the settings.",
    ["gpu"],
    registry=REGISTRY,
)
_WEBHOOKS = Counter(
    "pgscribe_webhook_requests", "Requests of webhooks.", ["outcome", "status"], registry=REGISTRY
)
_WEBHOOK_SECONDS = Histogram(
    "pgscribe_webhook_request_seconds",
    "Until receivers answered.",
    ["status"],
    buckets=SHORT,
    registry=REGISTRY,
)
TURN_SECONDS = Histogram(
    "pgscribe_worker_turn_seconds",
    "Transactions that end and claim jobs.",
    buckets=SHORT,
    registry=REGISTRY,
)
NOTIFICATIONS = Counter(
    "pgscribe_worker_notifications",
    "Notifications of new jobs that woke this worker.",
    ["kind"],
    registry=REGISTRY,
)
POLLS = Counter(
    "pgscribe_worker_polls", "Looks for jobs that nobody had told of.", registry=REGISTRY
)
CONNECTIONS = Counter(
    "pgscribe_worker_connections",
    "Connections to the queue; all but the first replaced one that was lost or deaf.",
    registry=REGISTRY,
)
PRESUMED_DEAD = Counter(
    "pgscribe_worker_presumed_dead",
    "How often others took this worker for dead.",
    registry=REGISTRY,
)
SWEPT = Counter(
    "pgscribe_worker_swept_jobs",
    "Jobs of workers presumed dead that this one gave back to the queue.",
    registry=REGISTRY,
)


class Reachability:
    """Whether the side that transcribes answered when it was last asked."""

    def __init__(self) -> None:
        self._failed_at: float | None = None

    def note(self, *, answered: bool) -> None:
        """Note what came of asking."""
        self._failed_at = None if answered else time.monotonic()

    @property
    def holds(self) -> bool:
        """Whether it is reachable, as far as anybody knows."""
        failed_at = self._failed_at
        return failed_at is None or time.monotonic() - failed_at > UNREACHABLE_FOR


COMPUTE = Reachability()
Gauge(
    "pgscribe_compute_reachable",
    "1 unless the side that transcribes did not answer lately.",
    registry=REGISTRY,
).set_function(lambda: float(COMPUTE.holds))


class _Codes:
    """Error codes that have been seen. What is over ``MAX_CODES`` counts as ``other``."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def label(self, code: str | None) -> str:
        if code is None:
            return "none"
        if code not in self._known:
            if len(self._known) >= MAX_CODES or not _CODE.fullmatch(code):
                return "other"
            self._known.add(code)
        return code


_codes = _Codes()


@functools.lru_cache(1000)
def _of_attempts(outcome: str, error_code: str | None) -> tuple[Counter, Histogram]:
    """Return what counts such attempts: looking for it takes longer than counting."""
    ended = _ATTEMPTS.labels(outcome, _codes.label(error_code))
    return ended, _ATTEMPT_SECONDS.labels(outcome)


def attempt_ended(
    outcome: str, error_code: str | None, seconds: float, audio_seconds: float | None
) -> None:
    """Count an attempt at a job. ``audio_seconds``: of the job, if that is completed."""
    ended, took = _of_attempts(outcome, error_code)
    ended.inc()
    took.observe(seconds)
    if audio_seconds is not None:
        _AUDIO.inc(audio_seconds)
        _FACTOR.observe(audio_seconds / max(seconds, 1e-3))


def light_attempt_ended(queue: str, outcome: str) -> None:
    """Count an attempt at a webhook or at maintenance."""
    _LIGHT.labels(queue, outcome).inc()


def picked_up(waited: float | None) -> None:
    """Note how long a job has waited for a worker, if that is known."""
    if waited is not None:
        _PICKUP.observe(waited)


def call_started(kind: str) -> None:
    """Count a call that the compute side has taken."""
    COMPUTE.note(answered=True)
    _CALLS_STARTED.labels(kind).inc()


def not_answered(error: PgscribeError) -> None:
    """Note that somebody did not answer, and will be asked again."""
    if isinstance(error, ComputeUnavailable):
        COMPUTE.note(answered=False)


@contextmanager
def waiting_for_call(kind: str) -> Iterator[None]:
    """Count what a call returns, and how long that took."""
    started = time.monotonic()
    try:
        yield
    except PgscribeError as exc:
        if not isinstance(exc, CallTimeout):  # then nobody knows
            COMPUTE.note(answered=not isinstance(exc, ComputeUnavailable))
        _CALLS.labels(kind, _call_outcome(exc)).inc()
        raise
    COMPUTE.note(answered=True)
    _CALLS.labels(kind, "returned").inc()
    _CALL_SECONDS.labels(kind).observe(time.monotonic() - started)


def _call_outcome(error: PgscribeError) -> str:
    names: dict[type[PgscribeError], str] = {
        CallLost: "lost",
        CallTimeout: "timeout",
        ComputeUnavailable: "unavailable",
    }
    return names.get(type(error), "failed")


def used(gpu: str, gpu_seconds: float, cpu_seconds: float, prices: tuple[float, float]) -> None:
    """Count what a call took. ``prices``: of a second with a GPU, and of one without."""
    _GPU.labels(gpu).inc(gpu_seconds)
    _CPU.inc(cpu_seconds)
    _COST.labels(gpu).inc(gpu_seconds * prices[0] + cpu_seconds * prices[1])


def webhook_sent(outcome: str, status: int | None, seconds: float) -> None:
    """Count a webhook's request and what was answered, if anything."""
    status_class = f"{status // 100}xx" if status else "none"
    _WEBHOOKS.labels(outcome, status_class).inc()
    _WEBHOOK_SECONDS.labels(status_class).observe(seconds)


class Figures(Collector):
    """Figures that are read when somebody asks. Empty at first, so that any registry takes it."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Say nothing before it is time."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the figures."""
        return self._read()


def gauge(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    """Return values by their labels as a metric."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, values: Values, labels: tuple[str, ...] = ()) -> Metric:
    """Return values that only grow, by their labels, as a metric."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def of_pool(pool: Pool) -> Iterator[Metric]:
    """Yield what a pool of connections does."""
    stats: dict[str, Any] = pool.get_stats()
    idle = stats.get("pool_available", 0)
    yield gauge(
        "pgscribe_pool_connections",
        "Connections to the database, in use or idle.",
        {("in_use",): stats.get("pool_size", 0) - idle, ("idle",): idle},
        ("state",),
    )
    yield gauge(
        "pgscribe_pool_max_connections",
        "Connections that there may be.",
        {(): stats.get("pool_max", 0)},
    )
    yield gauge(
        "pgscribe_pool_waiting",
        "How many wait for a connection.",
        {(): stats.get("requests_waiting", 0)},
    )
    yield counter(
        "pgscribe_pool_requests",
        "How often a connection was asked for.",
        {(): stats.get("requests_num", 0)},
    )
    yield counter(
        "pgscribe_pool_errors",
        "How often there was none in time.",
        {(): stats.get("requests_errors", 0)},
    )
