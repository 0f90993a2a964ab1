"""Which jobs a claim takes where not all of those that are due can be taken."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Literal
from uuid import UUID

import psycopg
import pytest

from jobs import database
from jobs.queue import Queue
from jobs.settings import Settings

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]
Which = Literal["row", "queue job"]

LOCKS: dict[Which, bytes] = {
    "row": b"select from processing_jobs where id = any (%s) for update",
    "queue job": b"select from procrastinate.procrastinate_jobs q join processing_jobs p"
    b" on q.id = p.job_id::bigint where p.id = any (%s) for update of q",
}


@pytest.fixture
async def worker(queue: Queue) -> int:
    return await queue.register()


@pytest.fixture
def lock(database: str) -> Iterator[Callable[..., None]]:
    with ExitStack() as stack:

        def lock_(jobs: list[UUID], which: Which = "row") -> None:
            """Lock jobs as an operator's long transaction does."""
            operator = stack.enter_context(psycopg.connect(database))
            operator.execute(LOCKS[which], (jobs,))

        yield lock_


def insert(conn: psycopg.Connection, user: UUID, count: int = 1) -> list[UUID]:
    rows = conn.execute(
        "insert into processing_jobs (user_id, file_path)"
        " select %s, 'a/b' from generate_series(1, %s) returning id, job_id::bigint",
        (user, count),
    ).fetchall()
    return [job_id for job_id, _ in sorted(rows, key=lambda row: row[1])]


async def claim(queue: Queue, worker: int, wanted: int = 1) -> list[UUID]:
    turn = await queue.turn(worker, [], wanted, None)
    return [job.attempt.job_id for job in turn.jobs if job.attempt]


@pytest.mark.parametrize("which", ["row", "queue job"])
async def test_a_locked_job_at_the_head_stops_nobody(
    queue: Queue,
    worker: int,
    conn: psycopg.Connection,
    make_user: MakeUser,
    lock: Callable[..., None],
    which: Which,
) -> None:
    (locked, behind), other = insert(conn, make_user(), 2), insert(conn, make_user(), 2)
    lock([locked], which)
    taken = [job for _ in range(5) for job in await claim(queue, worker)]
    assert sorted(taken) == sorted([behind, *other])


async def test_what_was_locked_is_taken_once_it_can_be(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID, database: str
) -> None:
    jobs = insert(conn, user, 3)
    with psycopg.connect(database) as operator:
        operator.execute(LOCKS["row"], (jobs,))
        turn = await queue.turn(worker, [], 5, None)
        assert (turn.jobs, turn.missed) == ([], 3)
    assert await claim(queue, worker, 5) == jobs


async def test_an_owner_whose_jobs_are_all_locked_does_not_stand_in_the_way(
    queue: Queue,
    worker: int,
    conn: psycopg.Connection,
    make_user: MakeUser,
    lock: Callable[..., None],
) -> None:
    for _ in range(3):
        lock(insert(conn, make_user(), 200))
    free = insert(conn, make_user(), 20)
    assert await claim(queue, worker, 5) == free[:5]
    taken = [job for _ in range(5) for job in await claim(queue, worker)]
    assert taken == free[5:10]


async def test_locked_jobs_keep_their_place(
    queue: Queue, worker: int, conn: psycopg.Connection, make_user: MakeUser, database: str
) -> None:
    mine, others = insert(conn, make_user(), 5), insert(conn, make_user(), 5)
    with psycopg.connect(database) as operator:
        operator.execute(LOCKS["row"], (mine,))
        assert await claim(queue, worker, 3) == others[:3]
    assert await claim(queue, worker, 4) == [mine[0], mine[1], mine[2], mine[3]]


async def lose_worker(queue: Queue, conn: psycopg.Connection, wanted: int) -> int:
    """Let a new worker claim jobs and die of them; return how many it held."""
    worker = await queue.register()
    claimed = await claim(queue, worker, wanted)
    conn.execute(
        "update procrastinate.procrastinate_workers"
        " set last_heartbeat = now() + case id when %s then -1 else 1 end * interval '1 hour'",
        (worker,),
    )
    conn.execute("select pgscribe.sweep_stalled_jobs(0.1, 3)")
    return len(claimed)


async def test_after_one_lost_worker_its_jobs_run_together_again(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    jobs = insert(conn, user, 4)
    assert await lose_worker(queue, conn, 4) == 4
    assert await claim(queue, worker, 4) == jobs


async def test_jobs_that_may_have_killed_their_workers_run_apart(
    queue: Queue, worker: int, conn: psycopg.Connection, make_user: MakeUser
) -> None:
    suspects = insert(conn, make_user(), 4)
    for _ in range(2):
        assert await lose_worker(queue, conn, 4) == 4
    others = insert(conn, make_user(), 2)
    turn = await queue.turn(worker, [], 10, None)
    taken = [job.attempt.job_id for job in turn.jobs if job.attempt]
    assert sorted(taken) == sorted([suspects[0], *others]), "the other slots are not left empty"
    assert await claim(queue, worker, 7) == []
    another = await queue.register()
    assert await claim(queue, another, 10) == suspects[1:2]
    (suspect,) = [job for job in turn.jobs if job.attempt and job.attempt.job_id in suspects]
    end = suspect.end("succeeded", result={}, audio_seconds=1.0)
    again = await queue.turn(worker, [end], 8, None)
    assert [job.attempt.job_id for job in again.jobs if job.attempt] == suspects[2:3]


async def test_whoever_holds_suspects_back_leaves_them_to_the_others(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID, settings: Settings
) -> None:
    """What a worker has seen and left, it announces as seen: not where others may run it."""
    insert(conn, user, 3)
    for _ in range(2):
        await lose_worker(queue, conn, 3)
    connect = functools.partial(database.connect, settings, name="other")
    async with await connect() as other:
        await other.execute("listen pgscribe_workers")
        await queue.turn(worker, [], 10, "[1]")
        insert(conn, user)
        conn.execute("update processing_jobs set cancel_requested_at = now() where attempt = 2")
        await queue.turn(worker, [], 9, "[2]")
        heard = [n.payload async for n in other.notifies(timeout=60, stop_after=1)]
    assert heard == ["[2]"]


async def test_a_retry_by_hand_clears_a_suspect(
    queue: Queue, worker: int, conn: psycopg.Connection, user: UUID
) -> None:
    jobs = insert(conn, user, 3)
    for _ in range(3):
        await lose_worker(queue, conn, 3)
    while await lose_worker(queue, conn, 3):
        pass
    conn.execute("select retry_processing_job(id) from processing_jobs where status = 'failed'")
    assert sorted(await claim(queue, worker, 10)) == sorted(jobs)
