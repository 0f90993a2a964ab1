"""Transcripts over REST: forms, partial ones, and what is refused."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb
from starlette.testclient import TestClient

from jobs.settings import Settings
from web import negotiation
from web.app import create_app
from web.auth import issue_token

Headers = dict[str, str]


def segment(text: str, start: float, end: float) -> dict[str, Any]:
    marks = {"avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0}
    return {"start": start, "end": end, "text": text, **marks}


def transcript(*segments: dict[str, Any], language: str = "en") -> dict[str, Any]:
    return {
        "text": " ".join(part["text"] for part in segments),
        "language": language,
        "duration": segments[-1]["end"],
        "segments": list(segments),
        "engine": "faster-whisper",
        "model": "tiny",
    }


RESULT = transcript(segment("Größe & <Wahl>.", 0, 2.5), segment("Yes.", 5, 6.5))


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def headers(settings: Settings, user: UUID) -> Headers:
    return {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}


@pytest.fixture
def job(conn: psycopg.Connection, user: UUID) -> UUID:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f'{user}/x/My "talk", Größe 100%.mp3'),
    ).fetchone()
    assert row is not None
    job_id: UUID = row[0]
    return job_id


def set_queue(conn: psycopg.Connection, *statuses: str) -> None:
    for status in statuses:
        conn.execute("update procrastinate.procrastinate_jobs set status = %s", (status,))


@pytest.fixture
def completed(conn: psycopg.Connection, job: UUID) -> UUID:
    set_queue(conn, "doing")
    conn.execute("update processing_jobs set result = %s", (Jsonb(RESULT),))
    set_queue(conn, "succeeded")
    return job


def add_chunks(conn: psycopg.Connection, job: UUID, *results: dict[str, Any] | None) -> None:
    for index, result in enumerate(results):
        conn.execute(
            "insert into processing_job_chunks (job_id, index, start_seconds, end_seconds, result)"
            " values (%s, %s, %s, %s, %s)",
            (job, index, 10 * index, 10 * index + 10, result and Jsonb(result)),
        )


def assert_problem(response: Any, status: int, code: str, detail: str = "") -> None:
    assert response.status_code == status, response.text
    problem = response.json()
    assert problem["code"] == code
    assert detail in problem["detail"]


EXPECTED = {
    "txt": ("text/plain; charset=utf-8", "Größe & <Wahl>. Yes.\n"),
    "srt": (
        "application/x-subrip; charset=utf-8",
        (
            "1\n00:00:00,000 --> 00:00:02,500\nGröße & <Wahl>.\n\n"
            "2\n00:00:05,000 --> 00:00:06,500\nYes.\n"
        ),
    ),
    "vtt": (
        "text/vtt; charset=utf-8",
        (
            "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nGröße &amp; &lt;Wahl&gt;.\n\n"
            "00:00:05.000 --> 00:00:06.500\nYes.\n"
        ),
    ),
    "tsv": (
        "text/tab-separated-values; charset=utf-8",
        "start\tend\ttext\n0\t2500\tGröße & <Wahl>.\n5000\t6500\tYes.\n",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_by_extension_whatever_is_accepted(
    api: TestClient, headers: Headers, completed: UUID, name: str
) -> None:
    response = api.get(
        f"/jobs/{completed}/transcript.{name}", headers=headers | {"Accept": "application/json"}
    )
    assert (response.headers["content-type"], response.text) == EXPECTED[name]
    assert "pgscribe-partial" not in response.headers


def test_json_is_what_is_stored(api: TestClient, headers: Headers, completed: UUID) -> None:
    for path in ("transcript", "transcript.json"):
        response = api.get(f"/jobs/{completed}/{path}", headers=headers)
        assert response.headers["content-type"] == "application/json"
        assert response.json() == RESULT


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("text/vtt", "text/vtt"),
        ("text/srt", "application/x-subrip"),
        ("text/plain;q=0.5, text/vtt;q=0.4", "text/plain"),
        ("text/*", "text/plain"),
        ("text/*, text/plain;q=0", "text/vtt"),
        ("text/html, */*;q=0.1", "application/json"),
        ("TEXT/VTT", "text/vtt"),
    ],
)
def test_by_accept_header(
    api: TestClient, headers: Headers, completed: UUID, accept: str, content_type: str
) -> None:
    response = api.get(f"/jobs/{completed}/transcript", headers=headers | {"Accept": accept})
    assert response.headers["content-type"].partition(";")[0] == content_type
    assert response.headers["vary"] == "Accept"


@pytest.mark.parametrize("accept", ["text/html", "application/json;q=0", "*/*;q=x", "text/vtt;q=0"])
def test_forms_that_there_are_not(
    api: TestClient, headers: Headers, completed: UUID, accept: str
) -> None:
    response = api.get(f"/jobs/{completed}/transcript", headers=headers | {"Accept": accept})
    assert_problem(response, 406, "not_acceptable", "text/vtt (.vtt)")
    response = api.get(f"/jobs/{completed}/transcript.doc", headers=headers)
    assert_problem(response, 406, "not_acceptable", "application/x-subrip (.srt)")


def test_subtitles_are_set_as_asked(
    api: TestClient, headers: Headers, conn: psycopg.Connection, job: UUID
) -> None:
    set_queue(conn, "doing")
    result = transcript(segment("The keepers had written down everything they saw.", 0, 5))
    conn.execute("update processing_jobs set result = %s", (Jsonb(result),))
    set_queue(conn, "succeeded")
    url = f"/jobs/{job}/transcript.srt?max_line_length=20&max_lines=3"
    lines = api.get(url, headers=headers).text.splitlines()[2:]
    assert lines == ["The keepers had", "written down", "everything they saw."]
    for query, field in [
        ("max_line_length=9", "max_line_length"),
        ("max_lines=0", "max_lines"),
        ("max_lines=x", "max_lines"),
        ("lines=2", "lines"),
    ]:
        response = api.get(f"/jobs/{job}/transcript.srt?{query}", headers=headers)
        assert_problem(response, 422, "invalid_input", field)


def test_uploads_do_not_wait_for_transcripts_that_are_set(
    api: TestClient, headers: Headers, completed: UUID
) -> None:
    done = threading.Event()
    renderer = api.app.state.renderer  # type: ignore[attr-defined]
    for _ in range(32):
        renderer.executor.submit(done.wait)
    with ThreadPoolExecutor(1) as asking:
        url = f"/jobs/{completed}/transcript.srt"
        answer = asking.submit(api.get, url, headers=headers)
        try:
            upload = api.put("/uploads/a.mp3", content=b"sound", headers=headers)
            assert upload.status_code == 201
            assert not answer.done()
        finally:
            done.set()
        assert answer.result().text == EXPECTED["srt"][1]


def test_downloads_are_named_as_the_audio(
    api: TestClient, headers: Headers, completed: UUID
) -> None:
    response = api.get(f"/jobs/{completed}/transcript.srt?download=1", headers=headers)
    disposition = response.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="My _talk_, Gr__e 100_.srt"; filename*=')
    assert unquote(disposition.rpartition("''")[2]) == 'My "talk", Größe 100%.srt'


@pytest.mark.parametrize("name", ['a"; x="b', "a\r\nSet-Cookie: x", "ünï", "a/b\\c", "%22"])
def test_names_cannot_leave_their_header(name: str) -> None:
    header = negotiation.attachment(name)
    plain, _, exact = header.removeprefix('attachment; filename="').partition('"')
    assert not set(plain) & set('"\\/\r\n%;')
    assert exact.startswith("; filename*=UTF-8''")
    assert unquote(exact.rpartition("''")[2]) == name
    header.encode("ascii")


def test_a_transcript_that_the_client_has_is_not_sent_again(
    api: TestClient, headers: Headers, completed: UUID
) -> None:
    url = f"/jobs/{completed}/transcript"
    etag = api.get(f"{url}.srt", headers=headers).headers["etag"]
    for tags in (etag, f'"x", W/{etag}', "*"):
        again = api.get(f"{url}.srt", headers=headers | {"If-None-Match": tags})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    for path in (f"{url}.vtt", f"{url}.srt?max_lines=1"):
        other = api.get(path, headers=headers | {"If-None-Match": etag})
        assert other.status_code == 200


def test_what_there_is_while_the_job_runs(
    api: TestClient, headers: Headers, conn: psycopg.Connection, job: UUID
) -> None:
    url = f"/jobs/{job}/transcript"
    set_queue(conn, "doing")
    nothing = api.get(url, headers=headers)
    assert nothing.json() == {
        "status": "processing", "partial": True, "text": "", "ready": 0, "chunks": 0
    }  # fmt: skip
    assert api.get(f"{url}.srt", headers=headers).text == ""
    add_chunks(
        conn, job,
        transcript(segment("One.", 1, 2)), transcript(segment("Two.", 1, 2)),
        None, transcript(segment("Four.", 1, 2)),
    )  # fmt: skip
    some = api.get(url, headers=headers)
    assert some.json() == nothing.json() | {"text": "One. Two.", "ready": 2, "chunks": 4}
    assert some.headers["pgscribe-partial"] == "true"
    assert "etag" not in some.headers
    text = api.get(f"{url}.txt", headers=headers)
    assert (text.text, text.headers["pgscribe-partial"]) == ("One. Two.\n", "true")
    vtt = api.get(f"{url}.vtt", headers=headers)
    assert vtt.text == (
        "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\nOne.\n\n00:00:11.000 --> 00:00:12.000\nTwo.\n"
    )
    assert vtt.headers["pgscribe-partial"] == "true"
    assert "11000\t12000\tTwo." in api.get(f"{url}.tsv", headers=headers).text


def test_silence_so_far(
    api: TestClient, headers: Headers, conn: psycopg.Connection, job: UUID
) -> None:
    set_queue(conn, "doing")
    silent = transcript(segment("", 0, 10)) | {"segments": []}
    add_chunks(conn, job, silent, None)
    response = api.get(f"/jobs/{job}/transcript", headers=headers)
    assert (response.json()["text"], response.json()["ready"]) == ("", 1)
    assert api.get(f"/jobs/{job}/transcript.vtt", headers=headers).text == "WEBVTT\n"


def test_a_result_is_no_transcript_before_the_job_has_completed(
    api: TestClient, headers: Headers, conn: psycopg.Connection, job: UUID
) -> None:
    set_queue(conn, "doing")
    conn.execute("update processing_jobs set result = %s", (Jsonb(RESULT),))
    assert api.get(f"/jobs/{job}/transcript", headers=headers).json()["partial"] is True


def test_a_queued_job_has_none_yet_unless_an_attempt_left_some(
    api: TestClient, headers: Headers, conn: psycopg.Connection, job: UUID
) -> None:
    response = api.get(f"/jobs/{job}/transcript", headers=headers)
    assert_problem(response, 409, "transcript_not_ready")
    assert response.headers["retry-after"] == "2"
    set_queue(conn, "doing")
    add_chunks(conn, job, transcript(segment("One.", 1, 2)), None)
    set_queue(conn, "todo")
    response = api.get(f"/jobs/{job}/transcript", headers=headers)
    assert (response.json()["status"], response.json()["text"]) == ("queued", "One.")


@pytest.mark.parametrize(
    ("statuses", "detail"),
    [(["doing", "failed"], "failed with internal_error"), (["cancelled"], "is cancelled")],
)
def test_jobs_without_a_transcript(
    api: TestClient,
    headers: Headers,
    conn: psycopg.Connection,
    job: UUID,
    statuses: list[str],
    detail: str,
) -> None:
    set_queue(conn, *statuses)
    for path in ("transcript", "transcript.srt"):
        response = api.get(f"/jobs/{job}/{path}", headers=headers)
        assert_problem(response, 409, "no_transcript", detail)


def test_others_transcripts_are_out_of_reach(
    api: TestClient, settings: Settings, completed: UUID, headers: Headers, make_user: Any
) -> None:
    token = issue_token(settings, make_user(), lifetime=60)
    for path in (f"{completed}/transcript", f"{completed}/transcript.srt"):
        response = api.get(f"/jobs/{path}", headers={"Authorization": f"Bearer {token}"})
        assert_problem(response, 404, "job_not_found")
        assert_problem(api.get(f"/jobs/{path}"), 401, "not_authenticated")
    for path in (f"{uuid4()}/transcript.srt", "7/transcript"):
        assert_problem(api.get(f"/jobs/{path}", headers=headers), 404, "job_not_found")


def test_the_description_has_every_form(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    for path in ("/jobs/{job_id}/transcript", "/jobs/{job_id}/transcript.{extension}"):
        content = paths[path]["get"]["responses"]["200"]["content"]
        assert json.dumps(content["text/vtt"]) == '{"schema": {}}'
        assert "$ref" in content["application/json"]["schema"]
        assert {"304", "406", "409"} <= paths[path]["get"]["responses"].keys()
