"""What others do to the same rows at the same time: sweepers, operators, deletions, cancels."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest

from tests.faults.fleet import SHORT_STALL_TIMEOUT, Database, Fleet, Jobs, until

SWEEP = "select pgscribe.sweep_stalled_jobs(0.5, 3)"
DEAD = (
    "with w as (insert into procrastinate.procrastinate_workers (last_heartbeat)"
    " values (now() - interval '1 hour') returning id) select id from w"
)
WAITING = (
    "select pid from pg_stat_activity"
    " where wait_event_type = 'Lock' and datname = current_database()"
)
PAST_DUE = "select now() > scheduled_at + interval '0.3 s' from processing_jobs where id = %s"


def settle_server(db: Database) -> None:
    """Wait until the server has been up for long enough that heartbeats are believed."""
    until(
        lambda: db.value("select pg_postmaster_start_time() < now() - interval '0.5 s'"),
        "the server has been up for a while",
    )


def test_two_sweepers_give_each_stalled_job_back_once(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    settle_server(db)
    jobs.insert(user, "sleep", 200)
    dead = db.value(DEAD)
    claimed = db.value("select claimed from pgscribe.claim_jobs(%s, 100)", dead)
    with ThreadPoolExecutor(8) as pool:
        swept = list(pool.map(lambda _: db.value(SWEEP), range(40)))
    assert (claimed, sum(swept), max(swept)) == (100, 100, 100)
    assert jobs.count("attempt = 1 and error_code = 'worker_lost'") == 100
    for _ in range(3):
        fleet.start(concurrency=4)
    settled()
    assert jobs.count("status = 'completed' and attempt = 2") == 100
    assert jobs.count("status = 'completed' and attempt = 1") == 100


def test_workers_sweep_while_others_claim_and_end(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    settle_server(db)
    for _ in range(3):
        fleet.start_ready(concurrency=4)
    jobs.insert(user, "sleep-0.02", 200, max_attempts=20)  # the same one may be lost often
    claimed = 0
    for _ in range(8):
        dead = db.value(DEAD)
        claimed += db.value("select claimed from pgscribe.claim_jobs(%s, 2)", dead)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: db.value("select pgscribe.sweep_stalled_jobs(5, 3)"), range(8)))
    settled()
    assert claimed > 0
    lost = db.value("select count(*) from processing_job_attempts where error_code = 'worker_lost'")
    assert lost == claimed
    assert jobs.count("status = 'completed'") == 200


def test_an_operators_locks_delay_only_the_jobs_that_they_hold(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(concurrency=3)
    running = jobs.insert_one(user, "sleep-2")
    worker.says("start")
    waiting = jobs.insert_one(user, "sleep", delay=2)
    with psycopg.connect(db.url) as operator:
        locked = [running, waiting]
        operator.execute("select from processing_jobs where id = any (%s) for update", (locked,))
        for job_id in jobs.insert(user, "sleep-0.02", 20):
            assert jobs.end(job_id)["status"] == "completed"
        until(lambda: db.rows(WAITING), "what it would store waits for the lock")
        until(lambda: db.value(PAST_DUE, waiting), "the other one is due")
        assert [jobs.row(job_id)["completed_at"] for job_id in locked] == [None, None]
    settled()
    assert jobs.count("status = 'completed' and attempt = 1") == 22


def test_a_worker_does_not_spin_while_all_that_waits_is_locked(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(concurrency=2)
    db.value("select pause_queue() is null")
    waiting = jobs.insert(user, "sleep", 5)
    with psycopg.connect(db.url) as operator:
        operator.execute("select from processing_jobs where id = any (%s) for update", (waiting,))
        db.value("select resume_queue() is null")
        turns = worker.said("turn")
        worker.says("turn", turns + 1)
        time.sleep(1.5)
        assert worker.said("turn") - turns <= 15
    settled()
    assert jobs.count("status = 'completed' and attempt = 1") == 5


def test_ends_that_take_too_long_together_are_told_in_smaller_batches(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """A trigger stands for a database so slow that it breaks off what ends more than three."""
    db.rows(
        "create function too_many() returns trigger language plpgsql as $$ begin"
        " if (select count(*) > 3 from old_rows where status = 'processing') then"
        "   raise query_canceled; end if; return null; end $$"
    )
    db.rows(
        "create trigger too_many after update on processing_jobs referencing old table as old_rows"
        " for each statement execute function too_many()"
    )
    ready = jobs.insert(user, "sleep-1", 20)
    worker = fleet.start(concurrency=20)
    worker.says("end", 20)
    settled()
    assert [jobs.row(job_id)["attempt"] for job_id in ready] == [1] * 20


@contextmanager
def in_a_loop(act: Callable[[], object]) -> Iterator[None]:
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            act()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(repeat)
        try:
            yield
        finally:
            over.set()
        future.result()


def test_users_are_deleted_under_load(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """Their jobs are in every state, and locked by workers in the opposite order."""
    workers = [fleet.start_ready(concurrency=4) for _ in range(2)]
    deleted = 0

    def insert_and_delete() -> None:
        nonlocal deleted
        owner = jobs.make_user()
        for script in ("sleep-0.02", "sleep-600", "retryable-2", "fail"):
            jobs.insert(owner, script, 5)
        jobs.insert(owner, "sleep", 2, delay=0.2)
        time.sleep(random.uniform(0, 0.3))
        db.insist("delete from auth.users where id = %s", owner)
        deleted += 1

    with in_a_loop(insert_and_delete), in_a_loop(insert_and_delete):
        mine = jobs.insert(user, "sleep-0.02", 100)
        for job_id in mine:
            assert jobs.end(job_id)["status"] == "completed"
        until(lambda: deleted >= 20, "many users are deleted")
    settled()
    assert fleet.living == workers


def test_a_job_deleted_under_a_worker_that_is_killed_leaves_nothing(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    victim = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    job_id = jobs.insert_one(user, "stubborn-600")
    victim.says("start")
    db.insist("delete from processing_jobs where id = %s", job_id)
    victim.kill()
    fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
    settled()


def cancel(db: Database, job_id: UUID) -> str:
    status: str = db.value("select status from cancel_processing_job(%s)", job_id)
    return status


def retry(db: Database, job_id: UUID) -> str:
    status: str = db.value("select status from retry_processing_job(%s)", job_id)
    return status


def test_jobs_that_wait_are_cancelled_at_once(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    queued = jobs.insert_one(user, "sleep")
    assert cancel(db, queued) == "cancelled"
    fleet.start_ready()
    scheduled = jobs.insert_one(user, "sleep", delay=600)
    assert cancel(db, scheduled) == "cancelled"
    pausing = jobs.insert_one(user, "retryable-1")
    jobs.wait(pausing, "status = 'queued' and attempt = 1")
    assert cancel(db, pausing) == "cancelled"
    assert jobs.attempts(pausing) == [(1, "retried", "engine_crashed")]
    settled()
    assert [fleet.starts(job_id) for job_id in (queued, scheduled)] == [[], []]


@pytest.mark.alone
def test_a_running_job_is_cancelled_soon(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(concurrency=2)
    job_id = jobs.insert_one(user, "sleep-600")
    other = jobs.insert_one(user, "sleep-2")
    worker.says("start", 2)
    cancelled_at = time.monotonic()
    assert cancel(db, job_id) == "processing"
    assert jobs.end(job_id)["status"] == "cancelled"
    assert time.monotonic() - cancelled_at < 2
    settled()
    assert jobs.row(other)["status"] == "completed"
    assert jobs.attempts(job_id) == [(1, "cancelled", None)]


def test_jobs_that_have_ended_stay_as_they_are_when_cancelled(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    fleet.start()
    ended = [jobs.insert_one(user, script) for script in ("sleep", "fail")]
    before = [jobs.end(job_id) for job_id in ended]
    for job_id in ended:
        cancel(db, job_id)
    after = [jobs.row(job_id) for job_id in ended]
    assert [row["status"] for row in after] == ["completed", "failed"]
    assert [row | {"updated_at": None} for row in after] == [
        row | {"updated_at": None} for row in before
    ]
    settled()


def test_failed_and_cancelled_jobs_run_again(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    cancelled = jobs.insert_one(user, "sleep")
    cancel(db, cancelled)
    fleet.start_ready()
    failed = jobs.insert_one(user, "fail")
    exhausted = jobs.insert_one(user, "retryable-1", max_attempts=1)
    for job_id in (failed, exhausted):
        jobs.end(job_id)
    assert [retry(db, job_id) for job_id in (cancelled, failed, exhausted)] == ["queued"] * 3
    jobs.wait(failed, "attempt = 2 and status = 'failed'")
    settled()
    rows = [jobs.row(job_id) for job_id in (cancelled, exhausted)]
    assert [(row["status"], row["attempt"]) for row in rows] == [("completed", 1), ("completed", 2)]


def test_a_task_that_is_cancelled_by_nobody_fails(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    fleet.start_ready()
    row = jobs.end(jobs.insert_one(user, "cancelled"))
    assert (row["status"], row["error_code"], row["attempt"]) == ("failed", "internal_error", 1)
    settled()


GARBAGE = (
    "", "null", "[]", "{", "7", '"abort_job_requested"', "[" * 5000, '{"type": "job_inserted"}',
    '{"type": "job_inserted", "job_id": null}', '{"type": "job_inserted", "job_id": "x"}',
    '{"type": "job_inserted", "job_id": Infinity}', '{"type": "job_inserted", "job_id": NaN}',
    '{"type": "job_inserted", "job_id": 1e999}', '{"type": "job_inserted", "job_id": [1]}',
    '{"type": "job_inserted", "job_id": ' + "9" * 5000 + "}",
    '{"type": "job_inserted", "job_id": ' + "9" * 300 + "}",
    '{"type": "abort_job_requested", "job_id": {}}', '{"type": ["abort_job_requested"]}',
    '[[], {}, null, 1.5, true, "own 0"]', "[Infinity]", "[-1]", "\udcff".encode(
        "utf-8", "surrogateescape").decode("latin1"),
)  # fmt: skip
CHANNELS = (
    "procrastinate_queue_v1#transcription",
    "procrastinate_queue_v1#maintenance",
    "pgscribe_workers",
)


def test_forged_notifications_change_nothing(
    db: Database, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready(concurrency=2)
    job_id = jobs.insert_one(user, "sleep-1.5")
    worker.says("start")
    queue_job_id = jobs.row(job_id)["job_id"]
    forged = f'{{"type": "abort_job_requested", "job_id": {queue_job_id}}}'
    with psycopg.connect(db.url, autocommit=True) as anybody:
        anybody.execute("set role anon")
        for channel in CHANNELS:
            for payload in (*GARBAGE, forged):
                anybody.execute("select pg_notify(%s, %s)", (channel, payload))
    other = jobs.insert_one(user, "sleep")
    assert jobs.end(other)["attempt"] == 1
    settled()
    assert (jobs.row(job_id)["status"], jobs.row(job_id)["attempt"]) == ("completed", 1)
    assert worker.said("listening") == 1, "the connection was not disturbed"


@pytest.mark.parametrize("script", ["nul", "surrogate", "nan"])
def test_a_result_that_cannot_be_stored_fails_only_its_own_job(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None], script: str
) -> None:
    good = jobs.insert(user, "sleep-0.1", 5)
    bad = jobs.insert_one(user, script)
    good += jobs.insert(user, "sleep-0.1", 5)
    fleet.start(concurrency=11)
    settled()
    row = jobs.row(bad)
    assert (row["status"], row["error_code"]) == ("failed", "result_not_storable")
    assert [jobs.row(job_id)["status"] for job_id in good] == ["completed"] * 10
