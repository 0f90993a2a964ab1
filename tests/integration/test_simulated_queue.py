"""The simulation's fair share is the product's: the same arrivals start in the same order."""

import random
from collections.abc import Callable
from uuid import UUID

import psycopg
import pytest

from benchmarks.fair_queue import FairShare, Job
from jobs.queue import ClaimedJob, Queue

pytestmark = pytest.mark.anyio

SLOTS = 9
MAX_RUNNING = 6
STEPS = 100
WEIGHTS = {0: 1.0, 1: 1.0, 2: 2.0, 3: 0.5, 4: 8.0}


def insert(conn: psycopg.Connection, user: UUID, jobs: list[Job]) -> list[UUID]:
    """Insert a job a statement; those without an estimate get the database's own."""
    return [
        conn.execute(
            "insert into processing_jobs (user_id, file_path, estimated_seconds)"
            " values (%s, 'a/b.mp3', %s) returning id",
            (user, job.estimate),
        ).fetchone()[0]  # type: ignore[index]
        for job in jobs
    ]


@pytest.mark.parametrize("seed", range(2))
async def test_jobs_start_in_the_order_of_the_real_queue(
    conn: psycopg.Connection, make_user: Callable[[], UUID], queue: Queue, seed: int
) -> None:
    rng = random.Random(seed)
    users = [make_user() for _ in WEIGHTS]
    for number, weight in WEIGHTS.items():
        limits = (users[number], MAX_RUNNING, weight)
        conn.execute("select limit_owner(%s, %s, %s::real)", limits)
    simulated = FairShare(max_running=MAX_RUNNING, weights=WEIGHTS)
    jobs: list[Job] = []
    numbers: dict[UUID, int] = {}
    running: list[ClaimedJob] = []
    starts: list[int] = []
    waited = 0

    def number_of(claimed: ClaimedJob) -> int:
        assert claimed.attempt is not None
        return numbers[claimed.attempt.job_id]

    def new_jobs() -> None:
        """Let one owner insert some: of two who come in one turn, either may be taken first."""
        owner = rng.choice(list(WEIGHTS))
        added = [
            Job(
                len(jobs) + place,
                0.0,
                owner,
                rng.uniform(5, 900),
                rng.choice([None, rng.uniform(5, 900)]),
            )
            for place in range(rng.choice([1, 2, 3, 12, 20]))
        ]
        ids = insert(conn, users[owner], added)
        numbers.update({job_id: job.number for job_id, job in zip(ids, added, strict=True)})
        jobs.extend(added)
        for job in added:
            simulated.insert(job)

    worker = await queue.register()
    step = 0
    while step < STEPS or len(starts) < len(jobs):
        if step < STEPS:
            new_jobs()
        step += 1
        rng.shuffle(running)
        at_least = 1 if len(running) == SLOTS or step > STEPS else 0
        some = min(len(running), rng.randint(at_least, 7))
        ending, running = running[:some], running[some:]
        ends = [
            claimed.end("succeeded", result={}, audio_seconds=jobs[number_of(claimed)].seconds)
            for claimed in ending
        ]
        turn = await queue.turn(worker, ends, SLOTS - len(running), None)
        simulated.end([jobs[number_of(claimed)] for claimed in ending])
        expected = simulated.claim(SLOTS - len(running))
        assert [number_of(claimed) for claimed in turn.jobs] == [job.number for job in expected]
        running += turn.jobs
        starts += map(number_of, turn.jobs)
        waited = max(waited, len(jobs) - len(starts))
    assert waited > 50  # so that the order had something to decide
    assert starts != sorted(starts)
    assert sorted(starts) == list(range(len(jobs)))
