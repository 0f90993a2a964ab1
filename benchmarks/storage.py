"""What jobs leave on the disk, and whether the queue stays as fast as it fills up.

Jobs are inserted, claimed, noted, ended and pruned by the functions that pgscribe's workers call.
"""

import asyncio
import functools
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg.types.json import Jsonb

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.postgres import OWNERS, Postgres, postgres
from db import named_queries
from jobs import database
from jobs.queue import ClaimedJob, Ended, Queue
from jobs.settings import Settings
from jobs.sql import CALLS, RETENTION
from modal_functions.plan import SAMPLE_RATE, Plan, Span
from modal_functions.transcript import Segment, Transcript
from modal_functions.waveform import FULL, MOST_PEAKS

SQL = named_queries.load(Path(__file__).with_suffix(".sql"))
OURS = OWNERS[:10]
AT_ONCE = 100  # jobs that are claimed and ended in a turn
PATIENCE = 30.0  # seconds
MOST_ROUNDS = 3  # of a minute
NO_OP, MINUTE, HOUR = "no transcript", "1 minute", "1 hour"
LENGTHS = {MINUTE: 60.0, HOUR: 3600.0}  # seconds
WORDS_A_SECOND = 2.5
SEGMENT, CHUNK = 6.0, 60.0  # seconds
NOTHING = {"text": "hello", "segments": [], "language": "en"}
TABLES = {
    "queue": ("procrastinate.procrastinate_jobs", "procrastinate.procrastinate_events"),
    "chunks": ("processing_job_chunks", "pgscribe.preparations"),
    "jobs": ("processing_jobs", "processing_job_waveforms"),
}
HELD, FREE = "held open", "none"
BEFORE, AFTER = "first", "after retention"
METHOD = """
Jobs of ten owners are inserted, claimed and ended 100 at a time through the functions of
pgscribe's worker, in a database of their own; fsync is on. Where there is a transcript, every
statement of an attempt is made: the preparation and its plan, a call and the text of each chunk of
a minute, the result. It has 150 words a minute, of this project's own documentation, in segments of
6 s without times of words. Sizes are those of tables with their indexes and what is stored out of
line. Autovacuum looks every second instead of every minute, so that minutes show what takes an
hour; all else is as Postgres comes. *Retention* deletes queue jobs and chunks of ended jobs, as it
does after `PGSCRIBE_KEEP_QUEUE_JOBS_DAYS`. The snapshot is a transaction at `repeatable read` that
has read something and stays open, as a dump does; both figures are of the second 10,000 jobs.
There are three rounds.
"""


@dataclass(frozen=True)
class Sizes:
    """How many jobs of each."""

    drained: int = 10_000
    drains: int = 5
    jobs: dict[str, int] | None = None

    def of(self, length: str) -> int:
        """Return the jobs whose life is followed."""
        return (self.jobs or {NO_OP: 1000, MINUTE: 200, HOUR: 10})[length]


QUICK = Sizes(1000, 2, {NO_OP: 200, MINUTE: 20, HOUR: 10})
Figures = dict[str, dict[str, float]]


