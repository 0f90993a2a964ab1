"""Operators: who is one, what they see, and what they do to many jobs at a time."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from starlette.testclient import TestClient

from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import database, keys, operate, retention
from jobs.cli import main
from jobs.errors import InvalidInput
from jobs.queue import Queue
from jobs.scopes import USUAL_SCOPES, Scope
from jobs.settings import Settings
from tests.doc_blocks import Block, runs
from web.app import create_app
from web.auth import issue_token

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]
Headers = dict[str, str]

INSERT = (
    b"insert into processing_jobs (user_id, file_path)"
    b" select %s, 'a/b' from generate_series(1, %s) returning id"
)
FUNCTIONS = [
    "operator_overview()",
    "operator_overview(hours => 0)",
    "operator_jobs()",
    "operator_cancel_jobs()",
    "operator_retry_jobs()",
    "operator_pause_queue()",
    "operator_resume_queue()",
    "operator_pause_owner(gen_random_uuid())",
    "operator_resume_owner(gen_random_uuid())",
]
THE_GUIDES_SQL = runs("operator")
ACTIONS = [
    "/operate/queue/pause",
    "/operate/queue/resume",
    "/operate/owners/{user}/pause",
    "/operate/owners/{user}/resume",
]


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def operator(conn: psycopg.Connection, make_user: MakeUser) -> UUID:
    user_id = make_user()
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user_id,))
    return user_id


@pytest.fixture
def token(settings: Settings) -> Callable[[UUID], Headers]:
    def make(user_id: UUID) -> Headers:
        return {"Authorization": f"Bearer {issue_token(settings, user_id, lifetime=600)}"}

    return make


@pytest.fixture
def ask(
    api: TestClient, operator: UUID, token: Callable[[UUID], Headers]
) -> Callable[..., dict[str, Any]]:
    """Ask as the operator: a path and, to post it, a body."""

    def ask_for(path: str, body: object = None, **query: object) -> dict[str, Any]:
        method = "GET" if body is None else "POST"
        response = api.request(method, path, json=body, params=query, headers=token(operator))  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        if path.startswith("/operate/jobs/"):
            assert datetime.fromisoformat(answer.pop("at")).tzinfo
        return answer

    return ask_for


@contextmanager
def acting_as(
    conn: psycopg.Connection, user: UUID, role: str = "authenticated", **claims: str
) -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, json.dumps({"sub": str(user), "role": role, **claims})),
        )
        yield


def insert(conn: psycopg.Connection, user: UUID, count: int = 1) -> list[UUID]:
    return [row[0] for row in conn.execute(INSERT, (user, count))]


def set_status(conn: psycopg.Connection, ids: list[UUID], *statuses: str) -> None:
    for status in statuses:
        conn.execute(
            "update procrastinate.procrastinate_jobs"
            " set status = %s::procrastinate.procrastinate_job_status"
            " where id in (select job_id::bigint from processing_jobs where id = any (%s))",
            (status, ids),
        )


def make_in_all_states(conn: psycopg.Connection, user: UUID) -> dict[str, UUID]:
    """Make a job in each state."""
    names = ("queued", "processing", "completed", "failed", "cancelled")
    jobs = dict(zip(names, insert(conn, user, 5), strict=True))
    set_status(conn, [jobs["processing"], jobs["failed"], jobs["completed"]], "doing")
    conn.execute("update processing_jobs set result = '{}' where id = %s", (jobs["completed"],))
    set_status(conn, [jobs["completed"]], "succeeded")
    set_status(conn, [jobs["failed"]], "failed")
    set_status(conn, [jobs["cancelled"]], "cancelled")
    return jobs


def statuses(conn: psycopg.Connection) -> dict[UUID, str]:
    return dict(conn.execute("select id, status from processing_jobs").fetchall())


def count(conn: psycopg.Connection, condition: str) -> int:
    row = conn.execute(
        f"select count(*) from processing_jobs where {condition}".encode()
    ).fetchone()
    assert row is not None
    number: int = row[0]
    return number


# Who -------------------------------------------------------------------------------------------


def test_the_database_says_at_each_request_who_is_an_operator(
    api: TestClient, conn: psycopg.Connection, user: UUID, token: Callable[[UUID], Headers]
) -> None:
    headers = token(user)

    def me() -> tuple[bool, int]:
        seen = api.get("/operate/overview", headers=headers)
        answer = api.get("/me", headers=headers).json()
        assert (answer["user_id"], answer["email"]) == (str(user), None)
        return answer["operator"], seen.status_code

    assert me() == (False, 403)
    refused = api.get("/operate/overview", headers=headers).json()
    assert refused["code"] == "not_an_operator"
    assert "pgscribe operators add" in refused["detail"]
    conn.execute("insert into pgscribe.operators values (%s)", (user,))
    assert me() == (True, 200)
    conn.execute(
        "update auth.users set banned_until = now() + interval '1 day' where id = %s", (user,)
    )
    assert me() == (False, 403)
    conn.execute("update auth.users set banned_until = null where id = %s", (user,))
    assert me() == (True, 200)
    conn.execute("delete from pgscribe.operators where user_id = %s", (user,))
    assert me() == (False, 403), "with the same token"


def test_me_has_the_tokens_address(api: TestClient, settings: Settings, user: UUID) -> None:
    signed = issue_token(settings, user, lifetime=60, email="anna@example.org")
    answer = api.get("/me", headers={"Authorization": f"Bearer {signed}"})
    assert answer.json()["email"] == "anna@example.org"


def test_a_key_operates_only_if_it_was_made_for_that(
    api: TestClient, conn: psycopg.Connection, operator: UUID, user: UUID
) -> None:
    def ask(key_of: UUID | None, stated: UUID, scopes: frozenset[Scope]) -> tuple[int, str, bool]:
        _, key = keys.create(conn, "test", user_id=key_of, scopes=scopes)
        headers = {"Authorization": f"Bearer {key}", "Pgscribe-User": str(stated)}
        answer = api.get("/operate/jobs", headers=headers)
        is_operator = api.get("/me", headers=headers).json()["operator"]
        return answer.status_code, answer.json().get("code", ""), is_operator

    for_that = frozenset({Scope.OPERATE})
    assert Scope.OPERATE not in USUAL_SCOPES
    assert ask(operator, operator, for_that) == (200, "", True)
    assert ask(None, operator, for_that) == (200, "", True)
    assert ask(operator, operator, USUAL_SCOPES) == (403, "insufficient_scope", False)
    assert ask(user, user, for_that) == (403, "not_an_operator", False)
    assert ask(None, user, for_that) == (403, "not_an_operator", False)


def test_the_database_looks_at_the_key_as_well(conn: psycopg.Connection, operator: UUID) -> None:
    usual, _ = keys.create(conn, "usual", user_id=operator, scopes=USUAL_SCOPES)
    special, _ = keys.create(conn, "special", user_id=operator, scopes={Scope.OPERATE})

    def operates(key: str) -> bool:
        with acting_as(conn, operator, pgscribe_key=key):
            row = conn.execute("select is_operator()").fetchone()
        assert row is not None
        answer: bool = row[0]
        return answer

    assert operates(str(special.id))
    assert not operates(str(usual.id))
    assert not operates("no key")
    keys.revoke(conn, special.id)
    assert not operates(str(special.id))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("role", ["authenticated", "anon"])
def test_others_are_refused_by_the_database(
    conn: psycopg.Connection, user: UUID, function: str, role: str
) -> None:
    insert(conn, user)
    with (
        pytest.raises(psycopg.errors.InsufficientPrivilege) as caught,
        acting_as(conn, user, role),
    ):
        conn.execute(f"select {function}".encode())
    if role == "authenticated":
        assert "pgscribe operators add" in (caught.value.diag.message_hint or "")
    assert count(conn, "status = 'queued'") == 1


def test_who_sees_all_anyway_operates(conn: psycopg.Connection, user: UUID) -> None:
    """In the SQL editor, and with a secret key on a server."""
    (job,) = insert(conn, user)
    for role, name in (("service_role", "cancel"), ("postgres", "retry")):
        with conn.transaction():
            if role != "postgres":
                conn.execute("select set_config('role', %s, true)", (role,))
            assert len(conn.execute("select * from operator_jobs()").fetchall()) == 1
            row = conn.execute(
                f"select changed from operator_{name}_jobs(array[%s])".encode(), (job,)
            ).fetchone()
            assert row == (1,)
            assert conn.execute("select operator_overview() is null").fetchone() == (False,)
            assert conn.execute("select count(*) from operator_deliveries()").fetchone() == (0,)
    assert count(conn, "status = 'queued'") == 1


def test_no_policy_is_widened_and_no_table_open(
    conn: psycopg.Connection, operator: UUID, user: UUID
) -> None:
    insert(conn, user)
    with acting_as(conn, operator):
        assert conn.execute("select id from processing_jobs").fetchall() == []
        assert conn.execute("update processing_jobs set cancel_requested_at = now()").rowcount == 0
    for table in ("operators", "daily_totals", "open_day"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, operator):
            conn.execute(f"select * from pgscribe.{table}".encode())


# What they see ---------------------------------------------------------------------------------


class History:
    """Jobs that have ended, at times of one's choosing."""

    def __init__(self, admin: psycopg.Connection) -> None:
        self._admin = admin
        admin.execute("set session_replication_role = replica")  # no trigger says what time it is
        row = admin.execute("select now()").fetchone()
        assert row is not None
        self.now: datetime = row[0]

    def add(
        self,
        user: UUID,
        status: str,
        minutes_ago: float,
        *,
        waited: float = 10,
        ran: float | None = 5,
        seconds: float = 100,
        attempt: int = 1,
        code: str | None = None,
        usage: dict[str, float] | None = None,
    ) -> UUID:
        ended = self.now - timedelta(minutes=minutes_ago)
        started = None if ran is None else ended - timedelta(seconds=ran)
        job_id = uuid4()
        queue_status = {"completed": "succeeded"}.get(status, status)
        self._admin.execute(
            "with q as (insert into procrastinate.procrastinate_jobs"
            "   (queue_name, task_name, args, status)"
            "   values ('transcription', 'transcribe',"
            "   jsonb_build_object('processing_job_id', %(id)s::uuid),"
            "   %(queue_status)s::procrastinate.procrastinate_job_status) returning id)"
            " insert into public.processing_jobs (id, user_id, file_path, job_id, status, attempt,"
            "   created_at, started_at, completed_at, audio_seconds, estimated_seconds, error_code,"
            "   error, result, usage)"
            " select %(id)s, %(user)s, 'a/b', q.id::text, %(status)s, %(attempt)s, %(created)s,"
            "   %(started)s, %(ended)s, %(seconds)s, 60, %(code)s, %(error)s, %(result)s, %(usage)s"
            " from q",
            {
                "id": job_id,
                "user": user,
                "queue_status": queue_status,
                "status": status,
                "attempt": attempt,
                "created": (started or ended) - timedelta(seconds=waited),
                "started": started,
                "ended": ended,
                "seconds": seconds,
                "code": code,
                "error": code and f"{code} {minutes_ago} minutes ago",
                "result": Jsonb({"text": "what was said"}) if status == "completed" else None,
                "usage": usage and Jsonb(usage),
            },
        )
        return job_id


