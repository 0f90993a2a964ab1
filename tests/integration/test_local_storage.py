"""Links of ours to local audio, over the routes that serve them."""

import logging
import resource
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import jwt
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from jobs.errors import (
    AudioNotFound,
    FileExists,
    InvalidInput,
    LinkInvalid,
    PgscribeError,
    SettingsError,
    StorageUnavailable,
    UploadTooLarge,
)
from jobs.settings import Settings
from jobs.storage.base import RESUMABLE_ABOVE
from jobs.storage.choose import make_storage
from jobs.storage.links import DownloadGrant, LinkSigner, ResumableGrant, UploadGrant
from jobs.storage.local import LocalStorage, served_type
from jobs.storage.supabase import SupabaseStorage
from tests.folders import files_in
from web import problems
from web.access_log import HideLinks
from web.routes import uploads

pytestmark = pytest.mark.anyio

SECRET = "a secret of thirty-two characters or more"
USER = str(uuid4())
PATH = f"{USER}/{uuid4()}/talk.mp3"
SOUND = bytes(range(256)) * 40


async def one(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "audio", max_bytes=20_000, links=LinkSigner(SECRET))


@pytest.fixture
def app(storage: LocalStorage) -> Starlette:
    app = Starlette(
        routes=[
            Route(e.path, e.respond, methods=[e.method])
            for e in uploads.endpoint.all
            if "{token}" in e.path
        ],
        exception_handlers={PgscribeError: problems.on_pgscribe_error},
    )
    app.state.storage = storage
    return app


@pytest.fixture
def api(app: Starlette) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def files(tmp_path: Path) -> list[str]:
    return [path.name for path in files_in(tmp_path)]


async def test_a_ticket_uploads_one_file_once(
    storage: LocalStorage, api: TestClient, tmp_path: Path
) -> None:
    ticket = await storage.sign_upload(PATH, content_type="audio/mpeg", size=len(SOUND))
    assert (ticket.method, ticket.file_path) == ("PUT", PATH)
    assert ticket.headers == {"Content-Type": "audio/mpeg"}
    assert 7000 < (ticket.expires_at - datetime.now(UTC)).total_seconds() <= 7200
    answer = api.put(ticket.url, content=SOUND, headers=ticket.headers)
    assert (answer.status_code, answer.json()) == (201, {"filePath": PATH, "size": len(SOUND)})
    assert await storage.size(PATH) == len(SOUND)
    again = api.put(ticket.url, content=b"other")
    assert (again.status_code, again.json()["code"]) == (409, "file_exists")
    assert (await storage.path(PATH)).read_bytes() == SOUND
    assert files(tmp_path) == ["talk.mp3"]


async def test_of_two_uploads_to_one_path_one_wins(storage: LocalStorage, tmp_path: Path) -> None:
    """Also where both have begun before either was there."""

    async def late() -> AsyncIterator[bytes]:
        yield b"late"
        await storage.save(PATH, one(b"first"), replace=False)

    with pytest.raises(FileExists):
        await storage.save(PATH, late(), replace=False)
    assert (await storage.path(PATH)).read_bytes() == b"first"
    assert files(tmp_path) == ["talk.mp3"], "what lost is gone"


async def test_limits_hold_while_bytes_come(
    storage: LocalStorage, api: TestClient, tmp_path: Path
) -> None:
    ticket = await storage.sign_upload(PATH, content_type="audio/mpeg", size=100)
    announced = api.put(ticket.url, content=bytes(101))
    assert (announced.status_code, announced.json()["code"]) == (413, "upload_too_large")
    assert "101" in announced.json()["detail"]
    streamed = api.put(ticket.url, content=iter([bytes(60), bytes(60)]))
    assert (streamed.status_code, streamed.json()["code"]) == (413, "upload_too_large")
    empty = api.put(ticket.url, content=b"")
    assert (empty.status_code, empty.json()["code"]) == (422, "invalid_input")
    assert files(tmp_path) == []
    assert api.put(ticket.url, content=bytes(100)).status_code == 201
    with pytest.raises(UploadTooLarge, match="limit is 20000"):
        await storage.sign_upload(PATH, content_type="audio/mpeg", size=20_001)
    with pytest.raises(InvalidInput):
        await storage.sign_upload(PATH, content_type="audio/mpeg", size=0)


