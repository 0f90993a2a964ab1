"""Uploads to local storage that break off and go on, on the real server."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import httpx2
import pytest
from starlette.testclient import TestClient

from jobs.client import AsyncJobClient, JobClient, Retries
from jobs.errors import FileExists, SettingsError
from jobs.settings import Settings
from jobs.storage import local, partial, tus
from jobs.storage.base import RESUMABLE_ABOVE, TUS_CHUNK
from jobs.storage.choose import make_storage
from jobs.storage.links import LinkSigner, ResumableGrant
from jobs.storage.local import LocalStorage
from tests import ports
from tests.folders import files_in
from tests.live import FaultyProxy, answer, proxied, serve
from web.app import create_app
from web.auth import issue_token

VERSION = {"Tus-Resumable": "1.0.0"}
BYTES = {"Content-Type": "application/offset+octet-stream"}
QUICK = Retries(attempts=4, seconds=30, first=0.01, longest=0.02)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let links be resumable above 1,000 bytes, in chunks of 1,000."""
    monkeypatch.setattr(local, "RESUMABLE_ABOVE", 1000)
    monkeypatch.setattr(local, "TUS_CHUNK", 1000)
    monkeypatch.setattr(tus, "TUS_CHUNK", 1000)


@pytest.fixture
def api(settings: Settings, small: None) -> Iterator[str]:  # noqa: ARG001
    with serve(create_app(settings)) as url:
        yield url


@pytest.fixture
def http(api: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=api, timeout=30) as client:
        yield client


@pytest.fixture
def token(settings: Settings, user: UUID) -> str:
    return issue_token(settings, user, lifetime=600)


@pytest.fixture
def storage(settings: Settings) -> LocalStorage:
    made = make_storage(settings, signs=True)
    assert isinstance(made, LocalStorage)
    return made


class Recording:
    """A recording of 2,500 bytes, and the link to upload it."""

    def __init__(
        self, http: httpx2.Client, token: str, storage_dir: Path, size: int = 2500
    ) -> None:
        self.http = http
        self.data = os.urandom(size)
        self.ticket = http.post(
            "/uploads",
            json={"name": "talk.mp3", "size": size},
            headers={"Authorization": f"Bearer {token}"},
        ).json()
        self.url: str = self.ticket["url"]
        self.stored = storage_dir / self.ticket["filePath"]
        self.partial = storage_dir / ".partial"

    def begin(self, **headers: str) -> httpx2.Response:
        length = {"Upload-Length": str(len(self.data))}
        return self.http.post(self.url, headers=VERSION | length | headers)

    def ask(self) -> httpx2.Response:
        return self.http.head(self.url, headers=VERSION)

    def send(
        self, offset: int, end: int | None = None, *, content: Any = None, **more: str
    ) -> httpx2.Response:
        headers = VERSION | BYTES | {"Upload-Offset": str(offset)} | more
        data = self.data[offset:end] if content is None else content
        return self.http.patch(self.url, content=data, headers=headers)

    def files(self) -> list[Path]:
        """Return what has arrived in part."""
        return files_in(self.partial)


@pytest.fixture
def recording(http: httpx2.Client, token: str, settings: Settings) -> Recording:
    return Recording(http, token, settings.storage_dir)


def code(response: httpx2.Response) -> tuple[int, str]:
    assert response.headers["tus-resumable"] == "1.0.0"
    return response.status_code, response.json()["code"]


# The protocol -----------------------------------------------------------------------------------


def test_large_files_are_resumable(http: httpx2.Client, token: str, storage: LocalStorage) -> None:
    def ticket(size: int) -> Any:
        body = {"name": "talk.mp3", "size": size}
        headers = {"Authorization": f"Bearer {token}"}
        return http.post("/uploads", json=body, headers=headers).json()

    assert ticket(1000)["method"] == "PUT"
    large = ticket(1001)
    assert (large["method"], large["chunkSize"], large["headers"]) == ("TUS", 1000, {})
    grant = storage.verify_resumable_token(large["url"].rpartition("/")[2])
    assert (grant.file_path, grant.size) == (large["filePath"], 1001)
    assert 86_000 < grant.expires_at - time.time() <= 86_400


