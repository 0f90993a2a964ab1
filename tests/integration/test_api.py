"""The REST API on a real database. (A real server and worker: test_embedded_environment.)"""

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import jwt
import psycopg
import pytest
from starlette.testclient import TestClient

from jobs.errors import SettingsError
from jobs.settings import Settings
from tests.folders import files_in
from web.app import create_app
from web.auth import issue_token

Headers = dict[str, str]


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}


def submit(api: TestClient, headers: Headers, user: UUID, **options: Any) -> str:
    body = {"filePath": f"{user}/talk.mp3", "options": options}
    response = api.post("/process", json=body, headers=headers)
    assert response.status_code == 202, response.text
    job_id: str = response.json()["jobId"]
    return job_id


def assert_problem(response: Any, status: int, code: str, detail: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"]) == (status, code)
    assert detail in problem["detail"]


def test_submit_and_read(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    response = api.post(
        "/process",
        json={"filePath": f"{user}/talk.mp3", "options": {"model": "tiny"}},
        headers=headers,
    )
    job_id = response.json()["jobId"]
    assert response.status_code == 202
    assert response.json() == {
        "jobId": job_id,
        "status": "queued",
        "message": f"Queued; follow it at /jobs/{job_id}",
    }
    job = api.get(response.headers["location"], headers=headers).json()
    row = conn.execute("select id::text, job_id, created_at from processing_jobs").fetchone()
    assert row is not None
    assert (job["id"], job["job_id"]) == row[:2]
    assert set(job) == {
        "id", "created_at", "updated_at", "scheduled_at", "started_at", "completed_at", "user_id",
        "job_id", "file_path", "audio_url", "webhook_url", "options", "status", "progress",
        "attempt",
        "priority", "max_attempts", "idempotency_key", "due_at", "cancel_requested_at",
        "retry_requested_at",
        "audio_seconds", "estimated_seconds", "usage", "note", "error_code", "error", "result",
        "traceparent",
    }  # fmt: skip
    assert (job["status"], job["options"]) == ("queued", {"model": "tiny"})
    assert (job["user_id"], job["result"]) == (str(user), None)


def test_list_filters_by_status_and_leaves_results_out(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    ids = [submit(api, headers, user) for _ in range(3)]
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'cancelled'"
        " where id = (select job_id::bigint from processing_jobs where id = %s)",
        (ids[0],),
    )
    listed = api.get("/jobs", headers=headers).json()["jobs"]
    assert [job["id"] for job in listed] == ids[::-1]
    assert all("result" not in job for job in listed)
    queued = api.get("/jobs?status=queued&limit=1", headers=headers).json()["jobs"]
    assert [job["id"] for job in queued] == [ids[2]]
    cancelled = api.get("/jobs?status=cancelled", headers=headers).json()["jobs"]
    assert [job["id"] for job in cancelled] == [ids[0]]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("status=done", "completed"),
        ("limit=0", "greater than or equal to 1"),
        ("limit=101", "less than or equal to 100"),
        ("limit=²", ""),
        ("limit=0001999", ""),
    ],
)
def test_list_refuses_unknown_filters(
    api: TestClient, headers: Headers, query: str, detail: str
) -> None:
    response = api.get(f"/jobs?{query}", headers=headers)
    assert_problem(response, 422, "invalid_input", detail)
    assert response.json()["field"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "filePath"),
        ({"filePath": 7}, "filePath"),
        ({"filePath": "a/b", "option": {}}, "option"),
        ({"filePath": "a/b", "options": []}, "options"),
        ({"filePath": "{user}/../b"}, "filePath"),
        ({"filePath": "https://example.org/a.mp3"}, "filePath"),
        ({"filePath": "{user}/b", "options": {"modle": "base"}}, "options.modle"),
        ({"filePath": "{user}/b", "options": {"temperature": 7}}, "options.temperature"),
        (
            {"filePath": "{user}/b", "options": {"word_timestamps": "yes"}},
            "options.word_timestamps",
        ),
        ([], "body"),
    ],
)
def test_bad_bodies_name_the_field(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection, body: Any, field: str
) -> None:
    if "filePath" in body and isinstance(body["filePath"], str):
        body = body | {"filePath": body["filePath"].format(user=user)}
    response = api.post("/process", json=body, headers=headers)
    assert_problem(response, 422, "invalid_input", field)
    assert response.json()["field"] == field
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (0,)


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/process", [], "body: must be a JSON object"),
        ("POST", "/process", {"jobs": []}, "jobs: is unknown here; there are audioUrl, filePath"),
        ("GET", "/jobs?lmit=5", None, "lmit: is unknown here; there are cursor, limit"),
        ("GET", "/search", None, "q: is missing"),
        ("GET", "/job", None, "nothing under this path; /docs has all"),
        ("DELETE", "/process", None, "DELETE is not for this path; use POST"),
    ],
)
def test_refusals_say_what_there_is(
    api: TestClient, headers: Headers, method: str, path: str, body: Any, said: str
) -> None:
    assert said in api.request(method, path, json=body, headers=headers).json()["detail"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[" * 3000, b'{"filePath": "a", "priority": NaN}']
)
def test_what_is_no_json_is_refused(api: TestClient, headers: Headers, body: bytes) -> None:
    response = api.post("/process", content=body, headers=headers)
    assert_problem(response, 422, "invalid_input", "body")


def test_bodies_are_limited(api: TestClient, headers: Headers) -> None:
    body = b'{"filePath": "' + b"x" * 70_000 + b'"}'
    response = api.post("/process", content=body, headers=headers)
    assert_problem(response, 413, "body_too_large", "65536 bytes")
    assert response.json()["limit"] == 65536


def test_characters_that_postgres_cannot_store_are_refused(
    api: TestClient, headers: Headers, user: UUID
) -> None:
    for body in (
        {"filePath": f"{user}/\0.mp3"},
        {"filePath": f"{user}/a.mp3", "options": {"initial_prompt": "\0"}},
        {"filePath": f"{user}/\ud800.mp3"},
        {"filePath": f"{user}/a.mp3", "options": {"temperature": float("inf")}},
    ):
        response = api.post("/process", content=json.dumps(body), headers=headers)
        assert_problem(response, 422, "invalid_input")


def test_others_audio_and_jobs_are_out_of_reach(
    api: TestClient, headers: Headers, user: UUID, settings: Settings, conn: psycopg.Connection
) -> None:
    body = {"filePath": f"{uuid4()}/secret.mp3"}
    response = api.post("/process", json=body, headers=headers)
    assert_problem(response, 403, "not_allowed", "filePath: must lie in your own folder")

    stranger = uuid4()
    conn.execute("insert into auth.users (id) values (%s)", (stranger,))
    job_id = submit(api, headers, user)
    theirs = {"Authorization": f"Bearer {issue_token(settings, stranger, lifetime=60)}"}
    assert_problem(api.get(f"/jobs/{job_id}", headers=theirs), 404, "job_not_found")
    assert api.get("/jobs", headers=theirs).json()["jobs"] == []


def test_unknown_jobs_and_users(api: TestClient, headers: Headers, settings: Settings) -> None:
    assert_problem(api.get(f"/jobs/{uuid4()}", headers=headers), 404, "job_not_found")
    assert_problem(api.get("/jobs/7", headers=headers), 404, "job_not_found")
    nobody = uuid4()
    response = api.post(
        "/process",
        json={"filePath": f"{nobody}/a.mp3"},
        headers={"Authorization": f"Bearer {issue_token(settings, nobody, lifetime=60)}"},
    )
    assert_problem(response, 403, "not_allowed", "auth.users")


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"exp": int(time.time()) - 11}, "expired"),
        ({"exp": None}, "exp"),
        ({"aud": "anon"}, "udience"),
        ({"sub": "nobody"}, "UUID"),
        ({"sub": None}, "sub"),
        ({"nbf": int(time.time()) + 86_400}, "not yet valid"),
    ],
)
def test_tokens_that_are_not_valid(
    api: TestClient, settings: Settings, user: UUID, change: dict[str, Any], detail: str
) -> None:
    claims = {"sub": str(user), "aud": "authenticated", "role": "authenticated"}
    claims |= {"exp": int(time.time()) + 60} | change
    claims = {name: value for name, value in claims.items() if value is not None}
    token = jwt.encode(claims, settings.require_jwt_secret(), "HS256")
    response = api.get("/jobs", headers={"Authorization": f"Bearer {token}"})
    assert_problem(response, 401, "not_authenticated", detail)
    assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("header", ["", "Bearer", "Basic dXNlcg==", "Bearer x.y.z"])
