"""The gateway of docker-compose.yml: routes, API keys, Studio's password; pgscribe behind it."""

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import jwt
import pytest
import yaml
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from jobs.settings import Settings
from jobs.storage.supabase import SupabaseStorage
from tests.conftest import REPO
from tests.live import serve
from tests.self_hosting.envoy import CONFIG, ENVOY, SERVICES, config, gateway, source
from tests.supabase_storage.server import Bucket, StandIn, make_app
from web.app import create_app

Keys = Mapping[str, str]


def echo(name: str) -> Starlette:
    """Answer with what the service was asked."""

    async def answer(request: Request) -> Response:
        url = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return JSONResponse(
            {"service": name, "url": url, "headers": dict(request.headers)},
            headers={"Content-Range": "0-1/2"},
        )

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", answer, methods=methods)])


@pytest.fixture(scope="module")
def url(keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway in front of services that say what they were asked."""
    folder = tmp_path_factory.mktemp("gateway")
    auth, rest, storage, realtime, studio = (serve(echo(name)) for name in SERVICES)
    with auth as a, rest as r, storage as s, realtime as t, studio as u:
        services = dict(zip(SERVICES, (a, r, s, t, u), strict=True))
        with gateway(folder, keys, services) as address:
            yield address
        log = (folder / "gateway.log").read_text()
        assert "GET /realtime/v1/websocket 200" in log
        secrets = [value for name, value in keys.items() if name.endswith("_KEY") and value]
        assert not [value for value in secrets if value in log]


def ask(url: str, path: str, method: str = "GET", **headers: str) -> Any:
    response = httpx2.request(method, url + path, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("path", "service", "behind"),
    [
        ("/auth/v1/token?grant_type=password", "auth", "/token?grant_type=password"),
        ("/rest/v1/rpc/cancel_processing_job", "rest", "/rpc/cancel_processing_job"),
        ("/rest/v1/processing_jobs?select=*&id=eq.1", "rest", "/processing_jobs?select=*&id=eq.1"),
        ("/storage/v1/object/audio/a/b.mp3", "storage", "/object/audio/a/b.mp3"),
        ("/realtime/v1/api/broadcast", "realtime", "/api/broadcast"),
        ("/realtime/v1/websocket?vsn=1.0.0", "realtime", "/socket/websocket?vsn=1.0.0"),
    ],
)
def test_each_service_is_found_under_its_path(
    url: str, keys: Keys, path: str, service: str, behind: str
) -> None:
    asked = ask(url, path, apikey=keys["SUPABASE_PUBLISHABLE_KEY"])
    assert (asked["service"], asked["url"]) == (service, behind)


@pytest.mark.parametrize("path", ["/auth/v1/token", "/rest/v1/", "/realtime/v1/websocket"])
def test_no_service_is_reached_without_a_key(url: str, keys: Keys, path: str) -> None:
    other = jwt.encode({"role": "service_role"}, "another secret of 32 characters or so", "HS256")
    sent = [{}, {"apikey": ""}]
    for key in ("sb_publishable_guessed", other, keys["JWT_SECRET"]):
        sent += [{"apikey": key}, {"Authorization": f"Bearer {key}"}]
    for headers in sent:
        refused = httpx2.get(url + path, headers=headers)
        assert refused.status_code == 401, headers
        assert "apikey" in refused.json()["message"]


@pytest.mark.parametrize(
    ("key", "token"),
    [
        ("SUPABASE_PUBLISHABLE_KEY", "ANON_KEY"),
        ("SUPABASE_SECRET_KEY", "SERVICE_ROLE_KEY"),
        ("ANON_KEY", "ANON_KEY"),
        ("SERVICE_ROLE_KEY", "SERVICE_ROLE_KEY"),
    ],
)
def test_services_see_the_roles_token_in_the_place_of_a_key(
    url: str, keys: Keys, key: str, token: str
) -> None:
    sent, put = keys[key], keys[token]
    for headers in (
        {"apikey": sent},
        {"apikey": sent, "Authorization": f"Bearer {sent}"},
        {"Authorization": f"Bearer {sent}"},
    ):
        for path in ("/rest/v1/jobs", "/storage/v1/object/x"):
            asked = ask(url, path, **headers)["headers"]
            assert (asked["authorization"], asked["apikey"]) == (f"Bearer {put}", put)
    # A browser's WebSocket has its key in the URL.
    asked = ask(url, f"/realtime/v1/websocket?apikey={sent}&vsn=1")
    assert asked["url"] == f"/socket/websocket?apikey={put}&vsn=1"
    assert asked["headers"]["x-api-key"] == put
    assert asked["headers"]["host"] == "realtime-dev.supabase-realtime"


def test_a_users_token_stays_the_users(url: str, keys: Keys) -> None:
    token = jwt.encode({"role": "authenticated", "sub": "1"}, keys["JWT_SECRET"], "HS256")
    key = keys["SUPABASE_PUBLISHABLE_KEY"]
    asked = ask(url, "/rest/v1/jobs", apikey=key, Authorization=f"Bearer {token}")["headers"]
    assert asked["authorization"] == f"Bearer {token}"
    assert httpx2.get(f"{url}/rest/v1/x", headers={"Authorization": token}).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/auth/v1/verify?token=x&type=magiclink",
        "/auth/v1/.well-known/jwks.json",
        "/auth/v1/callback?code=1",
        "/storage/v1/object/sign/audio/a.mp3?token=x",
    ],
)
def test_links_need_no_key(url: str, path: str) -> None:
    assert ask(url, path)["url"] == path.split("/v1", 1)[1]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/auth/v1/verify/../admin/users", 401),
        ("/storage/v1/../../rest/v1/jobs", 401),
        ("/storage/v1/..%2f..%2frest/v1/jobs", 400),
        ("//rest/v1/jobs", 401),
        ("/auth/v1/verifyx", 401),
        ("/pg/tables", 401),
        ("/", 401),
    ],
)
def test_there_is_no_way_around(url: str, path: str, status: int) -> None:
    # By hand: clients tidy paths up.
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            assert answer.readline().split()[1] == str(status).encode()


def test_studio_is_behind_its_password(url: str, keys: Keys) -> None:
    asks = httpx2.get(f"{url}/project/default")
    assert asks.status_code == 401
    assert asks.headers["www-authenticate"].startswith('Basic realm="Supabase Studio"')
    known = (keys["DASHBOARD_USERNAME"], keys["DASHBOARD_PASSWORD"])
    for name, password in (known[::-1], (known[0], known[1][:-1]), (known[0], "")):
        assert httpx2.get(url, auth=(name, password)).status_code == 401
    for key in (keys["SUPABASE_SECRET_KEY"], keys["SERVICE_ROLE_KEY"]):
        assert httpx2.get(f"{url}/api/x", headers={"apikey": key}).status_code == 401
    let_in = httpx2.get(f"{url}/project/default", auth=known).json()
    assert (let_in["service"], let_in["url"]) == ("studio", "/project/default")
    assert "authorization" not in let_in["headers"]
    # Nor may pages of other sites act with a password that the browser remembers.
    for site, status in (("cross-site", 403), ("same-origin", 200)):
        posted = httpx2.post(f"{url}/api/x", auth=known, headers={"Sec-Fetch-Site": site})
        assert posted.status_code == status


def test_pages_of_any_origin_may_use_the_api(url: str, keys: Keys) -> None:
    origin = {"Origin": "https://app.example.org"}
    preflight = httpx2.options(
        f"{url}/rest/v1/processing_jobs",
        headers=origin
        | {
            "Access-Control-Request-Method": "PATCH",
            "Access-Control-Request-Headers": "apikey,authorization",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example.org"
    assert "PATCH" in preflight.headers["access-control-allow-methods"]
    assert {"*", "authorization"} <= set(
        preflight.headers["access-control-allow-headers"].split(",")
    )
    answer = httpx2.get(
        f"{url}/rest/v1/processing_jobs",
        headers=origin | {"apikey": keys["SUPABASE_PUBLISHABLE_KEY"]},
    )
    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_websockets_pass_and_what_is_away_is_said_to_be(keys: Keys, tmp_path: Path) -> None:
    def answer(connection: ServerConnection) -> None:
        assert connection.request is not None
        connection.send(connection.request.path)
        connection.send(connection.recv())

    compose = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))
    shell, *arguments = compose["services"]["gateway"]["healthcheck"]["test"][1:]
    with serve_websocket(answer, "127.0.0.1", 0) as realtime:
        thread = threading.Thread(target=realtime.serve_forever)
        thread.start()
        port = realtime.socket.getsockname()[1]
        with gateway(tmp_path, keys, {"realtime": f"http://127.0.0.1:{port}"}) as address:
            admin = (tmp_path / "admin").read_text().rpartition(":")[2]
            check = [shell, *(part.replace("9901", admin) for part in arguments)]
            assert subprocess.run(check, check=False).returncode == 0
            asked = f"{address}/realtime/v1/websocket?vsn=1.0.0&apikey="
            with connect(asked.replace("http", "ws", 1) + keys["ANON_KEY"]) as socket:
                path = f"/socket/websocket?vsn=1.0.0&apikey={keys['ANON_KEY']}"
                assert socket.recv(10) == path
                socket.send("joined")
                assert socket.recv(10) == "joined"
            with pytest.raises(InvalidStatus):
                connect(asked.replace("http", "ws", 1) + "guessed")
            key = {"apikey": keys["SUPABASE_SECRET_KEY"]}
            assert httpx2.get(f"{address}/rest/v1/x", headers=key).status_code == 503
        realtime.shutdown()
        thread.join()
    assert subprocess.run(check, check=False, stderr=subprocess.DEVNULL).returncode != 0


@pytest.mark.parametrize("name", ["SUPABASE_SECRET_KEY", "DASHBOARD_PASSWORD"])
def test_it_does_not_start_without_a_key(keys: Keys, tmp_path: Path, name: str) -> None:
    (tmp_path / "gateway.json").write_text(json.dumps(source()))
    done = subprocess.run(
        [ENVOY, "--mode", "validate", "-c", str(tmp_path / "gateway.json")],
        env=dict(keys) | {name: ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{name} is not set" in done.stderr


def test_ports_and_files_are_those_of_the_image() -> None:
    written = config()
    listener = written["static_resources"]["listeners"][0]["address"]["socket_address"]
    assert listener == {"address": "0.0.0.0", "port_value": 8000}
    assert written["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    assert "/etc/envoy/gateway.lua" in (CONFIG / "gateway.yaml").read_text(encoding="utf-8")


def under(prefix: str, app: Any) -> Any:
    """Serve an app as the gateway leaves it to its service: without the prefix."""

    async def prefixed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = dict(scope) | {"path": prefix + scope["path"], "raw_path": None}
        await app(scope, receive, send)

    return prefixed


def public_keys(keys: Keys) -> Starlette:
    """What Auth publishes: its asymmetric keys, and no other."""
    published = [key for key in json.loads(keys["JWT_JWKS"])["keys"] if key["kty"] != "oct"]

    async def answer(_: Request) -> Response:
        return JSONResponse({"keys": published})

    return Starlette(routes=[Route("/.well-known/jwks.json", answer)])


def as_auth_signs(keys: Keys, user: UUID, *, issuer: str) -> str:
    """Sign a user's token with the key that Auth is given."""
    private = next(key for key in json.loads(keys["JWT_KEYS"]) if "d" in key)
    now = int(time.time())
    claims = {"sub": str(user), "role": "authenticated", "aud": "authenticated", "iss": issuer}
    claims |= {"iat": now, "exp": now + 60}  # type: ignore[dict-item]
    return jwt.encode(claims, jwt.PyJWK(private), headers={"kid": private["kid"]})


@pytest.mark.anyio
async def test_pgscribe_works_through_it(
    keys: Keys, tmp_path: Path, settings: Settings, user: UUID
) -> None:
    state = StandIn()
    state.jwt_secret = keys["JWT_SECRET"]
    state.buckets["audio"] = Bucket(file_size_limit=None, allowed_mime_types=None)
    with (
        serve(under("/storage/v1", make_app(state))) as storage_url,
        serve(public_keys(keys)) as auth_url,
        gateway(tmp_path, keys, {"storage": storage_url, "auth": auth_url}) as url,
    ):
        state.url = url
        web_checks_tokens(keys, settings, user, url)
        storage = SupabaseStorage(
            url,
            keys["SUPABASE_SECRET_KEY"],
            bucket="audio",
            max_bytes=1000,
            locate_seconds=60,
            spool_dir=tmp_path,
        )
        path = f"{user}/talk.mp3"
        ticket = await storage.sign_upload(path, content_type="audio/mpeg", size=6)
        sent = httpx2.put(ticket.url, headers=ticket.headers, content=b"speech")
        assert sent.is_success, sent.text
        assert await storage.size(path) == 6
        link = await storage.sign_download(path, seconds=60)
        assert link.startswith(f"{url}/storage/v1/")
        part = httpx2.get(link, headers={"Range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, b"pee")
        assert await storage.delete(path)
        await storage.aclose()


def web_checks_tokens(keys: Keys, settings: Settings, user: UUID, url: str) -> None:
    told = {"supabase_url": url, "jwt_secret": None, "storage": "supabase"}
    told |= {"supabase_secret_key": SecretStr(keys["SUPABASE_SECRET_KEY"])}  # type: ignore[dict-item]
    statuses = []
    with serve(create_app(settings.model_copy(update=told))) as web:
        for issuer in (f"{url}/auth/v1", "https://elsewhere.example/auth/v1"):
            token = as_auth_signs(keys, user, issuer=issuer)
            jobs = httpx2.get(f"{web}/jobs", headers={"Authorization": f"Bearer {token}"})
            statuses.append(jobs.status_code)
    assert statuses == [200, 401]
