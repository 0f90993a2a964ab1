"""The simulation next to a real worker that runs the same jobs, which only take their time."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import mean
from typing import Any

import procrastinate
import psycopg

from benchmarks.fair_queue import Job
from benchmarks.figures import Measurement, Section
from benchmarks.postgres import OWNERS, postgres
from benchmarks.simulation import System, simulate
from jobs import database
from jobs.execution import Job as ClaimedJob
from jobs.queue import QUEUE_NAME
from jobs.settings import Settings
from jobs.tasks import TASK_NAME
from jobs.worker import make_app

REAL, SIMULATED = "real", "simulated"
SLOTS = 8
LENGTH = 0.25  # seconds, on average
HEAVY, LIGHT = 160, 20  # jobs of one owner at once, and of each of three others
LASTS = 6.0  # seconds in which the others' jobs come
INSERT = """
insert into public.processing_jobs (user_id, file_path, estimated_seconds) values (%s, %s, %s)
"""
METHOD = f"""
A worker with {SLOTS} slots on a database of its own runs jobs that wait for their length, which
the queue knows and which is exponential around {LENGTH} s. One owner inserts {HEAVY} at once, three
others {LIGHT} each at random times in {LASTS:.0f} s. The simulation gets the same jobs, at the
times at which they were really inserted, with containers that are always warm.
"""


@dataclass
class Run:
    """When each job of a run came, started and ended, in seconds since the first."""

    arrived: dict[int, float]
    started: dict[int, float]
    ended: dict[int, float]

    def wait(self, jobs: Sequence[Job]) -> float:
        """Return the mean wait in milliseconds."""
        return 1000 * mean(self.started[job.number] - self.arrived[job.number] for job in jobs)


class Transcript:
    """The result of a job."""

    def __init__(self, duration: float) -> None:
        self.duration = duration

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {"text": "hello", "segments": [], "language": "en"}


def make_jobs(seed: int, part: int) -> list[Job]:
    """Return the jobs of a round, or a ``part`` of so many."""
    rng = random.Random(seed)  # noqa: S311 - a load
    came = [(0.0, 0)] * (HEAVY // part)
    for owner in (1, 2, 3):
        came += [(rng.uniform(0, LASTS / part), owner) for _ in range(LIGHT // part)]
    lengths = [rng.expovariate(1 / LENGTH) for _ in came]
    return [
        Job(number, at, owner, seconds, seconds)
        for number, ((at, owner), seconds) in enumerate(zip(sorted(came), lengths, strict=True))
    ]


async def really(url: str, jobs: Sequence[Job]) -> Run:
    """Run the jobs by pgscribe's worker."""
    run, begin = Run({}, {}, {}), 0.0
    all_done = asyncio.Event()
    settings = Settings.load(database_url=url, worker_concurrency=SLOTS)
    pool = database.make_pool(settings, name="benchmark", for_queue=True)
    app = make_app(settings)

    async def transcribe(
        context: procrastinate.JobContext,
        processing_job_id: str,  # noqa: ARG001 - as the product's
    ) -> Transcript:
        assert isinstance(context.job, ClaimedJob)
        assert context.job.attempt
        number = int(context.job.attempt.file_path.removesuffix(".mp3"))
        run.started[number] = time.perf_counter() - begin
        await asyncio.sleep(jobs[number].seconds)
        run.ended[number] = time.perf_counter() - begin
        if len(run.ended) == len(jobs):
            all_done.set()
        return Transcript(jobs[number].seconds)

    async with (
        pool,
        app.open_async(pool),
        await psycopg.AsyncConnection.connect(url, autocommit=True) as conn,
    ):
        app.task(name=TASK_NAME, queue=QUEUE_NAME, pass_context=True)(transcribe)
        worker = app.new_worker(concurrency=SLOTS)
        running = asyncio.create_task(worker.run())
        begin = time.perf_counter()
        for at in sorted({job.arrival for job in jobs}):
            await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
            now = [job for job in jobs if job.arrival == at]
            async with conn.transaction(), conn.pipeline():
                for job in now:
                    values = (OWNERS[job.owner], f"{job.number}.mp3", job.seconds)
                    await conn.execute(INSERT.encode(), values)
            came = time.perf_counter() - begin
            run.arrived.update({job.number: came for job in now})
        await all_done.wait()
        worker.stop()
        await running
    return run


def in_theory(jobs: Sequence[Job], arrived: dict[int, float]) -> Run:
    """Run the jobs in simulated time."""
    system = System(
        slots=SLOTS,
        max_containers=SLOTS,
        speed=1,
        overhead=0,
        cold_start=0,
        scaledown=inf,
        prepare=0,
        decoding_speed=inf,
        max_span=inf,
    )
    came = [replace(job, arrival=arrived[job.number]) for job in jobs]
    records = simulate(system, came).records
    return Run(
        arrived,
        {record.job.number: record.started for record in records},
        {record.job.number: record.ended for record in records},
    )


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - what report.py calls
    """Compare the simulation with a worker."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with postgres() as server:
        for number in range(1 if quick else rounds):
            jobs = make_jobs(number, 4 if quick else 1)
            with server.fresh() as name:
                real = asyncio.run(really(server.url(name), jobs))
            for system, run in {REAL: real, SIMULATED: in_theory(jobs, real.arrived)}.items():
                found["simulated-makespan"][system].append(max(run.ended.values()))
                for kind, theirs in {
                    "light": [job for job in jobs if job.owner],
                    "heavy": [job for job in jobs if not job.owner],
                }.items():
                    found[f"simulated-{kind}"][system].append(run.wait(theirs))
    lines = {
        "simulated-makespan": ("All jobs are done after", "s"),
        "simulated-light": ("Mean wait of the three others' jobs", "ms"),
        "simulated-heavy": ("Mean wait of the heavy owner's jobs", "ms"),
    }
    measurements = [
        Measurement(name, what, unit, "lower", found[name], REAL)
        for name, (what, unit) in lines.items()
    ]
    return Section("simulated", "The simulation and a real run", METHOD.strip(), measurements)