@pytest.fixture
def history(postgres: EmbeddedPostgres, database: str) -> Iterator[History]:
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    url = postgres.url(user=SUPERUSER, database=name)
    with psycopg.connect(url, autocommit=True) as admin:
        yield History(admin)


@pytest.fixture
async def queue(settings: Settings) -> AsyncIterator[Queue]:
    async def connect() -> database.Connection:
        return await database.connect(settings, name="test")

    queue = Queue(connect, max_attempts=3, stall_timeout=30)
    yield queue
    await queue.close()


def test_an_empty_site(ask: Callable[..., dict[str, Any]]) -> None:
    seen = ask("/operate/overview")
    assert seen["queue"] == {
        "paused_at": None,
        "states": {"queued": 0, "scheduled": 0, "processing": 0},
        "oldest_queued_seconds": None,
        "queued_audio_seconds": 0,
    }
    assert seen["ended"] == {"completed": 0, "failed": 0, "cancelled": 0, "audio_seconds": 0}
    assert seen["times"] == {
        "jobs": 0,
        "wait": {"p50": None, "p95": None},
        "run": {"p50": None, "p95": None},
        "real_time_factor": {"p50": None},
    }
    assert (seen["failures"], seen["workers"], seen["owners"]) == ([], [], [])
    assert len(seen["costs"]) == 14
    assert {day["jobs"] for day in seen["costs"]} == {0}


