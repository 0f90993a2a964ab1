"""The queue next to plain procrastinate: ``python -m benchmarks.queue``.

Both run against one embedded Postgres of the benchmark's own, fsync on, each in databases of its
own: pgscribe as migrated, procrastinate as its SchemaManager installs it, with its stock App,
connector and worker. Every worker is a process of its own. Rounds measure one system right after
the other, in turning order; figures are medians of the rounds, ratios are taken within a round and
are pgscribe's figure to procrastinate's.

- drain: no-op jobs a second, from the start of the worker to the commit of the last end.
  pgscribe's are of the full shape: row, queue job, events, mirror, result; 10 owners. c1, c100:
  jobs at a time. rtt1ms: a proxy adds half a millisecond each way.
- pickup: from just before the commit of one inserted row to the start of its task in an idle
  worker, on the clock that all processes share; next to it, from when the commit has returned.
- late: how much later than its time a scheduled job starts, and one that is tried again; from the
  end of an owner's job to the start of the next, for an owner who may have one at a time.
- enqueue: rows a second from one connection, each in a transaction, or 1,000 in a statement.
- idle: statements a second that an idle worker sends, transaction control included, as a proxy
  counts them.
- recovery: from kill -9 of a worker to the second start of its job, with another worker alive and
  the shortest stall timeout.

The last line is one JSON object.
"""

import asyncio
import json
import logging
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self
from uuid import UUID, uuid4

import click
import procrastinate
import psycopg
from psycopg.conninfo import make_conninfo

from db import migrate
from db.embedded import EmbeddedPostgres

OWNERS = [UUID(int=number) for number in range(1, 11)]
ONE_WAY = 0.0005  # seconds
STALL_TIMEOUT = 5.0
BATCH = 1000
PATIENCE = 300.0  # seconds for any one measurement
OURS, PLAIN = "pgscribe", "procrastinate"

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Sizes:
    """How much of each to measure."""

    jobs: int = 10_000  # drained at concurrency 100
    jobs_one_by_one: int = 5_000  # drained at concurrency 1
    jobs_far_away: int = 1_000  # drained by procrastinate through the proxy
    pickups: int = 200
    late: int = 10
    singles: int = 1_500
    batches: int = 10
    idle_seconds: float = 30.0


QUICK = Sizes(1_000, 500, 200, 50, 3, 300, 2, 5.0)


class System(Protocol):
    """One of the two systems."""

    name: str

    def install(self, url: str) -> None:
        """Make a database ready."""

    def insert(self, conn: Connection, number: int) -> None:
        """Insert that many jobs in one statement."""


class Pgscribe:
    """Ours."""

    name = OURS

    def install(self, url: str) -> None:
        """Migrate, and add owners."""
        migrate.migrate(url)
        with psycopg.connect(url) as conn:
            conn.execute(
                "insert into auth.users (id, email) select id, id || '@example.org'"
                " from unnest(%s::uuid[]) id",
                (OWNERS,),
            )

    def insert(self, conn: Connection, number: int) -> None:
        """Insert rows as a client would."""
        rows = [
            (OWNERS[n % len(OWNERS)], f"{OWNERS[n % len(OWNERS)]}/a.mp3") for n in range(number)
        ]
        if number == 1:
            conn.execute(
                "insert into public.processing_jobs (user_id, file_path) values (%s, %s)", rows[0]
            )
            return
        conn.execute(
            "insert into public.processing_jobs (user_id, file_path)"
            " select * from unnest(%s::uuid[], %s::text[])",
            tuple(map(list, zip(*rows, strict=True))),
        )


class Procrastinate:
    """Procrastinate, in the schema that it likes best."""

    name = PLAIN

    def install(self, url: str) -> None:
        """Install procrastinate's schema."""
        asyncio.run(self._install(url))

    async def _install(self, url: str) -> None:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    def insert(self, conn: Connection, number: int) -> None:
        """Insert with the function that procrastinate's App calls."""
        conn.execute(
            "select procrastinate_defer_jobs_v1(array_agg(row('transcription', 'transcribe', 0,"
            " null, null, jsonb_build_object('processing_job_id', id), null)"
            "::procrastinate_job_to_defer_v1)) from unnest(%s::text[]) id",
            ([str(uuid4()) for _ in range(number)],),
        )


