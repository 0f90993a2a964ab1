"""Streams of events while Postgres restarts, the network fails, and a pooler swallows LISTEN."""

import logging
import signal
from collections.abc import Iterator
from uuid import UUID

import pytest

from db.embedded import EmbeddedPostgres
from jobs.settings import Settings
from tests.faults.fleet import restart_postgres
from tests.faults.proxy import Proxy
from tests.streams import Site, Work, until


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    with Work(database) as driver:
        yield driver


@pytest.fixture
def behind(settings: Settings, database: str, proxy: Proxy) -> Settings:
    return settings.model_copy(
        update={"database_url": Settings.load(database_url=proxy.url(database)).database_url}
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
def test_streams_stay_open_over_a_restart_of_postgres(
    postgres: EmbeddedPostgres, settings: Settings, work: Work, user: UUID, how: signal.Signals
) -> None:
    job, other = work.insert(user), work.insert(user)
    with (
        Site(settings) as site,
        site.open("/jobs/events", user) as all_jobs,
        site.open(f"/jobs/{job}/events", user) as one,
    ):
        all_jobs.expect("snapshot")
        one.expect("job", status="queued")
        restart_postgres(postgres, how)
        work.close()
        work.start(job, other)
        work.complete(job)
        all_jobs.until("job", id=str(job), status="completed")
        one.until("job", status="completed")
        one.expect("end", reason="job_ended")
        work.complete(other)
        all_jobs.until("job", id=str(other), status="completed")


def test_a_stream_that_begins_while_postgres_is_away_is_refused(
    postgres: EmbeddedPostgres, settings: Settings, user: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.events.OPENING", 1.0)
    with Site(settings) as site:
        postgres.stop()
        refused = site.get("/jobs/events", user)
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert site.hub.streams == 0
        postgres.start()
        monkeypatch.undo()  # a busy machine may take longer to look
        with site.open("/jobs/events", user) as stream:
            stream.expect("snapshot")


def test_without_notifications_streams_look_every_few_seconds(
    proxy: Proxy,
    behind: Settings,
    work: Work,
    user: UUID,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("web.events.BEAT", 3.0)
    monkeypatch.setattr("web.events.RELOOK", 1000.0)
    proxy.drops_notifications = True
    jobs = [work.insert(user) for _ in range(4)]
    with Site(behind) as site, site.open("/jobs/events", user) as stream:
        stream.expect("snapshot")
        for job in jobs:
            quick = work.insert(user)
            work.start(job, quick)
            work.complete(quick)
            stream.until("job", id=str(job), status="processing")
            stream.until("job", id=str(quick), status="completed")
            work.delete(job)
            stream.until("deleted", id=str(job))
    told = [r for r in caplog.records if "Notifications do not arrive" in r.message]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING


@pytest.mark.parametrize("fault", ["cut", "swallow", "hold"])
def test_a_connection_that_fails_in_silence_is_replaced(
    proxy: Proxy,
    behind: Settings,
    work: Work,
    user: UUID,
    fault: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("web.events.BEAT", 2.0)
    job = work.insert(user)
    with Site(behind) as site, site.open(f"/jobs/{job}/events", user) as stream:
        stream.expect("job", status="queued")
        site.hub._connection.call_timeout = 1.0  # noqa: SLF001 - 10 s would do as well
        getattr(proxy, fault)()
        work.start(job)
        until(lambda: "does not answer streams" in caplog.text or fault == "cut", "it is given up")
        proxy.heal()
        stream.expect("job", status="processing")
        work.complete(job)
        stream.expect("job", status="completed")
        stream.expect("end", reason="job_ended")
