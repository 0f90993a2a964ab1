"""Every route, asked by everybody: who gets what."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx2
import jwt
import psycopg
import pytest

from db.embedded import EmbeddedPostgres
from jobs import keys
from jobs.scopes import USUAL_SCOPES, Scope
from jobs.settings import Settings
from tests.conftest import TEMPLATE
from tests.live import serve
from web import auth, waiting
from web.app import ENDPOINTS, create_app
from web.auth import issue_token

USER = "Pgscribe-User"
PASSWORD = "the password of dev's sign-in"


@dataclass
class Site:
    """A server with two users, an operator and a job of the owner's whose audio is in storage."""

    http: httpx2.Client
    conn: psycopg.Connection
    settings: Settings
    owner: UUID
    other: UUID
    operator: UUID
    storage: Path
    cookies: dict[UUID, str] = field(default_factory=dict)

    def new_job(self) -> UUID:
        """Insert a job of the owner's, and cancel it."""
        path = f"{self.owner}/{uuid4()}.mp3"
        row = self.conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
            (self.owner, path),
        ).fetchone()
        assert row is not None
        self.conn.execute("select cancel_processing_job(%s)", row)
        (self.storage / str(self.owner)).mkdir(parents=True, exist_ok=True)
        (self.storage / path).write_bytes(b"sound")
        job_id: UUID = row[0]
        return job_id

    def new_endpoint(self) -> UUID:
        """Make an endpoint of the owner's, their only one."""
        self.conn.execute("delete from webhook_endpoints where user_id = %s", (self.owner,))
        row = self.conn.execute(
            "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')"
            " returning id",
            (self.owner,),
        ).fetchone()
        assert row is not None
        endpoint: UUID = row[0]
        return endpoint

    def delivery(self, endpoint: UUID) -> UUID:
        """Return the endpoint's only delivery."""
        query = "select id from webhook_deliveries where endpoint_id = %s"
        ((delivery,),) = self.conn.execute(query, (endpoint,)).fetchall()
        assert isinstance(delivery, UUID)
        return delivery

    def token(self, user: UUID, **claims: Any) -> dict[str, str]:
        """Return the header with a token of a user's, as changed by ``claims``."""
        signed = issue_token(self.settings, user, lifetime=600)
        known = jwt.decode(signed, options={"verify_signature": False})
        secret = self.settings.require_jwt_secret()
        return bearer(jwt.encode(known | claims, secret, "HS256"))

    def session(self, user: UUID, **headers: str) -> dict[str, str]:
        """Return the header with the cookie of a user who has signed in to the web app."""
        cookie = self.cookies.get(user)
        if cookie is None:
            form = {"email": f"{user}@example.org", "password": PASSWORD}
            same = {"Sec-Fetch-Site": "same-origin"}
            answer = self.http.post("/app/sign-in", data=form, headers=same)
            cookie = self.cookies[user] = answer.headers["set-cookie"].partition(";")[0]
            self.http.cookies.clear()
        return {"Cookie": cookie, "Sec-Fetch-Site": "same-origin"} | headers

    def key(self, user: UUID | None, *scopes: Scope) -> dict[str, str]:
        """Return the header with a new key."""
        _, secret = keys.create(self.conn, "test", user_id=user, scopes=scopes or tuple(Scope))
        return bearer(secret)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def site(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("who_may")
    postgres.create_database("who_may", template=TEMPLATE)
    url = postgres.url(database="who_may")
    settings = Settings.load(
        database_url=url,
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=folder / "storage",
        rate_limit=0,
        failed_rate_limit=0,
        openai_wait=1,
        local_sign_in_password=PASSWORD,
    )
    owner, other, operator = uuid4(), uuid4(), uuid4()
    with psycopg.connect(url, autocommit=True) as conn, serve(create_app(settings)) as base:
        for user in (owner, other, operator):
            values = (user, f"{user}@example.org")
            conn.execute("insert into auth.users (id, email) values (%s, %s)", values)
        conn.execute("insert into pgscribe.operators (user_id) values (%s)", (operator,))
        with httpx2.Client(base_url=base, timeout=30) as http:
            yield Site(http, conn, settings, owner, other, operator, folder / "storage")
    postgres.drop_database("who_may")


@dataclass
class Ask:
    """A request for a route, and what it is answered with for those who may."""

    path: str
    good: int  # for the owner
    stranger: int  # for another user who is signed in
    scope: Scope | None
    arguments: dict[str, Any] = field(default_factory=dict)
    operator: int | None = None  # for an operator, where the owner may not


def asks(site: Site) -> dict[tuple[str, str], Ask]:
    """Return a request for each route that asks who one is."""
    endpoint = site.new_endpoint()
    job = f"/jobs/{site.new_job()}"
    hook = f"/webhooks/endpoints/{endpoint}"
    delivery = f"/webhooks/deliveries/{site.delivery(endpoint)}"
    secret: dict[str, Any] = {"json": {}}
    hear, hook_up = Scope.WEBHOOKS_READ, Scope.WEBHOOKS_WRITE
    submission = {"filePath": f"{site.owner}/a.mp3"}
    file = {"files": {"file": ("a.mp3", b"sound")}, "data": {"model": "whisper-1"}}
    read, write = Scope.JOBS_READ, Scope.JOBS_WRITE
    chosen = {"json": {"filter": {"owner": str(site.owner), "error_code": "none"}}}
    owner = f"/operate/owners/{site.owner}"

    def operate(path: str, good: int, arguments: dict[str, Any] | None = None) -> Ask:
        return Ask(path, 403, 403, Scope.OPERATE, arguments or {}, operator=good)

    return {
        ("GET", "/me"): Ask("/me", 200, 200, None),
        ("GET", "/operate/overview"): operate("/operate/overview", 200),
        ("GET", "/metrics"): operate("/metrics", 200),
        ("GET", "/operate/jobs"): operate("/operate/jobs", 200),
        ("POST", "/operate/jobs/cancel"): operate("/operate/jobs/cancel", 200, chosen),
        ("POST", "/operate/jobs/retry"): operate("/operate/jobs/retry", 200, chosen),
        ("GET", "/operate/webhooks/deliveries"): operate("/operate/webhooks/deliveries", 200),
        ("POST", "/operate/webhooks/replay"): operate(
            "/operate/webhooks/replay", 200, {"json": {"ids": [str(uuid4())]}}
        ),
        ("POST", "/operate/queue/pause"): operate("/operate/queue/pause", 204),
        ("POST", "/operate/queue/resume"): operate("/operate/queue/resume", 204),
        ("POST", "/operate/owners/{owner_id}/pause"): operate(f"{owner}/pause", 204),
        ("POST", "/operate/owners/{owner_id}/resume"): operate(f"{owner}/resume", 204),
        ("GET", "/webhooks/endpoints"): Ask("/webhooks/endpoints", 200, 200, hear),
        ("POST", "/webhooks/endpoints"): Ask(
            "/webhooks/endpoints", 201, 201, hook_up, {"json": {"url": "https://example.org"}}
        ),
        ("GET", "/webhooks/endpoints/{endpoint_id}"): Ask(hook, 200, 404, hear),
        ("PATCH", "/webhooks/endpoints/{endpoint_id}"): Ask(
            hook, 200, 404, hook_up, {"json": {"description": "mine"}}
        ),
        ("DELETE", "/webhooks/endpoints/{endpoint_id}"): Ask(hook, 204, 404, hook_up),
        ("POST", "/webhooks/endpoints/{endpoint_id}/secret"): Ask(
            f"{hook}/secret", 200, 404, hook_up, secret
        ),
        ("POST", "/webhooks/endpoints/{endpoint_id}/test"): Ask(f"{hook}/test", 200, 404, hook_up),
        ("POST", "/webhooks/secret"): Ask("/webhooks/secret", 200, 200, hook_up, secret),
        ("GET", "/webhooks/deliveries"): Ask("/webhooks/deliveries", 200, 200, hear),
        ("GET", "/webhooks/deliveries/{delivery_id}"): Ask(delivery, 200, 404, hear),
        ("POST", "/webhooks/deliveries/{delivery_id}/replay"): Ask(
            f"{delivery}/replay", 200, 404, hook_up
        ),
        ("POST", "/webhooks/replay"): Ask(
            "/webhooks/replay", 200, 200, hook_up, {"json": {"since": "2026-01-01T00:00:00Z"}}
        ),
        ("GET", "/jobs/events"): Ask("/jobs/events", 200, 200, read),
        ("GET", "/jobs/{job_id}/events"): Ask(f"{job}/events", 200, 404, read),
        ("POST", "/process"): Ask("/process", 202, 403, write, {"json": submission}),
        ("POST", "/process/batch"): Ask(
            "/process/batch", 202, 403, write, {"json": {"jobs": [submission]}}
        ),
        ("GET", "/jobs"): Ask("/jobs", 200, 200, read),
        ("GET", "/jobs/{job_id}"): Ask(job, 200, 404, read),
        ("POST", "/jobs/{job_id}/cancel"): Ask(f"{job}/cancel", 200, 404, write),
        ("POST", "/jobs/{job_id}/retry"): Ask(f"{job}/retry", 200, 404, write),
        ("DELETE", "/jobs/{job_id}"): Ask(job, 204, 404, write),
        ("GET", "/search"): Ask("/search?q=word", 200, 200, read),
        ("GET", "/limits"): Ask("/limits", 200, 200, read),
        ("GET", "/jobs/{job_id}/transcript"): Ask(f"{job}/transcript", 409, 404, read),
        ("GET", "/jobs/{job_id}/transcript.{extension}"): Ask(
            f"{job}/transcript.srt", 409, 404, read
        ),
        ("GET", "/jobs/{job_id}/corrections"): Ask(f"{job}/corrections", 200, 404, read),
        ("PATCH", "/jobs/{job_id}/corrections"): Ask(
            f"{job}/corrections",
            409,
            404,
            write,
            {"json": {"corrections": [{"segment": 0, "speaker": "Anna"}]}},
        ),
        ("POST", "/uploads"): Ask(
            "/uploads", 201, 201, Scope.AUDIO_WRITE, {"json": {"name": "a.mp3", "size": 5}}
        ),
        ("PUT", "/uploads/{name:path}"): Ask(
            "/uploads/a.mp3", 201, 201, Scope.AUDIO_WRITE, {"content": b"sound"}
        ),
        ("GET", "/jobs/{job_id}/audio"): Ask(f"{job}/audio", 307, 404, Scope.AUDIO_READ),
        ("GET", "/jobs/{job_id}/waveform"): Ask(f"{job}/waveform", 200, 404, Scope.AUDIO_READ),
        # Nobody works on it, so that the wait ends by its limit.
        ("POST", "/v1/audio/transcriptions"): Ask(
            "/v1/audio/transcriptions", 504, 504, write, file
        ),
        ("POST", "/v1/audio/translations"): Ask("/v1/audio/translations", 504, 504, write, file),
        ("GET", "/v1/models"): Ask("/v1/models", 200, 200, None),
        ("GET", "/v1/models/{model:path}"): Ask("/v1/models/whisper-1", 200, 200, None),
    }


ROUTES = [(e.method, e.path) for e in ENDPOINTS if "user" in e.takes]


def answer(site: Site, method: str, ask: Ask, headers: dict[str, str]) -> int:
    """Return the status; a stream is not read to its end."""
    with site.http.stream(method, ask.path, headers=headers, **ask.arguments) as response:
        if response.status_code == 401:
            assert response.headers["www-authenticate"].startswith("Bearer")
        return response.status_code


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_who_may_use_a_route(site: Site, route: tuple[str, str]) -> None:
    ask = asks(site)[route]

    def expect(status: int, headers: dict[str, str], who: str) -> None:
        assert (who, answer(site, route[0], ask, headers)) == (who, status)

    invalid = 400 if route[1].startswith("/v1/") else 422
    expect(401, {}, "nobody")
    expect(401, bearer("x.y.z"), "a bad token")
    expect(401, site.token(site.owner, exp=int(time.time()) - 60), "an expired token")
    expect(401, site.token(site.owner, aud="elsewhere"), "a token for somebody else")
    expect(403, site.token(site.owner, role="anon"), "the anon role")
    expect(403, site.token(site.owner, role="service_role"), "the service role")
    expect(401, bearer("pgs_0123"), "a bad key")
    expect(401, site.session(site.owner) | bearer("x.y.z"), "a bad token and a session")
    bad = "pgscribe-session=" + "A" * 43
    expect(401, site.session(site.owner, Cookie=bad), "a bad session")
    if route[0] != "GET":
        led = site.session(site.owner, **{"Sec-Fetch-Site": "cross-site"})
        expect(403, led, "the owner's browser, led by another site")
    expect(ask.stranger, site.session(site.other), "another user's session")
    expect(403, site.session(site.owner, **{USER: str(site.other)}), "a session for another")
    expect(ask.stranger, site.token(site.other), "another user")
    expect(invalid, site.key(None), "a service that states nobody")
    if ask.scope is not None:
        others = [scope for scope in Scope if scope is not ask.scope]
        expect(403, site.key(site.owner, *others), "a key without the scope")
    expect(403, site.key(site.owner) | {USER: str(site.other)}, "a user's key for another")
    expect(ask.stranger, site.key(None) | {USER: str(site.other)}, "a service for another user")
    expect(ask.good, site.token(site.owner), "the owner")
    ask = asks(site)[route]
    expect(ask.good, site.session(site.owner), "the owner's session")
    ask = asks(site)[route]
    expect(ask.good, site.key(site.owner), "the owner's key")
    ask = asks(site)[route]
    expect(ask.good, site.key(None) | {USER: str(site.owner)}, "a service for the owner")
    if ask.operator is not None:
        expect(ask.operator, site.token(site.operator), "an operator")
        expect(ask.operator, site.session(site.operator), "an operator's session")
        expect(ask.operator, site.key(site.operator), "an operator's key")
        expect(403, site.key(site.operator, *USUAL_SCOPES), "an operator's usual key")
        expect(403, site.token(site.operator, pgscribe_key=str(uuid4())), "a key that is none")


def test_a_key_deletes_audio_only_with_the_scope_for_it(site: Site) -> None:
    key = site.key(site.owner, Scope.JOBS_WRITE)
    assert site.http.delete(f"/jobs/{site.new_job()}", headers=key).status_code == 403
    path = f"/jobs/{site.new_job()}?keep_audio=1"
    assert site.http.delete(path, headers=key).status_code == 204


def test_a_stream_that_a_key_opened_ends_so_that_the_key_is_looked_at_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "KEY_SECONDS", 2)
    headers = site.key(site.owner)
    with site.http.stream("GET", "/jobs/events", headers=headers) as response:
        assert response.status_code == 200
        assert "token_expired" in response.read().decode()


