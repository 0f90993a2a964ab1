"""What owners may have: the database says no, whoever inserts, and says what to do about it."""

import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.types.json import Jsonb
from starlette.testclient import TestClient

from jobs import database, retention, service
from jobs.cli import main
from jobs.database import Pool, as_user
from jobs.errors import LimitReached
from jobs.queue import OutcomeName, Queue
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

MakeUser = Callable[[], UUID]

OVER_LIMIT = "PT429"
INSERT = b"insert into processing_jobs (user_id, file_path) values (%s, 'a/b') returning id"
INSERT_MANY = (
    b"insert into processing_jobs (user_id, file_path) select %s, 'a/b' from generate_series(1, %s)"
)


def set_limits(conn: psycopg.Connection, user: UUID, **limits: object) -> None:
    names = ", ".join(f"{name} => %({name})s" for name in limits)
    conn.execute(f"select limit_owner(%(user)s, {names})".encode(), {"user": user, **limits})


@contextmanager
def refused(limit: str) -> Iterator[dict[str, float]]:
    """Expect a refusal; what it says for programs is there afterwards."""
    answer: dict[str, float] = {}
    with pytest.raises(psycopg.Error, match=f"^{limit}: the limit of ") as caught:
        yield answer
    assert caught.value.sqlstate == OVER_LIMIT
    assert caught.value.diag.column_name == limit
    assert caught.value.diag.message_hint
    answer |= json.loads(caught.value.diag.message_detail or "")


def queued(conn: psycopg.Connection, user: UUID) -> int:
    row = conn.execute(
        "select count(*) from processing_jobs where user_id = %s and status = 'queued'", (user,)
    ).fetchone()
    assert row is not None
    count: int = row[0]
    return count


def usage(conn: psycopg.Connection, user: UUID) -> tuple[float, int]:
    conn.execute("select pgscribe.add_up_usage()")
    row = conn.execute(
        "select audio_seconds, jobs from pgscribe.owner_usage where owner_id = %s", (user,)
    ).fetchone()
    return (0, 0) if row is None else (row[0], row[1])


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


class Runner:
    """Runs jobs to an end."""

    def __init__(self, queue: Queue, worker: int) -> None:
        self._queue = queue
        self._worker = worker

    async def run(self, outcome: OutcomeName, seconds: float | None, wanted: int = 1) -> None:
        jobs = (await self._queue.turn(self._worker, [], wanted, None)).jobs
        assert len(jobs) == wanted
        ended = [job.end(outcome, result={}, audio_seconds=seconds) for job in jobs]
        assert not (await self._queue.turn(self._worker, ended, 0, None)).busy


@pytest.fixture
async def runner(settings: Settings) -> AsyncIterator[Runner]:
    connect = functools.partial(database.connect, settings, name="test")
    queue = Queue(connect, max_attempts=3, stall_timeout=30)
    yield Runner(queue, await queue.register())
    await queue.close()


# Jobs that wait


@pytest.mark.parametrize("limit", [0, 1, 250])
def test_no_more_jobs_wait_than_may(conn: psycopg.Connection, user: UUID, limit: int) -> None:
    set_limits(conn, user, max_queued=limit)
    for _ in range(limit):
        conn.execute(INSERT, (user,))
    with refused("max_queued") as answer:
        conn.execute(INSERT, (user,))
    assert answer["limit"] == answer["current"] == limit
    assert answer["retry_after"] == 60
    assert queued(conn, user) == limit
    row = conn.execute("select count(*) from procrastinate.procrastinate_jobs").fetchone()
    assert row == (limit,)


def test_a_statement_inserts_all_or_nothing(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser
) -> None:
    set_limits(conn, user, max_queued=2000)
    conn.execute(INSERT_MANY, (user, 1500))
    with refused("max_queued") as answer:
        conn.execute(INSERT_MANY, (user, 501))
    assert answer["current"] == 1500
    conn.execute(INSERT_MANY, (user, 500))
    with refused("max_queued"):
        conn.execute(INSERT, (user,))
    conn.execute(INSERT, (make_user(),))  # others may


