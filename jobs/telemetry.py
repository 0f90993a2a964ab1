"""Traces, as OpenTelemetry has them.

A job's spans are made by web servers and workers that never meet, and any of them may be killed.
So the ids of those spans that have children elsewhere, the job's and its attempts', are not drawn
but follow from the job's id: each process knows its spans' parents without asking anybody. See
docs/decisions/0010-traces-and-logs.md.

Of an error a span has the code only: messages may have anything in them.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol, Self
from uuid import UUID

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import (
    INVALID_SPAN,
    INVALID_SPAN_CONTEXT,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jobs.errors import PgscribeError, SettingsError

Attributes = Mapping[str, str | bool | int | float]

SECOND = 1_000_000_000  # spans' times are in nanoseconds
#: Each says that spans are to be exported; without any of them nothing is.
WANTED_BY = (
    "OTEL_TRACES_EXPORTER",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)

MAX_STEPS = 20  # of a call
MAX_NAME = 40  # characters of a step

_w3c = TraceContextTextMapPropagator()


class Tracing(Protocol):
    """What makes spans and exports them."""

    @property
    def tracer(self) -> Tracer:
        """What makes spans."""

    def is_sampled(self, trace_id: int) -> bool:
        """Whether a trace of that id is exported if nobody else has decided."""

    def with_ids(self, trace_id: int, span_id: int) -> AbstractContextManager[None]:
        """Let the span that is made meanwhile have these ids."""


_tracing: Tracing | None = None


def configure(service: str) -> None:
    """Export spans as the variables ``OTEL_…`` say, if they say so.

    ``service`` is what this process is called unless they say. Raises ``SettingsError``.
    """
    name = next((name for name in WANTED_BY if os.environ.get(name)), None)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if name is None or disabled or exporter == "none":
        return
    if find_spec("opentelemetry.sdk") is None:
        raise SettingsError(
            f"{name}: is set, but what exports traces is not installed; "
            "run: pip install 'pgscribe[telemetry]'"
        )
    from jobs import telemetry_sdk

    use(telemetry_sdk.start(service))


def use(tracing: Tracing | None) -> Tracing | None:
    """Make spans with this from now on, or none; return what did so before."""
    global _tracing
    before, _tracing = _tracing, tracing
    return before


def is_on() -> bool:
    """Whether spans are made."""
    return _tracing is not None


# Where a trace goes on


def traceparent() -> str | None:
    """Return the current place in a trace as W3C Trace Context writes it, if there is one."""
    current = trace.get_current_span().get_span_context()
    if not current.is_valid:
        return None
    return f"00-{current.trace_id:032x}-{current.span_id:016x}-{current.trace_flags:02x}"


def caller(headers: Sequence[str]) -> SpanContext | None:
    """Return the caller's place, by all headers ``traceparent``; what is invalid counts as none."""
    return _read(headers[0]) if len(headers) == 1 else None


def _read(value: str) -> SpanContext | None:
    found = _w3c.extract({"traceparent": value}, context=Context())
    place = trace.get_current_span(found).get_span_context()
    return place if place.is_valid else None


@contextmanager
def going_on(place: SpanContext | None) -> Iterator[None]:
    """Pass a caller's place on, without a span of our own; or none, whatever is current now."""
    token = attach(_in(place))
    try:
        yield
    finally:
        detach(token)


def _in(place: SpanContext | None) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(place or INVALID_SPAN_CONTEXT), Context())


# Spans


@contextmanager
def span(
    name: str,
    attributes: Attributes | None = None,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    within: SpanContext | Span | None = None,
) -> Iterator[Span]:
    """Make a span of what happens meanwhile; ``within``: not in the current one but in this.

    What is raised becomes its ``error.type``. Without tracing the span takes everything in and
    does nothing.
    """
    if _tracing is None:
        yield INVALID_SPAN
        return
    place = within.get_span_context() if isinstance(within, Span) else within
    made = _tracing.tracer.start_span(
        name, None if within is None else _in(place), kind, dict(attributes or {})
    )
    with current(made):
        yield made


@contextmanager
def current(made: Span) -> Iterator[None]:
    """Let a span be the current one, then end it."""
    token = attach(trace.set_span_in_context(made))
    try:
        yield
    except BaseException as exc:
        note_error(made, exc)
        raise
    finally:
        detach(token)
        if made.is_recording():  # it may have been ended early
            made.end()


