"""What every answer has, and how much may be asked: over real sockets, errors and streams too."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psycopg
import pytest
import uvicorn
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jobs import database, keys, logs
from jobs.errors import SettingsError
from jobs.scopes import Scope
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token
from web.middleware import REQUEST_ID, allow_body

Headers = dict[str, str]

APP = "https://app.example.org"
LIMIT = 1000  # bytes of a body


async def count(request: Request) -> Response:
    return JSONResponse({"size": len(await request.body())})


async def count_more(request: Request) -> Response:
    allow_body(request, 10 * LIMIT)
    return await count(request)


async def page(_: Request) -> Response:
    policy = "default-src 'self'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "max-age=60"}
    return Response("hello", headers=headers)


async def fail(_: Request) -> Response:
    raise ZeroDivisionError("a secret of ours")


class Streams:
    """A response whose second part waits until the first has arrived."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    async def whole(self, _: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.to_thread(self.arrived.wait)
            yield b"two"

        return StreamingResponse(parts())

    async def broken(self, _: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            yield b"one"
            await asyncio.to_thread(self.arrived.wait)
            raise ZeroDivisionError("in the middle")

        return StreamingResponse(parts())


@contextmanager
def served(settings: Settings, streams: Streams | None = None, **options: Any) -> Iterator[str]:
    """The API with some routes more, by uvicorn, as `pgscribe web` runs it."""
    streams = streams or Streams()
    app = create_app(settings)
    app.router.routes += [
        Route("/count", count, methods=["POST"]),
        Route("/count-more", count_more, methods=["POST"]),
        Route("/page", page),
        Route("/fail", fail),
        Route("/stream", streams.whole),
        Route("/broken", streams.broken),
    ]
    config = uvicorn.Config(app, log_config=None, server_header=False, **options)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            streams.arrived.set()
            server.should_exit = True
            thread.join()


@pytest.fixture
def limited(settings: Settings) -> Settings:
    return settings.model_copy(update={"cors_origins": (APP,), "max_body_bytes": LIMIT})


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def api(limited: Settings, streams: Streams) -> Iterator[httpx2.Client]:
    with served(limited, streams) as url, httpx2.Client(base_url=url) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}


ANSWERS = [
    ("GET", "/healthz", 200),
    ("GET", "/jobs", 200),
    ("POST", "/process", 422),
    ("GET", "/jobs/00000000-0000-4000-8000-000000000007", 404),
    ("GET", "/nowhere", 404),
    ("PATCH", "/jobs", 405),
    ("GET", "/fail", 500),
    ("PUT", "/uploads/a.mp3", 422),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
def test_every_answer_has_an_id_and_safe_headers(
    api: httpx2.Client, headers: Headers, method: str, path: str, status: int
) -> None:
    response = api.request(method, path, headers=headers | {"Origin": APP})
    assert response.status_code == status, response.text
    expected = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cache-control": "no-store",
        "access-control-allow-origin": APP,
        "vary": "Origin",
    }
    assert {name: response.headers.get(name) for name in expected} == expected
    assert len(response.headers[REQUEST_ID]) == 32
    assert {"strict-transport-security", "server"}.isdisjoint(response.headers)
    if status >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        assert "secret" not in response.text


def test_no_token_and_a_database_that_is_away(
    limited: Settings, headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CONNECTION_TIMEOUT", 1.0)
    away = SecretStr("postgresql://postgres@127.0.0.1:1/postgres")
    with served(limited.model_copy(update={"database_url": away})) as url:
        key = {"Authorization": f"Bearer {keys.generate(uuid4())}"}
        for sent, status in (({}, 401), (headers, 503), (key, 503)):
            response = httpx2.get(f"{url}/jobs", headers=sent | {"Origin": APP})
            assert response.status_code == status
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["access-control-allow-origin"] == APP
            assert REQUEST_ID in response.headers


def test_an_answer_may_say_otherwise(api: httpx2.Client) -> None:
    response = api.get("/page")
    assert response.headers["content-security-policy"] == "default-src 'self'"
    assert response.headers["cache-control"] == "max-age=60"
    assert response.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("sent", ["a", "A-b_c.9", "x" * 64])
def test_sane_request_ids_are_kept(api: httpx2.Client, sent: str) -> None:
    assert api.get("/healthz", headers={REQUEST_ID: sent}).headers[REQUEST_ID] == sent


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "a,b", "<script>", "a\tb", "\xe9"])
def test_others_are_replaced(api: httpx2.Client, sent: str) -> None:
    headers = [(REQUEST_ID.encode(), sent.encode("latin-1"))]
    got = api.get("/healthz", headers=headers).headers[REQUEST_ID]
    assert len(got) == 32


