"""Supabase Storage through the real client, over real sockets, against a server of our own."""

import io
import logging
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import pytest

from jobs.errors import (
    AudioNotFound,
    FileExists,
    InvalidInput,
    PgscribeError,
    StorageRefused,
    StorageUnavailable,
    UploadTooLarge,
)
from jobs.storage import supabase as module
from jobs.storage import tus
from jobs.storage.base import TUS_CHUNK
from jobs.storage.supabase import SupabaseStorage
from tests.supabase_storage.conftest import make
from tests.supabase_storage.server import Fault, FaultKind, StandIn, StoredObject, pieces

pytestmark = pytest.mark.anyio

USER = str(uuid4())
PATH = f"{USER}/{uuid4()}/talk (1).mp3"
SMALL = b"sound" * 1000
LARGE = bytes(range(256)) * 70_000  # 17.9 MB: three chunks


async def test_a_small_file_is_stored_and_played_in_ranges(
    storage: SupabaseStorage, server: StandIn
) -> None:
    assert await storage.size(PATH) is None
    assert await storage.save(PATH, pieces(SMALL)) == len(SMALL)
    assert server.object(PATH).data == SMALL
    assert server.object(PATH).content_type == "audio/mpeg"
    assert await storage.size(PATH) == len(SMALL)
    url = await storage.locate(PATH)
    async with httpx2.AsyncClient() as client:
        whole = await client.get(url)
        part = await client.get(url, headers={"Range": "bytes=5-9"})
        beyond = await client.get(url, headers={"Range": "bytes=9999999-"})
    assert (whole.status_code, whole.content) == (200, SMALL)
    assert (part.status_code, part.content) == (206, SMALL[5:10])
    assert part.headers["content-range"] == f"bytes 5-9/{len(SMALL)}"
    assert beyond.status_code == 416
    assert await storage.delete(PATH) is True
    assert await storage.delete(PATH) is False
    assert await storage.size(PATH) is None


async def test_a_large_file_goes_in_chunks(storage: SupabaseStorage, server: StandIn) -> None:
    assert await storage.save(PATH, pieces(LARGE), "audio/flac") == len(LARGE)
    assert server.object(PATH).data == LARGE
    assert server.object(PATH).content_type == "audio/flac"
    assert server.count("PATCH", "/upload/resumable/") == 3
    assert server.largest_body == TUS_CHUNK


async def test_the_key_goes_to_the_project_only(storage: SupabaseStorage, server: StandIn) -> None:
    """The server names another host as the place of the upload: nothing is sent there."""
    await storage.save(PATH, pieces(LARGE))
    hosts = {headers["host"] for _, _, headers in server.requests}
    assert hosts == {urlsplit(server.url).netloc}


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_what_is_there_is_replaced_only_if_it_may_be(
    data: bytes, storage: SupabaseStorage, server: StandIn
) -> None:
    server.buckets["audio"].objects[PATH] = StoredObject(b"before", "audio/mpeg")
    with pytest.raises(FileExists):
        await storage.save(PATH, pieces(data), replace=False)
    assert server.object(PATH).data == b"before"
    await storage.save(PATH, pieces(data))
    assert server.object(PATH).data == data


@pytest.mark.parametrize("kind", ["503", "500", "429", "cut", "cut after", "html"])
@pytest.mark.parametrize("method", ["POST", "PATCH"])
async def test_a_large_upload_goes_on_after_a_fault(
    method: str, kind: FaultKind, storage: SupabaseStorage, server: StandIn
) -> None:
    server.faults.append(Fault(method, "/upload/resumable", kind))
    await storage.save(PATH, pieces(LARGE))
    assert server.object(PATH).data == LARGE
    assert server.faults == []


async def test_a_lost_last_answer_is_asked_for(storage: SupabaseStorage, server: StandIn) -> None:
    server.faults += [Fault("PATCH", "/upload/resumable", "cut after") for _ in range(3)]
    await storage.save(PATH, pieces(LARGE), replace=False)
    assert server.object(PATH).data == LARGE
    assert server.count("POST", "/upload/resumable") == 1, "nothing is sent twice"


async def test_an_expired_upload_begins_again(storage: SupabaseStorage, server: StandIn) -> None:
    server.faults.append(Fault("PATCH", "/upload/resumable", "gone"))
    await storage.save(PATH, pieces(LARGE))
    assert server.object(PATH).data == LARGE
    assert server.count("POST", "/upload/resumable") == 2


async def test_a_large_upload_gives_up(storage: SupabaseStorage, server: StandIn) -> None:
    server.faults += [Fault("PATCH", "/upload/resumable", "503") for _ in range(tus.TRIES)]
    with pytest.raises(StorageUnavailable):
        await storage.save(PATH, pieces(LARGE))
    server.faults += [Fault("PATCH", "/upload/resumable", "gone") for _ in range(tus.TRIES)]
    with pytest.raises(StorageUnavailable):
        await storage.save(PATH, pieces(LARGE))
    assert PATH not in server.buckets["audio"].objects


