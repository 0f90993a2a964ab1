"""Streams of events over real sockets, from a real server on a real database."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import takewhile
from uuid import UUID, uuid4

import psycopg
import pytest

from jobs.settings import Settings
from tests.conftest import MakeUser
from tests.streams import Event, Site, Stream, Work, until
from web import events, sse


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    with Work(database) as driver:
        yield driver


@pytest.fixture
def site(settings: Settings) -> Iterator[Site]:
    with Site(settings) as server:
        yield server


def test_a_jobs_stream_has_status_progress_and_text_in_order_and_ends_with_the_job(
    site: Site, work: Work, user: UUID
) -> None:
    job = work.insert(user)
    with site.open(f"/jobs/{job}/events", user) as stream:
        assert stream.response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.response.headers["cache-control"] == "no-store"
        first = stream.expect("job", id=str(job), status="queued", progress=0, attempt=0)
        assert set(first.data) == {
            "id", "file_path", "status", "progress", "attempt", "audio_seconds", "note",
            "error_code", "error", "created_at", "updated_at", "started_at", "completed_at",
            "due_at", "cancel_requested_at",
        }  # fmt: skip
        work.start(job)
        stream.expect("job", status="processing", attempt=1)
        work.plan(job, 3)
        work.progress(job, 0.25)
        stream.expect("job", progress=0.25)
        work.store(job, 1, "second")  # can't be read before the first
        work.store(job, 0, "First")
        stream.expect("partial", ready=2, chunks=3, offset=0, text="First second")
        work.note(job, "almost\u2028there")
        stream.expect("job", note="almost\u2028there")
        work.store(job, 2, "third.")
        stream.expect("partial", ready=3, offset=12, text=" third.")
        work.complete(job)
        stream.expect("job", status="completed", progress=1)
        stream.expect("end", reason="job_ended")
        stream.expect_end()


def test_all_jobs_begin_with_a_snapshot_of_the_active_ones(
    site: Site, work: Work, user: UUID
) -> None:
    over, running, waiting = (work.insert(user, name) for name in ("over", "running", "waiting"))
    work.start(over, running)
    work.complete(over)
    with site.open("/jobs/events", user) as stream:
        snapshot = stream.expect("snapshot", gap=False)
        assert [job["id"] for job in snapshot.data["jobs"]] == [str(running), str(waiting)]
        new = work.insert(user)
        stream.expect("job", id=str(new), status="queued")
        work.complete(running)
        stream.expect("job", id=str(running), status="completed")
        work.delete(waiting)
        stream.expect("deleted", id=str(waiting))
        work.delete(over)
        stream.expect("deleted", id=str(over))


def test_a_failure_comes_with_its_reason(site: Site, work: Work, user: UUID) -> None:
    job = work.insert(user)
    work.start(job)
    with site.open(f"/jobs/{job}/events", user) as stream:
        stream.expect("job", status="processing")
        work.execute(
            "update processing_jobs set error_code = 'no_speech', error = %s where id = %s",
            ("two\nlines", job),
        )
        work.set_queue_status("failed", job)
        event = stream.until("job", status="failed")
        assert (event.data["error_code"], event.data["error"]) == ("no_speech", "two\nlines")
        stream.expect("end", reason="job_ended")


def test_a_deleted_job_ends_its_stream(site: Site, work: Work, user: UUID) -> None:
    job = work.insert(user)
    with site.open(f"/jobs/{job}/events", user) as stream:
        stream.expect("job", status="queued")
        work.delete(job)
        stream.expect("deleted", id=str(job))
        stream.expect("end", reason="job_deleted")
        stream.expect_end()


def test_strangers_learn_nothing(site: Site, work: Work, user: UUID, make_user: MakeUser) -> None:
    stranger = make_user()
    job = work.insert(user)
    for path in (f"/jobs/{job}/events", f"/jobs/{uuid4()}/events", "/jobs/none/events"):
        response = site.get(path, stranger)
        assert (response.status_code, response.json()["code"]) == (404, "job_not_found")
    with site.open("/jobs/events", stranger) as theirs, site.open("/jobs/events", user) as own:
        theirs.expect("snapshot", jobs=[])
        own.next()
        work.start(job)
        own.expect("job", id=str(job), status="processing")
        mine = work.insert(stranger)
        theirs.expect("job", id=str(mine))


@pytest.mark.parametrize("role", ["authenticated", "anon"])
def test_a_forged_notification_shows_nobody_anything(
    site: Site, work: Work, user: UUID, make_user: MakeUser, role: str
) -> None:
    stranger = make_user()
    job, own = work.insert(user), work.insert(stranger)
    forged = [
        json.dumps({"owner": str(stranger), "jobs": [str(job), str(uuid4())], "status": "failed"}),
        json.dumps({"owner": str(stranger), "jobs": None}),
        json.dumps({"owner": str(stranger), "jobs": [None]}),
        json.dumps({"owner": str(stranger), "jobs": {}}),
        json.dumps({"owner": 1, "jobs": ["x"]}),
        json.dumps([str(stranger)]),
        "nonsense",
        "",
        "[" * 3000,
    ]
    with site.open("/jobs/events", stranger) as stream:
        stream.expect("snapshot")
        with psycopg.connect(work.url, autocommit=True) as attacker:
            attacker.execute(f"set role {role}".encode())
            for payload in forged:
                for channel in events.CHANNELS:
                    attacker.execute("select pg_notify(%s, %s)", (channel, payload))
        # A notification that says nothing but whose jobs changed has the stream begin anew.
        again = stream.expect("snapshot", gap=True)
        assert [found["id"] for found in again.data["jobs"]] == [str(own)]
        work.start(own)
        stream.expect("job", id=str(own), status="processing")


def test_without_a_token_there_is_no_stream(site: Site, user: UUID) -> None:
    expired = site.headers(user, lifetime=-10)
    for headers in ({}, expired, {"Authorization": "Bearer x"}):
        for path in ("/jobs/events", f"/jobs/{uuid4()}/events", "/jobs/none/events"):
            response = site.client.get(path, headers=headers)
            assert response.status_code == 401, path


def test_a_head_request_gets_headers_only(site: Site, user: UUID) -> None:
    response = site.client.head("/jobs/events", headers=site.headers(user))
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/event-stream")


def test_who_comes_back_is_told_what_ended_meanwhile(site: Site, work: Work, user: UUID) -> None:
    ended, deleted, running = (work.insert(user) for _ in range(3))
    with site.open("/jobs/events", user) as stream:
        stream.expect("snapshot")
        work.start(running)
        stream.expect("job", status="processing")
        last_id = stream.last_id
    until(lambda: site.hub.streams == 0, "the server has noticed")
    work.start(ended)
    work.complete(ended)
    work.delete(deleted)
    with site.open("/jobs/events", user, last_id=last_id) as stream:
        snapshot = stream.expect("snapshot", gap=False)
        assert [job["id"] for job in snapshot.data["jobs"]] == [str(running)]
        stream.expect("job", id=str(ended), status="completed")
        work.complete(running)
        stream.expect("job", id=str(running), status="completed")


def test_who_comes_back_too_late_is_told_that_there_is_a_gap(
    site: Site, work: Work, user: UUID
) -> None:
    work.insert(user)
    with site.open("/jobs/events", user) as stream:
        now = int(stream.expect("snapshot", gap=False).id or 0)
    day = 86_400_000_000
    with site.open("/jobs/events", user, last_id=str(now - day)) as stream:
        stream.expect("snapshot", gap=True)


@pytest.mark.parametrize("last_id", ["nonsense", "-1", "9" * 18, "1 or 1=1", "99999999999999999"])
def test_an_unusable_last_event_id_does_no_harm(
    site: Site, work: Work, user: UUID, last_id: str
) -> None:
    job = work.insert(user)
    with site.open("/jobs/events", user, last_id=last_id) as stream:
        stream.expect("snapshot")
        work.start(job)
        stream.expect("job", status="processing")


def test_who_comes_back_for_a_job_that_has_ended_is_sent_away_only_if_they_know(
    site: Site, work: Work, user: UUID
) -> None:
    job = work.insert(user)
    work.start(job)
    with site.open(f"/jobs/{job}/events", user) as stream:
        last_id = stream.expect("job", status="processing").id or ""
    work.complete(job)
    with site.open(f"/jobs/{job}/events", user, last_id=last_id) as stream:
        stream.expect("job", status="completed")
        knows = stream.expect("end", reason="job_ended").id or ""
    headers = site.headers(user) | {"Last-Event-ID": knows}
    assert site.client.get(f"/jobs/{job}/events", headers=headers).status_code == 204
    work.set_queue_status("failed", job)
    other = work.insert(user)
    with site.open(f"/jobs/{other}/events", user, last_id=knows) as stream:
        stream.expect("job", status="queued")


def test_text_that_is_replaced_begins_anew(site: Site, work: Work, user: UUID) -> None:
    job = work.insert(user)
    work.start(job)
    work.plan(job, 2)
    with site.open(f"/jobs/{job}/events", user) as stream:
        stream.expect("job", status="processing")
        work.store(job, 0, "猫", "ja")
        stream.until("partial", ready=1, offset=0, text="猫")
        with site.open(f"/jobs/{job}/events", user) as late:
            late.expect("partial", ready=1, offset=0, text="猫")
        work.store(job, 1, "犬", "ja")
        stream.until("partial", ready=2, offset=1, text="犬")
        work.execute("delete from processing_job_chunks where job_id = %s", (job,))
        work.plan(job, 3)
        work.store(job, 0, "cat")
        work.store(job, 1, "dog")
        stream.until("partial", ready=2, chunks=3, offset=0, text="cat dog")


def test_streams_are_limited_for_each_user_and_in_all(
    settings: Settings, user: UUID, make_user: MakeUser
) -> None:
    limits = {"max_streams_per_user": 2, "max_streams": 3}
    with Site(settings.model_copy(update=limits)) as site, ExitStack() as stack:
        others = [make_user() for _ in range(2)]
        streams = [stack.enter_context(site.open("/jobs/events", user)) for _ in range(2)]
        for stream in streams:
            stream.expect("snapshot")
        refused = site.get("/jobs/events", user)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert "limit" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        with site.open("/jobs/events", others[0]) as other:
            other.expect("snapshot")
            refused = site.get("/jobs/events", others[1])
            assert (refused.status_code, refused.json()["code"]) == (503, "server_busy")
            assert int(refused.headers["retry-after"]) > 0
        until(lambda: site.hub.streams == 2, "the server has noticed")
        with site.open("/jobs/events", others[1]) as other:
            other.expect("snapshot")


def test_a_stream_ends_with_its_token(site: Site, user: UUID) -> None:
    with site.open("/jobs/events", user, lifetime=3) as stream:
        stream.expect("snapshot")
        stream.expect("end", reason="token_expired")
        stream.expect_end()


def test_a_silent_stream_says_that_it_is_alive(
    site: Site, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT", 0.1)
    with site.open("/jobs/events", user) as stream:
        stream.expect("snapshot")
        assert stream.raw_line() == ":"


def test_streams_end_when_the_server_stops(settings: Settings, work: Work, user: UUID) -> None:
    job = work.insert(user)
    with Site(settings) as site, ExitStack() as stack:
        streams: list[Stream] = [
            stack.enter_context(site.open(path, user))
            for path in ("/jobs/events", f"/jobs/{job}/events")
        ]
        for stream in streams:
            stream.next()
        before = time.monotonic()
        site.stop()
        took = time.monotonic() - before
        for stream in streams:
            stream.expect_end()
    assert took < 14, "uvicorn waits for 15 s where streams go on"
    assert work.execute("select from pgscribe.event_hubs") == []


def slow_client(site: Site, user: UUID) -> socket.socket:
    """Return a connection that asks for a stream and does not read it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", site.port))
    token = site.headers(user)["Authorization"]
    request = f"GET /jobs/events HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n\r\n"
    connection.sendall(request.encode())
    return connection