async def test_the_overview_in_numbers(
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    history: History,
    queue: Queue,
    make_user: MakeUser,
) -> None:
    anna, berta, clara = make_user(), make_user(), make_user()
    # Jobs that run, wait and are to start later.
    insert(conn, anna, 3)
    conn.execute(
        "insert into processing_jobs (user_id, file_path, scheduled_at)"
        " values (%s, 'a/b', now() + interval '1 h')",
        (anna,),
    )
    insert(conn, berta, 1)
    busy, dead = await queue.register(), await queue.register()
    running = (await queue.turn(busy, [], 2, None)).jobs
    conn.execute(
        "update procrastinate.procrastinate_workers"
        " set last_heartbeat = now() - interval '31 s' where id = %s",
        (dead,),
    )
    conn.execute("select limit_owner(%s, max_running => 7, weight => 2)", (berta,))
    conn.execute("select pause_owner(%s)", (clara,))
    conn.execute("select pause_queue()")
    # Jobs that have ended.
    for minutes, waited, ran, seconds in ((10, 10, 5, 100), (20, 20, 10, 400), (300, 90, 20, 100)):
        history.add(anna, "completed", minutes, waited=waited, ran=ran, seconds=seconds)
    history.add(berta, "completed", 30, waited=500, ran=40, seconds=200, attempt=2)
    history.add(berta, "failed", 40, waited=30, ran=1, code="timeout")
    history.add(anna, "failed", 15, waited=40, ran=1, code="timeout")
    history.add(anna, "failed", 15, waited=50, ran=1, code="no_speech")
    history.add(berta, "cancelled", 50, ran=None)
    history.add(berta, "completed", 24 * 60 + 31, seconds=9999)  # before the window

    seen = ask("/operate/overview")

    assert seen["hours"] == 24
    now, since = (datetime.fromisoformat(seen[name]) for name in ("now", "since"))
    assert timedelta() <= now - timedelta(hours=24) - since < timedelta(minutes=30)
    queue_now = seen["queue"]
    assert queue_now["states"] == {"queued": 2, "scheduled": 1, "processing": 2}
    assert queue_now["queued_audio_seconds"] == 120, "estimated as 60 each"
    assert 0 < queue_now["oldest_queued_seconds"] < 60
    assert queue_now["paused_at"] is not None
    assert seen["ended"] == {"completed": 4, "failed": 3, "cancelled": 1, "audio_seconds": 800}
    assert seen["bucket_seconds"] == 1800
    assert_throughput(seen, history.now)
    assert seen["times"] == {
        "jobs": 8,
        # 10, 20, 30, 40, 50, 90: neither the one that had two attempts nor the one that had none
        "wait": {"p50": 35, "p95": 80},
        "run": {"p50": 15, "p95": pytest.approx(37)},  # 5, 10, 20, 40
        "real_time_factor": {"p50": 12.5},  # 5, 5, 20, 40
    }
    assert [(f["error_code"], f["jobs"], f["example"]) for f in seen["failures"]] == [
        ("timeout", 2, "timeout 15 minutes ago"),
        ("no_speech", 1, "no_speech 15 minutes ago"),
    ]
    workers = {worker["id"]: worker for worker in seen["workers"]}
    assert {number: (w["alive"], w["running"]) for number, w in workers.items()} == {
        busy: (True, 2),
        dead: (False, 0),
    }
    assert {held["job_id"] for held in workers[busy]["holds"]} == {
        str(job.attempt.job_id) for job in running if job.attempt
    }
    held = workers[busy]["holds"][0]
    assert (held["attempt"], held["progress"], held["file_path"]) == (1, 0, "a/b")
    assert held["email"] == f"{held['owner_id']}@example.org"
    assert_owners(seen["owners"], anna, berta, clara)


def assert_throughput(seen: dict[str, Any], now: datetime) -> None:
    buckets = {datetime.fromisoformat(bucket.pop("at")): bucket for bucket in seen["throughput"]}
    assert 24 <= len(buckets) <= 61
    starts = list(buckets)
    step = timedelta(seconds=seen["bucket_seconds"])
    assert {later - earlier for earlier, later in pairwise(starts)} == {step}
    assert starts[0] == datetime.fromisoformat(seen["since"])
    expected = {
        at: {"completed": 0, "failed": 0, "cancelled": 0, "audio_seconds": 0} for at in starts
    }
    ended = [(10, "completed", 100), (20, "completed", 400), (300, "completed", 100)]
    ended += [(30, "completed", 200), (40, "failed", 0), (15, "failed", 0), (15, "failed", 0)]
    for minutes, status, seconds in [*ended, (50, "cancelled", 0)]:
        at = now - timedelta(minutes=minutes)
        bucket = expected[at - (at - starts[0]) % step]
        bucket[status] += 1
        bucket["audio_seconds"] += seconds
    assert buckets == expected


