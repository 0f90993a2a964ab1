"""What pages of other origins can make a browser do here: nothing, and read nothing."""

import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit
from uuid import UUID

import httpx2
import psycopg
import pytest
from playwright.sync_api import Browser, sync_playwright
from starlette.testclient import TestClient

from jobs.settings import Settings
from tests.supabase_auth.conftest import COOKIE, EMAIL, PASSWORD, Site, running
from tests.supabase_auth.server import Auth
from web.app import create_app

Headers = dict[str, str]

SAME = {"Sec-Fetch-Site": "same-origin"}
PUBLIC = "https://scribe.example.org"


def own_origin(site: Site) -> Headers:
    return {"Origin": site.url}


def submit(site: Site, cookie: str, user: UUID, headers: Headers) -> httpx2.Response:
    body = {"filePath": f"{user}/a.mp3"}
    sent = {"Cookie": f"{COOKIE}={cookie}"} | headers
    return httpx2.post(f"{site.url}/process", json=body, headers=sent)


def assert_refused(response: httpx2.Response) -> None:
    assert response.status_code == 403, response.text
    if response.headers["content-type"] == "application/problem+json":
        assert response.json()["code"] == "cross_site_request"
    else:
        assert "page of this server" in response.text


FOREIGN: list[Headers] = [
    {},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": ""},
    {"Sec-Fetch-Site": "same-origin, cross-site"},
    {"Sec-Fetch-Site": "SAME-ORIGIN"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost"},
    {"Origin": "file://127.0.0.1"},
    {"Origin": "http://[::1"},
    {"Referer": "http://127.0.0.1/"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_nothing_is_changed_for_other_origins(
    site: Site, user: UUID, conn: psycopg.Connection, headers: Headers
) -> None:
    cookie = site.sign_in()
    assert_refused(submit(site, cookie, user, headers))
    with httpx2.Client(base_url=site.url, headers=headers) as http:
        sent = {"Cookie": f"{COOKIE}={cookie}"}
        for method, path in (
            ("DELETE", f"/jobs/{user}"), ("POST", f"/jobs/{user}/cancel"), ("POST", "/uploads"),
            ("PUT", "/uploads/a.mp3"), ("POST", "/app/sign-out"),
        ):  # fmt: skip
            assert_refused(http.request(method, path, headers=sent))
        form = {"email": EMAIL, "password": PASSWORD, "token_hash": "x", "type": "email"}
        for path in ("/app/sign-in", "/app/sign-in/link", "/app/sign-in/confirm"):
            assert_refused(http.post(path, data=form))
        assert http.get("/jobs", headers=sent).status_code == 200, "reading changes nothing"
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (0,)
    assert site.ask(cookie).status_code == 200, "still signed in"


def test_ones_own_pages_may(site: Site, user: UUID) -> None:
    cookie = site.sign_in()
    for headers in (SAME, own_origin(site), SAME | {"Origin": "https://elsewhere.example"}):
        assert submit(site, cookie, user, headers).status_code == 202
    both = own_origin(site) | {"Sec-Fetch-Site": "cross-site"}
    assert_refused(submit(site, cookie, user, both))
    two = [("Cookie", f"{COOKIE}={cookie}"), ("Origin", site.url), ("Origin", site.url)]
    assert_refused(httpx2.post(f"{site.url}/process", json={}, headers=two))
    twice = [("Cookie", f"{COOKIE}={cookie}"), *[("Sec-Fetch-Site", "same-origin")] * 2]
    assert_refused(httpx2.post(f"{site.url}/process", json={}, headers=twice))


def test_tokens_are_sent_by_nobody_but_their_owner(site: Site, user: UUID, auth: Auth) -> None:
    cookie = site.sign_in()
    (session,) = auth.sessions
    token = auth.answer(session)["access_token"]
    for headers in FOREIGN:
        bearer = {"Authorization": f"Bearer {token}"}
        assert submit(site, cookie, user, headers | bearer).status_code == 202


@pytest.mark.parametrize(
    ("public_url", "host", "origin", "fine"),
    [
        (None, "scribe.example.org", "http://scribe.example.org", True),
        (None, "scribe.example.org:80", "http://scribe.example.org", True),
        (None, "scribe.example.org:8000", "http://scribe.example.org", False),
        # Behind a proxy that ends TLS, of which this server knows nothing.
        (None, "scribe.example.org", PUBLIC, False),
        # And where it knows.
        (PUBLIC, "scribe.example.org", PUBLIC, True),
        (PUBLIC, "scribe.example.org:443", PUBLIC, True),
        (PUBLIC, "internal:8000", PUBLIC, True),
        (PUBLIC, "internal:8000", "http://internal:8000", True),
        (PUBLIC, "scribe.example.org", "http://scribe.example.org", False),
        (PUBLIC, "scribe.example.org", f"{PUBLIC}:444", False),
        (PUBLIC, "scribe.example.org", f"{PUBLIC}.evil.example", False),
        (PUBLIC, "scribe.example.org", "https://x@scribe.example.org", False),
        (f"{PUBLIC}/api", "scribe.example.org", PUBLIC, True),
    ],
)
def test_origins_by_scheme_host_and_port(
    project: Settings, public_url: str | None, host: str, origin: str, *, fine: bool
) -> None:
    """Browsers send no Sec-Fetch-Site to plain http elsewhere; then Origin has to do."""
    own = project.model_copy(update={"public_url": public_url})
    with TestClient(create_app(own), base_url=f"http://{host}") as client:
        form = {"email": EMAIL, "password": "wrong"}
        headers = {"Origin": origin, "Host": host}
        assert client.post("/app/sign-in", data=form, headers=headers).status_code == (
            422 if fine else 403
        )


@pytest.mark.parametrize("origins", [("*",), ("https://app.example.org",)])
def test_cors_lets_nobody_read_with_a_cookie(
    project: Settings, auth: Auth, user: UUID, origins: tuple[str, ...]
) -> None:
    with running(project.model_copy(update={"cors_origins": origins}), auth) as site:
        cookie = site.sign_in()
        foreign = {"Origin": "https://app.example.org", "Sec-Fetch-Site": "cross-site"}
        answer = site.ask(cookie, **foreign)
        assert answer.status_code == 200
        # Without this header a browser shows no page what came with credentials.
        assert "access-control-allow-credentials" not in answer.headers
        wanted = {"Access-Control-Request-Method": "POST"}
        preflight = httpx2.options(f"{site.url}/process", headers=foreign | wanted)
        assert preflight.status_code == 200
        assert "access-control-allow-credentials" not in preflight.headers
        assert_refused(submit(site, cookie, user, foreign))


# In a real browser, by plain http at a name that is not this machine's: no Sec-Fetch-Site


@pytest.fixture
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--host-resolver-rules=MAP *.test 127.0.0.1"]  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "scribe.test"])
def test_a_browser_without_scripts(site: Site, chromium: Browser, host: str) -> None:
    url = f"http://{host}:{urlsplit(site.url).port}"
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{url}/app?x=1")
    assert page.locator(":focus").get_attribute("name") == "email"
    page.fill("main form:first-of-type input[type=email]", EMAIL)
    page.fill("input[type=password]", "wrong")
    page.click("button.primary")
    assert "password is wrong" in page.get_by_role("alert").inner_text()
    assert page.locator(":focus").get_attribute("name") == "password"
    page.fill("input[type=password]", PASSWORD)
    page.click("button.primary")
    page.wait_for_url(f"{url}/app?x=1")
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Lax", False)
    page.reload()
    page.click("text=Sign out")
    page.wait_for_url(f"{url}/app/sign-in")
    assert context.cookies() == []
    page.go_back()
    assert page.url.startswith(f"{url}/app/sign-in"), "nothing is shown from a cache"


def test_phones_show_who_is_signed_in(site: Site, chromium: Browser) -> None:
    context = chromium.new_context(viewport={"width": 320, "height": 640})
    context.add_cookies([{"name": COOKIE, "value": site.sign_in(), "url": site.url}])
    page = context.new_page()
    page.goto(f"{site.url}/app")
    who, out = page.locator(".account .email"), page.get_by_role("button", name="Sign out")
    assert who.inner_text() == EMAIL
    assert who.evaluate("e => e.scrollWidth <= e.clientWidth"), "all of it"
    assert out.is_visible()
    who.evaluate("e => e.textContent = 'x'.repeat(254)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.mark.parametrize("host", ["127.0.0.1", "scribe.test"])
def test_a_page_elsewhere_that_posts_a_form(
    site: Site, chromium: Browser, host: str, conn: psycopg.Connection
) -> None:
    url = f"http://{host}:{urlsplit(site.url).port}"
    context = chromium.new_context()
    page = context.new_page()
    page.goto(f"{url}/app/sign-in")
    page.fill("main form:first-of-type input[type=email]", EMAIL)
    page.fill("input[type=password]", PASSWORD)
    page.click("button.primary")
    page.wait_for_url(f"{url}/app")
    # Another port of the same host is another origin and the same site: it does get the cookie.
    form = f"<form method=post action='{url}/app/sign-out'><button>"
    for attacker in (f"http://{host}:1", "http://evil.test:1"):
        page.route(f"{attacker}/", lambda route: route.fulfill(content_type="text/html", body=form))
        page.goto(f"{attacker}/")
        with page.expect_response(f"{url}/app/sign-out") as caught:
            page.click("button")
        assert caught.value.status == 403
    assert conn.execute("select count(*) from pgscribe.web_sessions").fetchone() == (1,)
    page.goto(f"{url}/app")
    assert page.url == f"{url}/app"