SYSTEMS: tuple[System, System] = (Procrastinate(), Pgscribe())


class Child:
    """A process of the benchmark's that answers in lines of JSON; killed when left."""

    def __init__(self, module: str, *arguments: object) -> None:
        command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def fileno(self) -> int:
        """Return what becomes readable when it answers."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def read(self) -> Any:
        """Return its next answer."""
        assert self._process.stdout is not None
        if not select.select([self], [], [], PATIENCE)[0]:
            raise TimeoutError(f"No answer from {self._process.args!r}")
        return json.loads(self._process.stdout.readline())

    def ask(self) -> Any:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return self.read()


class Databases:
    """Databases on one server, one template for each system."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._names = (f"benchmark_{number}" for number in count())
        for system in SYSTEMS:
            server.create_database(system.name)
            server.bootstrap(system.name)
            system.install(server.url(database=system.name))

    @contextmanager
    def fresh(self, system: System) -> Iterator[str]:
        """Provide the URL of a new database."""
        name = next(self._names)
        self._server.create_database(name, template=system.name)
        try:
            yield make_conninfo(
                self._server.url(database=name), sslmode="disable", gssencmode="disable"
            )
        finally:
            self._server.drop_database(name)

    @contextmanager
    def proxy(self, url: str, delay: float) -> Iterator[tuple[Child, str]]:
        """Provide a proxy and the URL through it."""
        with Child("proxy", self._server.port, delay) as proxy:
            yield proxy, make_conninfo(url, port=proxy.read())


def worker(system: System, url: str, concurrency: int, *options: object) -> Child:
    """Start a worker process."""
    return Child("queue_worker", system.name, "--url", url, "--concurrency", concurrency, *options)


def in_turn(round_number: int) -> Sequence[System]:
    """Return the systems in this round's order."""
    return SYSTEMS[:: -1 if round_number % 2 else 1]


def connect(url: str) -> Connection:
    """Return a connection on which each statement is a transaction."""
    return psycopg.connect(url, autocommit=True)


def drain(
    databases: Databases, system: System, jobs: int, concurrency: int, delay: float = 0
) -> float:
    """Return the jobs a second that a worker drains."""
    with ExitStack() as stack:
        url = stack.enter_context(databases.fresh(system))
        with connect(url) as conn:
            system.insert(conn, jobs)
        if delay:
            url = stack.enter_context(databases.proxy(url, delay))[1]
        child = stack.enter_context(worker(system, url, concurrency, "--jobs", jobs))
        return float(jobs / child.read()["seconds"])


def pick_up(conn: Connection, system: System, child: Child) -> tuple[float, float]:
    """Return the milliseconds to the start of one job, from before and after its commit."""
    with conn.transaction():
        system.insert(conn, 1)
        committing = time.monotonic()
    committed = time.monotonic()
    started = child.read()["started"]
    time.sleep(random.uniform(0.015, 0.03))  # noqa: S311 - until the worker is idle again
    return 1000 * (started - committing), 1000 * (started - committed)


