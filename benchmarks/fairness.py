"""How fairly the queue shares its slots, next to a queue that serves who came first."""

import asyncio
import functools
import heapq
import itertools
import logging
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import psycopg

from benchmarks.figures import Measurement, Section
from benchmarks.queue_child import Work
from benchmarks.queue_systems import OURS, PLAIN, of_python, worker
from benchmarks.queue_worker import install_procrastinate
from db import migrate
from db.embedded import EmbeddedPostgres
from jobs import database
from jobs.queue import ClaimedJob, Queue
from jobs.settings import Settings

METHOD = """\
**With real workers**: {heavy:,} jobs of one owner wait, then comes one of another owner's; a worker
with 10 slots starts, of plain procrastinate as it comes and of pgscribe. Counted is how many of
the {heavy:,} were claimed in an earlier transaction than the other owner's job, and the time from
the first claim to that one's. The jobs do nothing, so with real ones multiply by how long they
take. At most {rounds} rounds.

**Simulated**, where only time is: jobs are inserted, claimed and ended by pgscribe's real functions
in a real database, in the order that the lengths of the jobs give; seconds are simulated ones.

- Waits: one owner inserts {heavy:,} jobs at once; nine others insert one now and then, at random,
  half of what their shares of ten slots would allow. Lengths are exponential around 60 s and not
  known before a job ends. What the same arrivals wait first come, first served, is computed.
- Weights: three owners who always have jobs waiting, of weights 2, 1 and 1, with lengths that the
  queue knows.
- Newcomer: an owner comes to 50 slots filled by another's jobs, which turn out to be a sixth as
  long as was estimated.

The simulation has no chance in it: it runs once."""

FIFO = "first come, first served"
MEAN_LENGTH = 60.0  # seconds
HEAVY, *LIGHT = [UUID(int=number) for number in range(1, 11)]
UNTIL_IDLE = float("inf")
HEAVY_JOBS, HEAVY_JOBS_QUICK = 10_000, 500
ROUNDS = 3
INSERT = """
insert into public.processing_jobs (user_id, file_path, estimated_seconds)
select %(owner)s, 'a/b.mp3', %(estimate)s from generate_series(1, %(count)s) returning id
"""


@dataclass(frozen=True)
class Job:
    """A job to come. The queue learns its length at once if it is ``known``."""

    arrival: float
    owner: UUID
    length: float
    known: bool = False


@dataclass
class Outcome:
    """What became of the jobs that were started: who waited how long, in the order of starts."""

    starts: list[tuple[UUID, float]] = field(default_factory=list)
    served: dict[UUID, float] = field(default_factory=lambda: defaultdict(float))
    lag: float = 0.0

    def waits(self, *owners: UUID) -> list[float]:
        """Return the waits of some owners."""
        return [wait for owner, wait in self.starts if owner in owners]


class Simulation:
    """Slots of one worker. ``alike``: owners whose lag behind each other is watched."""

    def __init__(
        self,
        conn: psycopg.AsyncConnection[tuple[object, ...]],
        queue: Queue,
        worker: int,
        *,
        slots: int,
        alike: Iterable[UUID] = (),
    ) -> None:
        self._conn = conn
        self._queue = queue
        self._worker = worker
        self._free = slots
        self._alike = list(alike)
        self._jobs: dict[UUID, Job] = {}
        self._ends: list[tuple[float, int, ClaimedJob]] = []
        self._numbers = itertools.count()
        self._waiting = 0
        self.outcome = Outcome()

    async def run(self, jobs: Iterable[Job], until: float = UNTIL_IDLE) -> Outcome:
        """Let the jobs come, in their order, and start until then."""
        arrivals = [list(group) for _, group in itertools.groupby(jobs, lambda job: job.arrival)]
        while arrivals or self._ends:
            at = min(
                [group[0].arrival for group in arrivals[:1]] + [end[0] for end in self._ends[:1]]
            )
            if at > until:
                break
            ended = []
            while self._ends and self._ends[0][0] <= at:
                ended.append(heapq.heappop(self._ends)[2])
            if arrivals and arrivals[0][0].arrival <= at:
                await self._insert(arrivals.pop(0))
            await self._turn(at, ended)
        return self.outcome

    async def _insert(self, jobs: list[Job]) -> None:
        self._waiting += len(jobs)
        kinds = itertools.groupby(
            jobs, lambda job: (job.owner, job.length if job.known else MEAN_LENGTH)
        )
        for (owner, estimate), group in kinds:
            same = list(group)
            values = {"owner": owner, "estimate": estimate, "count": len(same)}
            rows = await (await self._conn.execute(INSERT.encode(), values)).fetchall()
            for (job_id,), job in zip(rows, same, strict=True):
                assert isinstance(job_id, UUID)
                self._jobs[job_id] = job

    def _job(self, claimed: ClaimedJob) -> Job:
        assert claimed.attempt is not None
        return self._jobs[claimed.attempt.job_id]

    async def _turn(self, now: float, ended: list[ClaimedJob]) -> None:
        ends = [
            claimed.end("succeeded", result={}, audio_seconds=self._job(claimed).length)
            for claimed in ended
        ]
        self._free += len(ends)
        more = True
        while more and (ends or (self._waiting and self._free)):
            turn = await self._queue.turn(self._worker, ends, self._free, None)
            more, ends = turn.more, []
            for claimed in turn.jobs:
                self._start(now, claimed)

    def _start(self, now: float, claimed: ClaimedJob) -> None:
        job = self._job(claimed)
        self._free -= 1
        self._waiting -= 1
        heapq.heappush(self._ends, (now + job.length, next(self._numbers), claimed))
        self.outcome.starts.append((job.owner, now - job.arrival))
        self.outcome.served[job.owner] += job.length
        if self._alike:
            served = [self.outcome.served[owner] for owner in self._alike]
            self.outcome.lag = max(self.outcome.lag, max(served) - min(served))


