"""What a worker says of itself over HTTP: when it hangs, is out of touch, or drains."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import httpx2
import psycopg
import pytest

from db.embedded import EmbeddedPostgres
from jobs import database, health, metrics, worker
from jobs.compute.base import Outcome, Prepare, Transcribe, Usage
from jobs.errors import CallLost, CallTimeout, ComputeUnavailable, SettingsError
from jobs.models import Transcript
from jobs.settings import Settings
from modal_functions.plan import Plan, Span
from tests import ports
from tests.conftest import cut_off
from tests.faults.fleet import until

pytestmark = pytest.mark.anyio


class Compute:
    """Takes calls once it is ``reachable``; what transcribes returns once it is ``finished``."""

    def __init__(self) -> None:
        self.reachable = True
        self.finished = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def spawn(self, request: Prepare | Transcribe) -> str:
        if not self.reachable:
            raise ComputeUnavailable
        return type(request).__name__

    async def result(self, call_id: str, _: Callable[[float], None]) -> Outcome:
        if call_id == Prepare.__name__:
            return Outcome(Plan("'a.wav'", Path("a.pcm"), (Span(0, 16_000),)).to_dict(), Usage())
        await self.finished.wait()
        return Outcome(Transcript("Well", "en", 1.0, (), "test", "base").to_dict(), Usage())

    async def cancel(self, call_id: str) -> None:
        pass

    async def discard(self, pcm: str) -> None:
        pass


class Watched:
    """A worker in this process, and what it says of itself."""

    def __init__(self, settings: Settings, compute: Compute) -> None:
        self.url = f"http://127.0.0.1:{settings.worker_health_port}"
        self.compute = compute
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(worker.run(settings, self.stop, asyncio.Event()))

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            answer = httpx2.get(f"{self.url}{path}", timeout=5)
        except httpx2.ConnectError:
            return 0, {}
        return answer.status_code, answer.json()

    async def healthy(self) -> tuple[int, dict[str, Any]]:
        return await asyncio.to_thread(self.ask, "/healthz")

    async def until_it_says(self, path: str, status: int, **said: object) -> None:
        def does() -> bool:
            answered, body = self.ask(path)
            return answered == status and body | said == body

        await asyncio.to_thread(until, does, f"{path} says {status} {said}", 20)


@pytest.fixture
def watching(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what runs a worker."""

    @asynccontextmanager
    async def watch(**changes: object) -> AsyncIterator[Watched]:
        compute = Compute()
        monkeypatch.setattr(worker, "make_compute", lambda _: compute)
        with ports.reserved() as port:
            changes = {"worker_health_port": port, "stall_timeout": 5.0, **changes}
            watched = Watched(settings.model_copy(update=changes), compute)
            try:
                await watched.until_it_says("/readyz", 200, reasons=[], wakeups="notify")
                yield watched
            finally:
                watched.stop.set()
                compute.finished.set()
                await watched.task
            assert watched.ask("/healthz") == (0, {}), "it listens no more"

    return watch


@pytest.fixture
def submit(settings: Settings, user: UUID, conn: psycopg.Connection) -> Callable[[], None]:
    def submit() -> None:
        folder = settings.storage_dir / str(user)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.wav").touch()
        conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s)",
            (user, f"{user}/a.wav"),
        )

    return submit


