"""A job's audio comes from its URL into storage first: by the guard, once, and with its errors."""

import functools
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from jobs import database
from jobs.errors import (
    AudioNotFound,
    PgscribeError,
    StorageUnavailable,
    UploadTooLarge,
    UrlRefused,
    UrlUnavailable,
)
from jobs.fetching import Fetcher
from jobs.models import Transcript
from jobs.queue import Queue
from jobs.settings import Settings
from jobs.storage.base import AudioSource
from jobs.storage.local import LocalStorage
from jobs.transcription import Transcriber
from tests.integration.test_fetching import AUDIO, Server, ok, rules, serving, status
from tests.integration.test_transcription import TEXT, Case

pytestmark = pytest.mark.anyio


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        server.answers["/talk.mp3?sig=1"] = ok(AUDIO)
        yield server


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "audio", max_bytes=1_000_000)


@pytest.fixture
async def case(
    conn: psycopg.Connection, settings: Settings, user: UUID, server: Server
) -> AsyncIterator[Case]:
    conn.execute("alter table processing_jobs disable trigger guard_processing_job")
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'u/a.mp3') returning id",
        (user,),
    ).fetchone()
    assert row is not None
    # As `postgres`: who may set it is another matter.
    conn.execute(
        "update processing_jobs set audio_url = %s",
        (f"http://audio.test:{server.port}/talk.mp3?sig=1",),
    )
    queue = Queue(
        functools.partial(database.connect, settings, name="test"), max_attempts=9, stall_timeout=30
    )
    async with database.make_pool(settings, name="test") as pool:
        yield Case(conn, pool, queue, row[0])
    await queue.close()


async def run(
    case: Case, storage: AudioSource, server: Server, *, max_bytes: int = 1_000_000
) -> Transcript:
    fetch = Fetcher(max_bytes, 10, rules(server))
    transcriber = Transcriber(case.pool, storage, case.cloud, case.limits, fetch)
    return await transcriber.run(await case.claim(), is_cancelled=lambda: False)


def sources(case: Case) -> list[str]:
    return [str(getattr(request, "source", "")) for request in case.cloud.requests.values()][:1]


async def test_audio_is_fetched_into_storage_once(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    assert (await run(case, storage, server)).text == TEXT
    path = await storage.path("u/a.mp3")
    assert path.read_bytes() == AUDIO
    assert sources(case) == [str(path)]
    await case.lose()
    assert (await run(case, storage, server)).text == TEXT
    assert server.connections == 1


async def test_what_lies_in_storage_comes_first(
    case: Case, storage: LocalStorage, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "audio" / "u").mkdir(parents=True)
    (tmp_path / "audio" / "u" / "a.mp3").write_bytes(b"uploaded")
    await run(case, storage, server)
    assert server.connections == 0


async def test_a_failed_fetch_leaves_nothing_and_says_why(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    path = "/talk.mp3?sig=1"
    failures: list[tuple[bytes, type[PgscribeError], bool]] = [
        (status(404), UrlUnavailable, False),
        (status(503), UrlUnavailable, True),
        (ok(AUDIO)[:-1], UrlUnavailable, True),
        (ok(b""), UrlUnavailable, False),
        (ok(AUDIO, "Content-Encoding: gzip"), UrlRefused, False),
        (status(302, "Location: http://10.0.0.1/"), UrlRefused, False),
        (ok(bytes(2_000_000)), UploadTooLarge, False),
    ]
    for answer, error, retryable in failures:
        server.answers[path] = answer
        with pytest.raises(error) as caught:
            await run(case, storage, server)
        assert caught.value.retryable is retryable
        assert await storage.size("u/a.mp3") is None
        await case.lose()
    assert case.cloud.requests == {}, "no call was paid for"


async def test_the_guard_is_what_a_worker_has_by_default(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    case.conn.execute("update processing_jobs set audio_url = 'http://127.0.0.1/latest'")
    transcriber = Transcriber(case.pool, storage, case.cloud, case.limits)
    with pytest.raises(UrlRefused, match="public internet"):
        await transcriber.run(await case.claim(), is_cancelled=lambda: False)
    assert server.connections == 0


async def test_without_a_url_the_file_is_missing(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    case.conn.execute("update processing_jobs set audio_url = null")
    with pytest.raises(AudioNotFound):
        await run(case, storage, server)


async def test_a_database_without_the_column(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    """Workers of this version run before the migration that adds it."""
    case.conn.execute("alter table processing_jobs rename column audio_url to gone")
    with pytest.raises(AudioNotFound):
        await run(case, storage, server)


async def test_an_attempt_waits_for_a_storage_that_is_away(
    case: Case, storage: LocalStorage, server: Server
) -> None:
    away = [StorageUnavailable(), StorageUnavailable()]

    class Away(LocalStorage):
        async def locate(self, file_path: str) -> str:
            if away:
                raise away.pop()
            return await storage.locate(file_path)

    await storage.save("u/a.mp3", Fixed())
    assert (await run(case, Away(Path("/nowhere"), max_bytes=1), server)).text == TEXT
    assert away == []


class Fixed:
    """A stream of a few bytes."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"sound"