async def test_players_seek(storage: LocalStorage, api: TestClient) -> None:
    await storage.save(PATH, one(SOUND))
    url = await storage.sign_download(PATH, seconds=60)
    whole = api.get(url)
    assert (whole.status_code, whole.content) == (200, SOUND)
    assert whole.headers["content-type"] == "audio/mpeg"
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["content-disposition"] == 'inline; filename="talk.mp3"'
    assert whole.headers["cache-control"].startswith("private")
    head = api.head(url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(SOUND))
    part = api.get(url, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, SOUND[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(SOUND)}"
    rest = api.get(url, headers={"Range": "bytes=10000-"})
    assert (rest.status_code, rest.content) == (206, SOUND[10000:])
    last = api.get(url, headers={"Range": "bytes=-5"})
    assert (last.status_code, last.content) == (206, SOUND[-5:])
    both = api.get(url, headers={"Range": "bytes=0-9,20-29"})
    assert both.status_code == 206
    assert both.headers["content-type"].startswith("multipart/byteranges")
    beyond = api.get(url, headers={"Range": f"bytes={len(SOUND)}-"})
    assert beyond.status_code == 416
    assert beyond.headers["content-range"] == f"bytes */{len(SOUND)}"
    fresh = api.get(url, headers={"Range": "bytes=0-9", "If-Range": whole.headers["etag"]})
    assert (fresh.status_code, fresh.content) == (206, SOUND[:10])
    stale = api.get(url, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (stale.status_code, stale.content) == (200, SOUND)


async def test_files_are_saved_under_a_name(storage: LocalStorage, api: TestClient) -> None:
    await storage.save(PATH, one(SOUND))
    url = await storage.sign_download(PATH, seconds=60, download_name='Gespräch "1"\r\nX: y.mp3')
    disposition = api.get(url).headers["content-disposition"]
    assert disposition.startswith("attachment; filename*=utf-8''Gespr%C3%A4ch")
    assert "\r" not in disposition


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.MP3", "audio/mpeg"), ("a.m4a", "audio/mp4"), ("a.webm", "video/webm"),
     ("a.html", "application/octet-stream"), ("a.svg", "application/octet-stream"),
     ("a.js", "application/octet-stream"), ("a.mp3.html", "application/octet-stream"),
     ("a", "application/octet-stream"), ("a.pdf", "application/octet-stream")],
)  # fmt: skip
async def test_nothing_is_served_as_a_page(
    name: str, kind: str, storage: LocalStorage, api: TestClient
) -> None:
    assert served_type(name) == kind
    await storage.save(f"{USER}/{name}", one(b"<script>alert(1)</script>"), "text/html")
    answer = api.get(await storage.sign_download(f"{USER}/{name}", seconds=60))
    assert answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_links_are_for_one_use_and_time(storage: LocalStorage, api: TestClient) -> None:
    await storage.save(PATH, one(SOUND))
    download = (await storage.sign_download(PATH, seconds=60)).removeprefix("/audio/")
    ticket = await storage.sign_upload(f"{USER}/b", content_type="audio/mpeg", size=9)
    upload = ticket.url.removeprefix("/uploads/signed/")
    claims = jwt.decode(download, options={"verify_signature": False})
    user_token = jwt.encode(
        {"sub": USER, "aud": "authenticated", "exp": int(time.time()) + 60}, SECRET, "HS256"
    )
    by_the_secret = jwt.encode(claims, SECRET, "HS256")
    unsigned = jwt.encode(claims, "", "none")
    other_path = LinkSigner(SECRET + "x").sign_download(
        DownloadGrant(PATH, None), expires_at=int(time.time()) + 60
    )
    expired = LinkSigner(SECRET).sign_download(DownloadGrant(PATH, None), expires_at=1)
    for bad in (upload, user_token, by_the_secret, unsigned, other_path, expired, "x", "é"):
        answer = api.get(f"/audio/{bad}")
        assert (answer.status_code, answer.json()["code"]) == (403, "link_invalid"), bad
    expired = LinkSigner(SECRET).sign_upload(UploadGrant("a/b", 9, "audio/wav"), expires_at=1)
    for bad in (download, user_token, by_the_secret, unsigned, expired, "x"):
        answer = api.put(f"/uploads/signed/{bad}", content=b"x")
        assert (answer.status_code, answer.json()["code"]) == (403, "link_invalid"), bad
    for token in (download, upload):
        with pytest.raises(jwt.InvalidTokenError):  # as the API checks users' tokens
            jwt.decode(token, SECRET, algorithms=["HS256"], options={"verify_aud": False})
    assert storage.verify_download_token(download) == DownloadGrant(PATH, None)
    assert storage.verify_upload_token(upload) == UploadGrant(f"{USER}/b", 9, "audio/mpeg")