def test_a_user_waits_for_so_many_jobs_at_a_time(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = asks(site)["POST", "/v1/audio/transcriptions"]
    monkeypatch.setattr(waiting, "MOST", 0)
    assert answer(site, "POST", ask, site.token(site.owner)) == 429
    monkeypatch.setattr(waiting, "MOST", 1)
    assert answer(site, "POST", ask, site.token(site.owner)) == 504
    assert answer(site, "POST", ask, site.token(site.owner)) == 504, "the first waits no more"


def test_the_others_are_open_to_all_or_take_a_link(site: Site) -> None:
    open_routes = {(e.method, e.path) for e in ENDPOINTS} - set(ROUTES)
    assert open_routes == {
        ("PUT", "/uploads/signed/{token}"),
        ("POST", "/uploads/resumable/{token}"),
        ("HEAD", "/uploads/resumable/{token}"),
        ("PATCH", "/uploads/resumable/{token}"),
        ("DELETE", "/uploads/resumable/{token}"),
        ("OPTIONS", "/uploads/resumable/{token}"),  # says what there is, of no upload
        ("GET", "/audio/{token}"),
    }
    assert site.http.put("/uploads/signed/x", content=b"sound").status_code == 403
    tus = {"Tus-Resumable": "1.0.0", "Upload-Length": "5", "Upload-Offset": "0"}
    tus["Content-Type"] = "application/offset+octet-stream"
    for method in ("POST", "HEAD", "PATCH", "DELETE"):
        answered = site.http.request(method, "/uploads/resumable/x", headers=tus)
        assert answered.status_code == 403
    assert site.http.get("/audio/x").status_code == 403
    for path in ("/healthz", "/openapi.json", "/docs"):
        assert site.http.get(path).status_code == 200


def test_a_token_is_no_link_and_a_link_no_token(site: Site) -> None:
    token = issue_token(site.settings, site.owner, lifetime=600)
    assert site.http.put(f"/uploads/signed/{token}", content=b"sound").status_code == 403
    assert site.http.get(f"/audio/{token}").status_code == 403
    body = {"name": "a.mp3", "size": 5}
    ticket = site.http.post("/uploads", json=body, headers=site.token(site.owner)).json()
    link = ticket["url"].rpartition("/")[2]
    assert site.http.get("/jobs", headers=bearer(link)).status_code == 401
    assert site.http.get(f"/audio/{link}").status_code == 403
    assert site.http.put(ticket["url"], content=b"sound").status_code == 201
    assert site.http.put(ticket["url"], content=b"other").status_code == 409
