"""Both Python clients: on the real app over a real socket, and through a proxy that loses things.

What the app has no route for yet is tested on ``tests.standin``. Each test runs with both clients.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import psycopg
import pytest

from jobs.client import (
    AsyncJobClient,
    JobChanged,
    JobClient,
    JobDeleted,
    NewJob,
    PartialText,
    RequestFailed,
    Retries,
    ServerUnreachable,
    WaitTimedOut,
)
from jobs.client.webhooks import AsyncWebhooks
from jobs.errors import InvalidInput
from jobs.models import JobStatus, TranscriptionOptions
from jobs.settings import Settings
from tests import postgrest
from tests.live import FaultyProxy, answer, proxied, serve
from tests.standin import TRANSCRIPT, Standin, event
from web.app import create_app
from web.auth import issue_token

QUICK = Retries(attempts=3, seconds=20, first=0.01, longest=0.02)
MakeClient = Callable[..., JobClient]


class Blocking:
    """An ``AsyncJobClient`` that is called as a ``JobClient`` is."""

    def __init__(self, client: AsyncJobClient | AsyncWebhooks, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __repr__(self) -> str:
        return repr(self._client)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):  # a part of the client
            return Blocking(method, self._runner)

        def call(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            if isinstance(result, AsyncGenerator):
                return self._iterate(result)
            return self._runner.run(result)

        return call

    def _iterate(self, items: AsyncGenerator[Any, None]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, self)

        try:
            while (item := self._runner.run(following())) is not self:
                yield item
        finally:
            self._runner.run(items.aclose())


@pytest.fixture(params=["JobClient", "AsyncJobClient"])
def connect(request: pytest.FixtureRequest) -> Iterator[MakeClient]:
    """Make clients, of one kind and of the other, which close with the test."""
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if request.param[0] == "A" else None

        def make(url: str, token: Any = "a-token", **named: Any) -> JobClient:
            named = {"retries": QUICK} | named
            if runner is None:
                return stack.enter_context(JobClient(url, token, **named))
            client = runner.run(AsyncJobClient(url, token, **named).__aenter__())
            stack.callback(lambda: runner.run(client.__aexit__(None, None, None)))
            return cast("JobClient", Blocking(client, runner))

        yield make


# The app ----------------------------------------------------------------------------------------


@pytest.fixture
def api(settings: Settings) -> Iterator[str]:
    with serve(create_app(settings)) as url:
        yield url


@pytest.fixture
def proxy(api: str) -> Iterator[FaultyProxy]:
    with proxied(api) as running:
        yield running


@pytest.fixture
def token(settings: Settings, user: UUID) -> str:
    return issue_token(settings, user, lifetime=600)


@pytest.fixture
def client(connect: MakeClient, proxy: FaultyProxy, token: str) -> JobClient:
    return connect(proxy.url, token)


@pytest.fixture
def talk(user: UUID) -> str:
    return f"{user}/talk.mp3"


def count_jobs(conn: psycopg.Connection) -> int:
    row = conn.execute("select count(*) from processing_jobs").fetchone()
    assert row is not None
    number: int = row[0]
    return number


def set_queue_status(conn: psycopg.Connection, job_id: UUID, status: str) -> None:
    conn.execute(
        "update procrastinate.procrastinate_jobs"
        " set status = %s::procrastinate.procrastinate_job_status"
        " where id = (select job_id::bigint from processing_jobs where id = %s)",
        (status, job_id),
    )


def test_submit_says_all_that_a_job_can(client: JobClient, talk: str) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    job_id = client.submit(
        talk,
        TranscriptionOptions(model="tiny", language="en"),
        scheduled_at=later,
        priority=7,
        idempotency_key="Tuesday's talk",
    )
    job = client.get_job(str(job_id))
    assert (job.id, job.file_path, job.status) == (job_id, talk, JobStatus.QUEUED)
    assert (job.options["model"], job.options["language"]) == ("tiny", "en")
    assert (job.scheduled_at, job.priority, job.idempotency_key) == (later, 7, "Tuesday's talk")


def test_a_lost_answer_does_not_submit_twice(
    client: JobClient, proxy: FaultyProxy, conn: psycopg.Connection, talk: str
) -> None:
    proxy.faults = [("POST", "answer")]
    job_id = client.submit(talk)
    assert proxy.seen("POST") == 2
    assert count_jobs(conn) == 1
    assert client.get_job(job_id).file_path == talk
    assert client.submit(talk) != job_id, "another call is another job"


def test_a_lost_request_is_sent_again(client: JobClient, proxy: FaultyProxy, talk: str) -> None:
    proxy.faults = [("POST", "request"), ("POST", 0)]
    assert client.get_job(client.submit(talk)).status == JobStatus.QUEUED
    assert proxy.seen("POST") == 3


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_passes_is_waited_for(
    client: JobClient, proxy: FaultyProxy, conn: psycopg.Connection, talk: str, status: int
) -> None:
    proxy.faults = [("POST", answer(status, b"<h1>busy</h1>", retry_after="0"))]
    client.submit(talk)
    assert (proxy.seen("POST"), count_jobs(conn)) == (2, 1)


def test_the_server_says_when_to_come_back(
    connect: MakeClient, proxy: FaultyProxy, token: str, talk: str
) -> None:
    client = connect(proxy.url, token, retries=Retries(attempts=5, seconds=30, first=0.01))
    proxy.faults = [("POST", answer(429, retry_after="3600"))]
    with pytest.raises(RequestFailed) as refused:
        client.submit(talk)
    assert (refused.value.status, refused.value.retry_after) == (429, 3600)
    assert proxy.seen("POST") == 1, "an hour is more than it insists for"


def test_retry_after_may_be_a_date(client: JobClient, proxy: FaultyProxy, talk: str) -> None:
    proxy.faults = [("POST", answer(429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"))]
    with pytest.raises(RequestFailed) as refused:
        client.submit(talk)
    assert refused.value.retry_after is not None
    assert refused.value.retry_after > 1e9
    proxy.faults = [("POST", answer(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"))]
    client.submit(talk)


def test_it_does_not_insist_for_ever(client: JobClient, proxy: FaultyProxy, talk: str) -> None:
    proxy.faults = [("POST", "request")] * 9
    with pytest.raises(ServerUnreachable, match="No pgscribe server answers"):
        client.submit(talk)
    assert proxy.seen("POST") == QUICK.attempts
    proxy.faults = [("GET", answer(503))] * 9
    with pytest.raises(RequestFailed) as refused:
        client.get_job(uuid4())
    assert (refused.value.status, proxy.seen("GET")) == (503, QUICK.attempts)


def test_a_slow_server_is_asked_again(
    connect: MakeClient, proxy: FaultyProxy, token: str, talk: str, conn: psycopg.Connection
) -> None:
    proxy.faults = [("POST", "wait")] * 2
    with pytest.raises(ServerUnreachable, match="ReadTimeout"):
        connect(proxy.url, token, timeout=0.5, retries=Retries(attempts=1)).submit(talk)
    assert count_jobs(conn) == 0
    connect(proxy.url, token, timeout=1).submit(talk)
    assert count_jobs(conn) == 1


def test_what_would_be_done_twice_is_not_tried_again(
    client: JobClient, proxy: FaultyProxy, conn: psycopg.Connection, talk: str
) -> None:
    job_id = client.submit(talk)
    assert client.cancel(job_id).status == JobStatus.CANCELLED
    proxy.requests.clear()
    proxy.faults = [("POST", "answer")]
    with pytest.raises(ServerUnreachable):
        client.retry(job_id)
    assert proxy.seen("POST") == 1
    assert client.get_job(job_id).status == JobStatus.QUEUED, "it was done once"
    set_queue_status(conn, job_id, "cancelled")
    proxy.faults = [("POST", answer(429, retry_after="0"))]
    assert client.retry(job_id).status == JobStatus.QUEUED, "429: nothing had been done"


def test_a_cancel_whose_answer_is_lost_is_sent_again(
    client: JobClient, proxy: FaultyProxy, talk: str
) -> None:
    job_id = client.submit(talk)
    proxy.faults = [("POST", "answer")]
    assert client.cancel(job_id).status == JobStatus.CANCELLED
    with pytest.raises(RequestFailed, match="no such job"):
        client.cancel(uuid4())


def test_refusals_are_the_servers_own(client: JobClient, proxy: FaultyProxy, talk: str) -> None:
    with pytest.raises(RequestFailed) as refused:
        client.submit(talk, {"modle": "base"})
    problem = refused.value
    assert (problem.status, problem.code, problem.field) == (422, "invalid_input", "options.modle")
    assert "unknown option" in problem.detail
    assert f"{problem}" == f"{problem.detail} (HTTP 422)"
    client.submit(talk, idempotency_key="k")
    with pytest.raises(RequestFailed, match="HTTP 422") as other_body:
        client.submit(talk, {"model": "tiny"}, idempotency_key="k")
    assert other_body.value.field == "idempotency_key"
    assert proxy.seen("POST") == 3, "refusals are not tried again"


def test_another_users_token_sees_nothing(
    connect: MakeClient, api: str, client: JobClient, settings: Settings, make_user: Any, talk: str
) -> None:
    job_id = client.submit(talk)
    stranger = connect(api, issue_token(settings, make_user(), lifetime=60))
    with pytest.raises(RequestFailed) as refused:
        stranger.get_job(job_id)
    assert (refused.value.status, refused.value.code) == (404, "job_not_found")
    assert list(stranger.list_jobs()) == []


def test_list_jobs(client: JobClient, talk: str) -> None:
    ids = [client.submit(talk) for _ in range(3)]
    client.cancel(ids[0])
    assert [job.id for job in client.list_jobs()] == ids[::-1]
    assert [job.id for job in client.list_jobs("cancelled")] == ids[:1]
    assert [job.id for job in client.list_jobs(JobStatus.QUEUED, limit=1)] == ids[2:]
    with pytest.raises(InvalidInput, match="completed"):
        client.list_jobs("done")


def test_upload_through_the_app(
    client: JobClient, user: UUID, sample: Path, settings: Settings
) -> None:
    file_path = client.upload(sample)
    assert file_path.startswith(f"{user}/")
    stored = settings.storage_dir / file_path
    assert stored.read_bytes() == sample.read_bytes()


def test_wait_sees_a_job_through(client: JobClient, conn: psycopg.Connection, talk: str) -> None:
    """What it sees is what makes the job go on, so that nobody has to be quick or slow."""
    job_id = client.submit(talk)
    seen: list[JobChanged] = []

    def on_change(now: JobChanged) -> None:
        seen.append(now)
        if now.status == JobStatus.QUEUED:
            set_queue_status(conn, job_id, "doing")
        elif now.progress == 0:
            conn.execute("update processing_jobs set progress = 0.5, note = 'half'")
        elif now.status == JobStatus.PROCESSING:
            set_queue_status(conn, job_id, "failed")

    job = client.wait(job_id, timeout=60, on_change=on_change)
    assert (job.status, job.error_code) == (JobStatus.FAILED, "internal_error")
    assert [(now.status.value, now.progress) for now in seen] == [
        ("queued", 0), ("processing", 0), ("processing", 0.5), ("failed", 0.5),
    ]  # fmt: skip
    assert seen[2].note == "half"


def test_follow_ends_with_the_deletion(
    client: JobClient, conn: psycopg.Connection, talk: str
) -> None:
    job_id = client.submit(talk)
    events = client.follow(job_id)
    assert next(events) == JobChanged(job_id, JobStatus.QUEUED, 0)
    conn.execute("delete from processing_jobs")
    assert list(events) == [JobDeleted(job_id)]
    with pytest.raises(RequestFailed, match="no such job"):
        list(client.follow(job_id))


def test_wait_ends_when_its_time_is_over(client: JobClient, talk: str) -> None:
    job_id = client.submit(talk)
    with pytest.raises(WaitTimedOut):
        client.wait(job_id, timeout=0.1)
    assert client.get_job(job_id).status == JobStatus.QUEUED


def test_nobody_there(connect: MakeClient, talk: str) -> None:
    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:1 .*ConnectError.*pgscribe dev"):
        connect("http://127.0.0.1:1").submit(talk)


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b'{"id": 7}', b""])
def test_answers_of_something_else(
    client: JobClient, proxy: FaultyProxy, body: bytes, talk: str
) -> None:
    proxy.faults = [("GET", answer(200, body)), ("POST", answer(202, body))]
    for ask in (lambda: client.get_job(uuid4()), lambda: client.submit(talk)):
        with pytest.raises(RequestFailed, match="is the URL right") as refused:
            ask()
        assert refused.value.code == "unexpected_answer"


def test_redirects_are_not_followed(client: JobClient, proxy: FaultyProxy) -> None:
    with proxied(proxy.target) as elsewhere:
        proxy.faults = [("GET", answer(307, location=f"{elsewhere.url}/jobs"))]
        with pytest.raises(RequestFailed, match="redirects"):
            list(client.list_jobs())
        assert elsewhere.requests == []


# Tokens -----------------------------------------------------------------------------------------


def test_the_token_is_asked_for_each_time(
    connect: MakeClient, proxy: FaultyProxy, token: str, talk: str
) -> None:
    tokens = iter(["expired", token, token])
    client = connect(proxy.url, lambda: next(tokens))
    proxy.faults = [("POST", answer(503))]
    client.get_job(client.submit(talk))
    sent = [headers["authorization"] for _, _, headers in proxy.requests]
    assert sent == ["bearer expired", *[f"bearer {token}".lower()] * 2]


@pytest.mark.anyio
async def test_the_token_may_be_awaited(api: str, token: str) -> None:
    async def current() -> str:
        await asyncio.sleep(0)
        return token

    async with AsyncJobClient(api, current) as client:
        assert [job async for job in client.list_jobs()] == []


def test_api_keys_act_for_a_user(connect: MakeClient, proxy: FaultyProxy, user: UUID) -> None:
    client = connect(proxy.url, "a-key", user_id=user)
    with pytest.raises(RequestFailed, match="HTTP 401"):
        list(client.list_jobs())
    assert proxy.requests[0][2]["pgscribe-user"] == str(user)


@pytest.mark.parametrize("bad", ["two words", "line\nfeed", "schlüssel", ""])
def test_the_token_is_in_no_error_and_no_log(
    connect: MakeClient, api: str, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = f"hidden{bad}" if bad else ""
    with pytest.raises(InvalidInput) as refused:
        connect(api, secret).get_job(uuid4())
    client = connect("http://127.0.0.1:1", "hidden")
    with pytest.raises(ServerUnreachable) as unreachable:
        client.get_job(uuid4())
    texts = [repr(client), caplog.text]
    for error in (refused.value, unreachable.value):
        assert error.__context__ is None
        texts += [repr(error), str(error)]
    assert not [text for text in texts if "hidden" in text]


@pytest.mark.parametrize("url", ["example.org", "ftp://example.org", "https://", "http://u:p@h/"])
def test_unusable_urls(url: str) -> None:
    for kind in (JobClient, AsyncJobClient):
        with pytest.raises(InvalidInput, match="url: ") as refused:
            kind(url, "a-token")
        assert "u:p" not in str(refused.value)
        with pytest.raises(InvalidInput, match="user_id"):
            kind("https://example.org", "a-key", user_id="me")
        with pytest.raises(InvalidInput, match="token: is missing"):
            kind("https://example.org", None)  # type: ignore[arg-type]


def test_an_empty_file_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "talk.mp3").touch()
    with (
        JobClient("http://127.0.0.1:1", "a-token") as client,
        pytest.raises(InvalidInput, match=r"'talk\.mp3' is empty"),
    ):
        client.upload(tmp_path / "talk.mp3")


def test_unusable_arguments_are_refused_before_anything_is_sent(
    client: JobClient, proxy: FaultyProxy, talk: str
) -> None:
    for call in (
        client.submit,
        lambda: client.submit(talk, audio_url="https://example.org/a.mp3"),
        lambda: client.submit(talk, scheduled_at=datetime(2026, 1, 1)),  # noqa: DTZ001
        lambda: client.submit(talk, idempotency_key="a\nb"),
        lambda: client.submit(talk, idempotency_key="x" * 201),
        lambda: client.submit(talk, idempotency_key=" "),
        lambda: client.get_job("../jobs"),
    ):
        with pytest.raises(InvalidInput):
            call()
    assert proxy.requests == []


# What the app has no route for yet --------------------------------------------------------------


@pytest.fixture
def standin() -> Standin:
    return Standin()


@pytest.fixture
def front(standin: Standin) -> Iterator[FaultyProxy]:
    with serve(standin.app()) as url, proxied(url) as running:
        yield running


@pytest.fixture
def stood_in(connect: MakeClient, front: FaultyProxy) -> JobClient:
    return connect(front.url)


@pytest.fixture
def recording(tmp_path: Path) -> Callable[[int], Path]:
    def make(size: int) -> Path:
        path = tmp_path / "Mein Gespräch.mp3"
        path.write_bytes(bytes(number % 251 for number in range(size)))
        return path

    return make


Recording = Callable[[int], Path]


def test_upload_by_put(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording
) -> None:
    path = recording(999)
    file_path = stood_in.upload(path)
    assert standin.files == {file_path: path.read_bytes()}
    put = front.requests[1]
    assert (put[0], put[2]["content-type"], put[2]["content-length"]) == (
        "PUT",
        "audio/mpeg",
        "999",
    )


@pytest.mark.parametrize("fault", ["request", "answer", answer(503)])
def test_a_broken_put_is_sent_again(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording, fault: Any
) -> None:
    front.faults = [("PUT", fault)]
    file_path = stood_in.upload(recording(10))
    assert list(standin.files) == [file_path]
    assert front.seen("PUT") == 2, "the second was told that the file is there, or stored it"


def test_a_put_of_what_was_there_before_fails(
    stood_in: JobClient, front: FaultyProxy, recording: Recording
) -> None:
    body = b'{"code": "file_exists", "detail": "There is a file"}'
    front.faults = [("PUT", answer(409, body, content_type="application/problem+json"))]
    with pytest.raises(RequestFailed, match="There is a file"):
        stood_in.upload(recording(10))


def test_upload_by_tus(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording
) -> None:
    path = recording(2500)
    file_path = stood_in.upload(path)
    assert standin.files == {file_path: path.read_bytes()}
    assert (front.seen("PATCH"), front.seen("HEAD")) == (3, 0)


@pytest.mark.parametrize(
    "faults",
    [
        [("POST", None), ("POST", "answer")],
        [("PATCH", None), ("PATCH", "request")],
        [("PATCH", None), ("PATCH", "answer")],
        [("PATCH", None), ("PATCH", None), ("PATCH", "answer")],
        [("PATCH", "answer"), ("HEAD", "request")],
        [("PATCH", None), ("PATCH", answer(423)), ("PATCH", answer(502))],
        [("PATCH", answer(409)), ("HEAD", answer(503)), ("HEAD", None), ("PATCH", None)],
    ],
)
def test_a_broken_tus_upload_goes_on_where_it_was(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording, faults: Any
) -> None:
    path = recording(2500)
    front.faults = list(faults)
    file_path = stood_in.upload(path)
    assert standin.files == {file_path: path.read_bytes()}
    assert front.faults == []
    assert front.seen("POST") <= 3, "what has arrived is not sent again"


def test_an_expired_tus_upload_begins_anew(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording
) -> None:
    path = recording(2500)
    front.faults = [("PATCH", None), ("PATCH", "request")]
    standin.expire = True
    file_path = stood_in.upload(path)
    assert standin.files == {file_path: path.read_bytes()}
    assert front.seen("POST") == 3, "the ticket, and two uploads"


def test_a_tus_upload_without_progress_is_given_up(
    stood_in: JobClient, front: FaultyProxy, recording: Recording
) -> None:
    front.faults = [("PATCH", "request"), ("PATCH", "request"), ("PATCH", "request")] * 9
    with pytest.raises(ServerUnreachable):
        stood_in.upload(recording(2500))
    assert front.seen("PATCH") == QUICK.attempts
    front.faults = [("PATCH", answer(413))]
    with pytest.raises(RequestFailed, match="HTTP 413"):
        stood_in.upload(recording(2500))


def test_what_a_ticket_allows_goes_to_its_host_only(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, recording: Recording
) -> None:
    with proxied(front.target) as elsewhere:
        standin.location = f"{elsewhere.url}/resumable"
        path = recording(2500)
        assert standin.files.get(stood_in.upload(path)) == path.read_bytes()
        assert elsewhere.requests == []


def test_signed_urls_are_in_no_log(
    stood_in: JobClient, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    # By name, too: commands that other tests run keep that logger quiet.
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "httpx2"):
        stood_in.upload(recording(10))
    assert "PUT http://127.0.0.1/…" in caplog.text
    ours = [record.getMessage() for record in caplog.records if "uvicorn" not in record.name]
    assert not [text for text in ours if "secret" in text or "signed" in text]


def test_submit_many(stood_in: JobClient, standin: Standin, front: FaultyProxy) -> None:
    front.faults = [("POST", "answer")]
    ids = stood_in.submit_many(
        [NewJob("u/1.mp3"), NewJob("u/2.mp3", {"model": "tiny"}, idempotency_key="mine")]
    )
    assert front.seen("POST") == 2
    assert list(standin.jobs) == ids
    assert standin.keys["mine"] == ids[1]
    with pytest.raises(InvalidInput, match="idempotency_key"):
        stood_in.submit_many([NewJob("u/3.mp3", idempotency_key="")])


def test_list_jobs_goes_through_all_pages(
    stood_in: JobClient, standin: Standin, front: FaultyProxy
) -> None:
    ids = [standin.add() for _ in range(250)]
    assert [job.id for job in stood_in.list_jobs()] == ids
    assert [path for _, path, _ in front.requests] == [
        "/jobs?limit=100", "/jobs?limit=100&cursor=100", "/jobs?limit=100&cursor=200",
    ]  # fmt: skip
    front.requests.clear()
    assert [job.id for job in stood_in.list_jobs(limit=120)] == ids[:120]
    assert [path for _, path, _ in front.requests] == [
        "/jobs?limit=100", "/jobs?limit=20&cursor=100",
    ]  # fmt: skip


def test_delete(stood_in: JobClient, standin: Standin, front: FaultyProxy) -> None:
    job_id = standin.add()
    front.faults = [("DELETE", "answer")]
    stood_in.delete(job_id)
    assert standin.jobs == {}
    with pytest.raises(RequestFailed, match="HTTP 404"):
        stood_in.delete(job_id)


def test_follow_a_stream(stood_in: JobClient, standin: Standin, front: FaultyProxy) -> None:
    job_id = standin.add()
    queued = event("job", "1", id=str(job_id), status="queued", progress=0, more="later")
    running = event("job", "2", id=str(job_id), status="processing", progress=0.5)
    text = event("partial", "3", text="Grüße und", ready=1, chunks=2, offset=0)
    text += event("partial", "3", text=" Küsse", ready=2, chunks=2, offset=9)
    text += event("partial", "3", text="Anders", ready=1, chunks=2, offset=0)
    done = event("job", "4", id=str(job_id), status="completed", progress=1)
    whole = b": ping\n\n" + queued + running + text + b"event: news\ndata: x\n\n" + done
    whole += event("end", "5")
    bytewise = [whole[at : at + 1] for at in range(len(whole))]
    for chunks in ([whole], bytewise):
        standin.streams = [chunks]
        assert list(stood_in.follow(job_id)) == [
            JobChanged(job_id, JobStatus.QUEUED, 0),
            JobChanged(job_id, JobStatus.PROCESSING, 0.5),
            PartialText(job_id, "Grüße und"),
            PartialText(job_id, "Grüße und Küsse"),
            PartialText(job_id, "Anders"),
            JobChanged(job_id, JobStatus.COMPLETED, 1),
        ]
    assert [path for _, path, _ in front.requests] == [f"/jobs/{job_id}/events"] * 2


def test_a_broken_stream_is_resumed(
    stood_in: JobClient, standin: Standin, front: FaultyProxy
) -> None:
    job_id = standin.add()
    queued = event("job", "7", id=str(job_id), status="queued", progress=0)
    half = event("job", "8", id=str(job_id), status="processing", progress=0.5)
    standin.streams = [[queued], [b": ping"], [half, event("deleted", "9", id=str(job_id))]]
    followed = stood_in.follow(job_id)
    assert next(followed) == JobChanged(job_id, JobStatus.QUEUED, 0)
    assert list(followed) == [JobChanged(job_id, JobStatus.PROCESSING, 0.5), JobDeleted(job_id)]
    assert standin.resumed_from == ["", "7", "7"]
    assert [path.rpartition("/")[2] for _, path, _ in front.requests] == [
        "events", str(job_id), "events", str(job_id), "events",
    ], "in between, it looks at the job"  # fmt: skip


def test_a_stream_that_ends_before_its_job_is_opened_again(
    stood_in: JobClient, standin: Standin
) -> None:
    job_id = standin.add()
    failed = event("job", "3", id=str(job_id), status="failed", progress=0, error="Why")
    standin.streams = [
        [event("end", "1", reason="token_expired")],
        [failed, event("end", "4", reason="job_ended")],
    ]
    events = list(stood_in.follow(job_id))
    assert [(now.status.value, now.error) for now in events if isinstance(now, JobChanged)] == [
        ("queued", None), ("failed", "Why"),
    ]  # fmt: skip
    assert standin.resumed_from == ["", "1"]


def test_what_a_break_hides_is_seen_by_looking(
    stood_in: JobClient, standin: Standin, front: FaultyProxy
) -> None:
    job_id = standin.add()
    standin.streams = [[event("job", "1", id=str(job_id), status="queued", progress=0)]]
    followed = stood_in.follow(job_id)
    next(followed)
    standin.jobs[job_id] |= {"status": "failed", "error_code": "no_speech", "error": "Nothing"}
    assert list(followed) == [JobChanged(job_id, JobStatus.FAILED, 0, None, "no_speech", "Nothing")]
    assert front.seen("GET") == 2


@pytest.mark.parametrize("stream", [[], [b"\xff\n\n"], [b"event: job\ndata: {}\n\n"]])
def test_streams_that_never_work_are_done_without(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, stream: list[bytes]
) -> None:
    job_id = standin.add(status="processing")
    standin.streams = [stream, stream, stream]
    followed = stood_in.follow(job_id)
    assert next(followed) == JobChanged(job_id, JobStatus.PROCESSING, 0)
    ended = threading.Timer(0.3, standin.jobs[job_id].update, [{"status": "cancelled"}])
    ended.start()
    assert list(followed) == [JobChanged(job_id, JobStatus.CANCELLED, 0)]
    ended.join()
    assert 1 <= len(standin.resumed_from) <= 3
    assert front.requests[-1][1] == f"/jobs/{job_id}"


def test_wait_follows_the_stream(stood_in: JobClient, standin: Standin) -> None:
    job_id = standin.add(status="completed", progress=1, result=TRANSCRIPT)
    done = event("job", "4", id=str(job_id), status="completed", progress=1)
    standin.streams = [[done, event("end", "5")], [event("deleted", "6", id=str(job_id))]]
    seen: list[JobChanged] = []
    assert stood_in.wait(job_id, on_change=seen.append).result == TRANSCRIPT
    assert [now.status for now in seen] == [JobStatus.COMPLETED]
    with pytest.raises(RequestFailed, match="deleted") as refused:
        stood_in.wait(job_id)
    assert (refused.value.status, refused.value.code) == (404, "job_not_found")


def test_transcript(stood_in: JobClient, standin: Standin, front: FaultyProxy) -> None:
    job_id = standin.add()
    transcript = stood_in.transcript(job_id)
    assert transcript.to_dict() == TRANSCRIPT
    for form in ("txt", "srt", "vtt", "tsv"):
        assert stood_in.transcript(job_id, cast("Any", form)) == f"{form}: Grüße"
    front.faults = [("GET", answer(200, b"[]")), ("GET", answer(200, pgscribe_partial="true"))]
    with pytest.raises(RequestFailed, match="is the URL right"):
        stood_in.transcript(job_id)
    with pytest.raises(RequestFailed, match="not completed yet"):
        stood_in.transcript(job_id, "srt")


def test_search(stood_in: JobClient, standin: Standin, front: FaultyProxy) -> None:
    job_id = standin.add()
    (found,) = stood_in.search("guten Tag & more")
    assert (found.id, [hit.text for hit in found.hits]) == (job_id, ["guten Tag & more"])
    assert front.requests[0][1] == "/search?q=guten+Tag+%26+more&limit=100"


@pytest.mark.parametrize("fault", [None, "request", 100, answer(503, retry_after="0")])
def test_download_audio(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, tmp_path: Path, fault: Any
) -> None:
    job_id = standin.add()
    audio = bytes(range(256)) * 4000
    standin.files[standin.jobs[job_id]["file_path"]] = audio
    front.faults = [("GET", None), ("GET", fault)]
    target = tmp_path / "talk.mp3"
    assert stood_in.download_audio(job_id, target) == len(audio)
    assert target.read_bytes() == audio
    assert [path.name for path in tmp_path.iterdir()] == ["talk.mp3"]


def test_a_download_that_fails_leaves_nothing(
    stood_in: JobClient, standin: Standin, front: FaultyProxy, tmp_path: Path
) -> None:
    job_id = standin.add()
    standin.files[standin.jobs[job_id]["file_path"]] = b"audio" * 1000
    front.faults = [("GET", None), ("GET", 100)] * 9
    with pytest.raises(ServerUnreachable):
        stood_in.download_audio(job_id, tmp_path / "talk.mp3")
    assert list(tmp_path.iterdir()) == []


# Reports, with a secret key ---------------------------------------------------------------------


def test_update_job_status(
    client: JobClient,
    conn: psycopg.Connection,
    database: str,
    talk: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = client.submit(talk)
    for name in ("SUPABASE_URL", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidInput, match="SUPABASE_URL"):
        client.update_job_status(job_id, progress=0.5)
    with postgrest.serve() as project:
        project.database = database
        monkeypatch.setenv("SUPABASE_URL", project.url)
        monkeypatch.setenv("SUPABASE_SECRET_KEY", project.secret_key)
        with pytest.raises(RequestFailed, match="queued") as refused:
            client.update_job_status(job_id, progress=0.5)
        assert refused.value.code == "report_refused"
        set_queue_status(conn, job_id, "doing")
        reported = client.update_job_status(job_id, progress=0.5, note="half")
    assert reported == JobChanged(job_id, JobStatus.PROCESSING, 0.5, "half")
    assert client.get_job(job_id).note == "half"
