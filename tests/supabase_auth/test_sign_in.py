"""Signing in with Supabase Auth: the real client and a server that answers as Auth does."""

import logging
import re
import time
from html import unescape
from itertools import takewhile
from urllib.parse import quote, unquote_plus
from uuid import uuid4

import httpx2
import psycopg
import pytest
from starlette.testclient import TestClient

from jobs.settings import Settings
from tests.conftest import MakeUser
from tests.supabase_auth.conftest import COOKIE, EMAIL, LINK_COOKIE, PASSWORD, Site, enter, running
from tests.supabase_auth.server import Auth
from web import sign_in
from web.app import create_app
from web.routes.sign_in import safe_next


def error(response: httpx2.Response) -> str:
    """Return what the page says is wrong; a reader's program is told so."""
    found = re.search(r'<p class="error" role="alert" id="error">(.*?)</p>', response.text)
    assert found is not None, response.text
    return unescape(found[1])


def ask_for_link(http: httpx2.Client, email: str = EMAIL, **fields: str) -> httpx2.Response:
    return http.post("/app/sign-in/link", data={"email": email, **fields})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer requests for links after a shorter time."""
    monkeypatch.setattr(sign_in, "LINK_SECONDS", 0.4)


# Passwords


def test_a_password_opens_the_app_and_the_api(browser: httpx2.Client, site: Site) -> None:
    page = browser.get("/app?x=1")
    assert page.status_code == 303
    page = browser.get(page.headers["location"])
    assert page.status_code == 200
    assert 'autocomplete="username"' in page.text
    assert 'autocomplete="current-password"' in page.text
    assert 'name="next" value="/app?x=1"' in page.text
    done = enter(browser, f" {EMAIL.upper()} ", next="/app?x=1")
    assert (done.status_code, done.headers["location"]) == (303, "/app?x=1")
    assert EMAIL in browser.get("/app?x=1").text
    assert browser.get("/jobs").json()["jobs"] == []
    assert httpx2.get(f"{site.url}/jobs").status_code == 401


def test_the_cookie_is_for_this_server_alone(
    browser: httpx2.Client, site: Site, project: Settings
) -> None:
    plain = enter(browser).headers["set-cookie"]
    assert re.fullmatch(
        rf"{COOKIE}=[\w-]{{43}}; HttpOnly; Max-Age=2592000; Path=/; SameSite=lax", plain
    )
    # uvicorn trusts the proxies on its own machine unless it is told others, as here.
    with site.browser(**{"X-Forwarded-Proto": "https"}) as proxied:
        secure = enter(proxied).headers["set-cookie"]
    assert re.fullmatch(
        r"__Host-pgscribe=[\w-]{43}; HttpOnly; Max-Age=2592000; Path=/; SameSite=lax; Secure",
        secure,
    )
    public = project.model_copy(update={"public_url": "https://scribe.example.org"})
    with TestClient(create_app(public), base_url="http://scribe.example.org") as behind_proxy:
        behind_proxy.headers["sec-fetch-site"] = "same-origin"
        form = {"email": EMAIL, "password": PASSWORD}
        answer = behind_proxy.post("/app/sign-in", data=form, follow_redirects=False)
        assert answer.headers["set-cookie"].startswith("__Host-pgscribe=")
        cookie = answer.headers["set-cookie"].partition(";")[0]
        assert behind_proxy.get("/jobs", headers={"Cookie": cookie}).status_code == 200
        plain_name = cookie.replace("__Host-pgscribe", COOKIE)
        assert behind_proxy.get("/jobs", headers={"Cookie": plain_name}).status_code == 401


def test_nobody_learns_which_addresses_there_are(browser: httpx2.Client, auth: Auth) -> None:
    banned = auth.add(uuid4(), "banned@example.org")
    banned.banned = True
    said = {
        (answer.status_code, answer.text.replace(email, "…"))
        for email, password in ((EMAIL, "wrong"), ("no@example.org", "x"), (banned.email, "x"))
        for answer in [enter(browser, email, password)]
    }
    assert len(said) == 1
    assert error(enter(browser, password="wrong")) == sign_in.WRONG_PASSWORD
    assert not browser.cookies


def test_an_error_is_tied_to_its_fields_and_keeps_the_address(browser: httpx2.Client) -> None:
    page = enter(browser, password="wrong").text
    assert page.count('aria-invalid="true" aria-describedby="error"') == 2
    assert f'value="{EMAIL}"' in page
    assert "<title>Error: Sign in" in page
    missing = enter(browser, password="")
    assert error(missing) == "Enter the password."
    assert missing.text.count("aria-describedby") == 1
    assert "wrong" not in page.partition("<form")[2]


def test_who_has_not_confirmed_their_address_is_told(browser: httpx2.Client, auth: Auth) -> None:
    auth.users[EMAIL].confirmed = False
    assert error(enter(browser)) == sign_in.NOT_CONFIRMED
    assert error(enter(browser, password="wrong")) == sign_in.WRONG_PASSWORD


@pytest.mark.parametrize("fault", ["cut", "html", "500", "503"])
def test_auth_is_away(browser: httpx2.Client, auth: Auth, fault: str) -> None:
    auth.faults["/token?password"] = fault  # type: ignore[assignment]
    answer = enter(browser)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert "does not answer" in error(answer)
    auth.faults.clear()
    assert enter(browser).status_code == 303


def test_auth_limits_attempts(browser: httpx2.Client, auth: Auth) -> None:
    auth.limited = "17"
    answer = enter(browser)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "17")
    assert error(answer) == "Too many attempts. Wait 17 s, then try again."
    auth.limited = ""
    assert enter(browser).headers["retry-after"] == "60"


def test_a_key_that_the_project_refuses_is_no_users_fault(
    browser: httpx2.Client, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    auth.key = "sb_publishable_another"
    assert enter(browser).status_code == 503
    assert ask_for_link(browser).status_code == 503
    assert "refuses PGSCRIBE_SUPABASE_PUBLISHABLE_KEY" in caplog.text


def test_a_user_whom_the_database_does_not_know(
    browser: httpx2.Client, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    auth.add(uuid4(), "elsewhere@example.org")
    assert error(enter(browser, "elsewhere@example.org")) == sign_in.REFUSED
    assert "no such user in auth.users" in caplog.text
    assert not browser.cookies


def test_tokens_that_this_server_does_not_take(
    project: Settings, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    other = project.model_copy(update={"jwt_audience": "others"})
    with running(other, auth) as site, site.browser() as http:
        assert error(enter(http)) == sign_in.REFUSED
    assert "not good here: The bearer token is not valid: Audience" in caplog.text


def test_secrets_stay_out_of_the_log(
    browser: httpx2.Client, auth: Auth, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "web")
    enter(browser)
    enter(browser, password="a secret that is wrong")
    auth.faults["/token?password"] = "cut"
    enter(browser)
    secrets = {PASSWORD, "a secret", EMAIL, auth.key, browser.cookies[COOKIE]}
    secrets |= {token.token for s in auth.sessions.values() for token in s.tokens}
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name.startswith("web"))
    assert not [secret for secret in secrets if secret in ours]


# Sessions


def test_a_session_is_new_each_time_and_ends_the_browsers_old_one(
    site: Site, conn: psycopg.Connection
) -> None:
    planted, first = "A" * 43, site.sign_in()
    for cookie in (planted, first):
        with site.browser(Cookie=f"{COOKIE}={cookie}") as http:
            found = re.match(rf"{COOKIE}=([\w-]+);", enter(http).headers["set-cookie"])
        assert found is not None
        assert found[1] not in {planted, first}
        assert site.ask(found[1]).status_code == 200
        assert site.ask(cookie).status_code == 401
    assert conn.execute("select count(*) from pgscribe.web_sessions").fetchone() == (2,)


# Links


def test_a_link_signs_in_the_browser_that_asked_for_it(
    browser: httpx2.Client, auth: Auth, site: Site
) -> None:
    sent = ask_for_link(browser, next="/app?q=a b")
    assert (sent.status_code, sent.headers["location"]) == (303, "/app/sign-in/link-sent")
    flags = sent.headers["set-cookie"]
    assert flags.startswith(f"{LINK_COOKIE}=")
    assert flags.endswith("; HttpOnly; Max-Age=3600; Path=/; SameSite=lax")
    assert "If there is an account" in browser.get(sent.headers["location"]).text
    (mail,) = auth.mails
    query = {"token": mail.token_hash, "type": "magiclink", "redirect_to": mail.redirect_to}
    followed = httpx2.get(f"{auth.url}/auth/v1/verify", params=query)
    link = followed.headers["location"].removeprefix(site.url)
    assert link.startswith("/app/sign-in/confirm?code=")

    assert browser.head(link).status_code == 200
    with site.browser() as stranger:
        assert error(stranger.get(link)) == sign_in.LINK_ENDED
        stranger.cookies.set(LINK_COOKIE, "Lw|" + "x" * 64, domain="127.0.0.1")
        assert error(stranger.get(link)) == sign_in.LINK_ENDED
        assert COOKIE not in stranger.cookies

    done = browser.get(link, headers={"Sec-Fetch-Site": "cross-site"})
    assert (done.status_code, done.headers["location"]) == (
        303,
        "/app?signed-in=1",
    )  # a space is no path's
    assert browser.get("/jobs").status_code == 200
    assert LINK_COOKIE not in browser.cookies
    assert error(browser.get(link)) == sign_in.LINK_ENDED


def test_a_link_leads_back_to_where_one_was_going(browser: httpx2.Client, auth: Auth) -> None:
    ask_for_link(browser, next="/app/jobs/1?t=2#x")
    (mail,) = auth.mails
    code = "0b9e"
    auth.codes[code] = (auth.users[EMAIL], mail.challenge, time.time())
    done = browser.get(f"/app/sign-in/confirm?code={code}")
    assert done.headers["location"] == "/app/jobs/1?t=2&signed-in=1#x"


def test_whoever_asks_twice_can_use_the_first_link(browser: httpx2.Client, auth: Auth) -> None:
    for _ in range(3):  # the others come too soon for Auth to send anything
        assert ask_for_link(browser).status_code == 303
    (mail,) = auth.mails
    auth.codes["0b9e"] = (auth.users[EMAIL], mail.challenge, time.time())
    assert browser.get("/app/sign-in/confirm?code=0b9e").status_code == 303
    assert browser.get("/jobs").status_code == 200


def test_a_token_hash_is_used_by_a_button_and_not_by_a_scanner(
    browser: httpx2.Client, auth: Auth
) -> None:
    ask_for_link(browser)
    (mail,) = auth.mails
    link = f"/app/sign-in/confirm?token_hash={mail.token_hash}&type=email"
    for _ in range(2):
        page = browser.get(link)
        assert browser.head(link).status_code == 200
    assert "<button" in page.text
    assert page.headers["referrer-policy"] == "same-origin"
    assert auth.mails == [mail], "nothing has used it"
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', page.text))
    assert form == {"token_hash": mail.token_hash, "type": "email"}
    assert browser.post("/app/sign-in/confirm", data=form).status_code == 303
    assert browser.get("/jobs").status_code == 200
    again = browser.post("/app/sign-in/confirm", data=form)
    assert error(again) == sign_in.LINK_ENDED


def test_a_link_of_somebody_elses_says_whose_session_it_ends_and_who_one_is_then(
    browser: httpx2.Client, site: Site, auth: Auth, conn: psycopg.Connection, make_user: MakeUser
) -> None:
    stranger = make_user()
    auth.add(stranger, "<mallory>@example.org")
    link = "/app/sign-in/confirm?token_hash={}&type=email"
    with site.browser() as http:
        for email in (EMAIL, "<mallory>@example.org"):
            assert ask_for_link(http, email).status_code == 303
    own, strange = (link.format(mail.token_hash) for mail in auth.mails)

    assert "signed in as" not in browser.get(own).text
    enter(browser)
    assert "Signed in as <b>" not in browser.get("/app").text
    page = browser.get(strange, headers={"Sec-Fetch-Site": "cross-site"})
    assert f"signed in as <b>{EMAIL}</b>" in page.text
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', page.text))
    done = browser.post("/app/sign-in/confirm", data=form)
    landed = browser.get(done.headers["location"])
    assert "Signed in as <b>&lt;mallory&gt;@example.org</b>." in landed.text

    conn.execute("delete from pgscribe.web_sessions")
    page = browser.get(own)
    assert page.status_code == 200
    assert "signed in as" not in page.text, "that session has ended"


@pytest.mark.parametrize(
    "query",
    ["", "?code=", "?code=%00", "?code=" + "a" * 300, "?token_hash=abc",
     "?token_hash=%3Cb%3E&type=email", "?token_hash=abc&type=recovery",
     "?token_hash=abc&type=email_change"],
)  # fmt: skip
def test_links_of_other_forms_are_not_asked_about(
    browser: httpx2.Client, auth: Auth, query: str
) -> None:
    before = len(auth.requests)
    assert error(browser.get(f"/app/sign-in/confirm{query}")) == sign_in.LINK_ENDED
    assert len(auth.requests) == before


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("otp_expired", sign_in.LINK_ENDED),
        ("flow_state_expired", sign_in.LINK_ENDED),
        ("unexpected_failure", sign_in.LINK_FAILED),
        ("user_banned", sign_in.LINK_FAILED),
        ("Call +1 900 555 0100", sign_in.LINK_FAILED),
        ("", sign_in.LINK_FAILED),
    ],
)
def test_a_link_with_an_error_puts_no_words_in_our_mouth(
    browser: httpx2.Client, caplog: pytest.LogCaptureFixture, code: str, said: str
) -> None:
    description = "Your account is locked. Call +1 900 555 0100."
    query = {"error": "access_denied", "error_code": code, "error_description": description}
    page = browser.get("/app/sign-in/confirm", params=query)
    assert page.status_code == 422
    assert error(page) == said
    assert not re.search(r"900\W+555", unquote_plus(page.text + caplog.text))
    alone = browser.get("/app/sign-in/confirm", params={"error_description": description})
    assert error(alone) == sign_in.LINK_FAILED


def test_links_are_answered_alike_for_all(browser: httpx2.Client, auth: Auth) -> None:
    auth.users["slow@example.org"] = auth.users[EMAIL]
    answers = []
    took = []
    for email, fault in (
        ("no@example.org", None), (EMAIL, None), (EMAIL, None), (EMAIL, "500")
    ):  # fmt: skip
        auth.faults = {"/otp": "500"} if fault else {}
        began = time.monotonic()
        answer = ask_for_link(browser, email)
        took.append(time.monotonic() - began)
        browser.cookies.clear()
        cookie = re.sub(r"=[\w.|~-]+;", "=…;", answer.headers["set-cookie"], count=1)
        answers.append((answer.status_code, answer.headers["location"], cookie, answer.text))
    assert len(set(answers)) == 1
    assert min(took) >= sign_in.LINK_SECONDS
    assert len(auth.mails) == 1, "no user, then one who was sent a message just now"
    auth.faults = {}
    auth.gate.clear()  # sending takes longer
    began = time.monotonic()
    assert ask_for_link(browser).headers["location"] == "/app/sign-in/link-sent"
    assert time.monotonic() - began < sign_in.LINK_SECONDS + 5
    auth.gate.set()


def test_links_while_auth_is_away(browser: httpx2.Client, auth: Auth) -> None:
    auth.faults["/otp"] = "cut"
    answer = ask_for_link(browser)
    assert answer.status_code == 503
    assert "set-cookie" not in answer.headers
    auth.faults.clear()
    auth.limited = "9"
    assert ask_for_link(browser).headers["retry-after"] == "9"


def test_links_lead_to_an_address_that_no_request_has_chosen(
    project: Settings, auth: Auth, site: Site
) -> None:
    with site.browser(Host="evil.example") as http:
        ask_for_link(http)
    assert auth.mails[0].redirect_to == f"{site.url}/app/sign-in/confirm"
    with TestClient(create_app(project)) as unknown:  # no PGSCRIBE_PUBLIC_URL
        unknown.headers["sec-fetch-site"] = "same-origin"
        assert "/app/sign-in/link" not in unknown.get("/app/sign-in").text
        unknown.post("/app/sign-in/link", data={"email": EMAIL})
    assert auth.count("/otp") == 1


def test_each_user_has_a_client_of_their_own(
    browser: httpx2.Client, site: Site, auth: Auth, make_user: MakeUser
) -> None:
    other = make_user()
    auth.add(other, "bob@example.org", "staple")
    enter(browser)
    with site.browser() as http:
        enter(http, "bob@example.org", "staple")
        assert "bob@example.org" in http.get("/app").text
        assert http.post("/app/sign-out").status_code == 303
    assert EMAIL in browser.get("/app").text
    assert [session.user.email for session in auth.sessions.values()] == [EMAIL]


# Input


@pytest.mark.parametrize(
    "email", ["", "ann", "@", "ann@", "@x", "a b@x.y", "a@b@c", "a\x00@x.y", "a" * 250 + "@x.yz"]
)
def test_an_address_is_checked_before_it_is_sent_anywhere(
    browser: httpx2.Client, auth: Auth, email: str
) -> None:
    before = len(auth.requests)
    for answer in (enter(browser, email), ask_for_link(browser, email)):
        assert answer.status_code == 422
        assert "Enter an e-mail address" in error(answer)
    assert len(auth.requests) == before


def test_bodies_are_bounded(browser: httpx2.Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert enter(browser, password="x" * 20_000).status_code == 413
    many = "&".join(f"f{number}=1" for number in range(50))
    assert browser.post("/app/sign-in", content=many, headers=form).status_code == 422
    assert browser.post("/app/sign-in", content=b"\xff\xfe=1", headers=form).status_code == 422
    assert browser.post("/app/sign-in", json={"email": EMAIL}).status_code == 422


@pytest.mark.parametrize(
    "wanted",
    ["//evil.example", "/\\evil.example", "https://evil.example", "https:evil.example", "/docs",
     "app", "/app//\\evil.example", "/app\\@evil.example", "/application", "/app@evil.example",
     "/app.evil", "javascript:alert(1)", "/app/../docs", "/app/..", "/app/%2e%2e/docs",
     "/app/.%2E", "/app/./x", "/\t/evil.example", "/app\r\nSet-Cookie: x=y", "/app/\x00", " /app",
     "/app/ä", "%2f%2fevil.example", "/app/sign-in?next=/app", "/app/sign-out",
     "/app?" + "x" * 3000, ""],
)  # fmt: skip
def test_nobody_is_led_elsewhere(browser: httpx2.Client, wanted: str) -> None:
    assert safe_next(wanted) == "/app"
    page = browser.get(f"/app/sign-in?next={quote(wanted)}")
    assert 'name="next" value="/app"' in page.text
    assert enter(browser, next=wanted).headers["location"] == "/app"


@pytest.mark.parametrize(
    "wanted", ["/app", "/app/jobs/1?t=3.5", "/app?q=%2F%2Fx", "/app#top", "/app/a/b", "/app?u=//x"]
)
def test_pages_of_the_app_are_led_to(wanted: str) -> None:
    assert safe_next(wanted) == wanted


def test_attempts_are_limited_by_address_and_by_user(project: Settings, auth: Auth) -> None:
    limited = project.model_copy(update={"sign_in_rate_limit": 3})
    with running(limited, auth) as site:

        def attempt(email: str, address: str) -> int:
            with site.browser(**{"X-Forwarded-For": address}) as http:
                answer = enter(http, email, "wrong")
                assert ("retry-after" in answer.headers) == (answer.status_code == 429)
                return answer.status_code

        assert [attempt(f"{n}@example.org", "192.0.2.1") for n in range(4)] == [422] * 3 + [429]
        began = time.monotonic()
        assert [attempt(EMAIL, "192.0.2.2") for _ in range(4)] == [422] * 3 + [429]
        others = (attempt(EMAIL.upper(), f"192.0.2.{n}") for n in range(3, 250))
        passed = 3 + sum(1 for _ in takewhile(lambda status: status == 422, others))
        refilled = (time.monotonic() - began) / 2
        assert 30 <= passed <= 31 + refilled, "no address alone keeps the user out, many do"
        assert auth.count("/token?password") == 3 + passed


def test_without_settings_the_page_says_which(settings: Settings) -> None:
    with TestClient(create_app(settings), follow_redirects=False) as client:
        client.headers["sec-fetch-site"] = "same-origin"
        page = client.get("/app/sign-in")
        assert "PGSCRIBE_SUPABASE_PUBLISHABLE_KEY" in page.text
        assert "<form" not in page.text.partition("<main")[2]
        for path in ("/app/sign-in", "/app/sign-in/link"):
            answer = client.post(path, data={"email": EMAIL, "password": PASSWORD})
            assert "not set up" in answer.text
        assert client.get("/jobs", headers={"Cookie": f"{COOKIE}={'A' * 43}"}).status_code == 401
