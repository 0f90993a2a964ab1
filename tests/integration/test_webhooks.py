"""Webhooks: from the end of a job to a signed request that a real receiver checks."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from standardwebhooks.webhooks import WebhookVerificationError

from jobs import deliveries, worker
from jobs.settings import Settings
from tests.conftest import MakeUser
from tests.receiver import Answer, Receiver, receiving
from tests.streams import Work, until

Row = dict[str, Any]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "webhook_networks": Settings.load(
                database_url="x", webhook_networks="127.0.0.0/8"
            ).webhook_networks,
            "public_url": "https://api.example.org",
        }
    )


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    work = Work(database)
    yield work
    work.close()


@contextmanager
def delivering(settings: Settings, *, transcribes: bool = False) -> Iterator[None]:
    """Run a worker in a thread."""
    if not transcribes:
        with psycopg.connect(settings.database_url.get_secret_value(), autocommit=True) as conn:
            conn.execute("select pause_queue('transcription')")
    started: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        stop = asyncio.Event()
        started.append((asyncio.get_running_loop(), stop))
        await worker.run(settings, stop, asyncio.Event())

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    until(lambda: started, "the worker runs")
    try:
        yield
    finally:
        loop, stop = started[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, three times."""
    monkeypatch.setattr(deliveries, "PAUSES", (0,) * 3)


def endpoint(conn: psycopg.Connection, user: UUID, url: str, **values: object) -> tuple[UUID, str]:
    """Return a new endpoint's id and secret."""
    row = conn.execute(
        "select e ->> 'id', e ->> 'secret' from create_webhook_endpoint("
        " %(url)s, user_id => %(user)s, events => %(events)s) e",
        {"url": url, "user": user, "events": ["job.completed", "job.failed", "job.cancelled"]}
        | values,
    ).fetchone()
    assert row is not None
    return UUID(row[0]), row[1]


def rows(conn: psycopg.Connection, query: str, *values: object) -> list[Row]:
    cursor = conn.cursor(row_factory=dict_row)
    return cursor.execute(query.encode(), values).fetchall()


def log(conn: psycopg.Connection) -> list[Row]:
    return rows(conn, "select * from webhook_deliveries order by created_at, id")


def settled(conn: psycopg.Connection, count: int = 1) -> list[Row]:
    """Wait until so many deliveries have ended, and return them."""
    query = "select count(*) as n from webhook_deliveries where completed_at is not null"
    until(lambda: rows(conn, query)[0]["n"] == count, "the deliveries have ended")
    return log(conn)


def end(work: Work, user: UUID, status: str = "succeeded", **columns: object) -> UUID:
    """Have a job end, and return its id."""
    columns |= {"result": '{"text": ""}'} if status == "succeeded" else {}
    with work.at_once():
        job = work.insert(user, "talk.mp3")
        work.start(job)
        for name, value in columns.items():
            work.execute(f"update processing_jobs set {name} = %s where id = %s", (value, job))
        work.set_queue_status(status, job)
    return job


