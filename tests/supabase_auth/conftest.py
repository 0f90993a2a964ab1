from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx2
import psycopg
import pytest

from jobs.settings import Settings
from tests.live import serve
from tests.supabase_auth.server import Auth, serving
from web.app import create_app

EMAIL = "ann@example.org"
PASSWORD = "correct horse"
COOKIE = "pgscribe-session"
LINK_COOKIE = "pgscribe-link"


@pytest.fixture
def auth(conn: psycopg.Connection, user: UUID) -> Iterator[Auth]:
    """A project's Auth with one user."""
    with serving() as running:
        conn.execute("update auth.users set email = %s where id = %s", (EMAIL, user))
        running.add(user, EMAIL, PASSWORD)
        yield running


@pytest.fixture
def project(settings: Settings, auth: Auth) -> Settings:
    """Settings of that project, without limits on requests."""
    unlimited = dict.fromkeys(("rate_limit", "failed_rate_limit", "sign_in_rate_limit"), 0)
    own = {"supabase_url": auth.url, "supabase_publishable_key": auth.key}
    return settings.model_copy(update=own | unlimited)


@dataclass
class Site:
    """A running app. Each browser that is opened has cookies of its own."""

    app: Any
    url: str

    @contextmanager
    def browser(self, **headers: str) -> Iterator[httpx2.Client]:
        sent = {"Sec-Fetch-Site": "same-origin"} | headers
        with httpx2.Client(base_url=self.url, headers=sent, timeout=30) as http:
            yield http

    def ask(self, cookie: str, path: str = "/jobs", **headers: str) -> httpx2.Response:
        """Ask with a session's cookie."""
        cookies = {"Cookie": f"{COOKIE}={cookie}"}
        return httpx2.get(self.url + path, headers=cookies | headers, timeout=30)

    def sign_in(self) -> str:
        """Return the cookie of a new session."""
        with self.browser() as http:
            assert enter(http).status_code == 303
            return str(http.cookies[COOKIE])


@contextmanager
def running(settings: Settings, auth: Auth) -> Iterator[Site]:
    """An app that knows its own URL, which the project lets links lead to."""
    app = create_app(settings)
    with serve(app) as url:
        app.state.settings = settings.model_copy(update={"public_url": url})
        auth.redirect_urls.append(f"{url}/app/sign-in/confirm")
        yield Site(app, url)


@pytest.fixture
def site(project: Settings, auth: Auth) -> Iterator[Site]:
    with running(project, auth) as site:
        yield site


@pytest.fixture
def browser(site: Site) -> Iterator[httpx2.Client]:
    with site.browser() as http:
        yield http


def enter(
    http: httpx2.Client, email: str = EMAIL, password: str = PASSWORD, **fields: str
) -> httpx2.Response:
    """Send the form."""
    return http.post("/app/sign-in", data={"email": email, "password": password, **fields})
