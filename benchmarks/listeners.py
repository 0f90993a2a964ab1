"""Many streams of events on one web server."""

import asyncio
import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psycopg

from benchmarks.figures import Measurement, Section
from benchmarks.memory import resident
from benchmarks.web_process import WebProcess, token, web_process
from db import migrate
from db.embedded import EmbeddedPostgres

ROUNDS = 3
PATIENCE = 60.0  # seconds
AT_A_TIME = 50  # streams that are opened together

METHOD = """\
A real `pgscribe web` on an embedded Postgres, and {streams:,} streams of {users:,} users over real
sockets in another process, all on the same cores: of each user's streams one is of all jobs
(`GET /jobs/events`), the others of one job. Each round (at most {rounds}) has a fresh server and
database. Times are from just before the commit of a worker's progress until a client has read the
event, on the clock that both processes share.

- Event: {samples} times a job of one user changes, seen by that user's {per_user} streams.
- Fan-out: {fan_outs} times one statement changes a job of every user, seen by all streams.

Memory is what the web server's resident set grew by while the streams were opened, for each of
them."""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Sizes:
    """How much to measure."""

    streams: int = 1000
    users: int = 200
    samples: int = 150
    fan_outs: int = 10


QUICK = Sizes(100, 20, 20, 3)


class Client:
    """One stream. It notes when each event came."""

    def __init__(self, job_id: UUID, reader: asyncio.StreamReader) -> None:
        self._job = str(job_id).encode()
        self._reader = reader
        self.arrivals: asyncio.Queue[float] = asyncio.Queue()
        self.open = asyncio.Event()
        self.connected = True

    async def read(self) -> None:
        """Read until the end."""
        while line := await self._reader.readline():
            if line.startswith((b"event: job", b"event: snapshot")):
                self.arrivals.put_nowait(time.monotonic())
                self.open.set()
        self.connected = False


class Streams:
    """All clients."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: list[asyncio.Task[None]] = []
        self.clients: dict[UUID, list[Client]] = {}

    async def open(self, tokens: Sequence[tuple[UUID, str, UUID]], per_user: int) -> None:
        """Open all streams, some at a time, and wait for the first event of each."""
        wanted = [one for one in tokens for _ in range(per_user)]
        for start in range(0, len(wanted), AT_A_TIME):
            await asyncio.gather(*(self._open(*one) for one in wanted[start : start + AT_A_TIME]))

    async def _open(self, user: UUID, token: str, job_id: UUID) -> None:
        path = f"/jobs/{job_id}/events" if user in self.clients else "/jobs/events"
        mine = self.clients.setdefault(user, [])
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        client = Client(job_id, reader)
        mine.append(client)
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        writer.write(head.encode())
        self._tasks.append(asyncio.create_task(self._read(client, writer)))
        async with asyncio.timeout(PATIENCE):
            await client.open.wait()
        client.arrivals.get_nowait()

    @staticmethod
    async def _read(client: Client, writer: asyncio.StreamWriter) -> None:
        try:
            await client.read()
        finally:
            writer.close()

    async def arrivals(self, users: Sequence[UUID], since: float) -> list[float]:
        """Return the milliseconds until each of these users' streams had its event."""
        async with asyncio.timeout(PATIENCE):
            return [
                1000 * (await client.arrivals.get() - since)
                for user in users
                for client in self.clients[user]
            ]

    @property
    def connected(self) -> int:
        """How many are open."""
        return sum(client.connected for mine in self.clients.values() for client in mine)


def add_users(conn: Connection, users: int) -> list[UUID]:
    """Insert so many users."""
    rows = conn.execute(
        "insert into auth.users (id, email) select gen_random_uuid(), n || '@example.org'"
        " from generate_series(1, %s) n returning id",
        (users,),
    )
    return [row[0] for row in rows]


def add_jobs(conn: Connection, users: Sequence[UUID]) -> dict[UUID, UUID]:
    """Insert a running job for each of the users; return which it is."""
    rows = conn.execute(
        "insert into processing_jobs (user_id, file_path) select unnest(%s::uuid[]), 'a/b.mp3'"
        " returning user_id, id",
        (list(users),),
    )
    jobs: dict[UUID, UUID] = dict(rows.fetchall())
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'doing' where id in"
        " (select job_id::bigint from processing_jobs where id = any (%s))",
        (list(jobs.values()),),
    )
    return jobs


def with_tokens(jobs: Mapping[UUID, UUID]) -> list[tuple[UUID, str, UUID]]:
    """Return users, a token of each, and their jobs."""
    return [(user, token(user), job) for user, job in jobs.items()]


