"""Traces: from a request or an insert to the webhook, by real processes and a real exporter.

One journey, which takes seconds, and what its spans and logs have to say.
"""

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import ffmpeg
import httpx2
import imageio_ffmpeg
import psycopg
import pytest

from db.embedded import EmbeddedPostgres
from examples.see_traces import Span, load, receiving, trees
from jobs.database import make_pool
from jobs.models import Attempt
from jobs.settings import Settings
from jobs.tracing import JobTraces
from tests import ports, processes
from tests.faults.fleet import until
from tests.receiver import receiving as receiving_webhooks
from tests.streams import Work
from web.auth import issue_token

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID = CALLER.split("-")[1]
SLACK = 0.05  # seconds: processes read clocks one after the other
STALL_TIMEOUT = 5  # seconds
PATIENCE = 120.0  # seconds for what takes a few on an idle machine


class Place:
    """Everything: a web server, workers, and what receives spans and webhooks."""

    def __init__(self, settings: Settings, folder: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = folder
        self.spans = folder / "spans.jsonl"
        collector = stack.enter_context(receiving(self.spans))
        self.environment = processes.environment(
            settings,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector,
            OTEL_BSP_SCHEDULE_DELAY="100",  # milliseconds
            PGSCRIBE_LOG_FORMAT="json",
            PGSCRIBE_STALL_TIMEOUT=str(STALL_TIMEOUT),
            PGSCRIBE_WEBHOOK_NETWORKS="127.0.0.0/8",
        )
        port = stack.enter_context(ports.reserved())
        self.url = f"http://127.0.0.1:{port}"
        # Its spans are exported when it is stopped, or never.
        late = self.environment | {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
        self._run("web", "--port", str(port), environment=late)

    def start_worker(self) -> Any:
        return self._run("worker")

    def _run(self, *arguments: str, environment: dict[str, str] | None = None) -> Any:
        log = self._folder / f"{arguments[0]}.log"
        running = processes.command(log, environment or self.environment, *arguments)
        return self._stack.enter_context(running)


@dataclass(frozen=True)
class Journey:
    """What came of three jobs: two submitted together, one of silence; one inserted with SQL.

    The worker that had the last one was killed.
    """

    user: UUID
    job: UUID
    silent: UUID
    inserted: UUID
    row: dict[str, Any]  # of job
    said: str
    token: str
    requests: dict[str, UUID]  # the job that a webhook was about, by its traceparent
    spans: list[Span]
    folder: Path

    def of(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span["trace_id"] == trace_id]

    def lines(self, process: str) -> list[dict[str, Any]]:
        """Return what the processes of that kind have logged."""
        return [json.loads(line) for line in self.text(f"{process}.log").splitlines()]

    def text(self, file: str) -> str:
        return (self.folder / file).read_text(encoding="utf-8")


def upload(http: httpx2.Client, audio: Path) -> str:
    """Upload a file under a name that nobody else has to know, and return its path."""
    answer = http.put(f"/uploads/private-{audio.name}", content=audio.read_bytes())
    path: str = answer.raise_for_status().json()["filePath"]
    return path


def submit(http: httpx2.Client, webhook_url: str, *paths: str) -> list[UUID]:
    """Submit jobs together, within a trace of ours, and return their ids."""
    jobs = [{"filePath": path, "webhookUrl": webhook_url} for path in paths]
    headers = {"traceparent": CALLER, "x-request-id": "our-request"}
    answer = http.post("/process/batch", json={"jobs": jobs}, headers=headers)
    return [UUID(job["jobId"]) for job in answer.raise_for_status().json()["jobs"]]


def trace_id_of(job: UUID) -> str:
    """Return the id of the trace that a job of nobody's trace has."""
    return hashlib.sha256(str(job).encode()).hexdigest()[:32]


def only(spans: Iterable[Span], name: str, **attributes: object) -> Span:
    named = {f"pgscribe.{key}": value for key, value in attributes.items()}
    (found,) = [
        span
        for span in spans
        if span["name"] == name and named.items() <= span["attributes"].items()
    ]
    return found


def shape(span: Span, spans: Sequence[Span]) -> list[Any]:
    """Return a span's name and the shapes of its children, in the order of their beginnings."""
    children = [child for child in spans if child["parent"] == span["span_id"]]
    assert all(span["start"] - SLACK <= child["start"] for child in children)
    return [span["name"], *(shape(child, spans) for child in children)]


DONE = [
    ["prepare", ["decode"], ["plan"]],
    ["transcribe", ["read"], ["transcribe"]],
    ["merge"],
    ["store"],
]


@pytest.fixture(scope="module")
def database_url(
    postgres: EmbeddedPostgres, database_names: Iterator[str], template: str
) -> Iterator[str]:
    name = next(database_names)
    postgres.create_database(name, template=template)
    yield postgres.url(database=name)
    postgres.drop_database(name)


@pytest.fixture(scope="module")
def journey(
    database_url: str, models_dir: Path, sample: Path, silence: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Journey:  # fmt: skip
    folder = tmp_path_factory.mktemp("journey")
    clip = folder / "clip.wav"
    recording = ffmpeg.input(str(sample), t=6).output(str(clip), ac=1, ar=16000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    settings = Settings.load(
        database_url=database_url,
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=folder / "storage",
        models_dir=models_dir,
        scratch_dir=folder / "scratch",
    )
    with ExitStack() as stack:
        work = stack.enter_context(Work(database_url))
        place = Place(settings, folder, stack)
        killed = place.start_worker()
        receiver = stack.enter_context(receiving_webhooks())
        user = uuid4()
        work.execute("insert into auth.users (id, email) values (%s, 'a@example.org')", (user,))
        token = issue_token(settings, user, lifetime=600)
        processes.wait_for_web(place.url)
        headers = {"Authorization": f"Bearer {token}"}
        http = stack.enter_context(httpx2.Client(base_url=place.url, headers=headers, timeout=30))
        paths = upload(http, clip), upload(http, silence)
        job, silent = submit(http, f"{receiver.url}?key=of-the-receiver", *paths)
        requests = {
            request.headers["traceparent"]: UUID(json.loads(request.body)["data"]["id"])
            for request in receiver.expect(2)
        }
        nonsense = {"traceparent": f"{CALLER[:-2]}xx"}
        row = http.get(f"/jobs/{job}", headers=nonsense).raise_for_status().json()
        inserted = work.insert(user, paths[0].partition("/")[2])
        until(
            lambda: any(
                span["name"] == "prepare" and span["trace_id"] == trace_id_of(inserted)
                for span in load(place.spans)
            ),
            "its preparation is over, and told of",
        )
        running = "select 1 from processing_job_chunks where job_id = %s and call_id is not null"
        until(lambda: work.execute(running, (inserted,)), "its chunk is being transcribed")
        os.kill(killed.pid, signal.SIGKILL)
        place.start_worker()
        ended = "select 1 from processing_jobs where id = %s and completed_at is not null"
        until(lambda: work.execute(ended, (inserted,)), "another worker has done it", PATIENCE)
    spans = load(place.spans)
    (folder / "trees.txt").write_text("\n".join(trees(spans)), encoding="utf-8")
    return Journey(
        user, job, silent, inserted, row, row["result"]["text"], token, requests, spans, folder
    )


def test_a_request_its_jobs_their_calls_and_webhooks_are_one_trace(journey: Journey) -> None:
    traced = journey.of(TRACE_ID)
    request = only(traced, "POST /process/batch")
    assert request["parent"] == CALLER.split("-")[2]
    assert request["attributes"]["pgscribe.request.id"] == "our-request"
    assert request["attributes"]["http.response.status_code"] == 202
    done = only(traced, "job", **{"job.id": str(journey.job)})
    failed = only(traced, "job", **{"job.id": str(journey.silent)})
    assert {done["parent"], failed["parent"]} == {request["span_id"]}
    assert shape(done, traced) == [
        "job", ["queued"], ["attempt", *DONE], ["finish"], ["webhook"],
    ]  # fmt: skip
    assert shape(failed, traced) == [
        "job", ["queued"], ["attempt", ["prepare"]], ["finish"], ["webhook"],
    ]  # fmt: skip
    assert not done["failed"]
    assert done["attributes"]["pgscribe.audio_seconds"] == 6.0
    assert failed["failed"]
    assert failed["attributes"]["error.type"] == "no_speech"
    assert {span["service"] for span in traced} == {"pgscribe-web", "pgscribe-worker"}
    assert journey.row["traceparent"].split("-")[1:3] == [TRACE_ID, request["span_id"]]


def test_a_call_says_what_it_was_for(journey: Journey) -> None:
    (call,) = [s for s in journey.of(TRACE_ID) if "pgscribe.chunk" in s["attributes"]]
    assert call["attributes"].items() >= {
        "pgscribe.chunk": 0, "pgscribe.model": "base", "pgscribe.audio_seconds": 6.0,
        "pgscribe.call.resumed": False,
    }.items()  # fmt: skip
    assert call["attributes"]["pgscribe.call.id"].startswith("local-")


def test_a_receiver_can_go_on_with_the_trace(journey: Journey) -> None:
    traced = journey.of(TRACE_ID)
    assert set(journey.requests.values()) == {journey.job, journey.silent}
    for traceparent, about in journey.requests.items():
        _, trace_id, span_id, _ = traceparent.split("-")
        (delivery,) = [span for span in traced if span["span_id"] == span_id]
        assert (delivery["name"], delivery["trace_id"]) == ("webhook", trace_id)
        assert delivery["parent"] == only(traced, "job", **{"job.id": str(about)})["span_id"]
        assert delivery["attributes"]["http.response.status_code"] == 204


def test_spans_last_as_long_as_what_they_are_about(journey: Journey) -> None:
    traced = journey.of(TRACE_ID)
    job = only(traced, "job", **{"job.id": str(journey.job)})
    inserted, ended = (
        datetime.fromisoformat(journey.row[name]).timestamp()
        for name in ("created_at", "completed_at")
    )
    assert job["start"] == pytest.approx(inserted, abs=SLACK)
    assert job["end"] == pytest.approx(ended, abs=0.5)
    for span in traced:
        assert span["start"] <= span["end"]
        parents = [other for other in traced if other["span_id"] == span["parent"]]
        if span["name"] not in {"job", "webhook"}:  # which go on when their parents are over
            assert all(span["end"] <= parent["end"] + SLACK for parent in parents)


def test_a_job_of_nobodys_trace_has_its_own_which_goes_on_when_a_worker_is_killed(
    journey: Journey,
) -> None:
    own_id = trace_id_of(journey.inserted)
    own = journey.of(own_id)
    job = only(own, "job")
    assert job["parent"] is None
    assert shape(job, own) == [
        "job", ["queued"], ["attempt", DONE[0]], ["queued"],
        ["attempt", ["transcribe"], *DONE[1:]], ["finish"],
    ]  # fmt: skip
    lost, last = only(own, "attempt", attempt=1), only(own, "attempt", attempt=2)
    assert lost["attributes"]["error.type"] == "worker_lost"
    assert lost["end"] - lost["start"] > STALL_TIMEOUT / 2
    assert last["links"] == [lost["span_id"]]
    (call,) = [s for s in own if s["attributes"].get("error.type") == "call_lost"]
    assert call["attributes"]["pgscribe.call.resumed"] is True
    drawn = journey.text("trees.txt")
    assert f"trace {own_id}\n  job    " in drawn


@pytest.mark.parametrize(("outcome", "is_of_this_run"), [("retried", True), ("failed", False)])
def test_a_lost_attempt_belongs_to_the_run_that_it_was_made_in(
    conn: psycopg.Connection, user: UUID, outcome: str, *, is_of_this_run: bool
) -> None:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f"{user}/a.mp3"),
    ).fetchone()
    assert row is not None
    conn.execute(
        "insert into processing_job_attempts (job_id, attempt, started_at, outcome, error_code)"
        " values (%s, 1, now(), %s, 'worker_lost')", (row[0], outcome),
    )  # fmt: skip
    trace = conn.execute("select pgscribe.job_trace(%s, 2)", row).fetchone()
    assert trace is not None
    assert (trace[0]["lost"] is not None) is is_of_this_run


@pytest.mark.anyio
async def test_an_answer_that_was_slow_is_asked_for_again_since_its_times_may_be_wrong(
    conn: psycopg.Connection, user: UUID, settings: Settings
) -> None:
    path = f"{user}/a.mp3"
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, path),
    ).fetchone()
    assert row is not None
    attempt = Attempt(row[0], 1, user, path, {})

    def waits() -> bool:
        return bool(conn.execute("select 1 from pg_locks where not granted").fetchone())

    async with make_pool(settings, name="test", for_queue=True) as pool:
        with conn.transaction():
            conn.execute("lock table processing_jobs")
            reading = asyncio.create_task(JobTraces(pool, 3).read(attempt))
            await asyncio.to_thread(until, waits, "it waits for the lock")
            await asyncio.to_thread(conn.execute, "select pg_sleep(0.05)")
            locked_until = time.time_ns()
        read = await reading
    assert read is not None
    assert read.row is not None
    assert read.before > locked_until


