"""Reports on running jobs: the real supabase client, over HTTP, on a real database."""

import concurrent.futures
import json
import logging
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import supabase
from starlette.testclient import TestClient

from jobs.settings import Settings
from jobs.sql import ATTEMPTS
from modal_functions import status
from modal_functions.status import (
    InvalidReport,
    ReportRefused,
    StatusError,
    SupabaseUnavailable,
    update_job_status,
)
from tests import ports, postgrest
from tests.postgrest import LocalSupabase
from web.app import create_app
from web.auth import issue_token

MakeUser = Callable[[], UUID]
Report = dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalSupabase]:
    with postgrest.serve() as project:
        yield project


@pytest.fixture
def project(
    server: LocalSupabase, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalSupabase]:
    """The project that the environment names, as a Modal Secret does."""
    server.database = database
    server.requests.clear()
    server.faults.clear()
    monkeypatch.setenv("SUPABASE_URL", server.url)
    monkeypatch.setenv("SUPABASE_SECRET_KEY", server.secret_key)
    monkeypatch.delenv("SUPABASE_SERVICE_ROLE_KEY", raising=False)
    monkeypatch.setattr(status, "PAUSES", (0.0,) * len(status.PAUSES))
    yield server
    assert not server.faults


def set_queue(conn: psycopg.Connection, change: str) -> None:
    conn.execute(f"update procrastinate.procrastinate_jobs set {change}".encode())


@pytest.fixture
def job(conn: psycopg.Connection, user: UUID) -> UUID:
    """A job that is processing."""
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f"{user}/a.mp3"),
    ).fetchone()
    assert row is not None
    set_queue(conn, "status = 'doing'")
    job_id: UUID = row[0]
    return job_id


def read(conn: psycopg.Connection, columns: str = "status, progress, note") -> tuple[Any, ...]:
    row = conn.execute(f"select {columns} from processing_jobs".encode()).fetchone()
    assert row is not None
    return tuple(row)


@contextmanager
def acting_as(conn: psycopg.Connection, user: UUID) -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', 'authenticated', true),"
            " set_config('request.jwt.claims', %s, true)",
            (json.dumps({"sub": str(user), "role": "authenticated"}),),
        )
        yield