async def test_what_is_not_there(storage: LocalStorage, api: TestClient, tmp_path: Path) -> None:
    with pytest.raises(AudioNotFound):
        await storage.sign_download(PATH, seconds=60)
    await storage.save(PATH, one(SOUND))
    url = await storage.sign_download(PATH, seconds=60)
    await storage.delete(PATH)
    assert api.get(url).json()["code"] == "file_not_found"
    (tmp_path / "outside").write_text("secret")
    for path in ("../outside", "/etc/passwd", "a/../../outside", "", ".", "a\0b", USER):
        assert await storage.size(path) is None
        with pytest.raises(AudioNotFound):
            await storage.locate(path)
        with pytest.raises((AudioNotFound, OSError)):
            await storage.save(path or "..", one(b"x"))


async def test_links_need_a_secret_and_a_local_storage(
    app: Starlette, api: TestClient, tmp_path: Path
) -> None:
    keyless = LocalStorage(tmp_path, max_bytes=9)
    with pytest.raises(SettingsError, match="JWT_SECRET"):
        await keyless.sign_upload(PATH, content_type="audio/mpeg", size=1)
    with pytest.raises(LinkInvalid):
        keyless.verify_upload_token("x")
    with pytest.raises(LinkInvalid):
        keyless.verify_download_token("x")
    app.state.storage = object()
    assert api.get("/audio/x").json()["code"] == "link_invalid"


def test_the_access_log_has_no_links(app: Starlette, caplog: pytest.LogCaptureFixture) -> None:
    """On a real server, whose access log has each request's path."""
    caplog.set_level(logging.INFO)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    started, startup = threading.Event(), server.startup

    async def start(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    hide = HideLinks()
    logging.getLogger("uvicorn.access").addFilter(hide)
    try:
        thread.start()
        assert started.wait(60)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        httpx2.get(f"{url}/audio/top-secret?x=1")
        httpx2.put(f"{url}/uploads/signed/top-secret", content=b"x")
        httpx2.head(f"{url}/uploads/resumable/top-secret")
        httpx2.get(f"{url}/app/sign-in/confirm?token_hash=top-secret&type=email")
        httpx2.get(f"{url}/other/path")
    finally:
        server.should_exit = True
        thread.join()
        logging.getLogger("uvicorn.access").removeFilter(hide)
    said = [r.getMessage() for r in caplog.records if r.name == "uvicorn.access"]
    assert len(said) == 5
    assert not any("top-secret" in line for line in said)
    assert "GET /audio/…?x=1" in said[0]
    assert "PUT /uploads/signed/… " in said[1]
    assert "HEAD /uploads/resumable/… " in said[2]
    assert "GET /app/sign-in/confirm?… " in said[3]
    assert "/other/path" in said[4]


# The storage that the settings name


async def test_the_settings_say_where_audio_lies(settings: Settings) -> None:
    storage = make_storage(settings)
    assert isinstance(storage, LocalStorage)
    await storage.save("a/b.mp3", one(b"x"))
    assert await storage.locate("a/b.mp3") == str(settings.storage_dir.resolve() / "a/b.mp3")
    assert (await storage.sign_download("a/b.mp3", seconds=9)).startswith("/audio/")
    await storage.aclose()


async def test_modal_reads_local_audio_by_a_public_link_or_not_at_all(settings: Settings) -> None:
    modal = settings.model_copy(update={"compute": "modal"})
    with pytest.raises(SettingsError, match="PGSCRIBE_PUBLIC_URL"):
        make_storage(modal)
    public = modal.model_copy(update={"public_url": "https://api.test/pgscribe/"})
    with pytest.raises(SettingsError, match="PGSCRIBE_JWT_SECRET"):
        make_storage(public.model_copy(update={"jwt_secret": None}))
    storage = make_storage(public)
    await storage.save("a/b.mp3", one(b"x"))
    located = await storage.locate("a/b.mp3")
    assert located.startswith("https://api.test/pgscribe/audio/ey")


@pytest.mark.parametrize("size", [100, RESUMABLE_ABOVE + 1])
async def test_clients_get_links_that_are_good_under_every_address(
    settings: Settings, size: int
) -> None:
    storage = make_storage(settings.model_copy(update={"public_url": "https://tunnel.test"}))
    await storage.save("a/b.mp3", one(b"x"))
    ticket = await storage.sign_upload("a/c.mp3", content_type="audio/mpeg", size=size)
    played = await storage.sign_download("a/b.mp3", seconds=9)
    for link in (ticket.url, played):
        assert link.startswith(("/uploads/", "/audio/")), "browsers take it for their own origin"


async def test_supabase_needs_a_url_and_a_key(settings: Settings) -> None:
    chosen: dict[str, Any] = {"storage": "supabase", "compute": "modal"}
    with pytest.raises(SettingsError, match="PGSCRIBE_SUPABASE_SECRET_KEY"):
        make_storage(settings.model_copy(update=chosen))
    loaded = Settings.load(
        database_url=settings.database_url,
        supabase_url="https://ref.supabase.co",
        supabase_secret_key="sb_secret_1",
        **chosen,
    )
    assert "sb_secret_1" not in repr(loaded)
    storage = make_storage(loaded)
    assert isinstance(storage, SupabaseStorage)
    await storage.aclose()


@pytest.mark.parametrize("url", ["ref.supabase.co", "https://u:p@ref.supabase.co", "https://a/b"])
def test_urls_that_are_no_project(url: str, settings: Settings) -> None:
    with pytest.raises(SettingsError, match="PGSCRIBE_SUPABASE_URL"):
        Settings.load(database_url=settings.database_url, supabase_url=url)


async def test_size_follows_no_link_out(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "audio").mkdir(exist_ok=True)
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "audio" / "link").symlink_to(tmp_path / "outside")
    assert await storage.size("link") is None
    with pytest.raises(AudioNotFound):
        await storage.path("link")


