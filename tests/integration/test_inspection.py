"""What one sees of jobs and of the queue with SQL, and who may."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from db.embedded import SUPERUSER, EmbeddedPostgres
from tests.conftest import MakeUser
from tests.streams import Work

Row = dict[str, Any]

EVERYBODY = ["postgres", "service_role"]  # row level security does not apply to them
VIEWS_CALL = {
    "pgscribe.ahead_in_line",
    "pgscribe.email_for_reader",
    "pgscribe.is_held_back",
    "pgscribe.queue_health",
    "pgscribe.share_of",
    "pgscribe.worker_of",
}
UNCOMMENTED = """
select format('%s %s', case c.relkind when 'v' then 'view' else 'table' end, c.relname)
  from pg_class c
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'm', 'p')
   and obj_description(c.oid, 'pg_class') is null
union all
select format('column %s.%s', c.relname, a.attname)
  from pg_class c join pg_attribute a on a.attrelid = c.oid
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'm', 'p')
   and a.attnum > 0 and not a.attisdropped and col_description(c.oid, a.attnum) is null
union all
select 'function ' || f.oid::regprocedure
  from pg_proc f
 where f.pronamespace = 'public'::regnamespace and obj_description(f.oid, 'pg_proc') is null
"""
OPEN_FUNCTIONS = """
select f.oid::regprocedure::text
  from pg_proc f join pg_namespace n on n.oid = f.pronamespace
 where n.nspname in ('public', 'pgscribe', 'procrastinate')
   and has_function_privilege('anon', f.oid, 'execute')
"""
FUNCTIONS_OF_USERS = """
select distinct n.nspname || '.' || f.proname
  from pg_proc f join pg_namespace n on n.oid = f.pronamespace
 where n.nspname in ('public', 'pgscribe', 'procrastinate')
   and has_function_privilege('authenticated', f.oid, 'execute')
"""
LOOSE_SEARCH_PATHS = """
select f.oid::regprocedure::text, f.proconfig
  from pg_proc f join pg_namespace n on n.oid = f.pronamespace
 where n.nspname in ('public', 'pgscribe')
   and not coalesce('search_path=pg_catalog, pg_temp' = any (f.proconfig), false)
"""
VIEWS_OF_THEIR_OWNER = """
select c.oid::regclass::text
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname in ('public', 'pgscribe', 'procrastinate') and c.relkind in ('v', 'm')
   and not coalesce('security_invoker=true' = any (c.reloptions), false)