@pytest.mark.parametrize("kind", ["secret_key", "service_role_key"])
def test_progress_and_note_arrive(
    project: LocalSupabase,
    conn: psycopg.Connection,
    job: UUID,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUPABASE_SECRET_KEY")
    name = "SUPABASE_SECRET_KEY" if kind == "secret_key" else "SUPABASE_SERVICE_ROLE_KEY"
    monkeypatch.setenv(name, getattr(project, kind))
    row = update_job_status(str(job), "processing", {"progress": 0.5, "note": "Räume 1-3 ✓"})
    assert row == {"id": str(job), "status": "processing", "progress": 0.5, "note": "Räume 1-3 ✓"}
    assert read(conn) == ("processing", 0.5, "Räume 1-3 ✓")
    assert len(project.requests) == 1


def test_the_owner_sees_the_note_and_nobody_else_does(
    project: LocalSupabase,  # noqa: ARG001 - its environment
    conn: psycopg.Connection,
    job: UUID,
    user: UUID,
    make_user: MakeUser,
    settings: Settings,
) -> None:
    update_job_status(str(job), "processing", {"note": "half", "progress": 0.5})
    for who, seen in ((user, [("half", 0.5)]), (make_user(), [])):
        with acting_as(conn, who):
            rows = conn.execute("select note, progress from processing_jobs").fetchall()
        assert rows == seen
    headers = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    with TestClient(create_app(settings)) as api:
        shown = api.get(f"/jobs/{job}", headers=headers).json()
        (listed,) = api.get("/jobs", headers=headers).json()["jobs"]
    assert (shown["note"], listed["note"]) == ("half", "half")


@pytest.mark.usefixtures("project")
def test_progress_never_goes_back_and_never_says_completed(
    conn: psycopg.Connection, job: UUID
) -> None:
    reached = [
        update_job_status(str(job), "processing", {"progress": progress})["progress"]
        for progress in (0.5, 0.25, 0, 1, 0.75)
    ]
    assert reached == [0.5, 0.5, 0.5, 0.99, 0.99]
    assert read(conn)[0] == "processing"


@pytest.mark.usefixtures("project")
def test_a_note_is_kept_replaced_and_removed(conn: psycopg.Connection, job: UUID) -> None:
    for report, note, progress in (
        ({"note": "first"}, "first", 0.0),
        ({"progress": 0.5}, "first", 0.5),
        ({"note": None}, "first", 0.5),
        (None, "first", 0.5),
        ({"note": "x" * 500}, "x" * 500, 0.5),
        ({"note": ""}, None, 0.5),
    ):
        answer = update_job_status(str(job), "processing", report)
        assert (answer["note"], answer["progress"]) == (note, progress)
        assert read(conn, "note, progress") == (note, progress)


@pytest.mark.usefixtures("project")
def test_another_attempt_starts_without_the_note(conn: psycopg.Connection, job: UUID) -> None:
    update_job_status(str(job), "processing", {"progress": 0.5, "note": "of the first attempt"})
    set_queue(conn, "status = 'todo', attempts = 1")
    assert read(conn) == ("queued", 0.5, "of the first attempt")
    set_queue(conn, "status = 'doing'")
    assert read(conn) == ("processing", 0.0, None)


@pytest.mark.usefixtures("project")
def test_the_note_stays_once_the_job_has_ended(conn: psycopg.Connection, job: UUID) -> None:
    update_job_status(str(job), "processing", {"note": "last words"})
    conn.execute("update processing_jobs set result = '{}'")
    set_queue(conn, "status = 'succeeded'")
    assert read(conn) == ("completed", 1.0, "last words")


@pytest.mark.parametrize("wanted", ["queued", "completed", "failed", "cancelled", "done", "", None])
def test_a_status_cannot_be_written(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID, wanted: Any
) -> None:
    with pytest.raises(InvalidReport, match=r"^status: .* derived from the queue") as caught:
        update_job_status(str(job), wanted, {"progress": 1})
    assert read(conn) == ("processing", 0.0, None)
    assert project.requests == []
    instead = {"cancelled": "cancel_processing_job", "queued": "retry_processing_job"}
    assert instead.get(wanted, "") in str(caught.value)


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({"text": "hello"}, "result: 'text' is unknown; known: note, progress"),
        ({"progress": 0.5, "status": "completed"}, "result: 'status' is unknown"),
        (["progress"], "result: must have progress or note"),
        ({"progress": "half"}, "progress: must be a number from 0 to 1, not 'half'"),
        ({"progress": True}, "progress: must be a number"),
        ({"progress": 1.5}, "progress: must be a number from 0 to 1, not 1.5"),
        ({"progress": -0.1}, "progress: must be"),
        ({"progress": float("nan")}, "progress: must be"),
        ({"progress": 10**400}, "progress: must be"),
        ({"note": 5}, "note: must be a text"),
        ({"note": "a\0b"}, "note: must be a text"),
        ({"note": "\ud800"}, "note: must be a text"),
    ],
)
def test_what_cannot_be_reported_is_named(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID, report: Any, message: str
) -> None:
    with pytest.raises(InvalidReport) as caught:
        update_job_status(str(job), "processing", report)
    assert str(caught.value).startswith(message)
    assert read(conn) == ("processing", 0.0, None)
    assert project.requests == []


@pytest.mark.parametrize("job_id", ["7", "", None, 7])
def test_an_id_that_is_none_is_named(project: LocalSupabase, job_id: Any) -> None:
    with pytest.raises(InvalidReport, match=r"^job_id: must be the id of a row of processing_jobs"):
        update_job_status(job_id, "processing")
    assert project.requests == []


@pytest.mark.parametrize("note", ["x" * 501, "two\nlines", "\x1b[31mred"])
def test_the_database_refuses_a_note(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID, note: str
) -> None:
    with pytest.raises(ReportRefused, match=r"^note: must have at most 500 characters") as caught:
        update_job_status(str(job), "processing", {"progress": 0.5, "note": note})
    assert caught.value.code == "23514"
    assert read(conn) == ("processing", 0.0, None)
    assert len(project.requests) == 1


@pytest.mark.parametrize("progress", ["1.01", "-0.01", "'NaN'", "'Infinity'"])
def test_the_database_refuses_progress(conn: psycopg.Connection, job: UUID, progress: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="progress: must be from 0 to 1"):
        conn.execute(f"select report_progress('{job}', {progress})".encode())
    assert read(conn) == ("processing", 0.0, None)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        (["status = 'todo', attempts = 1"], "queued"),
        (["status = 'succeeded'"], "completed"),
        (["status = 'failed'"], "failed"),
        (["status = 'aborted'"], "cancelled"),
    ],
)
def test_a_job_that_is_not_processing_is_left_alone(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID, changes: list[str], state: str
) -> None:
    conn.execute("update processing_jobs set result = '{}'")
    for change in changes:
        set_queue(conn, change)
    before = read(conn, "*")
    with pytest.raises(ReportRefused) as caught:
        update_job_status(str(job), "processing", {"progress": 0.5, "note": "late"})
    assert caught.value.message.startswith(f'status: is "{state}"')
    assert "cancel_processing_job" in caught.value.hint
    assert read(conn, "*") == before
    assert len(project.requests) == 1


