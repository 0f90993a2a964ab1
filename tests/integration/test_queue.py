"""The queue's functions in the database, by the worker's client: claims, ends, beats, sweeps."""

import functools
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from jobs import database
from jobs.errors import DatabaseUnavailable
from jobs.queue import ClaimedJob, OutcomeName, Queue
from jobs.settings import Settings

pytestmark = pytest.mark.anyio

RESULT: dict[str, Any] = {"text": "hello", "segments": []}
PRUNE = (
    "insert into procrastinate.procrastinate_jobs (queue_name, task_name)"
    " values ('maintenance', 'prune')"
)


@pytest.fixture
async def worker(queue: Queue) -> int:
    return await queue.register()


def insert(conn: psycopg.Connection, user: UUID, count: int = 1, **values: object) -> list[UUID]:
    columns = "".join(f", {name}" for name in values)
    places = "".join(f", %({name})s" for name in values)
    rows = conn.execute(
        f"insert into processing_jobs (user_id, file_path{columns})"
        f" select %(user)s, 'a/' || n{places} from generate_series(1, %(count)s) n"
        " returning id".encode(),
        {"user": user, "count": count, **values},
    ).fetchall()
    return [row[0] for row in rows]


def read(conn: psycopg.Connection, job_id: UUID) -> dict[str, Any]:
    with conn.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute("select * from processing_jobs where id = %s", (job_id,)).fetchone()
    assert row is not None
    return row


def attempts(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select attempt, outcome, error_code from processing_job_attempts order by job_id, attempt"
    ).fetchall()


async def claim(queue: Queue, worker: int, wanted: int = 1) -> list[ClaimedJob]:
    return (await queue.turn(worker, [], wanted, None)).jobs


async def claim_one(queue: Queue, worker: int) -> ClaimedJob:
    (job,) = await claim(queue, worker)
    return job


@pytest.mark.usefixtures("worker")
async def test_one_statement_inserts_ten_thousand_jobs(
    conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user, 10_000)
    row = conn.execute(
        "select count(*), count(distinct q.id) from processing_jobs p"
        " join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint"
        " where q.args ->> 'processing_job_id' = p.id::text and q.status = 'todo'"
    ).fetchone()
    assert row == (10_000, 10_000)


async def test_a_claim_tells_what_the_attempt_needs(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user, options='{"model": "tiny"}', priority=7)
    job = await claim_one(queue, worker)
    assert job.attempt is not None
    assert (job.attempt.job_id, job.attempt.number, job.attempt.user_id) == (job_id, 1, user)
    assert (job.attempt.file_path, job.attempt.options) == ("a/1", {"model": "tiny"})
    assert (job.priority, job.task_name, job.args) == (
        7,
        "transcribe",
        {"processing_job_id": str(job_id)},
    )
    assert read(conn, job_id)["status"] == "processing"


