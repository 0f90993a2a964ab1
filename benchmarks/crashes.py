"""What it costs that an engine's process is killed in the middle of a transcription.

Part of the section ``promises``.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.by_hand import Agreement
from benchmarks.engines import MODEL, MODELS
from benchmarks.figures import Measurement
from benchmarks.postgres import OWNERS, Postgres
from benchmarks.recordings import REPO
from db import named_queries
from jobs.compute import packaged_weights

QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
SEED = 1
PATIENCE, LOOK = 180.0, 0.05  # seconds

METHOD = """\
**Real engines.** `pgscribe worker` with default settings (faster-whisper, `base`, int8) has {jobs}
jobs, each the minute of `examples/sample.mp3`. {crashes} times, {least:g} to {most:g} s after one
of its processes has loaded the engine and a chunk is being transcribed, that process gets
`kill -9`. Failed attempts are those that the database has afterwards."""


@dataclass(frozen=True)
class Sizes:
    """How many jobs, and how often their engine is killed, how long after it is ready."""

    jobs: int = 3
    crashes: int = 5
    least: float = 0.3
    most: float = 2.5


QUICK = Sizes(jobs=1, crashes=1, most=1.0)


@contextmanager
def worker(url: str, folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run ``pgscribe worker``."""
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": url,
        "PGSCRIBE_STORAGE_DIR": str(folder / "storage"),
        "PGSCRIBE_SCRATCH_DIR": str(folder / "scratch"),
        "PGSCRIBE_MODELS_DIR": str(MODELS),
    }
    command = [sys.executable, "-m", "jobs.cli", "worker", "--stop-with-stdin"]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def engines(worker_pid: int) -> list[int]:
    """Return the worker's children that have loaded what runs a model."""
    found = []
    for task in Path(f"/proc/{worker_pid}/task").glob("*/children"):
        for pid in task.read_text().split():
            with contextlib.suppress(OSError):
                if "libctranslate2" in Path(f"/proc/{pid}/maps").read_text():
                    found.append(int(pid))
    return found


class Jobs:
    """The jobs, as the database has them."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn

    def insert(self, count: int) -> None:
        """Insert jobs of the sample."""
        path = f"{OWNERS[0]}/sample.mp3"
        self._conn.execute(
            QUERIES["insert"], {"owner": OWNERS[0], "path": path, "model": MODEL, "jobs": count}
        )

    def count(self, query: str) -> int:
        """Return what a query counts."""
        row = self._conn.execute(QUERIES[query]).fetchone()
        assert row is not None
        return int(row[0])


def crash(process: "subprocess.Popen[bytes]", jobs: Jobs, sizes: Sizes) -> int:
    """Kill engines while jobs run; return how often that ended one."""
    chance = random.Random(SEED)  # noqa: S311 - no secret
    crashes = 0
    deadline = time.monotonic() + PATIENCE
    while crashes < sizes.crashes and jobs.count("unfinished") and time.monotonic() < deadline:
        if not jobs.count("transcribing") or not engines(process.pid):
            time.sleep(LOOK)
            continue
        failed = jobs.count("failed_attempts")
        time.sleep(chance.uniform(sizes.least, sizes.most))
        victims = engines(process.pid)
        if not victims or not jobs.count("transcribing"):
            continue
        os.kill(chance.choice(victims), signal.SIGKILL)
        crashes += 1
        noticed = time.monotonic() + 10 * sizes.most
        while jobs.count("failed_attempts") == failed and time.monotonic() < noticed:
            time.sleep(LOOK)
    return crashes


def measure(
    postgres: Postgres, folder: Path, agreement: Agreement, sizes: Sizes
) -> Iterator[Measurement]:
    """Yield the lines."""
    if packaged_weights.ensure("faster-whisper", MODEL, MODELS) is None:
        raise RuntimeError(f"No weights of {MODEL} in {MODELS}, nor in packages: make demo")
    audio = folder / "storage" / str(OWNERS[0])
    audio.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPO / "examples" / "sample.mp3", audio)
    with ExitStack() as stack:
        name = stack.enter_context(postgres.fresh())
        conn = stack.enter_context(postgres.connect(name))
        jobs = Jobs(conn)
        process = stack.enter_context(worker(postgres.url(name), folder))
        jobs.insert(sizes.jobs)
        crashes = crash(process, jobs, sizes)
        deadline = time.monotonic() + PATIENCE
        while jobs.count("unfinished") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(LOOK)
        ended = int(process.poll() is not None)
        agreement.look(conn)
        yield from _lines(sizes, crashes, ended, jobs)


def _lines(sizes: Sizes, crashes: int, ended: int, jobs: Jobs) -> Iterator[Measurement]:
    failed = jobs.count("failed_attempts")
    completed = jobs.count("completed")
    for name, what, unit, figure in (
        ("crashes", "Engines killed (kill -9) while they transcribed", "crashes", crashes),
        ("workers", "Workers that ended of it", "workers", ended),
        ("completed", f"Jobs that completed, of {sizes.jobs}", "jobs", completed),
        ("attempts", "Attempts that failed, for each crash", "attempts", failed / max(1, crashes)),
    ):
        yield Measurement(
            f"promises-engines-{name}",
            what,
            unit,
            "higher" if name in {"crashes", "completed"} else "lower",
            {"pgscribe": [figure]},
            headline=name == "attempts",
        )
