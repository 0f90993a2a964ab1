"""Lists go on where they ended, in batches as well; what they read does not grow with the table."""

import json
from collections.abc import AsyncIterator, Callable
from uuid import UUID

import psycopg
import pytest

from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import database, service
from jobs.database import Pool, as_user
from jobs.errors import InvalidInput, LimitReached, NotAllowed
from jobs.models import Cursor, JobStatus, NewJob
from jobs.settings import Settings
from jobs.sql import JOBS

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


def claims(user: UUID) -> dict[str, str]:
    return {"sub": str(user), "role": "authenticated"}


async def pages(pool: Pool, user: UUID, limit: int, status: JobStatus | None) -> list[list[UUID]]:
    found: list[list[UUID]] = []
    after: Cursor | None = None
    while True:
        async with as_user(pool, claims(user)) as conn:
            page = await service.list_jobs(conn, status=status, limit=limit, after=after)
        found.append([job.id for job in page.jobs])
        after = page.next
        if after is None:
            return found


async def test_pages_follow_each_other(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, pool: Pool
) -> None:
    insert = (
        b"insert into processing_jobs (user_id, file_path)"
        b" select %s, 'a' from generate_series(1, %s)"
    )
    conn.execute(insert, (make_user(), 3))
    for count in (1, 6, 3):  # of one statement: created at the same time
        conn.execute(insert, (user, count))
    rows = conn.execute(
        "select id from processing_jobs where user_id = %s order by created_at desc, id desc",
        (user,),
    ).fetchall()
    expected = [row[0] for row in rows]
    assert await pages(pool, user, 4, None) == [expected[:4], expected[4:8], expected[8:]]
    assert await pages(pool, user, 5, JobStatus.QUEUED) == [expected[:5], expected[5:]]
    assert await pages(pool, user, 5, JobStatus.FAILED) == [[]]


async def test_what_comes_meanwhile_moves_no_page(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    insert = b"insert into processing_jobs (user_id, file_path) values (%s, 'a') returning id"
    first = conn.execute(insert, (user,)).fetchone()
    conn.execute(insert, (user,))
    async with as_user(pool, claims(user)) as own:
        page = await service.list_jobs(own, limit=1)
        conn.execute(insert, (user,))
        rest = await service.list_jobs(own, limit=1, after=page.next)
    assert first is not None
    assert [job.id for job in rest.jobs] == [first[0]]


ROWS = """
insert into processing_jobs
  (user_id, file_path, status, created_at, completed_at, result, error_code, error)
select %(user)s, 'a/b', case when n <= 60 then %(rare)s else %(common)s end,
       now() - interval '90 days' + n * interval '1 s', now(), '{}', 'x', 'x'
  from generate_series(1, 50000) n
"""


@pytest.mark.parametrize(
    ("rare", "common"), [("completed", "failed"), ("failed", "completed"), ("cancelled", "failed")]
)
async def test_a_page_reads_what_it_shows(
    postgres: EmbeddedPostgres, database: str, user: UUID, pool: Pool, rare: str, common: str
) -> None:
    """Also where the rare ones are the oldest of very many jobs of the same owner."""
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name), autocommit=True) as admin:
        admin.execute("set session_replication_role = replica")
        admin.execute(ROWS.encode(), {"user": user, "rare": rare, "common": common})
        admin.execute("analyze processing_jobs")
    after: Cursor | None = None
    for wanted in (rare, common, "queued", None):
        status = JobStatus(wanted) if wanted else None
        for _ in range(2):
            at, job_id = after or (None, None)
            values = {"status": status, "limit": 51, "after_at": at, "after_id": job_id}
            async with as_user(pool, claims(user)) as conn:
                plan = await conn.execute(
                    b"explain (analyze, buffers, format json) " + JOBS["list"], values
                )
                row = await plan.fetchone()
                page = await service.list_jobs(conn, status=status, limit=50)
            assert row is not None
            used = row[0][0]["Plan"]
            blocks = used["Shared Hit Blocks"] + used["Shared Read Blocks"]
            assert blocks < 200, (status, after, used)
            after = page.next
        after = None


# Many at once


