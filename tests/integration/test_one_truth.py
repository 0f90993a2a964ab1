"""Invariant 2: a job's status is what its queue job says, and nothing else can say otherwise."""

from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb


@pytest.fixture
def job(conn: psycopg.Connection, user: UUID) -> UUID:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/b') returning id", (user,)
    ).fetchone()
    assert row is not None
    job_id: UUID = row[0]
    return job_id


def set_queue_status(conn: psycopg.Connection, status: str) -> None:
    conn.execute("update procrastinate.procrastinate_jobs set status = %s", (status,))


def read(conn: psycopg.Connection, columns: str) -> tuple[object, ...]:
    row = conn.execute(f"select {columns} from processing_jobs".encode()).fetchone()
    assert row is not None
    return tuple(row)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("path", "status"),
    [
        (["doing"], "processing"),
        (["doing", "todo"], "queued"),
        (["doing", "failed"], "failed"),
        (["doing", "failed", "todo"], "queued"),
        (["cancelled"], "cancelled"),
        (["doing", "aborted"], "cancelled"),
    ],
)
def test_status_follows_the_queue(conn: psycopg.Connection, path: list[str], status: str) -> None:
    for step in path:
        set_queue_status(conn, step)
    ended = status in {"failed", "cancelled"}
    assert read(conn, "status, completed_at is not null") == (status, ended)


@pytest.mark.usefixtures("job")
def test_an_attempt_counts_from_its_claim(conn: psycopg.Connection) -> None:
    assert read(conn, "attempt, started_at") == (0, None)
    for step in ("doing", "todo", "doing"):
        set_queue_status(conn, step)
    assert read(conn, "attempt, started_at is not null, progress") == (2, True, 0)


@pytest.mark.usefixtures("job")
def test_completed_always_has_a_result(conn: psycopg.Connection) -> None:
    set_queue_status(conn, "doing")
    with pytest.raises(psycopg.errors.CheckViolation, match="completed_has_a_result"):
        set_queue_status(conn, "succeeded")
    assert read(conn, "status") == ("processing",)
    conn.execute(
        "update processing_jobs set result = %s, error_code = 'x', error = 'earlier attempt'",
        (Jsonb({"text": "hello"}),),
    )
    set_queue_status(conn, "succeeded")
    assert read(conn, "status, progress, error_code, error") == ("completed", 1, None, None)


@pytest.mark.usefixtures("job")
def test_failed_always_has_a_reason(conn: psycopg.Connection) -> None:
    set_queue_status(conn, "doing")
    set_queue_status(conn, "failed")
    assert read(conn, "status, error_code") == ("failed", "internal_error")
    assert read(conn, "error is not null") == (True,)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("status", ["processing", "completed", "failed", "cancelled"])
def test_nobody_writes_status_by_hand(conn: psycopg.Connection, status: str) -> None:
    conn.execute("update processing_jobs set result = '{}', error = 'x', error_code = 'x'")
    with pytest.raises(psycopg.errors.CheckViolation, match='which says "queued"') as caught:
        conn.execute("update processing_jobs set status = %s", (status,))
    assert caught.value.diag.column_name == "status"


@pytest.mark.usefixtures("job")
def test_nobody_writes_status_by_hand_after_the_queue_did(conn: psycopg.Connection) -> None:
    """In the same transaction: what lets the mirror write ends with it."""
    by_hand = b"update processing_jobs set status = 'failed', error = 'x', error_code = 'x'"
    with conn.transaction():
        set_queue_status(conn, "doing")
        with (
            pytest.raises(psycopg.errors.CheckViolation, match='which says "processing"'),
            conn.transaction(),
        ):
            conn.execute(by_hand)
    assert read(conn, "status") == ("processing",)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    "change",
    [
        "id = gen_random_uuid()",
        "file_path = 'other/file'",
        """options = '{"model": "tiny"}'""",
        "created_at = now() - interval '1 day'",
        "scheduled_at = now()",
        "job_id = '999'",
        "job_id = null",
    ],
)
def test_what_a_job_is_never_changes(conn: psycopg.Connection, change: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute(f"update processing_jobs set {change}".encode())


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("status", ["todo", "doing"])
def test_a_deleted_queue_job_cancels_its_job(conn: psycopg.Connection, status: str) -> None:
    set_queue_status(conn, status)
    conn.execute("delete from procrastinate.procrastinate_jobs")
    assert read(conn, "status, error_code") == ("cancelled", "queue_job_deleted")


@pytest.mark.usefixtures("job")
def test_deleting_old_queue_jobs_leaves_ended_jobs_alone(conn: psycopg.Connection) -> None:
    set_queue_status(conn, "doing")
    set_queue_status(conn, "failed")
    before = read(conn, "status, error_code, completed_at")
    conn.execute("delete from procrastinate.procrastinate_jobs")
    assert read(conn, "status, error_code, completed_at") == before
    assert read(conn, "job_id") == (None,)
    with pytest.raises(psycopg.errors.CheckViolation, match='says "failed"'):
        conn.execute("update processing_jobs set status = 'cancelled'")


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    "table",
    ["processing_jobs cascade", "procrastinate.procrastinate_jobs cascade", "auth.users cascade"],
)
def test_neither_half_of_a_job_is_truncated(conn: psycopg.Connection, table: str) -> None:
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="half of each job"):
        conn.execute(f"truncate {table}".encode())
    assert read(conn, "status") == ("queued",)


@pytest.mark.usefixtures("job")
def test_another_attempt_starts_without_the_last_ones_result(conn: psycopg.Connection) -> None:
    set_queue_status(conn, "doing")
    conn.execute("update processing_jobs set result = '{}'")
    for step in ("todo", "doing", "failed"):
        set_queue_status(conn, step)
    assert read(conn, "status, result") == ("failed", None)


def test_a_strangers_queue_job_cannot_block_the_queue(conn: psycopg.Connection) -> None:
    """A queue job of another task, or with broken arguments, is none of our business."""
    conn.execute(
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name, args)"
        """ values ('transcription', 'transcribe', '{"processing_job_id": "no uuid"}')"""
    )
    set_queue_status(conn, "doing")
    row = conn.execute("select status::text from procrastinate.procrastinate_jobs").fetchone()
    assert row == ("doing",)
