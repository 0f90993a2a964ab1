"""What tracing costs a job.

``python -m benchmarks.tracing JOBS ROUNDS`` is the process that measures: it has tracing's settings
for itself, and says what each round took as one JSON object.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self
from uuid import uuid4

import click
import psycopg

from benchmarks.figures import Measurement, Section
from db import migrate
from db.embedded import EmbeddedPostgres
from jobs import telemetry, worker
from jobs.compute.base import Compute, OnProgress, Outcome, Prepare, Transcribe, Usage
from jobs.models import Segment, Transcript
from jobs.settings import Settings
from jobs.telemetry import SECOND, Steps, Tracing
from modal_functions.plan import SAMPLE_RATE, Plan, Span
from tests import ports

JOBS, JOBS_QUICK = 150, 20
ROUNDS = 4
OFF, ON = "without tracing", "with tracing"
METHOD = """\
Batches of {jobs} jobs take the whole way in one worker, ten jobs at a time, from the insert through
the queue and the calls of four chunks to the result, but the calls return at once. In each round
(at most {rounds}) two batches run one after the other, in turning order: without tracing, and with
spans (21 a job) that are exported over HTTP to another process. Per job: seconds of the worker's
processor, which other work on the machine changes little, and of the clock."""

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


def run_rounds(folder: Path, jobs: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return what a job took in each round, with and without tracing."""
    server = EmbeddedPostgres(folder / "postgres")
    ways: dict[str, Tracing | None] = {OFF: None, ON: telemetry.use(None)}
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with server:
        server.create_database("benchmark")
        server.bootstrap("benchmark")
        url = server.url(database="benchmark")
        migrate.migrate(url)
        settings = Settings.load(
            database_url=url, storage_dir=folder / "storage", worker_concurrency=10
        )
        for number in range(rounds + 1):
            for way in list(ways)[:: -1 if number % 2 else 1]:
                telemetry.use(ways[way])
                batch = asyncio.run(run_batch(settings, jobs))
                if number:  # the first one warms up
                    took[way].append(batch)
    server.remove()
    return took


@click.command()
@click.argument("jobs", type=int)
@click.argument("rounds", type=int)
def main(jobs: int, rounds: int) -> None:
    """Be the process that measures."""
    worker.make_compute = make_compute
    with tempfile.TemporaryDirectory() as folder, ports.reserved() as port:
        collector = subprocess.Popen(
            [sys.executable, "-m", "examples.see_traces", f"{folder}/spans.jsonl", str(port)],
            stdout=subprocess.DEVNULL,
        )
        try:
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
            telemetry.configure("benchmark")
            took = run_rounds(Path(folder), jobs, rounds)
        finally:
            collector.kill()
            collector.wait()
    click.echo(json.dumps(took))


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Measure jobs with and without tracing."""
    jobs, rounds = (JOBS_QUICK, 1) if quick else (JOBS, min(rounds, ROUNDS))
    command = [sys.executable, "-m", "benchmarks.tracing", str(jobs), str(rounds)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr.decode()[-2000:]}")
    took: dict[str, list[list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return Section(
        "traces",
        "Tracing",
        METHOD.format(jobs=jobs, rounds=ROUNDS),
        [
            Measurement(
                f"traces-{name}",
                what,
                "ms a job",
                "lower",
                {way: [1000 * batch[place] for batch in batches] for way, batches in took.items()},
                OFF,
            )
            for place, (name, what) in enumerate(
                (("processor", "The worker's processor"), ("clock", "By the clock"))
            )
        ],
    )


if __name__ == "__main__":
    main()
