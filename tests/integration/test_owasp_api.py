"""The attacks of OWASP's API Security Top 10 (2023), one by one.

What has more tests elsewhere: API1 and API5 in test_who_may and test_row_level_security, API2 in
test_tokens and test_api_keys, API4 in test_limits and test_every_answer, API7 in test_fetching and
test_audio_by_url, API10 in test_signing_keys, test_fetching and tests/supabase_storage.
"""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from jobs.errors import UrlRefused
from jobs.fetching import fetch
from jobs.settings import Settings
from tests.conftest import MakeUser
from web.app import create_app
from web.auth import issue_token

Headers = dict[str, str]


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=600)}"}


@pytest.fixture
def job(api: TestClient, headers: Headers, user: UUID) -> str:
    body = {"filePath": f"{user}/a.mp3"}
    job_id: str = api.post("/process", json=body, headers=headers).json()["jobId"]
    return job_id


def as_user(conn: psycopg.Connection, user: UUID) -> None:
    conn.execute("set role authenticated")
    conn.execute(
        "select set_config('request.jwt.claims', %s, false)",
        (json.dumps({"sub": str(user), "role": "authenticated"}),),
    )


def test_api1_ids_of_others_in_any_spelling(
    api: TestClient, job: str, make_user: MakeUser, settings: Settings
) -> None:
    stranger = {"Authorization": f"Bearer {issue_token(settings, make_user(), lifetime=60)}"}
    for spelling in (job, job.upper(), job.replace("-", ""), f"{{{job}}}", f"urn:uuid:{job}"):
        for method, path in (
            ("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/retry"), ("GET", "/audio"),
            ("GET", "/transcript"), ("GET", "/transcript.txt"), ("GET", "/events"),
        ):  # fmt: skip
            response = api.request(method, f"/jobs/{spelling}{path}", headers=stranger)
            assert response.status_code == 404, (method, path)
            assert response.json()["code"] == "job_not_found"


def test_api1_audio_of_others_by_path(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    other = uuid4()
    for path in (f"{other}/a.mp3", f"{user}/../{other}/a.mp3", f"{user}/./a", f"/{other}/a"):
        body = {"filePath": path}
        assert api.post("/process", json=body, headers=headers).status_code in {403, 422}
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (0,)


def test_api2_guessing_is_slowed_down(settings: Settings, user: UUID) -> None:
    strict = settings.model_copy(update={"failed_rate_limit": 5})
    good = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    with TestClient(create_app(strict)) as api:
        statuses = {
            api.get("/jobs", headers={"Authorization": f"Bearer guess{n}"}).status_code
            for n in range(20)
        }
        assert statuses == {401, 429}
        assert api.get("/jobs", headers=good).status_code == 200


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "user_id",
        "status",
        "result",
        "job_id",
        "progress",
        "attempt",
        "usage",
        "audio_seconds",
    ],
)
def test_api3_no_column_of_ours_can_be_set(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection, column: str
) -> None:
    body = {"filePath": f"{user}/a.mp3", column: None}
    response = api.post("/process", json=body, headers=headers)
    assert (response.status_code, response.json()["field"]) == (422, column)
    as_user(conn, user)
    if column != "user_id":
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute(
                f"insert into processing_jobs (file_path, {column})"
                f" values ('{user}/a.mp3', null)".encode()
            )