def test_an_invalid_traceparent_starts_a_trace(journey: Journey) -> None:
    read = only(journey.spans, "GET /jobs/{job_id}")
    assert read["trace_id"] != TRACE_ID
    assert read["parent"] is None


def test_spans_have_no_secret_no_name_and_no_word(journey: Journey) -> None:
    spans, logs = journey.text("spans.jsonl"), journey.text("web.log") + journey.text("worker.log")
    for secret in (journey.token, "of-the-receiver", journey.said):
        assert secret
        assert secret not in spans + logs
    assert "private-clip" not in spans
    assert str(journey.user) not in spans


def test_lines_of_the_log_have_the_ids_of_what_they_are_about(journey: Journey) -> None:
    (failed,) = [line for line in journey.lines("worker") if "no_speech" in line["message"]]
    assert failed.items() >= {
        "level": "info", "logger": "jobs.execution", "job_id": str(journey.silent), "attempt": 1,
        "trace_id": TRACE_ID,
    }.items()  # fmt: skip
    (access,) = [line for line in journey.lines("web") if "/process/batch" in line["message"]]
    assert access["logger"] == "uvicorn.access"
    assert access["request_id"] == "our-request"
    request = only(journey.spans, "POST /process/batch")
    assert (access["trace_id"], access["span_id"]) == (TRACE_ID, request["span_id"])
