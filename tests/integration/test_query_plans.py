"""What the queue reads must not depend on how many finished jobs there are."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import database
from jobs.queue import ClaimedJob, OutcomeName, Queue
from jobs.settings import Settings
from jobs.sql import CALLS, JOBS, OPERATE, TRACING

pytestmark = pytest.mark.anyio

FINISHED = """
with finished as (
  select gen_random_uuid() as id, n, now() - interval '20 days' * (1 - n::float8 / %(count)s) as at
    from generate_series(1, %(count)s) n),
queue_jobs as (
  insert into procrastinate.procrastinate_jobs
    (id, queue_name, task_name, args, status, attempts)
  select n, 'transcription', 'transcribe', jsonb_build_object('processing_job_id', id),
         'succeeded', 1
    from finished)
insert into public.processing_jobs
  (id, user_id, file_path, job_id, status, progress, attempt,
   started_at, completed_at, created_at, result)
select id, (%(users)s::uuid[])[1 + n %% cardinality(%(users)s::uuid[])], 'a/b.mp3', n::text,
       'completed', 1, 1, at, at, at, '{}'
  from finished
"""
# Of another owner, all of them newer than those of the owner who looks; statistics know of neither.
OTHERS = """
with ended as (
  insert into public.processing_jobs
    (user_id, file_path, status, attempt, started_at, completed_at, created_at, error_code, error)
  select %(other)s, 'a/b.mp3', 'failed', 1, now(), now(), now(), 'timeout', 'x'
    from generate_series(1, 3000))
insert into public.processing_jobs
  (user_id, file_path, status, attempt, started_at, completed_at, created_at, result)
select %(user)s, 'a/b.mp3', 'completed', 1, at, at, at, '{}'
  from (select now() - interval '30 days' as at from generate_series(1, 30)) n
"""
DELIVERIES = """
with added as (
  insert into webhook_deliveries (user_id, endpoint_id, event, payload, queue_job_id)
  select %(user)s, (select id from webhook_endpoints), 'webhook.test', '{}',
         nextval('procrastinate.procrastinate_jobs_id_seq')
    from generate_series(1, %(count)s)
  returning id, queue_job_id)
insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args)
select queue_job_id, 'webhooks', 'deliver_webhook', jsonb_build_object('delivery_id', id)
  from added
"""
READS = """
select sum(seq_scan), sum(seq_tup_read + coalesce(idx_tup_fetch, 0)),
       sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)
  from pg_stat_user_tables join pg_statio_user_tables using (relid)
 where pg_stat_user_tables.relname = any (%s)
