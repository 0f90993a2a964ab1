"""What an insert may say: the database refuses the rest at once and names the field."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from db.embedded import EmbeddedPostgres
from modal_functions.errors import TranscriptionError
from modal_functions.transcript import TranscriptionOptions

INSERT = b"insert into processing_jobs (user_id, file_path) values (%s, %s) returning id"


@pytest.fixture(scope="module")
def shared(postgres: EmbeddedPostgres, template: str) -> Iterator[psycopg.Connection]:
    """One database for all of this module: no test here needs a commit."""
    postgres.create_database("input_checks", template=template)
    with psycopg.connect(postgres.url(database="input_checks"), autocommit=True) as connection:
        yield connection
    postgres.drop_database("input_checks")


@pytest.fixture
def conn(shared: psycopg.Connection) -> Iterator[psycopg.Connection]:
    with shared.transaction(force_rollback=True):
        yield shared


def deferred(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from procrastinate.procrastinate_jobs").fetchone()
    assert row is not None
    count: int = row[0]
    return count


@pytest.mark.parametrize(
    "file_path",
    [
        "", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\\b", "a\nb", "https://x/y",
        "/".join(["x" * 200] * 6), "a/" + "x" * 256, "a/" + "ä" * 128 + "/b",
    ],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(
    conn: psycopg.Connection, user: UUID, file_path: str
) -> None:
    with (
        pytest.raises(psycopg.errors.CheckViolation, match=r"^file_path: ") as caught,
        conn.transaction(),
    ):
        conn.execute(INSERT, (user, file_path))
    assert caught.value.diag.column_name == "file_path"
    assert caught.value.diag.message_hint
    assert deferred(conn) == 0


@pytest.mark.parametrize("file_path", ["a/" + "x" * 255, "ä" * 127 + "/" + "x" * 255 + "/b"])
def test_long_paths_that_a_file_system_takes_are_taken(
    conn: psycopg.Connection, user: UUID, file_path: str
) -> None:
    assert conn.execute(INSERT, (user, file_path)).fetchone()


@pytest.mark.parametrize(
    "scheduled_at", ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01", "1999-12-31"]
)
def test_times_that_no_worker_could_read_are_refused(
    conn: psycopg.Connection, user: UUID, scheduled_at: str
) -> None:
    query = "insert into processing_jobs (user_id, file_path, scheduled_at) values (%s, 'a/b', %s)"
    with pytest.raises(psycopg.errors.CheckViolation, match=r"^scheduled_at: "), conn.transaction():
        conn.execute(query, (user, scheduled_at))
    assert deferred(conn) == 0


@pytest.mark.parametrize(
    "values",
    [
        {"status": "completed"},
        {"status": "processing"},
        {"job_id": "7"},
        {"progress": 0.5},
        {"attempt": 1},
        {"error": "x"},
        {"audio_seconds": 1},
        {"result": Jsonb({"text": "faked"})},
    ],
)
def test_not_even_postgres_inserts_what_is_derived(
    conn: psycopg.Connection, user: UUID, values: dict[str, object]
) -> None:
    (column,) = values
    query = f"insert into processing_jobs (user_id, file_path, {column}) values (%s, 'a/b', %s)"
    with pytest.raises(psycopg.errors.CheckViolation, match="only pgscribe writes status"):
        conn.execute(query.encode(), (user, values[column]))


OPTIONS: list[tuple[object, str | None]] = [
    ({}, None),
    ({"model": "large-v3", "language": "de", "task": "translate"}, None),
    ({"model": "my-models/fine.tuned_1"}, None),
    ({"word_timestamps": True, "preprocessing": False, "initial_prompt": "x" * 2000}, None),
    ({"temperature": 0}, None),
    ({"temperature": 0.2}, None),
    ({"temperature": 1}, None),
    ({"language": None, "initial_prompt": None, "temperature": None}, None),
    ([], "options"),
    ("base", "options"),
    (None, "options"),
    ({"modle": "base"}, "options.modle"),
    ({"": 1}, "options."),
    ({"model": None}, "options.model"),
    ({"model": ""}, "options.model"),
    ({"model": "../secret"}, "options.model"),
    ({"model": "a..b"}, "options.model"),
    ({"model": "/etc/passwd"}, "options.model"),
    ({"model": "a/"}, "options.model"),
    ({"model": "base\n"}, "options.model"),
    ({"model": "x" * 201}, "options.model"),
    ({"model": 1}, "options.model"),
    ({"language": "english"}, "options.language"),
    ({"language": "EN"}, "options.language"),
    ({"language": "en\n"}, "options.language"),
    ({"language": 1}, "options.language"),
    ({"task": "summarize"}, "options.task"),
    ({"task": None}, "options.task"),
    ({"word_timestamps": "yes"}, "options.word_timestamps"),
    ({"word_timestamps": 1}, "options.word_timestamps"),
    ({"preprocessing": None}, "options.preprocessing"),
    ({"initial_prompt": "x" * 2001}, "options.initial_prompt"),
    ({"initial_prompt": 1}, "options.initial_prompt"),
    ({"temperature": 1.01}, "options.temperature"),
    ({"temperature": -1}, "options.temperature"),
    ({"temperature": True}, "options.temperature"),
    ({"temperature": "0"}, "options.temperature"),
]


@pytest.mark.parametrize(("options", "field"), OPTIONS)
def test_the_database_checks_options_and_names_the_field(
    conn: psycopg.Connection, user: UUID, options: object, field: str | None
) -> None:
    query = "insert into processing_jobs (user_id, file_path, options) values (%s, 'a/b', %s)"
    if field is None:
        assert conn.execute(query, (user, Jsonb(options))).rowcount == 1
        return
    with pytest.raises(psycopg.errors.CheckViolation) as caught, conn.transaction():
        conn.execute(query, (user, Jsonb(options)))
    assert caught.value.diag.column_name == field
    assert (caught.value.diag.message_primary or "").startswith(f"{field}: ")
    assert caught.value.diag.message_hint
    assert deferred(conn) == 0


@pytest.mark.parametrize(("options", "field"), OPTIONS)
def test_the_engines_check_options_alike(options: Any, field: str | None) -> None:
    """Who calls the functions without the database meets the same limits."""
    if field is None:
        accepted = TranscriptionOptions.from_dict(options).to_dict()
        assert {name: accepted[name] for name in options} == options
        return
    with pytest.raises(TranscriptionError) as caught:
        TranscriptionOptions.from_dict(options)
    assert str(caught.value).startswith(field)


TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
INSERT_TRACED = (
    b"insert into processing_jobs (user_id, file_path, traceparent) values (%s, 'a/b.mp3', %s)"
    b" returning id"
)


@pytest.mark.parametrize(
    "traceparent",
    [
        "", "nonsense", TRACEPARENT[:-1], f"{TRACEPARENT}-00", f"ff{TRACEPARENT[2:]}",
        TRACEPARENT.upper(), f"{TRACEPARENT}\n", f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_is_refused(
    conn: psycopg.Connection, user: UUID, traceparent: str
) -> None:
    with (
        pytest.raises(psycopg.errors.CheckViolation, match=r"^traceparent: must be 00-") as caught,
        conn.transaction(),
    ):
        conn.execute(INSERT_TRACED, (user, traceparent))
    assert caught.value.diag.column_name == "traceparent"
    assert "leave it out" in str(caught.value.diag.message_hint)
    assert deferred(conn) == 0


def test_users_may_say_whose_trace_a_job_belongs_to_and_not_change_it(
    conn: psycopg.Connection, user: UUID
) -> None:
    conn.execute("select set_config('request.jwt.claims', %s, true)", (f'{{"sub": "{user}"}}',))
    conn.execute("set local role authenticated")
    row = conn.execute(
        "insert into processing_jobs (file_path, traceparent) values (%s, %s)"
        " returning id, traceparent", (f"{user}/a.mp3", TRACEPARENT),
    ).fetchone()  # fmt: skip
    assert row is not None
    assert row[1] == TRACEPARENT
    change = b"update processing_jobs set traceparent = null where id = %s"
    with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
        conn.execute(change, row[:1])
    conn.execute("reset role")
    with (
        pytest.raises(psycopg.errors.CheckViolation, match="traceparent: never"),
        conn.transaction(),
    ):
        conn.execute(change, row[:1])