def change(conn: Connection, jobs: Sequence[UUID]) -> float:
    """Write progress to jobs and return the time just before the commit."""
    with conn.transaction():
        conn.execute(
            "update processing_jobs set progress = progress + 0.001, updated_at = now()"
            " where id = any (%s)",
            (list(jobs),),
        )
        return time.monotonic()


def percentile(values: list[float], percent: int) -> float:
    """Return what so many percent of the values are at most."""
    return statistics.quantiles(values, n=100)[percent - 1]


async def see_events(
    conn: Connection, streams: Streams, jobs: Mapping[UUID, UUID], samples: int
) -> list[float]:
    """Change one job after the other; return the milliseconds until its user's streams had it."""
    watched = list(streams.clients)
    events: list[float] = []
    await asyncio.sleep(2)  # until the second looks at all are done
    for number in range(samples):
        # Changes of one job that come in a quarter of a second are told together.
        await asyncio.sleep(max(0.05, 0.3 / len(watched)))
        user = watched[number % len(watched)]
        since = change(conn, [jobs[user]])
        events += await streams.arrivals([user], since)
    return events


async def fan_out(
    conn: Connection, streams: Streams, jobs: Mapping[UUID, UUID], samples: int
) -> list[float]:
    """Change all jobs at once; return the milliseconds until each stream had it."""
    watched = list(streams.clients)
    everybody: list[float] = []
    for _ in range(samples):
        await asyncio.sleep(0.5)
        since = change(conn, [jobs[user] for user in watched])
        everybody += await streams.arrivals(watched, since)
    return everybody


async def measure_round(conn: Connection, server: WebProcess, sizes: Sizes) -> dict[str, float]:
    """Open all streams and let jobs change."""
    jobs = add_jobs(conn, add_users(conn, sizes.users + 1))
    first, *others = with_tokens(jobs)
    warm_up, streams = Streams(server.port), Streams(server.port)
    await warm_up.open([first], 5)
    before = resident(server.pid)
    begin = time.monotonic()
    await streams.open(others, sizes.streams // sizes.users)
    opened = time.monotonic() - begin
    grown = resident(server.pid) - before
    events = await see_events(conn, streams, jobs, sizes.samples)
    everybody = await fan_out(conn, streams, jobs, sizes.fan_outs)
    return {
        "open": streams.connected,
        "opened": sizes.streams / opened,
        "event-p50": percentile(events, 50),
        "event-p99": percentile(events, 99),
        "fan-out-p50": percentile(everybody, 50),
        "fan-out-p99": percentile(everybody, 99),
        "memory": grown / sizes.streams * 1000,
    }


def measure_rounds(rounds: int, sizes: Sizes) -> list[dict[str, float]]:
    """Return the figures of each round."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = EmbeddedPostgres(folder / "postgres")
        stack.callback(postgres.remove)
        postgres.start()
        postgres.create_database("template")
        postgres.bootstrap("template")
        migrate.migrate(postgres.url(database="template"))
        found = []
        for number in range(rounds):
            name = f"round_{number}"
            postgres.create_database(name, template="template")
            url = postgres.url(database=name)
            with psycopg.connect(url, autocommit=True) as conn, web_process(url, folder) as server:
                found.append(asyncio.run(measure_round(conn, server, sizes)))
        return found


LINES: Mapping[str, tuple[str, str, Literal["higher", "lower"]]] = {
    "open": ("Streams open at the end, all of which had every event", "streams", "higher"),
    "opened": ("Streams opened in a second", "streams/s", "higher"),
    "event-p50": ("Event until read, p50", "ms", "lower"),
    "event-p99": ("Event until read, p99", "ms", "lower"),
    "fan-out-p50": ("Event to all streams until read, p50", "ms", "lower"),
    "fan-out-p99": ("Event to all streams until read, p99", "ms", "lower"),
    "memory": ("Memory of the web server for each stream", "kB", "lower"),
}


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Measure streams of events."""
    sizes = QUICK if quick else Sizes()
    found = measure_rounds(min(rounds, ROUNDS), sizes)
    return Section(
        "listeners",
        "Streams of events",
        METHOD.format(**vars(sizes), rounds=ROUNDS, per_user=sizes.streams // sizes.users),
        [
            Measurement(
                f"listeners-{name}",
                what,
                unit,
                better,
                {"pgscribe": [figures[name] for figures in found]},
                headline=name == "event-p99",
            )
            for name, (what, unit, better) in LINES.items()
        ],
    )