def assert_owners(owners: list[dict[str, Any]], anna: UUID, berta: UUID, clara: UUID) -> None:
    names = {str(anna): "anna", str(berta): "berta", str(clara): "clara"}
    by_name = {names[owner["owner_id"]]: owner for owner in owners}
    assert list(by_name)[-1] == "clara", "who has nothing, but a pause"
    assert by_name["clara"]["paused_at"] is not None
    assert by_name["anna"]["paused_at"] is None
    assert by_name["anna"]["email"] == f"{anna}@example.org"
    numbers = (
        "queued",
        "processing",
        "waiting_audio_seconds",
        "audio_seconds",
        "share",
        "weight",
        "max_running",
    )
    assert {name: tuple(owner[n] for n in numbers) for name, owner in by_name.items()} == {
        # Fair share: of two slots each has got one.
        "anna": (2, 1, 120, 600, 0.75, 1, 100),
        "berta": (0, 1, 0, 200, 0.25, 2, 7),
        "clara": (0, 0, 0, 0, 0, 1, 100),
    }


@pytest.mark.parametrize("hours", [1, 2, 5, 23, 25, 61, 168, 719, 720])
def test_any_window_has_its_buckets(
    ask: Callable[..., dict[str, Any]], history: History, user: UUID, hours: int
) -> None:
    for minutes in (0.2, 59, hours * 60 - 1):
        history.add(user, "completed", minutes)
    history.add(user, "completed", hours * 60 + seconds_of_a_bucket(hours) / 60 + 1)
    seen = ask("/operate/overview", hours=hours)
    assert 24 <= len(seen["throughput"]) <= 61
    assert seen["ended"]["completed"] == 3
    assert sum(bucket["completed"] for bucket in seen["throughput"]) == 3


def seconds_of_a_bucket(hours: int) -> int:
    minutes = (1, 2, 5, 10, 15, 30, 60, 120, 180, 240, 360, 480, 720)
    return 60 * next(step for step in minutes if step * 60 >= hours * 60)


@pytest.mark.parametrize("hours", ["0", "721", "x", "1.5"])
def test_a_window_that_is_none(
    api: TestClient, operator: UUID, token: Callable[[UUID], Headers], hours: str
) -> None:
    answer = api.get("/operate/overview", params={"hours": hours}, headers=token(operator))
    assert (answer.status_code, answer.json()["field"]) == (422, "hours")


async def test_a_window_with_too_much_in_it_is_refused(settings: Settings, operator: UUID) -> None:
    async with await database.connect(settings, name="test") as connection:
        await connection.execute(
            "select set_config('role', 'authenticated', false),"
            " set_config('request.jwt.claims', %s, false),"
            " set_config('statement_timeout', '1ms', false)",
            (json.dumps({"sub": str(operator)}),),
        )
        with pytest.raises(InvalidInput, match="fewer hours") as caught:
            await operate.overview(connection, hours=720, stall_timeout=30)
    assert caught.value.field == "hours"


def test_at_most_so_many_owners(
    ask: Callable[..., dict[str, Any]],
    history: History,
    make_user: MakeUser,
    conn: psycopg.Connection,
) -> None:
    users = [make_user() for _ in range(52)]
    for number, user_id in enumerate(users):
        history.add(user_id, "completed", 5, seconds=1000 - number)
    conn.execute("select pause_owner(%s)", (users[51],))
    listed = [UUID(owner["owner_id"]) for owner in ask("/operate/overview")["owners"]]
    assert listed == [*users[:50], users[51]], "the most active, and whoever is paused"


# What days cost --------------------------------------------------------------------------------


USAGE = {"calls": 2, "gpu_seconds": 1.5, "cpu_seconds": 0.25, "estimated_cost": 0.001}


def costs(ask: Callable[..., dict[str, Any]]) -> dict[date, tuple[int, float, float, float, float]]:
    return {
        date.fromisoformat(day["day"]): tuple(
            round(day[name], 6)
            for name in ("jobs", "audio_seconds", "gpu_seconds", "cpu_seconds", "estimated_cost")
        )
        for day in ask("/operate/overview", hours=1)["costs"]
        if day["jobs"]
    }


def close_days(conn: psycopg.Connection) -> None:
    while conn.execute("select pgscribe.close_day()").fetchone() == (True,):
        pass


def test_days_are_added_up_once_and_stay_as_they_are(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, history: History, user: UUID
) -> None:
    noon = history.now.astimezone(UTC).replace(hour=12)
    minutes_to_noon = (history.now - noon).total_seconds() / 60
    days = {number: (noon - timedelta(days=number)).date() for number in (0, 2, 3)}

    def add(days_ago: int, status: str, **values: Any) -> UUID:
        return history.add(user, status, days_ago * 1440 + minutes_to_noon, usage=USAGE, **values)

    add(2, "completed")
    failed = add(2, "failed", code="timeout")
    deleted = add(3, "completed", seconds=50)
    history.add(user, "completed", 3 * 1440 + minutes_to_noon, seconds=25)  # no usage
    add(13, "cancelled")
    add(14, "completed")  # too long ago
    first = noon.date() - timedelta(days=13)
    expected = {
        first: (1, 0, 1.5, 0.25, 0.001),
        days[3]: (2, 75, 3.0 / 2, 0.25, 0.001),
        days[2]: (2, 100, 3, 0.5, 0.002),
    }
    assert costs(ask) == expected
    close_days(conn)
    assert costs(ask) == expected
    conn.execute("delete from processing_jobs where id = %s", (deleted,))
    assert costs(ask) == expected, "what was spent was spent"
    # Tried again, it counts on the day on which it ends at last, with all that it took.
    conn.execute("select retry_processing_job(%s)", (failed,))
    expected[days[2]] = (1, 100, 1.5, 0.25, 0.001)
    assert costs(ask) == expected
    set_status(conn, [failed], "doing")
    conn.execute(
        "update processing_jobs set result = '{}', audio_seconds = 10, usage = %s where id = %s",
        (Jsonb({**USAGE, "gpu_seconds": 4}), failed),
    )
    set_status(conn, [failed], "succeeded")
    today = datetime.now(UTC).date()
    expected[today] = (1, 10, 4, 0.25, 0.001)
    assert costs(ask) == expected
    conn.execute("delete from processing_jobs where id = %s", (failed,))
    assert costs(ask) == expected, "deleted before its day was over"