async def test_a_disk_that_takes_nothing_is_in_the_log_and_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "audio").write_text("no folder")
    storage = LocalStorage(tmp_path / "audio", max_bytes=20_000, links=LinkSigner(SECRET))
    with pytest.raises(StorageUnavailable, match="try again"):
        await storage.save(PATH, one(SOUND))
    with pytest.raises(StorageUnavailable):
        await storage.begin_upload(ResumableGrant(PATH, len(SOUND), int(time.time()) + 60))
    said = f"PGSCRIBE_STORAGE_DIR can't be written to: [Errno 20] Not a directory: '{tmp_path}"
    assert [line.startswith(said) for line in caplog.messages] == [True, True]
    # What is not of the disk goes on as it is.
    gone = ConnectionResetError(104, "the client is gone")

    async def breaks_off() -> AsyncIterator[bytes]:
        yield SOUND
        raise gone

    storage = LocalStorage(tmp_path / "other", max_bytes=20_000)
    with pytest.raises(ConnectionResetError):
        await storage.save(PATH, breaks_off())
    assert files_in(tmp_path / "other") == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Refuse what would make a file of this process longer, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_what_a_full_disk_took_of_an_upload_is_deleted_or_goes_on(
    storage: LocalStorage, tmp_path: Path
) -> None:
    grant = ResumableGrant(PATH, len(SOUND), int(time.time()) + 60)
    with files_of_at_most(8192):
        with pytest.raises(StorageUnavailable):
            await storage.save(PATH, one(SOUND))
        assert files_in(tmp_path) == []
        await storage.begin_upload(grant)
        with pytest.raises(StorageUnavailable):
            await storage.append(grant, 0, one(SOUND))
    assert await storage.upload_offset(grant) == 8192
    assert await storage.append(grant, 8192, one(SOUND[8192:])) == len(SOUND)
    assert (await storage.path(PATH)).read_bytes() == SOUND
    (tmp_path / "audio").rename(tmp_path / "gone")
    (tmp_path / "audio").write_text("no folder")
    with pytest.raises(StorageUnavailable):
        await storage.upload_offset(grant)