def test_a_file_arrives_in_pieces(recording: Recording) -> None:
    begun = recording.begin()
    assert (begun.status_code, begun.headers["location"]) == (201, recording.url.rpartition("/")[2])
    assert begun.headers["upload-expires"].endswith("GMT")
    for offset in (0, 1000, 2000):
        asked = recording.ask()
        assert (asked.status_code, asked.headers["upload-offset"]) == (200, str(offset))
        assert (asked.headers["upload-length"], asked.headers["cache-control"]) == (
            "2500",
            "no-store",
        )
        assert not recording.stored.exists(), "it has its name only when it is whole"
        sent = recording.send(offset, offset + 1000)
        assert (sent.status_code, sent.headers["tus-resumable"]) == (204, "1.0.0")
        assert sent.headers["upload-offset"] == str(min(offset + 1000, 2500))
    assert recording.stored.read_bytes() == recording.data
    assert recording.files() == []
    assert recording.ask().headers["upload-offset"] == "2500", "done"
    assert code(recording.begin()) == (409, "file_exists")
    assert code(recording.send(0)) == (409, "offset_conflict")


def test_what_is_wrong_is_refused(recording: Recording) -> None:
    assert code(recording.send(0)) == (410, "upload_gone")
    assert recording.ask().status_code == 410
    for other in ({"Tus-Resumable": "0.2.2"}, {"Tus-Resumable": "", "Upload-Length": "x"}):
        refused = recording.begin(**other)
        assert code(refused) == (412, "unsupported_version")
        assert refused.headers["tus-version"] == "1.0.0"
    assert code(recording.begin(**{"Upload-Length": "2501"})) == (413, "upload_too_large")
    for length in ("2499", "0", "-1", "x"):
        refused = recording.begin(**{"Upload-Length": length})
        assert code(refused) == (422, "invalid_input")
        assert refused.json()["field"] == "Upload-Length"
    assert recording.files() == []
    assert recording.begin().status_code == 201
    assert code(recording.send(1)) == (409, "offset_conflict")
    assert code(recording.send(2501, content=b"")) == (409, "offset_conflict")
    assert code(recording.send(0, None, **{"Content-Type": "audio/mpeg"})) == (
        415,
        "unsupported_media_type",
    )
    assert code(recording.send(0, None, **{"Upload-Offset": "x"})) == (422, "invalid_input")
    assert code(recording.send(0, content=bytes(2501))) == (413, "upload_too_large")
    streamed = recording.send(0, content=iter([bytes(2000), bytes(501)]))
    assert code(streamed) == (413, "upload_too_large")
    assert int(recording.ask().headers["upload-offset"]) <= 2500
    assert not recording.stored.exists()


def test_only_its_own_link_leads_to_an_upload(
    recording: Recording, settings: Settings, http: httpx2.Client
) -> None:
    recording.begin()
    signer = LinkSigner(settings.require_jwt_secret())
    expired = signer.sign_resumable(ResumableGrant(recording.ticket["filePath"], 2500, 1))
    for method in ("POST", "HEAD", "PATCH", "DELETE"):
        headers = VERSION | BYTES | {"Upload-Length": "2500", "Upload-Offset": "0"}
        gone = http.request(method, f"/uploads/resumable/{expired}", headers=headers)
        assert (gone.status_code, gone.headers["tus-resumable"]) == (410, "1.0.0")
        forged = http.request(method, f"{recording.url[:-9]}x", headers=headers)
        assert forged.status_code == 403
    link = recording.url.rpartition("/")[2]
    assert http.put(f"/uploads/signed/{link}", content=b"x").status_code == 403
    assert http.get(f"/audio/{link}").status_code == 403


def test_what_there_is_of_tus_can_be_asked(recording: Recording, settings: Settings) -> None:
    options = recording.http.options(recording.url)
    assert (options.status_code, options.headers["tus-version"]) == (204, "1.0.0")
    assert options.headers["tus-extension"] == "creation,expiration,termination"
    assert options.headers["tus-max-size"] == str(settings.max_upload_bytes)


def test_pages_of_other_origins_may_upload(settings: Settings) -> None:
    origin = {"Origin": "https://app.example.org"}
    known = settings.model_copy(update={"cors_origins": ("https://app.example.org",)})
    with TestClient(create_app(known)) as api:
        for method in ("HEAD", "PATCH", "POST"):
            asked = "tus-resumable,upload-offset,upload-length,upload-metadata,content-type"
            preflight = api.options(
                "/uploads/resumable/x",
                headers=origin
                | {
                    "Access-Control-Request-Method": method,
                    "Access-Control-Request-Headers": asked,
                },
            )
            assert preflight.status_code == 200, preflight.text
        refused = api.head("/uploads/resumable/x", headers=origin | VERSION)
        exposed = refused.headers["access-control-expose-headers"].lower()
        for name in ("location", "upload-offset", "upload-length", "tus-resumable"):
            assert name in exposed.split(", ")


