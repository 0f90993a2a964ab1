"""What is measured of each queue; each function returns figures by the name of the system."""

import random
import select
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.queue_child import POLL, Work
from benchmarks.queue_systems import (
    OURS,
    PLAIN,
    Child,
    PeerFailed,
    Place,
    Places,
    System,
    start_worker,
    tell_redis,
    worker,
)
from benchmarks.queue_worker import OWNERS, insert_rows

ONE_WAY = 0.0005  # seconds
BATCH = 1000
SLOW, SLOW_FAR_AWAY = 0.3, 0.1  # of the jobs: what procrastinate drains, which takes as long
STARTED_UP = 2.0  # seconds after which a worker that is ready is idle
LOOK = 1.0  # seconds; connections of pools that nobody needs stay open for some
MINUTE, NANO = 60.0, 1e-9

Connection = psycopg.Connection[tuple[Any, ...]]
Figures = dict[str, float]


def drain(places: Places, system: System, jobs: int, concurrency: int, delay: float = 0) -> float:
    """Return the jobs a second that a worker drains."""
    if system.name == PLAIN:
        jobs = int(jobs * (SLOW_FAR_AWAY if delay else SLOW))
    with ExitStack() as stack:
        place = stack.enter_context(places.fresh(system))
        url = place.url
        producer = places.producers[system.name]
        statements, rest = divmod(jobs, BATCH)
        producer.ask(url=url, statements=statements, jobs=BATCH)
        producer.ask(url=url, statements=min(rest, 1), jobs=rest)
        if delay:
            url = stack.enter_context(place.proxied(delay))[1]
        child = stack.enter_context(worker(system, Work(url, concurrency, jobs)))
        return float(jobs / child.read()["seconds"])


def enqueue(places: Places, system: System, jobs: int, per_statement: int) -> float:
    """Return the jobs a second that one connection enqueues."""
    producer = places.producers[system.name]
    with places.fresh(system) as place:
        producer.ask(url=place.url, statements=1, jobs=per_statement)
        statements = jobs // per_statement
        answer = producer.ask(url=place.url, statements=statements, jobs=per_statement)
        return float(jobs / answer["seconds"])


