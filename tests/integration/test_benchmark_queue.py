import sys

import psycopg
import pytest

from benchmarks.queue_child import Work
from benchmarks.queue_systems import OURS, Child, PeerFailed, System, available, start, worker
from benchmarks.queue_worker import OWNERS

JOBS = 30


@pytest.fixture
def ours() -> System:
    return next(system for system in available()[0] if system.name == OURS)


def test_the_benchmarks_processes_enqueue_and_drain_pgscribes_queue(
    ours: System, database: str, conn: psycopg.Connection
) -> None:
    conn.execute("insert into auth.users (id) select unnest(%s::uuid[])", (OWNERS,))
    conn.commit()
    with start(ours, "produce") as producer, worker(ours, Work(database, 10, JOBS)) as draining:
        seconds = producer.ask(url=database, statements=JOBS - 11, jobs=1)["seconds"]
        producer.ask(url=database, statements=1, jobs=10)
        pickup = producer.ask(url=database, pickup=True)
        assert producer.ask(close=True) == {}
        assert draining.read()["seconds"] > 0
        assert seconds > 0
        assert pickup["committed"] > pickup["committing"]
    ended = conn.execute(
        "select count(*), count(distinct user_id) from public.processing_jobs"
        " where status = 'completed' and result is not null"
    ).fetchone()
    assert ended == (JOBS, len(OWNERS))


def test_a_peer_that_fails_is_told_from_a_failure_of_ours(ours: System) -> None:
    dies = (sys.executable, "-c", "raise SystemExit")
    with (
        Child(*dies, system=System("peer", dies)) as child,
        pytest.raises(PeerFailed, match="peer: its process ended"),
    ):
        child.ask(url="")
    with Child(*dies, system=ours) as child, pytest.raises(RuntimeError, match="its process ended"):
        child.read()
