"""Sessions of browsers: refreshed once, ended at once, of no use to who reads them."""

import base64
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import psycopg
import pytest

from jobs.settings import Settings
from jobs.sql import WEB_SESSIONS
from tests import ports
from tests.conftest import MakeUser
from tests.streams import Stream, until
from tests.supabase_auth.conftest import COOKIE, EMAIL, Site, enter, running
from tests.supabase_auth.server import Auth
from web import sessions
from web.auth import session_claims
from web.sessions import SessionKey

REFRESH = "/token?refresh_token"
SOON = 30  # seconds: an access token that is good, and is refreshed
PAST = -5  # has ended; clocks may differ by 10 s, so that it can be signed in with


def begin(site: Site, auth: Auth, lifetime: int) -> str:
    """Return the cookie of a session whose first access token lasts so long; later ones an hour."""
    auth.lifetime = lifetime
    cookie = site.sign_in()
    auth.lifetime = 3600
    return cookie


def session_id(cookie: str) -> bytes:
    key = SessionKey.read(cookie)
    assert key is not None
    return key.id


def count(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from pgscribe.web_sessions").fetchone()
    assert row is not None
    return int(row[0])


def assert_ended(response: httpx2.Response) -> None:
    assert response.status_code == 401
    assert response.json()["code"] == "not_authenticated"


def assert_away(response: httpx2.Response) -> None:
    assert response.status_code == 503
    assert response.json()["code"] == "sign_in_unavailable"
    assert response.headers["retry-after"] == "5"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once after a failure."""
    monkeypatch.setattr(sessions, "COOLDOWN", 0)


# Refreshing


@pytest.mark.parametrize("lifetime", [SOON, PAST])
def test_many_requests_to_two_servers_refresh_once(
    site: Site, project: Settings, auth: Auth, conn: psycopg.Connection, lifetime: int
) -> None:
    cookie = begin(site, auth, lifetime)
    auth.gate.clear()
    with running(project, auth) as other, ThreadPoolExecutor(20) as threads:
        asked = [threads.submit((site, other)[n % 2].ask, cookie) for n in range(20)]
        until(lambda: auth.count(REFRESH) and waiting(conn), "one refreshes, the other waits")
        assert not any(answer.done() for answer in asked)
        auth.gate.set()
        assert {answer.result().status_code for answer in asked} == {200}
        assert auth.count(REFRESH) == 1
        assert {site.ask(cookie).status_code, other.ask(cookie).status_code} == {200}
    assert auth.count(REFRESH) == 1
    (session,) = auth.sessions.values()
    assert len(session.tokens) == 2


def waiting(conn: psycopg.Connection) -> bool:
    """Return whether a server waits for the lock of a session."""
    row = conn.execute(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        " and query like '%lock_web_session%'"
    ).fetchone()
    return row != (0,)


def test_a_token_with_a_minute_left_is_not_refreshed(site: Site, auth: Auth) -> None:
    cookie = begin(site, auth, 120)
    assert site.ask(cookie).status_code == 200
    assert auth.count(REFRESH) == 0


def test_a_request_that_goes_away_leaves_the_new_tokens_to_the_next(site: Site, auth: Auth) -> None:
    cookie = begin(site, auth, PAST)
    auth.asked.clear()
    auth.gate.clear()
    with pytest.raises(httpx2.TimeoutException):
        httpx2.get(f"{site.url}/jobs", headers={"Cookie": f"{COOKIE}={cookie}"}, timeout=0.5)
    assert auth.asked.wait(60)
    auth.gate.set()
    assert site.ask(cookie).status_code == 200
    assert auth.count(REFRESH) == 1


@pytest.mark.parametrize("fault", ["cut", "html", "500", "503"])
@pytest.mark.usefixtures("impatient")
def test_auth_is_away(site: Site, auth: Auth, fault: Any) -> None:
    good, ended = begin(site, auth, SOON), begin(site, auth, PAST)
    auth.faults[REFRESH] = fault
    assert site.ask(good).status_code == 200, "its token is still good"
    assert_away(site.ask(ended))
    assert auth.count(REFRESH) == 2
    auth.faults.clear()
    assert site.ask(ended).status_code == 200, "the session was kept"
    assert site.ask(good).status_code == 200


@pytest.mark.usefixtures("impatient")
def test_a_refused_key_ends_nobodys_session(site: Site, auth: Auth) -> None:
    cookie = begin(site, auth, PAST)
    key, auth.key = auth.key, "sb_publishable_another"
    assert_away(site.ask(cookie))
    auth.key = key
    auth.limited = "3"
    assert_away(site.ask(cookie))
    auth.limited = None
    assert site.ask(cookie).status_code == 200


def test_while_auth_is_away_not_every_request_asks_it(site: Site, auth: Auth) -> None:
    good, ended = begin(site, auth, SOON), begin(site, auth, PAST)
    auth.faults[REFRESH] = "503"
    for _ in range(5):
        assert site.ask(good).status_code == 200
        assert_away(site.ask(ended))
    assert auth.count(REFRESH) == 2, "one for each session"


def test_auth_that_hangs_is_not_waited_for_long(
    site: Site, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, ended = begin(site, auth, SOON), begin(site, auth, PAST)
    monkeypatch.setattr(sessions, "REFRESH_TIMEOUT", 0.3)
    auth.gate.clear()
    began = time.monotonic()
    assert site.ask(good).status_code == 200
    assert_away(site.ask(ended))
    assert time.monotonic() - began < 5


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_held_is_not_waited_for_long(
    site: Site, auth: Auth, conn: psycopg.Connection, database: str
) -> None:
    conn.execute("alter function pgscribe.lock_web_session set lock_timeout = '200ms'")
    good, ended = begin(site, auth, SOON), begin(site, auth, PAST)
    with psycopg.connect(database) as holder:
        holder.execute("select from pgscribe.web_sessions for update")
        assert site.ask(good).status_code == 200
        assert_away(site.ask(ended))
    assert auth.count(REFRESH) == 0
    assert site.ask(ended).status_code == 200


@pytest.mark.parametrize("how", ["revoked", "banned", "reused"])
def test_auth_ends_the_session(site: Site, auth: Auth, conn: psycopg.Connection, how: str) -> None:
    cookie = begin(site, auth, SOON)
    (session,) = auth.sessions.values()
    if how == "revoked":
        auth.sessions.clear()
    elif how == "banned":
        session.user.banned = True
    else:  # somebody else has used the refresh token, twice, and some time ago
        for _ in range(2):
            auth.refreshed(session.tokens[-1].token)
        session.tokens[0].revoked_at = time.time() - 60
    assert_ended(site.ask(cookie))
    assert count(conn) == 0
    assert_ended(site.ask(cookie))
    assert auth.count(REFRESH) == 1


@pytest.mark.usefixtures("impatient")
def test_tokens_that_were_lost_on_the_way_are_given_again(site: Site, auth: Auth) -> None:
    cookie = begin(site, auth, PAST)
    auth.faults[REFRESH] = "lost"
    assert_away(site.ask(cookie))
    (session,) = auth.sessions.values()
    assert len(session.tokens) == 2
    session.tokens[0].revoked_at = time.time() - 3600  # long past the interval for reuse
    auth.faults.clear()
    assert site.ask(cookie).status_code == 200
    assert len(session.tokens) == 2, "the active one was given again"


@contextmanager
def process(project: Settings, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`pgscribe web` as a process of its own."""
    own = {
        "PGSCRIBE_DATABASE_URL": project.database_url.get_secret_value(),
        "PGSCRIBE_JWT_SECRET": project.require_jwt_secret(),
        "PGSCRIBE_SUPABASE_URL": project.supabase_url or "",
        "PGSCRIBE_SUPABASE_PUBLISHABLE_KEY": project.supabase_publishable_key or "",
    }
    command = [sys.executable, "-m", "jobs.cli", "web", "--port"]
    with (
        ports.reserved() as port,
        subprocess.Popen([*command, str(port)], env=os.environ | own, cwd=folder) as web,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: web.poll() is not None or is_up(url), "the web server is up")
            yield web, url
        finally:
            web.kill()


def is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz").is_success
    except httpx2.TransportError:
        return False


def test_a_server_is_killed_between_the_answer_and_the_commit(
    site: Site, project: Settings, auth: Auth, tmp_path: Path, conn: psycopg.Connection
) -> None:
    cookie = begin(site, auth, PAST)
    with process(project, tmp_path) as (web, url):
        auth.asked.clear()
        auth.gate.clear()
        asking = threading.Thread(target=lambda: ask_until_it_breaks(url, cookie))
        asking.start()
        assert auth.asked.wait(60)
        web.kill()
        web.wait()
        asking.join()
    auth.gate.set()  # Auth does what it was asked for; nobody is there to hear of it
    (session,) = auth.sessions.values()
    until(lambda: len(session.tokens) == 2, "the refresh token is used")
    assert site.ask(cookie).status_code == 200
    assert auth.count(REFRESH) == 2
    assert len(session.tokens) == 2
    assert count(conn) == 1


def ask_until_it_breaks(url: str, cookie: str) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{url}/jobs", headers={"Cookie": f"{COOKIE}={cookie}"}, timeout=30)


def test_a_server_that_stops_waits_for_auth_a_little(
    site: Site, project: Settings, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    cookie = begin(site, auth, PAST)
    monkeypatch.setattr(sessions, "REVOKE_TIMEOUT", 0.3)
    with running(project, auth) as other:
        auth.asked.clear()
        auth.gate.clear()
        headers = {"Cookie": f"{COOKIE}={cookie}"}
        with pytest.raises(httpx2.TimeoutException):
            httpx2.get(f"{other.url}/jobs", headers=headers, timeout=0.5)
        assert auth.asked.wait(60)
        began = time.monotonic()
    assert time.monotonic() - began < 5, "less than a refresh may take"
    auth.gate.set()
    assert site.ask(cookie).status_code == 200


def test_a_transaction_that_is_broken_off_changes_nothing(
    site: Site, auth: Auth, conn: psycopg.Connection
) -> None:
    cookie = begin(site, auth, PAST)
    auth.asked.clear()
    auth.gate.clear()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(site.ask, cookie)
        assert auth.asked.wait(60)
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where state = 'idle in transaction' and query like '%lock_web_session%'"
        )
        auth.gate.set()
        broken = asked.result()
    assert (broken.status_code, broken.json()["code"]) == (503, "database_unavailable")
    assert site.ask(cookie).status_code == 200
    (session,) = auth.sessions.values()
    assert len(session.tokens) == 2


# The end


def test_signing_out_ends_the_session_everywhere_at_once(
    site: Site, project: Settings, auth: Auth, conn: psycopg.Connection
) -> None:
    kept = site.sign_in()
    with running(project, auth) as other, site.browser() as http:
        enter(http)
        cookie = http.cookies[COOKIE]
        assert other.ask(cookie).status_code == 200
        done = http.post("/app/sign-out")
        assert (done.status_code, done.headers["location"]) == (303, "/app/sign-in")
        assert done.headers["set-cookie"].startswith(f'{COOKIE}=""; ')
        assert "Max-Age=0" in done.headers["set-cookie"]
        assert COOKIE not in http.cookies
        assert_ended(other.ask(cookie))
        assert_ended(site.ask(cookie))
        assert http.post("/app/sign-out").status_code == 303, "once more does no harm"
    assert auth.count("/logout") == 1
    assert len(auth.sessions) == 1
    assert site.ask(kept).status_code == 200, "the user's other session goes on"
    assert count(conn) == 1


@contextmanager
def following(site: Site, cookie: str) -> Iterator[Stream]:
    headers = {"Cookie": f"{COOKIE}={cookie}"}
    with httpx2.stream("GET", f"{site.url}/jobs/events", headers=headers, timeout=20) as response:
        assert response.status_code == 200
        stream = Stream(response)
        stream.expect("snapshot")
        yield stream


def test_streams_end_with_their_session_here_at_once(site: Site, conn: psycopg.Connection) -> None:
    with site.browser() as http:
        enter(http)
        out, kept, replaced = http.cookies[COOKIE], site.sign_in(), site.sign_in()
        with (
            following(site, out) as ended,
            following(site, replaced) as also_ended,
            following(site, kept) as goes_on,
        ):
            http.post("/app/sign-out")
            ended.expect_end()
            http.cookies.set(COOKIE, replaced, domain="127.0.0.1")
            enter(http)
            also_ended.expect_end()
            job = submit(conn)
            goes_on.until("job", id=job)


def submit(conn: psycopg.Connection) -> str:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path)"
        " select id, id || '/a.mp3' from auth.users where email = %s returning id::text",
        (EMAIL,),
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_streams_on_other_servers_end_soon(
    site: Site, project: Settings, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.auth.KEY_SECONDS", 5)
    cookie = site.sign_in()
    with running(project, auth) as other, following(other, cookie) as stream:
        with site.browser(Cookie=f"{COOKIE}={cookie}") as http:
            http.post("/app/sign-out")
        stream.expect("end", reason="token_expired")
        stream.expect_end()
        assert_ended(other.ask(cookie, "/jobs/events"))


@pytest.mark.parametrize("session", [bytes(32), b"\xff" * 32, bytes(range(32))])
def test_a_sessions_claims_end_within_five_minutes_and_change_each_minute(session: bytes) -> None:
    claims = {"sub": "ann", "exp": 10_000.0}
    ends = [session_claims(claims, session, now / 2)["exp"] for now in range(2000, 18_000)]
    ahead = {end - now / 2 for now, end in enumerate(ends, 2000)}
    assert (min(ahead), max(ahead)) == (240.5, 300)
    assert len(set(ends)) == pytest.approx(8000 / 60, abs=2)
    assert session_claims(claims, session, 9_999) == claims, "no later than its token's"


def test_signing_out_long_after_the_token_has_ended(site: Site, auth: Auth) -> None:
    cookie = begin(site, auth, PAST)
    with site.browser(Cookie=f"{COOKIE}={cookie}") as http:
        assert http.post("/app/sign-out").status_code == 303
    assert not auth.sessions


@pytest.mark.parametrize("fault", ["cut", "503", "hang", "gone"])
def test_signing_out_while_auth_is_away(
    site: Site, auth: Auth, monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    cookie = site.sign_in()
    monkeypatch.setattr(sessions, "REVOKE_TIMEOUT", 0.5)
    if fault == "hang":
        auth.gate.clear()
    elif fault == "gone":
        auth.sessions.clear()
    else:
        auth.faults["/logout"] = fault
    with site.browser(Cookie=f"{COOKIE}={cookie}") as http:
        assert http.post("/app/sign-out").status_code == 303
    assert_ended(site.ask(cookie))


def test_sessions_end_by_themselves(site: Site, conn: psycopg.Connection, user: UUID) -> None:
    cookie = site.sign_in()
    row = conn.execute(
        "select expires_at - created_at = interval '7 days', user_id = %s"
        " from pgscribe.web_sessions",
        (user,),
    ).fetchone()
    assert row == (True, True)

    def aged(seen: str, created: str) -> tuple[Any, ...] | None:
        """Use a session of that age, and return whether its end was put off, and to when."""
        conn.execute(
            "update pgscribe.web_sessions set last_seen_at = now() - %s::interval,"
            " created_at = now() - %s::interval, expires_at = now() + interval '1 hour'",
            (seen, created),
        )
        assert site.ask(cookie).status_code == 200
        return conn.execute(
            "select last_seen_at > now() - interval '1 minute',"
            " round(extract(epoch from expires_at - now()) / 86400, 1) from pgscribe.web_sessions"
        ).fetchone()

    assert aged("4 minutes", "1 day") == (False, pytest.approx(0.0, abs=0.05))
    assert aged("6 minutes", "1 day") == (True, 7)
    assert aged("6 minutes", "28 days") == (True, 2)
    conn.execute("update pgscribe.web_sessions set expires_at = now()")
    assert_ended(site.ask(cookie))
    assert count(conn) == 1
    site.sign_in()
    assert count(conn) == 1, "an expired one goes as a new one comes"


def test_a_database_that_is_read_only_is_no_reason_to_sign_in_again(
    project: Settings, auth: Auth, site: Site, conn: psycopg.Connection
) -> None:
    cookie = site.sign_in()
    conn.execute("update pgscribe.web_sessions set last_seen_at = now() - interval '1 hour'")
    name = conn.info.dbname
    conn.execute(f'alter database "{name}" set default_transaction_read_only = on')
    with running(project, auth) as other:
        assert other.ask(cookie).status_code == 200


def test_a_deleted_user_has_no_sessions(site: Site, conn: psycopg.Connection, user: UUID) -> None:
    cookie = site.sign_in()
    conn.execute("delete from auth.users where id = %s", (user,))
    assert_ended(site.ask(cookie))


# Secrecy


def test_the_database_holds_nothing_that_is_of_use(
    site: Site, auth: Auth, conn: psycopg.Connection
) -> None:
    auth.lifetime = SOON
    cookies = [site.sign_in(), site.sign_in()]
    auth.lifetime = 3600
    assert site.ask(cookies[0]).status_code == 200
    refresh_tokens = {token.token for s in auth.sessions.values() for token in s.tokens}
    assert len(refresh_tokens) == 3
    key = SessionKey.read(cookies[0])
    assert key is not None
    row = conn.execute(
        "select tokens from pgscribe.web_sessions where id = %s", (key.id,)
    ).fetchone()
    assert row is not None
    tokens = key.open(row[0])
    assert tokens.refresh_token in refresh_tokens
    raw = [base64.urlsafe_b64decode(cookie + "=") for cookie in cookies]
    parts = tokens.access_token.split(".")
    secrets = {*cookies, *refresh_tokens, tokens.access_token, *parts[1:]}
    secrets |= {found.hex() for found in raw} | {secret.encode().hex() for secret in secrets}
    dumped = dump(conn)
    assert session_id(cookies[0]).hex() in dumped
    assert not [secret for secret in secrets if secret in dumped]


def dump(conn: psycopg.Connection) -> str:
    """Return all rows of all tables, as text."""
    tables = conn.execute(
        "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname in"
        " ('public', 'pgscribe', 'procrastinate', 'auth', 'storage', 'supabase_migrations')"
    ).fetchall()
    texts = [
        text
        for (table,) in tables
        for (text,) in conn.execute(f"select t::text from {table} t").fetchall()
    ]
    assert len(tables) > 10
    return "\n".join(texts)


def test_tokens_are_good_in_their_own_session_only(
    site: Site, auth: Auth, conn: psycopg.Connection, make_user: MakeUser,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mine = site.sign_in()
    auth.add(make_user(), "bob@example.org", "staple")
    with site.browser() as http:
        enter(http, "bob@example.org", "staple")
        theirs = http.cookies[COOKIE]
    conn.execute(
        "update pgscribe.web_sessions s set tokens = o.tokens from pgscribe.web_sessions o"
        " where s.id = %s and o.id = %s",
        (session_id(mine), session_id(theirs)),
    )
    assert_ended(site.ask(mine))
    assert "changed in the database" in caplog.text
    assert site.ask(theirs).status_code == 200


def test_no_role_of_the_api_comes_near(conn: psycopg.Connection, site: Site) -> None:
    cookie = site.sign_in()
    for role in ("anon", "authenticated", "service_role"):
        for statement in (
            "select from pgscribe.web_sessions",
            "select pgscribe.use_web_session(%s, '1 day', '1 day')",
            "select pgscribe.lock_web_session(%s)",
            "select pgscribe.end_web_session(%s)",
            "select pgscribe.refresh_web_session(%s, '\\x00')",
        ):
            values = (session_id(cookie),) if "%s" in statement else ()
            with conn.transaction(force_rollback=True):
                conn.execute(f"set local role {role}")
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(statement, values)
    assert site.ask(cookie).status_code == 200


# Requests


@pytest.mark.parametrize("cookie", ["", "x", "A" * 42, "A" * 44, "=" * 43, "é" * 43, "A" * 43])
def test_a_cookie_that_is_none_of_ours(site: Site, cookie: str) -> None:
    headers = [(b"Cookie", f"{COOKIE}={cookie}".encode())]
    assert_ended(httpx2.get(f"{site.url}/jobs", headers=headers))


def test_authorization_is_what_counts_where_there_is_some(site: Site, auth: Auth) -> None:
    cookie = site.sign_in()
    (session,) = auth.sessions
    token = auth.answer(session)["access_token"]
    bad = {"Authorization": "Bearer x.y.z", "Sec-Fetch-Site": "cross-site"}
    assert_ended(site.ask(cookie, **bad))
    assert_ended(site.ask(cookie, Authorization=""))
    assert_ended(site.ask(cookie, Authorization="Basic x"))
    assert site.ask("x", Authorization=f"Bearer {token}").status_code == 200


def test_a_session_acts_for_its_user_only(site: Site, user: UUID, make_user: MakeUser) -> None:
    cookie = site.sign_in()
    assert site.ask(cookie, **{"Pgscribe-User": str(user)}).status_code == 200
    assert site.ask(cookie, **{"Pgscribe-User": str(make_user())}).status_code == 403


def test_requests_of_a_session_count_for_its_user(project: Settings, auth: Auth) -> None:
    with running(project.model_copy(update={"rate_limit": 3}), auth) as site:
        cookies = [site.sign_in(), site.sign_in()]
        statuses = [site.ask(cookies[n % 2]).status_code for n in range(4)]
        assert statuses == [200, 200, 200, 429]


def test_guesses_are_slowed_down_and_sessions_are_not(project: Settings, auth: Auth) -> None:
    with running(project.model_copy(update={"failed_rate_limit": 3}), auth) as site:
        good = site.sign_in()
        statuses = [site.ask(f"{n}" * 43).status_code for n in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        assert site.ask(good).status_code == 200


def test_events_come_by_cookie_too(site: Site) -> None:
    cookie = site.sign_in()
    headers = {"Cookie": f"{COOKIE}={cookie}"}
    with httpx2.stream("GET", f"{site.url}/jobs/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")


def test_no_statement_reads_all_sessions(site: Site, conn: psycopg.Connection, user: UUID) -> None:
    conn.execute(
        "insert into pgscribe.web_sessions (id, user_id, tokens, expires_at)"
        " select sha256(n::text::bytea), %s, '\\x00', now() + interval '1 day'"
        " from generate_series(1, 20000) n",
        (user,),
    )
    conn.execute("analyze pgscribe.web_sessions")
    key = {"id": session_id(site.sign_in())}
    days = {"idle_days": 7, "days": 30}
    new = {"user_id": user, "sealed": b"x", "replaced": b"y" * 32}

    def scans() -> int:
        conn.execute("select pg_stat_force_next_flush()")
        row = conn.execute(
            "select seq_scan from pg_stat_user_tables where relname = 'web_sessions'"
        ).fetchone()
        assert row is not None
        return int(row[0])

    before = scans()
    for number in range(8):  # more often than it takes Postgres to settle for a plan
        conn.execute(WEB_SESSIONS["use"], key | days)
        conn.execute(WEB_SESSIONS["lock"], key)
        conn.execute(WEB_SESSIONS["refresh"], key | {"sealed": b"x"})
        conn.execute(WEB_SESSIONS["create"], {"id": bytes([number]) * 32} | new | days)
        conn.execute(WEB_SESSIONS["end"], {"id": bytes([number]) * 32})
    assert scans() == before
