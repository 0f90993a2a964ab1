"""The REST API over real sockets: ``python -m benchmarks.api``.

One `pgscribe web` process and one embedded Postgres of the benchmark's own, fsync on; this process
asks, over connections that stay open. All shares the machine's cores, so figures are lower bounds.

- get_job_per_s, get_job_p99_ms: ``GET /jobs/{id}`` of random jobs of one owner, completed, with a
  transcript of a minute of speech.
- post_process_per_s: ``POST /process``, each a committed job with its queue job.
- list_per_s: ``GET /jobs?limit=20``, and with a status that few jobs have.
- rows_1m_ratio: the same mix of requests (get, list, list by status, submit) against a database
  with 1,000,000 jobs and one with 1,000, in turns: throughput of the first over the second. Both
  are served by a process of their own, and half of the jobs are the owner's who asks.
- sse_listeners: streams of events that stay open on one process, and what else
  ``benchmarks.listeners`` measures of them.

Figures are medians of the rounds. The last line is one JSON object.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import click
import psycopg

from benchmarks import listeners
from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.dev import free_port
from jobs.settings import TokenSettings
from web.auth import issue_token

OWNER, OTHER = UUID(int=1), UUID(int=2)
SECRET = "a secret of thirty-two characters or more"  # noqa: S105 - the benchmark's own
CONNECTIONS = 16
FEW, MANY = 1_000, 1_000_000
START_TIMEOUT = 60.0  # seconds

# As in tests/integration/test_query_plans.py: rows that ended long ago, without the triggers.
_TRANSCRIPT = {
    "text": "It was the best of times, it was the worst of times. " * 16,
    "language": "en",
    "duration": 60.0,
    "engine": "faster-whisper",
    "model": "base",
    "segments": [
        {
            "start": number * 4.0,
            "end": number * 4.0 + 4,
            "text": "It was the best of times, it was the worst of times.",
            "avg_logprob": -0.2,
            "no_speech_prob": 0.01,
            "compression_ratio": 1.4,
        }
        for number in range(15)
    ],
}
_FINISHED = """
with finished as (
  select gen_random_uuid() as id, n, now() - interval '20 days' * (1 - n::float8 / %(count)s) as at
    from generate_series(1, %(count)s) n),
queue_jobs as (
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args, status, attempts)
  select n, 'transcription', 'transcribe', jsonb_build_object('processing_job_id', id),
         'succeeded', 1
    from finished)
insert into public.processing_jobs
  (id, user_id, file_path, job_id, status, progress, attempt, started_at, completed_at, created_at,
   audio_seconds, result, error_code, error)
select id, (%(owners)s::uuid[])[1 + n %% 2], 'a/b.mp3', n::text,
       case when n %% 500 = 1 then 'failed' else 'completed' end, 1, 1, at, at, at, 60,
       case when n %% 500 <> 1 then
         case when %(count)s - n < 1000 then %(transcript)s::jsonb else '{"text": "no"}' end end,
       case when n %% 500 = 1 then 'no_speech' end, case when n %% 500 = 1 then 'Silence.' end
  from finished
"""


@dataclass(frozen=True)
class Server:
    """A running web server, and ids of jobs that it has."""

    port: int
    job_ids: tuple[str, ...]


@dataclass(frozen=True)
class Load:
    """What a number of requests took: requests a second, and each one's seconds."""

    per_second: float
    latencies: Sequence[float]

    @property
    def p99_ms(self) -> float:
        """Milliseconds that one in a hundred requests took longer than."""
        return statistics.quantiles(self.latencies, n=100)[98] * 1000


Request = Callable[[], bytes]


class Requests:
    """Requests of the owner, as bytes: a client library would take longer than the server."""

    def __init__(self, server: Server, *, seed: int) -> None:
        token = issue_token(TokenSettings.load(jwt_secret=SECRET), OWNER, lifetime=3600)
        self._head = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n"
        self._ids = server.job_ids
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._numbers = itertools.count()

    def _get(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode()

    def get_job(self) -> bytes:
        """``GET /jobs/{id}``."""
        return self._get(f"/jobs/{self._random.choice(self._ids)}")

    def list_jobs(self) -> bytes:
        """``GET /jobs``: the first page."""
        return self._get("/jobs?limit=20")

    def list_failed(self) -> bytes:
        """``GET /jobs?status=failed``."""
        return self._get("/jobs?limit=20&status=failed")

    def submit(self) -> bytes:
        """``POST /process``."""
        body = json.dumps({"filePath": f"{OWNER}/{next(self._numbers)}.mp3"})
        head = f"POST /process HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        return (head + body).encode()

    def mix(self) -> bytes:
        """One of all of them, mostly reads."""
        kinds = (self.get_job, self.get_job, self.list_jobs, self.list_failed, self.submit)
        return self._random.choice(kinds)()


async def put_load(server: Server, make: Request, requests: int) -> Load:
    """Send that many requests over ``CONNECTIONS`` connections."""
    latencies: list[float] = []
    turns = iter(range(requests))

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in turns:
            started = time.perf_counter()
            writer.write(make())
            await _read_answer(reader)
            latencies.append(time.perf_counter() - started)
        writer.close()
        await writer.wait_closed()

    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return Load(requests / (time.perf_counter() - started), latencies)


async def _read_answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:20] and b" 202 " not in head[:20]:
        raise RuntimeError(f"The server answered {head[:200]!r}")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    )
    await reader.readexactly(length)