def test_a_client_that_does_not_read_holds_nobody_up_and_is_given_up(
    site: Site, work: Work, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PATIENCE", 1.0)
    work.allow_many_jobs()
    with slow_client(site, user), site.open("/jobs/events", user) as stream:
        stream.expect("snapshot")
        until(lambda: site.hub.streams == 2, "both are there")
        job = work.insert(user)
        work.start(job)
        number = 0
        while site.hub.streams == 2:  # until what it has not read fills all buffers
            number += 1
            work.insert_many(user, 500)
            work.note(job, f"note {number}")
            stream.until("job", id=str(job), note=f"note {number}")
            assert number < 200
        work.complete(job)
        stream.until("job", id=str(job), status="completed")


def test_who_falls_behind_gets_the_latest_of_each_job_and_a_snapshot_of_very_many(
    site: Site, work: Work, user: UUID
) -> None:
    with site.open("/jobs/events", user) as stream:
        stream.expect("snapshot", jobs=[])
        jobs = work.insert_many(user, 5000)
        work.start(jobs[0])
        snapshot = stream.until("snapshot", gap=True)
        assert len(snapshot.data["jobs"]) == events.MAX_SNAPSHOT
        stream.until("job", id=str(jobs[0]), status="processing")
        work.complete(jobs[0])
        stream.until("job", id=str(jobs[0]), status="completed")


def test_one_statement_that_changes_many_jobs_sends_few_notifications(
    work: Work, user: UUID, make_user: MakeUser, conn: psycopg.Connection
) -> None:
    other = make_user()
    hub = uuid4()
    conn.execute("listen pgscribe_events")
    work.insert_many(user, 10)
    work.execute("select pgscribe.watch(%s, %s, true, null)", (hub, [user]))
    ids = work.insert_many(user, 400)
    work.insert_many(other, 10)
    work.insert_many(user, 601)
    work.execute("select pgscribe.unwatch(%s)", (hub,))
    work.start(*ids)
    work.execute("notify pgscribe_events, 'the last one'")
    heard = (notification.payload for notification in conn.notifies(timeout=20))
    payloads = [json.loads(payload) for payload in takewhile("the last one".__ne__, heard)]
    assert {payload["owner"] for payload in payloads} == {str(user)}
    assert payloads[-1]["jobs"] is None
    assert sorted(len(payload["jobs"]) for payload in payloads[:-1]) == [100, 150, 150]
    told = [job for payload in payloads[:-1] for job in payload["jobs"]]
    assert sorted(told) == sorted(map(str, ids))


def test_a_web_server_that_is_gone_is_forgotten(work: Work, user: UUID) -> None:
    gone, alive = uuid4(), uuid4()
    work.execute("select pgscribe.watch(%s, %s, true, null)", (gone, [user]))
    work.execute("update pgscribe.event_hubs set seen_at = now() - interval '2 minutes'")
    work.execute("select pgscribe.watch(%s, '{}', true, null)", (alive,))
    assert work.execute("select id from pgscribe.event_hubs") == [(alive,)]
    assert work.execute("select from pgscribe.watched_owners") == []


def terminate(work: Work) -> None:
    """Break off the one connection of all streams; the one before may be about to end."""
    open_ones = (
        "from pg_stat_activity"
        " where application_name = 'pgscribe events' and datname = current_database()"
    )
    until(lambda: work.execute(f"select count(*) {open_ones}") == [(1,)], "one for all streams")
    work.execute(f"select pg_terminate_backend(pid) {open_ones}")


def test_the_end_of_the_connection_loses_nothing(site: Site, work: Work, user: UUID) -> None:
    job, doomed = work.insert(user), work.insert(user)
    with (
        site.open("/jobs/events", user) as all_jobs,
        site.open(f"/jobs/{job}/events", user) as one,
    ):
        all_jobs.expect("snapshot")
        one.expect("job", status="queued")
        for number in range(1, 4):
            terminate(work)
            work.progress(job, number / 10) if number > 1 else work.start(job)
            all_jobs.expect("job", id=str(job), status="processing")
            one.expect("job", status="processing")
        terminate(work)
        with work.at_once():  # or it may be seen on its way
            quick = work.insert(user)
            work.start(quick)
            work.complete(quick, job)
            work.delete(doomed)
        seen: list[Event] = [all_jobs.next() or Event("end", {}, None) for _ in range(3)]
        assert {(event.name, event.data["id"]) for event in seen} == {
            ("job", str(job)),
            ("job", str(quick)),
            ("deleted", str(doomed)),
        }
        one.expect("job", status="completed")
        one.expect("end", reason="job_ended")


def test_what_nobody_was_told_of_is_seen_all_the_same(
    site: Site, work: Work, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction that began before its owner was watched commits after the first look."""
    monkeypatch.setattr(events, "AGAIN", 0.2)
    job = work.insert(user)
    with psycopg.connect(work.url) as slow:
        slow.execute(
            "update procrastinate.procrastinate_jobs set status = 'doing' where id ="
            " (select job_id::bigint from processing_jobs where id = %s)",
            (job,),
        )
        with site.open(f"/jobs/{job}/events", user) as stream:
            stream.expect("job", status="queued")
            slow.commit()
            stream.expect("job", status="processing")


def test_one_users_broken_policy_breaks_nobody_elses_stream(
    site: Site, work: Work, user: UUID, make_user: MakeUser
) -> None:
    victim = make_user()
    work.execute(
        "create policy odd on processing_jobs as restrictive for select to authenticated"
        f" using (case when auth.uid() = '{victim}' then 1 / (select 0) > 0 else true end)"
    )
    job = work.insert(user)
    work.insert(victim)
    with site.open(f"/jobs/{job}/events", user) as stream:
        stream.expect("job", status="queued")
        with site.client.stream("GET", "/jobs/events", headers=site.headers(victim)) as refused:
            assert refused.status_code == 500
        work.start(job)
        stream.expect("job", status="processing")


def test_policies_decide_what_a_stream_shows(site: Site, work: Work, user: UUID) -> None:
    """Whatever rule a project adds to ours holds for streams as well."""
    secret, open_ = work.insert(user, "secret.mp3"), work.insert(user)
    work.execute(
        "create policy hidden on processing_jobs as restrictive for select to authenticated"
        " using (file_path not like '%%secret%%')"
    )
    assert site.get(f"/jobs/{secret}/events", user).status_code == 404
    with site.open("/jobs/events", user) as stream:
        snapshot = stream.expect("snapshot")
        assert [job["id"] for job in snapshot.data["jobs"]] == [str(open_)]
        work.start(secret)
        work.start(open_)
        stream.expect("job", id=str(open_), status="processing")
