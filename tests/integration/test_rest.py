"""What the routes add to what the database does: batches, keys, pages, deletion, links."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb
from starlette.testclient import TestClient

from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

Headers = dict[str, str]


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    quiet = settings.model_copy(update={"rate_limit": 0, "failed_rate_limit": 0})
    with TestClient(create_app(quiet), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=600)}"}


def count(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from processing_jobs").fetchone()
    assert row is not None
    number: int = row[0]
    return number


def assert_problem(response: Any, status: int, code: str, field: str | None = None) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"], problem.get("field")) == (status, code, field)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_batch_is_queued_in_order(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    jobs = [{"filePath": f"{user}/{number}.mp3", "priority": number} for number in range(100)]
    response = api.post("/process/batch", json={"jobs": jobs}, headers=headers)
    assert response.status_code == 202
    ids = [job["jobId"] for job in response.json()["jobs"]]
    rows = conn.execute("select id::text, priority from processing_jobs order by priority")
    assert rows.fetchall() == [(job_id, number) for number, job_id in enumerate(ids)]


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({}, "jobs[1].filePath"),
        ({"filePath": "{user}/../a"}, "jobs[1].filePath"),
        ({"filePath": "{user}/a", "options": {"model": 7}}, "jobs[1].options.model"),
        ({"filePath": "{user}/a", "priority": 101}, "jobs[1].priority"),
        ({"audioUrl": "http://u:p@example.org/"}, "jobs[1].audioUrl"),
        ({"audioUrl": "ftp://example.org/a.mp3"}, "jobs[1].audioUrl"),
        ({"filePath": "{user}/a", "webhookUrl": "javascript:1"}, "jobs[1].webhookUrl"),
    ],
)
def test_a_batch_is_queued_whole_or_not_at_all(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection, job: Any, field: str
) -> None:
    if "filePath" in job:
        job = job | {"filePath": job["filePath"].format(user=user)}
    jobs = [{"filePath": f"{user}/first.mp3"}, job]
    response = api.post("/process/batch", json={"jobs": jobs}, headers=headers)
    assert response.status_code == 422, response.text
    assert response.json()["field"] == field
    assert response.json()["detail"].startswith(f"{field}: ")
    assert count(conn) == 0


@pytest.mark.parametrize("number", [0, 101])
def test_batches_are_limited(api: TestClient, headers: Headers, user: UUID, number: int) -> None:
    jobs = [{"filePath": f"{user}/a.mp3"}] * number
    response = api.post("/process/batch", json={"jobs": jobs}, headers=headers)
    assert_problem(response, 422, "invalid_input", "jobs")


def test_a_request_is_replayed_by_its_key(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    keyed = headers | {"Idempotency-Key": "one"}
    for body in ({"filePath": f"{user}/a.mp3"}, {"audioUrl": "https://example.org/a%20b.mp3?x=1"}):
        before = count(conn)
        first = api.post("/process", json=body, headers=keyed)
        again = api.post("/process", json=body, headers=keyed)
        assert (first.status_code, first.json()) == (202, again.json())
        assert count(conn) == before + 1
        other = api.post("/process", json=body | {"priority": 1}, headers=keyed)
        assert_problem(other, 422, "invalid_input", "idempotency_key")
        keyed = headers | {"Idempotency-Key": "two"}


def test_a_request_with_the_key_of_one_in_flight_conflicts(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    keyed = headers | {"Idempotency-Key": "one"}
    body = {"filePath": f"{user}/a.mp3"}
    with conn.transaction():
        conn.execute(
            "select pg_advisory_xact_lock(hashtextextended('pgscribe:' || %s || ':one', 0))",
            (str(user),),
        )
        response = api.post("/process", json=body, headers=keyed)
        assert_problem(response, 409, "request_in_flight")
        assert response.headers["retry-after"] == "1"
        assert count(conn) == 0
    assert api.post("/process", json=body, headers=keyed).status_code == 202


def test_audio_by_url_goes_into_the_users_own_folder(
    api: TestClient, headers: Headers, user: UUID
) -> None:
    url = "https://example.org/x/..%2f..%2fetc/My%20talk.mp3?token=1"
    job_id = api.post("/process", json={"audioUrl": url}, headers=headers).json()["jobId"]
    job = api.get(f"/jobs/{job_id}", headers=headers).json()
    assert job["audio_url"] == url
    assert job["file_path"].startswith(f"{user}/")
    assert job["file_path"].endswith("/My_20talk.mp3")


def test_lists_have_pages(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    conn.execute(
        "insert into processing_jobs (user_id, file_path)"
        " select %s, n || '.mp3' from generate_series(1, 7) n",
        (user,),
    )
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = api.get("/jobs", params=query, headers=headers).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
    assert len(seen) == len(set(seen)) == 7


@pytest.mark.parametrize("cursor", ["x", "", "\u00e4", "MjAyNg==", "bm8gbm8=", "A" * 200])
def test_cursors_are_not_made_up(api: TestClient, headers: Headers, cursor: str) -> None:
    for path in ("/jobs", "/search?q=word"):
        response = api.get(path, params={"q": "word", "cursor": cursor} if "?" in path
                           else {"cursor": cursor}, headers=headers)  # fmt: skip
        assert_problem(response, 422, "invalid_input", "cursor")


def test_unknown_parameters_are_refused(api: TestClient, headers: Headers) -> None:
    assert_problem(api.get("/jobs?statsu=x", headers=headers), 422, "invalid_input", "statsu")


def test_options_that_are_nested_deeply(api: TestClient, headers: Headers, user: UUID) -> None:
    nested = "[" * 700 + "]" * 700
    body = f'{{"filePath": "{user}/a.mp3", "options": {{"model": {nested}}}}}'
    response = api.post("/process", content=body, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_input")


def test_a_completed_job_can_be_told_to_stop_any_number_of_times(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection, database: str
) -> None:
    """Its row leaves its page then, and is indexed again, for search too."""
    body = {"filePath": f"{user}/a.mp3"}
    job_id = api.post("/process", json=body, headers=headers).json()["jobId"]
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    result = {"text": "so many words", "segments": []}
    conn.execute("update processing_jobs set result = %s", (Jsonb(result),))
    conn.execute("update procrastinate.procrastinate_jobs set status = 'succeeded'")
    with psycopg.connect(database) as onlooker:
        onlooker.execute("set transaction isolation level repeatable read")
        onlooker.execute("select 1 from processing_jobs")  # keeps old versions of the row alive
        for _ in range(60):
            response = api.post(f"/jobs/{job_id}/cancel", headers=headers)
            assert_problem(response, 409, "job_conflict")


def test_a_job_without_its_result(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    body = {"filePath": f"{user}/a.mp3"}
    job_id = api.post("/process", json=body, headers=headers).json()["jobId"]
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    conn.execute("update processing_jobs set result = %s", (Jsonb({"text": "Hello."}),))
    conn.execute("update procrastinate.procrastinate_jobs set status = 'succeeded'")
    whole = api.get(f"/jobs/{job_id}", headers=headers).json()
    assert whole["result"] == {"text": "Hello."}
    without = api.get(f"/jobs/{job_id}", params={"result": "false"}, headers=headers).json()
    assert without == whole | {"result": None}
    assert list(without) == list(whole)
    refused = api.get(f"/jobs/{job_id}", params={"result": "perhaps"}, headers=headers)
    assert_problem(refused, 422, "invalid_input", "result")


def test_delete(api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection) -> None:
    response = api.post("/process", json={"filePath": f"{user}/a.mp3"}, headers=headers)
    job_id = response.json()["jobId"]
    assert api.delete(f"/jobs/{job_id}", headers=headers).status_code == 204
    assert_problem(api.delete(f"/jobs/{job_id}", headers=headers), 404, "job_not_found")
    assert count(conn) == 0
    noted = conn.execute("select file_path from pgscribe.audio_to_delete").fetchall()
    assert noted == [(f"{user}/a.mp3",)]


def test_search(api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection) -> None:
    job_id = api.post("/process", json={"filePath": f"{user}/a.mp3"}, headers=headers).json()[
        "jobId"
    ]
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    text = "the quarterly report is late"
    result = {"text": text, "segments": [{"start": 1.0, "end": 2.0, "text": text}]}
    conn.execute("update processing_jobs set result = %s", (Jsonb(result),))
    conn.execute("update procrastinate.procrastinate_jobs set status = 'succeeded'")
    found = api.get("/search", params={"q": '"quarterly report"'}, headers=headers).json()
    assert [job["id"] for job in found["results"]] == [job_id]
    assert found["results"][0]["hits"][0]["start"] == 1.0
    assert api.get("/search?q=early", headers=headers).json()["results"] == []
    assert_problem(api.get("/search", headers=headers), 422, "invalid_input", "q")


def test_limits_are_429(
    api: TestClient, headers: Headers, user: UUID, conn: psycopg.Connection
) -> None:
    conn.execute("select limit_owner(%s, max_queued => 1)", (user,))
    body = {"filePath": f"{user}/a.mp3"}
    assert api.post("/process", json=body, headers=headers).status_code == 202
    response = api.post("/process", json=body, headers=headers)
    assert_problem(response, 429, "limit_reached", "max_queued")
    assert response.json()["limit"] == "max_queued"
    assert int(response.headers["retry-after"]) > 0
    assert count(conn) == 1
    limits = {
        limit["limit"]: limit for limit in api.get("/limits", headers=headers).json()["limits"]
    }
    assert (limits["max_queued"]["maximum"], limits["max_queued"]["current"]) == (1, 1)


def test_upload_by_link_and_listen(api: TestClient, headers: Headers, user: UUID) -> None:
    sound = bytes(range(256)) * 100
    body = {"name": "My talk.mp3", "size": len(sound), "contentType": "audio/mpeg"}
    response = api.post("/uploads", json=body, headers=headers)
    assert response.status_code == 201, response.text
    ticket = response.json()
    assert ticket["filePath"].startswith(f"{user}/")
    assert ticket["method"] == "PUT"
    put = api.put(ticket["url"], content=sound, headers=ticket["headers"])
    assert put.json() == {"filePath": ticket["filePath"], "size": len(sound)}
    submitted = api.post("/process", json={"filePath": ticket["filePath"]}, headers=headers).json()
    path = f"/jobs/{submitted['jobId']}/audio"
    redirect = api.get(path, headers=headers, follow_redirects=False)
    assert redirect.status_code == 307
    part = api.get(redirect.headers["location"], headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, sound[10:20])
    saved = api.get(f"{path}?download=1", headers=headers)
    assert "My" in saved.headers["content-disposition"]
    assert saved.content == sound


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "a/b.mp3"}, "name"),
        ({"name": ".."}, "name"),
        ({"name": "\ud800.mp3"}, "name"),
        ({"name": ""}, "name"),
        ({"size": 0}, "size"),
        ({"size": "5"}, "size"),
        ({"sise": 5}, "sise"),
    ],
)
def test_uploads_that_cannot_be(
    api: TestClient, headers: Headers, change: dict[str, Any], field: str
) -> None:
    import json

    body = json.dumps({"name": "a.mp3", "size": 5} | change)
    response = api.post("/uploads", content=body, headers=headers)
    assert_problem(response, 422, "invalid_input", field)


def test_uploads_above_the_limit_are_refused_before_they_are_sent(
    api: TestClient, headers: Headers
) -> None:
    body = {"name": "a.mp3", "size": 3 * 1024**3}
    response = api.post("/uploads", json=body, headers=headers)
    assert_problem(response, 413, "upload_too_large")
    assert response.json()["limit"] == 2 * 1024**3


def test_a_callers_trace_is_kept_without_spans_of_our_own(
    api: TestClient, headers: Headers, user: UUID
) -> None:
    place = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    kept: list[str | None] = []
    for sent in (place, f"01{place[2:]}-more", "nonsense", f"00-{'0' * 32}{place[35:]}", None):
        traced = headers | ({"traceparent": sent} if sent else {})
        answer = api.post("/process", json={"filePath": f"{user}/a.mp3"}, headers=traced)
        assert answer.status_code == 202, sent
        kept.append(
            api.get(f"/jobs/{answer.json()['jobId']}", headers=headers).json()["traceparent"]
        )
        (first, *_) = api.get("/jobs", headers=headers).json()["jobs"]
        assert first["traceparent"] == kept[-1]
    assert kept == [place, place, None, None, None]