def test_a_completed_job_is_told_of_and_the_signature_is_right(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint_id, secret = endpoint(conn, user, receiver.url)
    with delivering(settings):
        job = end(work, user)
        (request,) = receiver.expect(1)
        (row,) = settled(conn)
    assert request.headers["content-type"] == "application/json"
    said = request.verified(secret)
    assert (said["type"], request.id) == ("job.completed", str(row["id"]))
    assert said["data"]["id"] == str(job)
    assert said["data"]["url"] == f"https://api.example.org/jobs/{job}"
    assert (row["status"], row["attempts"], row["response_status"]) == ("delivered", 1, 204)
    assert (row["endpoint_id"], row["job_id"], row["error"]) == (endpoint_id, job, None)
    (attempt,) = rows(conn, "select * from webhook_attempts")
    assert (attempt["attempt"], attempt["response_status"]) == (1, 204)


@pytest.mark.usefixtures("_at_once")
def test_what_fails_is_tried_again_with_the_same_id(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    _, secret = endpoint(conn, user, receiver.url)
    receiver.answers = [
        Answer(500, body=b"Out of order\0" + b"x" * 10_000),
        Answer(302, {"Location": receiver.url}),
    ]
    with delivering(settings):
        end(work, user, "failed", error="It is silent.", error_code="no_speech")
        requests = receiver.expect(3)
        (row,) = settled(conn)
    assert len({request.id for request in requests}) == 1
    assert requests[0].body == requests[2].body
    data = requests[2].verified(secret)["data"]
    assert (data["error_code"], data["error"]) == ("no_speech", "It is silent.")
    assert (row["status"], row["attempts"], row["error_code"]) == ("delivered", 3, None)
    log = rows(conn, "select * from webhook_attempts order by attempt")
    assert [one["response_status"] for one in log] == [500, 302, 204]
    assert log[0]["response_excerpt"].startswith("Out of order\N{REPLACEMENT CHARACTER}x")
    assert len(log[0]["response_excerpt"]) == 500
    assert "redirects are not followed" in log[1]["error"]


# Who is told of what


def test_endpoints_choose_events_and_a_jobs_own_url_hears_of_all(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser
) -> None:
    some, _ = endpoint(conn, user, "https://example.org/some", events=["job.failed"])
    off, _ = endpoint(conn, user, "https://example.org/off")
    conn.execute("update webhook_endpoints set disabled_at = now() where id = %s", (off,))
    endpoint(conn, make_user(), "https://example.org/other")
    for status in ("succeeded", "failed", "aborted"):
        end(work, user, status)
    assert [(row["endpoint_id"], row["event"]) for row in log(conn)] == [(some, "job.failed")]
    conn.execute("delete from webhook_endpoints")
    conn.execute("select pgscribe.forget_deliveries('1 minute')")
    url = "https://example.org/mine"
    conn.execute(
        "insert into processing_jobs (user_id, file_path, webhook_url) values (%s, %s, %s)",
        (user, f"{user}/talk.mp3", url),
    )
    conn.execute("update processing_jobs set cancel_requested_at = now() where status = 'queued'")
    (row,) = log(conn)
    assert (row["event"], row["url"], row["endpoint_id"]) == ("job.cancelled", url, None)


def test_what_is_told_is_small_and_says_what_the_job_says(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    job = end(work, user, "failed", error="It is silent.", error_code="no_speech")
    (row,) = log(conn)
    (found,) = rows(conn, "select * from processing_jobs")
    data = row["payload"].pop("data")
    assert row["payload"]["type"] == "job.failed"
    times = [row["payload"]["timestamp"], data.pop("completed_at"), data.pop("created_at")]
    wanted = [found["completed_at"], found["completed_at"], found["created_at"]]
    assert [datetime.fromisoformat(time) for time in times] == wanted
    assert data == {
        "id": str(job), "status": "failed", "file_path": f"{user}/talk.mp3", "attempt": 1,
        "error_code": "no_speech", "error": "It is silent.",
    }  # fmt: skip


def test_a_batch_of_ends_tells_of_each_and_an_end_that_is_undone_of_none(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    jobs = work.insert_many(user, 3)
    work.start(*jobs)
    with conn.transaction(force_rollback=True):
        conn.execute("update procrastinate.procrastinate_jobs set status = 'failed'")
        assert len(log(conn)) == 3
    queued = "select * from procrastinate.procrastinate_jobs where queue_name = 'webhooks'"
    assert (log(conn), rows(conn, queued)) == ([], [])
    work.complete(*jobs)
    told = log(conn)
    assert {row["job_id"] for row in told} == set(jobs)
    assert {row["queue_job_id"] for row in told} == {row["id"] for row in rows(conn, queued)}


def test_each_end_of_a_job_is_told_of_and_outlives_the_job(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    job = end(work, user, "failed")
    conn.execute("select retry_processing_job(%s)", (job,))
    work.start(job)
    work.complete(job)
    conn.execute("delete from processing_jobs")
    told = log(conn)
    assert [(row["event"], row["job_id"]) for row in told] == [
        ("job.failed", None),
        ("job.completed", None),
    ]
    assert [row["payload"]["data"]["id"] for row in told] == [str(job)] * 2


# What an owner may do, in SQL


@contextmanager
def acting(
    conn: psycopg.Connection, user: UUID, role: str = "authenticated", *, keep: bool = False
) -> Iterator[None]:
    """Be a user of the API; what is done is undone unless it is to be kept."""
    with conn.transaction(force_rollback=not keep):
        claims = json.dumps({"sub": str(user), "role": role})
        conn.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
        conn.execute(f"set local role {role}".encode())
        yield


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"url": "ftp://example.org"}, "url"),
        ({"url": "https://user@example.org"}, "url"),
        ({"url": "x"}, "url"),
        ({"events": []}, "events"),
        ({"events": ["job.lost"]}, "events"),
        ({"events": ["job.failed", None]}, "events"),
        ({"description": "x" * 201}, "description"),
    ],
)
def test_an_endpoint_that_is_no_good_is_refused_and_says_why(
    conn: psycopg.Connection, user: UUID, values: dict[str, object], field: str
) -> None:
    sent = {"user_id": user, "url": "https://example.org"} | values
    columns, places = ", ".join(sent), ", ".join(f"%({name})s" for name in sent)
    with pytest.raises(psycopg.errors.CheckViolation) as caught:
        conn.execute(f"insert into webhook_endpoints ({columns}) values ({places})", sent)
    assert caught.value.diag.column_name == field
    assert caught.value.diag.message_hint


def test_there_are_ten_endpoints_at_most(conn: psycopg.Connection, user: UUID) -> None:
    for number in range(10):
        endpoint(conn, user, f"https://example.org/{number}")
    with pytest.raises(psycopg.errors.CheckViolation, match="the limit is 10"):
        endpoint(conn, user, "https://example.org/10")


def test_only_owners_see_and_change_endpoints_and_nobody_writes_deliveries(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser
) -> None:
    mine, _ = endpoint(conn, user, "https://example.org")
    end(work, user)
    stranger = make_user()
    with acting(conn, stranger):
        for table in ("webhook_endpoints", "webhook_deliveries", "webhook_attempts"):
            assert rows(conn, f"select * from {table}") == []
        assert conn.execute("update webhook_endpoints set url = 'https://evil.test'").rowcount == 0
        assert conn.execute("delete from webhook_endpoints").rowcount == 0
        for query in ("replay_webhook_delivery", "send_test_webhook"):
            (row,) = rows(conn, f"select (x).id from {query}(%s) x", log_id(work))
            assert row["id"] is None
    for refused in (
        "select rotate_webhook_secret(%(mine)s)",
        "insert into webhook_endpoints (user_id, url) values (%(user)s, 'https://evil.test')",
        "select * from pgscribe.webhook_secrets",
        "update webhook_deliveries set status = 'delivered'",
        "delete from webhook_deliveries",
        "insert into webhook_attempts (delivery_id, attempt) values (gen_random_uuid(), 1)",
    ):
        with acting(conn, stranger), pytest.raises(psycopg.Error) as caught:
            conn.execute(refused.encode(), {"mine": mine, "user": user})
        assert caught.value.sqlstate in {"42501", "23514"}, refused
    with acting(conn, user, "anon"), pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select * from webhook_endpoints")
    with acting(conn, user):
        assert len(rows(conn, "select * from webhook_deliveries")) == 1
        assert rows(conn, "select rotate_webhook_secret(%s) as secret", mine)
        conn.execute("update webhook_endpoints set disabled_at = '2000-01-01'")
        (row,) = rows(conn, "select * from webhook_endpoints")
        assert row["disabled_reason"] == "owner"
        assert row["disabled_at"] > datetime.now(UTC) - timedelta(minutes=1)


def log_id(work: Work) -> UUID:
    ((found,),) = work.execute("select id from webhook_deliveries limit 1")
    assert isinstance(found, UUID)
    return found


def test_the_status_follows_the_queue_job_and_is_written_by_nobody(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    end(work, user)
    for marker in ("''", "'on'"):  # which the mirror sets while it writes
        conn.execute(f"set pgscribe.mirroring = {marker}".encode())
        with pytest.raises(psycopg.errors.CheckViolation, match="follows the queue job"):
            conn.execute("update webhook_deliveries set status = 'delivered'")
    conn.execute("reset pgscribe.mirroring")
    queue = "update procrastinate.procrastinate_jobs set status = %s where queue_name = 'webhooks'"
    shown_as = [("doing", "sending"), ("todo", "queued"), ("doing", "sending")]
    shown_as += [("succeeded", "delivered"), ("todo", "queued"), ("failed", "failed")]
    for status, shown in shown_as:
        conn.execute(queue.encode(), (status,))
        (row,) = log(conn)
        assert row["status"] == shown
        assert (row["completed_at"] is None) == (shown in {"queued", "sending"})
    conn.execute(queue.encode(), ("todo",))
    conn.execute("delete from procrastinate.procrastinate_jobs where queue_name = 'webhooks'")
    (row,) = log(conn)
    assert (row["status"], row["error_code"]) == ("failed", "queue_job_deleted")
    # Where there is none any more, sending it again makes another one.
    conn.execute("select replay_webhook_delivery(%s)", (row["id"],))
    (row,) = log(conn)
    assert (row["status"], row["completed_at"]) == ("queued", None)


def test_with_an_endpoint_go_its_log_and_what_waits(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    end(work, user)
    conn.execute("delete from webhook_endpoints")
    conn.execute("select pgscribe.forget_deliveries('1 minute')")
    assert log(conn) == []
    queued = "select * from procrastinate.procrastinate_jobs where queue_name = 'webhooks'"
    assert rows(conn, queued) == []


# Claims


def claim(conn: psycopg.Connection, wanted: int) -> list[Row]:
    (row,) = rows(conn, "select * from pgscribe.claim_deliveries(null, %s)", wanted)
    return list(row["jobs"])


def test_owners_take_turns_and_none_has_more_than_five_at_a_time(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser
) -> None:
    work.allow_many_jobs()
    many, few = user, make_user()
    for owner, count in ((many, 50), (few, 2)):
        endpoint(conn, owner, "https://example.org")
        jobs = work.insert_many(owner, count)
        work.start(*jobs)
        work.complete(*jobs)
    assert len(claim(conn, 4)) == 4
    sending = (
        "select user_id, count(*) as n from webhook_deliveries where status = 'sending' group by 1"
    )
    assert {row["user_id"]: row["n"] for row in rows(conn, sending)} == {many: 2, few: 2}
    assert len(claim(conn, 10)) == 3
    assert claim(conn, 10) == []
    conn.execute("select pause_queue('webhooks')")
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'succeeded' where status = 'doing'"
    )
    assert claim(conn, 10) == []
    conn.execute("select resume_queue('webhooks')")
    assert len(claim(conn, 10)) == 5


def test_what_waits_is_claimed_once_it_is_due(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    end(work, user)
    queue = "update procrastinate.procrastinate_jobs set {} where queue_name = 'webhooks'"
    conn.execute(queue.format("status = 'doing'").encode())
    conn.execute(queue.format("status = 'todo', scheduled_at = now() + interval '1 hour'").encode())
    (row,) = rows(
        conn, "select jobs, next_due - now() as pause from pgscribe.claim_deliveries(null, 5)"
    )
    assert row["jobs"] == []
    assert timedelta(minutes=59) < row["pause"] < timedelta(minutes=61)
    conn.execute("update webhook_deliveries set due_at = now() - interval '1 second'")
    assert len(claim(conn, 5)) == 1


def test_what_is_old_is_deleted_with_its_queue_job(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    endpoint(conn, user, "https://example.org")
    end(work, user)
    end(work, user)
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'succeeded' where id ="
        " (select min(id) from procrastinate.procrastinate_jobs where queue_name = 'webhooks')"
    )
    conn.execute("update webhook_deliveries set completed_at = now() - interval '31 days'"
                 " where completed_at is not null")  # fmt: skip
    prune = "select pgscribe.prune_deliveries('30 days', 100) as n"
    assert rows(conn, prune) == [{"n": 1}]
    assert [row["status"] for row in log(conn)] == ["queued"]
    queued = "select * from procrastinate.procrastinate_jobs where queue_name = 'webhooks'"
    assert len(rows(conn, queued)) == 1


# What becomes of requests


def sent(conn: psycopg.Connection) -> list[Row]:
    """Return the requests that were made, in order."""
    return rows(conn, "select * from webhook_attempts order by started_at")


def wait_for_attempts(conn: psycopg.Connection, count: int) -> list[Row]:
    until(lambda: len(sent(conn)) >= count, "the requests were made")
    return sent(conn)


def test_what_a_receiver_asks_for_is_waited_for(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint(conn, user, receiver.url)
    receiver.default = Answer(503, {"Retry-After": "7200"})
    with delivering(settings):
        end(work, user)
        wait_for_attempts(conn, 1)
        until(lambda: log(conn)[0]["due_at"], "it waits")
    (row,) = log(conn)
    assert timedelta(hours=1.9) < row["due_at"] - datetime.now(UTC) <= timedelta(hours=2)
    assert (row["status"], row["error_code"], row["response_status"]) == (
        "queued", "webhook_failed", 503,
    )  # fmt: skip


def test_who_is_gone_is_told_of_nothing_any_more(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint_id, _ = endpoint(conn, user, receiver.url)
    receiver.answers = [Answer(410)]
    with delivering(settings):
        end(work, user)
        (row,) = settled(conn)
        assert (row["status"], row["error_code"], row["attempts"]) == ("failed", "webhook_gone", 1)
        (found,) = rows(conn, "select * from webhook_endpoints")
        assert found["disabled_reason"] == "gone"
        end(work, user)
        assert len(log(conn)) == 1
        with pytest.raises(psycopg.errors.CheckViolation, match="is disabled"):
            conn.execute("select replay_webhook_delivery(%s)", (row["id"],))
        # Its owner has put that right.
        conn.execute("update webhook_endpoints set disabled_at = null")
        conn.execute("select replay_webhook_delivery(%s)", (row["id"],))
        until(lambda: log(conn)[0]["status"] == "delivered", "it is delivered after all")
    assert [request.id for request in receiver.requests] == [str(row["id"])] * 2
    (found,) = rows(conn, "select * from webhook_endpoints where id = %s", endpoint_id)
    assert found["disabled_reason"] is None


def test_what_waits_for_an_endpoint_that_is_disabled_is_not_sent(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint(conn, user, receiver.url)
    end(work, user)
    conn.execute("update webhook_endpoints set disabled_at = now()")
    with delivering(settings):
        (row,) = settled(conn)
    assert (row["status"], row["error_code"]) == ("failed", "endpoint_disabled")
    assert receiver.requests == []


@pytest.mark.usefixtures("_at_once")
def test_after_the_last_attempt_it_has_failed_and_after_days_the_endpoint_is_disabled(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint(conn, user, receiver.url)
    receiver.default = Answer(500)
    with delivering(settings):
        end(work, user)
        (first,) = settled(conn)
        assert (first["status"], first["attempts"]) == ("failed", 4)
    assert rows(conn, "select disabled_at from webhook_endpoints") == [{"disabled_at": None}]
    end(work, user)
    conn.execute(
        "update webhook_deliveries set created_at = now() - interval '3 days'"
        " where status = 'queued'"
    )
    with delivering(settings):
        settled(conn, 2)
    (found,) = rows(conn, "select * from webhook_endpoints")
    assert found["disabled_reason"] == "failing"


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Send a body without end."""
    handler.send_response(500)
    handler.end_headers()
    with_patience = 200
    for _ in range(with_patience):
        handler.wfile.write(b"no " * 100_000)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Say nothing."""
    handler.close_connection = True


@pytest.mark.usefixtures("_at_once")
def test_receivers_that_are_slow_or_talk_without_end_or_hang_up(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(deliveries, "TIMEOUT", 1.5)
    endpoint(conn, user, receiver.url)
    receiver.answers = [Answer(delay=3), drip, hang_up]
    with delivering(settings):
        end(work, user)
        (row,) = settled(conn)
    attempts = sent(conn)
    assert [one["response_status"] for one in attempts] == [None, 500, None, 204]
    assert "within 1.5 s" in attempts[0]["error"]
    assert attempts[1]["response_excerpt"].startswith("no no no")
    assert "broke the connection" in attempts[2]["error"]
    assert row["status"] == "delivered"


def test_only_the_public_internet_is_called_unless_networks_are_named(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint(conn, user, receiver.url)
    endpoint(conn, user, "http://127.0.0.1/")
    endpoint(conn, user, "http://169.254.169.254/latest/meta-data")
    with delivering(settings.model_copy(update={"webhook_networks": ()})):
        end(work, user)
        told = settled(conn, 3)
    assert {(row["status"], row["error_code"]) for row in told} == {("failed", "url_refused")}
    assert all("127.0" not in row["error"] and "169" not in row["error"] for row in told)
    assert receiver.requests == []


def test_two_secrets_sign_for_a_while(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint_id, old = endpoint(conn, user, receiver.url)
    (row,) = rows(conn, "select rotate_webhook_secret(%s) as secret", endpoint_id)
    with delivering(settings):
        end(work, user)
        (request,) = receiver.expect(1)
        assert request.verified(old) == request.verified(row["secret"])
        (newest,) = rows(conn, "select rotate_webhook_secret(%s, '0') as secret", endpoint_id)
        end(work, user)
        last = receiver.expect(2)[1]
    last.verified(newest["secret"])
    for gone in (old, row["secret"]):
        with pytest.raises(WebhookVerificationError):
            last.verified(gone)


def test_a_jobs_own_url_is_signed_with_its_owners_secret(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, user: UUID
) -> None:
    with acting(conn, user, keep=True):
        ((secret,),) = conn.execute("select rotate_webhook_secret()").fetchall()
    with delivering(settings):
        conn.execute(
            "insert into processing_jobs (user_id, file_path, webhook_url) values (%s, %s, %s)",
            (user, f"{user}/talk.mp3", receiver.url),
        )
        conn.execute("update processing_jobs set cancel_requested_at = now()")
        (request,) = receiver.expect(1)
    assert request.verified(secret)["type"] == "job.cancelled"


def test_a_test_is_sent_and_no_more_than_ten_in_a_minute(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, user: UUID
) -> None:
    endpoint_id, secret = endpoint(conn, user, receiver.url)
    with delivering(settings):
        conn.execute("select send_test_webhook(%s)", (endpoint_id,))
        (request,) = receiver.expect(1)
    assert request.verified(secret)["data"] == {"endpoint_id": str(endpoint_id)}
    for _ in range(9):
        conn.execute("select send_test_webhook(%s)", (endpoint_id,))
    with pytest.raises(psycopg.ProgrammingError, match="the limit") as caught:
        conn.execute("select send_test_webhook(%s)", (endpoint_id,))
    assert caught.value.sqlstate == "PT429"


def test_many_are_sent_again_at_once(
    conn: psycopg.Connection, settings: Settings, receiver: Receiver, work: Work, user: UUID
) -> None:
    endpoint(conn, user, receiver.url)
    with delivering(settings):
        with work.at_once():
            jobs = work.insert_many(user, 12)
            work.start(*jobs)
            work.complete(*jobs)
        settled(conn, 12)
        with acting(conn, user, keep=True):
            query = "select replay_webhook_deliveries(now() - interval '1 hour', status => %s)"
            assert conn.execute(query, ("failed",)).fetchone() == (0,)
            assert conn.execute(query, ("delivered",)).fetchone() == (12,)
        receiver.expect(24)
    ids = [request.id for request in receiver.requests]
    assert sorted(ids[:12]) == sorted(ids[12:])