@pytest.mark.usefixtures("project", "job")
def test_a_job_that_is_missing_is_named() -> None:
    with pytest.raises(ReportRefused, match=r"^id: there is no such job. Give the id of a row"):
        update_job_status(str(uuid4()), "processing", {"progress": 0.5})


def test_users_and_visitors_may_not_call_it(
    project: LocalSupabase,
    conn: psycopg.Connection,
    job: UUID,
    user: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key in (project.user_token(user), project.anon_key, project.token(role="anon")):
        monkeypatch.setenv("SUPABASE_SECRET_KEY", key)
        with pytest.raises(ReportRefused, match="permission denied for function") as caught:
            update_job_status(str(job), "processing", {"progress": 0.5})
        assert caught.value.code == "42501"
        assert_hidden(caught.value, key)
    assert read(conn) == ("processing", 0.0, None)


@pytest.mark.parametrize(
    ("key", "message"),
    [("sb_secret_of_another_project", "Invalid API key"), ("eyJ.of.another", "Invalid API key")],
)
def test_a_key_of_another_project_is_refused(
    project: LocalSupabase, job: UUID, key: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPABASE_SECRET_KEY", key)
    with pytest.raises(ReportRefused, match=message) as caught:
        update_job_status(str(job), "processing", {"progress": 0.5})
    assert_hidden(caught.value, key)
    assert len(project.requests) == 1


def test_a_key_that_has_expired_is_refused(
    project: LocalSupabase, job: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPABASE_SECRET_KEY", project.token(role="service_role", exp=1))
    with pytest.raises(ReportRefused, match=r"JWT expired. \(PGRST303\)"):
        update_job_status(str(job), "processing", {"progress": 0.5})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SUPABASE_URL", ""),
        ("SUPABASE_URL", "project.supabase.co"),
        ("SUPABASE_URL", "https://user:password@project.supabase.co"),
        ("SUPABASE_URL", "https://project.supabase.co:port"),
        ("SUPABASE_SECRET_KEY", ""),
        ("SUPABASE_SECRET_KEY", "sb_publishable_key"),
        ("SUPABASE_SECRET_KEY", "sb_secret_two\nlines"),
        ("SUPABASE_SECRET_KEY", "sb_secret_schlüssel"),
    ],
)
def test_an_unusable_secret_is_named_without_its_value(
    project: LocalSupabase, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidReport, match=f"^{name}") as caught:
        update_job_status(str(uuid4()), "processing")
    if value:
        assert_hidden(caught.value, value)
    assert project.requests == []


@pytest.mark.parametrize("fault", ["request", "answer", "gateway", 502, 503, 504])
def test_what_passes_is_tried_again(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID, fault: postgrest.Fault
) -> None:
    project.faults.extend([fault, fault])
    update_job_status(str(job), "processing", {"progress": 0.5, "note": "once"})
    assert read(conn) == ("processing", 0.5, "once")
    assert len(project.requests) == 3


@pytest.mark.parametrize("fault", ["request", "answer", "wait", 503])
def test_what_does_not_pass_is_given_up(
    project: LocalSupabase, job: UUID, fault: postgrest.Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "TIMEOUT", 0.5)
    project.faults.extend([fault] * 3)
    with pytest.raises(SupabaseUnavailable, match="did not take the report, in 3 tries") as caught:
        update_job_status(str(job), "processing", {"progress": 0.5})
    assert caught.value.retryable
    assert len(project.requests) == 3
    assert_hidden(caught.value, project.secret_key)


def test_a_redirect_is_not_followed(project: LocalSupabase, job: UUID) -> None:
    project.faults.append(308)
    with pytest.raises(ReportRefused, match=r"Permanent Redirect. \(308\)"):
        update_job_status(str(job), "processing", {"progress": 0.5})
    assert len(project.requests) == 1


def test_a_row_that_stays_locked_is_no_lost_report(
    project: LocalSupabase, conn: psycopg.Connection, job: UUID
) -> None:
    """Hosted, authenticator waits 8 s for a lock; here it is less."""
    with conn.transaction():
        conn.execute("select from processing_jobs for update")
        project.database = psycopg.conninfo.make_conninfo(
            project.database, options="-c lock_timeout=100"
        )
        with pytest.raises(SupabaseUnavailable, match="lock timeout"):
            update_job_status(str(job), "processing", {"progress": 0.5})
    assert len(project.requests) == 3


def test_a_server_that_is_not_there(
    project: LocalSupabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ports.reserved() as port, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("SUPABASE_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(SupabaseUnavailable, match=r"ConnectError: .*SUPABASE_URL") as caught:
            update_job_status(str(uuid4()), "processing")
    assert_hidden(caught.value, project.secret_key)
    assert project.secret_key not in caplog.text


def test_the_key_is_in_no_log_and_no_message_that_repeats_it(
    project: LocalSupabase, job: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    key = project.secret_key
    with caplog.at_level(logging.DEBUG):
        update_job_status(str(job), "processing", {"progress": 0.5})
        with pytest.raises(ReportRefused) as caught:
            update_job_status(str(uuid4()), "processing")
    assert caplog.records
    assert key not in caplog.text
    assert_hidden(caught.value, key)
    echoed = status._refusal(f"no key {key}", f"4{key}", f"try {key}", key)  # noqa: SLF001
    assert_hidden(echoed, key)


def assert_hidden(error: BaseException, secret: str) -> None:
    """Neither the error nor what hangs on it shows the secret."""
    shown = "".join(traceback.format_exception(error))
    assert secret not in shown + repr(error) + repr(vars(error))
    assert error.__cause__ is None
    assert error.__context__ is None or isinstance(error.__context__, ValueError)


def test_errors_survive_pickling() -> None:
    for error in (
        InvalidReport("field: wrong"),
        ReportRefused("id: none", "23514", "Look."),
        SupabaseUnavailable("nobody"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.retryable) == (str(error), error.retryable)
        assert isinstance(copy, StatusError)


@pytest.mark.parametrize(
    ("function", "arguments", "code"),
    [
        ("report_progress", {"id": str(uuid4()), "percent": 5}, "PGRST202"),
        ("report_progress", {"progress": 0.5}, "PGRST202"),
        ("no_such_function", {}, "PGRST202"),
        ("report_progress", {"id": "7"}, "22P02"),
    ],
)
def test_what_other_calls_are_answered(
    project: LocalSupabase, function: str, arguments: Report, code: str
) -> None:
    """The stand-in, as PostgREST's documentation describes it."""
    with httpx.Client() as http:
        options = supabase.ClientOptions(httpx_client=http)
        client = supabase.create_client(project.url, project.secret_key, options)
        with pytest.raises(supabase.PostgrestAPIError) as caught:
            client.rpc(function, arguments).execute()
    assert caught.value.code == code


# The worker writes, too ---------------------------------------------------------------------------


@pytest.fixture
def second(database: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


def write_progress(conn: psycopg.Connection, job: UUID, progress: float) -> None:
    parameters = {"job_id": job, "attempt": 1, "progress": progress}
    conn.execute(ATTEMPTS["write_progress"], parameters)


def wait_for_lock(conn: psycopg.Connection) -> None:
    """Wait until a session waits for another one's lock."""
    query = "select exists (select from pg_locks where not granted)"
    deadline = time.monotonic() + 10
    while conn.execute(query).fetchone() != (True,):
        assert time.monotonic() < deadline, "nobody waits"


@pytest.mark.parametrize(("worker", "report"), [(0.6, 0.4), (0.4, 0.6)])
@pytest.mark.parametrize("first", ["worker", "report"])
def test_worker_and_report_at_the_same_time(
    conn: psycopg.Connection,
    second: psycopg.Connection,
    job: UUID,
    worker: float,
    report: float,
    first: str,
    database: str,
) -> None:
    def write(on: psycopg.Connection, who: str) -> None:
        if who == "worker":
            write_progress(on, job, worker)
        else:
            on.execute("select report_progress(%s, %s, 'note')", (job, report))

    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        psycopg.connect(database, autocommit=True) as watcher,
    ):
        with conn.transaction():
            write(conn, first)
            other = pool.submit(write, second, "report" if first == "worker" else "worker")
            wait_for_lock(watcher)
        other.result(timeout=60)
    assert read(conn) == ("processing", pytest.approx(0.6), "note")


def test_a_report_loses_to_the_end_of_the_job(
    conn: psycopg.Connection, second: psycopg.Connection, job: UUID, database: str
) -> None:
    with (
        concurrent.futures.ThreadPoolExecutor() as pool,
        psycopg.connect(database, autocommit=True) as watcher,
    ):
        with conn.transaction():
            conn.execute("update processing_jobs set result = '{}'")
            set_queue(conn, "status = 'succeeded'")
            late = pool.submit(second.execute, "select report_progress(%s, 0.5, 'late')", (job,))
            wait_for_lock(watcher)
        with pytest.raises(psycopg.errors.CheckViolation, match='status: is "completed"'):
            late.result(timeout=60)
    assert read(conn) == ("completed", 1.0, None)