def test_api3_calls_on_modal_are_not_shown(conn: psycopg.Connection, user: UUID, job: str) -> None:
    as_user(conn, user)
    conn.execute("select index, status from processing_job_chunks where job_id = %s", (job,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select call_id from processing_job_chunks where job_id = %s", (job,))


def test_api4_requests_are_bounded(api: TestClient, headers: Headers, user: UUID) -> None:
    path = {"filePath": f"{user}/a.mp3"}
    too_much: list[tuple[str, Any, int]] = [
        ("/process", b"[" * 60_000, 422),
        ("/process", b'{"filePath": "' + b"a" * 70_000 + b'"}', 413),
        ("/process", path | {"options": {"initial_prompt": "a" * 2001}}, 422),
        ("/process", path | {"priority": 10**30}, 422),
        ("/process/batch", {"jobs": [path] * 101}, 422),
        ("/process/batch", b" " * 1_100_000, 413),
        ("/uploads", {"name": "a.mp3", "size": 10**18}, 413),
    ]
    for route, body, status in too_much:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert api.post(route, content=content, headers=headers).status_code == status, route
    for query in ("/jobs?limit=1000", f"/search?q={'a' * 201}", "/search?q=a&limit=1000"):
        assert api.get(query, headers=headers).status_code == 422


def test_api4_and_api6_one_user_cannot_take_all(
    settings: Settings, user: UUID, conn: psycopg.Connection
) -> None:
    token = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    with TestClient(create_app(settings.model_copy(update={"rate_limit": 3}))) as api:
        statuses = [api.get("/jobs", headers=token).status_code for _ in range(5)]
    assert statuses[:3] == [200] * 3
    assert statuses[-1] == 429
    conn.execute("select limit_owner(%s, max_queued => 2)", (user,))
    as_user(conn, user)
    with pytest.raises(psycopg.ProgrammingError, match="max_queued"):
        conn.execute(
            f"insert into processing_jobs (file_path) select '{user}/a'"
            " from generate_series(1, 3)".encode()
        )


@pytest.mark.parametrize(
    "statement",
    [
        "select pause_queue('transcription')",
        "select limit_owner(auth.uid(), max_queued => 9)",
        "select limit_owners(max_queued => 9)",
        "select pause_owner(auth.uid())",
        "select report_progress(gen_random_uuid(), 0.5)",
        "select * from pgscribe.api_keys",
        "select pgscribe.use_api_key('x', null)",
        "select * from procrastinate.procrastinate_jobs",
        "update processing_jobs set status = 'completed'",
        "truncate processing_jobs",
    ],
)
def test_api5_users_are_no_operators(conn: psycopg.Connection, user: UUID, statement: str) -> None:
    as_user(conn, user)
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFunction)):
        conn.execute(statement.encode())


def test_api5_other_methods_do_nothing(
    api: TestClient, headers: Headers, job: str, conn: psycopg.Connection
) -> None:
    for method in ("PUT", "PATCH", "POST", "TRACE"):
        response = api.request(method, f"/jobs/{job}", headers=headers, content=b"{}")
        assert response.status_code == 405
        assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}
    disguised = headers | {"X-HTTP-Method-Override": "DELETE"}
    assert api.get(f"/jobs/{job}", headers=disguised).status_code == 200
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (1,)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/",
        "http://127.0.0.1:8000/",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://10.0.0.1/",
        "http://100.64.0.1/",
        "http://localhost/",
        "http://user@example.org/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
    ],
)
async def test_api7_nothing_inside_is_fetched(url: str) -> None:
    with pytest.raises(UrlRefused):
        async with fetch(url, max_bytes=1000, timeout=5):
            pass


def test_api8_answers_give_nothing_away(api: TestClient, headers: Headers) -> None:
    for path in ("/jobs", "/nowhere", "/jobs/x", "/healthz", "/docs", "/openapi.json"):
        answer = api.get(path, headers=headers | {"Origin": "https://evil.example"})
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert not {"server", "x-powered-by"} & answer.headers.keys()
        assert "Traceback" not in answer.text


def test_api9_no_route_is_undescribed(settings: Settings) -> None:
    app = create_app(settings)
    routes = {
        route.path.replace(":path", "") for route in app.routes if isinstance(route, Route | Mount)
    }
    pages = {"/", "/healthz", "/readyz", "/openapi.json", "/docs", "/docs/page.js", "/docs/swagger"}
    pages |= {route for route in routes if f"{route}/".startswith("/app/")}
    assert routes == app.state.openapi()["paths"].keys() | pages