"""


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    work = Work(database)
    yield work
    work.close()


@pytest.fixture
def operator(conn: psycopg.Connection, make_user: MakeUser) -> UUID:
    user_id = make_user()
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user_id,))
    return user_id


@contextmanager
def acting_as(conn: psycopg.Connection, role: str, user: UUID | None = None) -> Iterator[None]:
    with conn.transaction():
        if role != "postgres":
            claims = {"role": role} | ({"sub": str(user)} if user else {})
            conn.execute(
                "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
                (role, json.dumps(claims)),
            )
        yield


def rows(conn: psycopg.Connection, query: str, *values: object) -> list[Row]:
    return conn.cursor(row_factory=dict_row).execute(query.encode(), values).fetchall()


def inspect(conn: psycopg.Connection, job: UUID) -> Row:
    (row,) = rows(conn, "select * from job_inspection where id = %s", job)
    return row


def health(conn: psycopg.Connection) -> Row:
    (row,) = rows(conn, "select * from queue_health")
    return row


def register(work: Work) -> int:
    ((worker,),) = work.execute(
        "select worker_id from procrastinate.procrastinate_register_worker_v1()"
    )
    number: int = worker
    return number


def test_a_jobs_way(conn: psycopg.Connection, work: Work, user: UUID) -> None:
    conn.execute(
        "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')", (user,)
    )
    first, job = work.insert(user, "first.mp3"), work.insert(user)
    seen = inspect(conn, job)
    assert (seen["status"], seen["phase"], seen["ahead_in_line"]) == ("queued", "waiting", 1)
    assert inspect(conn, first)["ahead_in_line"] == 0
    assert seen["waiting_since"] == seen["created_at"]
    assert (seen["email"], seen["file_path"]) == (f"{user}@example.org", f"{user}/talk.mp3")
    assert seen["run_seconds"] is seen["pickup_seconds"] is seen["worker_id"] is None

    for pause, resume in (("queue()", "queue()"), (f"owner('{user}')", f"owner('{user}')")):
        work.execute(f"select pause_{pause}")
        assert inspect(conn, job)["phase"] == "paused"
        work.execute(f"select resume_{resume}")

    worker = register(work)
    work.execute("select from pgscribe.turn(%s, null, 2, false, '{}', 3, null)", (worker,))
    seen = inspect(conn, job)
    assert (seen["status"], seen["phase"], seen["worker_id"]) == ("processing", "preparing", worker)
    assert seen["pickup_seconds"] >= 0
    assert seen["run_seconds"] >= 0
    assert seen["waiting_since"] is seen["ahead_in_line"] is seen["owner_virtual_time"] is None
    beats = rows(conn, "select last_heartbeat from procrastinate.procrastinate_workers")
    assert [seen["worker_last_heartbeat"]] == [beat["last_heartbeat"] for beat in beats]

    work.plan(job, 3)
    work.store(job, 0, "Hello.")
    work.execute("select report_progress(%s, 0.4, 'halfway')", (job,))
    seen = inspect(conn, job)
    assert (seen["phase"], seen["chunks"], seen["chunks_done"]) == ("transcribing", 3, 1)
    assert (round(seen["progress"], 2), seen["note"]) == (0.4, "halfway")

    work.execute("select cancel_processing_job(%s)", (first,))
    assert inspect(conn, first)["phase"] == "cancelling"

    usage = {"calls": 4, "gpu_seconds": 1.5, "cpu_seconds": 0.5, "estimated_cost": 0.01}
    work.execute(
        "update processing_jobs set usage = %s, audio_seconds = 60,"
        " started_at = now() - interval '6 s' where id = %s",
        (json.dumps(usage), job),
    )
    work.complete(job)
    seen = inspect(conn, job)
    assert (seen["status"], seen["phase"]) == ("completed", "completed")
    assert {name: seen[name] for name in usage} == usage
    assert seen["real_time_factor"] == pytest.approx(60 / seen["run_seconds"])
    assert 6 <= seen["run_seconds"] < 60
    assert (seen["deliveries_pending"], seen["deliveries_failed"]) == (1, 0)
    work.execute(
        "update procrastinate.procrastinate_jobs set status = 'failed'"
        " where queue_name = 'webhooks'"
    )
    seen = inspect(conn, job)
    assert (seen["deliveries_pending"], seen["deliveries_failed"]) == (0, 1)


def test_what_waits_for_a_time_says_so(conn: psycopg.Connection, work: Work, user: UUID) -> None:
    ((scheduled,),) = work.execute(
        "insert into processing_jobs (user_id, file_path, scheduled_at)"
        " values (%s, 'a/b', now() + interval '1 hour') returning id",
        (user,),
    )
    seen = inspect(conn, scheduled)
    assert (seen["phase"], seen["next_attempt_at"]) == ("scheduled", seen["scheduled_at"])
    assert seen["waiting_since"] is None

    again, worker = work.insert(user), register(work)
    work.execute("select from pgscribe.turn(%s, null, 1, false, '{}', 3, null)", (worker,))
    ended = [{"job_id": str(again), "attempt": 1, "outcome": "retry", "retry_after": 300,
              "error_code": "timeout", "error": "It took too long."}]  # fmt: skip
    work.execute(
        "select from pgscribe.turn(%s, %s, 0, false, '{}', 3, null)", (worker, json.dumps(ended))
    )
    seen = inspect(conn, again)
    assert (seen["phase"], seen["attempt"]) == ("backing off", 1)
    assert (seen["error_code"], seen["error"]) == ("timeout", "It took too long.")
    assert seen["next_attempt_at"] > seen["started_at"]
    counts = health(conn)
    assert (counts["queued"], counts["scheduled"]) == (0, 2)


def test_who_sees_which_jobs(
    conn: psycopg.Connection, postgres: EmbeddedPostgres, work: Work, user: UUID,
    make_user: MakeUser, operator: UUID,
) -> None:  # fmt: skip
    other = make_user()
    jobs = {user: work.insert(user), other: work.insert(other)}
    work.start(*jobs.values())
    work.plan(jobs[user], 2)
    listing = "select * from job_inspection order by created_at desc"
    with acting_as(conn, "authenticated", user):
        (seen,) = rows(conn, listing)
        assert (seen["id"], seen["email"]) == (jobs[user], f"{user}@example.org")
        assert seen["chunks"] == 2
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="Only operators"):
            conn.execute("select * from operator_inspect_jobs()")
    for role in EVERYBODY:
        with acting_as(conn, role):
            found = {row["id"]: row["email"] for row in rows(conn, listing)}
            assert found == {job: f"{owner}@example.org" for owner, job in jobs.items()}
    with acting_as(conn, "authenticated", operator):
        assert rows(conn, listing) == [], "no policy is widened"
        found = {
            row["id"]: row["email"]
            for row in rows(
                conn, "select * from operator_inspect_jobs(with_status => 'processing')"
            )
        }
        assert found == {job: f"{owner}@example.org" for owner, job in jobs.items()}
        (page,) = rows(conn, 'select * from operator_inspect_jobs("limit" => 1)')
        (rest,) = rows(
            conn, "select * from operator_inspect_jobs(after_created_at => %s, after_id => %s)",
            page["created_at"], page["id"],
        )  # fmt: skip
        assert {page["id"], rest["id"]} == set(jobs.values())
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, "anon"):
        conn.execute(listing.encode())
    with psycopg.connect(
        postgres.url(user=SUPERUSER, database=conn.info.dbname), autocommit=True
    ) as dashboard:
        dashboard.execute("set session authorization supabase_read_only_user")
        assert len(rows(dashboard, listing)) == 2
        assert health(dashboard)["processing"] == 2


def test_the_queues_health(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser, operator: UUID
) -> None:
    seen = health(conn)
    assert (seen["queued"], seen["processing"], seen["workers_alive"]) == (0, 0, 0)
    assert (seen["last_heartbeat"], seen["paused_queues"]) == (None, [])
    conn.execute(
        "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')", (user,)
    )
    worker, gone = register(work), register(work)
    jobs = [work.insert(user) for _ in range(6)]
    for claimer, count in ((worker, 3), (gone, 1)):
        work.execute(
            "select from pgscribe.turn(%s, null, %s, false, '{}', 3, null)", (claimer, count)
        )
    held = rows(conn, "select id from job_inspection where worker_id = %s", worker)
    running = [row["id"] for row in held]
    work.complete(running[0])
    work.execute(
        "update processing_jobs set error_code = 'timeout', error = 'x' where id = %s",
        (running[1],),
    )
    work.set_queue_status("failed", running[1])
    work.execute(
        "update procrastinate.procrastinate_workers set last_heartbeat = now() - interval '1 hour'"
        " where id = %s",
        (gone,),
    )
    work.execute("select pause_queue('webhooks'), pause_owner(%s)", (make_user(),))
    seen = health(conn)
    assert (seen["queued"], seen["scheduled"], seen["processing"]) == (2, 0, 2)
    assert seen["stalled"] == 1
    assert (seen["workers_alive"], seen["workers_lost"]) == (1, 1)
    assert (seen["completed_last_hour"], seen["failed_last_hour"]) == (1, 1)
    assert seen["most_frequent_error_code"] == "timeout"
    assert 0 <= seen["pickup_p50_seconds"] <= seen["pickup_p95_seconds"]
    assert seen["oldest_waiting_seconds"] > 0
    assert (seen["paused_queues"], seen["paused_owners"]) == (["webhooks"], 1)
    assert (seen["deliveries_waiting"], seen["deliveries_failed_last_hour"]) == (2, 0)
    assert seen["oldest_delivery_seconds"] > 0
    assert len(jobs) == 6

    with acting_as(conn, "authenticated", operator):
        assert health(conn)["processing"] == 2
    with acting_as(conn, "service_role"):
        assert health(conn)["processing"] == 2
    for role in ("authenticated", "anon"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, role, user):
            health(conn)


def test_pauses_by_name(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, operator: UUID
) -> None:
    """From the SQL editor, with a secret key, and as an operator."""
    ways = [("postgres", None, ""), ("service_role", None, ""), ("service_role", None, "operator_"),
            ("postgres", None, "operator_"), ("authenticated", operator, "operator_")]  # fmt: skip
    for role, caller, prefix in ways:
        for action, queues in (("pause", ["webhooks"]), ("resume", [])):
            with acting_as(conn, role, caller):
                conn.execute(f"select {prefix}{action}_queue('webhooks')".encode())
                conn.execute(f"select {prefix}{action}_owner(%s)".encode(), (user,))
            seen = health(conn)
            assert (seen["paused_queues"], seen["paused_owners"]) == (queues, len(queues))
    for call, field, said in (
        ("pause_queue('transcriptoin')", "queue_name", "there is no queue 'transcriptoin'"),
        ("resume_queue(null)", "queue_name", "there is no queue null"),
        ("pause_owner(gen_random_uuid())", "owner_id", "there is no user"),
        ("resume_owner(null)", "owner_id", "there is no user null"),
    ):
        with pytest.raises(psycopg.errors.CheckViolation, match=f"^{field}: {said}") as refused:
            conn.execute(f"select {call}".encode())
        assert refused.value.diag.message_hint
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        conn.execute("select pause_queue('x')")
    assert refused.value.diag.message_hint == "Give one of maintenance, transcription, webhooks."
    for call in ("pause_queue()", f"pause_owner('{user}')", "operator_pause_queue()"):
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege),
            acting_as(conn, "authenticated", make_user()),
        ):
            conn.execute(f"select {call}".encode())


def test_everything_exposed_is_described(conn: psycopg.Connection) -> None:
    assert conn.execute(UNCOMMENTED.encode()).fetchall() == []


def test_nothing_is_open_by_mistake(conn: psycopg.Connection) -> None:
    assert conn.execute(OPEN_FUNCTIONS.encode()).fetchall() == [], "to anon, or to everybody"
    assert conn.execute(LOOSE_SEARCH_PATHS.encode()).fetchall() == []
    assert conn.execute(VIEWS_OF_THEIR_OWNER.encode()).fetchall() == []
    open_to_users = {name for (name,) in conn.execute(FUNCTIONS_OF_USERS.encode())}
    internal = {name for name in open_to_users if not name.startswith("public.")}
    assert internal == VIEWS_CALL | {"pgscribe.search_document"}
    for schema in ("pgscribe", "procrastinate"):
        row = conn.execute(
            "select bool_or(has_schema_privilege(r, %s, 'usage'))"
            " from unnest(array['anon', 'authenticated', 'service_role']) r",
            (schema,),
        ).fetchone()
        assert row == (False,), "so nobody calls these but through what is public"
    tables = conn.execute(
        "select count(*) from pg_class c where relnamespace = 'public'::regnamespace"
        " and relkind in ('r', 'p') and not relrowsecurity"
    ).fetchone()
    assert tables == (0,)
