"""What an insert may add to a job: a key of one's own, a schedule, a priority, attempts."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from starlette.testclient import TestClient

from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

MakeUser = Callable[[], UUID]

INSERT = (
    "insert into processing_jobs (user_id, file_path, options, idempotency_key)"
    " values (%(user)s, %(path)s, %(options)s, %(key)s)"
)
AGAIN = f"{INSERT} on conflict (user_id, idempotency_key) where idempotency_key is not null"


def values(user: UUID, **changes: object) -> dict[str, object]:
    return {"user": user, "path": f"{user}/a", "options": "{}", "key": "k", **changes}


def count(conn: psycopg.Connection) -> tuple[Any, ...]:
    row = conn.execute(
        "select (select count(*) from processing_jobs),"
        " (select count(*) from procrastinate.procrastinate_jobs)"
    ).fetchone()
    assert row is not None
    return tuple(row)


def test_the_same_key_is_the_same_job(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(INSERT.encode(), values(user))
    with pytest.raises(psycopg.errors.UniqueViolation):
        conn.execute(INSERT.encode(), values(user))
    conn.execute(f"{AGAIN} do nothing".encode(), values(user))
    assert count(conn) == (1, 1)


@pytest.mark.parametrize("change", [{"path": "other"}, {"options": '{"model": "tiny"}'}])
def test_the_same_key_for_another_job_is_refused(
    conn: psycopg.Connection, user: UUID, change: dict[str, object]
) -> None:
    conn.execute(INSERT.encode(), values(user))
    with pytest.raises(psycopg.errors.CheckViolation, match="idempotency_key: was used") as caught:
        conn.execute(f"{AGAIN} do nothing".encode(), values(user, **change))
    assert caught.value.diag.column_name == "idempotency_key"
    assert count(conn) == (1, 1)


def test_keys_belong_to_their_owners(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser
) -> None:
    for owner in (user, make_user()):
        conn.execute(INSERT.encode(), values(owner))
    assert count(conn) == (2, 2)


def test_many_at_once_make_one_job(conn: psycopg.Connection, user: UUID, database: str) -> None:
    def insert() -> None:
        with psycopg.connect(database, autocommit=True) as own:
            own.execute(f"{AGAIN} do nothing".encode(), values(user))

    threads = [threading.Thread(target=insert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(conn) == (1, 1)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("priority", 101, "priority: must be from -100 to 100"),
        ("max_attempts", 0, "max_attempts: must be from 1 to 20"),
        ("max_attempts", 21, "max_attempts: must be from 1 to 20"),
        ("idempotency_key", "", "idempotency_key: must have 1 to 200 characters"),
        ("idempotency_key", "x" * 201, "idempotency_key: must have 1 to 200 characters"),
        ("due_at", "2020-01-01", "status: only pgscribe writes"),
        ("cancel_requested_at", "2020-01-01", "status: only pgscribe writes"),
        ("note", "mine", "note: only pgscribe writes it"),
        ("usage", "{}", "usage: only pgscribe writes it"),
    ],
)
def test_bad_values_are_refused(
    conn: psycopg.Connection, user: UUID, column: str, value: object, message: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=message):
        conn.execute(
            f"insert into processing_jobs (user_id, file_path, {column})"
            " values (%s, 'a', %s)".encode(),
            (user, value),
        )
    assert count(conn) == (0, 0)


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def post(api: TestClient, settings: Settings, user: UUID, key: str, **body: object) -> Any:
    headers = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    headers |= {"Idempotency-Key": key} if key else {}
    return api.post("/process", json={"filePath": f"{user}/a", **body}, headers=headers)


def test_rest_answers_a_replay_as_the_first_time(
    api: TestClient, settings: Settings, user: UUID, conn: psycopg.Connection
) -> None:
    first, replay = (post(api, settings, user, "k", priority=3) for _ in range(2))
    assert (first.status_code, replay.status_code) == (202, 202)
    assert first.json() == replay.json()
    other = post(api, settings, user, "k", priority=4)
    assert (other.status_code, other.json()["field"]) == (422, "idempotency_key")
    assert count(conn) == (1, 1)


def test_rest_takes_schedule_and_priority(
    api: TestClient, settings: Settings, user: UUID, conn: psycopg.Connection
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    response = post(api, settings, user, "", scheduledAt=later.isoformat(), priority=-5)
    assert response.status_code == 202, response.text
    row = conn.execute("select scheduled_at, due_at, priority from processing_jobs").fetchone()
    assert row == (later, later, -5)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"scheduledAt": "tomorrow"}, "scheduledAt"),
        ({"scheduledAt": "2030-01-01T00:00:00"}, "scheduledAt"),
    ],
)
def test_rest_names_the_field_to_blame(
    api: TestClient, settings: Settings, user: UUID, body: dict[str, object], field: str
) -> None:
    response = post(api, settings, user, "", **body)
    assert (response.status_code, response.json()["field"]) == (422, field)


def test_rest_says_when_the_database_is_away(
    settings: Settings, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.database.CONNECTION_TIMEOUT", 1.0)
    away = settings.model_copy(
        update={"database_url": type(settings.database_url)("postgresql://x@127.0.0.1:1/x")}
    )
    with TestClient(create_app(away), raise_server_exceptions=False) as client:
        response = post(client, settings, user, "")
    assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
    assert response.headers["retry-after"] == "2"
