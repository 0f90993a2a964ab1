"""Who gets the next slot: start-time fair queueing between owners, in audio-seconds."""

import asyncio
import functools
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import procrastinate
import psycopg
import pytest

from jobs import database
from jobs.execution import Job
from jobs.queue import ClaimedJob, Queue
from jobs.settings import Settings
from jobs.worker import make_app

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]


def insert(
    conn: psycopg.Connection,
    user: UUID,
    lengths: Iterable[float],
    *,
    priority: int = 0,
    delay: float = 0.0,
) -> None:
    """Insert jobs whose estimates are right, unless they end with another length."""
    conn.execute(
        "insert into processing_jobs"
        " (user_id, file_path, estimated_seconds, priority, scheduled_at)"
        " select %(user)s, 'a/b.mp3', seconds, %(priority)s,"
        " case when %(delay)s > 0 then now() + make_interval(secs => %(delay)s) end"
        " from unnest(%(lengths)s::float8[]) seconds",
        {"user": user, "lengths": list(lengths), "priority": priority, "delay": delay},
    )


def set_limits(
    conn: psycopg.Connection,
    user: UUID,
    *,
    weight: float | None = None,
    max_running: int | None = None,
) -> None:
    conn.execute("select limit_owner(%s, %s, %s::real)", (user, max_running, weight))


def owner(job: ClaimedJob) -> UUID:
    assert job.attempt is not None
    return job.attempt.user_id


@dataclass
class Slots:
    """A worker's slots. ``served``: audio-seconds that each owner's ended jobs had."""

    queue: Queue
    worker: int
    served: dict[UUID, float] = field(default_factory=lambda: defaultdict(float))

    async def claim(self, wanted: int = 1) -> list[ClaimedJob]:
        return (await self.queue.turn(self.worker, [], wanted, None)).jobs

    async def claim_owners(self, wanted: int = 1) -> Counter[UUID]:
        return Counter(map(owner, await self.claim(wanted)))

    async def end(self, jobs: Iterable[ClaimedJob], lengths: dict[UUID, float]) -> None:
        ended = []
        for job in jobs:
            length = lengths[owner(job)]
            self.served[owner(job)] += length
            ended.append(job.end("succeeded", result={}, audio_seconds=length))
        turn = await self.queue.turn(self.worker, ended, 0, None)
        assert not turn.busy

    async def run(self, jobs: int, lengths: dict[UUID, float]) -> list[UUID]:
        """Run that many jobs, one after the other; return their owners."""
        order: list[UUID] = []
        for _ in range(jobs):
            claimed = await self.claim()
            await self.end(claimed, lengths)
            order += map(owner, claimed)
        return order


@pytest.fixture
async def open_slots(settings: Settings) -> AsyncIterator[Any]:
    connect = functools.partial(database.connect, settings, name="test")
    async with AsyncExitStack() as stack:

        async def open_() -> Slots:
            queue = Queue(connect, max_attempts=3, stall_timeout=30)
            stack.push_async_callback(queue.close)
            return Slots(queue, await queue.register())

        yield open_


@pytest.fixture
async def slots(open_slots: Any) -> Slots:
    opened: Slots = await open_slots()
    return opened


