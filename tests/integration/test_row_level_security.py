"""Invariant 6: the database decides who sees and who writes what."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest

MakeUser = Callable[[], UUID]

INSERT = b"insert into processing_jobs (user_id, file_path) values (%s, %s)"


@contextmanager
def acting_as(conn: psycopg.Connection, user: UUID, role: str = "authenticated") -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, json.dumps({"sub": str(user), "role": role})),
        )
        yield


@pytest.fixture
def other(make_user: MakeUser) -> UUID:
    return make_user()


@pytest.fixture
def their_job(conn: psycopg.Connection, other: UUID) -> UUID:
    conn.execute(INSERT, (other, f"{other}/secret.mp3"))
    row = conn.execute("select id from processing_jobs").fetchone()
    assert row is not None
    job_id: UUID = row[0]
    return job_id


def test_owners_insert_and_see_their_own(conn: psycopg.Connection, user: UUID) -> None:
    with acting_as(conn, user):
        conn.execute("insert into processing_jobs (file_path) values (%s)", (f"{user}/a.mp3",))
        row = conn.execute("select user_id, status, job_id from processing_jobs").fetchone()
    assert row is not None
    assert row[:2] == (user, "queued")
    assert row[2] is not None


@pytest.mark.usefixtures("their_job")
def test_owners_do_not_see_others_jobs(conn: psycopg.Connection, user: UUID) -> None:
    with acting_as(conn, user):
        assert conn.execute("select * from processing_jobs").fetchall() == []


def test_owners_insert_for_nobody_else(conn: psycopg.Connection, user: UUID, other: UUID) -> None:
    with (
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
        acting_as(conn, user),
    ):
        conn.execute(INSERT, (other, f"{user}/a.mp3"))


def test_owners_learn_nothing_of_others_idempotency_keys(
    conn: psycopg.Connection, user: UUID, other: UUID
) -> None:
    insert = (
        b"insert into processing_jobs (user_id, file_path, idempotency_key) values (%s, %s, %s)"
    )
    conn.execute(insert, (other, f"{other}/secret.mp3", "known"))
    for key in ("known", "unknown"):
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
            acting_as(conn, user),
        ):
            conn.execute(insert, (other, f"{user}/a.mp3", key))


@pytest.mark.parametrize("template", ["{other}/secret.mp3", "shared/a.mp3", "{user}", "{user}x/a"])
def test_owners_insert_audio_of_their_own_folder_only(
    conn: psycopg.Connection, user: UUID, other: UUID, template: str
) -> None:
    path = template.format(user=user, other=other)
    if path == str(user):  # the folder itself: theirs, and found missing when the job runs
        with acting_as(conn, user):
            assert conn.execute(INSERT, (user, path)).rowcount == 1
        return
    with (
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
        acting_as(conn, user),
    ):
        conn.execute(INSERT, (user, path))


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "created_at",
        "status",
        "result",
        "job_id",
        "progress",
        "error",
        "note",
        "usage",
        "completed_at",
    ],
)
def test_owners_never_write_what_is_not_theirs(
    conn: psycopg.Connection, user: UUID, column: str
) -> None:
    query = f"insert into processing_jobs (file_path, {column}) values ('a/b', null)"
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user):
        conn.execute(query.encode())


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize(
    "statement",
    [
        "update processing_jobs set options = '{}'",
        "truncate processing_jobs",
        "select * from procrastinate.procrastinate_jobs",
        "select procrastinate.procrastinate_fetch_job_v2(null, 1)",
        "select * from pgscribe.lock_held_job(1, 1, 1)",
        "select pgscribe.job_status('todo')",
        "select report_progress(gen_random_uuid(), 0.5)",
        "create trigger t before insert on processing_jobs execute function pgscribe.x()",
    ],
)
def test_api_roles_reach_nothing_else(
    conn: psycopg.Connection, user: UUID, role: str, statement: str
) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, role):
        conn.execute(statement.encode())


def test_anonymous_visitors_have_no_access(conn: psycopg.Connection, user: UUID) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, "anon"):
        conn.execute("select * from processing_jobs")


def test_services_insert_for_users_but_write_no_status(
    conn: psycopg.Connection, user: UUID
) -> None:
    with acting_as(conn, user, "service_role"):
        assert conn.execute(INSERT, (user, "shared/announcement.mp3")).rowcount == 1
    with (
        pytest.raises(psycopg.errors.InsufficientPrivilege),
        acting_as(conn, user, "service_role"),
    ):
        conn.execute("update processing_jobs set status = 'completed'")


def test_a_callers_types_and_functions_are_never_used(conn: psycopg.Connection, user: UUID) -> None:
    """With an empty search_path, a temporary type named `text` would run as `postgres`."""
    with acting_as(conn, user):
        conn.execute(
            "create table pg_temp.seen (who pg_catalog.text);"
            "grant insert on pg_temp.seen to public;"
            "create function pg_temp.evil(anyelement) returns pg_catalog.bool language plpgsql as"
            " $$ begin insert into pg_temp.seen values (current_user); return true; end $$"
        )
        for name in ("text", "jsonb", "uuid", "bigint", "int8", "float8", "timestamptz", "bool"):
            conn.execute(
                f"create domain pg_temp.{name} as pg_catalog."
                f"{'int8' if name == 'bigint' else name} check (pg_temp.evil(value))".encode()
            )
        conn.execute(
            "insert into public.processing_jobs (file_path, options)"
            """ values (%s, '{"task": "translate"}')""",
            (f"{user}/a.mp3",),
        )
        assert (
            conn.execute("select * from pg_temp.seen where who <> 'authenticated'").fetchall() == []
        )


def test_every_function_fixes_its_search_path(conn: psycopg.Connection) -> None:
    rows = conn.execute(
        "select oid::regprocedure, proconfig from pg_proc"
        " where pronamespace in ('pgscribe'::regnamespace, 'procrastinate'::regnamespace)"
        " and not coalesce(proconfig && array['search_path=pg_catalog, pg_temp',"
        " 'search_path=procrastinate, pg_temp'], false)"
    )
    assert rows.fetchall() == []


def test_the_connection_is_itself_again_after_a_transaction_as_a_user(
    conn: psycopg.Connection, user: UUID
) -> None:
    with acting_as(conn, user):
        pass
    row = conn.execute("select current_user, auth.uid()").fetchone()
    assert row == ("postgres", None)