def fill(postgres: EmbeddedPostgres, name: str, rows: int) -> None:
    """Make a migrated database with that many ended jobs, half of them the owner's."""
    postgres.create_database(name)
    postgres.bootstrap(name)
    migrate.migrate(postgres.url(database=name))
    with psycopg.connect(postgres.url(database=name, user=SUPERUSER), autocommit=True) as conn:
        conn.execute("set session_replication_role = replica")  # the rows bring all they need
        conn.execute(
            "insert into auth.users (id, email) select id, id || '@example.org'"
            " from unnest(%s::uuid[]) id",
            ([OWNER, OTHER],),
        )
        conn.execute(
            _FINISHED,
            {"count": rows, "owners": [OWNER, OTHER], "transcript": json.dumps(_TRANSCRIPT)},
        )
        conn.execute("select setval('procrastinate.procrastinate_jobs_id_seq', %s)", (rows + 1,))
        conn.execute("vacuum analyze")


@contextmanager
def serve(postgres: EmbeddedPostgres, name: str, folder: Path) -> Iterator[Server]:
    """Run a web server on that database."""
    url = postgres.url(database=name)
    with psycopg.connect(url) as conn:
        ids = conn.execute(
            "select id::text from public.processing_jobs"
            " where user_id = %s and result ? 'segments' order by created_at desc limit 500",
            (OWNER,),
        ).fetchall()
    port = free_port()
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": url,
        "PGSCRIBE_JWT_SECRET": SECRET,
        "PGSCRIBE_STORAGE_DIR": str(folder / "storage"),
        "PGSCRIBE_RATE_LIMIT": "0",
    }
    with (folder / f"{name}.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "web", "--stop-with-stdin", "--port", str(port)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            _wait_until_open(port, child)
            yield Server(port, tuple(row[0] for row in ids))
        finally:
            child.terminate()
            child.wait(30)


def _wait_until_open(port: int, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(OSError):
            asyncio.run(_connect(port))
            return
        time.sleep(0.1)
    raise RuntimeError("The web server did not start")


async def _connect(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    await writer.wait_closed()


async def measure_round(few: Server, many: Server, number: int, requests: int) -> dict[str, float]:
    """Measure all once; which database comes first changes with each round."""
    ours = Requests(few, seed=number)
    get_job = await put_load(few, ours.get_job, requests)
    figures = {
        "get_job_per_s": get_job.per_second,
        "get_job_p99_ms": get_job.p99_ms,
        "list_per_s": (await put_load(few, ours.list_jobs, requests)).per_second,
        "list_failed_per_s": (await put_load(few, ours.list_failed, requests)).per_second,
        "post_process_per_s": (await put_load(few, ours.submit, requests)).per_second,
    }
    mixed: dict[Server, float] = {}
    for server in (few, many) if number % 2 else (many, few):
        load = await put_load(server, Requests(server, seed=number).mix, requests)
        mixed[server] = load.per_second
    return figures | {
        "mix_per_s": mixed[few],
        "mix_1m_per_s": mixed[many],
        "rows_1m_ratio": mixed[many] / mixed[few],
    }


def measure(rounds: int, requests: int, rows: int) -> dict[str, float]:
    """Return the medians of all rounds."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(EmbeddedPostgres(folder / "postgres"))
        fill(postgres, "few", FEW)
        fill(postgres, "many", rows)
        few = stack.enter_context(serve(postgres, "few", folder))
        many = stack.enter_context(serve(postgres, "many", folder))
        for server in (few, many):  # plans, connections, caches
            asyncio.run(put_load(server, Requests(server, seed=0).mix, 200))
        results = []
        for number in range(rounds):
            results.append(asyncio.run(measure_round(few, many, number, requests)))
            click.echo(json.dumps({k: round(v, 3) for k, v in results[-1].items()}), err=True)
    return {name: statistics.median(r[name] for r in results) for name in results[0]}


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--requests", default=2000, show_default=True, help="Of each kind, per round.")
@click.option("--rows", default=MANY, show_default=True, help="Jobs in the large database.")
@click.option("--streams", default=1000, show_default=True, type=click.IntRange(10))
def main(rounds: int, requests: int, rows: int, streams: int) -> None:
    """Measure the REST API and print one JSON object as the last line."""
    figures = measure(rounds, requests, rows)
    figures |= listeners.measure_server(listeners=streams, users=200, samples=300)
    click.echo(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
