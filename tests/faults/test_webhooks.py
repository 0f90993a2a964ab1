"""Webhooks by workers that die, wait and lose their database: nothing is lost, ids tell repeats."""

import json
import signal
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from uuid import UUID

import psycopg
import pytest

from tests.faults.fleet import SHORT_STALL_TIMEOUT, Database, Fleet, Jobs, until
from tests.receiver import Receiver, receiving

LOG = "select * from webhook_deliveries order by created_at, id"


@pytest.fixture
def receiver(db: Database, user: UUID, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver that hears of the user's jobs."""
    monkeypatch.setenv("PGSCRIBE_WEBHOOK_NETWORKS", "127.0.0.0/8")
    with receiving() as receiver:
        db.rows("insert into webhook_endpoints (user_id, url) values (%s, %s)", user, receiver.url)
        yield receiver


def answer(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(204)
    handler.end_headers()


def delivered(db: Database, count: int = 1) -> None:
    query = "select count(*) from webhook_deliveries where status = 'delivered'"
    until(lambda: db.try_value(query) == count, "all is delivered")


@pytest.mark.parametrize("answered", [False, True], ids=["unanswered", "answered"])
def test_a_worker_that_is_killed_before_it_notes_that_it_has_sent_sends_once_more(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, receiver: Receiver,
    settled: Callable[[], None], *, answered: bool,
) -> None:  # fmt: skip
    first = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)

    def kill(handler: BaseHTTPRequestHandler) -> None:
        first.signal(signal.SIGSTOP)
        if answered:
            answer(handler)
        first.signal(signal.SIGKILL)

    receiver.answers = [kill]
    job = jobs.insert_one(user, "sleep")
    receiver.expect(1)
    first.ended()
    fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
    one, other = receiver.expect(2)
    delivered(db)
    assert (one.id, one.body) == (other.id, other.body)
    assert json.loads(one.body)["data"]["id"] == str(job)
    assert db.value("select count(*) from webhook_attempts") == 1
    settled()
    assert len(receiver.requests) == 2


def test_a_database_that_goes_away_meanwhile_costs_a_repeat_and_no_more(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, receiver: Receiver,
    settled: Callable[[], None],
) -> None:  # fmt: skip
    fleet.start_ready()

    def cut(handler: BaseHTTPRequestHandler) -> None:
        db.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name like 'pgscribe %' and datname = current_database()"
        )
        answer(handler)

    receiver.answers = [cut]
    jobs.insert_one(user, "sleep")
    receiver.expect(1)
    delivered(db)
    settled()
    assert len({request.id for request in receiver.requests}) == 1


def test_nothing_waits_for_transcriptions(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, receiver: Receiver
) -> None:
    """The only worker's only slot is taken for half a minute."""
    fleet.start_ready(concurrency=1)
    long = jobs.insert_one(user, "sleep-30")
    jobs.wait(long, "status = 'processing'")
    other = jobs.insert_one(user, "sleep")
    db.rows("select cancel_processing_job(%s)", other)
    (request,) = receiver.expect(1)
    assert json.loads(request.body)["data"]["id"] == str(other)
    assert jobs.row(long)["status"] == "processing"
    delivered(db)


def test_whoever_is_stopped_gives_back_what_was_not_answered(
    fleet: Fleet, jobs: Jobs, db: Database, user: UUID, receiver: Receiver,
    settled: Callable[[], None],
) -> None:  # fmt: skip
    first = fleet.start_ready(shutdown_timeout=0.5)

    def stop(handler: BaseHTTPRequestHandler) -> None:
        first.signal(signal.SIGTERM)
        first.ended()
        answer(handler)

    receiver.answers = [stop]
    jobs.insert_one(user, "sleep")
    receiver.expect(1)
    assert first.ended() == 0
    assert [row["status"] for row in db.rows(LOG)] == ["queued"]
    fleet.start_ready()
    receiver.expect(2)
    delivered(db)
    settled()


def test_a_row_that_somebody_has_locked_holds_up_nothing_else(
    fleet: Fleet, jobs: Jobs, db: Database, database: str, user: UUID, receiver: Receiver
) -> None:
    fleet.start_ready()
    with psycopg.connect(database) as operator:

        def lock(handler: BaseHTTPRequestHandler) -> None:
            operator.execute(
                "select from procrastinate.procrastinate_jobs"
                " where queue_name = 'webhooks' for update"
            )
            answer(handler)

        receiver.answers = [lock]
        jobs.insert_one(user, "sleep")
        receiver.expect(1)
        jobs.insert_one(user, "sleep")
        delivered(db)
        assert [row["status"] for row in db.rows(LOG)] == ["sending", "delivered"]
        operator.rollback()
        delivered(db, 2)
    assert len(receiver.requests) == 2