class Jobs:
    """A database and a worker's connection to it."""

    def __init__(
        self,
        conn: psycopg.AsyncConnection[tuple[Any, ...]],
        queue: Queue,
        worker: int,
    ) -> None:
        self.conn = conn
        self._queue = queue
        self._worker = worker

    async def insert(self, jobs: int) -> None:
        """Insert jobs, a tenth for each owner."""
        await self.conn.execute(SQL["insert"], {"owners": OURS, "each": jobs // len(OURS)})

    async def drain(self, length: str = NO_OP) -> float:
        """Run all jobs that wait; return how many a second."""
        text = transcript(length)
        begin, done = time.perf_counter(), 0
        ends: list[Ended] = []
        while True:
            turn = await self._queue.turn(self._worker, ends, AT_ONCE, None)
            done += len(ends)
            if not turn.jobs:
                return done / (time.perf_counter() - begin)
            ends = [await self._attempt(job, text) for job in turn.jobs]

    async def _attempt(self, job: ClaimedJob, text: Transcript | None) -> Ended:
        if text is None:
            return job.end("succeeded", result=NOTHING, audio_seconds=60)
        assert job.attempt is not None
        call = functools.partial(self._note, job_id=job.attempt.job_id, attempt=job.attempt.number)
        took = {"cpu_seconds": 1.0, "gpu_seconds": 1.0}
        plan = planned(text.duration)
        await call("note_call", chunk=None, call_id="fc-0")
        await call("store_plan", call_id="fc-0", plan=Jsonb(plan.to_dict()), **took)
        for number, span in enumerate(plan.spans):
            part = Jsonb(within(text, *span.seconds).to_dict())
            await call("note_call", chunk=number, call_id=f"fc-{number + 1}")
            await call("store_chunk", chunk=number, result=part, **took)
        await call("forget_audio")
        await call("note_usage", gpu_second_price=0.0002, cpu_second_price=0.00003)
        return job.end("succeeded", result=text.to_dict(), audio_seconds=text.duration)

    async def _note(self, query: str, **values: Any) -> None:
        row = await (await self.conn.execute(CALLS[query], values)).fetchone()
        assert row == (True,), query

    async def prune(self) -> None:
        """Delete queue jobs and chunks of jobs that have ended, and vacuum."""
        batch = {"what": "queue_jobs", "days": 0, "batch": 1000}
        while (await self._fetch(RETENTION["prune"], batch))[0]:
            pass
        await self.conn.execute("vacuum")

    async def _fetch(self, query: bytes, values: Any = None) -> tuple[Any, ...]:
        row = await (await self.conn.execute(query, values)).fetchone()
        assert row is not None
        return row

    async def size(self, *tables: str) -> float:
        """Return the bytes of these tables, or of all, with their indexes."""
        rows = await (await self.conn.execute(SQL["sizes"])).fetchall()
        return float(sum(size for name, size in rows if not tables or name in tables))

    async def written(self) -> float:
        """Return the bytes of WAL so far."""
        return float((await self._fetch(SQL["written"]))[0])

    async def rows(self) -> tuple[float, ...]:
        """Return updates, those that touched no index, deletes, dead rows and autovacuums."""
        await self._queue.close()
        deadline = time.monotonic() + PATIENCE
        while (await self._fetch(SQL["others"]))[0]:  # what ends reports what it did
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await self.conn.execute("select pg_stat_force_next_flush()")
        return await self._fetch(SQL["rows"])


@asynccontextmanager
async def jobs(server: Postgres, *, durable: bool = True) -> AsyncIterator[Jobs]:
    """Provide a fresh database. Where time does not matter, commits need not be ``durable``."""
    with server.fresh() as name:
        url = server.url(name)
        settings = Settings.load(database_url=url)
        queue = Queue(
            functools.partial(database.connect, settings, name="benchmark"),
            max_attempts=3,
            stall_timeout=3600,
        )
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            if not durable:
                await conn.execute("set synchronous_commit = off")
            yield Jobs(conn, queue, await queue.register())
            await queue.close()


@functools.cache
def words() -> tuple[str, ...]:
    """Return words as people write them, in an order of nobody's."""
    docs = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    found = " ".join(path.read_text(encoding="utf-8") for path in docs).split()
    spoken = [word for word in found if word.isalpha()]
    return tuple(random.Random(1).choices(spoken, k=10_000))  # noqa: S311 - a text


@functools.cache
def transcript(length: str) -> Transcript | None:
    """Return a transcript of that length."""
    if length == NO_OP:
        return None
    seconds = LENGTHS[length]
    rng = random.Random(2)  # noqa: S311 - a text
    each = int(SEGMENT * WORDS_A_SECOND)
    segments = tuple(
        Segment(
            number * SEGMENT,
            (number + 1) * SEGMENT,
            " ".join(words()[number * each : (number + 1) * each]),
            -rng.random(),
            rng.random(),
            1 + rng.random(),
        )
        for number in range(int(seconds / SEGMENT))
    )
    text = " ".join(segment.text for segment in segments)
    return Transcript(text, "en", seconds, segments, "faster-whisper", "large-v3")


def within(text: Transcript, start: float, end: float) -> Transcript:
    """Return a chunk's part of a transcript."""
    segments = tuple(s for s in text.segments if start <= s.start < end)
    words_of_it = " ".join(segment.text for segment in segments)
    return Transcript(words_of_it, "en", end - start, segments, text.engine, text.model)


def planned(seconds: float) -> Plan:
    """Return the plan of a recording, in chunks of a minute."""
    rng = random.Random(3)  # noqa: S311 - a waveform
    edges = range(0, int(seconds * SAMPLE_RATE) + 1, int(CHUNK * SAMPLE_RATE))
    spans = tuple(Span(start, start + edges.step) for start in edges[:-1])
    peaks = tuple(rng.randint(0, FULL) for _ in range(MOST_PEAKS))
    return Plan("a.mp3", Path("a.pcm"), spans, peaks)


async def life(server: Postgres, length: str, count: int) -> Figures:
    """Follow jobs from their insert to their end."""
    figures: Figures = defaultdict(dict)
    async with jobs(server, durable=False) as queue:
        before = {part: await queue.size(*names) for part, names in TABLES.items()}
        empty, written = await queue.size(), await queue.written()
        await queue.insert(count)
        if length == NO_OP:
            figures["storage-bytes-queued"]["all"] = (await queue.size() - empty) / count / 1000
        await queue.drain(length)
        for part, names in TABLES.items():
            size = (await queue.size(*names) - before[part]) / count / 1000
            figures[f"storage-bytes-{part}"][length] = size
        figures["storage-bytes"][length] = (await queue.size() - empty) / count / 1000
        figures["storage-wal"][length] = (await queue.written() - written) / count / 1000
        updates, light, deletes, _, _ = await queue.rows()
        figures["storage-dead"][length] = (updates + deletes) / count
        figures["storage-hot"][length] = 100 * light / updates
    return figures


async def growth(server: Postgres, sizes: Sizes) -> Figures:
    """Drain again and again into tables that grow; then delete, and drain once more."""
    figures: Figures = defaultdict(dict)
    async with jobs(server) as queue:
        sizes_so_far = [await queue.size()]
        for number in range(1, sizes.drains + 1):
            await queue.insert(sizes.drained)
            rate = await queue.drain()
            figures["storage-drain"][str(number * sizes.drained)] = rate
            if number == 2:  # noqa: PLR2004 - as many as beside the snapshot
                figures["storage-snapshot"][FREE] = rate
            sizes_so_far.append(await queue.size())
            dead = (await queue.rows())[3]
            figures["storage-dead-left"][str(number * sizes.drained)] = dead
        last = sizes_so_far[-1] - sizes_so_far[-2]
        figures["storage-reuse"][BEFORE] = last / sizes.drained / 1000
        await queue.prune()
        size = await queue.size()
        await queue.insert(sizes.drained)
        await queue.drain()
        grown = await queue.size() - size
        figures["storage-reuse"][AFTER] = grown / sizes.drained / 1000
    return figures


async def snapshot(server: Postgres, sizes: Sizes) -> Figures:
    """Drain beside a transaction that still sees how the queue was before."""
    figures: Figures = defaultdict(dict)
    async with jobs(server) as queue:
        name = str(psycopg.conninfo.conninfo_to_dict(queue.conn.info.dsn)["dbname"])
        with server.connect(name) as conn:
            conn.execute("begin isolation level repeatable read")
            conn.execute(SQL["snapshot"])
            for _ in range(2):
                await queue.insert(sizes.drained)
                figures["storage-snapshot"][HELD] = await queue.drain()
    return figures


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - what report.py calls
    """Measure what jobs leave on the disk."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sizes = QUICK if quick else Sizes()
    with postgres(autovacuum_naptime="1s") as server:
        for _ in range(1 if quick else min(rounds, MOST_ROUNDS)):
            parts = [asyncio.run(life(server, one, sizes.of(one))) for one in (NO_OP, *LENGTHS)]
            parts += [asyncio.run(growth(server, sizes)), asyncio.run(snapshot(server, sizes))]
            for figures in parts:
                for name, values in figures.items():
                    for system, value in values.items():
                        found[name][system].append(value)
    return section(found)


LINES: dict[str, tuple[str, str, str | None, Literal["higher", "lower"]]] = {
    "storage-bytes-queued": ("A job that waits, all tables and indexes", "kB", None, "lower"),
    "storage-bytes": ("A completed job, all tables and indexes", "kB", None, "lower"),
    "storage-bytes-jobs": ("… its row, result and waveform: kept", "kB", None, "lower"),
    "storage-bytes-chunks": ("… its chunks and plan: until retention", "kB", None, "lower"),
    "storage-bytes-queue": ("… its queue job and events: until retention", "kB", None, "lower"),
    "storage-wal": ("WAL of a job, from insert to end", "kB", None, "lower"),
    "storage-dead": ("Row versions that a job leaves to vacuum", "rows", None, "lower"),
    "storage-hot": ("Updates that touch no index", "%", None, "higher"),
    "storage-drain": ("Drained, by jobs in the tables at the end", "jobs/s", "first", "higher"),
    "storage-dead-left": ("Dead rows then, not yet vacuumed", "rows", None, "lower"),
    "storage-reuse": ("Growth by another 10,000 no-op jobs, a job", "kB", BEFORE, "lower"),
    "storage-snapshot": ("Drained while a snapshot is held open", "jobs/s", FREE, "higher"),
}


def section(found: dict[str, dict[str, list[float]]]) -> Section:
    """Return the chapter of the report."""
    measurements = []
    for name, (what, unit, base, better) in LINES.items():
        values = found[name]
        baseline = next(iter(values)) if base == "first" else base
        measurements.append(Measurement(name, what, unit, better, values, baseline))
    plots = [
        Plot("storage-drain", "Drained as the tables grow, jobs/s", "lines", ["storage-drain"])
    ]
    return Section("storage", "What jobs leave on the disk", METHOD.strip(), measurements, plots)