async def test_a_server_that_does_not_answer(
    storage: SupabaseStorage, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.1)
    server.faults += [Fault("GET", "/object/info", "slow") for _ in range(module.TRIES)]
    with pytest.raises(StorageUnavailable) as caught:
        await storage.size(PATH)
    assert caught.value.retryable
    assert await storage.size(PATH) is None, "it is there again"


async def test_a_server_that_is_not_there(server: StandIn, tmp_path: Path) -> None:
    server.url = "http://127.0.0.1:9"
    storage = make(server, tmp_path)
    for act in (
        storage.locate(PATH),
        storage.size(PATH),
        storage.delete(PATH),
        storage.save(PATH, pieces(SMALL)),
        storage.save(PATH, pieces(LARGE)),
        storage.sign_upload(PATH, content_type="audio/mpeg", size=1),
    ):
        with pytest.raises(StorageUnavailable) as caught:
            await act
        assert caught.value.code == "storage_unavailable"
    await storage.aclose()


@pytest.mark.parametrize("kind", ["503", "429", "html", "cut after"])
async def test_small_requests_are_repeated(
    kind: FaultKind, storage: SupabaseStorage, server: StandIn
) -> None:
    await storage.save(PATH, pieces(SMALL))
    server.faults += [Fault("POST", "/object/sign", kind), Fault("GET", "/object/info", kind)]
    assert "token=" in await storage.locate(PATH)
    assert await storage.size(PATH) == len(SMALL)
    assert server.faults == []


@pytest.mark.parametrize("size", [3_000_000, 12_000_000])
async def test_what_the_bucket_finds_too_large(
    size: int, storage: SupabaseStorage, server: StandIn
) -> None:
    """Afterwards the connection is not used again: it hangs."""
    server.buckets["audio"].file_size_limit = 2_000_000
    with pytest.raises(UploadTooLarge, match="project's limit"):
        await storage.save(PATH, pieces(bytes(size)))
    assert await storage.size(PATH) is None


async def test_the_stand_in_hangs_as_the_real_one_does(server: StandIn) -> None:
    server.buckets["audio"].file_size_limit = 1
    headers = {"Authorization": f"Bearer {server.secret_key}", "Content-Type": "audio/mpeg"}
    url = f"{server.url}/storage/v1/object/audio/{USER}/a.mp3"
    async with httpx2.AsyncClient(headers=headers, timeout=1) as client:
        assert (await client.post(url, content=SMALL)).json()["statusCode"] == "413"
        with pytest.raises(httpx2.ReadTimeout):
            await client.post(url, content=SMALL)


async def test_own_limits_come_first(server: StandIn, tmp_path: Path) -> None:
    storage = make(server, tmp_path, max_bytes=10)
    with pytest.raises(UploadTooLarge, match="10 bytes"):
        await storage.save(PATH, pieces(SMALL))
    with pytest.raises(UploadTooLarge, match="limit is 10"):
        await storage.sign_upload(PATH, content_type="audio/mpeg", size=11)
    with pytest.raises(InvalidInput, match="size"):
        await storage.sign_upload(PATH, content_type="audio/mpeg", size=0)
    with pytest.raises(InvalidInput, match="empty"):
        await storage.save(PATH, pieces(b""))
    assert server.requests == []
    await storage.aclose()


@pytest.mark.parametrize(
    "path", ["u/hörspiel.mp3", "u/../v/a.mp3", "u//a.mp3", "u/a%2e.mp3", "u/a?"]
)
async def test_names_that_storage_refuses(path: str, storage: SupabaseStorage) -> None:
    for act in (
        storage.save(path, pieces(SMALL)),
        storage.sign_upload(path, content_type="audio/mpeg", size=1),
    ):
        with pytest.raises(InvalidInput, match="file_path"):
            await act


async def test_what_is_not_there(storage: SupabaseStorage) -> None:
    for path in (PATH, "u/hörspiel.mp3"):
        with pytest.raises(AudioNotFound):
            await storage.locate(path)
        assert await storage.size(path) is None
        assert await storage.delete(path) is False


async def test_without_a_bucket(storage: SupabaseStorage, server: StandIn) -> None:
    server.buckets.clear()
    with pytest.raises(StorageRefused, match="setup-storage"):
        await storage.save(PATH, pieces(SMALL))


