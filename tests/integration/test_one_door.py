"""Invariant 1: whoever inserts a row gets its queue job in the same transaction."""

from uuid import UUID, uuid4

import psycopg
import pytest

INSERT = b"insert into processing_jobs (user_id, file_path) values (%s, %s) returning id"


def queue_jobs(conn: psycopg.Connection) -> list[tuple[object, ...]]:
    return conn.execute(
        "select id::text, args ->> 'processing_job_id', queue_name, task_name, status::text,"
        " scheduled_at from procrastinate.procrastinate_jobs order by id"
    ).fetchall()


def test_row_and_queue_job_commit_together(conn: psycopg.Connection, user: UUID) -> None:
    with psycopg.connect(conn.info.dsn, password=conn.info.password) as writer:
        row = writer.execute(INSERT, (user, f"{user}/a.mp3")).fetchone()
        assert row is not None
        assert queue_jobs(conn) == []  # nothing is visible before the commit
    (job,) = conn.execute("select id::text, job_id, status from processing_jobs").fetchall()
    assert job == (str(row[0]), queue_jobs(conn)[0][0], "queued")
    assert queue_jobs(conn)[0][1:] == (str(row[0]), "transcription", "transcribe", "todo", None)


def test_rollback_leaves_neither(conn: psycopg.Connection, user: UUID) -> None:
    with conn.transaction(force_rollback=True):
        conn.execute(INSERT, (user, f"{user}/a.mp3"))
        assert len(queue_jobs(conn)) == 1
    assert queue_jobs(conn) == []
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (0,)


def test_bulk_insert_gives_each_row_its_own_queue_job_in_order(
    conn: psycopg.Connection, user: UUID
) -> None:
    conn.execute(
        "insert into processing_jobs (user_id, file_path)"
        " select %s, format('%%s/%%s.mp3', %s::text, n) from generate_series(1, 1000) n",
        (user, user),
    )
    rows = conn.execute(
        "select count(*), count(distinct job_id),"
        " bool_and(q.args ->> 'processing_job_id' = p.id::text) from processing_jobs p"
        " join procrastinate.procrastinate_jobs q on q.id = job_id::bigint"
    ).fetchone()
    assert rows == (1000, 1000, True)
    first = conn.execute(
        "select file_path from processing_jobs order by job_id::bigint limit 1"
    ).fetchone()
    assert first == (f"{user}/1.mp3",)


def test_insert_of_no_row_defers_nothing(conn: psycopg.Connection) -> None:
    conn.execute("insert into processing_jobs (user_id, file_path) select null, null where false")
    assert queue_jobs(conn) == []


def test_commit_wakes_listeners(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute('listen "procrastinate_queue_v1#transcription"')
    conn.execute(INSERT, (user, f"{user}/a.mp3"))
    (notification,) = conn.notifies(timeout=60, stop_after=1)
    assert '"job_inserted"' in notification.payload


def test_scheduled_at_reaches_the_queue(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(
        "insert into processing_jobs (user_id, file_path, scheduled_at)"
        " values (%s, 'a/b.mp3', now() + interval '1 hour')",
        (user,),
    )
    row = conn.execute(
        "select p.scheduled_at = q.scheduled_at from processing_jobs p"
        " join procrastinate.procrastinate_jobs q on q.id = job_id::bigint"
    ).fetchone()
    assert row == (True,)


def test_deleting_a_job_takes_it_out_of_the_queue(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(INSERT, (user, "a/b"))
    conn.execute("delete from processing_jobs")
    assert queue_jobs(conn) == []


def test_deleting_a_user_takes_their_jobs_along(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(INSERT, (user, "a/b"))
    conn.execute("delete from auth.users where id = %s", (user,))
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (0,)
    assert queue_jobs(conn) == []


def test_jobs_need_an_owner_that_exists(conn: psycopg.Connection) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        conn.execute(INSERT, (uuid4(), "a/b"))
    with pytest.raises(psycopg.errors.NotNullViolation):
        conn.execute(INSERT, (None, "a/b"))
