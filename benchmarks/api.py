"""The REST API over real sockets, next to the same server stack without pgscribe."""

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks import bare_routes
from benchmarks.figures import Measurement, Plot, Section
from benchmarks.filling import OWNER, fill, with_transcripts
from benchmarks.web_process import WebProcess, read_answer, request, token, web_process
from db.embedded import EmbeddedPostgres

CONNECTIONS = 16
JOBS = 1_000
BARE, OURS = "bare route", "pgscribe"

METHOD = f"""\
One web server process and one embedded Postgres (fsync on); one client process sends requests over
{CONNECTIONS} connections that stay open, on each the next one when the last was answered. All share
the machine's cores, so figures are lower bounds. The database has {JOBS:,} jobs that ended.

- `GET /jobs/{{id}}`: random jobs of one owner, with the transcript of a minute of speech.
- `GET /jobs`: the owner's newest 20.
- `POST /process`: each a committed job with its queue job.

`{BARE}` is the yardstick: the same uvicorn, Starlette and pool of connections with a route that
does one statement for each (a select by the key, one by an index, an insert into a table without
triggers), and nothing of pgscribe: no token is checked, no row level security, no check of what
comes in, no queue. Both take turns within a round."""


@dataclass(frozen=True)
class Load:
    """What a number of requests took: requests a second, and each one's seconds."""

    per_second: float
    latencies: Sequence[float]

    def percentile(self, percent: int) -> float:
        """Return the milliseconds that so many percent of the requests took at most."""
        return statistics.quantiles(self.latencies, n=100)[percent - 1] * 1000


class Requests:
    """Requests of the owner."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._token = token(OWNER)
        self._ids = ids
        self._random = random.Random(1)  # noqa: S311 - no secret
        self._numbers = itertools.count()

    def get_job(self) -> bytes:
        """``GET /jobs/{id}``."""
        return request("GET", f"/jobs/{self._random.choice(self._ids)}", self._token)

    def list_jobs(self) -> bytes:
        """``GET /jobs``: the first page."""
        return request("GET", "/jobs?limit=20", self._token)

    def list_of_owner(self) -> bytes:
        """As ``list_jobs``, for a server that knows no tokens."""
        return request("GET", f"/jobs?owner={OWNER}", self._token)

    def submit(self) -> bytes:
        """``POST /process``."""
        body = json.dumps({"filePath": f"{OWNER}/{next(self._numbers)}.mp3"})
        return request("POST", "/process", self._token, body)


Make = Callable[[], bytes]
KINDS = {
    "get": "`GET /jobs/{id}`",
    "list": "`GET /jobs`, 20 jobs",
    "submit": "`POST /process`",
}


async def put_load(server: WebProcess, make: Make, requests: int) -> Load:
    """Send that many requests over all connections."""
    latencies: list[float] = []
    turns = iter(range(requests))

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in turns:
            started = time.perf_counter()
            writer.write(make())
            await read_answer(reader)
            latencies.append(time.perf_counter() - started)
        writer.close()
        await writer.wait_closed()

    started = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(CONNECTIONS)))
    return Load(requests / (time.perf_counter() - started), latencies)


Loads = Mapping[str, Mapping[str, Sequence[Load]]]  # by kind and server, one for each round


def measure_rounds(
    servers: Mapping[str, WebProcess],
    makes: Mapping[str, Mapping[str, Make]],
    rounds: int,
    requests: int,
) -> Loads:
    """Put each load on each server, in turning order; what comes before round 0 warms up."""
    loads: dict[str, dict[str, list[Load]]] = defaultdict(lambda: {name: [] for name in servers})
    for number in range(-1, rounds):
        for kind in KINDS:
            for name in list(servers)[:: -1 if number % 2 else 1]:
                how_many = requests if number >= 0 else 200
                load = asyncio.run(put_load(servers[name], makes[name][kind], how_many))
                if number >= 0:
                    loads[kind][name].append(load)
    return loads


def measurements(loads: Loads) -> Iterator[Measurement]:
    """Yield the lines of the report."""
    for kind, what in KINDS.items():
        yield Measurement(
            f"api-{kind}",
            what,
            "requests/s",
            "higher",
            {name: [load.per_second for load in found] for name, found in loads[kind].items()},
            BARE,
            headline=kind == "submit",
        )
    for kind, what in KINDS.items():
        for percent in (50, 99):
            yield Measurement(
                f"api-{kind}-p{percent}",
                f"{what}, p{percent} with {CONNECTIONS} at a time",
                "ms",
                "lower",
                {
                    name: [load.percentile(percent) for load in found]
                    for name, found in loads[kind].items()
                },
                BARE,
            )


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Measure the API."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = EmbeddedPostgres(folder / "postgres")
        stack.callback(postgres.remove)
        postgres.start()
        fill(postgres, "api", ended=JOBS)
        url = postgres.url(database="api")
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(bare_routes.TABLE)
        ours = Requests(with_transcripts(url))
        servers = {
            BARE: stack.enter_context(web_process(url, folder, "benchmarks.bare_routes")),
            OURS: stack.enter_context(web_process(url, folder)),
        }
        of_ours = {"get": ours.get_job, "list": ours.list_jobs, "submit": ours.submit}
        makes = {OURS: of_ours, BARE: of_ours | {"list": ours.list_of_owner}}
        loads = measure_rounds(servers, makes, rounds, 200 if quick else 1000)
    return Section(
        "api",
        "REST API",
        METHOD,
        list(measurements(loads)),
        plots=[
            Plot("api-plot", "Requests a second", "bars", [f"api-{kind}" for kind in KINDS]),
        ],
    )