async def test_no_secret_is_said_or_logged(
    server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sb_secret_of_somebody_else"
    storage = make(server, tmp_path, key=key)
    said: list[str] = []
    for act in (
        storage.locate(PATH),
        storage.save(PATH, pieces(SMALL)),
        storage.save(PATH, pieces(LARGE)),
        storage.delete(PATH),
    ):
        with pytest.raises(StorageRefused) as caught:
            await act
        said += [str(caught.value), repr(caught.value)]
    await storage.aclose()
    good = make(server, tmp_path)
    await good.save(PATH, pieces(SMALL))
    url = await good.locate(PATH)
    ticket = await good.sign_upload(f"{PATH}2.mp3", content_type="audio/mpeg", size=7_000_000)
    await good.aclose()
    said += [repr(ticket), repr(good), caplog.text]
    secrets = [key, server.secret_key, url.partition("token=")[2], ticket.headers["x-signature"]]
    assert not [secret for secret in secrets if secret in "\n".join(said)]


# Signed uploads, as clients do them


async def upload(ticket: Any, data: bytes, **headers: str) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.put(ticket.url, content=data, headers=ticket.headers | headers)


async def test_a_client_uploads_by_a_signed_url(storage: SupabaseStorage, server: StandIn) -> None:
    ticket = await storage.sign_upload(PATH, content_type="audio/wav", size=len(SMALL))
    assert (ticket.method, ticket.file_path, ticket.metadata) == ("PUT", PATH, None)
    assert (await upload(ticket, SMALL)).status_code == 200
    assert server.object(PATH).data == SMALL
    assert server.object(PATH).content_type == "audio/wav"
    again = await upload(ticket, b"other")
    assert again.json()["statusCode"] == "409", "a ticket overwrites nothing"
    assert server.object(PATH).data == SMALL
    with pytest.raises(FileExists):
        await storage.sign_upload(PATH, content_type="audio/wav", size=1)


async def test_a_ticket_is_for_its_path_and_time(storage: SupabaseStorage, server: StandIn) -> None:
    ticket = await storage.sign_upload(PATH, content_type="audio/wav", size=5)
    url = ticket.url.replace(".mp3", ".mp4")
    async with httpx2.AsyncClient() as client:
        assert (await client.put(url, content=SMALL)).json()["error"] == "InvalidSignature"
    server.signed_upload_seconds = -1
    expired = await storage.sign_upload(PATH, content_type="audio/wav", size=5)
    assert expired.expires_at < ticket.expires_at
    assert (await upload(expired, SMALL)).json()["error"] == "InvalidJWT"


async def test_a_client_uploads_a_large_file_resumably(
    storage: SupabaseStorage, server: StandIn
) -> None:
    """With the ticket alone: without a user's token, as any TUS client would."""
    ticket = await storage.sign_upload(PATH, content_type="audio/flac", size=len(LARGE))
    assert (ticket.method, ticket.chunk_size) == ("TUS", TUS_CHUNK)
    assert ticket.metadata == {
        "bucketName": "audio", "objectName": PATH, "contentType": "audio/flac",
    }  # fmt: skip
    assert server.secret_key not in str(ticket.headers)
    with io.BytesIO(LARGE) as file:
        client = tus.Upload(
            storage.http, ticket.url, ticket.headers, ticket.metadata, file, len(LARGE)
        )
        server.faults.append(Fault("PATCH", "/upload/resumable/sign", "cut"))
        assert await client.run()
    assert server.object(PATH).data == LARGE
    assert server.object(PATH).content_type == "audio/flac"


async def test_downloads_under_a_name_and_for_a_time(
    storage: SupabaseStorage, server: StandIn
) -> None:
    await storage.save(PATH, pieces(SMALL))
    async with httpx2.AsyncClient() as client:
        named = await storage.sign_download(PATH, seconds=60, download_name="talk & more.mp3")
        answer = await client.get(named)
        assert answer.headers["content-disposition"].endswith('filename="talk & more.mp3"')
        brief = server.sign(-1, url=f"audio/{PATH}", use="download")
        expired = named.replace(named.partition("token=")[2].partition("&")[0], brief)
        assert (await client.get(expired)).json()["error"] == "InvalidJWT"


async def test_types_that_the_bucket_takes(storage: SupabaseStorage, server: StandIn) -> None:
    for name, stated, stored in (
        ("a.bin", None, "audio/mpeg"),
        ("a.opus", "application/octet-stream", "audio/ogg"),
        ("a.mkv", "text/html", "video/x-matroska"),
        ("a.html", "text/html", "audio/mpeg"),
        ("a.x", "audio/x-own; rate=8000", "audio/x-own"),
    ):
        await storage.save(f"{USER}/{name}", pieces(SMALL), stated)
        assert server.object(f"{USER}/{name}").content_type == stored


def test_errors_have_stable_codes() -> None:
    errors: list[type[PgscribeError]] = [StorageUnavailable, StorageRefused, FileExists]
    assert [(e.code, e.retryable) for e in errors] == [
        ("storage_unavailable", True),
        ("storage_refused", False),
        ("file_exists", False),
    ]
