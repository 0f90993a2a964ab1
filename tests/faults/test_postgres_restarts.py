"""Postgres restarted, and connections broken off, while jobs start, run and finish."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest

from db.embedded import EmbeddedPostgres
from tests.faults.fleet import Database, Fleet, Jobs, Worker, restart_postgres, until

PICKUP = 1.0  # seconds; an idle worker that is not woken looks every 2 s or less often
BACKENDS = (
    "select count(*) filter (where pg_terminate_backend(pid)) from pg_stat_activity"
    " where application_name like %s and datname = current_database()"
)


@contextmanager
def load(jobs: Jobs, user: UUID) -> Iterator[None]:
    """Insert jobs all the time; ``None`` of those that Postgres took may get lost."""
    over = threading.Event()

    def insert() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            jobs.database.insist(
                "insert into processing_jobs (user_id, file_path) values (%s, %s)",
                user,
                f"{user}/sleep-{(number % 10) / 20}",
            )

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def completes(jobs: Jobs, more: int) -> None:
    """Wait until some more jobs have completed."""
    query = "select count(*) from processing_jobs where status = 'completed'"
    before = until(lambda: jobs.database.try_value(query) or 0, "jobs complete")
    until(lambda: (jobs.database.try_value(query) or 0) >= before + more, "more jobs complete")


def assert_woken(jobs: Jobs, fleet: Fleet, user: UUID) -> None:
    """A job that is inserted now starts at once, so a notification woke a worker."""

    def pickup() -> bool:
        job_id = jobs.insert_one(user, "sleep")
        inserted_at = time.monotonic()
        until(lambda: fleet.starts(job_id), "the job starts")
        return fleet.starts(job_id)[0].at - inserted_at < PICKUP

    jobs.wait_for_all()
    until(lambda: pickup() and pickup() and pickup(), "three jobs in a row start at once")


@pytest.mark.parametrize(
    "how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=["fast", "immediate", "killed"]
)
def test_workers_survive_a_restart_of_postgres(
    postgres: EmbeddedPostgres,
    fleet: Fleet,
    jobs: Jobs,
    user: UUID,
    how: signal.Signals,
    settled: Callable[[], None],
) -> None:
    workers = [fleet.start_ready(concurrency=4) for _ in range(2)]
    with load(jobs, user):
        completes(jobs, 10)
        restart_postgres(postgres, how)
        completes(jobs, 10)
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert_woken(jobs, fleet, user)
    assert fleet.living == workers, "no worker was restarted"


def test_a_worker_listens_again_when_its_connection_ended(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready()
    for times in range(2, 5):
        assert db.value(BACKENDS, "pgscribe worker") > 0
        worker.says("listening", times)
    assert_woken(jobs, fleet, user)
    settled()


def test_workers_survive_the_end_of_their_connections_again_and_again(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    workers = [fleet.start_ready(concurrency=4) for _ in range(2)]
    with load(jobs, user):
        for _ in range(15):
            assert db.value(BACKENDS, "pgscribe %") >= 0
            completes(jobs, 1)
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert_woken(jobs, fleet, user)
    assert fleet.living == workers


def test_a_worker_that_starts_before_postgres_waits_for_it(
    postgres: EmbeddedPostgres, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    jobs.insert(user, "sleep")
    postgres.stop()
    worker: Worker = fleet.start()
    until(lambda: "does not answer" in worker.log, "it has noticed")
    postgres.start()
    settled()
    assert fleet.living == [worker]


def test_what_ends_while_the_database_takes_no_writes_is_told_later(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """As during a failover, or with a full disk."""
    worker = fleet.start_ready(concurrency=2)
    job_ids = jobs.insert(user, "sleep-2", 2)
    worker.says("start", 2)
    name = db.value("select current_database()")
    db.rows(f"alter database {name} set default_transaction_read_only = on")
    assert db.value(BACKENDS, "pgscribe %") > 0
    time.sleep(3)  # by now both are transcribed
    assert (jobs.count("status = 'processing'"), worker.said("end")) == (2, 0)
    db.rows(f"alter database {name} reset default_transaction_read_only")
    db.value(BACKENDS, "pgscribe %")
    settled()
    rows = [jobs.row(job_id) for job_id in job_ids]
    assert [(row["status"], row["attempt"]) for row in rows] == [("completed", 1)] * 2
