"""What ``benchmarks.growth`` measures is what pgscribe does."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from benchmarks.filling import fill
from benchmarks.growth import Sizes, by_streams
from benchmarks.growth_at_rest import STALL, copied, measure_upkeep, rest, stand_by
from benchmarks.queue_rounds import take_overs, wait_until_ready
from benchmarks.web_process import web_process
from db.embedded import EmbeddedPostgres

ENDED = 300
PATIENCE = 60.0  # seconds
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


def test_what_a_process_at_rest_says_and_takes_is_counted(
    postgres: EmbeddedPostgres, filled: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        process = rest(postgres, filled, "web", tmp_path, stack)
        conn = stack.enter_context(psycopg.connect(postgres.url(), autocommit=True))
        deadline = time.monotonic() + PATIENCE
        while not all(so_far := process.so_far(conn)):  # a session tells what it took by and by
            assert time.monotonic() < deadline, so_far
            time.sleep(0.1)
    assert so_far[0] >= 3  # it listens, begins to watch the owner, and looks


def test_another_worker_takes_over_after_the_stall(postgres: EmbeddedPostgres, filled: str) -> None:
    with ExitStack() as stack:
        workers = stand_by(postgres, filled, 1, stack)
        wait_until_ready([workers])
        (seconds,) = take_overs([workers])
        with psycopg.connect(postgres.url(database=f"killed_{filled}")) as conn:
            attempts = conn.execute(
                "select attempt from processing_jobs where completed_at is null"
            ).fetchall()
    assert attempts == [(2,)]
    # The last beat was about a third of it before, at most: a beat may be late.
    assert STALL / 2 < seconds < PATIENCE