def past_span(
    name: str,
    within: SpanContext | Span,
    start: int,
    end: int,
    attributes: Attributes | None = None,
) -> None:
    """Make a span of what is over."""
    if _tracing is None:
        return
    place = within.get_span_context() if isinstance(within, Span) else within
    made = _tracing.tracer.start_span(
        name, _in(place), attributes=dict(attributes or {}), start_time=start
    )
    made.end(max(start, end))


def note_error(made: Span, exc: BaseException) -> None:
    """Say of a span that it failed, and by which code; one that was told to stop did not fail."""
    if not made.is_recording():
        return
    if isinstance(exc, asyncio.CancelledError):
        made.set_attribute("pgscribe.stopped", value=True)
        return
    failed(made, exc.code if isinstance(exc, PgscribeError) else type(exc).__name__)


def failed(made: Span, code: str) -> None:
    """Say of a span that it failed, by this code."""
    made.set_attribute("error.type", code)
    made.set_status(StatusCode.ERROR)


# Jobs


@dataclass(frozen=True, slots=True)
class JobTrace:
    """What the ids of a job's spans follow from: those of its caller's trace, and its own id.

    ``run``: which of its runs it is, where it was retried by hand.
    """

    job_id: UUID
    traceparent: str | None
    run: str | None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read what ``pgscribe.job_trace`` returns."""
        return cls(UUID(row["job_id"]), row["traceparent"], row["run"])

    @property
    def caller(self) -> SpanContext | None:
        """The span in which the job was inserted, if that is known."""
        return _read(self.traceparent) if self.traceparent else None

    def place(self, attempt: int | None = None) -> SpanContext:
        """Return the place of the job's span, or of one of its attempts'."""
        caller = self.caller
        trace_id = caller.trace_id if caller else self._known_id(16, str(self.job_id))
        if caller is not None:
            flags = caller.trace_flags
        else:
            flags = TraceFlags(_tracing is not None and _tracing.is_sampled(trace_id))
        span_id = self._known_id(8, f"{self.job_id} {self.run} {attempt}")
        return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)

    @staticmethod
    def _known_id(size: int, seed: str) -> int:
        """Return an id with random bits all over, which sampling goes by; UUIDs have others."""
        return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:size], "big") or 1

    def start(
        self,
        name: str,
        attributes: Attributes,
        *,
        attempt: int | None = None,
        start: int | None = None,
    ) -> Span:
        """Start the span of the job, or of one of its attempts, which is not the current one yet.

        A span that nobody ends is not exported; so whoever goes on may start it again.
        """
        if _tracing is None:
            return INVALID_SPAN
        place = self.place(attempt)
        before = attempt - 1 if attempt is not None else 0
        with _tracing.with_ids(place.trace_id, place.span_id):
            return _tracing.tracer.start_span(
                name,
                _in(self.caller if attempt is None else self.place()),
                SpanKind.CONSUMER if attempt is None else SpanKind.INTERNAL,
                dict(attributes),
                [Link(self.place(before))] if before else [],
                start_time=start,
            )


# Calls


def add_steps(call: Span, steps: "Steps | None", started: int | None) -> None:
    """Make spans of a call's steps. They happened on another machine, whose clock may be wrong.

    So they are moved until the call was over by now and, where it is known when that ``started``,
    had not begun before.
    """
    if _tracing is None or steps is None:
        return
    now = time.time_ns()
    begin = min(steps.at, now - steps.duration)
    if started is not None:
        begin = max(begin, started)
    for name, offset, duration in steps.parts:
        past_span(name, call, begin + offset, begin + offset + duration)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a call was busy with: ``parts`` are names, when they began and how long they took.

    All in nanoseconds; ``at`` is when the function began, by its machine's clock.
    """

    at: int
    duration: int
    parts: tuple[tuple[str, int, int], ...]

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Self | None:
        """Read what a function reports, if it does: those deployed before do not."""
        try:
            found = answer["steps"]
            return cls(
                _nanoseconds(found["at"]),
                _nanoseconds(found["seconds"]),
                tuple(
                    (str(name)[:MAX_NAME], _nanoseconds(offset), _nanoseconds(seconds))
                    for name, offset, seconds in found["parts"][:MAX_STEPS]
                ),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            return None


def _nanoseconds(seconds: float) -> int:
    return int(float(seconds) * SECOND)  # it may be a text, which would be repeated
