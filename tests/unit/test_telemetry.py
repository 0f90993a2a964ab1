"""Places in traces: read, passed on, and known without asking."""

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jobs import telemetry, telemetry_sdk
from jobs.errors import AudioNotFound, SettingsError
from jobs.telemetry import SECOND, JobTrace, Steps
from tests.spans import made_here

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
JOB = UUID("6b1f2b0e-9a1d-4f57-8a46-3f0c0f7c9a11")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*telemetry.WANTED_BY, "OTEL_SDK_DISABLED", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def made() -> Iterator[InMemorySpanExporter]:
    with made_here() as spans:
        yield spans


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [CALLER, CALLER],
        [""],
        ["nonsense"],
        [CALLER[:-1]],
        [f"ff{CALLER[2:]}"],
        [CALLER.upper()],
        [f"00-{'0' * 32}-00f067aa0ba902b7-01"],
        [f"00-{TRACE_ID}-{'0' * 16}-01"],
    ],
)
def test_what_is_no_place_counts_as_none(sent: list[str]) -> None:
    assert telemetry.caller(sent) is None


def test_a_place_is_passed_on_without_spans_of_our_own() -> None:
    assert telemetry.traceparent() is None
    with telemetry.going_on(telemetry.caller([CALLER])), telemetry.span("unseen"):
        assert telemetry.traceparent() == CALLER
    assert telemetry.traceparent() is None


def test_spans_of_a_job_are_known_before_they_are_made(made: InMemorySpanExporter) -> None:
    trace = JobTrace(JOB, CALLER, None)
    for _ in range(2):  # by two workers, of which the first is killed
        job = trace.start("job", {})
        attempt = trace.start("attempt", {}, attempt=2)
    attempt.end()
    job.end()
    second, whole = made.get_finished_spans()
    assert ids(whole)[0] == ids(second)[0] == TRACE_ID
    assert ids(whole)[1] == f"{trace.place().span_id:016x}"
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == CALLER.split("-")[2]
    assert second.parent is not None
    assert second.parent.span_id == trace.place().span_id
    assert [link.context.span_id for link in second.links] == [trace.place(1).span_id]


def test_a_job_of_nobodys_trace_has_its_own(made: InMemorySpanExporter) -> None:
    JobTrace(JOB, None, None).start("job", {}).end()
    JobTrace(JOB, None, "1.5").start("job", {}).end()  # it was retried by hand
    first, again = made.get_finished_spans()
    assert ids(first)[0] == ids(again)[0] == hashlib.sha256(str(JOB).encode()).hexdigest()[:32]
    assert ids(first)[1] != ids(again)[1]
    assert first.parent is None


def test_what_the_caller_does_not_sample_is_not_made(made: InMemorySpanExporter) -> None:
    trace = JobTrace(JOB, f"{CALLER[:-2]}00", None)
    trace.start("job", {}).end()
    with telemetry.span("webhook", within=trace.place()):
        assert telemetry.traceparent() is not None
        assert str(telemetry.traceparent()).endswith("-00")
    assert made.get_finished_spans() == ()


def test_a_share_of_the_jobs_is_sampled_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", " , ")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    traces = [JobTrace(uuid4(), None, None) for _ in range(200)]
    decisions = []
    for service in ("one", "another"):
        tracing = telemetry_sdk.start(service)
        telemetry.use(tracing)
        decisions.append([trace.place().trace_flags.sampled for trace in traces])
        made = [trace.start("job", {}).get_span_context().trace_flags.sampled for trace in traces]
        assert made == decisions[0]
        telemetry.use(None)
        tracing.provider.shutdown()
    assert decisions[0] == decisions[1]
    assert 50 < sum(decisions[0]) < 150


def test_of_an_error_a_span_has_only_the_code(made: InMemorySpanExporter) -> None:
    for error in (AudioNotFound("a private name"), ValueError("a private word")):
        with pytest.raises(type(error)), telemetry.span("work"):
            raise error
    with pytest.raises(asyncio.CancelledError), telemetry.span("work"):
        raise asyncio.CancelledError
    spans = made.get_finished_spans()
    assert [dict(span.attributes or {}) for span in spans] == [
        {"error.type": "file_not_found"},
        {"error.type": "ValueError"},
        {"pgscribe.stopped": True},
    ]
    assert [span.status.is_ok for span in spans] == [False, False, True]
    assert "private" not in "".join(span.to_json() for span in spans)


def test_steps_of_a_machine_with_a_wrong_clock_are_within_their_call(
    made: InMemorySpanExporter,
) -> None:
    started = time.time_ns() - 10 * SECOND
    for at in (time.time() - 9, time.time() + 3600, time.time() - 3600):
        answer = {"steps": {"at": at, "seconds": 8.0, "parts": [["read", 0, 1], ["hear", 1, 7.0]]}}
        with telemetry.span("call") as call:
            telemetry.add_steps(call, Steps.from_answer(answer), started)
    for span in made.get_finished_spans():
        if span.name != "call":
            assert span.start_time is not None
            assert span.end_time is not None
            assert started <= span.start_time < span.end_time <= time.time_ns()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"steps": None},
        {"steps": {"at": "now", "seconds": 1, "parts": []}},
        {"steps": {"at": 1.0, "seconds": 1, "parts": [["a", 1]]}},
        {"steps": {"at": float("inf"), "seconds": 1, "parts": []}},
    ],
)
def test_an_app_may_report_no_steps(answer: dict[str, Any]) -> None:
    begun = time.process_time()
    assert Steps.from_answer(answer) is None
    assert time.process_time() - begun < 0.5


def test_nothing_is_exported_unless_somebody_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry.configure("test")
    assert not telemetry.is_on()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "None ")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            telemetry.configure("test")
            assert not telemetry.is_on()


def test_what_can_not_export_says_what_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    with pytest.raises(SettingsError, match=r"^OTEL_TRACES_EXPORTER: .*pigeon.*otlp_proto"):
        telemetry.configure("test")
    monkeypatch.setattr(telemetry, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'pgscribe\[telemetry\]'"):
        telemetry.configure("test")
    assert not telemetry.is_on()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "many"),
    ],
)
def test_what_opentelemetry_refuses_is_an_error_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    about = name.removeprefix("OTEL_").removeprefix("BSP_")
    with pytest.raises(SettingsError, match=rf"(?i)^OpenTelemetry's settings .*{about}.*OTEL_BSP"):
        telemetry.configure("test")
    assert not telemetry.is_on()


def test_a_process_ends_though_its_collector_does_not_answer() -> None:
    made = "import sys; from jobs import telemetry; telemetry.configure('test')\n"
    made += "with telemetry.span('work'): pass\n"
    with socket.create_server(("127.0.0.1", 0)) as black_hole:
        endpoint = f"http://127.0.0.1:{black_hole.getsockname()[1]}"
        environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        begun = time.monotonic()
        subprocess.run([sys.executable, "-c", made], env=environment, check=True, timeout=60)
        took = time.monotonic() - begun
        black_hole.settimeout(0)
        connection, _ = black_hole.accept()  # it has tried
        connection.close()
    assert took < telemetry_sdk.EXIT_TIMEOUT + 7  # 10 s more without