async def test_a_batch_is_submitted_in_order(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    jobs = [
        NewJob(
            f"{user}/{n}",
            {"model": "tiny"} if n % 2 else {},
            priority=n,
            audio_url=f"https://example.org/{n}" if n % 3 else None,
            webhook_url="https://example.org/done",
            idempotency_key=f"key {n % 4}" if n < 8 and n % 4 > 1 else None,
        )
        for n in range(20)
    ]
    jobs[6:8] = jobs[2:4]  # the same keys again
    async with as_user(pool, claims(user)) as own:
        ids = await service.submit_many(own, jobs)
        again = await service.submit_many(own, jobs[2:5])
        one = await service.get(own, ids[5])
    assert ids[6:8] == ids[2:4] == again[:2]
    assert len({*ids, *again}) == 19
    assert (one.file_path, one.options, one.priority) == (f"{user}/5", {"model": "tiny"}, 5)
    assert (one.audio_url, one.webhook_url) == ("https://example.org/5", "https://example.org/done")
    row = conn.execute("select count(*) from processing_jobs where job_id is not null").fetchone()
    assert row == (19,)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"options": {"model": 1}}, "jobs[3].options.model"),
        ({"audio_url": "ftp://x"}, "jobs[3].audio_url"),
        ({"webhook_url": "x"}, "jobs[3].webhook_url"),
        ({"priority": 101}, "jobs[3].priority"),
        ({"file_path": "a\0b"}, "jobs[3]"),
        ({"idempotency_key": "used"}, "jobs[3].idempotency_key"),
    ],
)
async def test_the_job_that_is_to_blame_is_named_and_none_is_inserted(
    conn: psycopg.Connection, user: UUID, pool: Pool, change: dict[str, object], field: str
) -> None:
    conn.execute(
        "insert into processing_jobs (user_id, file_path, idempotency_key)"
        " values (%s, 'a', 'used')",
        (user,),
    )
    jobs = [NewJob(f"{user}/{n}") for n in range(6)]
    jobs[3] = NewJob(**{"file_path": f"{user}/3", **change})  # type: ignore[arg-type]
    async with as_user(pool, claims(user)) as own:
        with pytest.raises(InvalidInput) as caught:
            await service.submit_many(own, jobs)
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field}: ")
        assert len(await service.submit_many(own, jobs[:3])) == 3, "the transaction goes on"
    row = conn.execute("select count(*) from processing_jobs").fetchone()
    assert row == (4,)


async def test_a_batch_has_limits(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, pool: Pool
) -> None:
    conn.execute("select limit_owner(%s, max_queued => 5)", (user,))
    async with as_user(pool, claims(user)) as own:
        for count in (0, 101):
            with pytest.raises(InvalidInput, match="jobs: must be 1 to 100"):
                await service.submit_many(own, [NewJob(f"{user}/a")] * count)
        with pytest.raises(LimitReached, match="max_queued"):
            await service.submit_many(own, [NewJob(f"{user}/a")] * 6)
        with pytest.raises(NotAllowed, match=r"^jobs\[1\].file_path: "):
            await service.submit_many(own, [NewJob(f"{user}/a"), NewJob(f"{make_user()}/a")])
        assert len(await service.submit_many(own, [NewJob(f"{user}/a")] * 5)) == 5


async def test_the_same_key_for_another_url_is_refused(user: UUID, pool: Pool) -> None:
    job = {"file_path": f"{user}/a", "options": {}, "idempotency_key": "k"}
    async with as_user(pool, claims(user)) as own:
        for column in ("audio_url", "webhook_url"):
            await service.submit(own, **{**job, column: "https://x", "idempotency_key": column})  # type: ignore[arg-type]
            with pytest.raises(InvalidInput, match="idempotency_key: was used"):
                async with own.transaction():
                    await service.submit(
                        own,
                        **{**job, column: "https://y", "idempotency_key": column},  # type: ignore[arg-type]
                    )


def test_services_and_owners_may_give_urls(conn: psycopg.Connection, user: UUID) -> None:
    for role in ("authenticated", "service_role"):
        with conn.transaction():
            conn.execute(
                "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
                (role, json.dumps(claims(user))),
            )
            conn.execute(
                "insert into processing_jobs (user_id, file_path, audio_url, webhook_url)"
                " values (%s, %s, 'https://x', 'https://y')",
                (user, f"{user}/a"),
            )