def first_come_first_served(jobs: Iterable[Job], slots: int) -> Outcome:
    """Compute what the same jobs would wait for in a queue without fairness."""
    outcome = Outcome()
    free_at = [0.0] * slots
    for job in jobs:
        start = max(job.arrival, heapq.heappop(free_at))
        heapq.heappush(free_at, start + job.length)
        outcome.starts.append((job.owner, start - job.arrival))
        outcome.served[job.owner] += job.length
    return outcome


def make_crowd(rng: random.Random, *, heavy: int, slots: int, duration: float) -> list[Job]:
    """Return one owner's mass of jobs and the others' now and then."""
    jobs = [Job(0.0, HEAVY, rng.expovariate(1 / MEAN_LENGTH)) for _ in range(heavy)]
    share = slots / (1 + len(LIGHT))
    for owner in LIGHT:
        at = rng.expovariate(share / 2 / MEAN_LENGTH)
        while at < duration:
            jobs.append(Job(at, owner, rng.expovariate(1 / MEAN_LENGTH)))
            at += rng.expovariate(share / 2 / MEAN_LENGTH)
    return sorted(jobs, key=lambda job: job.arrival)


class Database:
    """One server, with a fresh database for each simulation."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._names = (f"simulation_{number}" for number in itertools.count())
        server.create_database("template")
        server.bootstrap("template")
        migrate.migrate(server.url(database="template"))

    @asynccontextmanager
    async def simulation(
        self, *, slots: int, weights: dict[UUID, float] | None = None, alike: Iterable[UUID] = ()
    ) -> AsyncIterator[Simulation]:
        """Provide a simulation; owners without a weight have 1."""
        name = next(self._names)
        self._server.create_database(name, template="template")
        settings = Settings.load(database_url=self._server.url(database=name))
        connect = functools.partial(database.connect, settings, name="simulation")
        queue = Queue(connect, max_attempts=1, stall_timeout=3600)
        async with await connect() as conn:
            for owner in (HEAVY, *LIGHT):
                await conn.execute(
                    "insert into auth.users (id, email) values (%s, %s)", (owner, str(owner))
                )
                limits = (owner, 10_000, (weights or {}).get(owner, 1.0))
                await conn.execute("select limit_owner(%s, %s, %s::real)", limits)
            worker = await queue.register()
            yield Simulation(conn, queue, worker, slots=slots, alike=alike)
        await queue.close()
        self._server.drop_database(name)


async def crowd(databases: Database, *, heavy: int, duration: float) -> Iterator[Measurement]:
    """Simulate one owner with very many jobs among others."""
    slots = 10
    jobs = make_crowd(random.Random(1), heavy=heavy, slots=slots, duration=duration)  # noqa: S311
    async with databases.simulation(slots=slots) as simulation:
        fair = (await simulation.run(jobs, until=duration)).waits(*LIGHT)
    unfair = first_come_first_served(jobs, slots).waits(*LIGHT)

    def p99(waits: list[float]) -> float:
        return statistics.quantiles(waits, n=100)[98]

    return (
        Measurement(
            f"fairness-wait-{name}",
            f"Simulated wait of the other owners' jobs, {name}",
            "s",
            "lower",
            {FIFO: [figure(unfair)], OURS: [figure(fair)]},
            FIFO,
        )
        for name, figure in (("mean", statistics.mean), ("p99", p99))
    )


async def weighted(databases: Database, *, duration: float) -> Iterator[Measurement]:
    """Simulate three owners who always have jobs waiting."""
    rng = random.Random(2)  # noqa: S311 - a simulation
    slots, longest = 4, 600.0
    alike = LIGHT[:2]
    count = int(slots * duration / MEAN_LENGTH)
    jobs = [
        Job(0.0, owner, length, known=True)
        for owner, mean in ((HEAVY, 60), (alike[0], 30), (alike[1], 120))
        for length in (min(longest, rng.expovariate(1 / mean)) for _ in range(count))
    ]
    async with databases.simulation(slots=slots, weights={HEAVY: 2.0}, alike=alike) as simulation:
        outcome = await simulation.run(jobs, until=duration)
    share = outcome.served[HEAVY] / sum(outcome.served.values())
    longest_job = max(job.length for job in jobs if job.owner in alike)
    return iter(
        (
            Measurement(
                "fairness-weight",
                "How far the owner of weight 2 is from half of the audio",
                "percentage points",
                "lower",
                {OURS: [100 * abs(share - 0.5)]},
            ),
            Measurement(
                "fairness-lag",
                "The most that two owners of the same weight ever differ by",
                "s of audio",
                "lower",
                {OURS: [outcome.lag]},
                note=f"Their longest job is {longest_job:g} s long.",
            ),
        )
    )


async def newcomer(databases: Database) -> Iterator[Measurement]:
    """Simulate an owner who comes to slots filled with jobs of over-estimated length."""
    slots = 50
    jobs = [Job(0.0, HEAVY, MEAN_LENGTH / 6)] * 2000 + [Job(5.0, LIGHT[0], MEAN_LENGTH / 6)] * 5
    async with databases.simulation(slots=slots) as simulation:
        outcome = await simulation.run(jobs, until=500.0)
    before = [owner for owner, _ in outcome.starts].index(LIGHT[0]) - slots
    return iter(
        (
            Measurement(
                "fairness-newcomer",
                "Jobs that start before a newcomer's although theirs took less than was estimated",
                "jobs",
                "lower",
                {OURS: [before]},
            ),
        )
    )


async def simulate(databases: Database, *, quick: bool) -> list[Measurement]:
    """Run all simulations."""
    heavy, duration = (HEAVY_JOBS_QUICK, 300.0) if quick else (HEAVY_JOBS, 7200.0)
    return [
        *await crowd(databases, heavy=heavy, duration=duration),
        *await weighted(databases, duration=duration),
        *await newcomer(databases),
    ]


@dataclass(frozen=True)
class Turn:
    """How soon another owner's only job started: behind how many, and seconds after the first."""

    before: int
    seconds: float


