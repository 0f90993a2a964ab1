"""Cancel and retry, in every state, by SQL as the owner; by REST and command line on top."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from jobs.cli import main
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

MakeUser = Callable[[], UUID]
JOB_STATES = ["queued", "scheduled", "processing", "retrying", "completed", "failed", "cancelled"]


@contextmanager
def acting_as(conn: psycopg.Connection, user: UUID, role: str = "authenticated") -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, json.dumps({"sub": str(user), "role": role})),
        )
        yield


def set_queue(conn: psycopg.Connection, change: str) -> None:
    conn.execute(f"update procrastinate.procrastinate_jobs set {change}".encode())


def make_job(conn: psycopg.Connection, user: UUID, state: str) -> UUID:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f"{user}/a"),
    ).fetchone()
    assert row is not None
    for change in {
        "scheduled": ["scheduled_at = now() + interval '1 hour'"],
        "processing": ["status = 'doing'"],
        "retrying": [
            "status = 'doing'",
            "status = 'todo', attempts = 1, scheduled_at = now() + interval '1 hour'",
        ],
        "completed": ["status = 'doing'", "status = 'succeeded'"],
        "failed": ["status = 'doing'", "status = 'failed'"],
        "cancelled": ["status = 'cancelled'"],
    }.get(state, []):
        if "succeeded" in change:
            conn.execute("update processing_jobs set result = '{}'")
        set_queue(conn, change)
    job_id: UUID = row[0]
    return job_id


def read(conn: psycopg.Connection, columns: str) -> tuple[Any, ...]:
    row = conn.execute(f"select {columns} from processing_jobs".encode()).fetchone()
    assert row is not None
    return tuple(row)


@pytest.mark.parametrize("state", JOB_STATES)
def test_owners_cancel_in_every_state(conn: psycopg.Connection, user: UUID, state: str) -> None:
    job_id = make_job(conn, user, state)
    before = read(conn, "status")[0]
    with acting_as(conn, user):
        row = conn.execute("select id, status from cancel_processing_job(%s)", (job_id,)).fetchone()
    if before == "queued":
        assert row == (job_id, "cancelled")
    else:
        assert row == (job_id, before)
    flagged = conn.execute(
        "select abort_requested from procrastinate.procrastinate_jobs where status = 'doing'"
    ).fetchall()
    assert flagged == ([(True,)] if state == "processing" else [])
    assert (read(conn, "cancel_requested_at is not null")[0]) == (
        before in {"queued", "processing"}
    )


@pytest.mark.parametrize("state", JOB_STATES)
def test_owners_retry_what_has_failed_or_was_cancelled(
    conn: psycopg.Connection, user: UUID, state: str
) -> None:
    job_id = make_job(conn, user, state)
    before = read(conn, "status, retry_requested_at")
    with acting_as(conn, user):
        conn.execute("select retry_processing_job(%s)", (job_id,))
    if state in {"failed", "cancelled"}:
        assert read(conn, "status, completed_at, cancel_requested_at") == ("queued", None, None)
        queue = conn.execute("select status::text, attempts from procrastinate.procrastinate_jobs")
        assert queue.fetchall() == [("todo", 0)]
    else:
        assert read(conn, "status, retry_requested_at") == before


def test_a_job_can_be_retried_and_cancelled_again_and_again(
    conn: psycopg.Connection, user: UUID
) -> None:
    job_id = make_job(conn, user, "failed")
    for _ in range(2):
        conn.execute("select retry_processing_job(%s)", (job_id,))
        assert read(conn, "status") == ("queued",)
        conn.execute("select cancel_processing_job(%s)", (job_id,))
        assert read(conn, "status") == ("cancelled",)


def test_a_job_whose_queue_job_is_gone_can_be_retried(conn: psycopg.Connection, user: UUID) -> None:
    job_id = make_job(conn, user, "failed")
    conn.execute("delete from procrastinate.procrastinate_jobs")
    conn.execute("select retry_processing_job(%s)", (job_id,))
    assert read(conn, "status") == ("queued",)
    queue = conn.execute("select id::text, status::text from procrastinate.procrastinate_jobs")
    assert queue.fetchall() == [(*read(conn, "job_id"), "todo")]


def test_nobody_touches_others_jobs(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser
) -> None:
    job_id = make_job(conn, make_user(), "queued")
    for function in ("cancel_processing_job", "retry_processing_job"):
        with acting_as(conn, user):
            row = conn.execute(f"select id from {function}(%s)".encode(), (job_id,)).fetchone()
            changed = conn.execute("update processing_jobs set cancel_requested_at = now()")
            assert (row, changed.rowcount) == ((None,), 0)
        with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, "anon"):
            conn.execute(f"select {function}(%s)".encode(), (job_id,))
    assert read(conn, "status, cancel_requested_at") == ("queued", None)


@pytest.mark.parametrize("column", ["priority", "max_attempts", "due_at", "estimated_seconds"])
def test_owners_change_nothing_else(conn: psycopg.Connection, user: UUID, column: str) -> None:
    make_job(conn, user, "queued")
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user):
        conn.execute(f"update processing_jobs set {column} = null".encode())


def test_a_request_cannot_be_taken_back_or_backdated(conn: psycopg.Connection, user: UUID) -> None:
    make_job(conn, user, "processing")
    with acting_as(conn, user):
        conn.execute("update processing_jobs set cancel_requested_at = '2001-01-01'")
    assert read(conn, "cancel_requested_at > now() - interval '1 minute'") == (True,)
    with acting_as(conn, user):
        conn.execute("update processing_jobs set cancel_requested_at = null")
    assert read(conn, "cancel_requested_at is not null") == (True,)


def test_the_mirrors_marker_opens_nothing_to_owners(conn: psycopg.Connection, user: UUID) -> None:
    make_job(conn, user, "processing")
    before = read(conn, "job_id, status, attempt")
    with acting_as(conn, user):
        conn.execute("set local pgscribe.mirroring = 'on'")
        conn.execute("update processing_jobs set retry_requested_at = now()")
        conn.execute("update processing_jobs set cancel_requested_at = '2001-01-01'")
    assert read(conn, "job_id, status, attempt") == before
    assert read(conn, "retry_requested_at, cancel_requested_at > now() - interval '1 minute'") == (
        None,
        True,
    )
    for change in ("status = 'completed'", "job_id = '1'", "user_id = null"):
        with acting_as(conn, user):
            conn.execute("set local pgscribe.mirroring = 'on'")
            with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
                conn.execute(f"update processing_jobs set {change}".encode())


def test_the_mirrors_marker_opens_nothing_to_the_tables_owner(
    conn: psycopg.Connection, user: UUID
) -> None:
    make_job(conn, user, "processing")
    before = read(conn, "job_id, status")
    forged = "updated_at = clock_timestamp() + interval '1 s', result = '{}', completed_at = now()"
    with conn.transaction():
        conn.execute("set local pgscribe.mirroring = 'on'")
        for change in ("status = 'completed'", "job_id = '4711'"):
            with pytest.raises(psycopg.errors.CheckViolation), conn.transaction():
                conn.execute(f"update processing_jobs set {change}, {forged}".encode())
    assert read(conn, "job_id, status") == before


def test_owners_see_their_own_attempts_only(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser
) -> None:
    make_job(conn, user, "failed")
    query = b"select outcome from processing_job_attempts"
    with acting_as(conn, user):
        assert conn.execute(query).fetchall() == [("failed",)]
    with acting_as(conn, make_user()):
        assert conn.execute(query).fetchall() == []
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user):
        conn.execute("delete from processing_job_attempts")


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> dict[str, str]:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}


@pytest.mark.parametrize(
    ("state", "action", "status", "result"),
    [
        ("queued", "cancel", 200, "cancelled"),
        ("processing", "cancel", 200, "processing"),
        ("cancelled", "cancel", 200, "cancelled"),
        ("completed", "cancel", 409, "completed"),
        ("failed", "retry", 200, "queued"),
        ("cancelled", "retry", 200, "queued"),
        ("completed", "retry", 409, "completed"),
        ("queued", "retry", 409, "queued"),
    ],
)
def test_rest(
    api: TestClient,
    headers: dict[str, str],
    conn: psycopg.Connection,
    user: UUID,
    state: str,
    action: str,
    status: int,
    result: str,
) -> None:
    job_id = make_job(conn, user, state)
    response = api.post(f"/jobs/{job_id}/{action}", headers=headers)
    assert response.status_code == status, response.text
    assert read(conn, "status") == (result,)
    if status == 409:
        assert (response.json()["code"], result in response.json()["detail"]) == (
            "job_conflict",
            True,
        )
    else:
        assert response.json()["status"] == result


def test_rest_knows_no_others_jobs(
    api: TestClient, headers: dict[str, str], conn: psycopg.Connection, make_user: MakeUser
) -> None:
    job_id = make_job(conn, make_user(), "queued")
    for action in ("cancel", "retry"):
        for unknown in (job_id, uuid4(), "no-uuid"):
            response = api.post(f"/jobs/{unknown}/{action}", headers=headers)
            assert response.json()["code"] == "job_not_found"
    assert read(conn, "status") == ("queued",)


def test_command_line(
    settings: Settings,
    conn: psycopg.Connection,
    user: UUID,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())
    job_id = str(make_job(conn, user, "queued"))
    cancelled = CliRunner().invoke(main, ["cancel", job_id])
    assert (cancelled.exit_code, cancelled.output) == (0, f"{job_id}  cancelled\n")
    retried = CliRunner().invoke(main, ["retry", job_id])
    assert (retried.exit_code, retried.output) == (0, f"{job_id}  queued\n")
    mixed = CliRunner().invoke(main, ["retry", str(uuid4()), job_id])
    assert mixed.exit_code == 1
    assert "no such job" in mixed.output
    assert "only failed and cancelled jobs" in mixed.output
    set_queue(conn, "status = 'doing'")
    set_queue(conn, "status = 'failed'")
    shown = json.loads(CliRunner().invoke(main, ["jobs", job_id]).output)
    assert [attempt["outcome"] for attempt in shown["attempts"]] == ["failed"]
