"""What a network does: half-open connections, delays, resets, an unreachable database, poolers."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from uuid import UUID

import click
import pytest
from psycopg_pool import PoolTimeout
from pydantic import SecretStr

from jobs import database as pools
from jobs.settings import Settings
from tests.faults.fleet import PATIENCE, Database, Fleet, Jobs, Worker, until
from tests.faults.proxy import Proxy

CALL_TIMEOUT = 10.0  # seconds, as in jobs.queue
DEAF_PICKUP = 8.0  # seconds; a worker that hears nothing looks every 2 s
DEAF_CANCEL = 20.0
EXIT = 15.0


def start_behind(proxy: Proxy, fleet: Fleet, **options: int) -> Worker:
    return fleet.start_ready(url=proxy.url(fleet.url), **options)


def test_half_open_connections_are_replaced(
    proxy: Proxy, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """Nobody says that they are dead: a call gets no answer, and so do new connections."""
    worker = start_behind(proxy, fleet, concurrency=2)
    jobs.insert(user, "sleep-1", 4)
    worker.says("start", 2)
    proxy.swallow()
    until(lambda: "does not answer" in worker.log, "a call times out")
    jobs.insert(user, "sleep", 4)
    proxy.heal()
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert fleet.living == [worker]


def test_what_arrives_after_its_call_was_given_up_does_no_harm(
    proxy: Proxy, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """The network holds a claim or an end back until the worker has long gone on."""
    worker = start_behind(proxy, fleet, concurrency=2)
    jobs.insert(user, "sleep-0.5", 6)
    worker.says("start", 2)
    proxy.hold()
    until(lambda: "does not answer" in worker.log, "a call times out")
    proxy.heal()
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert fleet.living == [worker]


def test_connections_reset_again_and_again(
    proxy: Proxy, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = start_behind(proxy, fleet, concurrency=4)
    proxy.delay = 0.003
    jobs.insert(user, "sleep-0.02", 150)
    for done in range(10, 150, 10):
        until(lambda: jobs.count("status = 'completed'") >= done, "it gets on")  # noqa: B023
        proxy.cut()
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert fleet.living == [worker]


@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_an_unreachable_database(
    proxy: Proxy,
    fleet: Fleet,
    jobs: Jobs,
    user: UUID,
    settled: Callable[[], None],
    seconds: int,
) -> None:
    workers = [start_behind(proxy, fleet, concurrency=2) for _ in range(2)]
    jobs.insert(user, "sleep-1", 8)
    for worker in workers:
        worker.says("start", 2)
    proxy.refuse()
    time.sleep(seconds)
    assert fleet.living == workers
    proxy.heal()
    settled()
    assert jobs.count("status <> 'completed'") == 0
    assert fleet.living == workers


@pytest.mark.anyio
async def test_connections_that_fall_silent_before_they_are_set_up_leave_the_pool_alive(
    proxy: Proxy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would keep the pool's few tasks, which make all connections, for ever."""
    monkeypatch.setattr(pools, "CONNECTION_TIMEOUT", 1.0)
    url = SecretStr(proxy.url(settings.database_url.get_secret_value()))
    behind = settings.model_copy(update={"database_url": url})
    proxy.silences_new = True
    async with pools.make_pool(behind, name="test", for_queue=True) as pool:
        for _ in range(3):
            with pytest.raises(PoolTimeout):
                await pool.getconn()
        proxy.heal()
        async with asyncio.timeout(PATIENCE):
            while not await gets_one(pool):
                pass


async def gets_one(pool: pools.Pool) -> bool:
    with contextlib.suppress(PoolTimeout):
        async with pool.connection() as conn:
            await conn.execute("select 1")
            return True
    return False


@pytest.fixture
def deaf_worker(proxy: Proxy, fleet: Fleet) -> Worker:
    """A worker whose pooler accepts LISTEN but passes no notification on."""
    proxy.drops_notifications = True
    worker = start_behind(proxy, fleet)
    worker.says("listening", 2)  # it has missed its own echo
    return worker


@pytest.mark.usefixtures("deaf_worker")
def test_a_worker_that_hears_no_notifications_looks_often(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    for _ in range(3):
        job_id = jobs.insert_one(user, "sleep")
        inserted_at = time.monotonic()
        jobs.end(job_id)
        assert fleet.starts(job_id)[0].at - inserted_at < DEAF_PICKUP
    settled()


def test_a_worker_that_hears_no_notifications_stops_a_cancelled_job(
    deaf_worker: Worker, db: Database, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    job_id = jobs.insert_one(user, "sleep-600")
    deaf_worker.says("start")
    db.value("select cancel_processing_job(%s) is null", job_id)
    assert jobs.end(job_id, DEAF_CANCEL)["status"] == "cancelled"
    settled()


@pytest.mark.alone
def test_sigterm_behind_half_open_connections_ends_the_worker(
    proxy: Proxy, fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    worker = start_behind(proxy, fleet, shutdown_timeout=1)
    job_id = jobs.insert_one(user, "long_once-600")
    worker.says("start")
    proxy.swallow()
    worker.signal(signal.SIGTERM)
    signalled_at = time.monotonic()
    assert worker.ended() == 0
    took = time.monotonic() - signalled_at
    click.echo(f"ended {took:.1f} s after SIGTERM (shutdown time-out 1 s)")
    assert took < 1 + EXIT
    fleet.start()
    assert jobs.end(job_id)["status"] == "completed"
    settled()
