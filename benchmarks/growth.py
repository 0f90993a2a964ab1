"""How everything changes with ten and a hundred times the rows."""

import asyncio
import functools
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.filling import OWNER, QUERIES, fill, with_transcripts
from benchmarks.growth_at_rest import STALL, measure_at_rest, measure_upkeep
from benchmarks.listeners import Streams, add_jobs, fan_out, see_events, with_tokens
from benchmarks.queue_child import Work
from benchmarks.queue_systems import OURS, Child, of_python, worker
from benchmarks.web_process import open_stream, read_answer, request, token, web_process
from db import named_queries
from db.embedded import EmbeddedPostgres

ASKED = named_queries.load(Path(__file__).with_suffix(".sql"))
ROUNDS = 3
CONCURRENCY = 100
PER_OWNER = 2  # streams
WARM_UP, FEWEST = 2, 3  # requests
ENOUGH = 2.0  # seconds for requests of one kind

METHOD = """\
Databases with {ended} jobs that ended within twenty days, of 500 owners, half of them one owner's;
and with {waiting} jobs that wait, of 100 owners, beside {base:,} that ended. Each is filled once,
its days that are over are added up, as workers do with one a minute, it is analysed, and for each
round copied (`create database … template`); the copies of a round are measured one after the other,
in turning order, and each comes with nothing in Postgres' own cache. The newest 1,000 jobs that
ended have a transcript, that of a minute; the others' are empty, so that a million fit. Ratios are
to the smallest. At most {rounds} rounds.

- By REST, one request after the other to a `pgscribe web` process, medians of {asks}, or of as
  many as fit into 2 s: a job with its transcript (at random of the owner's newest 500 that have
  one), the newest 20, the newest 20 that failed, the operator's overview of 24 hours, in which a
  twentieth of the jobs ended (and for its costs, those of today in UTC are added up); and the time
  from opening a stream of events until its snapshot has begun.
- By SQL, medians of {queries}: `queue_health`, `operator_metrics()`, which is what a scrape of
  `/metrics` reads, and what the views and functions for the dashboard show.
- Starts: a worker with {concurrency} jobs at a time that do nothing, of {few:,} that wait already,
  or of {many:,} inserted before it started where none wait. The first {concurrency} are not
  counted, since their slots were free.
- Pickup: from just before the commit of an inserted row to its start in that worker, idle; median
  of {pickups}.
- Enqueue: rows a second of one connection, each row a transaction, and 1,000 a statement.

Of the databases with jobs that ended, also:

- Upkeep: what a worker does every minute (calls, audio and usage that jobs may have left) and every
  ten (retention, which keeps everything for 30 days here) where there is nothing to do; medians of
  {queries}.
- Streams of events, last in the first round: {listeners} of them, {per_owner} of each owner, as in
  the [section on them](#listeners), none of the owner who has half of all jobs: opened in a second;
  medians of {events} changes of a job, seen by its owner's streams, and of {fan_outs} changes of a
  job of every owner, seen by all.
- Recovery, once for all rounds, all databases side by side: from `kill -9` of a worker to the start
  of its job in another one, as in the [section on the queue](#queue), stalled after {stall} s; mean
  of {kills} workers in a database.
- At rest, after that, in copies of their own, all side by side for {idle_seconds} s: what an idle
  worker sends, and a `pgscribe web` with one open stream of the owner of half of all jobs; and how
  long Postgres executes statements for them (`active_time` of pg_stat_database), by the minute.
  That worker has no upkeep: see there."""


@dataclass(frozen=True)
class Sizes:
    """How many rows, and how much to measure."""

    ended: Sequence[int] = (10_000, 100_000, 1_000_000)
    waiting: Sequence[int] = (1_000, 10_000, 100_000)
    asks: int = 60
    queries: int = 5
    few: int = 900
    many: int = 3_000
    pickups: int = 40
    singles: int = 300
    batches: int = 5
    listeners: int = 100
    events: int = 30
    fan_outs: int = 4
    idle_seconds: int = 30
    kills: int = 3