def test_a_day_is_closed_an_hour_after_its_end_with_what_was_deleted(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, history: History, user: UUID
) -> None:
    close_days(conn)
    row = conn.execute("select day from pgscribe.open_day").fetchone()
    assert row is not None
    ended = (history.now - timedelta(hours=1)).astimezone(UTC).date()
    assert row[0] == ended, "the day before is over for more than an hour"
    conn.execute("update pgscribe.open_day set day = day - 1")
    minutes = (history.now - datetime.combine(ended, datetime.min.time(), UTC)).total_seconds() / 60
    history.add(user, "completed", minutes + 5, usage=USAGE)
    conn.execute("delete from processing_jobs")
    history.add(user, "completed", minutes + 5, usage=USAGE)
    day = ended - timedelta(days=1)
    assert costs(ask) == {day: (2, 200, 3, 0.5, 0.002)}
    close_days(conn)
    assert costs(ask) == {day: (2, 200, 3, 0.5, 0.002)}
    entries = conn.execute("select jobs from pgscribe.daily_totals").fetchall()
    assert entries == [(2,)], "one entry for a day that is over"


def test_nobody_waits_for_a_day_to_be_closed_nor_closes_it_too_soon(
    conn: psycopg.Connection, database: str, history: History, user: UUID
) -> None:
    history.add(user, "completed", 3 * 1440)
    with psycopg.connect(database) as deleting:
        deleting.execute("delete from processing_jobs")
        assert conn.execute("select pgscribe.close_day()").fetchone() == (False,)
    assert conn.execute("select pgscribe.close_day()").fetchone() == (True,)


async def test_workers_close_days(conn: psycopg.Connection, settings: Settings) -> None:
    before = conn.execute("select day from pgscribe.open_day").fetchone()
    async with database.make_pool(settings, name="test") as pool:
        await retention.add_up_usage(pool)
    after = conn.execute("select day from pgscribe.open_day").fetchone()
    assert before is not None
    assert after == (before[0] + timedelta(days=1),)


# Lists -----------------------------------------------------------------------------------------


def test_lists_of_everybodys_jobs(
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    history: History,
    make_user: MakeUser,
) -> None:
    users = [make_user() for _ in range(7)]
    codes = ("timeout", "no_speech")
    for number in range(60):
        user_id = users[number * number % 7]
        status = ("completed", "completed", "failed", "cancelled")[number % 4]
        code = codes[number % 3 % 2] if status == "failed" else None
        history.add(user_id, status, 10 + number // 2, code=code)  # two at a time
    make_in_all_states(conn, users[3])
    with conn.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(
            "select id, user_id as owner, status, error_code from processing_jobs"
            " order by created_at desc, id desc"
        ).fetchall()
    wanted: list[dict[str, Any]] = [
        {},
        {"owner": users[0]},
        {"owner": uuid4()},
        {"error_code": "timeout"},
        {"error_code": "timeout", "owner": users[1], "status": "failed"},
        {"error_code": "no_such_code"},
        {"status": "completed", "error_code": "timeout"},
    ]
    wanted += [
        {"status": status}
        for status in ("queued", "processing", "completed", "failed", "cancelled")
    ]
    wanted += [
        {"status": status, "owner": users[4]} for status in ("completed", "failed", "queued")
    ]
    for query in wanted:
        expected = [
            str(row["id"])
            for row in rows
            if all(row[name] == value for name, value in query.items())
        ]
        for limit in (7, 100):
            listed: list[str] = []
            cursor_: dict[str, str] = {}
            while True:
                page = ask("/operate/jobs", limit=limit, **query, **cursor_)
                listed += [job["id"] for job in page["jobs"]]
                if page["next_cursor"] is None:
                    break
                assert len(page["jobs"]) == limit
                cursor_ = {"cursor": page["next_cursor"]}
            assert listed == expected, (query, limit)


def test_a_job_as_operators_see_it(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, history: History, user: UUID
) -> None:
    job_id = history.add(user, "completed", 1, usage=USAGE)
    options = {"model": "base", "initial_prompt": "Frau Dr. Maier"}
    conn.execute(
        "insert into processing_jobs (user_id, file_path, options) values (%s, 'c/d', %s)",
        (user, Jsonb(options)),
    )
    waiting, completed = ask("/operate/jobs")["jobs"]
    assert waiting["options"] == {"model": "base"}
    assert set(completed) == {
        "id", "owner_id", "email", "file_path", "options", "status", "progress", "attempt",
        "created_at", "started_at", "completed_at", "due_at", "audio_seconds", "error_code",
        "error", "usage",
    }  # fmt: skip
    assert (completed["id"], completed["owner_id"]) == (str(job_id), str(user))
    assert (completed["email"], completed["usage"]) == (f"{user}@example.org", USAGE)
    assert datetime.fromisoformat(completed["completed_at"]) == history.now - timedelta(minutes=1)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"status": "done"}, "status"),
        ({"owner": "anna"}, "owner"),
        ({"error_code": "x' or true"}, "error_code"),
        ({"error_code": "a\x00"}, "error_code"),
        ({"limit": 101}, "limit"),
        ({"cursor": "x"}, "cursor"),
    ],
)
def test_lists_that_are_none(
    api: TestClient,
    operator: UUID,
    token: Callable[[UUID], Headers],
    query: dict[str, Any],
    field: str,
) -> None:
    answer = api.get("/operate/jobs", params=query, headers=token(operator))
    assert (answer.status_code, answer.json()["field"]) == (422, field)


# What they do ----------------------------------------------------------------------------------


