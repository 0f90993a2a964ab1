"""The one password of `pgscribe dev`: any user, on this machine, and nowhere else at all."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import httpx2
import psycopg
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from db.embedded import EmbeddedPostgres
from jobs.errors import SettingsError
from jobs.settings import Settings
from tests import ports
from tests.streams import until
from web import sign_in
from web.app import create_app

PASSWORD = "a password of this test alone"
COOKIE = "pgscribe-session"


@pytest.fixture
def local(settings: Settings) -> Settings:
    return settings.model_copy(update={"local_sign_in_password": SecretStr(PASSWORD)})


@pytest.fixture
def browser(local: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(local), follow_redirects=False) as client:
        client.headers["sec-fetch-site"] = "same-origin"
        yield client


def enter(client: TestClient, email: str, password: str = PASSWORD) -> int:
    form = {"email": email, "password": password}
    return client.post("/app/sign-in", data=form).status_code


def test_any_address_is_a_user(browser: TestClient, conn: psycopg.Connection) -> None:
    assert "pgscribe dev" in browser.get("/app/sign-in").text
    for email in ("ann@example.org", "bob@example.org", "Ann@example.org"):
        assert enter(browser, email) == 303
        assert email.lower() in browser.get("/app").text
    users = conn.execute("select email, role from auth.users order by created_at").fetchall()
    assert users == [("ann@example.org", "authenticated"), ("bob@example.org", "authenticated")]


def test_an_address_that_is_there_is_that_user(
    browser: TestClient, conn: psycopg.Connection, user: UUID
) -> None:
    enter(browser, f"{user}@example.org")
    body = {"filePath": f"{user}/a.mp3"}
    assert browser.post("/process", json=body).status_code == 202
    assert conn.execute("select user_id from processing_jobs").fetchone() == (user,)


def test_the_password_is_needed(browser: TestClient, conn: psycopg.Connection) -> None:
    for password in ("", "wrong", PASSWORD[:-1], PASSWORD + "x", "ä" * 20):
        assert enter(browser, "ann@example.org", password) == 422
    assert conn.execute("select count(*) from auth.users").fetchone() == (0,)


def test_tokens_are_issued_again(browser: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_in, "LOCAL_LIFETIME", 30)
    enter(browser, "ann@example.org")
    monkeypatch.undo()
    assert browser.get("/jobs").status_code == 200
    assert "ann@example.org" in browser.get("/app").text
    assert browser.post("/app/sign-out").status_code == 303
    assert browser.get("/jobs").status_code == 401


def test_sign_out_ends_what_was_the_password_for(browser: TestClient) -> None:
    enter(browser, "ann@example.org")
    cookie = browser.cookies[COOKIE]
    browser.post("/app/sign-out")
    assert browser.get("/jobs", headers={"Cookie": f"{COOKIE}={cookie}"}).status_code == 401


# Where it is refused


def assert_says(error: str, reason: str) -> None:
    assert error.count("PGSCRIBE_LOCAL_SIGN_IN_PASSWORD") == 1
    assert "is for `pgscribe dev` only" in error
    assert reason in error
    assert PASSWORD not in error
    assert "Traceback" not in error


@contextmanager
def web(settings: Settings, folder: Path, *options: str, **environment: str) -> Iterator[
    tuple[subprocess.Popen[str], str]
]:  # fmt: skip
    """`pgscribe web` with the password, as a process of its own."""
    own = {
        "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
        "PGSCRIBE_JWT_SECRET": settings.require_jwt_secret(),
        "PGSCRIBE_LOCAL_SIGN_IN_PASSWORD": PASSWORD,
    }
    with ports.reserved() as port, subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "web", "--port", str(port), *options],
        env=os.environ | own | environment, cwd=folder, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()


def test_the_server_starts_in_the_embedded_environment(local: Settings, tmp_path: Path) -> None:
    with web(local, tmp_path) as (process, url):

        def is_up() -> bool:
            try:
                return httpx2.get(f"{url}/app/sign-in").is_success
            except httpx2.TransportError:
                return process.poll() is not None

        until(is_up, "the server is up")
        assert process.poll() is None
        form = {"email": "ann@example.org", "password": PASSWORD}
        headers = {"Origin": url}
        assert httpx2.post(f"{url}/app/sign-in", data=form, headers=headers).status_code == 303


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        (("--host", "0.0.0.0"), {}, "must listen on 127.0.0.1"),
        (("--host", "::"), {}, "must listen on 127.0.0.1"),
        (("--host", "192.0.2.1"), {}, "must listen on 127.0.0.1"),
        ((), {"PGSCRIBE_SUPABASE_URL": "http://127.0.0.1:1"}, "must be unset"),
        ((), {"PGSCRIBE_SUPABASE_PUBLISHABLE_KEY": "sb_publishable_x"}, "must be unset"),
    ],
)
def test_the_server_does_not_start_elsewhere(
    local: Settings,
    tmp_path: Path,
    options: tuple[str, ...],
    environment: dict[str, str],
    reason: str,
) -> None:
    with web(local, tmp_path, *options, **environment) as (process, _):
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 1
    assert_says(said, reason)


def test_a_short_password_is_none(local: Settings, tmp_path: Path) -> None:
    short = {"PGSCRIBE_LOCAL_SIGN_IN_PASSWORD": "too short"}
    with web(local, tmp_path, **short) as (process, _):
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 1
    assert "at least 16" in said
    assert "too short" not in said


@pytest.mark.parametrize("host", ["db.abcdefgh.supabase.co", "10.0.0.5", ""])
def test_a_database_elsewhere_is_not_even_asked(local: Settings, host: str) -> None:
    url = local.database_url.get_secret_value().replace("127.0.0.1", host)
    remote = local.model_copy(update={"database_url": SecretStr(url)})
    with pytest.raises(SettingsError, match="the database must be the embedded one"):
        asyncio.run(sign_in.refuse_other_databases(remote))


def test_a_database_that_is_not_embedded_shows_itself(
    local: Settings, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As through a tunnel: the address is this machine's, the server is not of our making."""
    monkeypatch.setattr(EmbeddedPostgres, "_tag", "main")  # as on hosted projects
    with EmbeddedPostgres(tmp_path_factory.mktemp("hosted")) as hosted:
        tunnelled = local.model_copy(update={"database_url": SecretStr(hosted.url())})
        with psycopg.connect(hosted.url()) as conn:
            assert conn.execute("show cluster_name").fetchone() == ("main",)
            with pytest.raises(psycopg.errors.CantChangeRuntimeParam):
                conn.execute("set cluster_name = 'pgscribe-0123456789abcdef'")
        with pytest.raises(SettingsError) as caught:
            asyncio.run(sign_in.refuse_other_databases(tunnelled))
        assert_says(str(caught.value), "the database must be the embedded one")
        # Whatever serves the app, not only `pgscribe web`.
        with pytest.raises(SettingsError), TestClient(create_app(tunnelled)):
            pass
    hosted.remove()