QUICK = Sizes((1_000, 10_000), (300, 3_000), 5, 2, 250, 300, 5, 30, 1, 10, 5, 2, 11, 1)


@dataclass(frozen=True)
class Line:
    """A line of the report. ``waiting``: whether it is also asked of databases whose jobs wait."""

    what: str
    unit: str = "ms"
    waiting: bool = True
    note: str = ""


PATHS = {
    "get": "/jobs/{job}",
    "list": "/jobs?limit=20",
    "list-failed": "/jobs?limit=20&status=failed",
    "overview": "/operate/overview",
}
# As EXPLAIN says: most owners have 20 jobs of 10,000, so no index in their order seems worth it.
SORTED = "With 10,000 jobs the planner sorts all of this owner, who has half of them."
RATES = {"jobs/s", "rows/s", "streams/s"}  # the others are times and loads
HEADLINES = ("starts", "get")
LINES = {
    "get": Line("`GET /jobs/{id}`", waiting=False),
    "list": Line("`GET /jobs`", note=SORTED),
    "list-failed": Line("`GET /jobs?status=failed`", waiting=False),
    "overview": Line("`GET /operate/overview`"),
    "snapshot": Line("`GET /jobs/events` until its snapshot"),
    "health": Line("`queue_health`"),
    "metrics": Line("`operator_metrics()`"),
    "newest": Line("`job_inspection`: the newest 100 of all"),
    "owner-newest": Line(
        "`job_inspection`: the newest 100 of one owner, as that owner", note=SORTED
    ),
    "failed": Line("`operator_inspect_jobs('failed')`: 100", waiting=False),
    "whose-wait": Line("`job_inspection`: whose jobs wait"),
    "cost": Line("`job_inspection`: what all jobs cost, by owner", waiting=False),
    "starts": Line(f"Starts, {CONCURRENCY} at a time", "jobs/s"),
    "pickup": Line("Pickup by an idle worker, p50", waiting=False),
    "enqueue": Line("Enqueue, a row a transaction", "rows/s"),
    "enqueue-many": Line("Enqueue, 1,000 rows a statement", "rows/s"),
    "upkeep": Line("Upkeep of a worker, every minute", waiting=False),
    "retention": Line("Upkeep of a worker, every ten minutes", waiting=False),
    "streams-opened": Line("Streams of events, opened", "streams/s", waiting=False),
    "stream-event": Line("Event of a job until its streams had it, p50", waiting=False),
    "stream-fan-out": Line("Event of all jobs until all streams had it, p50", waiting=False),
}
AT_REST = {
    "idle-worker": Line("Idle worker, statements", "/s"),
    "idle-worker-time": Line("Idle worker, time in the database", "ms/minute"),
    "idle-web": Line("Web server with one stream, statements", "/s"),
    "idle-web-time": Line("Web server with one stream, time in the database", "ms/minute"),
    "recovery": Line("Recovery after `kill -9`", "s"),
}
BY_SQL = {
    "health": "admin_health",
    "metrics": "owner_metrics",
    "newest": "admin_newest",
    "owner-newest": "owner_newest",
    "failed": "owner_failed",
    "whose-wait": "admin_whose_wait",
    "cost": "admin_cost",
}
Figures = dict[str, float]
Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Filled:
    """A database to copy: its name, and what its column is called."""

    name: str
    column: str
    waiting: bool


def by_sql(conn: Connection, sizes: Sizes) -> Figures:
    """Return the milliseconds of each query."""
    return {
        name: _median(functools.partial(_ask, conn, query), sizes.queries)
        for name, query in BY_SQL.items()
    }


def _ask(conn: Connection, query: str) -> float:
    values = {"owner": OWNER}
    with conn.transaction():
        if query.startswith("owner_"):
            conn.execute(ASKED["act_as"], values)
        begin = time.perf_counter()
        conn.execute(ASKED[query], values).fetchall()
        return 1000 * (time.perf_counter() - begin)