def test_requests_without_a_token(api: TestClient, header: str) -> None:
    response = api.get("/jobs", headers={"Authorization": header})
    assert_problem(response, 401, "not_authenticated")
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_tokens_of_another_key_algorithm_or_role(
    api: TestClient, settings: Settings, user: UUID
) -> None:
    claims = {"sub": str(user), "aud": "authenticated", "exp": int(time.time()) + 60}
    secret = settings.require_jwt_secret()
    forged = jwt.encode(claims | {"role": "authenticated"}, "x" * 32, "HS256")
    unsigned = jwt.encode(claims | {"role": "authenticated"}, "", "none")
    for token in (forged, unsigned):
        response = api.get("/jobs", headers={"Authorization": f"Bearer {token}"})
        assert_problem(response, 401, "not_authenticated")
    for role in ("service_role", "anon", "postgres"):
        token = jwt.encode(claims | {"role": role}, secret, "HS256")
        response = api.get("/jobs", headers={"Authorization": f"Bearer {token}"})
        assert_problem(response, 403, "not_allowed", "role")


def test_issuer_is_checked_when_set(settings: Settings, user: UUID) -> None:
    strict = settings.model_copy(update={"jwt_issuer": "https://project.supabase.co/auth/v1"})
    with TestClient(create_app(strict)) as api:
        for issuer, status in ((settings, 401), (strict, 200)):
            token = issue_token(issuer, user, lifetime=60)
            response = api.get("/jobs", headers={"Authorization": f"Bearer {token}"})
            assert response.status_code == status


