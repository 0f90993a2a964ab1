"""What tracing costs a job: ``python -m benchmarks.tracing``.

Jobs take the whole way, from the insert through the queue and the calls of four chunks to the
result, but the calls return at once. One worker, ten jobs at a time. In each round two batches run
one after the other, in turning order: without tracing, and with spans that are exported over HTTP
to another process. Medians of the rounds, per job: seconds of the worker's processor, which other
work on the machine changes little, and of the clock.

The last line is one JSON object.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self
from uuid import uuid4

import click
import psycopg

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs import telemetry, worker
from jobs.compute.base import Compute, OnProgress, Outcome, Prepare, Transcribe, Usage
from jobs.dev import free_port
from jobs.models import Segment, Transcript
from jobs.settings import Settings
from jobs.telemetry import SECOND, Steps, Tracing
from modal_functions.plan import SAMPLE_RATE, Plan, Span

CHUNKS = 4
LENGTH = 60 * SAMPLE_RATE
PLAN = Plan(
    "'a.wav'",
    Path("/nowhere/a.pcm"),
    tuple(Span(n * LENGTH, (n + 1) * LENGTH) for n in range(CHUNKS)),
)
SAID = Transcript("hello", "en", 60.0, (Segment(0, 60, "hello", 0, 0, 1),), "none", "base")


class AtOnce:
    """A compute side whose calls are over as soon as they have begun."""

    def __init__(self) -> None:
        self._answers: dict[str, Outcome] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def spawn(self, request: Prepare | Transcribe) -> str:
        """Start a call, which is over."""
        call_id = str(uuid4())
        steps = Steps(time.time_ns(), SECOND // 1000, (("a", 0, 1000), ("b", 1000, 1000)))
        value = PLAN.to_dict() if isinstance(request, Prepare) else SAID.to_dict()
        self._answers[call_id] = Outcome(value, Usage(), steps)
        return call_id

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:  # noqa: ARG002
        """Return what it has returned."""
        return self._answers.pop(call_id)

    async def cancel(self, call_id: str) -> None:
        """Do nothing."""

    async def discard(self, pcm: str) -> None:
        """Do nothing."""


def make_compute(settings: Settings) -> Compute:  # noqa: ARG001
    """Return what takes the compute side's place."""
    return AtOnce()


async def run_batch(settings: Settings, jobs: int) -> tuple[float, float]:
    """Run so many jobs and return what each took, in seconds of the processor and of the clock."""
    url = settings.database_url.get_secret_value()
    user = str(uuid4())
    audio = settings.storage_dir / user / "a.wav"
    audio.parent.mkdir(parents=True)
    audio.write_bytes(b"audio")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute("select public.pause_queue('transcription')")
        await conn.execute("insert into auth.users (id) values (%s)", (user,))
        await conn.execute(
            "insert into processing_jobs (user_id, file_path) select %s, %s"
            " from generate_series(1, %s)", (user, f"{user}/a.wav", jobs),
        )  # fmt: skip
        stop = asyncio.Event()
        running = asyncio.create_task(worker.run(settings, stop, asyncio.Event()))
        while (await (await conn.execute(WORKERS)).fetchone()) == (0,):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        processor, clock = time.process_time(), time.perf_counter()
        await conn.execute("select public.resume_queue('transcription')")
        while (await (await conn.execute(LEFT, (user,))).fetchone()) != (0,):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        took = time.process_time() - processor, time.perf_counter() - clock
        stop.set()
        await running
        failed = await (await conn.execute(FAILED, (user,))).fetchone()
        assert failed == (0,), failed
    return took[0] / jobs, took[1] / jobs


WORKERS = b"select count(*) from procrastinate.procrastinate_workers"
LEFT = b"select count(*) from processing_jobs where user_id = %s and completed_at is null"
FAILED = b"select count(*) from processing_jobs where user_id = %s and status <> 'completed'"


def measure(folder: Path, jobs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians, with and without tracing."""
    server = EmbeddedPostgres(folder / "postgres")
    took: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
    with server:
        server.create_database("benchmark")
        server.bootstrap("benchmark")
        url = server.url(database="benchmark")
        migrate.migrate(url)
        settings = Settings.load(
            database_url=url, storage_dir=folder / "storage", worker_concurrency=10
        )
        ways: dict[str, Tracing | None] = {"off": None, "on": telemetry.use(None)}
        for number in range(rounds + 1):
            for way in sorted(ways, reverse=bool(number % 2)):
                telemetry.use(ways[way])
                batch = asyncio.run(run_batch(settings, jobs))
                if number:  # the first one warms up
                    took[way].append(batch)
    server.remove()
    return {
        way: {
            "processor_ms": 1000 * statistics.median(batch[0] for batch in batches),
            "clock_ms": 1000 * statistics.median(batch[1] for batch in batches),
        }
        for way, batches in took.items()
    }


@click.command()
@click.option("--jobs", default=300, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(jobs: int, rounds: int) -> None:
    """Measure."""
    worker.make_compute = make_compute
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        collector = subprocess.Popen(
            [sys.executable, "-m", "examples.see_traces", f"{folder}/spans.jsonl", str(port)]
        )
        try:
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
            telemetry.configure("benchmark")
            medians = measure(Path(folder), jobs, rounds)
        finally:
            collector.kill()
            collector.wait()
    click.echo(json.dumps(medians))


if __name__ == "__main__":
    main()