def test_ten_thousand_jobs_wait_by_default(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(INSERT_MANY, (user, 9_000))
    for _ in range(30):  # near the limit, where each one counts
        conn.execute(INSERT, (user,))
    conn.execute(INSERT_MANY, (user, 970))
    with refused("max_queued"):
        conn.execute(INSERT, (user,))


@pytest.mark.parametrize("place", ["'a/b', now() + interval '1 day'", "'a/b', null"])
def test_jobs_that_are_scheduled_wait_as_well(
    conn: psycopg.Connection, user: UUID, place: str
) -> None:
    set_limits(conn, user, max_queued=2)
    insert = f"insert into processing_jobs (user_id, file_path, scheduled_at) values (%s, {place})"
    conn.execute(insert.encode(), (user,))
    conn.execute(INSERT, (user,))
    with refused("max_queued"):
        conn.execute(insert.encode(), (user,))


def test_whoever_has_started_makes_room(conn: psycopg.Connection, user: UUID) -> None:
    set_limits(conn, user, max_queued=1)
    conn.execute(INSERT, (user,))
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    conn.execute(INSERT, (user,))
    with refused("max_queued"):
        conn.execute(INSERT, (user,))
    conn.execute("select cancel_processing_job(id) from processing_jobs where status = 'queued'")
    conn.execute(INSERT, (user,))


def test_what_was_counted_once_is_not_taken_for_now(conn: psycopg.Connection, user: UUID) -> None:
    """Most inserts don't count; a queue that was full and empties, and fills again, is counted."""
    set_limits(conn, user, max_queued=300)
    for _ in range(3):
        for _ in range(300):
            conn.execute(INSERT, (user,))
        with refused("max_queued"):
            conn.execute(INSERT, (user,))
        conn.execute("delete from processing_jobs")


def test_a_retry_waits_like_a_new_job(conn: psycopg.Connection, user: UUID) -> None:
    set_limits(conn, user, max_queued=150)
    conn.execute(INSERT_MANY, (user, 150))
    conn.execute("update processing_jobs set cancel_requested_at = now()")
    conn.execute(INSERT_MANY, (user, 100))
    retry = b"select retry_processing_job(id) from processing_jobs where status = 'cancelled' limit"
    conn.execute(retry + b" 50")
    with refused("max_queued"):
        conn.execute(retry + b" 1")
    assert queued(conn, user) == 150


def test_a_repeated_key_is_no_new_job(conn: psycopg.Connection, user: UUID) -> None:
    set_limits(conn, user, max_queued=1)
    again = (
        b"insert into processing_jobs (user_id, file_path, idempotency_key) values (%s, 'a', 'k')"
        b" on conflict (user_id, idempotency_key) where idempotency_key is not null do nothing"
    )
    assert [conn.execute(again, (user,)).rowcount for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(("limit", "batch"), [(5, 1), (130, 7), (250, 40)])
def test_the_limit_is_exact_however_many_insert(
    conn: psycopg.Connection, database: str, user: UUID, limit: int, batch: int
) -> None:
    set_limits(conn, user, max_queued=limit)
    refusals: list[str | None] = []

    def insert() -> None:
        with psycopg.connect(database, autocommit=True) as own:
            for _ in range(2 * limit // batch):
                try:
                    own.execute(INSERT_MANY, (user, batch))
                except psycopg.Error as exc:
                    refusals.append(exc.sqlstate)

    threads = [threading.Thread(target=insert) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert queued(conn, user) == limit // batch * batch
    assert set(refusals) == {OVER_LIMIT}


def test_an_open_transaction_at_the_limit_keeps_no_other_owner_waiting(
    conn: psycopg.Connection, database: str, user: UUID, make_user: MakeUser
) -> None:
    other = make_user()
    for owner in (user, other):
        set_limits(conn, owner, max_queued=3)
    with psycopg.connect(database) as own:
        own.execute(INSERT, (user,))
        conn.execute("set lock_timeout = '2s'")
        conn.execute(INSERT, (other,))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            conn.execute(INSERT, (user,))


def test_far_from_the_limit_nobody_waits(
    conn: psycopg.Connection, database: str, user: UUID
) -> None:
    with psycopg.connect(database) as own:
        own.execute(INSERT, (user,))
        conn.execute("set lock_timeout = '2s'")
        conn.execute(INSERT, (user,))


# Audio-seconds a month


@pytest.mark.anyio
async def test_the_month_ends_where_its_seconds_are_used(
    conn: psycopg.Connection, user: UUID, runner: Runner
) -> None:
    set_limits(conn, user, max_audio_seconds_per_month=100)
    conn.execute(INSERT, (user,))
    await runner.run("succeeded", 99.5)
    conn.execute(INSERT, (user,))
    await runner.run("succeeded", 0.5)
    conn.execute("delete from processing_jobs")
    with refused("max_audio_seconds_per_month") as answer:
        conn.execute(INSERT, (user,))
    assert (answer["limit"], answer["current"]) == (100, 100)
    now = datetime.now(UTC)
    month = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = month.replace(year=now.year + now.month // 12, month=now.month % 12 + 1)
    assert abs(answer["retry_after"] - (end - now).total_seconds()) < 60
    conn.execute("update pgscribe.usage_news set month = month - interval '1 month'")
    conn.execute(INSERT, (user,))


def test_what_waits_counts_by_its_estimate(conn: psycopg.Connection, user: UUID) -> None:
    set_limits(conn, user, max_audio_seconds_per_month=100)
    conn.execute(INSERT, (user,))  # 60 s, as long as nobody knows
    conn.execute(INSERT, (user,))
    with refused("max_audio_seconds_per_month") as answer:
        conn.execute(INSERT, (user,))
    assert answer["current"] == 120
    set_limits(conn, user, max_audio_seconds_per_month=float("inf"))
    conn.execute(INSERT, (user,))


@pytest.mark.anyio
async def test_completed_jobs_are_counted_in_batches(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, runner: Runner, pool: Pool
) -> None:
    other = make_user()
    conn.execute(INSERT_MANY, (user, 3))
    conn.execute(INSERT_MANY, (other, 2))
    await runner.run("succeeded", 10, wanted=5)
    await retention.add_up_usage(pool)
    conn.execute(INSERT, (user,))
    await runner.run("succeeded", 5)
    assert usage(conn, user) == (35, 4)
    assert usage(conn, other) == (20, 2)
    conn.execute("delete from processing_jobs")
    assert usage(conn, user) == (35, 4)


def add_chunk(conn: psycopg.Connection, index: int, *, done: bool) -> None:
    conn.execute(
        "insert into processing_job_chunks (job_id, index, start_seconds, end_seconds, result)"
        " select id, %s, %s, %s, %s from processing_jobs",
        (index, index * 30, index * 30 + 30, Jsonb({"text": "x"}) if done else None),
    )


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
async def test_each_second_of_a_job_is_counted_once(
    conn: psycopg.Connection, user: UUID, runner: Runner, outcome: OutcomeName
) -> None:
    conn.execute(INSERT, (user,))
    add_chunk(conn, 0, done=True)
    add_chunk(conn, 1, done=False)
    await runner.run(outcome, 60)
    assert usage(conn, user) == (30, 1)
    for _ in range(2):
        conn.execute("select retry_processing_job(id) from processing_jobs")
        await runner.run(outcome, 60)
        assert usage(conn, user) == (30, 1)
    conn.execute("select retry_processing_job(id) from processing_jobs")
    await runner.run("succeeded", 60)
    assert usage(conn, user) == (60, 1)


@pytest.mark.anyio
async def test_a_job_that_transcribed_nothing_counts_for_nothing(
    conn: psycopg.Connection, user: UUID, runner: Runner
) -> None:
    conn.execute(INSERT, (user,))
    await runner.run("failed", 60)
    assert usage(conn, user) == (0, 0)


@pytest.mark.parametrize("status", ["doing", "todo"])
def test_deleting_a_job_before_its_end_does_not_hide_what_it_took(
    conn: psycopg.Connection, user: UUID, status: str
) -> None:
    conn.execute(INSERT, (user,))
    for step in ("doing", status):
        conn.execute("update procrastinate.procrastinate_jobs set status = %s", (step,))
    add_chunk(conn, 0, done=True)
    conn.execute("delete from processing_jobs")
    assert usage(conn, user) == (30, 1)


# What people and programs are told


@pytest.mark.anyio
async def test_the_service_says_which_limit(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    set_limits(conn, user, max_queued=1)
    claims = {"sub": str(user), "role": "authenticated"}
    async with as_user(pool, claims) as own:
        job_id = await service.submit(own, f"{user}/a", {})
        await service.cancel(own, job_id)
        await service.submit(own, f"{user}/b", {})
    with pytest.raises(LimitReached, match=r"max_queued: .* limit of 1 .* Wait ") as caught:
        async with as_user(pool, claims) as own:
            await service.submit(own, f"{user}/c", {})
    assert (caught.value.limit, caught.value.field) == ("max_queued", "max_queued")
    assert caught.value.retry_after == 60
    with pytest.raises(LimitReached, match="max_queued"):
        async with as_user(pool, claims) as own:
            await service.retry(own, job_id)


def test_the_api_answers_429(conn: psycopg.Connection, user: UUID, settings: Settings) -> None:
    set_limits(conn, user, max_queued=0)
    headers = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    with TestClient(create_app(settings)) as client:
        answer = client.post("/process", json={"filePath": f"{user}/a"}, headers=headers)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "60"
    assert (answer.json()["code"], answer.json()["field"]) == ("limit_reached", "max_queued")


@pytest.mark.anyio
async def test_owners_see_their_limits(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, pool: Pool, runner: Runner
) -> None:
    set_limits(conn, user, max_audio_seconds_per_month=1000, max_file_bytes=5)
    for owner in (user, make_user()):
        conn.execute(INSERT_MANY, (owner, 3))
    conn.execute("select pause_owner(id) from auth.users where id <> %s", (user,))
    await runner.run("succeeded", 12.5)
    async with as_user(pool, {"sub": str(user), "role": "authenticated"}) as own:
        limits = {
            limit.limit: (limit.maximum, limit.current) for limit in await service.limits(own)
        }
    assert limits == {
        "max_queued": (10_000, 2),
        "max_running": (100, 0),
        "max_audio_seconds_per_month": (1000, 12.5),
        "max_file_bytes": (5, None),
        "max_duration": (None, None),
    }


@pytest.mark.parametrize("role", ["anon", "service_role"])
def test_nobody_else_asks_for_limits(conn: psycopg.Connection, role: str) -> None:
    conn.execute("select set_config('role', %s, false)", (role,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select * from my_limits()")


@pytest.mark.parametrize("function", ["limit_owner(gen_random_uuid())", "limit_owners()"])
@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_owners_set_no_limits(conn: psycopg.Connection, role: str, function: str) -> None:
    conn.execute("select set_config('role', %s, false)", (role,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute(f"select {function}".encode())


def test_operators_set_limits(
    conn: psycopg.Connection, database: str, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", database)

    def limit(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["limit", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.output

    def read() -> list[Any]:
        return conn.execute(
            "select max_queued, max_audio_seconds_per_month, max_file_bytes, max_duration"
            " from pgscribe.default_limits union all select max_queued,"
            " max_audio_seconds_per_month, max_file_bytes, max_duration from pgscribe.owner_limits"
        ).fetchall()

    assert "max_queued                   7\n" in limit(
        user, "--max-queued", 7, "--max-duration", 3.5
    )
    assert read() == [(10_000, None, None, None), (7, None, None, 3.5)]
    limit("--default", "--max-audio-seconds-per-month", 60, "--max-file-bytes", 9)
    limit(user, "--max-running", 3, "--max-audio-seconds-per-month", "inf")
    set_now = [(10_000, 60, 9, None), (None, float("inf"), None, None)]
    assert read() == set_now
    shown = [line.split() for line in limit(user).splitlines()]
    assert ["max_running", "3"] in shown
    assert ["max_audio_seconds_per_month", "no", "limit"] in shown
    assert ["max_file_bytes", "9", "default"] in shown
    assert {"limit": "max_duration", "value": None, "is_own": True} in json.loads(
        limit("--default", "--json")
    )
    in_json = json.loads(limit(user, "--json"), parse_constant=pytest.fail)
    assert {"limit": "max_audio_seconds_per_month", "value": None, "is_own": True} in in_json
    assert "no user" in limit("00000000-0000-4000-8000-00000000000f", "--max-running", 1)
    for wrong in (
        [],
        [user, "--default"],
        ["--default", "--weight", 2],
        [user, "--max-queued=-1"],
        [user, "--max-queued", 1, "--reset"],
        [user, "--max-queued", 10**12],
        [user, "--max-duration", "nan"],
        [user, "--weight", 1e300],
    ):
        assert "Usage:" in limit(*wrong)
    assert read() == set_now, "changed by what only shows limits or is refused"
    assert ["weight", "0.5"] in [line.split() for line in limit(user, "--weight", 0.5).splitlines()]
    limit(user, "--reset")
    assert read()[1] == (None, None, None, None)


def test_the_limits_of_the_version_before_can_still_be_set(
    conn: psycopg.Connection, user: UUID
) -> None:
    conn.execute("select public.limit_owner(%s, 5, 2::real)", (user,))
    row = conn.execute("select max_running, weight from pgscribe.owner_limits").fetchone()
    assert row == (5, 2)


# URLs

GOOD = [
    "https://example.org/a.mp3",
    "http://x:8080",
    "https://[2001:db8::1]:1/a?b=c#d",
    "https://ü.de/@a",
]
BAD = [
    "", "ftp://x/a", "https://", "https:///a", "https://u@x/a", "https://u:p@x/a", "https://x/a b",
    "https://x/a\n", "https://x\\@y/a", "HTTPS://x", "//x/a", "https://x/" + "a" * 2048, "file:///a",
    "https://?x", "https://[x]/", "\thttps://x",
]  # fmt: skip


@pytest.mark.parametrize("column", ["audio_url", "webhook_url"])
def test_urls_are_checked(conn: psycopg.Connection, user: UUID, column: str) -> None:
    insert = f"insert into processing_jobs (user_id, file_path, {column}) values (%s, 'a/b', %s)"
    for url in GOOD:
        conn.execute(insert.encode(), (user, url))
    for url in BAD:
        with pytest.raises(psycopg.errors.CheckViolation, match=f"^{column}: ") as caught:
            conn.execute(insert.encode(), (user, url))
        assert caught.value.diag.column_name == column
    change = f"update processing_jobs set {column} = 'https://other'"
    with pytest.raises(psycopg.errors.CheckViolation, match=f"^{column}: never changes"):
        conn.execute(change.encode())
