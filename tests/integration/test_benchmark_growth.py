"""What ``benchmarks.growth`` measures is what pgscribe does."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from benchmarks.filling import fill
from benchmarks.growth import AT_REST, Sizes, by_streams
from benchmarks.growth_at_rest import STALL, copied, measure_at_rest, measure_upkeep
from benchmarks.web_process import web_process
from db.embedded import EmbeddedPostgres

ENDED = 300
LONGER_THAN_A_BEAT = 13.0  # seconds
RETENTION = (
    "select (select count(*) from procrastinate.procrastinate_jobs), (select pruned_until"
    " between now() - interval '31 days' and now() - interval '30 days'"
    " from pgscribe.retention where kind = 'queue_jobs')"
)


@pytest.fixture(scope="module")
def filled(postgres: EmbeddedPostgres) -> Iterator[str]:
    fill(postgres, "filled", ended=ENDED)
    yield "filled"
    postgres.drop_database("filled")


def test_days_that_are_over_are_added_up_as_by_workers(
    postgres: EmbeddedPostgres, filled: str
) -> None:
    with psycopg.connect(postgres.url(database=filled)) as conn:
        added_up, ended, is_closed = (
            conn.execute(
                "select (select sum(jobs) from pgscribe.daily_totals), (select count(*)"
                " from processing_jobs p where (p.completed_at at time zone 'UTC')::date"
                " between o.day - 14 and o.day - 1),"
                " o.day >= ((now() - interval '2 hours') at time zone 'UTC')::date"
                " from pgscribe.open_day o"
            ).fetchone()
            or ()
        )
    assert is_closed
    assert added_up == ended > ENDED // 2


def test_upkeep_and_streams_are_of_a_real_worker_and_web_server(
    postgres: EmbeddedPostgres, filled: str, tmp_path: Path
) -> None:
    sizes = Sizes(listeners=4, events=2, fan_outs=1)
    with (
        copied(postgres, filled, "streamed") as url,
        psycopg.connect(url, autocommit=True) as conn,
        web_process(url, tmp_path) as web,
    ):
        upkeep = asyncio.run(measure_upkeep(url, tmp_path, 1))
        assert conn.execute(RETENTION).fetchone() == (ENDED, True)
        streams = asyncio.run(by_streams(conn, web.port, sizes))
        changed = conn.execute(
            "select round(progress::numeric, 3)::float8 from processing_jobs"
            " where status = 'processing'"
        ).fetchall()
    assert min((upkeep | streams).values()) > 0
    assert changed == [(0.002,)] * 2  # each alone, and all at once


def test_processes_at_rest_cost_the_database_something_and_stand_in_after_the_stall(
    postgres: EmbeddedPostgres, filled: str, tmp_path: Path
) -> None:
    figures = measure_at_rest(postgres, [filled], tmp_path, seconds=LONGER_THAN_A_BEAT, kills=1)
    found = figures[filled]
    assert set(found) == set(AT_REST)
    assert min(found.values()) > 0
    assert found["recovery"] > STALL * 2 / 3  # the last beat was at most a third of it before