def test_cancel_and_retry_leave_what_they_cannot_change(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, user: UUID
) -> None:
    jobs = make_in_all_states(conn, user)
    ids = [str(job_id) for job_id in (*jobs.values(), uuid4())]
    assert ask("/operate/jobs/cancel", {"ids": ids}) == {"changed": 2, "more": False, "refused": 0}
    names = {job_id: name for name, job_id in jobs.items()}
    assert {names[job_id]: status for job_id, status in statuses(conn).items()} == {
        "queued": "cancelled",
        "processing": "processing",  # until its worker has stopped
        "completed": "completed",
        "failed": "failed",
        "cancelled": "cancelled",
    }
    assert count(conn, "cancel_requested_at is not null and status = 'processing'") == 1
    assert count(conn, "cancel_requested_at is not null") == 2
    assert ask("/operate/jobs/cancel", {"ids": ids})["changed"] == 0, "once is enough"
    assert ask("/operate/jobs/retry", {"ids": ids}) == {"changed": 3, "more": False, "refused": 0}
    assert {names[job_id]: status for job_id, status in statuses(conn).items()} == {
        "queued": "queued",
        "processing": "processing",
        "completed": "completed",
        "failed": "queued",
        "cancelled": "queued",
    }


def test_over_the_limit_there_are_more(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, make_user: MakeUser
) -> None:
    user, other = make_user(), make_user()
    insert(conn, user, 1001)
    insert(conn, other, 1)
    body = {"filter": {"owner": str(user), "status": "queued"}}
    assert ask("/operate/jobs/cancel", body) == {"changed": 1000, "more": True, "refused": 0}
    assert ask("/operate/jobs/cancel", body) == {"changed": 1, "more": False, "refused": 0}
    assert ask("/operate/jobs/cancel", body) == {"changed": 0, "more": False, "refused": 0}
    assert count(conn, "status = 'queued'") == 1, "somebody else's"
    body = {"filter": {"status": "cancelled"}}
    assert ask("/operate/jobs/retry", body) == {"changed": 1000, "more": True, "refused": 0}
    assert ask("/operate/jobs/retry", body) == {"changed": 1, "more": False, "refused": 0}
    assert count(conn, "status = 'queued'") == 1002


def test_what_fails_again_is_not_retried_again(
    api: TestClient,
    operator: UUID,
    token: Callable[[UUID], Headers],
    conn: psycopg.Connection,
    user: UUID,
) -> None:
    ids = insert(conn, user, 2100)
    set_status(conn, ids, "doing", "failed")
    body: dict[str, Any] = {"filter": {"status": "failed"}}
    changed, more = [], True
    while more:
        response = api.post("/operate/jobs/retry", json=body, headers=token(operator))
        assert response.status_code == 200, response.text
        answer = response.json()
        body.setdefault("ended_before", answer["at"])
        changed.append(answer["changed"])
        more = answer["more"]
        assert sum(changed) <= len(ids), changed
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'doing' where status = 'todo'"
        )
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'failed' where status = 'doing'"
        )
    assert sum(changed) == len(ids)
    assert count(conn, "attempt = 2 and status = 'failed'") == len(ids)
    chosen = {"ids": [str(ids[0])], "ended_before": body["ended_before"]}
    response = api.post("/operate/jobs/retry", json=chosen, headers=token(operator))
    assert response.json()["changed"] == 0, "of those with an id as well"


@pytest.mark.parametrize(
    ("chosen", "changed"),
    [
        ({"error_code": "timeout"}, {"a timeout", "b timeout"}),
        ({"error_code": "timeout", "owner": "b"}, {"b timeout"}),
        ({"owner": "a"}, {"a timeout", "a no_speech", "a cancelled"}),
        ({"owner": "a", "status": "failed"}, {"a timeout", "a no_speech"}),
        ({"status": "cancelled"}, {"a cancelled"}),
        ({"status": "failed"}, {"a timeout", "b timeout", "a no_speech"}),
        ({"owner": "c"}, set()),
    ],
)
def test_a_filter_chooses(
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    history: History,
    make_user: MakeUser,
    chosen: dict[str, str],
    changed: set[str],
) -> None:
    users = {"a": make_user(), "b": make_user(), "c": make_user()}
    jobs = {
        "a timeout": history.add(users["a"], "failed", 1, code="timeout"),
        "b timeout": history.add(users["b"], "failed", 1, code="timeout"),
        "a no_speech": history.add(users["a"], "failed", 1, code="no_speech"),
        "a cancelled": history.add(users["a"], "cancelled", 1),
        "b completed": history.add(users["b"], "completed", 1),
    }
    if owner := chosen.get("owner"):
        chosen = chosen | {"owner": str(users[owner])}
    answer = ask("/operate/jobs/retry", {"filter": chosen})
    assert answer == {"changed": len(changed), "more": False, "refused": 0}
    after = statuses(conn)
    assert {name for name, job_id in jobs.items() if after[job_id] == "queued"} == changed


def test_what_is_locked_is_not_waited_for(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, database: str, user: UUID
) -> None:
    ids = insert(conn, user, 4)
    body = {"ids": [str(job_id) for job_id in ids]}
    with psycopg.connect(database) as holder:
        holder.execute("select id from processing_jobs where id = %s for update", (ids[0],))
        holder.execute(
            "select q.id from procrastinate.procrastinate_jobs q join processing_jobs p"
            " on q.id = p.job_id::bigint where p.id = %s for update of q",
            (ids[1],),
        )
        assert ask("/operate/jobs/cancel", body) == {"changed": 2, "more": True, "refused": 0}
    assert ask("/operate/jobs/cancel", body) == {"changed": 2, "more": False, "refused": 0}
    with psycopg.connect(database) as holder:
        holder.execute("select id from processing_jobs where id = %s for update", (ids[0],))
        assert ask("/operate/jobs/retry", body) == {"changed": 3, "more": True, "refused": 0}
    assert ask("/operate/jobs/retry", body) == {"changed": 1, "more": False, "refused": 0}
    assert count(conn, "status = 'queued'") == 4


