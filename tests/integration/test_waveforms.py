"""Waveforms, as players ask for them."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from starlette.testclient import TestClient

from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.settings import Settings
from jobs.sql import JOBS
from tests.integration.test_row_level_security import acting_as
from web.app import create_app
from web.auth import issue_token

PEAKS = [0, 17, 255]
MANY = """
with jobs as (
  insert into processing_jobs (user_id, file_path, status, completed_at)
  select %(user)s, 'a/b.mp3', 'cancelled', now() from generate_series(1, 20000) returning id)
insert into processing_job_waveforms (job_id, peaks) select id, array[1, 2, 3] from jobs
"""


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def job_id(conn: psycopg.Connection, user: UUID) -> UUID:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/b.mp3') returning id",
        (user,),
    ).fetchone()
    assert row is not None
    found: UUID = row[0]
    return found


@pytest.fixture
def waveform(conn: psycopg.Connection, job_id: UUID) -> None:
    conn.execute("insert into processing_job_waveforms values (%s, %s)", (job_id, PEAKS))
    conn.execute("update processing_jobs set audio_seconds = 12.5")


@pytest.fixture
def ask(api: TestClient, settings: Settings) -> Callable[[UUID, UUID], Any]:
    def get(user: UUID, job_id: UUID) -> Any:
        token = issue_token(settings, user, lifetime=60)
        return api.get(f"/jobs/{job_id}/waveform", headers={"Authorization": f"Bearer {token}"})

    return get


def test_there_is_none_before_the_audio_is_prepared(ask: Any, user: UUID, job_id: UUID) -> None:
    answer = ask(user, job_id)
    assert (answer.status_code, answer.json()) == (200, {"duration": None, "peaks": []})


@pytest.mark.usefixtures("waveform")
def test_owners_see_it_and_strangers_no_job(
    ask: Any, user: UUID, make_user: Callable[[], UUID], job_id: UUID
) -> None:
    assert ask(user, job_id).json() == {"duration": 12.5, "peaks": PEAKS}
    for stranger, job in ((make_user(), job_id), (user, uuid4())):
        refused = ask(stranger, job)
        assert (refused.status_code, refused.json()["code"]) == (404, "job_not_found")


@pytest.mark.usefixtures("waveform")
def test_the_database_decides_who_sees_it(
    conn: psycopg.Connection, user: UUID, make_user: Callable[[], UUID]
) -> None:
    select = "select peaks from processing_job_waveforms"
    with acting_as(conn, user):
        assert conn.execute(select).fetchall() == [(PEAKS,)]
    with acting_as(conn, make_user()):
        assert conn.execute(select).fetchall() == []
    with acting_as(conn, user, "service_role"):
        assert conn.execute(select).fetchall() == [(PEAKS,)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, "anon"):
        conn.execute(select)
    for write in (
        "update processing_job_waveforms set peaks = null",
        "delete from processing_job_waveforms",
    ):
        for role in ("authenticated", "service_role"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, role):
                conn.execute(write.encode())


@pytest.mark.parametrize("peaks", [[], [256], [-1], [0] * 2001, [None]])
def test_what_is_no_waveform(conn: psycopg.Connection, job_id: UUID, peaks: list[int]) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute(
            "insert into processing_job_waveforms values (%s, %s::smallint[])", (job_id, peaks)
        )


def test_it_is_found_by_its_key(
    postgres: EmbeddedPostgres, database: str, conn: psycopg.Connection, user: UUID
) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name), autocommit=True) as admin:
        admin.execute("set session_replication_role = replica")
        admin.execute(MANY.encode(), {"user": user})
        admin.execute("analyze processing_jobs, processing_job_waveforms")
    row = conn.execute("select job_id from processing_job_waveforms limit 1").fetchone()
    assert row is not None
    with acting_as(conn, user):
        explain = b"explain (analyze, buffers, format json) " + JOBS["waveform"]
        plan = conn.execute(explain, {"id": row[0]}).fetchone()
    assert plan is not None
    used = plan[0][0]["Plan"]
    assert used["Actual Rows"] == 1
    assert used["Shared Hit Blocks"] + used["Shared Read Blocks"] < 30, used
