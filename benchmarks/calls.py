"""How many calls one worker waits for, and what that takes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.figures import Measurement, Section
from benchmarks.memory import resident
from benchmarks.recordings import REPO
from benchmarks.web_process import SECRET
from db import migrate
from db.embedded import EmbeddedPostgres
from tests.local_modal.server import ServerProcess
from tests.local_modal.settings import Settings as LocalModal

CALLS, CALLS_QUICK = 1000, 50
PATIENCE = 120.0  # seconds

METHOD = """\
One worker process with room for {calls:,} jobs, for GPUs on Modal (`PGSCRIBE_COMPUTE=modal`), an
embedded Postgres, and the tests' local server that speaks Modal's protocol and starts no
container. {calls:,} jobs are inserted: each is claimed, and its first call is started, noted in
Postgres and waited for. Memory is what the worker's resident set grew by from when it had
registered, for each call. Once."""


@contextmanager
def worker(url: str, modal: ServerProcess, concurrency: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a worker that calls the local Modal."""
    environment = (
        os.environ
        | modal.environment()
        | {
            "PGSCRIBE_DATABASE_URL": url,
            "PGSCRIBE_COMPUTE": "modal",
            "PGSCRIBE_PUBLIC_URL": "http://127.0.0.1",  # its links are not followed
            "PGSCRIBE_JWT_SECRET": SECRET,
            "PGSCRIBE_WORKER_CONCURRENCY": str(concurrency),
            "PGSCRIBE_STORAGE_DIR": str(REPO / "examples"),
            "PGSCRIBE_SHUTDOWN_TIMEOUT": "0",
        }
    )
    command = [sys.executable, "-m", "jobs.cli", "worker"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


Connection = psycopg.Connection[tuple[Any, ...]]


def insert(conn: Connection, count: int) -> None:
    """Insert as many jobs as calls: each prepares its audio by one."""
    conn.execute("select public.limit_owners(max_queued => 1000000, max_running => %s)", (count,))
    conn.execute("insert into auth.users (id, email) values (gen_random_uuid(), 'a@example.org')")
    conn.execute(
        "insert into public.processing_jobs (user_id, file_path)"
        " select id, 'sample.mp3' from auth.users, generate_series(1, %s)",
        (count,),
    )


def until(conn: Connection, query: bytes, count: int) -> None:
    """Wait until a query counts so many."""
    deadline = time.monotonic() + PATIENCE
    while conn.execute(query).fetchone() != (count,):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {PATIENCE:g} s: {count} by {query.decode()}")
        time.sleep(0.1)


REGISTERED = b"select count(*) from procrastinate.procrastinate_workers"
NOTED = b"select count(*) from pgscribe.preparations where call_id is not null"


def hold_calls(count: int) -> tuple[float, float]:
    """Return the seconds until all calls are waited for, and the MB that the worker grew by."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = EmbeddedPostgres(folder / "postgres")
        stack.callback(server.remove)
        server.start()
        settings = LocalModal(apps=("tests.faults.speech_app:app",))
        modal = stack.enter_context(ServerProcess.started(settings))
        migrate.migrate(server.url())
        modal.control.pause()
        conn = stack.enter_context(psycopg.connect(server.url(), autocommit=True))
        process = stack.enter_context(worker(server.url(), modal, count))
        until(conn, REGISTERED, 1)
        before = resident(process.pid)
        begin = time.monotonic()
        insert(conn, count)
        modal.control.wait("spawned", count)
        modal.control.wait_for_requests("FunctionGetOutputs", count)
        until(conn, NOTED, count)
        return time.monotonic() - begin, resident(process.pid) - before


def measure(rounds: int, quick: bool) -> Section:  # noqa: ARG001, FBT001 - the contract
    """Let one worker wait for many calls."""
    calls = CALLS_QUICK if quick else CALLS
    seconds, grown = hold_calls(calls)
    return Section(
        "calls",
        "Calls in flight",
        METHOD.format(calls=calls),
        [
            Measurement(
                "calls-in-flight",
                "Calls that one worker waits for",
                "calls",
                "higher",
                {"pgscribe": [calls]},
                headline=True,
            ),
            Measurement(
                "calls-start",
                "From the insert until the last of these calls is noted and waited for",
                "s",
                "lower",
                {"pgscribe": [seconds]},
            ),
            Measurement(
                "calls-memory",
                "Memory of the worker for each call",
                "kB",
                "lower",
                {"pgscribe": [grown * 1000 / calls]},
            ),
        ],
    )
