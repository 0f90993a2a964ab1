"""The SQL of the documentation, as the roles that it is for."""

import json
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from tests import doc_blocks
from tests.doc_blocks import JOB, Block, in_full, runs

USER = UUID(doc_blocks.USER)
CHUNK = {"text": "Hello there.", "language": "en", "segments": []}
RESULT = {
    "text": "Hello there. The budget is fine.",
    "language": "en",
    "duration": 3.0,
    "segments": [
        {"start": 1.5, "end": 3.0, "text": "The budget is fine."},
        {"start": 0.0, "end": 1.5, "text": "Hello there."},
    ],
}
BLOCKS = runs("role")
# What makes a new job one with that status; the queue's status is the truth.
STEPS = {
    "queued": [],
    "processing": ["doing"],
    "failed": ["doing", "failed"],
    "completed": ["doing", "succeeded"],
}


@pytest.fixture
def owner(conn: psycopg.Connection) -> UUID:
    conn.execute("insert into auth.users (id, email) values (%s, 'a@example.org')", (USER,))
    return USER


@pytest.fixture
def stranger(conn: psycopg.Connection) -> UUID:
    """Somebody else, who has a job that no user may see."""
    stranger = UUID("00000000-0000-4000-8000-000000000002")
    conn.execute("insert into auth.users (id, email) values (%s, 'b@example.org')", (stranger,))
    return stranger


def make_job(conn: psycopg.Connection, owner: UUID, status: str) -> str:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (owner, f"{owner}/talk.mp3"),
    ).fetchone()
    assert row is not None
    job_id = str(row[0])
    for step in STEPS[status]:
        if step == "succeeded":
            conn.execute(
                "update processing_jobs set result = %s where id = %s", (json.dumps(RESULT), job_id)
            )
        conn.execute(
            "update procrastinate.procrastinate_jobs"
            " set status = %s::procrastinate.procrastinate_job_status"
            " where id = (select job_id::bigint from processing_jobs where id = %s)",
            (step, job_id),
        )
    for index, result in enumerate([json.dumps(CHUNK), None] if status == "processing" else []):
        conn.execute(
            "insert into processing_job_chunks (job_id, index, start_seconds, end_seconds, result)"
            " values (%s, %s, %s, %s, %s)",
            (job_id, index, index * 30, index * 30 + 30, result),
        )
    return job_id


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_sql_in_the_documentation(
    conn: psycopg.Connection, owner: UUID, stranger: UUID, block: Block
) -> None:
    how = block.options
    code, role = in_full(block.code), how.pop("role")
    if status := how.pop("job", None):
        code = code.replace(JOB, make_job(conn, owner, status))
    if role == "authenticated":
        make_job(conn, stranger, status or "queued")
    assert JOB not in code, "the comment has to say which job= this is about"
    error = how.pop("error", None)
    if error is not None:
        with pytest.raises(psycopg.Error) as refused:
            run(conn, owner, role, code)
        assert refused.value.sqlstate == error
        assert how == {}
        return
    rows = run(conn, owner, role, code)
    assert len(rows) == int(how.pop("rows"))
    for name, value in how.items():
        assert str(rows[0][name]) == value


def run(conn: psycopg.Connection, owner: UUID, role: str, code: str) -> list[dict[str, object]]:
    """Run statements as a role; return the rows of the last one that has any."""
    rows: list[dict[str, object]] = []
    with conn.cursor(row_factory=dict_row) as cursor:
        if role == "postgres":
            cursor.execute(code.encode())
        else:
            claims = {"role": role} | ({"sub": str(owner)} if role == "authenticated" else {})
            cursor.execute("begin")
            try:
                cursor.execute(
                    "select set_config('role', %s, true),"
                    " set_config('request.jwt.claims', %s, true)",
                    (role, json.dumps(claims)),
                )
                cursor.execute(code.encode())
                rows = last_rows(cursor)
                conn.execute("commit")
            except psycopg.Error:
                conn.execute("rollback")
                raise
            return rows
        return last_rows(cursor)


def last_rows(cursor: psycopg.Cursor[dict[str, object]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    while True:
        if cursor.description is not None:
            rows = cursor.fetchall()
        if not cursor.nextset():
            return rows


def test_all_is_shown_by_role() -> None:
    """The extraction finds the blocks: else all of the above might test nothing."""
    roles = [block.how[0] for block in BLOCKS]
    assert len(BLOCKS) >= 25
    assert {role: roles.count(role) > 1 for role in set(roles)} == {
        "role=authenticated": True, "role=service_role": True, "role=postgres": True,
    }  # fmt: skip
