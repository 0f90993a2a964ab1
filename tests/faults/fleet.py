"""What the fault tests share: real worker processes, and jobs to give them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row

from db.embedded import EmbeddedPostgres

STALL_TIMEOUT = 5.0  # seconds: the least that the settings allow
SHORT_STALL_TIMEOUT = 2.0  # seconds, for tests that only wait for it
PATIENCE = 60.0  # seconds for what takes a few on an idle machine
POLL = 0.03  # seconds
FAULT_WORKER = Path(__file__).with_name("fault_worker.py")
LOG_TAIL = 3000

DEFECTS = (  # what a log says of errors that nobody has foreseen
    "A side task of the worker failed",
    "The worker failed and is started again",
    "could not be run",
    "exception was never retrieved",
    "Task was destroyed",
    "Fatal Python error",
)

Row = dict[str, Any]
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """Return the condition's value as soon as that is true."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience:g} s: {what}")
        time.sleep(POLL)
    return value


class Database:
    """A database that may be away. For any number of threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._idle: list[psycopg.Connection[Row]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for conn in self._idle:
            conn.close()

    def rows(self, statement: str, *parameters: object) -> list[Row]:
        while True:
            try:
                conn = self._idle.pop()
            except IndexError:
                break
            with contextlib.suppress(psycopg.OperationalError):
                return self._rows(conn, statement, parameters)
        conn = psycopg.connect(
            self.url,
            autocommit=True,
            row_factory=dict_row,
            prepare_threshold=None,  # a prepared `select *` fails when a migration adds a column
        )
        return self._rows(conn, statement, parameters)

    def _rows(
        self, conn: psycopg.Connection[Row], statement: str, parameters: tuple[object, ...]
    ) -> list[Row]:
        try:
            cursor = conn.execute(statement.encode(), parameters)
            rows = cursor.fetchall() if cursor.description else []
        except BaseException:
            conn.close()
            raise
        self._idle.append(conn)
        return rows

    def value(self, statement: str, *parameters: object) -> Any:
        (row,) = self.rows(statement, *parameters)
        (value,) = row.values()
        return value

    def try_value(self, statement: str, *parameters: object) -> Any:
        """Like ``value``, or ``None`` while the database is away."""
        with contextlib.suppress(psycopg.OperationalError):
            return self.value(statement, *parameters)
        return None

    def insist(self, statement: str, *parameters: object) -> None:
        """Execute a statement as soon as the database takes it."""

        def executed() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                self.rows(statement, *parameters)
                return True
            return False

        until(executed, statement)


class Jobs:
    """Inserts jobs whose file's name says what they do, and looks at what became of them."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def make_user(self) -> UUID:
        user = uuid4()
        self.database.insist(
            "insert into auth.users (id, email) values (%s, %s)", user, f"{user}@example.org"
        )
        return user

    def insert(
        self, user: UUID, script: str, count: int = 1, *, delay: float = 0.0, **columns: object
    ) -> list[UUID]:
        """Insert jobs; ``delay`` schedules them so many seconds ahead, by the database's clock."""
        names = "".join(f", {name}" for name in columns)
        places = ", %s" * len(columns)
        rows = self.database.rows(
            f"insert into processing_jobs (user_id, file_path, scheduled_at{names})"
            f" select %s, %s, case when %s > 0 then now() + make_interval(secs => %s) end{places}"
            " from generate_series(1, %s) returning id",
            user, f"{user}/{script}", delay, delay, *columns.values(), count,
        )  # fmt: skip
        return [row["id"] for row in rows]

    def insert_one(self, user: UUID, script: str, **columns: Any) -> UUID:
        (job_id,) = self.insert(user, script, **columns)
        return job_id

    def row(self, job_id: UUID) -> Row:
        (row,) = self.database.rows("select * from processing_jobs where id = %s", job_id)
        return row

    def attempts(self, job_id: UUID) -> list[tuple[int, str, str | None]]:
        rows = self.database.rows(
            "select attempt, outcome, error_code from processing_job_attempts"
            " where job_id = %s order by attempt",
            job_id,
        )
        return [(row["attempt"], row["outcome"], row["error_code"]) for row in rows]

    def wait(self, job_id: UUID, condition: str, patience: float = PATIENCE) -> Row:
        """Return the job's row as soon as the SQL ``condition`` holds for it."""

        def found() -> list[Row]:
            with contextlib.suppress(psycopg.OperationalError):
                return self.database.rows(
                    f"select * from processing_jobs where id = %s and ({condition})", job_id
                )
            return []

        return until(found, f"job {job_id}: {condition}", patience)[0]

    def end(self, job_id: UUID, patience: float = PATIENCE) -> Row:
        return self.wait(job_id, "completed_at is not null", patience)

    def count(self, condition: str) -> int:
        count: int = self.database.value(f"select count(*) from processing_jobs where {condition}")
        return count

    def wait_for_all(self, patience: float = PATIENCE) -> None:
        until(
            lambda: (
                self.database.try_value(
                    "select count(*) from processing_jobs where status in ('queued', 'processing')"
                )
                == 0
            ),
            "all jobs have ended",
            patience,
        )


