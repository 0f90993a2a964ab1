"""How often each chunk is paid for, while workers are killed: pgscribe, and what one writes first.

Part of the section ``promises``.
"""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import procrastinate
import psycopg

from benchmarks.by_hand import Agreement
from benchmarks.figures import Measurement
from benchmarks.postgres import OWNERS, Postgres
from benchmarks.web_process import SECRET, web_process
from db import named_queries
from tests.local_modal.server import ServerProcess
from tests.local_modal.settings import Settings as LocalModal

OURS, PLAIN = "pgscribe", "procrastinate"
BARE = "bare"  # the template of a database without pgscribe
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
SEED = 1
STALL_TIMEOUT = 5  # seconds: the shortest setting
PATIENCE = 120.0  # seconds after the last kill
LOOK = 0.1  # seconds
Work = tuple[object, int]  # a job, and a chunk of it; -1: its preparation
# The functions of paid_app.py that each system calls: one for a job, one for a chunk.
FUNCTIONS = {
    OURS: ("prepare_audio", "SpeechModel.transcribe"),
    PLAIN: ("plain_prepare", "PlainModel.transcribe"),
}

METHOD = """\
**Paid once.** {jobs} jobs of {chunks} chunks each, of which a job has {at_a_time} called at a time,
for each of two systems side by side: {workers} processes of `pgscribe worker`
(`PGSCRIBE_COMPUTE=modal`, {concurrency} jobs at a time), and as many plain procrastinate workers
whose task awaits Modal's `.remote()` for each chunk and joins the texts. A worker counts as dead
after {stall} s, for procrastinate by the periodic task of its guide; it runs the task from its
start. The same plan, made of one seed, gives both their `kill -9` at the same moments: {kills},
each {least:g} to {most:g} s after the last, and a new worker takes the place at once. Both use
Modal's own client, on the tests' local server that speaks its protocol, with containers that take
{work:g} s for a chunk and have no model. A call counts as paid once a container has started it;
one whose caller died runs on. *In the window*: calls that Modal took and whose id never got into
Postgres, since the worker died in between (docs/decisions/0003-calls.md); what they were for was
called again. The window's length: from the moment at which the server took a call to the commit of
its id, of all calls that got there."""


@dataclass(frozen=True)
class Sizes:
    """How much is to be done, and what is done to whoever does it."""

    jobs: int = 6
    chunks: int = 25
    at_a_time: int = 3
    workers: int = 3
    concurrency: int = 2
    kills: int = 8
    least: float = 1.0  # seconds between two kills
    most: float = 3.0


QUICK = Sizes(jobs=2, chunks=10, workers=2, concurrency=1, kills=1, least=0.5, most=1.0)


def kill_plan(sizes: Sizes) -> Iterator[tuple[float, int]]:
    """Yield pauses, and whom to kill after each; nobody twice before all others were."""
    chance = random.Random(SEED)  # noqa: S311 - no secret
    victims: list[int] = []
    for _ in range(sizes.kills):
        victims = victims or chance.sample(range(sizes.workers), sizes.workers)
        yield chance.uniform(sizes.least, sizes.most), victims.pop()


class System(Protocol):
    """Whose workers are killed."""

    name: str

    def work(self) -> "subprocess.Popen[bytes]":
        """Start a worker process."""

    def workers(self) -> int:
        """Return how many workers have registered."""

    def insert(self) -> None:
        """Insert the jobs."""

    def unfinished(self) -> int:
        """Return how many jobs have not ended."""

    def completed(self) -> int:
        """Return how many jobs ended well."""


class _Database:
    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn

    def _count(self, query: str, **values: object) -> int:
        row = self._conn.execute(QUERIES[query], values).fetchone()
        assert row is not None
        return int(row[0])


