"""What workers and web servers with nothing to do cost databases of different sizes.

And how soon a worker takes the place of one that was killed, which is a wait more than work.
"""

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.filling import OWNER
from benchmarks.filling import QUERIES as FILLING
from benchmarks.queue_child import Work
from benchmarks.queue_rounds import MINUTE, Standby, standby, take_overs, wait_until_ready
from benchmarks.queue_systems import OURS, Child, Place, of_python, worker
from benchmarks.queue_worker import upkeep
from benchmarks.web_process import open_stream, token, web_process
from db import named_queries
from db.embedded import EmbeddedPostgres
from jobs import database
from jobs.settings import Settings
from jobs.storage.choose import make_storage

ASKED = named_queries.load(Path(__file__).with_name("growth.sql"))
SYSTEM = of_python(OURS, "benchmarks.queue_worker", OURS)
STALL = 5  # seconds
SETTLED = 11.0  # seconds: until then Postgres tells of a session's start, at the latest
KEPT = 30  # days: no job has ended so long ago

Connection = psycopg.Connection[tuple[Any, ...]]
Figures = dict[str, float]


async def measure_upkeep(url: str, folder: Path, samples: int) -> Figures:
    """Return the medians of the milliseconds of what workers do every minute and every ten."""
    settings = Settings.load(
        database_url=url, storage_dir=folder / "storage", keep_queue_jobs_days=KEPT
    )
    pool = database.make_pool(settings, name="benchmark", for_queue=True)
    async with pool, aclosing(make_storage(settings)) as storage:
        return {
            name: await _median(act, samples)
            for name, act in zip(
                ("upkeep", "retention"), upkeep(pool, storage, settings), strict=True
            )
        }


async def _median(act: Callable[[], Awaitable[object]], count: int) -> float:
    taken = []
    for _ in range(count + 1):
        begin = time.perf_counter()
        await act()
        taken.append(1000 * (time.perf_counter() - begin))
    return statistics.median(taken[1:])  # the first one makes plans and fills caches


@contextmanager
def copied(server: EmbeddedPostgres, template: str, name: str) -> Iterator[str]:
    """Copy a database for as long as this lasts; provide the URL."""
    server.create_database(name, template=template)
    try:
        yield f"{server.url(database=name)}?sslmode=disable&gssencmode=disable"
    finally:
        server.drop_database(name)


@dataclass(frozen=True)
class Resting:
    """A process with nothing to do, alone on its database."""

    name: str
    template: str
    database: str
    proxy: Child

    def so_far(self, conn: Connection) -> tuple[float, float]:
        """Return how many statements there have been, and the milliseconds that they took."""
        row = conn.execute(ASKED["active_time"], {"database": self.database}).fetchone()
        assert row is not None
        return float(self.proxy.ask()), float(row[0])


def rest(
    server: EmbeddedPostgres, template: str, name: str, folder: Path, stack: ExitStack
) -> Resting:
    """Start a process that has nothing to do, on a copy."""
    copy = f"{name}_{template}"
    url = stack.enter_context(copied(server, template, copy))
    place = Place(url, server.port, counted=True)
    proxy, through_proxy = stack.enter_context(place.proxied(0))
    if name == "worker":
        stack.enter_context(worker(SYSTEM, Work(through_proxy, 10)))
    else:
        web = stack.enter_context(web_process(through_proxy, folder))
        stack.enter_context(open_stream(web.port, token(OWNER)))
    return Resting(name, template, copy, proxy)


def stand_by(server: EmbeddedPostgres, template: str, kills: int, stack: ExitStack) -> Standby:
    """Start twice as many workers as are to be killed, on a copy."""
    url = stack.enter_context(copied(server, template, f"killed_{template}"))

    def submit(jobs: int) -> None:
        with psycopg.connect(url) as conn:
            conn.execute(FILLING["waiting"], {"owner": OWNER, "jobs": jobs})

    work = Work(url, 1, stall=STALL, behaviour="hang")
    return standby(SYSTEM, work, submit, stack, workers=2 * kills)


def measure_at_rest(
    server: EmbeddedPostgres, templates: Sequence[str], folder: Path, seconds: float, kills: int
) -> dict[str, Figures]:
    """Return the figures of each database."""
    found: dict[str, Figures] = {template: {} for template in templates}
    with ExitStack() as stack:
        standbys = [stand_by(server, template, kills, stack) for template in templates]
        resting = [
            rest(server, template, name, folder, stack)
            for template in templates
            for name in ("worker", "web")
        ]
        settled = time.monotonic() + SETTLED
        conn = stack.enter_context(psycopg.connect(server.url(), autocommit=True))
        wait_until_ready(standbys)
        for template, taken in zip(templates, take_overs(standbys), strict=True):
            found[template]["recovery"] = taken
        time.sleep(max(0.0, settled - time.monotonic()))
        before = [each.so_far(conn) for each in resting]
        time.sleep(seconds)
        for each, (statements, milliseconds) in zip(resting, before, strict=True):
            after = each.so_far(conn)
            figures = found[each.template]
            figures[f"idle-{each.name}"] = (after[0] - statements) / seconds
            figures[f"idle-{each.name}-time"] = (after[1] - milliseconds) * MINUTE / seconds
    return found