async def test_ten_thousand_jobs_do_not_delay_another_owners_first(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    heavy, light = make_user(), make_user()
    insert(conn, heavy, [60] * 10_000)
    await slots.claim(10)
    insert(conn, light, [60])
    assert await slots.claim_owners() == {light: 1}
    assert await slots.claim_owners() == {heavy: 1}


async def test_equal_weights_get_equal_audio_seconds(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    lengths = {make_user(): length for length in (600.0, 60.0, 10.0)}
    for user, length in lengths.items():
        insert(conn, user, [length] * int(6000 / length + 1))
    for _ in range(250):
        await slots.run(1, lengths)
        served = [slots.served[user] for user in lengths]
        assert max(served) - min(served) <= 600
    assert min(served) > 600


async def test_weight_two_gets_twice(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    lengths = {make_user(): 60.0 for _ in range(3)}
    double, *_ = lengths
    set_limits(conn, double, weight=2)
    for user in lengths:
        insert(conn, user, [60] * 50)
    order = Counter(await slots.run(40, lengths))
    assert order[double] == 20
    assert sorted(order.values()) == [10, 10, 20]


async def test_a_batch_is_as_fair_as_single_claims(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    users = [make_user() for _ in range(5)]
    for user in users:
        insert(conn, user, [60] * 50)
    assert await slots.claim_owners(50) == dict.fromkeys(users, 10)


async def test_the_true_length_replaces_the_estimate(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    long, short = make_user(), make_user()
    for user in (long, short):
        insert(conn, user, [60] * 100)
    order = Counter(await slots.run(88, {long: 600, short: 60}))
    assert abs(slots.served[long] - slots.served[short]) <= 600
    assert order[short] >= 8 * order[long]


async def test_an_idle_owner_saves_up_no_credit(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    busy, newcomer = make_user(), make_user()
    lengths = {busy: 60.0, newcomer: 60.0}
    insert(conn, busy, [60] * 100)
    await slots.run(50, lengths)
    insert(conn, newcomer, [60] * 50)
    order = await slots.run(20, lengths)
    assert order.count(busy) in {9, 10}


async def test_an_owner_who_comes_back_starts_level(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    busy, returning = make_user(), make_user()
    lengths = {busy: 60.0, returning: 60.0}
    insert(conn, returning, [60] * 30)
    await slots.run(30, lengths)  # alone, which is not held against them
    insert(conn, busy, [60] * 100)
    insert(conn, returning, [60] * 5)
    assert (await slots.run(10, lengths)).count(returning) in {4, 5}
    await slots.run(40, lengths)
    insert(conn, returning, [60] * 50)
    assert (await slots.run(20, lengths)).count(returning) in {9, 10, 11}


async def test_a_limit_holds_when_many_claim_at_once(
    conn: psycopg.Connection, make_user: MakeUser, open_slots: Any
) -> None:
    limited, other = make_user(), make_user()
    set_limits(conn, limited, max_running=3)
    for user in (limited, other):
        insert(conn, user, [60] * 40)
    workers: list[Slots] = [await open_slots() for _ in range(6)]
    claims = await asyncio.gather(*(worker.claim(5) for worker in workers))
    held = [(w, job) for w, jobs in zip(workers, claims, strict=True) for job in jobs]
    assert Counter(owner(job) for _, job in held) == {limited: 3, other: 27}
    worker, job = next((w, job) for w, job in held if owner(job) == limited)
    await worker.end([job], {limited: 60})
    claims = await asyncio.gather(*(worker.claim(2) for worker in workers))
    assert Counter(owner(job) for jobs in claims for job in jobs)[limited] == 1


async def test_priorities_count_within_an_owner_only(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    hurried, other = make_user(), make_user()
    insert(conn, other, [60] * 5)
    insert(conn, hurried, [60] * 2)
    insert(conn, hurried, [60] * 3, priority=100)
    jobs = [job for _ in range(10) for job in await slots.claim()]
    assert [job.priority for job in jobs if owner(job) == hurried] == [100, 100, 100, 0, 0]
    for pair in zip(jobs[::2], jobs[1::2], strict=True):
        assert set(map(owner, pair)) == {hurried, other}


async def test_a_paused_owner_waits_and_the_others_go_on(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    paused, other = make_user(), make_user()
    for user in (paused, other):
        insert(conn, user, [60] * 10)
    conn.execute("select pause_owner(%s)", (paused,))
    assert await slots.claim_owners(6) == {other: 6}
    conn.execute("select resume_owner(%s)", (paused,))
    assert (await slots.claim_owners(2))[paused] >= 1


async def test_a_pause_earns_no_credit(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    paused, other = make_user(), make_user()
    lengths = {paused: 60.0, other: 60.0}
    for user in lengths:
        insert(conn, user, [60] * 60)
    conn.execute("select pause_owner(%s)", (paused,))
    await slots.run(30, lengths)
    conn.execute("select resume_owner(%s)", (paused,))
    assert (await slots.run(20, lengths)).count(other) in {9, 10}


async def test_a_paused_queue_claims_nothing(
    conn: psycopg.Connection, user: UUID, slots: Slots
) -> None:
    insert(conn, user, [60] * 2)
    conn.execute("select pause_queue()")
    assert await slots.claim(2) == []
    conn.execute("select resume_queue()")
    assert len(await slots.claim(2)) == 2


async def test_a_scheduled_job_waits_for_its_time(
    conn: psycopg.Connection, user: UUID, slots: Slots
) -> None:
    insert(conn, user, [60], delay=1.0)
    turn = await slots.queue.turn(slots.worker, [], 1, None)
    assert turn.jobs == []
    assert turn.due is not None
    _, seconds = turn.due
    assert 0 < seconds <= 1.0
    await asyncio.sleep(seconds + 0.001)
    assert await slots.claim_owners() == {user: 1}


@dataclass
class Waiting:
    """A job's wait: when it came, by the seconds served, and how long it may take at most."""

    since: float
    bound: float


async def test_jobs_that_are_run_again_are_charged_again(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots
) -> None:
    retrying, other = make_user(), make_user()
    insert(conn, retrying, [60] * 10)
    failed = await slots.claim(10)
    ends = [job.end("failed", error_code="x", error="Why.") for job in failed]
    await slots.queue.turn(slots.worker, ends, 0, None)
    conn.execute("select retry_processing_job(id) from processing_jobs where status = 'failed'")
    insert(conn, other, [60] * 10)
    assert (await slots.claim_owners(10))[other] in {4, 5, 6}


@pytest.mark.parametrize("seed", range(4))
async def test_nobody_starves(
    conn: psycopg.Connection, make_user: MakeUser, slots: Slots, seed: int
) -> None:
    """No owner waits longer than it takes to serve all others by their weights."""
    rng = random.Random(seed)
    weights = {make_user(): rng.choice([0.5, 1.0, 1.0, 2.0, 4.0]) for _ in range(8)}
    for user, weight in weights.items():
        set_limits(conn, user, weight=weight)
    longest = 600.0
    users = list(weights)
    lengths = {user: rng.uniform(1, longest) for user in users}
    total = sum(weights.values())
    served = 0.0
    waiting: dict[UUID, list[Waiting]] = {user: [] for user in users}
    held: list[ClaimedJob] = []

    async def claim(wanted: int) -> int:
        nonlocal served
        jobs = await slots.claim(wanted)
        for job in jobs:
            wait = waiting[owner(job)].pop(0)
            assert served - wait.since <= wait.bound
            served += lengths[owner(job)]
        held.extend(jobs)
        return len(jobs)

    for _ in range(60):
        user = rng.choices(users, range(1, 9))[0]
        count = rng.choice([1, 1, 2, 5, 40])
        insert(conn, user, [lengths[user]] * count)
        for _ in range(count):
            ahead = (len(waiting[user]) + 2) * lengths[user]
            bound = ahead * total / weights[user] + len(users) * 2 * longest
            waiting[user].append(Waiting(served, bound))
        await claim(rng.randint(1, 8))
        rng.shuffle(held)
        ending = [held.pop() for _ in range(rng.randint(0, len(held)))]
        await slots.end(ending, lengths)
    while await claim(8):
        await slots.end(held, lengths)
        held.clear()
    assert not any(waiting.values())


class Transcript:
    duration = 60.0

    def to_dict(self) -> dict[str, Any]:
        return {}


async def test_ten_owners_share_a_worker_fairly(
    conn: psycopg.Connection, make_user: MakeUser, settings: Settings
) -> None:
    users = [make_user() for _ in range(10)]
    heavy = users[0]
    insert(conn, heavy, [60] * 400)
    done: list[UUID] = []
    finished = asyncio.Event()
    pool = database.make_pool(settings, name="test", for_queue=True)
    app = make_app(settings)
    async with pool, app.open_async(pool):

        @app.task(name="transcribe", queue="transcription", pass_context=True)
        async def transcribe(
            context: procrastinate.JobContext,
            processing_job_id: str,  # noqa: ARG001
        ) -> Transcript:
            assert isinstance(context.job, Job)
            assert context.job.attempt is not None
            await asyncio.sleep(0.002)
            done.append(context.job.attempt.user_id)
            if len(done) == 10:
                for user in users[1:]:
                    insert(conn, user, [60] * 10)
            if len(done) == 250:
                finished.set()
            return Transcript()

        worker = app.new_worker(concurrency=4)
        running = asyncio.create_task(worker.run())
        async with asyncio.timeout(30):
            await finished.wait()
        worker.stop()
        await running
    # Once the jobs are done that had been claimed when the others came, turns are equal.
    window = Counter(done[18:108])
    assert window[heavy] <= 14
    assert all(window[user] >= 7 for user in users[1:])
