"""Owners delete their jobs; the audio goes with them once nobody needs it."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from jobs import database, retention, service
from jobs.database import Pool, as_user
from jobs.errors import JobNotFound
from jobs.settings import Settings
from jobs.storage.local import LocalStorage

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]


@contextmanager
def acting_as(conn: psycopg.Connection, user: UUID, role: str = "authenticated") -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, json.dumps({"sub": str(user), "role": role})),
        )
        yield


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


class Desk:
    """Jobs with audio, and what is left of both."""

    def __init__(self, conn: psycopg.Connection, pool: Pool, folder: Path) -> None:
        self.conn = conn
        self._pool = pool
        self._folder = folder
        self.storage = LocalStorage(folder, max_bytes=100)

    def add(self, user: UUID, path: str) -> UUID:
        file = self._folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        row = self.conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
            (user, path),
        ).fetchone()
        assert row is not None
        job_id: UUID = row[0]
        return job_id

    def delete(self, job_id: UUID, *, keep_audio: bool = False) -> bool:
        row = self.conn.execute(
            "select delete_processing_job(%s, %s)", (job_id, keep_audio)
        ).fetchone()
        assert row is not None
        deleted: bool = row[0]
        return deleted

    def has(self, path: str) -> bool:
        return (self._folder / path).exists()

    async def clean_up(self) -> int:
        return await retention.delete_audio(self._pool, self.storage)

    def noted(self) -> int:
        row = self.conn.execute("select count(*) from pgscribe.audio_to_delete").fetchone()
        assert row is not None
        count: int = row[0]
        return count


@pytest.fixture
def desk(conn: psycopg.Connection, pool: Pool, tmp_path: Path) -> Desk:
    return Desk(conn, pool, tmp_path / "audio")


async def test_the_audio_goes_with_the_job(desk: Desk, user: UUID) -> None:
    job_id = desk.add(user, f"{user}/a.mp3")
    with acting_as(desk.conn, user):
        assert desk.delete(job_id)
        assert not desk.delete(job_id)
    assert await desk.clean_up() == 1
    assert not desk.has(f"{user}/a.mp3")
    assert await desk.clean_up() == desk.noted() == 0
    rows = desk.conn.execute("select from procrastinate.procrastinate_jobs").fetchall()
    assert rows == []


async def test_the_audio_can_be_kept(desk: Desk, user: UUID) -> None:
    job_id = desk.add(user, f"{user}/a.mp3")
    with acting_as(desk.conn, user):
        assert desk.delete(job_id, keep_audio=True)
    assert await desk.clean_up() == 0
    assert desk.has(f"{user}/a.mp3")


async def test_plain_deletes_keep_the_audio_also_after_a_call(desk: Desk, user: UUID) -> None:
    first, second = (desk.add(user, f"{user}/{name}") for name in "ab")
    with acting_as(desk.conn, user):
        desk.delete(first)
        desk.conn.execute("delete from processing_jobs where id = %s", (second,))
    assert await desk.clean_up() == 1
    assert desk.has(f"{user}/b")


async def test_audio_outside_the_owners_folder_stays(
    desk: Desk, user: UUID, make_user: MakeUser
) -> None:
    for path in ("shared/a.mp3", f"{make_user()}/a.mp3", f"{user}x/a.mp3"):
        job_id = desk.add(user, path)
        with acting_as(desk.conn, user):
            assert desk.delete(job_id)
        assert await desk.clean_up() == 0
        assert desk.has(path)


async def test_audio_that_another_job_names_stays_until_that_goes_too(
    desk: Desk, user: UUID, make_user: MakeUser
) -> None:
    path = f"{user}/a.mp3"
    first, second = desk.add(user, path), desk.add(make_user(), path)
    desk.delete(first)
    assert await desk.clean_up() == 0
    assert desk.has(path)
    desk.delete(second)  # it is in the other's folder
    assert await desk.clean_up() == 0
    desk.delete(desk.add(user, path))
    again = desk.add(user, path)
    assert await desk.clean_up() == 0
    assert desk.has(path), "a job that came meanwhile names it"
    desk.delete(again)
    assert await desk.clean_up() == 1
    assert not desk.has(path)


async def test_the_audio_of_a_running_job_goes_once_it_has_stopped(desk: Desk, user: UUID) -> None:
    path = f"{user}/a.mp3"
    job_id = desk.add(user, path)
    desk.conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    with acting_as(desk.conn, user):
        assert desk.delete(job_id)
    aborts = desk.conn.execute("select abort_requested from procrastinate.procrastinate_jobs")
    assert aborts.fetchall() == [(True,)]
    assert await desk.clean_up() == 0
    assert desk.has(path)
    desk.conn.execute("delete from procrastinate.procrastinate_jobs")  # as its worker does
    assert await desk.clean_up() == 1
    assert not desk.has(path)


async def test_what_cannot_be_deleted_is_tried_again_and_holds_up_nothing(
    desk: Desk, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "AUDIO_BATCH", 1)
    refusing = {f"{user}/a"}
    delete = desk.storage.delete

    async def refuse(path: str) -> bool:
        if path in refusing:
            raise PermissionError(path)
        return await delete(path)

    monkeypatch.setattr(desk.storage, "delete", refuse)
    for name in "ab":
        desk.delete(desk.add(user, f"{user}/{name}"))
    assert [await desk.clean_up() for _ in range(3)] == [0, 1, 0]
    assert desk.noted() == 1
    refusing.clear()
    assert await desk.clean_up() == 1


async def test_audio_that_is_gone_already_is_forgotten(desk: Desk, user: UUID) -> None:
    job_id = desk.add(user, f"{user}/a")
    await desk.storage.delete(f"{user}/a")
    desk.delete(job_id)
    await desk.clean_up()
    assert desk.noted() == 0


async def test_nobody_deletes_what_is_not_theirs(
    desk: Desk, user: UUID, make_user: MakeUser
) -> None:
    other = make_user()
    job_id = desk.add(other, f"{other}/a")
    with acting_as(desk.conn, user):
        assert not desk.delete(job_id)
        assert desk.conn.execute("delete from processing_jobs").rowcount == 0
    for statement in ("delete from processing_jobs", "select delete_processing_job(null)"):
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege),
            acting_as(desk.conn, user, "anon"),
        ):
            desk.conn.execute(statement.encode())
    with acting_as(desk.conn, user, "service_role"):
        assert desk.delete(job_id)
    assert await desk.clean_up() == 1


async def test_the_service_deletes(desk: Desk, user: UUID, pool: Pool) -> None:
    claims = {"sub": str(user), "role": "authenticated"}
    first, second = (desk.add(user, f"{user}/{name}") for name in "ab")
    async with as_user(pool, claims) as conn:
        await service.delete(conn, first, keep_audio=True)
        await service.delete(conn, second)
        for gone in (second, uuid4()):
            with pytest.raises(JobNotFound):
                await service.delete(conn, gone)
    assert await desk.clean_up() == 1
    assert desk.has(f"{user}/a")