def _process(environment: Mapping[str, str], *command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


class Pgscribe(_Database):
    """Ours, with its jobs."""

    name = OURS

    def __init__(
        self, conn: psycopg.Connection[Any], sizes: Sizes, environment: Mapping[str, str], path: str
    ) -> None:
        super().__init__(conn)
        self._environment = environment
        self._text = " ".join(f"chunk {number}" for number in range(sizes.chunks))
        self._values = {"owner": OWNERS[0], "path": path, "jobs": sizes.jobs}
        conn.execute(QUERIES["note"])

    def work(self) -> "subprocess.Popen[bytes]":
        """Start ``pgscribe worker``."""
        return _process(self._environment, "jobs.cli", "worker", "--stop-with-stdin")

    def workers(self) -> int:
        """Return how many workers have registered."""
        return self._count("workers")

    def insert(self) -> None:
        """Insert the jobs."""
        self._conn.execute(QUERIES["insert"], self._values)

    def unfinished(self) -> int:
        """Return how many jobs have not ended."""
        return self._count("unfinished")

    def completed(self) -> int:
        """Return how many jobs have the text of all of their chunks."""
        return self._count("completed", text=self._text)

    def noted(self) -> dict[str, tuple[Work, float]]:
        """Return each call's job and chunk, and when its id was committed."""
        rows = self._conn.execute(QUERIES["noted"]).fetchall()
        return {call: ((job, index), at) for call, job, index, at in rows}


class Plain(_Database):
    """procrastinate, with the same jobs."""

    name = PLAIN

    def __init__(
        self,
        conn: psycopg.Connection[Any],
        sizes: Sizes,
        environment: Mapping[str, str],
        recording: Path,
    ) -> None:
        super().__init__(conn)
        self._environment = environment
        self._jobs: list[dict[str, Any]] = [
            {"source": recording.as_uri(), "key": f"plain-{n}", "at_a_time": sizes.at_a_time}
            for n in range(sizes.jobs)
        ]
        url = environment["PLAIN_DATABASE_URL"]
        self._app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=url))
        with self._app.open():
            self._app.schema_manager.apply_schema()

    def work(self) -> "subprocess.Popen[bytes]":
        """Start procrastinate's worker."""
        return _process(self._environment, "benchmarks.paid_worker")

    def workers(self) -> int:
        """Return how many workers have registered."""
        return self._count("plain_workers")

    def insert(self) -> None:
        """Defer the jobs."""
        with self._app.open():
            task = self._app.configure_task("transcribe", queue="transcription")
            task.batch_defer(*self._jobs)

    def unfinished(self) -> int:
        """Return how many jobs have not ended."""
        return self._count("plain_unfinished")

    def completed(self) -> int:
        """Return how many tasks have returned."""
        return self._count("plain_completed")


@dataclass(frozen=True)
class Paid:
    """What became of one system's jobs, and which calls they took."""

    completed: int
    kills: int
    accepted: Mapping[str, float]  # call: when Modal took it
    started: frozenset[str]


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {PATIENCE:g} s: {what}")
        time.sleep(LOOK)


def run(systems: list[System], modal: ServerProcess, sizes: Sizes) -> dict[str, Paid]:
    """Work all off, and kill as planned."""
    kills = dict.fromkeys(FUNCTIONS, 0)
    with ExitStack() as stack:

        def start(system: System) -> "subprocess.Popen[bytes]":
            process = stack.enter_context(system.work())
            stack.callback(process.kill)
            return process

        working = {s.name: [start(s) for _ in range(sizes.workers)] for s in systems}
        _until(lambda: all(s.workers() == sizes.workers for s in systems), "all are registered")
        for system in systems:
            system.insert()
        for _, transcribe in FUNCTIONS.values():
            modal.control.wait("started", function=transcribe)
        for pause, victim in kill_plan(sizes):
            time.sleep(pause)
            busy = [system for system in systems if system.unfinished()]
            for system in busy:
                working[system.name][victim].kill()
                kills[system.name] += 1
            for system in busy:
                working[system.name][victim] = start(system)
        _until(lambda: not any(system.unfinished() for system in systems), "all jobs have ended")
    events = {name: modal.control.events(name) for name in ("spawned", "started")}

    def of(system: str, event: str) -> dict[str, float]:
        found = (e for e in events[event] if e["function"] in FUNCTIONS[system])
        return {e["call_id"]: e["time"] for e in found}

    return {
        system.name: Paid(
            system.completed(),
            kills[system.name],
            of(system.name, "spawned"),
            frozenset(of(system.name, "started")),
        )
        for system in systems
    }