def test_log_lines_name_their_request(api: httpx2.Client, caplog: pytest.LogCaptureFixture) -> None:
    def name(record: logging.LogRecord) -> bool:
        record.about = logs.context()
        return True

    caplog.handler.addFilter(name)
    caplog.set_level(logging.INFO)
    for request_id in ("one", "two"):
        api.get("/fail", headers={REQUEST_ID: request_id})
    logging.getLogger("test").info("outside")
    seen = [
        (record.about.get("request_id"), record.name)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name in {"web.problems", "test", "uvicorn.access"}
    ]
    assert seen.count(("one", "web.problems")) == 1
    assert seen.count(("two", "web.problems")) == 1
    assert ("two", "uvicorn.access") in seen
    assert seen[-1] == (None, "test")
    assert "uvicorn.error" not in {r.name for r in caplog.records if r.levelno >= logging.ERROR}


def test_answers_are_not_held_back(api: httpx2.Client, streams: Streams) -> None:
    with api.stream("GET", "/stream") as response:
        parts = response.iter_raw()
        assert next(parts) == b"one"
        streams.arrived.set()
        assert b"".join(parts) == b"two"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_an_answer_that_breaks_is_seen_to_be_broken(
    api: httpx2.Client, streams: Streams, caplog: pytest.LogCaptureFixture
) -> None:
    with api.stream("GET", "/broken") as response:
        parts = response.iter_raw()
        assert next(parts) == b"one"
        streams.arrived.set()
        with pytest.raises(httpx2.RemoteProtocolError):
            next(parts)
    assert "in the middle" in caplog.text
    assert api.get("/healthz").status_code == 200


# Bodies ----------------------------------------------------------------------------------------


def test_bodies_have_a_limit_announced_or_not(api: httpx2.Client) -> None:
    for path, limit in (("/count", LIMIT), ("/count-more", 10 * LIMIT)):
        assert api.post(path, content=b"x" * limit).json() == {"size": limit}
        assert api.post(path, content=iter([b"x"] * limit)).json() == {"size": limit}
        for content in (b"x" * (limit + 1), iter([b"x"] * (limit + 1))):
            response = api.post(path, content=content)
            assert response.status_code == 413
            assert response.json()["code"] == "body_too_large"
            assert str(limit) in response.json()["detail"]
            assert response.headers["x-content-type-options"] == "nosniff"


def test_a_body_is_refused_by_what_it_announces(api: httpx2.Client) -> None:
    host, port = api.base_url.host, api.base_url.port
    assert port is not None
    with socket.create_connection((host, port)) as connection:
        connection.sendall(
            b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_uploads_have_their_own_limit(api: httpx2.Client, headers: Headers) -> None:
    response = api.put("/uploads/a.mp3", content=b"x" * (LIMIT + 1), headers=headers)
    assert response.status_code == 201


# Other origins ---------------------------------------------------------------------------------

PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, idempotency-key, pgscribe-user",
}


def test_pages_of_known_origins_may_use_the_api(api: httpx2.Client, headers: Headers) -> None:
    preflight = api.options("/process", headers={"Origin": APP} | PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == APP
    assert "access-control-allow-credentials" not in preflight.headers
    assert REQUEST_ID in preflight.headers
    response = api.get("/jobs", headers=headers | {"Origin": APP})
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"Location", "Retry-After", "RateLimit", REQUEST_ID} <= set(exposed)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", f"{APP}.evil.example", f"{APP}:444", "http://app.example.org"],
)
def test_pages_of_others_may_not(api: httpx2.Client, headers: Headers, origin: str) -> None:
    preflight = api.options("/process", headers={"Origin": origin} | PREFLIGHT)
    assert preflight.status_code == 400
    response = api.get("/jobs", headers=headers | {"Origin": origin})
    for answer in (preflight, response):
        assert "access-control-allow-origin" not in answer.headers


