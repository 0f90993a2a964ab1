import json

import pytest

from jobs.wakeups import LONGEST_STAGGER, MAX_COVERED, STEP, Wakeups, announcement


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def wakeups(clock: Clock) -> Wakeups:
    return Wakeups(clock)


def one_of(clock: Clock, workers: int, rank: int) -> Wakeups:
    wakeups = Wakeups(clock)
    wakeups.workers, wakeups.rank = workers, rank
    return wakeups


def test_nothing_to_look_for(wakeups: Wakeups) -> None:
    assert wakeups.next() is None
    assert not wakeups.due
    assert wakeups.reached() == []


def test_a_worker_that_is_alone_looks_at_once(clock: Clock, wakeups: Wakeups) -> None:
    wakeups.add(7)
    assert wakeups.due
    assert wakeups.next() == clock.now
    assert wakeups.reached() == [7]


def test_workers_look_in_turn_beginning_with_the_one_that_the_job_picks(clock: Clock) -> None:
    workers = [one_of(clock, 5, rank) for rank in range(5)]
    for worker in workers:
        worker.add(12)
    delays = [(worker.next() or 0) - clock.now for worker in workers]
    assert delays == pytest.approx([3 * STEP, 4 * STEP, 0, STEP, 2 * STEP])


def test_the_first_look_goes_round_from_job_to_job(clock: Clock) -> None:
    first = []
    for job in range(6):
        workers = [one_of(clock, 3, rank) for rank in range(3)]
        for worker in workers:
            worker.add(job)
        first += [rank for rank, worker in enumerate(workers) if worker.due]
    assert first == [0, 1, 2, 0, 1, 2]


def test_of_many_workers_the_last_does_not_wait_long(clock: Clock) -> None:
    last = one_of(clock, 1000, 0)
    last.add(1)
    assert (last.next() or 0) - clock.now <= LONGEST_STAGGER


def test_a_delayed_wakeup_is_not_reached_before_its_time(clock: Clock, wakeups: Wakeups) -> None:
    wakeups.add(7, 2.0)
    assert wakeups.reached() == []
    assert wakeups.next() == clock.now + 2
    clock.now += 2
    assert wakeups.due
    assert wakeups.reached() == [7]


def test_a_wakeup_counts_once_from_when_it_first_came(clock: Clock) -> None:
    wakeups = one_of(clock, 4, 3)
    wakeups.add(0)
    at = wakeups.next()
    clock.now += STEP
    wakeups.add(0)
    assert wakeups.next() == at


def test_an_earlier_look_covers_a_wakeup_that_is_still_to_be_acted_on(clock: Clock) -> None:
    wakeups = one_of(clock, 4, 3)
    wakeups.add(0)
    assert not wakeups.due
    assert wakeups.reached() == [0]


def test_what_another_worker_covered_is_dropped(wakeups: Wakeups) -> None:
    wakeups.add(1)
    wakeups.add(2)
    wakeups.forget([1, 99])
    assert wakeups.reached() == [2]


def test_what_came_during_a_look_is_kept(clock: Clock, wakeups: Wakeups) -> None:
    wakeups.add(1)
    reached = wakeups.reached()
    clock.now += STEP
    wakeups.add(2)
    wakeups.add_own()
    wakeups.forget(reached)
    assert 2 in wakeups.reached()
    assert len(wakeups.reached()) == 2


def test_own_wakeups_are_at_once_and_told_to_nobody(clock: Clock) -> None:
    wakeups = one_of(clock, 50, 49)
    wakeups.add_own()
    assert wakeups.next() == clock.now
    assert announcement(wakeups.reached()) is None
    wakeups.forget(wakeups.reached())
    assert wakeups.next() is None


def test_own_wakeups_can_be_put_off(clock: Clock, wakeups: Wakeups) -> None:
    wakeups.add_own(0.5)
    wakeups.add_own(0.25)
    assert not wakeups.due
    assert wakeups.next() == clock.now + 0.25


def test_an_announcement_names_what_all_have_in_common() -> None:
    assert json.loads(announcement(["own 1", 5, 6]) or "") == [5, 6]
    assert announcement([]) is None


def test_an_announcement_fits_into_a_notification() -> None:
    largest = announcement(range(10**12, 10**12 + MAX_COVERED))  # such as times in milliseconds
    assert largest is not None
    assert len(largest) < 8000
    assert announcement(range(MAX_COVERED + 1)) is None