def test_no_secret_no_server(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="PGSCRIBE_JWT_SECRET"):
        create_app(settings.model_copy(update={"jwt_secret": None}))


def test_upload_goes_to_the_users_own_folder(
    api: TestClient, headers: Headers, user: UUID, settings: Settings
) -> None:
    response = api.put("/uploads/My talk, part 1.mp3", content=b"sound", headers=headers)
    assert response.status_code == 201
    file_path = response.json()["filePath"]
    assert file_path.startswith(f"{user}/")
    assert file_path.endswith("/My talk, part 1.mp3")
    assert (settings.storage_dir / file_path).read_bytes() == b"sound"
    assert response.json()["size"] == 5


@pytest.mark.parametrize(
    "name",
    ["%2e%2e", "a%2Fb", "%C2%85", "%C3%A4" * 101, "..%2F..%2Fetc%2Fpasswd", "a%5Cb", "a%0Ab"],
)
def test_upload_names_cannot_lead_out(
    api: TestClient, headers: Headers, name: str, settings: Settings
) -> None:
    response = api.put(f"/uploads/{name}", content=b"sound", headers=headers)
    assert response.status_code in {404, 422}
    assert files_in(settings.storage_dir) == []


def test_uploads_are_limited_and_whole(
    api: TestClient, headers: Headers, settings: Settings
) -> None:
    assert_problem(api.put("/uploads/a.mp3", content=b"", headers=headers), 422, "invalid_input")
    small = settings.model_copy(update={"max_upload_bytes": 10})
    with TestClient(create_app(small)) as limited:
        announced = limited.put("/uploads/a.mp3", content=b"x" * 11, headers=headers)
        streamed = limited.put("/uploads/a.mp3", content=iter([b"x" * 6] * 2), headers=headers)
    for response in (announced, streamed):
        assert_problem(response, 413, "upload_too_large", "10")
    assert list(settings.storage_dir.glob("*/*")) == []


def test_routing_errors_are_problems_too(api: TestClient) -> None:
    assert_problem(api.get("/nowhere"), 404, "not_found")
    response = api.get("/process")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_internal_errors_tell_nothing(
    api: TestClient, headers: Headers, conn: psycopg.Connection
) -> None:
    conn.execute("alter table processing_jobs rename to hidden")
    response = api.get("/jobs", headers=headers)
    assert_problem(response, 500, "internal_error", "logged")
    assert "processing_jobs" not in response.text


def test_health(api: TestClient) -> None:
    assert api.get("/healthz").json() == {"status": "ok"}
