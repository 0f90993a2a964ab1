"""Workers that are stopped: for a while by SIGSTOP, for good by SIGTERM."""

import signal
import time
from collections.abc import Callable
from uuid import UUID

import click
import psycopg

from db.embedded import EmbeddedPostgres
from tests.faults.fleet import PATIENCE, SHORT_STALL_TIMEOUT, Database, Fleet, Jobs, until

SETTLING = 2.0  # seconds in which a late writer would have written


def test_a_worker_presumed_dead_changes_nothing_when_it_goes_on(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, settled: Callable[[], None]
) -> None:
    stopped = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    job_id = jobs.insert_one(user, "long_once-1.5")
    stopped.says("start")
    stopped.signal(signal.SIGSTOP)
    other = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    before = jobs.end(job_id)
    assert (before["status"], before["attempt"]) == ("completed", 2)
    until(lambda: not registered(db, 1), "the stopped worker is forgotten")

    stopped.signal(signal.SIGCONT)
    stopped.says("registered", 2)
    other.signal(signal.SIGTERM)
    other.ended()
    again = jobs.insert_one(user, "sleep")
    assert jobs.end(again)["status"] == "completed"
    assert jobs.row(job_id) == before
    assert fleet.starts(again)[0].pid == stopped.process.pid, "it works again, under a new id"
    settled()


def registered(db: Database, worker: int) -> bool:
    return bool(
        db.value("select count(*) from procrastinate.procrastinate_workers where id = %s", worker)
    )


def test_a_worker_presumed_dead_at_its_end_changes_nothing(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """It was stopped when its attempt was about to end, so that is what it goes on with."""
    stopped = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    job_id = jobs.insert_one(user, "sleep-1")
    stopped.says("start")
    stopped.signal(signal.SIGSTOP)
    fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    before = jobs.end(job_id)
    stopped.signal(signal.SIGCONT)
    stopped.says("registered", 2)
    settled()
    time.sleep(SETTLING)
    assert jobs.row(job_id) == before
    assert before["attempt"] == 2


def test_a_job_that_is_slow_to_stop_does_not_disturb_its_next_attempt(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """A worker that was presumed dead claims a job again that it is still stopping."""
    other = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    busy = jobs.insert_one(user, "sleep-600")
    jobs.wait(busy, "status = 'processing'")
    stopped = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT, concurrency=2)
    job_id = jobs.insert_one(user, "stubborn-1")
    stopped.says("start")
    stopped.signal(signal.SIGSTOP)
    jobs.wait(job_id, "status = 'queued'")
    stopped.signal(signal.SIGCONT)
    row = jobs.end(job_id)
    jobs.database.value("select cancel_processing_job(%s) is null", busy)
    settled()
    assert (row["status"], row["attempt"]) == ("completed", 2)
    assert other.running


def test_a_worker_that_was_stopped_presumes_nobody_dead_before_they_can_report(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """A whole machine was suspended, say; whoever wakes first must not take the others' jobs."""
    workers = [fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT) for _ in range(2)]
    job_ids = jobs.insert(user, "sleep-0.5", 2)
    for worker in workers:
        worker.says("start")
        worker.signal(signal.SIGSTOP)
    time.sleep(2 * SHORT_STALL_TIMEOUT)
    for worker in workers:
        worker.signal(signal.SIGCONT)
        time.sleep(0.5)
    settled()
    assert [jobs.attempts(job_id) for job_id in job_ids] == [[], []]
    assert [worker.said("registered") for worker in workers] == [1, 1]


def test_sigterm_ends_a_worker_whose_jobs_are_locked_by_somebody_else(
    fleet: Fleet, jobs: Jobs, user: UUID, db: Database, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(shutdown_timeout=1)
    job_id = jobs.insert_one(user, "sleep-0.5")
    worker.says("start")
    with psycopg.connect(db.url) as operator:
        operator.execute(
            "select from procrastinate.procrastinate_jobs where id = %s for update",
            (jobs.row(job_id)["job_id"],),
        )
        worker.says("end")
        worker.signal(signal.SIGTERM)
        assert worker.ended() == 0
    fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
    assert jobs.end(job_id)["status"] == "completed"
    settled()


def test_a_second_sigterm_gives_running_jobs_back_at_once(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(shutdown_timeout=600, concurrency=2)
    job_ids = jobs.insert(user, "long_once-600", 2)
    worker.says("start", 2)
    worker.signal(signal.SIGTERM)
    until(lambda: not_claimed(jobs, user), "it claims nothing any more")
    worker.signal(signal.SIGTERM)
    assert worker.ended() == 0
    assert [jobs.row(job_id)["status"] for job_id in job_ids] == ["queued", "queued"]
    fleet.start()
    settled()
    assert [jobs.attempts(job_id) for job_id in job_ids] == [[(1, "released", None)]] * 2


def not_claimed(jobs: Jobs, user: UUID) -> bool:
    job_id = jobs.insert_one(user, "sleep")
    time.sleep(0.3)
    return bool(jobs.row(job_id)["status"] == "queued")


def test_sigterm_while_the_database_is_away_ends_the_worker(
    postgres: EmbeddedPostgres, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(shutdown_timeout=1)
    job_id = jobs.insert_one(user, "long_once-600")
    worker.says("start")
    postgres.stop()
    worker.signal(signal.SIGTERM)
    signalled_at = time.monotonic()
    assert worker.ended() == 0
    click.echo(f"ended {time.monotonic() - signalled_at:.1f} s after SIGTERM (time-out 1 s)")
    postgres.start()
    fleet.start()
    assert jobs.end(job_id, PATIENCE)["status"] == "completed"
    settled()
