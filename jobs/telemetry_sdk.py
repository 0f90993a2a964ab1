"""OpenTelemetry's SDK, set up by its own variables. An extra: ``pgscribe[telemetry]``."""

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import entry_points

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import Tracer

from jobs import __version__
from jobs.errors import SettingsError

EXIT_TIMEOUT = 2.0  # seconds
_EXPORTERS = "opentelemetry_traces_exporter"
_PROTOCOLS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


class _Ids(RandomIdGenerator):
    """Random ids, but for a span whose ids are known before."""

    def __init__(self) -> None:
        self.known: ContextVar[tuple[int, int] | None] = ContextVar("known_ids", default=None)

    def generate_trace_id(self) -> int:
        known = self.known.get()
        return super().generate_trace_id() if known is None else known[0]

    def generate_span_id(self) -> int:
        known = self.known.get()
        return super().generate_span_id() if known is None else known[1]


@dataclass(frozen=True)
class SdkTracing:
    """Makes spans with the SDK; see ``jobs.telemetry.Tracing``."""

    provider: TracerProvider
    tracer: Tracer
    ids: _Ids

    def is_sampled(self, trace_id: int) -> bool:
        """Whether a trace of that id is exported if nobody else has decided."""
        result = self.provider.sampler.should_sample(Context(), trace_id, "job")
        return result.decision is Decision.RECORD_AND_SAMPLE

    @contextmanager
    def with_ids(self, trace_id: int, span_id: int) -> Iterator[None]:
        """Let the span that is made meanwhile have these ids."""
        token = self.ids.known.set((trace_id, span_id))
        try:
            yield
        finally:
            self.ids.known.reset(token)


def start(service: str) -> SdkTracing:
    """Return what exports as the environment says. Raises ``SettingsError``."""
    ids = _Ids()
    try:
        provider = TracerProvider(
            resource=_resource(service), id_generator=ids, shutdown_on_exit=False
        )
        for exporter in _exporters():
            provider.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError as exc:  # their texts name the setting, and a number at most
        raise SettingsError(
            f"OpenTelemetry's settings are unusable: {exc}; see the variables OTEL_BSP_…, "
            "OTEL_SPAN_… and OTEL_ATTRIBUTE_…"
        ) from exc
    _export_the_rest_on_exit(provider)
    return SdkTracing(provider, provider.get_tracer("pgscribe", __version__), ids)


def _export_the_rest_on_exit(provider: TracerProvider) -> None:
    """Let the process end although nobody takes its spans, which the SDK tries for 10 s or more."""
    is_exiting, is_done = threading.Event(), threading.Event()

    def shut_down() -> None:
        is_exiting.wait()
        provider.shutdown()
        is_done.set()

    def on_exit() -> None:
        is_exiting.set()
        is_done.wait(EXIT_TIMEOUT)

    # Started now: a process that exits starts no threads.
    threading.Thread(target=shut_down, name="last spans", daemon=True).start()
    atexit.register(on_exit)


def _resource(service: str) -> Resource:
    found = Resource.create()
    usual = Resource({SERVICE_NAME: service, SERVICE_VERSION: __version__})
    says = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return usual.merge(found) if says else found.merge(usual)


def _exporters() -> Iterator[SpanExporter]:
    names = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    for name in filter(None, map(str.strip, names.split(","))):
        yield _exporter(name)


def _exporter(name: str) -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    entry = _PROTOCOLS.get(protocol, protocol) if name == "otlp" else name
    found = entry_points(group=_EXPORTERS, name=entry)
    if not found:
        known = sorted(entry_points(group=_EXPORTERS).names)
        raise SettingsError(
            f"OTEL_TRACES_EXPORTER: nothing that is installed exports to {name} by {protocol}; "
            f"there is {', '.join(known)}"
        )
    try:
        exporter: SpanExporter = next(iter(found)).load()()
    except Exception as exc:
        raise SettingsError(
            f"OTEL_TRACES_EXPORTER: {name} can't be used ({type(exc).__name__}); see the variables "
            "OTEL_EXPORTER_…"
        ) from exc
    return exporter
