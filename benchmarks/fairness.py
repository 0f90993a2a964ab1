"""How fairly the queue shares its slots: ``python -m benchmarks.fairness``.

A simulation in which only time is simulated: jobs are inserted, claimed and ended by the real
functions of a real database, in the order that the lengths of the jobs give. Times are in simulated
seconds; as long as no slot is free they are audio-seconds served per slot.

- crowd: one owner inserts 10,000 jobs at once; nine others insert one now and then, at random
  (Poisson), half of what their shares would allow. Lengths are exponential around 60 s and unknown
  to the queue until a job ends. What the same arrivals would wait for first come, first served, is
  computed.
- weights: three owners who always have jobs waiting, of weights 1, 1 and 2, with lengths that the
  queue knows. The lag is the most that the two equal ones ever differ in audio-seconds.
- newcomer: an owner comes to slots filled by another one's jobs, which turn out to be a sixth of
  what was estimated; counts how many jobs of the other one start before the newcomer's first.

The last line is one JSON object.
"""

import asyncio
import functools
import heapq
import itertools
import json
import logging
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import click
import psycopg

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs import database
from jobs.queue import ClaimedJob, Queue
from jobs.settings import Settings

MEAN_LENGTH = 60.0  # seconds
HEAVY, *LIGHT = [UUID(int=number) for number in range(1, 11)]
UNTIL_IDLE = float("inf")
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


async def crowd(databases: Database, *, heavy: int, duration: float) -> dict[str, float]:
    """Simulate one owner with very many jobs among others; print a table of their waits."""
    slots = 10
    jobs = make_crowd(random.Random(1), heavy=heavy, slots=slots, duration=duration)  # noqa: S311
    async with databases.simulation(slots=slots) as simulation:
        fair = await simulation.run(jobs, until=duration)
    unfair = first_come_first_served(jobs, slots)
    total = sum(fair.served.values())
    click.echo(
        f"{'owner':>5}{'started':>9}{'share':>8}{'mean wait':>12}{'p99':>9}{'FIFO mean':>12}"
    )
    for number, owner in enumerate((HEAVY, *LIGHT)):
        waits = fair.waits(owner)
        click.echo(
            f"{number:>5}{len(waits):>9}{fair.served[owner] / total:>8.1%}"
            f"{statistics.mean(waits):>11.1f}s{statistics.quantiles(waits, n=100)[98]:>8.1f}s"
            f"{statistics.mean(unfair.waits(owner)):>11.0f}s"
        )
    waits = fair.waits(*LIGHT)
    return {
        "light_wait_mean_s": statistics.mean(waits),
        "light_wait_p99_s": statistics.quantiles(waits, n=100)[98],
        "light_wait_mean_fifo_s": statistics.mean(unfair.waits(*LIGHT)),
        "heavy_share": fair.served[HEAVY] / total,
    }


async def weighted(databases: Database, *, duration: float) -> dict[str, float]:
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
    total = sum(outcome.served.values())
    shares = [outcome.served[owner] / total for owner in (HEAVY, *alike)]
    click.echo(f"Shares of weights 2, 1, 1: {shares[0]:.1%}, {shares[1]:.1%}, {shares[2]:.1%}")
    return {
        "share_weight_2": shares[0],
        "max_lag_s": outcome.lag,
        "longest_job_s": max(job.length for job in jobs if job.owner in alike),
    }


async def newcomer(databases: Database) -> dict[str, float]:
    """Simulate an owner who comes to slots filled with jobs of over-estimated length."""
    slots = 50
    jobs = [Job(0.0, HEAVY, MEAN_LENGTH / 6)] * 2000 + [Job(5.0, LIGHT[0], MEAN_LENGTH / 6)] * 5
    async with databases.simulation(slots=slots) as simulation:
        outcome = await simulation.run(jobs, until=500.0)
    owners = [owner for owner, _ in outcome.starts]
    before = owners.index(LIGHT[0]) - slots if LIGHT[0] in owners else len(owners)
    return {"newcomer_waits_for_jobs": before}


async def simulate(databases: Database, *, quick: bool) -> dict[str, float]:
    """Run all simulations."""
    figures = await crowd(
        databases, heavy=1000 if quick else 10_000, duration=900.0 if quick else 7200.0
    )
    figures |= await weighted(databases, duration=900.0 if quick else 7200.0)
    return figures | await newcomer(databases)


@click.command()
@click.option("--quick", is_flag=True, help="Short ones: to try it out.")
def main(*, quick: bool) -> None:
    """Simulate how fairly the queue shares its slots."""
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres", settings={"fsync": "off"})
        try:
            server.start()
            figures = asyncio.run(simulate(Database(server), quick=quick))
        finally:
            server.remove()
    click.echo(json.dumps({name: round(figure, 3) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