STARTED = """
select count(*) filter (where e.at < mine.at), extract(epoch from mine.at - min(e.at))::float8
  from {schema}.procrastinate_events e, (
    select at from {schema}.procrastinate_events
     where type = 'started' and job_id = (select max(id) from {schema}.procrastinate_jobs)) mine
 where e.type = 'started' group by mine.at
"""
DEFER = """
select procrastinate_defer_jobs_v1(array_agg(row('transcription', 'transcribe', 0, null, null,
  jsonb_build_object('processing_job_id', gen_random_uuid()), null)
  ::procrastinate_job_to_defer_v1)) from generate_series(1, %(count)s)
"""


def wait_for_turn(server: EmbeddedPostgres, system: str, number: int, heavy: int) -> Turn:
    """Let a worker come to the jobs of one owner and the one of another."""
    name = f"{system}_{number}"
    server.create_database(name, template="template" if system == OURS else PLAIN)
    url = server.url(database=name)
    with psycopg.connect(url, autocommit=True) as conn:
        if system == OURS:
            conn.execute("insert into auth.users (id) select unnest(%s)", ([HEAVY, LIGHT[0]],))
        for owner, count in ((HEAVY, heavy), (LIGHT[0], 1)):
            insert = INSERT if system == OURS else DEFER
            values = {"owner": owner, "estimate": MEAN_LENGTH, "count": count}
            conn.execute(insert.encode(), values)
        schema = "procrastinate" if system == OURS else "public"
        process = of_python(system, "benchmarks.queue_worker", system)
        with worker(process, Work(url, concurrency=10)) as child:
            for _ in range(heavy + 1):
                child.read()
        row = conn.execute(STARTED.format(schema=schema).encode()).fetchone()
        assert row is not None
    server.drop_database(name)
    return Turn(*row)


def real(server: EmbeddedPostgres, rounds: int, heavy: int) -> Iterator[Measurement]:
    """Measure both systems in turning order."""
    turns: dict[str, list[Turn]] = {PLAIN: [], OURS: []}
    for number in range(rounds):
        for system in list(turns)[:: -1 if number % 2 else 1]:
            turns[system].append(wait_for_turn(server, system, number, heavy))
    yield Measurement(
        "fairness-before",
        f"Of {heavy:,} waiting jobs of one owner, those claimed before another owner's first job",
        "jobs",
        "lower",
        {system: [turn.before for turn in found] for system, found in turns.items()},
        headline=True,
    )
    yield Measurement(
        "fairness-seconds",
        "From the first claim to that job's",
        "s",
        "lower",
        {system: [turn.seconds for turn in found] for system, found in turns.items()},
    )


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Measure with real workers, then simulate."""
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    heavy = HEAVY_JOBS_QUICK if quick else HEAVY_JOBS
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres")
        try:
            server.start()
            databases = Database(server)
            server.create_database(PLAIN)
            asyncio.run(install_procrastinate(server.url(database=PLAIN)))
            found = [
                *real(server, min(rounds, ROUNDS), heavy),
                *asyncio.run(simulate(databases, quick=quick)),
            ]
        finally:
            server.remove()
    return Section("fairness", "Fairness", METHOD.format(heavy=heavy, rounds=ROUNDS), found)