# What may go wrong ------------------------------------------------------------------------------


def test_a_lost_answer_to_the_creation_costs_nothing(recording: Recording) -> None:
    recording.begin()
    recording.send(0, 1000)
    assert recording.begin().status_code == 201
    assert recording.ask().headers["upload-offset"] == "1000"
    assert len(recording.files()) == 1


def test_it_replaces_nothing(recording: Recording) -> None:
    recording.begin()
    recording.send(0, 2000)
    recording.stored.parent.mkdir(parents=True)
    recording.stored.write_bytes(b"another")
    assert code(recording.send(2000)) == (409, "file_exists")
    assert recording.stored.read_bytes() == b"another"
    assert recording.files() == []
    assert recording.ask().status_code == 409


@contextmanager
def patching(recording: Recording, offset: int, announced: int) -> Iterator[socket.socket]:
    """Yield a connection on which the bytes of a PATCH may be sent."""
    host = urlsplit(str(recording.http.base_url))
    assert host.port is not None
    with socket.create_connection(("127.0.0.1", host.port)) as connection:
        head = {"Host": "test", "Upload-Offset": str(offset), "Content-Length": str(announced)}
        lines = "".join(f"{k}: {v}\r\n" for k, v in (VERSION | BYTES | head).items())
        connection.sendall(f"PATCH {recording.url} HTTP/1.1\r\n{lines}\r\n".encode())
        yield connection


def arrived(recording: Recording, size: int) -> None:
    """Wait until so much of it has arrived."""
    deadline = time.monotonic() + 20
    while (reached := int(recording.ask().headers["upload-offset"])) != size:
        assert time.monotonic() < deadline, reached


def test_what_arrived_before_the_client_went_away_stays(recording: Recording) -> None:
    recording.begin()
    with patching(recording, 0, 2500) as connection:
        connection.sendall(recording.data[:1234])
        arrived(recording, 1234)
    arrived(recording, 1234)
    sent = when_free(lambda: recording.send(1234))
    assert sent.status_code == 204
    assert recording.stored.read_bytes() == recording.data


def when_free(send: Callable[[], httpx2.Response]) -> httpx2.Response:
    """Send it once the server has noticed that the one before is gone."""
    deadline = time.monotonic() + 20
    while (sent := send()).status_code == 423:
        assert time.monotonic() < deadline
    return sent


def test_two_at_a_time_do_no_harm(recording: Recording) -> None:
    recording.begin()
    with patching(recording, 0, 2500) as connection:
        connection.sendall(recording.data[:100])
        arrived(recording, 100)
        locked = recording.send(100)
        assert code(locked) == (423, "upload_locked")
        assert locked.headers["retry-after"] == "3"
        connection.sendall(recording.data[100:])
        assert connection.recv(100).startswith(b"HTTP/1.1 204")
    assert recording.stored.read_bytes() == recording.data


def test_many_at_a_time_do_no_harm(recording: Recording) -> None:
    """They all send the same bytes, from wherever it is, until all has arrived."""
    recording.begin()

    def send_all(_: int) -> set[int]:
        seen: set[int] = set()
        while True:
            asked = recording.ask()
            if asked.status_code == 423:  # somebody gives it its name just now
                continue
            offset = int(asked.headers["upload-offset"])
            if offset == 2500:
                return seen
            seen.add(recording.send(offset, offset + 10).status_code)

    with ThreadPoolExecutor(4) as threads:
        seen = set().union(*threads.map(send_all, range(4)))
    assert seen <= {204, 409, 423}
    assert recording.stored.read_bytes() == recording.data
    assert recording.files() == []


def test_a_client_that_is_gone_without_a_word_holds_nothing_up(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording.begin()
    with patching(recording, 0, 2500) as connection:
        monkeypatch.setattr(local, "SILENCE", 1)
        connection.sendall(recording.data[:100])
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        monkeypatch.setattr(local, "SILENCE", 10)
        assert recording.send(100).status_code == 204
    assert recording.stored.read_bytes() == recording.data


SERVER = """
import sys
import uvicorn
from jobs.settings import Settings
from jobs.storage import local
from web.app import create_app

local.RESUMABLE_ABOVE = local.TUS_CHUNK = 1000
uvicorn.run(create_app(Settings.load()), port=int(sys.argv[1]), log_level="warning")
"""


@contextmanager
def killable(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": str(settings.database_url),
        "PGSCRIBE_JWT_SECRET": settings.require_jwt_secret(),
        "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
    }
    with (
        ports.reserved() as port,
        subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment) as process,
    ):
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx2.get(f"{url}/healthz").status_code == 200
        except httpx2.TransportError:
            assert time.monotonic() < deadline
        else:
            return


