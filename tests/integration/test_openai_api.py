"""The OpenAI-compatible API, with OpenAI's own package on a real server. (With a real model:
test_openai_with_whisper.)"""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import openai
import psycopg
import pytest
import uvicorn
from openai import AsyncOpenAI
from openai.types.audio import (
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
)
from psycopg.types.json import Jsonb

from jobs import keys
from jobs.scopes import Scope
from jobs.settings import Settings
from modal_functions import engines
from tests.folders import files_in
from web.app import create_app
from web.auth import issue_token
from web.routes.openai import MODELS, STANDINS, rest_of

pytestmark = pytest.mark.anyio

AUDIO = b"ID3 not really"


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, uvicorn.Server]]:
    """Run a server on a socket of its own; yield the URL that OpenAI's package takes, too."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", server
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    with running(settings) as (url, _):
        yield url


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    with serving(settings) as url:
        yield url


@pytest.fixture
def token(settings: Settings, user: UUID) -> str:
    return issue_token(settings, user, lifetime=600)


@pytest.fixture
async def client(url: str, token: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=token, base_url=url, timeout=60) as client:
        yield client


WORDS = [
    {"start": 0.0, "end": 0.5, "word": "Größe", "probability": 0.9},
    {"start": 0.5, "end": 1.5, "word": "<Wahl>.", "probability": 0.9},
]
RESULT = {
    "text": "Größe <Wahl>. Yes.",
    "language": "de",
    "duration": 6.5,
    "segments": [
        {
            "start": 0.0, "end": 1.5, "text": "Größe <Wahl>.", "avg_logprob": -0.25,
            "no_speech_prob": 0.01, "compression_ratio": 1.5, "words": WORDS,
        },
        {
            "start": 5.0, "end": 6.5, "text": "Yes.", "avg_logprob": -0.5, "no_speech_prob": 0.02,
            "compression_ratio": 0.75,
        },
    ],
    "engine": "faster-whisper",
    "model": "tiny",
}  # fmt: skip


class Jobs:
    """What a worker would do, by hand."""

    def __init__(self, conn: psycopg.Connection, storage: Path) -> None:
        self.conn = conn
        self.storage = storage

    def all(self) -> list[tuple[Any, ...]]:
        query = "select id, options, file_path, status from processing_jobs order by created_at"
        return self.conn.execute(query).fetchall()

    async def new(self, count: int = 1) -> tuple[Any, ...]:
        """Return the last of so many jobs, as soon as it is there."""
        await until(lambda: len(self.all()) >= count)
        return self.all()[count - 1]

    def set_queue(self, job_id: UUID, *statuses: str) -> None:
        for status in statuses:
            self.conn.execute(
                "update procrastinate.procrastinate_jobs set status = %s"
                " where id = (select job_id::bigint from processing_jobs where id = %s)",
                (status, job_id),
            )

    def complete(self, job_id: UUID, result: dict[str, Any] = RESULT) -> None:
        with self.conn.transaction():
            self.set_queue(job_id, "doing")
            self.conn.execute(
                "update processing_jobs set result = %s where id = %s", (Jsonb(result), job_id)
            )
            self.set_queue(job_id, "succeeded")

    def fail(self, job_id: UUID, code: str, error: str = "It did not work") -> None:
        with self.conn.transaction():
            self.set_queue(job_id, "doing")
            self.conn.execute(
                "update processing_jobs set error_code = %s, error = %s where id = %s",
                (code, error, job_id),
            )
            self.set_queue(job_id, "failed")

    def add_chunk(self, job_id: UUID, index: int, text: str | None) -> None:
        result = None if text is None else Jsonb({**RESULT, "text": text, "language": "en"})
        self.conn.execute(
            "insert into processing_job_chunks (job_id, index, start_seconds, end_seconds, result)"
            " values (%s, %s, %s, %s, %s) on conflict (job_id, index)"
            " do update set result = excluded.result",
            (job_id, index, index, index + 1, result),
        )

    def files(self) -> list[Path]:
        return files_in(self.storage)


@pytest.fixture
def jobs(conn: psycopg.Connection, settings: Settings) -> Jobs:
    return Jobs(conn, settings.storage_dir)


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what the database says has no event
            await asyncio.sleep(0.01)


async def completed(jobs: Jobs, call: Awaitable[Any], result: dict[str, Any] = RESULT) -> Any:
    """Complete the job that a call makes, and return what the call returns."""
    task = asyncio.ensure_future(call)
    count = len(jobs.all())
    jobs.complete((await jobs.new(count + 1))[0], result)
    return await task


# Answers ----------------------------------------------------------------------------------------


async def test_json_from_a_durable_job(client: AsyncOpenAI, jobs: Jobs, user: UUID) -> None:
    raw = await completed(
        jobs,
        client.audio.transcriptions.with_raw_response.create(
            model="whisper-1", file=("talk.mp3", AUDIO)
        ),
    )
    [(job_id, options, file_path, status)] = jobs.all()
    transcription = raw.parse()
    assert transcription.text == RESULT["text"]
    assert transcription.usage.type == "duration"
    assert transcription.usage.seconds == 7
    assert raw.headers["pgscribe-job-id"] == str(job_id)
    assert (options, status) == ({"model": "base", "task": "transcribe"}, "completed")
    assert file_path.startswith(f"{user}/")
    assert file_path.endswith("/talk.mp3")
    assert (jobs.storage / file_path).read_bytes() == AUDIO


async def test_text_and_subtitles(client: AsyncOpenAI, jobs: Jobs) -> None:
    expected = {
        "text": "Größe <Wahl>. Yes.\n",
        "srt": "1\n00:00:00,000 --> 00:00:01,500\nGröße <Wahl>.\n\n"
        "2\n00:00:05,000 --> 00:00:06,500\nYes.\n",
        "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nGröße &lt;Wahl&gt;.\n\n"
        "00:00:05.000 --> 00:00:06.500\nYes.\n",
    }
    for form, text in expected.items():
        create: Any = client.audio.transcriptions.create
        call = create(model="tiny", file=("talk.mp3", AUDIO), response_format=form)
        assert await completed(jobs, call) == text


async def test_verbose_json(client: AsyncOpenAI, jobs: Jobs) -> None:
    answer = await completed(
        jobs,
        client.audio.transcriptions.create(
            model="tiny",
            file=("talk.mp3", AUDIO),
            language="german",
            prompt="Größe",
            temperature=0.5,
            response_format="verbose_json",
            timestamp_granularities=["segment", "word"],
            chunking_strategy={"type": "server_vad", "threshold": 0.5},
        ),
    )
    assert isinstance(answer, TranscriptionVerbose)
    assert (answer.text, answer.language, answer.duration) == (RESULT["text"], "german", 6.5)
    assert answer.segments is not None
    assert answer.segments[0].model_dump() == {
        "id": 0, "seek": 0, "start": 0.0, "end": 1.5, "text": "Größe <Wahl>.", "tokens": [],
        "temperature": 0.5, "avg_logprob": -0.25, "compression_ratio": 1.5, "no_speech_prob": 0.01,
    }  # fmt: skip
    assert [segment.id for segment in answer.segments] == [0, 1]
    assert answer.words is not None
    assert [(word.word, word.start, word.end) for word in answer.words] == [
        ("Größe", 0.0, 0.5), ("<Wahl>.", 0.5, 1.5)
    ]  # fmt: skip
    assert jobs.all()[0][1] == {
        "model": "tiny", "task": "transcribe", "language": "de", "initial_prompt": "Größe",
        "temperature": 0.5, "word_timestamps": True,
    }  # fmt: skip


async def test_granularities(client: AsyncOpenAI, jobs: Jobs) -> None:
    create: Any = client.audio.transcriptions.create
    form = {"model": "tiny", "file": ("a.mp3", AUDIO), "response_format": "verbose_json"}
    usual = await completed(jobs, create(**form))
    assert (len(usual.segments), usual.words) == (2, None)
    words = await completed(jobs, create(**form, timestamp_granularities=["word"]))
    assert (words.segments, len(words.words)) == (None, 2)
    assert [job[1].get("word_timestamps") for job in jobs.all()] == [None, True]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # in OpenAI's package
async def test_translations_are_english(client: AsyncOpenAI, jobs: Jobs) -> None:
    answer = await completed(
        jobs,
        client.audio.translations.create(
            model="small", file=("talk.mp3", AUDIO), response_format="verbose_json"
        ),
    )
    assert (answer.language, answer.text) == ("english", RESULT["text"])
    assert jobs.all()[0][1] == {"model": "small", "task": "translate"}


async def test_silence_is_an_empty_text(client: AsyncOpenAI, jobs: Jobs) -> None:
    for form, expected in (("json", ""), ("text", ""), ("srt", ""), ("vtt", "WEBVTT\n")):
        create: Any = client.audio.transcriptions.create
        call = create(model="tiny", file=("a.mp3", AUDIO), response_format=form)
        task = asyncio.ensure_future(call)
        jobs.fail((await jobs.new(len(jobs.all()) + 1))[0], "no_speech")
        answer = await task
        assert (answer if isinstance(answer, str) else answer.text) == expected


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("whisper-1", "small.en"),
        ("gpt-4o-mini-transcribe-2025-12-15", "small.en"),
        ("turbo", "turbo"),
        ("whisper-11", "whisper-11"),
        ("ours/fine.tuned", "ours/fine.tuned"),
    ],
)
async def test_which_model_runs(
    settings: Settings, token: str, jobs: Jobs, given: str, stored: str
) -> None:
    with serving(settings.model_copy(update={"openai_model": "small.en"})) as url:
        async with AsyncOpenAI(api_key=token, base_url=url) as client:
            create = client.audio.transcriptions.create
            await completed(jobs, create(model=given, file=("a.mp3", AUDIO)))
    assert jobs.all()[0][1]["model"] == stored


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("/home/me/talk.mp3", "talk.mp3"),
        ("C:\\Users\\me\\talk.mp3", "talk.mp3"),
        ("..", "audio"),
        ("a\x01b\x85.mp3", "a_b_.mp3"),
        ("ä" * 150 + ".mp3", "ä" * 98 + ".mp3"),
        ("x" * 300, "x" * 200),
        ('my "talk".mp3', 'my "talk".mp3'),
    ],
)
async def test_file_names(url: str, token: str, jobs: Jobs, given: str, stored: str) -> None:
    quoted = given.replace("\\", "\\\\").replace('"', '\\"')
    body = (
        '--b\r\nContent-Disposition: form-data; name="file"; filename="' + quoted + '"\r\n\r\nx'
        '\r\n--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n--b--'
    )
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "multipart/form-data; boundary=b",
    }
    async with httpx.AsyncClient(timeout=60) as client:
        await completed(
            jobs,
            client.post(f"{url}/audio/transcriptions", content=body.encode(), headers=headers),
        )
    assert jobs.all()[0][2].rpartition("/")[2] == stored
    assert len(jobs.files()) == 1


# What is refused --------------------------------------------------------------------------------


async def post(url: str, token: str, fields: list[tuple[str, Any]], **headers: str) -> Any:
    """Send a form with its parts in that order; files are tuples."""
    files = [(name, v if isinstance(v, tuple) else (None, v)) for name, v in fields]
    async with httpx.AsyncClient(timeout=60) as client:
        return await client.post(
            f"{url}/audio/transcriptions",
            files=files,
            headers={"Authorization": f"Bearer {token}"} | headers,
        )


FILE = ("file", ("a.mp3", AUDIO))
MODEL = ("model", "tiny")


async def test_options_may_follow_the_file(url: str, token: str, jobs: Jobs) -> None:
    fields = [FILE, MODEL, ("language", ""), ("response_format", "text"), ("stream", "false")]
    response = await completed(jobs, post(url, token, fields))
    assert response.text == "Größe <Wahl>. Yes.\n"
    assert jobs.all()[0][1] == {"model": "tiny", "task": "transcribe"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ([MODEL], "file", "missing"),
        ([FILE], "model", "is missing"),
        ([FILE, FILE, MODEL], "file", "one recording"),
        ([("file", ("a.mp3", b"")), MODEL], "file", "empty"),
        ([FILE, ("model", "../up")], "model", "no model's name"),
        ([FILE, ("model", "gpt-4o-transcribe-diarize")], "model", "speakers"),
        ([FILE, MODEL, ("response_format", "xml")], "response_format", "'verbose_json'"),
        ([FILE, MODEL, ("response_format", "diarized_json")], "response_format", "speakers"),
        ([FILE, MODEL, ("temperature", "1.5")], "temperature", "less than or equal to 1"),
        ([FILE, MODEL, ("temperature", "nan")], "temperature", ""),
        ([FILE, MODEL, ("language", "klingon")], "language", "code such as en"),
        ([FILE, MODEL, ("prompt", "x" * 2001)], "prompt", "2000"),
        ([FILE, MODEL, ("prompt", "x" * 70_000)], "prompt", "65536 bytes"),
        ([FILE, MODEL, ("stream", "perhaps")], "stream", "boolean"),
        ([FILE, MODEL, ("speed", "2")], "speed", "is unknown here; there are"),
        ([FILE, MODEL, ("include[]", "logprobs")], "include", "not kept"),
        ([FILE, MODEL, ("keywords[]", "x")], "keywords", "prompt"),
        ([FILE, MODEL, ("known_speaker_names[]", "x")], "known_speaker_names", "speakers"),
        ([FILE, MODEL, ("languages[]", "en")], "languages", "language"),
        (
            [FILE, MODEL, ("timestamp_granularities[]", "word")],
            "body",
            "timestamp_granularities: needs response_format verbose_json",
        ),
        (
            [FILE, MODEL, ("response_format", "srt"), ("stream", "true")],
            "body",
            "stream: needs response_format",
        ),
    ],
)
async def test_a_refused_form_names_the_field_and_leaves_nothing(
    url: str, token: str, jobs: Jobs, fields: list[Any], param: str, message: str
) -> None:
    response = await post(url, token, fields)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_input")
    assert error["param"] == param
    assert message in error["message"]
    assert (jobs.all(), jobs.files()) == ([], [])


async def test_characters_that_postgres_cannot_store_leave_no_file(
    url: str, token: str, jobs: Jobs
) -> None:
    response = await post(url, token, [FILE, MODEL, ("prompt", "a\0b")])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_input")
    assert (jobs.all(), jobs.files()) == ([], [])


async def test_errors_are_the_packages_own(
    client: AsyncOpenAI, url: str, settings: Settings, token: str, jobs: Jobs
) -> None:
    file = ("a.mp3", AUDIO)
    with pytest.raises(openai.BadRequestError) as bad:
        await client.audio.transcriptions.create(model="tiny", file=file, language="xx")
    assert (bad.value.param, bad.value.code) == ("language", "invalid_input")
    with pytest.raises(openai.AuthenticationError) as who:
        await client.with_options(api_key="sk-x").audio.transcriptions.create(
            model="tiny", file=file
        )
    assert who.value.code == "not_authenticated"
    nobody = issue_token(settings, UUID(int=1), lifetime=60)
    with pytest.raises(openai.PermissionDeniedError):
        await client.with_options(api_key=nobody).audio.transcriptions.create(
            model="tiny", file=file
        )
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("gpt-5")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.get("/nowhere", cast_to=object)
    async with httpx.AsyncClient() as plain:
        response = await plain.get(f"{url}/audio/transcriptions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert (jobs.all(), jobs.files()) == ([], [])
    async with httpx.AsyncClient() as plain:
        headers = {"Authorization": f"Bearer {token}"}
        response = await plain.post(f"{url}/audio/translations", json={}, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "body")


async def test_keys_need_both_scopes(
    url: str, user: UUID, conn: psycopg.Connection, jobs: Jobs
) -> None:
    for scopes in ({Scope.JOBS_WRITE}, {Scope.AUDIO_WRITE, Scope.JOBS_READ}):
        _, key = keys.create(conn, "narrow", user_id=user, scopes=scopes)
        async with AsyncOpenAI(api_key=key, base_url=url) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.audio.transcriptions.create(model="tiny", file=("a", AUDIO))
    assert (jobs.all(), jobs.files()) == ([], [])
    _, key = keys.create(
        conn, "service", user_id=None, scopes={Scope.JOBS_WRITE, Scope.AUDIO_WRITE}
    )
    headers = {"Pgscribe-User": str(user)}
    async with AsyncOpenAI(api_key=key, base_url=url, default_headers=headers) as client:
        create = client.audio.transcriptions.create
        await completed(jobs, create(model="tiny", file=("a", AUDIO)))
    assert jobs.all()[0][2].startswith(f"{user}/")


async def test_rates_and_what_nobody_expected(
    settings: Settings, token: str, conn: psycopg.Connection
) -> None:
    conn.execute("alter table processing_jobs rename to hidden")
    with serving(settings.model_copy(update={"rate_limit": 1})) as url:
        async with AsyncOpenAI(api_key=token, base_url=url, max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as broken:
                await client.audio.transcriptions.create(model="tiny", file=("a", AUDIO))
            assert broken.value.code == "internal_error"
            assert "processing_jobs" not in broken.value.message
            with pytest.raises(openai.RateLimitError) as limited:
                await client.models.list()
            assert limited.value.code == "rate_limited"
            assert int(limited.value.response.headers["retry-after"]) >= 1


async def test_what_is_over_a_limit_leaves_no_file(
    client: AsyncOpenAI, user: UUID, conn: psycopg.Connection, jobs: Jobs
) -> None:
    conn.execute("insert into pgscribe.owner_limits (owner_id, max_queued) values (%s, 1)", (user,))
    conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s)", (user, f"{user}/a.mp3")
    )
    with pytest.raises(openai.RateLimitError, match="1") as error:
        await client.with_options(max_retries=0).audio.transcriptions.create(
            model="tiny", file=("a.mp3", AUDIO)
        )
    assert (error.value.code, error.value.param) == ("limit_reached", "max_queued")
    assert "retry-after" in error.value.response.headers
    assert (len(jobs.all()), jobs.files()) == (1, [])


async def test_uploads_are_limited(settings: Settings, token: str, jobs: Jobs) -> None:
    with serving(settings.model_copy(update={"max_upload_bytes": 1000})) as url:
        async with AsyncOpenAI(api_key=token, base_url=url) as client:
            for size in (1001, 2 * 1024**2):
                with pytest.raises(openai.APIStatusError) as error:
                    await client.audio.transcriptions.create(
                        model="tiny", file=("a.mp3", b"x" * size)
                    )
                assert (error.value.status_code, error.value.code) == (413, "upload_too_large")
            await completed(
                jobs, client.audio.transcriptions.create(model="tiny", file=("a", b"x" * 1000))
            )
    assert len(jobs.files()) == 1


async def test_half_an_upload_is_nothing(url: str, token: str, jobs: Jobs) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\n\r\n'
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 50_000)
        await until(lambda: jobs.files() != [])
    await until(lambda: jobs.files() == [])
    assert jobs.all() == []


# How jobs end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "param"),
    [
        ("invalid_audio", 400, "file"),
        ("audio_too_long", 400, "file"),
        ("invalid_options", 400, None),
        ("model_unavailable", 404, "model"),
        ("file_too_large", 413, "file"),
        ("quota_exceeded", 429, None),
        ("engine_crashed", 500, None),
        ("timeout", 500, None),
    ],
)
async def test_failed_jobs_are_told_and_not_tried_again(
    client: AsyncOpenAI, jobs: Jobs, code: str, status: int, param: str | None
) -> None:
    call = client.audio.transcriptions.create(model="tiny", file=("a.mp3", AUDIO))
    task = asyncio.ensure_future(call)
    job_id = (await jobs.new())[0]
    jobs.fail(job_id, code, "It is not a recording")
    with pytest.raises(openai.APIStatusError, match="It is not a recording") as error:
        await task
    assert (error.value.status_code, error.value.code, error.value.param) == (status, code, param)
    assert error.value.response.headers["pgscribe-job-id"] == str(job_id)
    assert len(jobs.all()) == 1, "the package leaves it at that"


async def test_cancelled_and_deleted_jobs(client: AsyncOpenAI, jobs: Jobs) -> None:
    create = client.audio.transcriptions.create
    task = asyncio.ensure_future(create(model="tiny", file=("a.mp3", AUDIO)))
    job_id = (await jobs.new())[0]
    jobs.conn.execute("select cancel_processing_job(%s)", (job_id,))
    with pytest.raises(openai.ConflictError, match="was cancelled") as cancelled:
        await task
    assert cancelled.value.code == "job_cancelled"
    task = asyncio.ensure_future(create(model="tiny", file=("a.mp3", AUDIO)))
    deleted = (await jobs.new(2))[0]
    jobs.conn.execute("delete from processing_jobs where id = %s", (deleted,))
    with pytest.raises(openai.NotFoundError) as gone:
        await task
    assert gone.value.code == "job_not_found"
    assert gone.value.response.headers["pgscribe-job-id"] == str(deleted)


async def test_the_wait_is_limited_and_the_job_goes_on(
    settings: Settings, token: str, jobs: Jobs
) -> None:
    with serving(settings.model_copy(update={"openai_wait": 1})) as url:
        async with AsyncOpenAI(api_key=token, base_url=url, max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="goes on") as error:
                await client.audio.transcriptions.create(model="tiny", file=("a.mp3", AUDIO))
            job_id, *_, status = jobs.all()[0]
            assert (error.value.status_code, error.value.code) == (504, "wait_timeout")
            assert str(job_id) in error.value.message
            assert status == "queued"
            stream = await client.audio.transcriptions.create(
                model="tiny", file=("a.mp3", AUDIO), stream=True
            )
            with pytest.raises(openai.APIError, match="goes on") as streamed:
                [event async for event in stream]
    assert streamed.value.code == "wait_timeout"
    assert [status for *_, status in jobs.all()] == ["queued", "queued"]


# Repeats ----------------------------------------------------------------------------------------


async def test_the_packages_own_retries_wait_for_the_same_job(
    url: str, token: str, jobs: Jobs
) -> None:
    sent: list[str] = []

    async def note(request: Any) -> None:
        sent.append(request.headers["x-stainless-retry-count"])

    async with AsyncOpenAI(
        api_key=token,
        base_url=url,
        timeout=1,
        max_retries=20,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [note]}),
    ) as impatient:
        create = impatient.audio.transcriptions.create
        task = asyncio.ensure_future(create(model="tiny", file=("a", AUDIO)))
        job_id = (await jobs.new())[0]
        await until(lambda: len(sent) >= 3)
        jobs.complete(job_id)
        assert (await task).text == RESULT["text"]
    assert sent[:3] == ["0", "1", "2"]
    assert len(jobs.all()) == 1
    await until(lambda: len(jobs.files()) == 1)


async def test_a_repeat_finds_what_was_done_meanwhile(url: str, token: str, jobs: Jobs) -> None:
    first = await completed(jobs, post(url, token, [FILE, MODEL]))
    repeat = {"x-stainless-retry-count": "1"}
    again = await post(url, token, [MODEL, FILE], **repeat)
    assert again.json() == first.json()
    assert again.headers["pgscribe-job-id"] == first.headers["pgscribe-job-id"]
    other_form = await post(url, token, [MODEL, FILE, ("response_format", "text")], **repeat)
    assert other_form.text == "Größe <Wahl>. Yes.\n"
    assert (len(jobs.all()), len(jobs.files())) == (1, 1)
    for fields in ([FILE, MODEL, ("language", "en")], [("file", ("a.mp3", b"other")), MODEL]):
        await completed(jobs, post(url, token, fields, **repeat))
    assert len(jobs.all()) == 3, "other files and options are other requests"
    await completed(jobs, post(url, token, [FILE, MODEL]))
    assert len(jobs.all()) == 4, "what does not say that it is a repeat is none"


async def test_a_repeat_of_what_failed_or_is_long_past_is_new(
    url: str, token: str, jobs: Jobs
) -> None:
    task = asyncio.ensure_future(post(url, token, [FILE, MODEL]))
    jobs.fail((await jobs.new())[0], "engine_crashed")
    assert (await task).status_code == 500
    repeat = {"x-stainless-retry-count": "1"}
    assert (await completed(jobs, post(url, token, [FILE, MODEL], **repeat))).status_code == 200
    with jobs.conn.transaction():
        jobs.conn.execute("set local pgscribe.mirroring = 'on'")
        jobs.conn.execute(
            "update processing_jobs set completed_at = completed_at - interval '11 minutes'"
        )
    assert (await completed(jobs, post(url, token, [FILE, MODEL], **repeat))).status_code == 200
    assert len(jobs.all()) == 3


async def test_a_key_makes_any_request_one(url: str, token: str, jobs: Jobs) -> None:
    key = {"Idempotency-Key": "my request"}
    first, second = (asyncio.ensure_future(post(url, token, [FILE, MODEL], **key)) for _ in "ab")
    job_id = (await jobs.new())[0]
    await until(lambda: len(jobs.files()) == 1)
    jobs.complete(job_id)
    answers = [await first, await second, await post(url, token, [FILE, MODEL], **key)]
    assert {answer.headers["pgscribe-job-id"] for answer in answers} == {str(job_id)}
    assert {answer.status_code for answer in answers} == {200}
    for fields in ([FILE, ("model", "base")], [("file", ("a.mp3", b"other")), MODEL]):
        other = await post(url, token, fields, **key)
        assert (other.status_code, other.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert (len(jobs.all()), len(jobs.files())) == (1, 1)


async def test_a_key_answers_with_the_failure_too(url: str, token: str, jobs: Jobs) -> None:
    key = {"Idempotency-Key": "k" * 200}
    task = asyncio.ensure_future(post(url, token, [FILE, MODEL], **key))
    jobs.fail((await jobs.new())[0], "engine_crashed")
    assert (await task).status_code == 500
    assert (await post(url, token, [FILE, MODEL], **key)).status_code == 500
    assert (len(jobs.all()), len(jobs.files())) == (1, 1)


async def test_keys_are_each_users_own(
    url: str, token: str, settings: Settings, make_user: Callable[[], UUID], jobs: Jobs
) -> None:
    other = issue_token(settings, make_user(), lifetime=60)
    for bearer in (token, other):
        await completed(jobs, post(url, bearer, [FILE, MODEL], **{"Idempotency-Key": "k"}))
    assert len(jobs.all()) == 2


# Streams ----------------------------------------------------------------------------------------


async def test_the_text_is_streamed_as_it_comes(client: AsyncOpenAI, jobs: Jobs) -> None:
    stream = await client.audio.transcriptions.create(
        model="tiny", file=("a.mp3", AUDIO), stream=True
    )
    job_id = UUID(stream.response.headers["pgscribe-job-id"])
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    events = aiter(stream)
    jobs.set_queue(job_id, "doing")
    jobs.add_chunk(job_id, 0, "Once upon")
    jobs.add_chunk(job_id, 1, None)
    jobs.add_chunk(job_id, 2, None)
    found: list[Any] = [await anext(events)]
    jobs.add_chunk(job_id, 1, "a time.")
    found.append(await anext(events))
    jobs.complete(job_id, RESULT | {"text": "Once upon a time. The end."})
    found += [event async for event in events]
    *deltas, done = found
    assert all(isinstance(delta, TranscriptionTextDeltaEvent) for delta in deltas)
    assert [delta.delta for delta in deltas] == ["Once upon", " a time.", " The end."]
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert done.text == "Once upon a time. The end."


async def test_failures_end_a_stream(client: AsyncOpenAI, jobs: Jobs) -> None:
    create = client.audio.transcriptions.create
    for act, code in (
        (lambda job: jobs.fail(job, "invalid_audio", "It is no audio"), "invalid_audio"),
        (
            lambda job: jobs.conn.execute("delete from processing_jobs where id = %s", (job,)),
            "job_not_found",
        ),
    ):
        stream = await create(model="tiny", file=("a.mp3", AUDIO), stream=True)
        act(UUID(stream.response.headers["pgscribe-job-id"]))
        with pytest.raises(openai.APIError) as error:
            [event async for event in stream]
        assert error.value.code == code


async def test_a_stream_of_silence(client: AsyncOpenAI, jobs: Jobs) -> None:
    stream = await client.audio.transcriptions.create(
        model="tiny", file=("a.mp3", AUDIO), stream=True
    )
    jobs.fail((await jobs.new())[0], "no_speech")
    [done] = [event async for event in stream]
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert done.text == ""


@pytest.mark.parametrize(
    ("text", "sent", "rest"),
    [
        ("One two.", "", "One two."),
        ("One two.", "One", " two."),
        ("One two.", "One two.", ""),
        ("今日は天気", "今日 は", "天気"),
        ("One two.", "One  t", "wo."),
        ("One two.", "Two", ""),
        ("One", "One two", ""),
    ],
)
def test_what_is_left_to_send(text: str, sent: str, rest: str) -> None:
    assert rest_of(text, sent) == rest


# Clients that leave -----------------------------------------------------------------------------


async def test_a_job_lives_on_without_its_client(
    settings: Settings, token: str, jobs: Jobs
) -> None:
    with running(settings) as (url, server):
        task = asyncio.ensure_future(post(url, token, [FILE, MODEL]))
        job_id = (await jobs.new())[0]
        assert server.server_state.tasks
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: not server.server_state.tasks)  # nobody waits for the job any more
        jobs.complete(job_id)
        response = await post(url, token, [FILE, MODEL], **{"x-stainless-retry-count": "1"})
    assert response.json()["text"] == RESULT["text"]
    assert response.headers["pgscribe-job-id"] == str(job_id)
    assert (len(jobs.all()), len(jobs.files())) == (1, 1)


async def test_a_stream_ends_with_its_client(settings: Settings, token: str, jobs: Jobs) -> None:
    with running(settings) as (url, server):
        async with AsyncOpenAI(api_key=token, base_url=url) as client:
            stream = await client.audio.transcriptions.create(
                model="tiny", file=("a.mp3", AUDIO), stream=True
            )
            assert server.server_state.tasks
            await stream.close()
        await until(lambda: not server.server_state.tasks)
    assert [status for *_, status in jobs.all()] == ["queued"]


# Models -----------------------------------------------------------------------------------------


async def test_models(client: AsyncOpenAI, url: str) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == [*STANDINS, *MODELS]
    assert set(MODELS) == set(engines.MODELS)
    model = await client.models.retrieve("whisper-1")
    assert (model.id, model.object, model.owned_by) == ("whisper-1", "model", "openai")
    assert (await client.models.retrieve("large-v3")).id == "large-v3"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("a/b")
    async with httpx.AsyncClient() as plain:
        assert (await plain.get(f"{url}/models")).status_code == 401


async def test_the_description_has_the_form(url: str) -> None:
    async with httpx.AsyncClient() as plain:
        paths = (await plain.get(f"{url.removesuffix('/v1')}/openapi.json")).json()["paths"]
    operation = paths["/v1/audio/transcriptions"]["post"]
    assert "multipart/form-data" in operation["requestBody"]["content"]
    assert {"400", "401", "413", "504"} <= operation["responses"].keys()
    assert "422" not in operation["responses"]
    errors = operation["responses"]["400"]["content"]
    assert errors == {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