def test_owners_limits_hold_for_what_is_retried(
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    history: History,
    make_user: MakeUser,
) -> None:
    full, other = make_user(), make_user()
    conn.execute("select limit_owner(%s, max_queued => 2)", (full,))
    for _ in range(5):
        history.add(full, "failed", 1, code="timeout")
    history.add(other, "failed", 1, code="timeout")
    body = {"filter": {"error_code": "timeout"}}
    assert ask("/operate/jobs/retry", body) == {"changed": 3, "more": False, "refused": 3}
    assert count(conn, "status = 'queued'") == 3
    assert ask("/operate/jobs/retry", body) == {"changed": 0, "more": False, "refused": 3}


def test_who_holds_an_owners_limit_is_not_waited_for(
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    database: str,
    history: History,
    user: UUID,
) -> None:
    conn.execute("select limit_owner(%s, max_queued => 3)", (user,))
    history.add(user, "failed", 1, code="timeout")
    body = {"filter": {"error_code": "timeout"}}
    with psycopg.connect(database) as holder:
        holder.execute(INSERT, (user, 1))  # so near the limit, inserts take turns
        assert ask("/operate/jobs/retry", body) == {"changed": 0, "more": True, "refused": 0}
    assert ask("/operate/jobs/retry", body) == {"changed": 1, "more": False, "refused": 0}


def test_a_job_whose_queue_job_is_gone_is_retried(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, history: History, user: UUID
) -> None:
    job_id = history.add(user, "failed", 1, code="timeout")
    conn.execute("delete from procrastinate.procrastinate_jobs")
    assert ask("/operate/jobs/retry", {"ids": [str(job_id)]})["changed"] == 1
    assert statuses(conn) == {job_id: "queued"}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("cancel", {}, "body"),
        ("cancel", {"ids": []}, "ids"),
        ("cancel", {"ids": ["x"]}, "ids[0]"),
        ("retry", {"ids": [str(UUID(int=n)) for n in range(1001)]}, "ids"),
        ("retry", {"ids": [str(UUID(int=1))], "filter": {"status": "failed"}}, "body"),
        ("retry", {"filter": {}}, "filter"),
        ("retry", {"filter": {"state": "failed"}}, "filter.state"),
        ("retry", {"filter": {"status": "completed"}}, "filter.status"),
        ("cancel", {"filter": {"status": "failed"}}, "filter.status"),
        ("cancel", {"filter": {"error_code": "a b"}}, "filter.error_code"),
        ("cancel", {"filter": {"status": "queued"}, "ended_before": None}, "ended_before"),
        (
            "retry",
            {"filter": {"status": "failed"}, "ended_before": "2026-11-26T00:00"},
            "ended_before",
        ),
    ],
)
def test_selections_that_are_none(
    api: TestClient,
    operator: UUID,
    token: Callable[[UUID], Headers],
    path: str,
    body: object,
    field: str,
) -> None:
    answer = api.post(f"/operate/jobs/{path}", json=body, headers=token(operator))
    assert (answer.status_code, answer.json().get("field")) == (422, field), answer.text


def test_a_thousand_ids_are_not_too_long(
    ask: Callable[..., dict[str, Any]], conn: psycopg.Connection, user: UUID
) -> None:
    ids = insert(conn, user, 1000)
    assert ask("/operate/jobs/cancel", {"ids": [str(job_id) for job_id in ids]})["changed"] == 1000


def test_pauses(
    api: TestClient,
    conn: psycopg.Connection,
    operator: UUID,
    user: UUID,
    token: Callable[[UUID], Headers],
) -> None:
    def paused() -> tuple[bool, bool]:
        row = conn.execute(
            "select (select paused_at is not null from pgscribe.queue_settings"
            " where queue_name = 'transcription'),"
            " exists (select from pgscribe.owner_limits"
            "  where owner_id = %s and paused_at is not null)",
            (user,),
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    assert paused() == (False, False)
    states = [(True, False), (False, False), (False, True), (False, False)]
    for path, state in zip(ACTIONS, states, strict=True):
        url = path.format(user=user)
        assert api.post(url, headers=token(user)).json()["code"] == "not_an_operator"
        for _ in range(2):  # again does not harm
            answer = api.post(url, headers=token(operator))
            assert (answer.status_code, answer.content) == (204, b"")
        assert paused() == state, path
    for path in ACTIONS[2:]:
        answer = api.post(path.format(user=uuid4()), headers=token(operator))
        assert (answer.status_code, answer.json()["code"]) == (404, "user_not_found")


def test_every_action_is_logged_once_it_is_done(
    api: TestClient,
    ask: Callable[..., dict[str, Any]],
    conn: psycopg.Connection,
    operator: UUID,
    user: UUID,
    token: Callable[[UUID], Headers],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "web.routes.operate")
    (job_id,) = insert(conn, user)
    ask("/operate/jobs/cancel", {"ids": [str(job_id)]})
    ask("/operate/jobs/retry", {"filter": {"owner": str(user), "status": "cancelled"}})
    ask("/operate/jobs")
    for path in ACTIONS:
        api.post(path.format(user=user), headers=token(operator))
        api.post(path.format(user=user), headers=token(user))
    said = [r.getMessage() for r in caplog.records if r.name == "web.routes.operate"]
    who = f"Operator's action: operator={operator} action="
    assert said == [
        f"{who}cancel_jobs ids=1 changed=1 more=False refused=0",
        f"{who}retry_jobs status=cancelled owner={user} changed=1 more=False refused=0",
        f"{who}pause_queue",
        f"{who}resume_queue",
        f"{who}pause_owner owner={user}",
        f"{who}resume_owner owner={user}",
    ]


@pytest.mark.parametrize("block", THE_GUIDES_SQL, ids=str)
def test_the_guides_sql(conn: psycopg.Connection, operator: UUID, block: Block) -> None:
    owner = UUID("6f1c2a9e-0000-4000-8000-000000000001")
    conn.execute("insert into auth.users (id) values (%s)", (owner,))
    insert(conn, owner, 2)
    with acting_as(conn, operator):
        for statement in filter(str.strip, block.code.split(";")):
            assert len(conn.execute(statement.encode()).fetchall()) == (
                0 if "operator_jobs" in statement or "operator_deliveries" in statement else 1
            )
    assert count(conn, "status = 'cancelled'") == (2 if "cancel" in block.code else 0)


# Webhooks -------------------------------------------------------------------------------------


def have_failed(conn: psycopg.Connection, owner: UUID, count: int) -> None:
    """Have so many of an owner's webhooks fail after two attempts."""
    insert(conn, owner, count)
    conn.execute(
        "select cancel_processing_job(id) from processing_jobs where user_id = %s", (owner,)
    )
    for _ in range(2):
        conn.execute(
            "select pgscribe.record_delivery(id, 0.5, 503, 'a', 'webhook_failed', 'it said 503')"
            " from webhook_deliveries where user_id = %s",
            (owner,),
        )
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'failed' where status = 'todo'"
    )