def _median(ask: Callable[[], float], count: int) -> float:
    ask()  # plans and caches
    return statistics.median(ask() for _ in range(count))


async def by_rest(port: int, jobs: Sequence[str], sizes: Sizes) -> Figures:
    """Return the milliseconds of each request."""
    mine, chance = token(OWNER), random.Random(1)  # noqa: S311 - no secret
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found: Figures = {}
    for name, path in PATHS.items():
        taken: list[float] = []
        until = time.monotonic() + ENOUGH
        while len(taken) < WARM_UP + sizes.asks:
            if time.monotonic() > until and len(taken) >= WARM_UP + FEWEST:
                break
            made = request("GET", path.format(job=chance.choice(jobs)), mine)
            begin = time.perf_counter()
            writer.write(made)
            await read_answer(reader)
            taken.append(1000 * (time.perf_counter() - begin))
        found[name] = statistics.median(taken[WARM_UP:])
    writer.close()
    return found


def _snapshot(port: int) -> float:
    begin = time.perf_counter()
    with open_stream(port, token(OWNER)):
        return 1000 * (time.perf_counter() - begin)


async def by_streams(conn: Connection, port: int, sizes: Sizes) -> Figures:
    """Return how soon many streams are open, and have events."""
    owners = {"owner": OWNER, "users": sizes.listeners // PER_OWNER}
    jobs = add_jobs(conn, [user for (user,) in conn.execute(ASKED["others"], owners)])
    tokens, streams = with_tokens(jobs), Streams(port)
    begin = time.perf_counter()
    await streams.open(tokens, PER_OWNER)
    opened = time.perf_counter() - begin
    return {
        "streams-opened": sizes.listeners / opened,
        "stream-event": statistics.median(await see_events(conn, streams, jobs, sizes.events)),
        "stream-fan-out": statistics.median(await fan_out(conn, streams, jobs, sizes.fan_outs)),
    }


def by_worker(conn: Connection, url: str, sizes: Sizes, *, waiting: bool) -> Figures:
    """Return how fast jobs start, and how soon one where none waits."""
    count = sizes.few if waiting else sizes.many
    if not waiting:
        conn.execute(QUERIES["waiting"], {"owner": OWNER, "jobs": count})
    process = of_python(OURS, "benchmarks.queue_worker", OURS)
    with worker(process, Work(url, CONCURRENCY)) as child:
        starts = [child.read()["started"] for _ in range(count)]
        steady = starts[CONCURRENCY:]  # the first ones had slots that were free
        found = {"starts": (len(steady) - 1) / (steady[-1] - steady[0])}
        if not waiting:
            time.sleep(0.5)  # until the worker is idle
            found["pickup"] = statistics.median(_pick_up(conn, child) for _ in range(sizes.pickups))
    return found


def _pick_up(conn: Connection, child: Child) -> float:
    with conn.transaction():
        conn.execute(ASKED["submit"], {"owner": OWNER})
        committing = time.monotonic()
    started: float = child.read()["started"]
    time.sleep(random.uniform(0.015, 0.03))  # noqa: S311 - until the worker is idle again
    return 1000 * (started - committing)


def enqueue(conn: Connection, sizes: Sizes) -> Figures:
    """Return rows a second."""

    def rate(query: str, statements: int, rows: int) -> float:
        begin = time.perf_counter()
        for _ in range(statements):
            conn.execute(ASKED[query], {"owner": OWNER})
        return rows / (time.perf_counter() - begin)

    return {
        "enqueue": rate("submit", sizes.singles, sizes.singles),
        "enqueue-many": rate("submit_many", sizes.batches, 1000 * sizes.batches),
    }


def measure_copy(
    server: EmbeddedPostgres, filled: Filled, folder: Path, sizes: Sizes, *, streams: bool
) -> Figures:
    """Copy a database, measure everything with it, and drop it."""
    server.create_database("copy", template=filled.name)
    url = server.url(database="copy")
    jobs = with_transcripts(url)
    with psycopg.connect(url, autocommit=True) as conn:
        found = by_sql(conn, sizes)
        with web_process(url, folder) as web:
            found |= asyncio.run(by_rest(web.port, jobs, sizes))
            found["snapshot"] = _median(functools.partial(_snapshot, web.port), sizes.queries)
            if not filled.waiting:
                found |= asyncio.run(measure_upkeep(url, folder, sizes.queries))
            found |= by_worker(conn, url, sizes, waiting=filled.waiting)
            found |= enqueue(conn, sizes)
            if streams:
                found |= asyncio.run(by_streams(conn, web.port, sizes))
    server.drop_database("copy")
    return found


def fill_all(server: EmbeddedPostgres, sizes: Sizes) -> Iterator[Filled]:
    """Make the databases."""
    for number in sizes.ended:
        fill(server, f"ended_{number}", ended=number)
        yield Filled(f"ended_{number}", f"{number:,} ended", waiting=False)
    for number in sizes.waiting:
        fill(server, f"waiting_{number}", ended=sizes.ended[0], waiting=number)
        yield Filled(f"waiting_{number}", f"{number:,} waiting", waiting=True)


def measurements(
    kind: str, lines: Mapping[str, Line], found: Mapping[str, Sequence[Figures]]
) -> Iterator[Measurement]:
    """Yield the lines for some databases."""
    for name, line in lines.items():
        yield Measurement(
            f"growth-{kind}-{name}",
            line.what,
            line.unit,
            "higher" if line.unit in RATES else "lower",
            {
                column: [figures[name] for figures in rounds if name in figures]
                for column, rounds in found.items()
            },
            next(iter(found)),
            line.note if kind == "ended" else "",
            headline=name in HEADLINES,
        )


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Measure with all numbers of rows."""
    sizes = QUICK if quick else Sizes()
    found: dict[bool, dict[str, list[Figures]]] = {
        waiting: defaultdict(list) for waiting in (False, True)
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = EmbeddedPostgres(folder / "postgres")
        stack.callback(server.remove)
        server.start()
        databases = list(fill_all(server, sizes))
        ended = {one.name: one.column for one in databases if not one.waiting}
        for number in range(min(rounds, ROUNDS)):
            for one in databases[:: -1 if number % 2 else 1]:
                streams = number == 0 and not one.waiting
                figures = measure_copy(server, one, folder, sizes, streams=streams)
                found[one.waiting][one.column].append(figures)
        at_rest = measure_at_rest(server, list(ended), folder, sizes.idle_seconds, sizes.kills)
    ordered = {
        waiting: {
            one.column: found[waiting][one.column] for one in databases if one.waiting == waiting
        }
        for waiting in found
    }
    of_waiting = {name: line for name, line in LINES.items() if line.waiting}
    return Section(
        "growth",
        "Growth with rows",
        METHOD.format(
            **{name: value for name, value in vars(sizes).items() if isinstance(value, int)},
            ended=_listed(sizes.ended),
            waiting=_listed(sizes.waiting),
            base=sizes.ended[0],
            concurrency=CONCURRENCY,
            rounds=ROUNDS,
            per_owner=PER_OWNER,
            stall=STALL,
        ),
        [
            *measurements("ended", LINES, ordered[False]),
            *measurements("ended", AT_REST, {ended[name]: [at_rest[name]] for name in ended}),
            *measurements("waiting", of_waiting, ordered[True]),
        ],
        plots=[
            Plot(
                f"growth-{kind}-plot",
                f"With more jobs that {verb}",
                "lines",
                [f"growth-{kind}-{name}" for name in names],
                logarithmic=True,
            )
            for kind, verb, names in (
                (
                    "ended",
                    "ended",
                    ("get", "list", "overview", "snapshot", "health", "pickup", "stream-event"),
                ),
                ("waiting", "wait", ("list", "overview", "snapshot", "health")),
            )
        ],
    )


def _listed(sizes: Sequence[int]) -> str:
    *first, last = (f"{size:,}" for size in sizes)
    return f"{', '.join(first)} and {last}"