"""


@dataclass(frozen=True)
class Reads:
    """What the tables were read for."""

    sequential_scans: int
    rows: int
    blocks: int


class Meter:
    """Tells what a step reads of ``tables``. ``sessions`` are those that take it."""

    def __init__(self, conn: psycopg.Connection) -> None:
        self._conn = conn
        self.tables = ["processing_jobs", "procrastinate_jobs"]
        self.sessions: list[database.Connection] = []

    async def _read(self) -> list[int]:
        # What a session has read is told to the others at the end of its next transaction.
        for session in self.sessions:
            await session.execute("select pg_stat_force_next_flush()")
        self._conn.execute("select pg_stat_force_next_flush()")
        row = self._conn.execute(READS.encode(), (self.tables,)).fetchone()
        assert row is not None
        return list(map(int, row))

    async def measure(self, step: Awaitable[Any]) -> Reads:
        before = await self._read()
        await step
        after = await self._read()
        return Reads(*(b - a for a, b in zip(before, after, strict=True)))


@pytest.fixture
def superuser(postgres: EmbeddedPostgres, database: str) -> Iterator[psycopg.Connection]:
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    url = postgres.url(user=SUPERUSER, database=str(name))
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("set session_replication_role = replica")
        yield admin


@pytest.fixture
def full_database(request: pytest.FixtureRequest, superuser: psycopg.Connection) -> list[UUID]:
    """Fill the database with very many finished jobs; return their owners."""
    count, owners = request.param
    users = [uuid4() for _ in range(owners)]
    superuser.execute(
        "insert into auth.users (id, email) select id, id::text from unnest(%s) id", (users,)
    )
    for table in ("public.processing_jobs", "procrastinate.procrastinate_jobs"):
        superuser.execute(f"alter table {table} set (autovacuum_enabled = false)".encode())
    superuser.execute(FINISHED.encode(), {"count": count, "users": users})
    superuser.execute("select setval('procrastinate.procrastinate_jobs_id_seq', %s)", (count,))
    superuser.execute("analyze public.processing_jobs, procrastinate.procrastinate_jobs")
    superuser.execute("select pg_stat_force_next_flush()")
    return users


@pytest.fixture
def meter(conn: psycopg.Connection) -> Meter:
    return Meter(conn)


@pytest.fixture
async def queue(settings: Settings, meter: Meter) -> AsyncIterator[Queue]:
    async def connect() -> database.Connection:
        connection = await database.connect(settings, name="test")
        meter.sessions.append(connection)
        return connection

    queue = Queue(connect, max_attempts=3, stall_timeout=0.1)
    yield queue
    await queue.close()


class Steps:
    """Everything that is done often, as an asynchronous function without arguments each."""

    def __init__(
        self, conn: psycopg.Connection, queue: Queue, worker: int, users: list[UUID]
    ) -> None:
        self._conn = conn
        self._queue = queue
        self._worker = worker
        self._users = users
        self._held: list[ClaimedJob] = []

    async def insert(self, count: int) -> None:
        self._conn.execute(
            "insert into processing_jobs (user_id, file_path)"
            " select (%(users)s::uuid[])[1 + n %% cardinality(%(users)s::uuid[])], 'a/b.mp3'"
            " from generate_series(1, %(count)s) n",
            {"users": self._users, "count": count},
        )

    async def schedule(self) -> None:
        self._conn.execute(
            "insert into processing_jobs (user_id, file_path, scheduled_at)"
            " values (%s, 'a/b.mp3', now() + interval '1 hour')",
            (self._users[0],),
        )

    async def claim(self) -> None:
        self._held += (await self._queue.turn(self._worker, [], 10, None)).jobs
        assert self._held

    async def end_and_claim(self) -> None:
        outcomes: tuple[OutcomeName, ...] = (
            "succeeded",
            "failed",
            "retry",
            "released",
            "cancelled",
        )
        ended = [
            job.end(outcomes[number % len(outcomes)], result={}, audio_seconds=10.0)
            for number, job in enumerate(self._held)
        ]
        self._held = (await self._queue.turn(self._worker, ended, 10, None)).jobs
        assert self._held

    async def beat(self) -> None:
        beat = await self._queue.beat(self._worker, self._held, sweep=False)
        assert beat is not None
        assert not beat.lost

    async def sweep(self) -> None:
        dead = await self._queue.register()
        assert (await self._queue.turn(dead, [], 10, None)).jobs
        self._conn.execute(
            "update procrastinate.procrastinate_workers"
            " set last_heartbeat = now() - interval '1 minute' where id = %s",
            (dead,),
        )
        beat = await self._queue.beat(self._worker, self._held, sweep=True)
        assert beat is not None
        assert beat.swept == 10

    async def cancel_and_retry(self) -> None:
        row = self._conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, 'a/b.mp3') returning id",
            (self._users[0],),
        ).fetchone()
        self._conn.execute("select cancel_processing_job(%s)", row)
        self._conn.execute("select retry_processing_job(%s)", row)

    def _as_owner(self, query: bytes, values: dict[str, Any]) -> list[Any]:
        with self._conn.transaction():
            self._conn.execute(
                "select set_config('role', 'authenticated', true),"
                " set_config('request.jwt.claims', %s, true)",
                (f'{{"sub": "{self._users[0]}"}}',),
            )
            return self._conn.execute(query, values).fetchall()

    async def list_jobs(self, status: str | None, count: int | None = None) -> None:
        values = {"status": status, "limit": 20, "after_at": None, "after_id": None}
        rows = self._as_owner(JOBS["list"], values)
        assert len(rows) == count if count is not None else len(rows) == 20 or status == "failed"

    async def operator_lists(self, rows: int, **chosen: object) -> None:
        values = {"status": None, "owner": None, "error_code": None, "limit": 20, **chosen}
        values |= {"after_at": None, "after_id": None}
        assert len(self._as_owner(OPERATE["operator_jobs"], values)) >= rows

    async def operator_looks(self) -> None:
        values = {"hours": 24, "stall_timeout": 30}
        ((seen,),) = self._as_owner(OPERATE["operator_overview"], values)
        assert seen["ended"]["completed"] > 1000
        assert sum(day["jobs"] for day in seen["costs"]) > 14 * 1000

    async def inspect(self, rows: int, condition: str, *values: object) -> None:
        query = f"select * from job_inspection {condition}"
        assert len(self._conn.execute(query.encode(), values).fetchall()) >= rows

    async def inspect_own(self) -> None:
        query = b"select * from job_inspection order by created_at desc limit 20"
        assert len(self._as_owner(query, {})) == 20

    async def operator_inspects(self) -> None:
        query = b"select * from operator_inspect_jobs('queued', \"limit\" => 20)"
        assert len(self._as_owner(query, {})) == 20

    async def look_at_health(self) -> None:
        (row,) = self._as_owner(b"select queued, completed_last_hour from queue_health", {})
        assert row[0] > 50

    async def operator_metrics(self) -> None:
        ((figures,),) = self._as_owner(OPERATE["operator_metrics"], {"stall_timeout": 30})
        assert sum(row["jobs"] for row in figures["jobs"]) > 10
        assert figures["ended"]["completed"] > 0

    async def waits(self) -> None:
        assert self._held[0].attempt is not None
        values = {"job_id": self._held[0].attempt.job_id}
        row = self._conn.execute(CALLS["waited_seconds"], values).fetchone()
        assert row is not None
        assert 0 <= row[0] < 60

    async def operator_changes(self, action: str, **chosen: object) -> None:
        values = {"ids": None, "status": None, "owner": None, "error_code": None, **chosen}
        values |= {"ended_before": datetime.now(UTC)}
        ((changed, more, *_),) = self._as_owner(OPERATE[f"operator_{action}_jobs"], values)
        assert (changed > 0, more) == (True, False)

    async def delete(self) -> None:
        row = self._conn.execute(
            "insert into processing_jobs (user_id, file_path)"
            " values (%(user)s::uuid, %(user)s::text || '/a')"
            " returning id",
            {"user": str(self._users[0])},
        ).fetchone()
        assert row is not None
        assert self._as_owner(JOBS["delete"], {"id": row[0], "keep_audio": False}) == [(True,)]

    async def prune(self, what: str) -> None:
        row = self._conn.execute(
            "select pgscribe.prune(%s, interval '10 days', 100)", (what,)
        ).fetchone()
        assert row == (100,)

    async def prune_nothing(self) -> None:
        """As at most times: then what maintenance has left is looked for, too."""
        row = self._conn.execute(
            "select pgscribe.prune('queue_jobs', interval '30 days', 100)"
        ).fetchone()
        assert row == (0,)

    async def trace(self) -> None:
        attempt = self._held[0].attempt
        assert attempt is not None
        values = {"job_id": attempt.job_id, "attempt": attempt.number}
        row = self._conn.execute(TRACING["job_trace"], values).fetchone()
        assert row is not None
        assert row[0]["job_id"] == str(attempt.job_id)

    async def sign_off(self) -> None:
        await self._queue.sign_off(await self._queue.register())


def check(name: str, reads: Reads, *, rows: int) -> None:
    # A row is read a few times and has half a dozen index entries, each some levels deep.
    assert reads.sequential_scans == 0, name
    assert reads.rows <= 20 * rows + 200, (name, reads)
    assert reads.blocks <= 200 * rows + 2000, (name, reads)


@pytest.mark.parametrize(
    "full_database",
    [(100_000, 20), pytest.param((1_000_000, 20), marks=pytest.mark.slow)],
    indirect=True,
)
async def test_what_is_read_does_not_depend_on_finished_jobs(
    full_database: list[UUID], conn: psycopg.Connection, queue: Queue, meter: Meter
) -> None:
    worker = await queue.register()
    steps = Steps(conn, queue, worker, full_database)
    plan: list[tuple[str, int, Callable[[], Awaitable[None]]]] = [
        ("insert 1,000", 1000, functools.partial(steps.insert, 1000)),
        ("insert", 1, functools.partial(steps.insert, 1)),
        ("schedule", 1, steps.schedule),
        ("claim", 10, steps.claim),
        ("waited", 1, steps.waits),
        ("beat", 10, steps.beat),
        ("end and claim", 20, steps.end_and_claim),
        ("trace", 1, steps.trace),
        ("sweep", 20, steps.sweep),
        ("cancel and retry", 3, steps.cancel_and_retry),
        ("list", 20, functools.partial(steps.list_jobs, None)),
        ("list completed", 20, functools.partial(steps.list_jobs, "completed")),
        ("list queued", 20, functools.partial(steps.list_jobs, "queued")),
        ("list failed", 20, functools.partial(steps.list_jobs, "failed")),
        ("delete", 2, steps.delete),
        ("prune nothing", 0, steps.prune_nothing),
        ("prune queue jobs", 100, functools.partial(steps.prune, "queue_jobs")),
        ("prune", 100, functools.partial(steps.prune, "completed")),
        ("sign off", 1, steps.sign_off),
    ]
    # More often than it takes Postgres to settle for a plan that suits all values.
    for _ in range(8):
        for name, rows, step in plan:
            check(name, await meter.measure(step()), rows=rows)


@pytest.mark.parametrize("full_database", [(20_000, 1)], indirect=True)
async def test_an_owners_list_does_not_depend_on_others_jobs(
    full_database: list[UUID], conn: psycopg.Connection, superuser: psycopg.Connection,
    queue: Queue, meter: Meter, user: UUID,
) -> None:  # fmt: skip
    """Even where all that the planner knows of is one owner, who has everything."""
    superuser.execute(OTHERS.encode(), {"user": user, "other": full_database[0]})
    superuser.execute("select pg_stat_force_next_flush()")
    steps = Steps(conn, queue, 0, [user])
    for status, rows in ((None, 20), ("completed", 20), ("failed", 0), ("cancelled", 0)):
        read = await meter.measure(steps.list_jobs(status, rows))
        check(f"list {status}", read, rows=rows)


@pytest.mark.parametrize("full_database", [(5_000, 1)], indirect=True)
async def test_a_place_in_line_does_not_depend_on_how_long_the_line_is(
    full_database: list[UUID], conn: psycopg.Connection, queue: Queue, meter: Meter
) -> None:
    """Nor on statistics, which know of no job that waits."""
    conn.execute("select limit_owners(max_queued => 1000000)")
    steps = Steps(conn, queue, 0, full_database)
    await steps.insert(5_000)
    first = steps.inspect(20, "where status = 'queued' order by queue_job_id limit 20")
    read = await meter.measure(first)
    # All that wait are read once, to put them in order; then what comes before each of them.
    assert read.rows <= 5_000 + 20 * 40, read


@pytest.mark.parametrize("full_database", [(10, 1)], indirect=True)
async def test_deliveries_are_deleted_one_by_one_although_the_statistics_know_of_none(
    full_database: list[UUID], conn: psycopg.Connection, superuser: psycopg.Connection,
    meter: Meter,
) -> None:  # fmt: skip
    """As where retention has deleted all there were, and then there are many."""
    (user,) = full_database
    meter.tables.append("webhook_deliveries")
    conn.execute(
        "insert into webhook_endpoints (user_id, url) values (%s, 'https://a.org')", (user,)
    )
    superuser.execute("alter table webhook_deliveries set (autovacuum_enabled = false)")
    superuser.execute(DELIVERIES.encode(), {"user": user, "count": 100})
    superuser.execute("delete from webhook_deliveries")
    superuser.execute("delete from procrastinate.procrastinate_jobs")
    superuser.execute("analyze webhook_deliveries, procrastinate.procrastinate_jobs")
    superuser.execute(DELIVERIES.encode(), {"user": user, "count": 10_000})
    conn.execute("delete from webhook_endpoints")
    superuser.execute("select pg_stat_force_next_flush()")

    async def forget() -> None:
        row = conn.execute("select pgscribe.forget_deliveries('0 s')").fetchone()
        assert row == (1000,)

    read = await meter.measure(forget())
    assert read.sequential_scans == 0
    assert read.rows <= 5 * 1000, read
    rows = conn.execute(
        "select (select count(*) from webhook_deliveries),"
        " (select count(*) from procrastinate.procrastinate_jobs)"
    ).fetchall()
    assert rows == [(9000, 9000)]


@pytest.mark.parametrize("full_database", [(20_000, 1)], indirect=True)
async def test_operators_lists_of_what_waits_do_not_depend_on_newer_jobs(
    full_database: list[UUID], conn: psycopg.Connection, superuser: psycopg.Connection,
    queue: Queue, meter: Meter,
) -> None:  # fmt: skip
    """As where an owner has been paused for a while: theirs are the oldest jobs, and many."""
    await Steps(conn, queue, 0, full_database).insert(1_000)
    superuser.execute(
        "update processing_jobs set created_at = now() - interval '30 days' where status = 'queued'"
    )
    superuser.execute("analyze processing_jobs")
    superuser.execute("select pg_stat_force_next_flush()")

    async def look() -> None:
        query = "select count(*) from pgscribe.newest_jobs('queued', null, null, 20, null, null)"
        assert conn.execute(query.encode()).fetchone() == (20,)

    check("queued", await meter.measure(look()), rows=100)


def test_deliveries_of_deleted_endpoints_are_passed_over_without_a_call_for_each(
    conn: psycopg.Connection, superuser: psycopg.Connection, user: UUID
) -> None:
    conn.execute(
        "insert into webhook_endpoints (user_id, url) values (%s, 'https://a.org')", (user,)
    )
    superuser.execute(DELIVERIES.encode(), {"user": user, "count": 100})
    superuser.execute("update webhook_deliveries set status = 'failed'")
    conn.execute("delete from webhook_endpoints")
    superuser.execute("set track_functions = 'all'")
    with superuser.transaction():
        superuser.execute(
            "select set_config('role', 'authenticated', true),"
            " set_config('request.jwt.claims', %s, true)",
            (f'{{"sub": "{user}"}}',),
        )
        row = superuser.execute(
            "select replay_webhook_deliveries(now() - interval '1 day')"
        ).fetchone()
        assert row == (0,)
        calls = superuser.execute(
            "select funcname, calls from pg_stat_xact_user_functions where schemaname <> 'auth'"
        ).fetchall()
    assert dict(calls) == {"replay_webhook_deliveries": 1, "replay_deliveries": 1}


@pytest.mark.parametrize(
    "full_database",
    [(100_000, 20), pytest.param((1_000_000, 20), marks=pytest.mark.slow)],
    indirect=True,
)
async def test_what_operators_read_does_not_depend_on_finished_jobs(
    full_database: list[UUID], conn: psycopg.Connection, queue: Queue, meter: Meter
) -> None:
    worker = await queue.register()
    steps = Steps(conn, queue, worker, full_database)
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (full_database[0],))
    while conn.execute("select pgscribe.close_day()").fetchone() == (True,):
        pass
    await steps.insert(100)
    await steps.claim()
    await steps.end_and_claim()  # some fail, some are cancelled
    row = conn.execute(
        "select count(*) from processing_jobs where completed_at > now() - interval '49 hours'"
    ).fetchone()
    assert row is not None
    lately = row[0]
    last_hour, owner = lately // 49 + 100, full_database[0]
    lists: list[tuple[int, dict[str, object]]] = [
        (20, {}),
        (20, {"status": "completed"}),
        (20, {"status": "queued"}),
        (2, {"status": "failed"}),
        (2, {"status": "cancelled"}),
        (10, {"status": "processing"}),
        (2, {"error_code": "internal_error"}),
        (0, {"error_code": "internal_error", "owner": full_database[1]}),
        (20, {"owner": full_database[0]}),
        (0, {"owner": full_database[0], "status": "failed"}),
    ]
    for _ in range(8):
        for rows, chosen in lists:
            read = await meter.measure(steps.operator_lists(rows, **chosen))
            # Of each of twenty owners' lists the beginning is read, where there is no other.
            check(str(chosen), read, rows=40)
        newest = steps.inspect(20, "order by created_at desc limit 20")
        check("inspect", await meter.measure(newest), rows=20)
        failed = steps.inspect(2, "where status = 'failed' order by created_at desc limit 20")
        check("inspect failed", await meter.measure(failed), rows=2)
        one = steps.inspect(20, "where user_id = %s order by created_at desc limit 20", owner)
        check("inspect an owner's", await meter.measure(one), rows=20)
        check("inspect one's own", await meter.measure(steps.inspect_own()), rows=20)
        # How many come before each of them in line is counted.
        check("operator inspects", await meter.measure(steps.operator_inspects()), rows=100)
        check("health", await meter.measure(steps.look_at_health()), rows=100 + last_hour // 5)
        # Those that wait or run, and those of the last ten minutes, of which the least end here.
        check("metrics", await meter.measure(steps.operator_metrics()), rows=100 + lately // 200)
        # The window's, today's and those that wait or run; nothing else of the past 20 days.
        check("overview", await meter.measure(steps.operator_looks()), rows=lately // 5)
    cancel = steps.operator_changes("cancel", owner=full_database[0], status="queued")
    check("cancel", await meter.measure(cancel), rows=100)
    retry = steps.operator_changes("retry", owner=full_database[0])
    check("retry", await meter.measure(retry), rows=100)
