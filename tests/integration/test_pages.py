"""The pages of the web app: who sees them, what they may load, how they say what is wrong."""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from db.embedded import EmbeddedPostgres
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token
from web.pages import STATIC, content_security_policy

Headers = dict[str, str]


@pytest.fixture
def site(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), follow_redirects=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    token = issue_token(settings, user, lifetime=60, email="<ann>@example.org")
    return {"Authorization": f"Bearer {token}"}


def insert(conn: psycopg.Connection, user: UUID, name: str) -> str:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f"{user}/{name}"),
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_whoever_is_not_signed_in_is_sent_to_where_they_can_be(site: TestClient) -> None:
    assert site.get("/").headers["location"] == "/app"
    job = f"/app/jobs/{uuid4()}?t=1.5"
    for path, back in (("/app", "%2Fapp"), (job, "%2Fapp%2Fjobs%2F"), ("/app/x", "%2Fapp%2Fx")):
        response = site.get(path)
        assert response.status_code == 303
        assert response.headers["location"].startswith(f"/app/sign-in?next={back}")
    assert response.headers["location"].endswith("next=%2Fapp%2Fx")


def test_a_page_may_load_and_run_only_what_is_ours(
    site: TestClient, headers: Headers, settings: Settings
) -> None:
    page = site.get("/app", headers=headers)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert policy == content_security_policy(settings)
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-frame-options"] == "DENY"
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|<style", page.text)
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert f"{STATIC}/js/jobs.js" in loaded
    assert f"{STATIC}/js/dom.js" in loaded, "at once, not only when the first has come"
    assert loaded
    assert all(path.startswith("/") and not path.startswith("//") for path in loaded)


def test_pages_may_fetch_audio_from_where_it_lies(settings: Settings) -> None:
    ours = content_security_policy(settings)
    assert "connect-src 'self';" in ours
    there = settings.model_copy(
        update={"storage": "supabase", "supabase_url": "https://ref.supabase.co"}
    )
    policy = content_security_policy(there)
    assert "connect-src 'self' https://ref.supabase.co;" in policy
    assert "media-src 'self' https://ref.supabase.co blob:;" in policy


def test_what_users_name_is_text(
    site: TestClient, headers: Headers, conn: psycopg.Connection, user: UUID
) -> None:
    name = "<img src=x onerror=alert(1)>\"&'.mp3"
    job = insert(conn, user, name)
    page = site.get(f"/app/jobs/{job}", headers=headers).text
    assert "<img src=x" not in page
    assert name in unescape(page)
    assert "&lt;ann&gt;@example.org" in page


def test_what_is_not_there_is_a_page_too(
    site: TestClient, headers: Headers, conn: psycopg.Connection, user: UUID, settings: Settings
) -> None:
    job = insert(conn, user, "talk.mp3")
    stranger = uuid4()
    conn.execute("insert into auth.users (id) values (%s)", (stranger,))
    other = {"Authorization": f"Bearer {issue_token(settings, stranger, lifetime=60)}"}
    for path, who in (
        (f"/app/jobs/{job}", other),
        (f"/app/jobs/{uuid4()}", headers),
        ("/app/jobs/x", headers),
        ("/app/x/y", headers),
        (f"{STATIC}/none.js", headers),
    ):
        response = site.get(path, headers=who)
        assert (path, response.status_code) == (path, 404)
        assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert site.get("/x", headers=headers).headers["content-type"] == "application/problem+json"


def test_operators_have_a_page_of_their_own_from_when_they_are_ones(
    site: TestClient, headers: Headers, conn: psycopg.Connection, user: UUID
) -> None:
    refused = site.get("/app/operate", headers=headers)
    assert refused.status_code == 403
    assert "pgscribe operators add" in refused.text
    assert "/app/operate" not in site.get("/app", headers=headers).text
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    assert 'href="/app/operate"' in site.get("/app", headers=headers).text
    assert "<h1>Operate</h1>" in site.get("/app/operate", headers=headers).text
    conn.execute("delete from pgscribe.operators")
    assert site.get("/app/operate", headers=headers).status_code == 403


def test_without_a_database_a_page_says_so(
    postgres: EmbeddedPostgres, settings: Settings, headers: Headers
) -> None:
    away = settings.model_copy(update={"database_url": SecretStr(postgres.url(database="no_such"))})
    with TestClient(create_app(away), raise_server_exceptions=False) as site:
        response = site.get(f"/app/jobs/{uuid4()}", headers=headers)
    assert response.status_code == 503
    assert "<h1>Service Unavailable</h1>" in response.text
    assert response.headers["retry-after"]


def test_files_of_pages_are_kept_by_browsers_and_renamed_when_they_change(site: TestClient) -> None:
    static = Path(__file__).parents[2] / "web" / "static"
    names = [str(path.relative_to(static)) for path in static.rglob("*") if path.is_file()]
    assert "js/jobs.js" in names
    for name in names:
        response = site.get(f"{STATIC}/{name}")
        assert response.status_code == 200
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert site.get(f"{STATIC}/../pages.py").status_code == 303
    assert re.fullmatch(r"/app/static/[0-9a-f]{16}", STATIC)


def test_modules_import_only_what_is_there() -> None:
    folder = Path(__file__).parents[2] / "web" / "static" / "js"
    for module in folder.glob("*.js"):
        for name in re.findall(r'from "\./([\w-]+\.js)"', module.read_text()):
            assert (folder / name).is_file(), f"{module.name} imports {name}"