def measure(
    postgres: Postgres, folder: Path, agreement: Agreement, sizes: Sizes
) -> Iterator[Measurement]:
    """Yield the lines."""
    path = f"{OWNERS[0]}/long.mp3"
    recording = folder / "storage" / path
    recording.parent.mkdir(parents=True, exist_ok=True)
    recording.write_text(str(sizes.chunks))
    with ExitStack() as stack:
        modal = stack.enter_context(
            ServerProcess.started(LocalModal(apps=("benchmarks.paid_app:app",)))
        )
        databases = [stack.enter_context(postgres.fresh(name)) for name in ("pgscribe", BARE)]
        ours, plain = (postgres.url(name) for name in databases)
        connections = [stack.enter_context(postgres.connect(name)) for name in databases]
        web = stack.enter_context(web_process(ours, folder))
        pgscribe = Pgscribe(
            connections[0],
            sizes,
            modal.environment()
            | {
                "PGSCRIBE_DATABASE_URL": ours,
                "PGSCRIBE_COMPUTE": "modal",
                "PGSCRIBE_PUBLIC_URL": f"http://127.0.0.1:{web.port}",
                "PGSCRIBE_JWT_SECRET": SECRET,
                "PGSCRIBE_STORAGE_DIR": str(folder / "storage"),
                "PGSCRIBE_WORKER_CONCURRENCY": str(sizes.concurrency),
                "PGSCRIBE_MAX_CHUNKS_PER_JOB": str(sizes.at_a_time),
                "PGSCRIBE_STALL_TIMEOUT": str(STALL_TIMEOUT),
            },
            path,
        )
        bare = Plain(
            connections[1],
            sizes,
            modal.environment()
            | {"PLAIN_DATABASE_URL": plain, "PLAIN_CONCURRENCY": str(sizes.concurrency)},
            recording,
        )
        found = run([pgscribe, bare], modal, sizes)
        agreement.look(connections[0])
        yield from _lines(found, pgscribe, sizes)


def counts(paid: Paid, noted: Mapping[str, tuple[Work, float]]) -> dict[str, float]:
    """Count calls. ``noted``: those whose id got into Postgres, what each was for, and when."""
    known = paid.started & noted.keys()
    lengths = [at - paid.accepted[call] for call, (_, at) in noted.items()]
    return {
        "window": len(paid.accepted.keys() - noted.keys()),
        "outside": len(known) - len({noted[call][0] for call in known}),
        "window-length": 1000 * statistics.median(lengths),
    }


def _lines(found: Mapping[str, Paid], ours: Pgscribe, sizes: Sizes) -> Iterator[Measurement]:
    needed = sizes.jobs * (sizes.chunks + 1)

    def line(name: str, what: str, unit: str, figures: Mapping[str, float]) -> Measurement:
        return Measurement(
            f"promises-paid-{name}",
            what,
            unit,
            "higher" if name in {"jobs", "kills"} else "lower",
            {system: [figure] for system, figure in figures.items()},
            OURS if name == "each" else None,
            headline=name == "each",
        )

    of_both: tuple[tuple[str, str, str, Callable[[Paid], float]], ...] = (
        (
            "jobs",
            f"Jobs of {sizes.chunks} chunks that completed, of {sizes.jobs}",
            "jobs",
            lambda paid: paid.completed,
        ),
        ("kills", "Workers killed (kill -9) meanwhile", "kills", lambda paid: paid.kills),
        (
            "calls",
            f"Calls that Modal accepted, where {needed} are needed",
            "calls",
            lambda paid: len(paid.accepted),
        ),
        (
            "again",
            "Calls that ran for what had been called before",
            "calls",
            lambda paid: len(paid.started) - needed,
        ),
        (
            "each",
            "Calls that ran, for each that was needed",
            "calls",
            lambda paid: len(paid.started) / needed,
        ),
    )
    for name, what, unit, figure in of_both:
        yield line(name, what, unit, {system: figure(paid) for system, paid in found.items()})
    mine = counts(found[OURS], ours.noted())
    for name, what, unit in (
        ("window", "Calls in the window: their ids never got into Postgres", "calls"),
        ("outside", "Calls paid twice, outside of the window", "calls"),
        ("window-length", "Length of the window, p50", "ms"),
    ):
        yield line(name, what, unit, {OURS: mine[name]})
