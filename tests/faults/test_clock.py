"""A worker whose clock is wrong by an hour: the database's clock decides."""

import time
from collections.abc import Callable
from uuid import UUID

import pytest

from tests.faults.fleet import Fleet, Jobs

HOUR = 3600.0
LATE = 10.0  # seconds


@pytest.mark.parametrize("offset", [HOUR, -HOUR], ids=["fast", "slow"])
def test_a_wrong_clock_neither_delays_nor_hastens_jobs(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None], offset: float
) -> None:
    hours = {
        time.strftime("%Y-%m-%d %H:", time.localtime(time.time() + offset + late))
        for late in (0, LATE)
    }
    worker = fleet.start_ready(concurrency=2, clock_offset=offset)
    inserted_at = time.monotonic()
    scheduled = jobs.insert_one(user, "sleep", delay=1.5)
    retried = jobs.insert_one(user, "retryable-1")
    jobs.end(scheduled)
    jobs.end(retried)
    settled()
    (start,) = fleet.starts(scheduled)
    assert 1.4 < start.at - inserted_at < 1.5 + LATE
    first, second = fleet.starts(retried)
    assert 0.9 < second.at - first.at < 2 + LATE, "the pause is from 1 to 2 s"
    assert worker.log.startswith(tuple(hours)), "its clock was wrong indeed"
