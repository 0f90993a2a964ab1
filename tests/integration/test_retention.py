"""What is old is pruned: in batches, by state, and nothing else."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from jobs import database, retention
from jobs.database import Pool
from jobs.settings import Settings
from jobs.storage.local import LocalStorage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


@pytest.fixture
def storage(settings: Settings) -> LocalStorage:
    return LocalStorage(settings.storage_dir, max_bytes=1)


def add_job(conn: psycopg.Connection, user: UUID, status: str, age: int, path: str = "a/b") -> None:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id, job_id",
        (user, path),
    ).fetchone()
    assert row is not None
    steps = {"completed": ["doing", "succeeded"], "failed": ["doing", "failed"]}
    conn.execute("update processing_jobs set result = '{}' where id = %s", (row[0],))
    for step in steps.get(status, [status]):
        conn.execute("update processing_jobs set result = '{}' where id = %s", (row[0],))
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = %s where id = %s", (step, row[1])
        )
    if status not in {"todo", "doing"}:
        conn.execute(
            "update processing_jobs set completed_at = now() - make_interval(days => %s)"
            " where id = %s",
            (age, row[0]),
        )


def statuses(conn: psycopg.Connection) -> list[str]:
    return [row[0] for row in conn.execute("select status from processing_jobs order by 1")]


async def test_jobs_go_by_state_and_age(
    conn: psycopg.Connection, user: UUID, pool: Pool, storage: LocalStorage, settings: Settings
) -> None:
    for status in ("completed", "failed", "cancelled"):
        for age in (5, 50):
            add_job(conn, user, status, age)
    add_job(conn, user, "todo", 50)
    add_job(conn, user, "doing", 50)
    keep = settings.model_copy(
        update={"keep_completed_days": None, "keep_failed_days": 10, "keep_cancelled_days": 1}
    )
    pruned = await retention.prune(pool, storage, keep)
    assert (pruned["failed"], pruned["cancelled"]) == (1, 2)
    assert statuses(conn) == ["completed", "completed", "failed", "processing", "queued"]


async def test_queue_jobs_go_and_their_jobs_stay(
    conn: psycopg.Connection,
    user: UUID,
    pool: Pool,
    storage: LocalStorage,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "BATCH", 3)
    for _ in range(7):
        add_job(conn, user, "completed", 30)
    add_job(conn, user, "completed", 1)
    add_job(conn, user, "todo", 30)
    conn.execute(
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name, status)"
        " values ('maintenance', 'prune', 'succeeded'), ('maintenance', 'prune', 'todo')"
    )
    assert (await retention.prune(pool, storage, settings))["queue_jobs"] == 7
    left = conn.execute(
        "select queue_name, status::text from procrastinate.procrastinate_jobs order by id"
    )
    assert left.fetchall() == [
        ("transcription", "succeeded"),
        ("transcription", "todo"),
        ("maintenance", "todo"),
    ]
    assert statuses(conn) == ["completed"] * 8 + ["queued"]
    row = conn.execute("select count(*) from processing_jobs where job_id is null").fetchone()
    assert row == (7,)
    assert (await retention.prune(pool, storage, settings))["queue_jobs"] == 0


async def test_audio_goes_once_no_job_needs_it(
    conn: psycopg.Connection,
    user: UUID,
    pool: Pool,
    storage: LocalStorage,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    files: dict[str, Path] = {}
    for name in ("old", "fresh", "waiting", "older", "gone"):
        files[name] = settings.storage_dir / str(user) / name
        files[name].parent.mkdir(parents=True, exist_ok=True)
        files[name].touch()
    files["gone"].unlink()
    for name, status, age in [
        ("old", "completed", 30),
        ("older", "failed", 40),
        ("gone", "cancelled", 40),
        ("fresh", "completed", 30),
        ("fresh", "completed", 1),
        ("waiting", "completed", 30),
        ("waiting", "todo", 0),
    ]:
        add_job(conn, user, status, age, f"{user}/{name}")
    keep = settings.model_copy(update={"keep_audio_days": 10})
    assert (await retention.prune(pool, storage, keep))["audio"] == 2
    assert {name for name, path in files.items() if path.exists()} == {"fresh", "waiting"}
    assert (await retention.prune(pool, storage, keep))["audio"] == 0
    assert len(statuses(conn)) == 7, "the jobs stay"


async def test_audio_that_cannot_be_deleted_keeps_no_other_audio(
    conn: psycopg.Connection, user: UUID, pool: Pool, storage: LocalStorage, settings: Settings
) -> None:
    folder = settings.storage_dir / str(user)
    (folder / "a folder by mistake").mkdir(parents=True)
    (folder / "file").touch()
    for name in ("a folder by mistake", "file"):
        add_job(conn, user, "completed", 30, f"{user}/{name}")
    keep = settings.model_copy(update={"keep_audio_days": 10})
    assert (await retention.prune(pool, storage, keep))["audio"] == 1
    assert [path.name for path in folder.iterdir()] == ["a folder by mistake"]


async def test_nothing_is_deleted_by_default_but_queue_jobs(
    conn: psycopg.Connection, user: UUID, pool: Pool, storage: LocalStorage, settings: Settings
) -> None:
    add_job(conn, user, "failed", 4000)
    pruned = await retention.prune(pool, storage, settings)
    assert pruned == {"queue_jobs": 1, "webhook_deliveries": 0}
    assert statuses(conn) == ["failed"]