class Execution(NamedTuple):
    event: str
    job_id: UUID
    attempt: int
    pid: int
    at: float


class Worker:
    """A worker process. It ends with its standard input, so never later than the test."""

    def __init__(self, name: str, environment: dict[str, str], folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._lines: list[str] = []
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(FAULT_WORKER)],
                env=environment,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.decode().strip())

    def says(self, word: str, times: int = 1, patience: float = PATIENCE) -> str:
        """Return the line with which it says ``word`` for the so manieth time."""

        def lines() -> list[str]:
            assert self.running or self.said(word) >= times, f"{self.name} has ended"
            said = [line for line in self._lines if line.split()[0] == word]
            return said if len(said) >= times else []

        try:
            return until(lines, f"{self.name} says {word!r} {times} times", patience)[times - 1]
        except AssertionError as error:
            raise AssertionError(f"{error}; its log: {self.log[-LOG_TAIL:]}") from None

    def said(self, word: str) -> int:
        """Return how often it has said ``word``."""
        return sum(line.split()[0] == word for line in list(self._lines))

    @property
    def id(self) -> int:
        """The id under which it registered last."""
        return int(self.says("registered", max(1, self.said("registered"))).split()[1])

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.ended()

    def ended(self, patience: float = PATIENCE) -> int:
        """Return its exit status once it has ended."""
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} runs on: {self.log[-LOG_TAIL:]}") from None
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return status

    def close(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.kill()
            self.ended()


class Fleet:
    """Worker processes of one database, and the ledger of what they have executed."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder
        self._ledger = folder / "ledger"
        self.workers: list[Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.close()

    def start(
        self,
        *,
        concurrency: int = 1,
        kill_at: str = "",
        url: str | None = None,
        stall_timeout: float = STALL_TIMEOUT,
        shutdown_timeout: float = 8.0,
        clock_offset: float = 0.0,
        max_attempts: int = 3,
    ) -> Worker:
        """Start a worker process; it is ready once it says "listening" and "registered"."""
        environment = os.environ | {
            "PGSCRIBE_DATABASE_URL": url or self.url,
            "PGSCRIBE_WORKER_CONCURRENCY": str(concurrency),
            "FAULT_STALL_TIMEOUT": str(stall_timeout),
            "PGSCRIBE_SHUTDOWN_TIMEOUT": str(shutdown_timeout),
            "PGSCRIBE_MAX_ATTEMPTS": str(max_attempts),
            "FAULT_LEDGER": str(self._ledger),
            "FAULT_KILL_AT": kill_at,
            "FAULT_CLOCK_OFFSET": str(clock_offset),
        }
        worker = Worker(f"worker-{len(self.workers)}", environment, self._folder)
        self.workers.append(worker)
        return worker

    def start_ready(self, **options: Any) -> Worker:
        worker = self.start(**options)
        worker.says("listening")
        worker.says("registered")
        return worker

    @property
    def living(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.running]

    def ledger(self) -> list[Execution]:
        """Return the starts and ends of executions, in order."""
        if not self._ledger.exists():
            return []
        whole, _, _ = self._ledger.read_text().rpartition("\n")  # what follows is being written
        fields = [line.split() for line in whole.splitlines()]
        return [
            Execution(event, UUID(job_id), int(attempt), int(pid), float(at))
            for event, job_id, attempt, pid, at in fields
        ]

    def starts(self, job_id: UUID | None = None) -> list[Execution]:
        return [
            entry
            for entry in self.ledger()
            if entry.event == "start" and job_id in {None, entry.job_id}
        ]


def assert_no_defects(fleet: Fleet) -> None:
    found = [
        f"{worker.name}: {defect}"
        for worker in fleet.workers
        for defect in DEFECTS
        if defect in worker.log
    ]
    assert not found, f"unexpected errors: {found}"


def postgres_pids(server: EmbeddedPostgres) -> list[int]:
    """Return the postmaster's pid and those of its children."""
    postmaster = server.postmaster_pid
    assert postmaster is not None
    tasks = Path(f"/proc/{postmaster}/task").glob("*/children")
    return [postmaster, *(int(pid) for task in tasks for pid in task.read_text().split())]


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def restart_postgres(server: EmbeddedPostgres, number: signal.Signals, pause: float = 0.0) -> None:
    """End Postgres by a signal (to all its processes, if it is SIGKILL) and start it again."""
    pids = postgres_pids(server)
    signal_all(pids if number is signal.SIGKILL else pids[:1], number)
    until(lambda: server.postmaster_pid is None, "Postgres has ended")
    time.sleep(pause)
    server.start()