async def test_a_worker_whose_event_loop_hangs_is_found(
    watching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watching() as watched:
        assert await watched.healthy() == (200, {"status": "ok"})
        monkeypatch.setattr(health, "LOOP_PATIENCE", 1.5)
        hangs = (503, {"status": "hangs", "reason": "event_loop"})
        until(lambda: watched.ask("/healthz") == hangs, "it hangs")  # as this call does not await
        assert watched.ask("/readyz")[1]["reasons"] == ["hangs"]
        assert "pgscribe_worker_ready 0.0" in httpx2.get(f"{watched.url}/metrics").text
        await watched.until_it_says("/healthz", 200)


async def test_a_database_that_is_away_makes_a_worker_unready_but_not_ill(
    watching: Callable[..., Any],
    postgres: EmbeddedPostgres,
    settings: Settings,
    conn: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with watching() as watched:
        with cut_off(postgres, settings.database_url.get_secret_value(), conn):
            await watched.until_it_says("/readyz", 503, reasons=["database"], wakeups="poll")
            assert await watched.healthy() == (200, {"status": "ok"})
        await watched.until_it_says("/readyz", 200, reasons=[], wakeups="notify")
        # A round that lasts: longer than between two beats, which is a third of the 5 s.
        monkeypatch.setattr(health, "TURN_PATIENCE", 3.0)
        with conn.transaction():
            conn.execute("lock table procrastinate.procrastinate_workers")
            await watched.until_it_says("/healthz", 503, reason="worker")
        await watched.until_it_says("/healthz", 200)


async def test_a_worker_without_compute_or_one_that_drains_is_not_ready(
    watching: Callable[..., Any], submit: Callable[[], None], conn: psycopg.Connection
) -> None:
    async with watching(shutdown_timeout=60.0) as watched:
        watched.compute.reachable = False
        submit()
        await watched.until_it_says("/readyz", 503, reasons=["compute"])
        watched.compute.reachable = True
        await watched.until_it_says("/readyz", 200)
        assert 'pgscribe_worker_running{kind="transcription"} 1.0' in await asyncio.to_thread(
            lambda: httpx2.get(f"{watched.url}/metrics").text
        )
        watched.stop.set()
        await watched.until_it_says("/readyz", 503, reasons=["draining"])
        assert await watched.healthy() == (200, {"status": "ok"})
    assert conn.execute("select status from processing_jobs").fetchall() == [("completed",)]


async def test_an_attempt_that_finds_its_job_taken_away_counts_as_lost(
    watching: Callable[..., Any], submit: Callable[[], None], conn: psycopg.Connection
) -> None:
    def counted(outcome: str, code: str) -> float:
        labels = {"outcome": outcome, "error_code": code}
        return metrics.REGISTRY.get_sample_value("pgscribe_attempts_total", labels) or 0.0

    async with watching(stall_timeout=60.0) as watched:  # so no beat comes first
        before = counted("lost", "none"), counted("succeeded", "none")
        submit()
        await asyncio.to_thread(
            until, lambda: conn.execute("select from processing_job_chunks").rowcount, "it runs"
        )
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'todo', worker_id = null"
            " where queue_name = 'transcription'"
        )
        watched.compute.finished.set()
        await asyncio.to_thread(
            until,
            lambda: (
                conn.execute(
                    "select from processing_jobs where completed_at > '-infinity'"
                ).rowcount
            ),
            "the next attempt ends",
        )
        # The database has it a moment before the worker, which counts, is told so.
        await asyncio.to_thread(
            until, lambda: counted("succeeded", "none") == before[1] + 1, "the end is counted"
        )
        assert counted("lost", "none") == before[0] + 1
        assert counted("failed", "attempt_lost") == 0
        assert counted("retry", "attempt_lost") == 0


async def test_a_port_that_is_taken_is_named_and_without_one_nobody_listens(
    watching: Callable[..., Any], settings: Settings
) -> None:
    async with watching() as watched:
        port = int(watched.url.rpartition(":")[2])
        taken = settings.model_copy(update={"worker_health_port": port})
        with pytest.raises(SettingsError, match=f"PGSCRIBE_WORKER_HEALTH_PORT.* port {port}"):
            await worker.run(taken, asyncio.Event(), asyncio.Event())
    monitor = health.Monitor(database.make_pool(settings, name="test"))
    async with health.serve(settings, monitor):
        assert "health" not in {thread.name for thread in threading.enumerate()}


async def test_it_says_where_it_listens_in_ipv6_too(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = health.Monitor(database.make_pool(settings, name="test"))
    with caplog.at_level("INFO", "jobs.health"), ports.reserved("::1") as port:
        changes = {"worker_health_host": "::1", "worker_health_port": port}
        async with health.serve(settings.model_copy(update=changes), monitor):
            url = f"http://[::1]:{port}/healthz"
            answer = await asyncio.to_thread(httpx2.get, url)
    assert answer.json() == {"status": "ok"}
    assert url in caplog.text


def test_a_call_that_takes_too_long_does_not_say_that_compute_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = metrics.Reachability()
    monkeypatch.setattr(metrics, "COMPUTE", compute)
    compute.note(answered=False)
    with pytest.raises(CallTimeout), metrics.waiting_for_call("transcribe"):
        raise CallTimeout
    assert not compute.holds
    with pytest.raises(CallLost), metrics.waiting_for_call("transcribe"):
        raise CallLost
    assert compute.holds