def test_what_has_arrived_survives_kill_9(settings: Settings, token: str) -> None:
    with killable(settings) as (process, url), httpx2.Client(base_url=url) as http:
        wait_for(url)
        recording = Recording(http, token, settings.storage_dir)
        recording.begin()
        recording.send(0, 500)
        with patching(recording, 500, 2000) as connection:
            connection.sendall(recording.data[500:777])
            arrived(recording, 777)
            process.send_signal(signal.SIGKILL)
            process.wait()
    with killable(settings) as (_, url), httpx2.Client(base_url=url) as http:
        wait_for(url)
        recording.http = http
        arrived(recording, 777)
        assert recording.send(777).status_code == 204
    assert recording.stored.read_bytes() == recording.data


def part_of(recording: Recording, storage: LocalStorage) -> partial.PartialUpload:
    grant = storage.verify_resumable_token(recording.url.rpartition("/")[2])
    return partial.PartialUpload(recording.partial.resolve(), recording.stored, grant)


def test_an_upload_is_given_up_once_nobody_writes_to_it(recording: Recording) -> None:
    recording.begin()
    with patching(recording, 0, 2500) as connection:
        connection.sendall(recording.data[:100])
        arrived(recording, 100)
        locked = recording.http.delete(recording.url, headers=VERSION)
        assert code(locked) == (423, "upload_locked")
    given_up = when_free(lambda: recording.http.delete(recording.url, headers=VERSION))
    assert (given_up.status_code, given_up.headers["tus-resumable"]) == (204, "1.0.0")
    assert recording.files() == []
    assert code(recording.http.delete(recording.url, headers=VERSION)) == (410, "upload_gone")
    recording.begin()
    assert recording.send(0).status_code == 204
    assert recording.stored.read_bytes() == recording.data
    assert recording.http.delete(recording.url, headers=VERSION).status_code == 410
    assert recording.stored.exists(), "what is whole is no upload any more"


def test_killed_between_the_last_byte_and_the_name(
    recording: Recording, storage: LocalStorage
) -> None:
    recording.begin()
    part = part_of(recording, storage).part
    part.write_bytes(recording.data)
    assert recording.ask().headers["upload-offset"] == "2500"
    assert recording.stored.read_bytes() == recording.data
    assert recording.files() == []


def test_killed_between_the_name_and_the_end(recording: Recording, storage: LocalStorage) -> None:
    recording.begin()
    part = part_of(recording, storage).part
    part.write_bytes(recording.data)
    recording.stored.parent.mkdir(parents=True)
    recording.stored.hardlink_to(part)
    assert recording.ask().headers["upload-offset"] == "2500"
    assert recording.stored.read_bytes() == recording.data
    assert recording.files() == []