def test_webhooks_are_counted_listed_by_page_and_sent_again(
    api: TestClient, conn: psycopg.Connection, operator: UUID, token: Callable[[UUID], Headers],
    make_user: MakeUser,
) -> None:  # fmt: skip
    first, second = make_user(), make_user()
    api.headers.update(token(operator))
    for owner in (first, second):
        conn.execute(
            "insert into webhook_endpoints (user_id, url) values (%s, 'https://h.test:8443/x?key=1')",
            (owner,),
        )
    have_failed(conn, first, 3)
    have_failed(conn, second, 2)
    insert(conn, second, 1)
    conn.execute("select cancel_processing_job(id) from processing_jobs")
    counted = api.get("/operate/overview").json()["webhooks"]
    assert counted.pop("oldest_queued_seconds") >= 0
    assert counted == {
        "queued": 1, "waiting": 0, "sending": 0, "delivered": 0, "failed": 5,
        "seconds": {"p50": None, "p95": None}, "disabled_endpoints": 0,
    }  # fmt: skip
    page = api.get("/operate/webhooks/deliveries?limit=3").json()
    more = api.get("/operate/webhooks/deliveries", params={"cursor": page["next_cursor"]}).json()
    found = page["deliveries"] + more["deliveries"]
    assert (len(page["deliveries"]), more["next_cursor"]) == (3, None)
    assert [one["owner_id"] for one in found] == [str(second)] * 2 + [str(first)] * 3
    assert {(one["url"], one["attempts"], one["response_status"]) for one in found} == {
        ("https://h.test:8443", 2, 503)
    }
    assert "payload" not in found[0]
    assert len(api.get(f"/operate/webhooks/deliveries?owner={first}").json()["deliveries"]) == 3
    assert len(api.get("/operate/webhooks/deliveries?status=queued").json()["deliveries"]) == 1
    assert api.get("/operate/webhooks/deliveries?status=delivered").status_code == 422
    ids = [one["id"] for one in found] + [str(uuid4())]
    conn.execute("update webhook_endpoints set disabled_at = now() where user_id = %s", (first,))
    assert api.post("/operate/webhooks/replay", json={"ids": ids}).json() == {"replayed": 2}
    assert api.post("/operate/webhooks/replay", json={"ids": ids}).json() == {"replayed": 0}
    assert api.get("/operate/overview").json()["webhooks"]["queued"] == 3


# On the command line ---------------------------------------------------------------------------


@pytest.fixture
def pgscribe(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [*map(str, arguments)])

    return run


def test_operators_on_the_command_line(
    pgscribe: Callable[..., Result], conn: psycopg.Connection, make_user: MakeUser
) -> None:
    user, other = make_user(), make_user()
    for name in (user, f"{str(other).upper()}@Example.org", user):
        assert pgscribe("operators", "add", name).exit_code == 0
    listed = pgscribe("operators", "list").output.splitlines()
    today = datetime.now(UTC).date()
    assert listed == [
        f"{user}  since {today}  {user}@example.org",
        f"{other}  since {today}  {other}@example.org",
    ]
    removed = pgscribe("operators", "remove", user)
    assert (removed.exit_code, removed.output) == (0, f"{user}  is no operator\n")
    assert conn.execute("select user_id from pgscribe.operators").fetchall() == [(other,)]
    conn.execute("delete from auth.users where id = %s", (other,))
    none = pgscribe("operators", "list")
    assert (none.stdout, none.stderr[:23]) == ("", "There are no operators;")


def test_nobody_becomes_an_operator_by_mistake(
    pgscribe: Callable[..., Result], conn: psycopg.Connection, make_user: MakeUser
) -> None:
    for _ in range(2):  # as may be where users sign in by way of others
        conn.execute(
            "update auth.users set email = 'a@example.org', is_sso_user = true where id = %s",
            (make_user(),),
        )
    unknown = pgscribe("operators", "add", "nobody@example.org")
    assert unknown.exit_code == 1
    assert "There is no user with the id or e-mail address 'nobody@example.org'" in unknown.output
    several = pgscribe("operators", "add", "a@example.org")
    assert (several.exit_code, "give an id" in several.output) == (1, True)
    assert conn.execute("select user_id from pgscribe.operators").fetchall() == []


def test_keys_operate_only_if_somebody_says_so(
    pgscribe: Callable[..., Result], conn: psycopg.Connection, user: UUID
) -> None:
    assert pgscribe("keys", "create", "usual", "--user", user).exit_code == 0
    assert (
        pgscribe("keys", "create", "special", "--user", user, "--scope", "operate").exit_code == 0
    )
    scopes = {key.name: set(key.scopes) for key in keys.list_all(conn)}
    assert scopes == {"usual": set(USUAL_SCOPES), "special": {"operate"}}