def pickup(places: Places, systems: Sequence[System], samples: int) -> dict[str, Figures]:
    """Return percentiles of the milliseconds to a start in an idle worker, measured alternately."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        idle: list[tuple[System, Place, Child]] = []
        for system in systems:
            place = stack.enter_context(places.fresh(system))
            child = stack.enter_context(worker(system, Work(place.url, 10)))
            idle.append((system, place, child))
        time.sleep(STARTED_UP)
        for number in range(-5, samples):
            for system, place, child in idle:
                answer = places.producers[system.name].ask(url=place.url, pickup=True)
                started = child.read()["started"]
                time.sleep(random.uniform(0.015, 0.03))  # noqa: S311 - until it is idle again
                if number >= 0:
                    since = (answer["committing"], answer["committed"])
                    times[system.name].append((started - since[0], started - since[1]))
    figures: dict[str, Figures] = defaultdict(dict)
    for name, pairs in times.items():
        for which, suffix in enumerate(("", "-returned")):
            cuts = statistics.quantiles((1000 * pair[which] for pair in pairs), n=100)
            figures[f"pickup-p50{suffix}"][name] = cuts[49]
            figures[f"pickup-p99{suffix}"][name] = cuts[98]
    return figures


def due(conn: Connection) -> float | None:
    """Return when the only job that waits falls due, on the monotonic clock."""
    row = conn.execute(
        "select extract(epoch from due_at)::float8 from public.processing_jobs"
        " where status = 'queued' and due_at > now()"
    ).fetchone()
    return row[0] + time.monotonic() - time.time() if row else None


def wait_for_ends(conn: Connection) -> None:
    """Return when no job waits or runs any more."""
    unfinished = "select from public.processing_jobs where completed_at is null limit 1"
    while conn.execute(unfinished).fetchone() is not None:
        time.sleep(POLL)


def lateness(places: Places, ours: System, samples: int) -> dict[str, Figures]:
    """Return medians of how late jobs of ours start that wait for something else than a slot."""
    schedule = (
        "insert into public.processing_jobs (user_id, file_path, scheduled_at)"
        " values (%s, 'a/b.mp3', clock_timestamp() + interval '0.3 s')"
    )
    late: dict[str, list[float]] = defaultdict(list)

    def start_of(child: Child, due_at: float | None) -> float:
        assert due_at is not None
        return float(1000 * (child.read()["started"] - due_at))

    with ExitStack() as stack:
        place = stack.enter_context(places.fresh(ours))
        conn = stack.enter_context(psycopg.connect(place.url, autocommit=True))
        conn.execute("select limit_owner(%s, 1)", (OWNERS[0],))
        with worker(ours, Work(place.url, 10)) as child:
            for _ in range(samples):
                conn.execute(schedule, (OWNERS[0],))
                late["late-scheduled"].append(start_of(child, due(conn)))
            wait_for_ends(conn)
        with worker(ours, Work(place.url, 10, behaviour="fail")) as child:
            for _ in range(samples):
                insert_rows(conn, 1)
                child.read()
                while (due_at := due(conn)) is None:
                    pass
                late["late-retried"].append(start_of(child, due_at))
            wait_for_ends(conn)
        with worker(ours, Work(place.url, 10, behaviour="take-time")) as child:
            conn.execute(
                "insert into public.processing_jobs (user_id, file_path)"
                " select %s, 'a/b.mp3' from generate_series(0, %s)",
                (OWNERS[0], samples),
            )
            child.read()
            for _ in range(samples):
                late["late-slot"].append(start_of(child, child.read()["ended"]))
    return {line: {ours.name: statistics.median(values)} for line, values in late.items()}


@dataclass(frozen=True)
class Idle:
    """A system whose worker has nothing to do."""

    system: System
    place: Place
    proxy: Child | None
    conn: Connection | None
    spent: dict[int, float] = field(default_factory=dict)  # process: its seconds of CPU so far

    def statements(self) -> float:
        """Return how many statements, or commands of Redis, there have been."""
        return float(self.proxy.ask()) if self.proxy else redis_commands(self.place.port)

    def look(self) -> None:
        """Note the CPU of the server's processes that serve the worker, while they are there."""
        pids = backends(self.conn) if self.conn else [self.place.pid]
        for pid in pids:
            with suppress(FileNotFoundError, ProcessLookupError):
                self.spent[pid] = cpu_of(pid)

    def cpu(self) -> float:
        """Return the seconds of CPU of all processes that were seen."""
        return sum(self.spent.values())


def idle(places: Places, systems: Sequence[System], seconds: float) -> dict[str, Figures]:
    """Return statements a second, and the server's seconds of CPU a minute, of idle workers."""
    figures: dict[str, Figures] = defaultdict(dict)
    with ExitStack() as stack:
        all_idle = [start_idle(places, system, stack) for system in systems]
        time.sleep(STARTED_UP)
        for each in all_idle:
            each.look()
        before = [(each.statements(), each.cpu()) for each in all_idle]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(LOOK)
            for each in all_idle:
                each.look()
        for each, (statements, cpu) in zip(all_idle, before, strict=True):
            name = each.system.name
            figures["idle-statements"][name] = (each.statements() - statements) / seconds
            figures["idle-cpu"][name] = (each.cpu() - cpu) * MINUTE / seconds
    return figures


def start_idle(places: Places, system: System, stack: ExitStack) -> Idle:
    """Start a worker that has had one job."""
    place = stack.enter_context(places.fresh(system))
    url, proxy, conn = place.url, None, None
    if not place.pid:
        proxy, url = stack.enter_context(place.proxied(0))
        conn = stack.enter_context(psycopg.connect(place.url, autocommit=True))
    child = stack.enter_context(worker(system, Work(url, 10, behaviour="idle")))
    submit(places, system, place, 1)
    child.read()
    return Idle(system, place, proxy, conn)