def test_what_nobody_goes_on_with_is_deleted(
    recording: Recording, http: httpx2.Client, token: str, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    long_ago = recording.partial / "1" / "part"
    long_ago.parent.mkdir(parents=True)
    long_ago.touch()
    for _ in range(4):
        Recording(http, token, settings.storage_dir).begin()
    recording.begin()
    assert not long_ago.parent.exists(), "whoever begins an upload tidies"
    monkeypatch.setattr(partial, "TIDY_BATCH", 3)
    now = time.time()
    partial.tidy(recording.partial, now + 24 * 3600)
    assert len(recording.files()) == 5, "their links are good, or were until a moment ago"
    partial.tidy(recording.partial, now + 27 * 3600)
    assert len(recording.files()) == 2, "a batch at a time"
    partial.tidy(recording.partial, now + 27 * 3600)
    assert recording.files() == []
    assert recording.ask().status_code == 410


def test_partial_uploads_are_no_audio(recording: Recording, storage: LocalStorage) -> None:
    recording.begin()
    (part,) = recording.files()
    path = str(part.relative_to(recording.partial.parent))
    assert asyncio.run(storage.size(path)) is None
    assert asyncio.run(storage.delete(path)) is False


# Our own clients --------------------------------------------------------------------------------


@pytest.fixture
def proxy(api: str) -> Iterator[FaultyProxy]:
    with proxied(api) as running:
        yield running


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    path = tmp_path / "talk.mp3"
    path.write_bytes(os.urandom(2500))
    return path


FAULTS: list[list[tuple[str, Any]]] = [
    [],
    [("POST", None), ("POST", "answer")],
    [("PATCH", None), ("PATCH", "request")],
    [("PATCH", None), ("PATCH", "answer")],
    [("PATCH", None), ("PATCH", None), ("PATCH", "answer")],
    [("PATCH", "answer"), ("HEAD", "request"), ("HEAD", "answer")],
    [("PATCH", None), ("PATCH", answer(423)), ("PATCH", answer(502))],
    [("PATCH", answer(409)), ("HEAD", answer(503)), ("HEAD", None), ("PATCH", None)],
]


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("kind", ["JobClient", "AsyncJobClient"])
def test_the_clients_see_an_upload_through(
    proxy: FaultyProxy, token: str, settings: Settings, talk: Path, kind: str,
    faults: list[tuple[str, Any]],
) -> None:  # fmt: skip
    proxy.faults = list(faults)

    async def upload() -> str:
        async with AsyncJobClient(proxy.url, token, retries=QUICK) as client:
            return await client.upload(talk)

    if kind == "AsyncJobClient":
        file_path = asyncio.run(upload())
    else:
        with JobClient(proxy.url, token, retries=QUICK) as client:
            file_path = client.upload(talk)
    assert (settings.storage_dir / file_path).read_bytes() == talk.read_bytes()
    assert proxy.faults == []
    assert proxy.seen("PATCH") <= 5, "what has arrived is not sent again"
    tokens = [headers for method, _, headers in proxy.requests if method in {"PATCH", "HEAD"}]
    assert all("authorization" not in headers for headers in tokens)


@pytest.mark.parametrize("faults", FAULTS)
def test_the_servers_own_client_sees_an_upload_through(
    proxy: FaultyProxy, settings: Settings, storage: LocalStorage, talk: Path, user: UUID,
    faults: list[tuple[str, Any]],
) -> None:  # fmt: skip
    # This client asks for no ticket: POST is the creation.
    proxy.faults = [fault for fault in faults if fault != ("POST", None)]

    async def upload() -> None:
        path = f"{user}/talk.mp3"
        ticket = await storage.sign_upload(path, content_type="audio/mpeg", size=2500)
        assert ticket.metadata is not None
        async with httpx.AsyncClient() as client:
            with talk.open("rb") as file:
                ours = tus.Upload(
                    client, proxy.url + ticket.url, ticket.headers, ticket.metadata, file, 2500,
                    (0.01, 0.02),
                )  # fmt: skip
                assert await ours.run() in {True, False}
                with pytest.raises(FileExists):
                    await ours.run()

    asyncio.run(upload())
    assert (settings.storage_dir / f"{user}/talk.mp3").read_bytes() == talk.read_bytes()
    assert proxy.faults == []


def test_chunks_of_the_usual_size(settings: Settings, token: str, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(os.urandom(RESUMABLE_ABOVE + 1000))
    with serve(create_app(settings)) as url, proxied(url) as proxy:
        proxy.faults = [("PATCH", None), ("PATCH", "request")]
        with JobClient(proxy.url, token, retries=QUICK) as client:
            file_path = client.upload(path)
    assert (settings.storage_dir / file_path).read_bytes() == path.read_bytes()
    sent = [int(h["content-length"]) for method, _, h in proxy.requests if method == "PATCH"]
    assert sent == [TUS_CHUNK, 1000, 1000]


# The secret that signs links --------------------------------------------------------------------


def test_a_server_that_could_not_sign_links_does_not_start(settings: Settings) -> None:
    keyless = settings.model_copy(
        update={"jwt_secret": None, "jwks_url": "https://auth.example.org/jwks.json"}
    )
    with pytest.raises(SettingsError, match="PGSCRIBE_JWT_SECRET: needed to sign the links"):
        create_app(keyless)
    make_storage(keyless)  # a worker signs none
    elsewhere: dict[str, Any] = {
        "storage": "supabase",
        "supabase_url": "https://ref.supabase.co",
        "supabase_secret_key": settings.jwt_secret,
    }
    create_app(keyless.model_copy(update=elsewhere))