async def test_a_turn_ends_and_claims_in_one_transaction(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    first, second = insert(conn, user, 2)
    job = await claim_one(queue, worker)
    end = job.end("succeeded", result=RESULT, audio_seconds=12.5)
    turn = await queue.turn(worker, [end], 1, None)
    row = read(conn, first)
    assert (row["status"], row["result"], row["audio_seconds"]) == ("completed", RESULT, 12.5)
    assert (row["progress"], row["estimated_seconds"]) == (1, 12.5)
    assert [other.attempt and other.attempt.job_id for other in turn.jobs] == [second]


@pytest.mark.parametrize(
    ("outcome", "status", "theirs"),
    [("succeeded", "completed", "succeeded"), ("failed", "failed", "failed")],
)
async def test_an_end_leaves_what_procrastinates_own_function_leaves(
    queue: Queue,
    worker: int,
    conn: psycopg.Connection,
    user: UUID,
    outcome: OutcomeName,
    status: str,
    theirs: str,
) -> None:
    """All but worker_id, which would make forgetting a worker slow."""
    ours_id, theirs_id = insert(conn, user, 2)
    ours, other = await claim(queue, worker, 2)
    await queue.turn(worker, [ours.end(outcome, result=RESULT)], 0, None)
    conn.execute("update processing_jobs set result = '{}' where id = %s", (theirs_id,))
    conn.execute(
        "select procrastinate.procrastinate_finish_job_v1(%s, %s, false)",
        (other.queue_job_id, theirs),
    )
    rows = conn.execute(
        "select q.status::text, q.attempts, q.abort_requested, q.scheduled_at, array("
        "  select e.type::text from procrastinate.procrastinate_events e"
        "   where e.job_id = q.id order by e.id)"
        " from procrastinate.procrastinate_jobs q order by q.id"
    ).fetchall()
    assert rows[0] == rows[1]
    assert read(conn, ours_id)["status"] == read(conn, theirs_id)["status"] == status


async def test_late_writers_lose(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    late = await claim_one(queue, worker)
    conn.execute("update procrastinate.procrastinate_jobs set status = 'todo', worker_id = null")
    current = await claim_one(queue, worker)
    assert current.queue_job_id == late.queue_job_id, "the same worker, the same queue job"
    outcomes: list[OutcomeName] = ["succeeded", "failed", "retry", "released", "cancelled"]
    for outcome in outcomes:
        end = late.end(outcome, result={"text": "late"}, error_code="late", error="late")
        await queue.turn(worker, [end], 0, None)
    row = read(conn, job_id)
    assert (row["status"], row["attempt"], row["result"], row["error"]) == (
        "processing",
        2,
        None,
        None,
    )
    await queue.turn(worker, [current.end("succeeded", result=RESULT)], 0, None)
    await queue.turn(worker, [current.end("failed", error_code="x", error="again")], 0, None)
    assert read(conn, job_id)["status"] == "completed"


async def test_errors_of_all_attempts_stay_visible(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    for code in ("one", "two"):
        job = await claim_one(queue, worker)
        await queue.turn(worker, [job.end("retry", error_code=code, error="Why.")], 0, None)
        row = read(conn, job_id)
        assert (row["status"], row["error_code"]) == ("queued", code)
    job = await claim_one(queue, worker)
    await queue.turn(worker, [job.end("retry", error_code="three", error="Why.")], 0, None)
    row = read(conn, job_id)
    assert (row["status"], row["attempt"], row["error_code"]) == ("failed", 3, "three")
    assert attempts(conn) == [(1, "retried", "one"), (2, "retried", "two"), (3, "failed", "three")]


async def test_a_job_may_have_attempts_of_its_own(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user, max_attempts=1)
    job = await claim_one(queue, worker)
    await queue.turn(worker, [job.end("retry", error_code="x", error="Why.")], 0, None)
    assert read(conn, job_id)["status"] == "failed"


async def test_a_pause_before_another_attempt_is_kept(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    job = await claim_one(queue, worker)
    end = job.end("retry", error_code="x", error="Why.", retry_after=3600.0)
    turn = await queue.turn(worker, [end], 1, None)
    assert turn.jobs == []
    assert turn.due is not None
    assert 3590 < turn.due[1] <= 3600
    assert read(conn, job_id)["due_at"] is not None
    conn.execute("update processing_jobs set due_at = now()")
    assert len(await claim(queue, worker)) == 1


async def test_what_a_stopping_worker_gives_back_costs_no_attempt(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user, max_attempts=1)
    conn.execute("update processing_jobs set error_code = 'earlier', error = 'Why.'")
    for _ in range(3):
        job = await claim_one(queue, worker)
        await queue.turn(worker, [job.end("released")], 0, None)
    assert attempts(conn) == [(number, "released", None) for number in (1, 2, 3)]
    assert len(await claim(queue, worker)) == 1


async def test_a_cancelled_job_is_not_tried_again(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    retried, released = insert(conn, user, 2)
    jobs = await claim(queue, worker, 2)
    for job_id in (retried, released):
        conn.execute("select cancel_processing_job(%s)", (job_id,))
    turn = await queue.turn(worker, [], 0, None)
    assert turn.abort == {job.queue_job_id for job in jobs}
    ends = [jobs[0].end("retry", error_code="x", error="Why."), jobs[1].end("released")]
    await queue.turn(worker, ends, 0, None)
    assert {read(conn, job_id)["status"] for job_id in (retried, released)} == {"cancelled"}


async def test_a_locked_row_delays_only_its_own_job(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID, database: str
) -> None:
    running, waiting, free = insert(conn, user, 3)
    job = await claim_one(queue, worker)
    assert job.attempt is not None
    assert job.attempt.job_id == running
    end = job.end("succeeded", result=RESULT)
    with psycopg.connect(database) as operator:
        operator.execute(
            "select from processing_jobs where id = any (%s) for update", ([running, waiting],)
        )
        turn = await queue.turn(worker, [end], 5, None)
        assert [other.attempt and other.attempt.job_id for other in turn.jobs] == [free]
        assert (turn.busy, turn.missed) == (frozenset({running}), 1)
    turn = await queue.turn(worker, [end], 5, None)
    assert read(conn, running)["status"] == "completed"
    assert [other.attempt and other.attempt.job_id for other in turn.jobs] == [waiting]


async def test_a_locked_queue_job_delays_only_its_own_end(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID, database: str
) -> None:
    locked, free = insert(conn, user, 2)
    jobs = await claim(queue, worker, 2)
    ends = [job.end("succeeded", result=RESULT) for job in jobs]
    with psycopg.connect(database) as operator:
        operator.execute(
            "select from procrastinate.procrastinate_jobs where id = %s for update",
            (jobs[0].queue_job_id,),
        )
        turn = await queue.turn(worker, ends, 0, None)
        assert turn.busy == {locked}
        assert read(conn, free)["status"] == "completed"
    await queue.turn(worker, ends[:1], 0, None)
    assert read(conn, locked)["status"] == "completed"


async def test_a_beat_names_the_jobs_that_are_to_stop(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    job = await claim_one(queue, worker)
    conn.execute("select cancel_processing_job(%s)", (job_id,))
    beat = await queue.beat(worker, [job], sweep=False)
    assert beat is not None
    assert beat.abort == {job.queue_job_id}


async def test_light_jobs_and_transcriptions_have_slots_of_their_own(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user, 10)
    for _ in range(3):
        conn.execute(PRUNE)
    for wanted, light, tasks in (
        (0, 1, ["prune"]),
        (2, 0, ["transcribe"] * 2),
        (3, 5, ["transcribe"] * 3 + ["prune"] * 2),
    ):
        turn = await queue.turn(worker, [], wanted, None, light=light)
        assert [job.task_name for job in turn.jobs] == tasks


async def test_a_worker_of_the_version_before_runs_maintenance_beside_its_jobs(
    worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    """It knows of no slots for it, and of no webhooks."""
    insert(conn, user, 3)
    for _ in range(2):
        conn.execute(PRUNE)
    conn.execute("select create_webhook_endpoint('https://example.org', user_id => %s)", (user,))
    conn.execute(
        "update processing_jobs set cancel_requested_at = now() where id ="
        " (select id from processing_jobs limit 1)"
    )
    turn = "select jobs, others, due from pgscribe.turn(%s, null, %s, false, %s, 3, null)"
    names = []
    for wanted in (1, 1, 1, 0):
        row = conn.execute(turn, (worker, wanted, ["maintenance"])).fetchone()
        assert row is not None
        names.append([job["task_name"] for jobs in row[:2] for job in jobs or ()])
    assert names == [["transcribe", "prune"], ["transcribe", "prune"], [], []]


async def test_a_deleted_job_stops_and_leaves_nothing_behind(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user)
    job = await claim_one(queue, worker)
    conn.execute("delete from processing_jobs")
    assert (await queue.turn(worker, [], 0, None)).abort == {job.queue_job_id}
    await queue.turn(worker, [job.end("cancelled")], 0, None)
    assert conn.execute("select from procrastinate.procrastinate_jobs").fetchall() == []


async def test_a_result_that_cannot_be_stored_changes_nothing(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    good, _ = insert(conn, user, 2)
    first, second = await claim(queue, worker, 2)
    ends = [
        first.end("succeeded", result=RESULT),
        second.end("succeeded", result={"text": "a\0b"}),
    ]
    with pytest.raises(psycopg.DataError):
        await queue.turn(worker, ends, 0, None)
    assert read(conn, good)["status"] == "processing"


async def test_a_claim_whose_answer_got_lost_is_given_back(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    kept_id, lost_id = insert(conn, user, 2)
    kept = await claim_one(queue, worker)
    await claim_one(queue, worker)
    beat = await queue.beat(worker, [kept], sweep=False)
    assert beat is not None
    assert (beat.orphans, beat.lost) == (1, frozenset())
    assert (read(conn, kept_id)["status"], read(conn, lost_id)["status"]) == (
        "processing",
        "queued",
    )


async def test_a_beat_names_what_the_worker_has_lost(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user)
    job = await claim_one(queue, worker)
    conn.execute("update procrastinate.procrastinate_jobs set status = 'todo', worker_id = null")
    beat = await queue.beat(worker, [job], sweep=False)
    assert beat is not None
    assert beat.lost == {job.key}


async def _kill_worker(conn: psycopg.Connection, worker: int) -> None:
    conn.execute(
        "update procrastinate.procrastinate_workers set last_heartbeat = now() - interval '1 hour'"
        " where id = %s",
        (worker,),
    )


def sweep(conn: psycopg.Connection, stall_timeout: float = 0.1, max_attempts: int = 3) -> int:
    row = conn.execute(
        "select pgscribe.sweep_stalled_jobs(%s, %s)", (stall_timeout, max_attempts)
    ).fetchone()
    assert row is not None
    swept: int = row[0]
    return swept


async def test_jobs_of_a_dead_worker_are_swept_until_their_attempts_are_used_up(
    queue: Queue, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    for _ in range(3):
        worker = await queue.register()
        await claim_one(queue, worker)
        await _kill_worker(conn, worker)
        assert (sweep(conn), sweep(conn)) == (1, 0)
        assert await queue.beat(worker, [], sweep=False) is None
    row = read(conn, job_id)
    assert (row["status"], row["error_code"], row["attempt"]) == ("failed", "worker_lost", 3)
    assert "attempt 3" in row["error"]
    assert [outcome for _, outcome, _ in attempts(conn)] == ["retried", "retried", "failed"]


DEFER = (
    "insert into procrastinate.procrastinate_jobs"
    " (queue_name, task_name, queueing_lock, status, worker_id)"
    " values ('maintenance', 'clean_up', 'clean_up', 'doing', %s)"
)
MAINTENANCE = (
    "select status::text, count(*) from procrastinate.procrastinate_jobs"
    " where queue_name = 'maintenance' group by 1 order by 1"
)


async def test_maintenance_of_dead_workers_never_stops_the_sweep(
    queue: Queue, conn: psycopg.Connection, user: UUID
) -> None:
    """One queueing_lock lets one job wait: of those that are given back, one, or none."""
    (job_id,) = insert(conn, user)
    workers = [await queue.register() for _ in range(2)]
    await claim_one(queue, workers[0])
    for worker in (workers[0], workers[0], workers[1]):
        conn.execute(DEFER, (worker,))
    for worker in workers:
        await _kill_worker(conn, worker)
    assert sweep(conn) == 1
    assert read(conn, job_id)["status"] == "queued"
    assert conn.execute(MAINTENANCE).fetchall() == [("aborted", 2), ("todo", 1)]
    assert conn.execute("select from procrastinate.procrastinate_workers").fetchall() == []
    # Beside one that waits already none is needed.
    worker = await queue.register()
    conn.execute(DEFER, (worker,))
    await _kill_worker(conn, worker)
    sweep(conn)
    assert conn.execute(MAINTENANCE).fetchall() == [("aborted", 3), ("todo", 1)]


async def test_a_worker_gives_maintenance_back_that_others_have_deferred_meanwhile(
    queue: Queue, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    worker = await queue.register()
    job = await claim_one(queue, worker)
    for _ in range(2):
        conn.execute(DEFER, (worker,))
    beat = await queue.beat(worker, [job], sweep=False)  # claims whose answer never arrived
    assert beat is not None
    assert conn.execute(MAINTENANCE).fetchall() == [("aborted", 1), ("todo", 1)]
    assert read(conn, job_id)["status"] == "processing"


async def test_a_living_workers_jobs_are_left_alone(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user)
    job = await claim_one(queue, worker)
    await queue.beat(worker, [job], sweep=True)
    assert sweep(conn, stall_timeout=20) == 0


async def test_after_a_restart_everybody_has_time_to_report(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    insert(conn, user)
    await claim_one(queue, worker)
    await _kill_worker(conn, worker)
    assert sweep(conn, stall_timeout=3000) == 0, "this server has not been up that long"


async def test_signing_off_gives_back_what_is_left(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    (job_id,) = insert(conn, user)
    await claim_one(queue, worker)
    await queue.sign_off(worker)
    assert read(conn, job_id)["status"] == "queued"
    assert conn.execute("select from procrastinate.procrastinate_workers").fetchall() == []


async def test_queue_jobs_of_another_kind_run_in_procrastinates_order(
    queue: Queue, worker: int, conn: psycopg.Connection
) -> None:
    """Also one whose arguments are no object."""
    conn.execute(
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name, args, priority, lock)"
        " values ('maintenance', 'a', '[1]', 0, null), ('maintenance', 'b', '{\"x\": 1}', 5, 'l'),"
        " ('maintenance', 'c', '{}', 4, 'l'), ('unknown', 'd', '{}', 9, null)"
    )
    turn = await queue.turn(worker, [], 0, None, light=5)
    assert [(job.task_name, job.args) for job in turn.jobs] == [("b", {"x": 1}), ("a", {})]
    b, a = turn.jobs
    ends = [b.end("succeeded"), a.end("retry", retry_after=0.0)]
    turn = await queue.turn(worker, ends, 0, None, light=5)
    assert [job.task_name for job in turn.jobs] == ["c", "a"]
    late = await queue.turn(worker + 1, [turn.jobs[1].end("succeeded")], 0, None)
    assert late.jobs == []
    row = conn.execute(
        "select status::text, attempts from procrastinate.procrastinate_jobs where task_name = 'a'"
    ).fetchone()
    assert row == ("doing", 1), "another worker can't end it"


async def test_a_database_that_does_not_answer_is_an_error_to_retry(settings: Settings) -> None:
    nowhere = settings.model_copy(
        update={"database_url": type(settings.database_url)("postgresql://x@127.0.0.1:1/x")}
    )
    queue = Queue(
        functools.partial(database.connect, nowhere, name="test"), max_attempts=3, stall_timeout=30
    )
    with pytest.raises(DatabaseUnavailable):
        await queue.register()