def redis_commands(port: int) -> float:
    """Return how many commands a Redis has processed, those of its scripts as well."""
    answer = tell_redis(port, "INFO stats")
    lines = dict(line.split(":", 1) for line in answer.splitlines() if ":" in line)
    return float(lines["total_commands_processed"])


def backends(conn: Connection) -> list[int]:
    """Return the processes of the server that serve this database, apart from ours."""
    rows = conn.execute(
        "select pid from pg_stat_activity"
        " where datname = current_database() and pid <> pg_backend_pid()"
    )
    return [pid for (pid,) in rows]


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU of a process."""
    spent = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]
    return int(spent) * NANO


@dataclass(frozen=True)
class Standby:
    """Workers of one job at a time that wait, and how half of them are given one."""

    system: System
    workers: Sequence[Child]
    submit: Callable[[int], object]

    def begin(self) -> tuple[list[Child], list[Child]]:
        """Give half of them a job each; return these, and those that have none."""
        victims: list[Child] = []
        survivors = list(self.workers)
        self.submit(len(survivors) // 2)
        while len(victims) < len(survivors):
            begun = select.select(survivors, [], [], MINUTE)[0]
            if not begun:
                raise PeerFailed(self.system.name, "no worker started the job")
            for child in begun:
                child.read()
                victims.append(child)
                survivors.remove(child)
        return victims, survivors


def standby(system: System, work: Work, submit: Callable[[int], object], stack: ExitStack,
            workers: int = 2) -> Standby:  # fmt: skip
    """Start workers whose jobs never end."""
    started = [stack.enter_context(start_worker(system, work)) for _ in range(workers)]
    return Standby(system, started, submit)


def take_overs(standbys: Sequence[Standby]) -> list[float]:
    """Return of each the seconds from the kill of a worker to the start of its job in another one.

    Means, where several workers are killed. All wait at the same time, for they do nothing else.
    """
    halves = [each.begin() for each in standbys]
    killed = [[_kill(victim) for victim in victims] for victims, _ in halves]
    return [
        statistics.mean(survivor.read()["started"] for survivor in survivors)
        - statistics.mean(times)
        for (_, survivors), times in zip(halves, killed, strict=True)
    ]


def _kill(victim: Child) -> float:
    time.sleep(random.uniform(0, 0.3))  # noqa: S311 - any time between two heartbeats
    killed = time.monotonic()
    victim.kill()
    return killed


def recover(
    places: Places, systems: Sequence[System], stalls: Sequence[int | None], samples: int
) -> dict[str, list[float]]:
    """Return the seconds from the kill of a worker to the start of its job in another one."""
    figures: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        pairs = []
        for system, stall in [*zip(systems, stalls, strict=True)] * samples:
            place = stack.enter_context(places.fresh(system))
            work = Work(place.url, 1, stall=stall, behaviour="hang")
            pairs.append(standby(system, work, partial(submit, places, system, place), stack))
        wait_until_ready(pairs)
        for pair, seconds in zip(pairs, take_overs(pairs), strict=True):
            figures[pair.system.name].append(seconds)
    return figures


def submit(places: Places, system: System, place: Place, jobs: int) -> None:
    """Enqueue some jobs in one statement, and close the producer's connection."""
    producer = places.producers[system.name]
    producer.ask(url=place.url, statements=1, jobs=jobs)
    producer.ask(close=True)


def wait_until_ready(standbys: Sequence[Standby]) -> None:
    """Return when all workers are idle."""
    for each in standbys:
        for child in each.workers:
            child.read()
    time.sleep(STARTED_UP)


def in_turn(systems: Sequence[System], round_number: int) -> Sequence[System]:
    """Return the systems in this round's order: each begins once, and every other is backwards."""
    backwards = round_number % 2
    first = (round_number + backwards) % len(systems)
    ordered = [*systems[first:], *systems[:first]]
    return ordered[:: -1 if backwards else 1]


def ours_of(systems: Sequence[System]) -> System:
    """Return pgscribe."""
    return next(system for system in systems if system.name == OURS)
