"""Many streams of events on one web server: ``python -m benchmarks.listeners``.

A real ``pgscribe web`` on an embedded Postgres, and clients over real sockets in this process: of
each user's streams one is of all jobs, the others of one job. Times are from just before the commit
of a worker's progress until a client has read the event, on the clock that both processes share.

- event: a job of one user changes, seen by that user's streams.
- fan-out: one statement changes a job of every user, seen by all streams.

Memory is what the server's resident set grew by, divided by the streams. The last line is one JSON
object.
"""

import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import click
import psycopg

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs.dev import free_port
from jobs.settings import TokenSettings
from web.auth import issue_token

SECRET = "a secret of the benchmark's own, long enough"  # noqa: S105 - it opens nothing
PATIENCE = 60.0  # seconds
AT_A_TIME = 50  # streams that are opened together

Connection = psycopg.Connection[tuple[UUID, UUID]]


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


def add_jobs(conn: Connection, users: int) -> list[tuple[UUID, UUID]]:
    """Insert a running job for each of so many users; return who they are and which it is."""
    conn.execute(
        "insert into auth.users (id, email) select gen_random_uuid(), n || '@example.org'"
        " from generate_series(1, %s) n",
        (users,),
    )
    conn.execute(
        "insert into processing_jobs (user_id, file_path) select id, 'a/b.mp3' from auth.users"
    )
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    return conn.execute("select user_id, id from processing_jobs").fetchall()


def change(conn: Connection, jobs: Sequence[UUID]) -> float:
    """Write progress to jobs and return the time just before the commit."""
    with conn.transaction():
        conn.execute(
            "update processing_jobs set progress = progress + 0.001, updated_at = now()"
            " where id = any (%s)",
            (list(jobs),),
        )
        return time.monotonic()


def resident(pid: int) -> int:
    """Return the KiB of a process's resident set."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("No VmRSS")


@contextmanager
def web_server(url: str, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``pgscribe web``."""
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": url,
        "PGSCRIBE_JWT_SECRET": SECRET,
        "PGSCRIBE_STORAGE_DIR": str(folder / "storage"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "jobs.cli", "web", "--port", str(port), "--stop-with-stdin"]
    process = subprocess.Popen(
        command, env=environment, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


async def until_up(port: int) -> None:
    """Wait for the server."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    cuts = statistics.quantiles(values, n=100)
    return {f"{name}_p50_ms": round(cuts[49], 2), f"{name}_p99_ms": round(cuts[98], 2)}


async def measure(  # noqa: PLR0913 - each has a name
    conn: Connection, port: int, pid: int, *, listeners: int, users: int, samples: int
) -> dict[str, float]:
    """Return all figures."""
    await until_up(port)
    settings = TokenSettings.load(jwt_secret=SECRET)
    jobs = dict(add_jobs(conn, users + 1))
    tokens = [(user, issue_token(settings, user, lifetime=3600), job) for user, job in jobs.items()]
    warm_up = Streams(port)
    await warm_up.open(tokens[:1], 5)
    before = resident(pid)
    streams = Streams(port)
    begin = time.monotonic()
    await streams.open(tokens[1:], listeners // users)
    opened = time.monotonic() - begin
    grown = resident(pid) - before
    watched = list(streams.clients)
    events: list[float] = []
    await asyncio.sleep(2)  # until the second looks at all are done
    for number in range(samples):
        # Changes of one job that come in a quarter of a second are told together.
        await asyncio.sleep(max(0.05, 0.3 / users))
        user = watched[number % users]
        since = change(conn, [jobs[user]])
        events += await streams.arrivals([user], since)
    everybody: list[float] = []
    for _ in range(10):
        await asyncio.sleep(0.5)
        since = change(conn, [jobs[user] for user in watched])
        everybody += await streams.arrivals(watched, since)
    return {
        "sse_listeners": streams.connected,
        "opened_per_s": round(listeners / opened),
        **percentiles("event", events),
        **percentiles("fan_out", everybody),
        "memory_per_listener_kb": round(grown / listeners, 1),
        "memory_after_kb": round((resident(pid) - before) / listeners, 1),
    }


def measure_server(*, listeners: int, users: int, samples: int) -> dict[str, float]:
    """Return the figures of a server of its own, on a Postgres of its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = EmbeddedPostgres(folder / "postgres")
        try:
            server.start()
            migrate.migrate(server.url())
            port = free_port()
            with (
                psycopg.connect(server.url(), autocommit=True) as conn,
                web_server(server.url(), port, folder) as process,
            ):
                return asyncio.run(
                    measure(
                        conn, port, process.pid, listeners=listeners, users=users, samples=samples
                    )
                )
        finally:
            server.remove()


@click.command()
@click.option("--listeners", default=1000, show_default=True, type=click.IntRange(10))
@click.option("--users", default=200, show_default=True, type=click.IntRange(1))
@click.option("--samples", default=300, show_default=True, type=click.IntRange(10))
def main(listeners: int, users: int, samples: int) -> None:
    """Measure streams of events."""
    click.echo(json.dumps(measure_server(listeners=listeners, users=users, samples=samples)))


if __name__ == "__main__":
    main()
