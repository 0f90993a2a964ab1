"""Corrections of transcripts: over REST, in every form of the transcript, and in the database."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx2
import psycopg
import pytest
import srt
import webvtt
from psycopg.types.json import Jsonb

from jobs.client import JobClient
from jobs.models import Transcript
from jobs.settings import Settings
from jobs.sql import CORRECTIONS
from tests.live import serve
from web.app import create_app
from web.auth import issue_token

MakeUser = Callable[[], UUID]

WORDS = [("Hello", 0.0), ("Jon.", 1.0)]
RESULT = {
    "text": "Hello Jon. Hello, Anna. Hm.",
    "language": "en",
    "duration": 6.0,
    "segments": [
        {
            "start": start, "end": start + 2, "text": text,
            "avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0, **more,
        }
        for start, text, more in [
            (0.0, "Hello Jon.", {"words": [
                {"start": at, "end": at + 1, "word": word, "probability": 0.5} for word, at in WORDS
            ]}),
            (2.0, "Hello, Anna.", {}),
            (4.0, "Hm.", {}),
        ]
    ],
    "engine": "faster-whisper",
    "model": "tiny",
}  # fmt: skip
TEXT_LIMIT = 10_000


def segments(count: int, text: str = "Yes.") -> list[dict[str, Any]]:
    marks = {"avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0}
    return [{"start": float(n), "end": n + 1.0, "text": text, **marks} for n in range(count)]


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    unlimited = settings.model_copy(update={"rate_limit": 0})
    with serve(create_app(unlimited)) as url:
        yield url


@contextmanager
def signed_in(url: str, settings: Settings, user: UUID) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=600)}"}
    with httpx2.Client(base_url=url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def api(url: str, settings: Settings, user: UUID) -> Iterator[httpx2.Client]:
    with signed_in(url, settings, user) as client:
        yield client


@pytest.fixture
def other(make_user: MakeUser) -> UUID:
    return make_user()


def make_job(conn: psycopg.Connection, user: UUID, *steps: str, result: Any = RESULT) -> UUID:
    """Insert a job and set its queue job to each of these states in turn."""
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'talk.mp3')"
        " returning id, job_id::bigint",
        (user,),
    ).fetchone()
    assert row is not None
    for step in steps:
        if step == "succeeded":
            conn.execute(
                "update processing_jobs set result = %s where id = %s", (Jsonb(result), row[0])
            )
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = %s where id = %s", (step, row[1])
        )
    job_id: UUID = row[0]
    return job_id


@pytest.fixture
def job(conn: psycopg.Connection, user: UUID) -> UUID:
    return make_job(conn, user, "doing", "succeeded")


def patch(api: httpx2.Client, job: UUID, *corrections: dict[str, Any]) -> httpx2.Response:
    return api.patch(f"/jobs/{job}/corrections", json={"corrections": corrections})


def get(api: httpx2.Client, job: UUID) -> list[tuple[int, str | None, str | None]]:
    response = api.get(f"/jobs/{job}/corrections")
    assert response.status_code == 200, response.text
    return [(c["segment"], c["text"], c["speaker"]) for c in response.json()["corrections"]]


def rows(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select segment, text, speaker from transcript_corrections order by job_id, segment"
    ).fetchall()


def assert_problem(response: httpx2.Response, status: int, code: str, detail: str = "") -> None:
    assert response.status_code == status, response.text
    problem = response.json()
    assert problem["code"] == code
    assert detail in problem["detail"]


# Over REST ----------------------------------------------------------------------------------------


def test_what_is_not_named_stays_and_null_takes_back(api: httpx2.Client, job: UUID) -> None:
    assert get(api, job) == []
    first = patch(api, job, {"segment": 1, "text": "Hi, Anna."}, {"segment": 0, "speaker": "Anna"})
    assert first.status_code == 200
    assert first.json() == api.get(f"/jobs/{job}/corrections").json()
    assert first.json()["corrections"][0].keys() == {"segment", "text", "speaker", "updated_at"}
    assert get(api, job) == [(0, None, "Anna"), (1, "Hi, Anna.", None)]
    patch(api, job, {"segment": 1, "speaker": "\t Jon "}, {"segment": 0, "text": ""})
    assert get(api, job) == [(0, "", "Anna"), (1, "Hi, Anna.", "Jon")]
    patch(api, job, {"segment": 1, "text": None}, {"segment": 0, "text": "x", "speaker": None})
    assert get(api, job) == [(0, "x", None), (1, None, "Jon")]
    patch(api, job, {"segment": 0, "text": None}, {"segment": 1, "speaker": None})
    assert get(api, job) == []
    assert patch(api, job, {"segment": 2, "text": None, "speaker": None}).json() == {
        "corrections": []
    }


def test_the_result_stays_as_it_was_transcribed(api: httpx2.Client, job: UUID) -> None:
    before = api.get(f"/jobs/{job}").json()
    patch(api, job, {"segment": 0, "text": "Hello John.", "speaker": "Anna"})
    assert api.get(f"/jobs/{job}").json() == before
    assert before["result"] == RESULT


def test_all_or_nothing(api: httpx2.Client, conn: psycopg.Connection, job: UUID) -> None:
    patch(api, job, {"segment": 0, "text": "before"})
    response = patch(
        api, job,
        {"segment": 0, "text": "after"}, {"segment": 1, "text": "new", "speaker": "Anna"},
        {"segment": 2, "speaker": "x" * 101},
    )  # fmt: skip
    assert_problem(response, 422, "invalid_input", "corrections[2].speaker: must have 1 to 100")
    assert rows(conn) == [(0, "before", None)]


@pytest.mark.parametrize(
    ("entry", "field", "detail"),
    [
        ({"segment": 3, "text": "x"}, "segment", "must be from 0 to 2, not 3: the transcript"),
        ({"segment": -1, "text": "x"}, "segment", "greater than or equal to 0"),
        ({"segment": 2**31, "text": "x"}, "segment", "less than"),
        ({"segment": "1", "text": "x"}, "segment", "valid integer"),
        ({"segment": 1.5, "text": "x"}, "segment", "valid integer"),
        ({"text": "x"}, "segment", "is missing"),
        ({"segment": 0, "text": "x"}, "segment", "0 comes twice"),
        ({"segment": 1}, "", "has neither text nor speaker"),
        ({"segment": 1, "words": []}, "words", "is unknown"),
        ({"segment": 1, "text": 7}, "text", "valid string"),
        ({"segment": 1, "text": "ä" * 10_001}, "text", "at most 10000 characters, not 10001"),
        ({"segment": 1, "text": "a\u0007b"}, "text", "must not hold control characters"),
        ({"segment": 1, "text": "a\rb"}, "text", "but for newlines and tabs"),
        ({"segment": 1, "text": "a\u0000b"}, "text", "holds a NUL character"),
        ({"segment": 1, "text": "a\ud800b"}, "text", "half a surrogate pair"),
        ({"segment": 1, "speaker": ""}, "speaker", "must have 1 to 100 characters, not 0"),
        ({"segment": 1, "speaker": " \t "}, "speaker", "Send null if nobody is to be named"),
        ({"segment": 1, "speaker": "x" * 101}, "speaker", "1 to 100 characters, not 101"),
        ({"segment": 1, "speaker": "a\nb"}, "speaker", "control characters or line breaks"),
        ({"segment": 1, "speaker": "a\u2028b"}, "speaker", "control characters or line breaks"),
        ({"segment": 1, "speaker": "a\u0000b"}, "speaker", "holds a NUL character"),
    ],
)  # fmt: skip
def test_what_is_refused_names_entry_field_and_limit(
    api: httpx2.Client,
    conn: psycopg.Connection,
    job: UUID,
    entry: dict[str, Any],
    field: str,
    detail: str,
) -> None:
    body = json.dumps({"corrections": [{"segment": 0, "text": "good"}, entry]})
    response = api.patch(f"/jobs/{job}/corrections", content=body)
    assert_problem(response, 422, "invalid_input", detail)
    where = f"corrections[1].{field}" if field else "corrections[1]"
    assert response.json()["field"] == where
    assert response.json()["detail"].startswith(f"{where}: ")
    assert rows(conn) == []


def test_what_is_just_allowed(api: httpx2.Client, job: UUID) -> None:
    entry = {"segment": 1, "text": "a\n\tb" + "𝄞" * (TEXT_LIMIT - 4), "speaker": "𝄞" * 100}
    assert patch(api, job, entry).status_code == 200
    assert get(api, job) == [tuple(entry.values())]


def test_a_request_has_limits(api: httpx2.Client, conn: psycopg.Connection, user: UUID) -> None:
    result = RESULT | {"segments": segments(6000)}
    job = make_job(conn, user, "doing", "succeeded", result=result)
    entries = [{"segment": n, "speaker": "Anna"} for n in range(5001)]
    assert patch(api, job, *entries[:-1]).status_code == 200
    assert len(rows(conn)) == 5000
    assert_problem(patch(api, job, *entries), 422, "invalid_input", "at most 5000 items")
    assert_problem(patch(api, job), 422, "invalid_input", "at least 1 item")
    long = [{"segment": n, "text": "x" * TEXT_LIMIT} for n in range(101)]
    assert_problem(patch(api, job, *long * 2), 413, "body_too_large")
    assert patch(api, job, *long[:-1]).status_code == 200
    assert_problem(
        patch(api, job, long[-1]), 422, "invalid_input",
        "corrections[0].text: the corrected texts of a transcript must have at most 1000000 ",
    )  # fmt: skip
    assert patch(api, job, {"segment": 100, "text": ""}, {"segment": 0, "text": None}).is_success


@pytest.mark.parametrize(
    ("steps", "code", "detail"),
    [
        ([], "transcript_not_ready", "is queued"),
        (["doing"], "transcript_not_ready", "is processing"),
        (["doing", "failed"], "no_transcript", "is failed"),
        (["cancelled"], "no_transcript", "is cancelled"),
    ],
)
def test_only_completed_jobs_are_corrected(
    api: httpx2.Client,
    conn: psycopg.Connection,
    user: UUID,
    steps: list[str],
    code: str,
    detail: str,
) -> None:
    job = make_job(conn, user, *steps)
    assert_problem(patch(api, job, {"segment": 0, "text": "x"}), 409, code, detail)
    assert get(api, job) == []


def test_a_deleted_jobs_corrections_go_with_it(
    api: httpx2.Client, conn: psycopg.Connection, job: UUID
) -> None:
    patch(api, job, {"segment": 0, "text": "x"})
    assert api.delete(f"/jobs/{job}").status_code == 204
    assert rows(conn) == []
    assert_problem(api.get(f"/jobs/{job}/corrections"), 404, "job_not_found")
    assert_problem(patch(api, job, {"segment": 0, "text": "x"}), 404, "job_not_found")
    assert_problem(patch(api, uuid4(), {"segment": 0, "text": "x"}), 404, "job_not_found")


def test_two_tabs_that_correct_at_the_same_time_both_win(
    url: str, api: httpx2.Client, settings: Settings, user: UUID, conn: psycopg.Connection
) -> None:
    result = RESULT | {"segments": segments(200)}
    job = make_job(conn, user, "doing", "succeeded", result=result)
    texts = [{"segment": n, "text": "x"} for n in range(200)]
    speakers = [{"segment": n, "speaker": "y"} for n in reversed(range(200))]
    ready = threading.Barrier(4)
    statuses: list[int] = []

    def tab(parts: list[dict[str, Any]]) -> None:
        with signed_in(url, settings, user) as client:
            ready.wait()
            statuses.append(patch(client, job, *parts).status_code)

    tabs = [texts, texts[::-1], speakers, speakers[::-1]]
    threads = [threading.Thread(target=tab, args=(parts,)) for parts in tabs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4
    assert get(api, job) == [(n, "x", "y") for n in range(200)]


# Transcripts --------------------------------------------------------------------------------------

CORRECTIONS_OF_ALL = [
    {"segment": 0, "text": "Hello John.", "speaker": "Anna <A>"},
    {"segment": 1, "speaker": "John"},
    {"segment": 2, "text": ""},
]
EXPECTED = {
    "txt": "Anna <A>: Hello John.\n\nJohn: Hello, Anna.\n",
    "srt": (
        "1\n00:00:00,000 --> 00:00:01,920\nAnna <A>: Hello John.\n\n"
        "2\n00:00:02,000 --> 00:00:04,000\nJohn: Hello, Anna.\n"
    ),
    "vtt": (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.920\n<v Anna &lt;A&gt;>Hello John.\n\n"
        "00:00:02.000 --> 00:00:04.000\n<v John>Hello, Anna.\n"
    ),
    "tsv": "start\tend\ttext\n0\t2000\tAnna <A>: Hello John.\n2000\t4000\tJohn: Hello, Anna.\n",
}


@pytest.mark.parametrize("form", EXPECTED)
def test_exports_have_corrections_unless_the_original_is_asked_for(
    api: httpx2.Client, job: UUID, form: str
) -> None:
    path = f"/jobs/{job}/transcript.{form}"
    before = api.get(path).text
    assert "Hm." in before
    assert patch(api, job, *CORRECTIONS_OF_ALL).is_success
    assert api.get(path).text == EXPECTED[form]
    assert api.get(f"{path}?original=true").text == before


def test_other_readers_understand_the_subtitles(api: httpx2.Client, job: UUID) -> None:
    patch(api, job, *CORRECTIONS_OF_ALL)
    found = list(srt.parse(api.get(f"/jobs/{job}/transcript.srt").text))
    assert [cue.content for cue in found] == ["Anna <A>: Hello John.", "John: Hello, Anna."]
    captions = webvtt.from_string(api.get(f"/jobs/{job}/transcript.vtt").text).captions
    assert [caption.voice for caption in captions] == ["Anna &lt;A&gt;", "John"]


def test_json_says_what_was_corrected(api: httpx2.Client, job: UUID) -> None:
    patch(api, job, *CORRECTIONS_OF_ALL)
    document = api.get(f"/jobs/{job}/transcript.json").json()
    assert document["text"] == "Hello John. Hello, Anna."
    first, second, last = document["segments"]
    original: Any = RESULT["segments"]
    assert first["words"][0] == original[0]["words"][0]
    assert first["words"][1] == original[0]["words"][1] | {"word": "John.", "probability": 1.0}
    known = {"words": first["words"], "text": "Hello John.", "speaker": "Anna <A>"}
    assert first == original[0] | known | {"corrected": True, "original": "Hello Jon."}
    assert second == original[1] | {"speaker": "John"}
    assert last == original[2] | {"text": "", "corrected": True, "original": "Hm."}
    assert api.get(f"/jobs/{job}/transcript?original=1").json() == RESULT


def test_a_translation_is_joined_as_english(
    api: httpx2.Client, conn: psycopg.Connection, user: UUID
) -> None:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path, options) values (%s, 'a', %s)"
        " returning id, job_id::bigint",
        (user, Jsonb({"task": "translate"})),
    ).fetchone()
    assert row is not None
    step = b"update procrastinate.procrastinate_jobs set status = %s where id = %s"
    conn.execute(step, ("doing", row[1]))
    conn.execute("update processing_jobs set result = %s", (Jsonb(RESULT | {"language": "ja"}),))
    conn.execute(step, ("succeeded", row[1]))
    patch(api, row[0], {"segment": 2, "text": "Ah."})
    assert api.get(f"/jobs/{row[0]}/transcript.txt").text == "Hello Jon. Hello, Anna. Ah.\n"


@pytest.mark.parametrize("form", ["json", "srt"])
def test_the_etag_changes_with_each_correction(api: httpx2.Client, job: UUID, form: str) -> None:
    path = f"/jobs/{job}/transcript.{form}"

    def etag(query: str = "") -> str:
        return str(api.get(path + query).headers["etag"])

    tags = [etag()]
    for entry in (
        {"segment": 0, "text": "a"}, {"segment": 0, "text": "b"}, {"segment": 0, "speaker": "b"},
        {"segment": 1, "text": "b"}, {"segment": 0, "text": None},
    ):  # fmt: skip
        assert patch(api, job, entry).is_success
        tags.append(etag())
    assert len(set(tags)) == len(tags)
    assert api.get(path, headers={"If-None-Match": tags[-1]}).status_code == 304
    assert api.get(path, headers={"If-None-Match": tags[-2]}).status_code == 200
    assert etag("?original=true") == tags[0]
    patch(api, job, *({"segment": n, "text": None, "speaker": None} for n in (0, 1)))
    assert etag() == tags[0], "all is as it was transcribed"


def test_the_client_reads_corrected_transcripts(
    url: str, api: httpx2.Client, settings: Settings, user: UUID, job: UUID
) -> None:
    patch(api, job, *CORRECTIONS_OF_ALL)
    with JobClient(url, issue_token(settings, user, lifetime=60)) as client:
        transcript = client.transcript(job)
        assert isinstance(transcript, Transcript)
        assert transcript.to_dict() == api.get(f"/jobs/{job}/transcript.json").json()
        assert client.transcript(job, "txt") == EXPECTED["txt"]
        assert client.transcript(job, original=True).to_dict() == RESULT
        assert client.transcript(job, "txt", original=True) == f"{RESULT['text']}\n"


# In the database ----------------------------------------------------------------------------------


@contextmanager
def acting_as(conn: psycopg.Connection, user: UUID, role: str = "authenticated") -> Iterator[None]:
    with conn.transaction():
        conn.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            (role, json.dumps({"sub": str(user), "role": role})),
        )
        yield


# As PostgREST writes an upsert of supabase-js: each column that was sent, and the key.
UPSERT = (
    b"insert into transcript_corrections (job_id, segment, text) values (%s, %s, %s)"
    b" on conflict (job_id, segment) do update set"
    b" job_id = excluded.job_id, segment = excluded.segment, text = excluded.text"
)


def test_owners_write_directly(conn: psycopg.Connection, user: UUID, job: UUID) -> None:
    with acting_as(conn, user):
        conn.execute(UPSERT, (job, 0, "one"))
        conn.execute(UPSERT, (job, 0, "two"))
        conn.execute("update transcript_corrections set speaker = 'Anna', text = null")
        conn.execute(UPSERT, (job, 1, ""))
        assert rows(conn) == [(0, None, "Anna"), (1, "", None)]
    with acting_as(conn, user):
        conn.execute("update transcript_corrections set speaker = null, text = null")
        assert rows(conn) == [], "rows that say nothing are gone"
        conn.execute(UPSERT, (job, 2, None))
        assert rows(conn) == []
        conn.execute(UPSERT, (job, 2, "x"))
        assert conn.execute("delete from transcript_corrections").rowcount == 1


def test_others_see_and_change_nothing(
    conn: psycopg.Connection, user: UUID, other: UUID, job: UUID
) -> None:
    with acting_as(conn, user):
        conn.execute(UPSERT, (job, 0, "secret"))
    theirs = make_job(conn, other, "doing", "succeeded")
    running = make_job(conn, user, "doing")
    with acting_as(conn, other):
        conn.execute(UPSERT, (theirs, 0, "mine"))
        assert rows(conn) == [(0, "mine", None)]
        conn.execute("delete from transcript_corrections")
        assert rows(conn) == []
        assert conn.execute("update transcript_corrections set text = 'x'").rowcount == 0
        assert conn.execute("delete from transcript_corrections").rowcount == 0
        conn.execute(UPSERT, (theirs, 0, "mine"))
    # Neither says anything of the job: not that it runs, nor that there is none.
    for job_id, segment in ((job, 0), (job, 1), (job, 99), (running, 0), (uuid4(), 0)):
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
            acting_as(conn, other),
        ):
            conn.execute(UPSERT, (job_id, segment, "x"))
    with (
        pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"),
        acting_as(conn, other),
    ):
        conn.execute("update transcript_corrections set job_id = %s", (job,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user, "anon"):
        rows(conn)
    assert sorted(rows(conn)) == [(0, "mine", None), (0, "secret", None)]


def test_services_name_speakers_for_users(conn: psycopg.Connection, user: UUID, job: UUID) -> None:
    with acting_as(conn, user, "service_role"):
        conn.execute(
            "insert into transcript_corrections (job_id, segment, speaker)"
            " select %s, n, 'Anna' from generate_series(0, 2) n",
            (job,),
        )
    with acting_as(conn, user):
        assert rows(conn) == [(n, None, "Anna") for n in range(3)]


def test_the_time_is_the_databases(conn: psycopg.Connection, user: UUID, job: UUID) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(conn, user):
        conn.execute(
            "insert into transcript_corrections (job_id, segment, updated_at)"
            " values (%s, 0, now())",
            (job,),
        )
    with acting_as(conn, user):
        conn.execute(UPSERT, (job, 0, "x"))
        row = conn.execute("select updated_at = now() from transcript_corrections").fetchone()
    assert row == (True,)


@pytest.mark.parametrize(
    ("segment", "text", "column", "message"),
    [
        (3, "x", "segment", "segment: must be from 0 to 2, not 3: the transcript has 3 segments"),
        (-1, "x", "segment", "segment: must be from 0 to 2, not -1: the transcript has 3 segments"),
        (0, "x" * 10_001, "text", "text: must have at most 10000 characters, not 10001"),
        (0, "\x7f", "text", "text: must not hold control characters, but for newlines and tabs"),
    ],
)
def test_sql_is_checked_as_requests_are(
    conn: psycopg.Connection,
    user: UUID,
    job: UUID,
    segment: int,
    text: str,
    column: str,
    message: str,
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refused, acting_as(conn, user):
        conn.execute(UPSERT, (job, segment, text))
    said = refused.value.diag
    assert (said.message_primary, said.column_name) == (message, column)
    assert json.loads(said.message_detail or "") == {"segment": segment}
    assert said.table_name == "transcript_corrections"
    assert said.message_hint


def test_a_segment_is_not_moved_to_where_there_is_none(
    conn: psycopg.Connection, user: UUID, job: UUID
) -> None:
    running = make_job(conn, user, "doing")
    conn.execute(UPSERT, (job, 0, "x"))
    for change, value, message in (
        ("segment", 3, "segment: must be from 0 to 2"),
        ("job_id", running, "job_id: the job is processing"),
    ):
        with pytest.raises(psycopg.errors.CheckViolation, match=message), acting_as(conn, user):
            conn.execute(f"update transcript_corrections set {change} = %s".encode(), (value,))


def test_a_completed_job_is_not_run_again(conn: psycopg.Connection, user: UUID, job: UUID) -> None:
    """So places of segments are stable."""
    with acting_as(conn, user):
        conn.execute("select retry_processing_job(%s)", (job,))
        conn.execute("select cancel_processing_job(%s)", (job,))
    row = conn.execute("select status, result from processing_jobs").fetchone()
    assert row == ("completed", RESULT)


@pytest.mark.parametrize("result", [{"text": ""}, {"segments": None}, {"segments": {}}])
def test_a_result_without_segments_has_none_to_correct(
    conn: psycopg.Connection, user: UUID, result: dict[str, Any]
) -> None:
    job = make_job(conn, user, "doing", "succeeded", result=result)
    with pytest.raises(psycopg.errors.CheckViolation, match="has 0 segments"):
        conn.execute(UPSERT, (job, 0, "x"))


def test_what_is_read_does_not_depend_on_others_corrections(
    conn: psycopg.Connection, user: UUID, other: UUID, job: UUID
) -> None:
    result = RESULT | {"segments": segments(1000)}
    for _ in range(20):
        conn.execute(
            "insert into transcript_corrections (job_id, segment, speaker)"
            " select %s, n, 'Anna' from generate_series(0, 999) n",
            (make_job(conn, other, "doing", "succeeded", result=result),),
        )
    conn.execute("analyze transcript_corrections, processing_jobs")
    with acting_as(conn, user):
        conn.execute(UPSERT, (job, 0, "x"))
        plan = conn.execute(b"explain " + CORRECTIONS["list"], {"id": job}).fetchall()
    lines = [line for (line,) in plan]
    assert lines[0].startswith("Index Scan using transcript_corrections_pkey"), lines


def test_a_large_result_is_read_once_for_many_corrections(
    conn: psycopg.Connection, user: UUID
) -> None:
    chance = random.Random(0)
    result = RESULT | {"segments": segments(2000)}
    result["text"] = chance.randbytes(100_000).hex()  # it does not become small enough to be seen
    job = make_job(conn, user, "doing", "succeeded", result=result)

    def read() -> tuple[int, int]:
        conn.execute("select pg_stat_force_next_flush()")
        row = conn.execute(
            "select toast_blks_hit + toast_blks_read + tidx_blks_hit + tidx_blks_read,"
            " pg_relation_size(reltoastrelid) / 8192"
            " from pg_statio_user_tables join pg_class on oid = relid"
            " where relid = 'processing_jobs'::regclass"
        ).fetchone()
        assert row is not None
        return int(row[0]), int(row[1])

    before, blocks = read()
    assert blocks > 20
    with acting_as(conn, user):
        inserted = conn.execute(
            "insert into transcript_corrections (job_id, segment, speaker)"
            " select %s, n, 'Anna' from generate_series(0, 1999) n",
            (job,),
        )
    assert inserted.rowcount == 2000
    assert read()[0] - before < 10 * blocks