def pickup(databases: Databases, samples: int) -> dict[str, float]:
    """Return percentiles of both systems' pickup latency, measured alternately."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        idle = []
        for system in SYSTEMS:
            url = stack.enter_context(databases.fresh(system))
            child = stack.enter_context(worker(system, url, 10))
            idle.append((stack.enter_context(connect(url)), system, child))
        for number in range(-5, samples):
            for conn, system, child in idle:
                taken = pick_up(conn, system, child)
                if number >= 0:
                    times[system.name].append(taken)
    figures = {}
    for name, pairs in times.items():
        for since, values in zip(
            ("", " from commit's return"), zip(*pairs, strict=True), strict=True
        ):
            cuts = statistics.quantiles(values, n=100)
            figures[f"pickup p50 ms{since}/{name}"] = cuts[49]
            figures[f"pickup p99 ms{since}/{name}"] = cuts[98]
    return figures


def due(conn: Connection) -> float | None:
    """Return when the only job that waits falls due, on the monotonic clock."""
    row = conn.execute(
        "select extract(epoch from due_at)::float8 from public.processing_jobs"
        " where status = 'queued' and due_at > now()"
    ).fetchone()
    return row[0] + time.monotonic() - time.time() if row else None


def lateness(databases: Databases, samples: int) -> dict[str, float]:
    """Return medians of how late jobs of ours start that wait for something else than a slot."""
    ours = SYSTEMS[1]
    schedule = (
        "insert into public.processing_jobs (user_id, file_path, scheduled_at)"
        " values (%s, 'a/b.mp3', clock_timestamp() + interval '0.3 s')"
    )
    late: dict[str, list[float]] = defaultdict(list)

    def start_of(child: Child, due_at: float | None) -> float:
        assert due_at is not None
        return float(1000 * (child.read()["started"] - due_at))

    with ExitStack() as stack:
        url = stack.enter_context(databases.fresh(ours))
        conn = stack.enter_context(connect(url))
        conn.execute("select limit_owner(%s, 1)", (OWNERS[0],))
        with worker(ours, url, 10) as child:
            for _ in range(samples):
                conn.execute(schedule, (OWNERS[0],))
                late["late ms, scheduled"].append(start_of(child, due(conn)))
        with worker(ours, url, 10, "--behaviour", "fail") as child:
            for _ in range(samples):
                ours.insert(conn, 1)
                child.read()
                while (due_at := due(conn)) is None:
                    pass
                late["late ms, tried again"].append(start_of(child, due_at))
        with worker(ours, url, 10, "--behaviour", "take-time") as child:
            conn.execute(
                "insert into public.processing_jobs (user_id, file_path)"
                " select %s, 'a/b.mp3' from generate_series(0, %s)",
                (OWNERS[0], samples),
            )
            child.read()
            for _ in range(samples):
                late["late ms, after a released slot"].append(
                    start_of(child, child.read()["ended"])
                )
    return {f"{what}/{OURS}": statistics.median(values) for what, values in late.items()}


def enqueue(databases: Databases, system: System, rows: int, per_statement: int) -> float:
    """Return the rows a second that one connection inserts."""
    with databases.fresh(system) as url, connect(url) as conn:
        system.insert(conn, per_statement)
        begin = time.perf_counter()
        for _ in range(rows // per_statement):
            system.insert(conn, per_statement)
        return rows / (time.perf_counter() - begin)


def idle_statements(databases: Databases, seconds: float) -> dict[str, float]:
    """Return the statements a second of an idle worker of each system."""
    with ExitStack() as stack:
        proxies = []
        for system in SYSTEMS:
            url = stack.enter_context(databases.fresh(system))
            proxy, proxied = stack.enter_context(databases.proxy(url, 0))
            child = stack.enter_context(worker(system, proxied, 10))
            with connect(url) as conn:
                system.insert(conn, 1)
            child.read()
            proxies.append((system.name, proxy))
        time.sleep(2)
        before = [proxy.ask() for _, proxy in proxies]
        time.sleep(seconds)
        return {
            f"idle statements/s/{name}": (proxy.ask() - count_before) / seconds
            for (name, proxy), count_before in zip(proxies, before, strict=True)
        }


def recovery(databases: Databases) -> float:
    """Return the seconds from the kill of a worker to the second start of its job."""
    ours = SYSTEMS[1]
    with ExitStack() as stack:
        url = stack.enter_context(databases.fresh(ours))
        options = ("--stall-timeout", STALL_TIMEOUT, "--behaviour", "hang")
        workers = [stack.enter_context(worker(ours, url, 1, *options)) for _ in range(2)]
        time.sleep(1)
        with connect(url) as conn:
            ours.insert(conn, 1)
        victim = select.select(workers, [], [], PATIENCE)[0][0]
        victim.read()
        time.sleep(random.uniform(0, STALL_TIMEOUT / 3))  # noqa: S311 - any time between heartbeats
        killed = time.monotonic()
        victim.kill()
        workers.remove(victim)
        return float(workers[0].read()["started"] - killed)


def measure_round(databases: Databases, sizes: Sizes, number: int) -> dict[str, float]:
    """Measure everything but idle workers once."""
    figures: dict[str, float] = {}

    def measure(name: str, figure: Callable[[System], float]) -> None:
        for system in in_turn(number):
            figures[f"{name}/{system.name}"] = figure(system)

    def at_distance(system: System) -> int:
        return sizes.jobs if system.name == OURS else sizes.jobs_far_away

    measure("drain/s c100", lambda s: drain(databases, s, sizes.jobs, 100))
    measure("drain/s c1", lambda s: drain(databases, s, sizes.jobs_one_by_one, 1))
    measure("drain/s c100 rtt1ms", lambda s: drain(databases, s, at_distance(s), 100, ONE_WAY))
    figures |= pickup(databases, sizes.pickups)
    figures |= lateness(databases, sizes.late)
    measure("enqueue rows/s, one a statement", lambda s: enqueue(databases, s, sizes.singles, 1))
    measure(
        "enqueue rows/s, 1,000 a statement",
        lambda s: enqueue(databases, s, sizes.batches * BATCH, BATCH),
    )
    figures[f"recovery s, stall timeout {STALL_TIMEOUT:g} s/{OURS}"] = recovery(databases)
    return figures


class Results:
    """The figures of all rounds, each named ``what/system``."""

    def __init__(self) -> None:
        self._figures: dict[str, list[float]] = defaultdict(list)

    def add(self, figures: dict[str, float]) -> None:
        """Take a round's figures."""
        for name, figure in figures.items():
            self._figures[name].append(figure)

    def ours(self, what: str) -> float:
        """Return the median of pgscribe's figures."""
        return statistics.median(self._figures[f"{what}/{OURS}"])

    def ratio(self, what: str) -> float:
        """Return the median of the rounds' ratios."""
        pairs = zip(self._figures[f"{what}/{OURS}"], self._figures[f"{what}/{PLAIN}"], strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)

    def table(self) -> Iterator[str]:
        """Yield the lines of a table."""
        yield f"{'':42}{PLAIN:>14}{OURS:>14}{'ratio':>8}   rounds"
        for what in dict.fromkeys(name.rpartition("/")[0] for name in self._figures):
            plain = self._figures.get(f"{what}/{PLAIN}")
            before = f"{statistics.median(plain):14,.2f}" if plain else " " * 14
            ratio = f"{self.ratio(what):8.2f}" if plain else " " * 8
            rounds = " ".join(f"{figure:,.2f}" for figure in self._figures[f"{what}/{OURS}"])
            yield f"{what:42}{before}{self.ours(what):14,.2f}{ratio}   {rounds}"

    def summary(self) -> dict[str, float]:
        """Return the figures that the project has targets for."""
        figures = {
            "drain_ratio_c100": self.ratio("drain/s c100"),
            "drain_ratio_c1": self.ratio("drain/s c1"),
            "drain_ratio_c100_rtt1ms": self.ratio("drain/s c100 rtt1ms"),
            "drain_per_s_c100": self.ours("drain/s c100"),
            "pickup_p50_ms": self.ours("pickup p50 ms"),
            "pickup_p99_ms": self.ours("pickup p99 ms"),
            "pickup_ratio_p50": self.ratio("pickup p50 ms"),
            "enqueue_single_per_s": self.ours("enqueue rows/s, one a statement"),
            "enqueue_batch_per_s": self.ours("enqueue rows/s, 1,000 a statement"),
            "idle_queries_per_s": self.ours("idle statements/s"),
            "recovery_s": self.ours(f"recovery s, stall timeout {STALL_TIMEOUT:g} s"),
        }
        return {name: round(figure, 2) for name, figure in figures.items()}


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Leave by way of all clean-up."""
    sys.exit(128 + number)


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--jobs", default=Sizes.jobs, show_default=True, type=click.IntRange(100))
@click.option("--quick", is_flag=True, help="Few of everything: to try it out.")
def main(rounds: int, jobs: int, *, quick: bool) -> None:
    """Measure pgscribe's queue next to plain procrastinate."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    logging.getLogger("procrastinate.blueprints").setLevel(logging.ERROR)
    sizes = QUICK if quick else Sizes(jobs)
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres")
        try:
            server.start()
            databases = Databases(server)
            for number in range(rounds):
                results.add(measure_round(databases, sizes, number))
                click.echo(f"Round {number + 1} of {rounds} done", err=True)
            results.add(idle_statements(databases, sizes.idle_seconds))
        finally:
            server.remove()
    for line in results.table():
        click.echo(line)
    click.echo(json.dumps(results.summary()))


if __name__ == "__main__":
    main()
