"""The spans that are made in this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobs import telemetry, telemetry_sdk


@contextmanager
def made_here() -> Iterator[InMemorySpanExporter]:
    """Yield what has the spans that are made meanwhile."""
    with patch.dict(os.environ, {"OTEL_TRACES_EXPORTER": " , "}):
        tracing = telemetry_sdk.start("test")
    exporter = InMemorySpanExporter()
    tracing.provider.add_span_processor(SimpleSpanProcessor(exporter))
    before = telemetry.use(tracing)
    try:
        yield exporter
    finally:
        telemetry.use(before)
        tracing.provider.shutdown()