def test_by_default_no_page_may_and_all_may_only_without_credentials(
    settings: Settings, headers: Headers
) -> None:
    with served(settings) as url:
        assert (
            httpx2.options(f"{url}/process", headers={"Origin": APP} | PREFLIGHT).status_code == 405
        )
        response = httpx2.get(f"{url}/jobs", headers=headers | {"Origin": APP})
        assert not any(name.startswith("access-control") for name in response.headers)
    with served(settings.model_copy(update={"cors_origins": ("*",)})) as url:
        response = httpx2.get(f"{url}/jobs", headers=headers | {"Origin": "https://any.example"})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers


def test_settings_hold_lists(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("PGSCRIBE_CORS_ORIGINS", f"{APP}, http://localhost:3000,http://[::1]:5173")
    monkeypatch.setenv("PGSCRIBE_TRUSTED_PROXIES", "10.0.0.0/8,::1")
    loaded = Settings.load()
    assert loaded.cors_origins == (APP, "http://localhost:3000", "http://[::1]:5173")
    assert loaded.trusted_proxies == ("10.0.0.0/8", "::1")
    for origin in ("app.example.org", f"{APP}/", "https://*.example.org", "null", "file://"):
        monkeypatch.setenv("PGSCRIBE_CORS_ORIGINS", origin)
        with pytest.raises(SettingsError, match="PGSCRIBE_CORS_ORIGINS"):
            Settings.load()
    monkeypatch.setenv("PGSCRIBE_CORS_ORIGINS", "")
    for proxy in ("*", "proxy", "10.0.0.1/8"):
        monkeypatch.setenv("PGSCRIBE_TRUSTED_PROXIES", proxy)
        with pytest.raises(SettingsError, match="PGSCRIBE_TRUSTED_PROXIES"):
            Settings.load()


def test_only_trusted_proxies_say_who_and_how(settings: Settings) -> None:
    said = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
    with served(settings, proxy_headers=False) as url:
        assert "strict-transport-security" not in httpx2.get(f"{url}/healthz", headers=said).headers
    with served(settings, proxy_headers=True, forwarded_allow_ips=["127.0.0.0/8"]) as url:
        answer = httpx2.get(f"{url}/healthz", headers=said)
        assert answer.headers["strict-transport-security"] == "max-age=31536000"


# Rates -----------------------------------------------------------------------------------------


def test_each_user_and_each_key_has_a_rate(
    settings: Settings, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    _, key = keys.create(conn, "a", user_id=user, scopes=frozenset(Scope))
    _, slow = keys.create(conn, "b", user_id=user, scopes=frozenset(Scope), requests_per_minute=1)
    with served(settings.model_copy(update={"rate_limit": 2})) as url:
        renewed = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=90)}"}
        answers = [httpx2.get(f"{url}/jobs", headers=sent) for sent in (headers, renewed, headers)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert answers[0].headers["ratelimit"] == '"default";r=1;t=30'
        assert answers[0].headers["ratelimit-policy"] == '"default";q=2;w=60'
        refused = answers[2]
        assert refused.json()["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        for secret, limit in ((key, 2), (slow, 1)):
            sent = {"Authorization": f"Bearer {secret}"}
            statuses = [
                httpx2.get(f"{url}/jobs", headers=sent).status_code for _ in range(limit + 1)
            ]
            assert statuses == [200] * limit + [429]
        assert httpx2.get(f"{url}/healthz", headers=headers).status_code == 200


def test_an_address_that_fails_too_often_holds_up_nobody_with_a_valid_token(
    settings: Settings, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    _, known = keys.create(conn, "a", user_id=user, scopes=frozenset(Scope))
    _, unseen = keys.create(conn, "b", user_id=user, scopes=frozenset(Scope))
    by_known, by_unseen = ({"Authorization": f"Bearer {key}"} for key in (known, unseen))
    guess = {"Authorization": f"Bearer {keys.generate(uuid4())}"}
    with served(settings.model_copy(update={"failed_rate_limit": 3})) as url:
        assert httpx2.get(f"{url}/jobs", headers=by_known).status_code == 200
        wrong: list[Headers] = [{}, {"Authorization": "Bearer x"}, guess, guess, {}]
        statuses = [httpx2.get(f"{url}/jobs", headers=sent).status_code for sent in wrong]
        assert statuses == [401, 401, 401, 429, 429]
        for sent, status in ((headers, 200), (by_known, 200), (by_unseen, 429)):
            assert httpx2.get(f"{url}/jobs", headers=sent).status_code == status
        assert httpx2.get(f"{url}/healthz").status_code == 200
        assert httpx2.get(f"{url}/nowhere").status_code == 404
