"""pgscribe's order of jobs, without a database; tests hold it against the real one's.

What is here follows ``pgscribe.claim_jobs``, ``end_attempts`` and ``correct_shares`` statement by
statement, down to when they notice that an owner has nothing left. Scheduled jobs, attempts after
the first and pauses are not in it.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

FIRST_ESTIMATE = 60.0  # seconds, for an owner's first job


@dataclass(slots=True)
class Job:
    """A job to come. ``estimate`` is what it counts for; without one the queue makes its own."""

    number: int
    arrival: float
    owner: int
    seconds: float
    estimate: float | None = None


class Order(Protocol):
    """Decides which jobs are next."""

    def insert(self, job: Job) -> None:
        """Take a job that waits from now on."""

    def claim(self, wanted: int) -> list[Job]:
        """Start up to so many jobs. There may be more when it has returned some."""

    def end(self, jobs: Iterable[Job]) -> None:
        """Take the ends of jobs, whose length is known now."""


class FirstComeFirstServed:
    """The order of a queue that knows no owners."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()

    def insert(self, job: Job) -> None:
        """Put it last."""
        self._waiting.append(job)

    def claim(self, wanted: int) -> list[Job]:
        """Start those that came first."""
        return [self._waiting.popleft() for _ in range(min(wanted, len(self._waiting)))]

    def end(self, jobs: Iterable[Job]) -> None:
        """Learn nothing."""


@dataclass(slots=True)
class _Share:
    """A row of ``pgscribe.owner_shares``, and the owner's jobs."""

    virtual_time: float
    weight: float
    waiting: bool = True
    mean: float | None = None
    running: int = 0
    jobs: deque[Job] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _Listed:
    start_tag: float
    share: _Share
    job: Job


class FairShare:
    """Start-time fair queueing over owners, in audio-seconds by weight."""

    def __init__(
        self, *, max_running: int = 100, weights: Mapping[int, float] | None = None
    ) -> None:
        self._max_running = max_running
        self._weights = weights or {}
        self._now_serving = 0.0
        self._shares: dict[int, _Share] = {}
        self._unseen: dict[int, deque[Job]] = {}  # jobs of owners whom no claim has seen yet
        self._woken: dict[int, None] = {}

    def insert(self, job: Job) -> None:
        """Note a job and that its owner has one."""
        share = self._shares.get(job.owner)
        mean = share.mean if share else None
        job.estimate = job.estimate if job.estimate is not None else mean or FIRST_ESTIMATE
        if share:
            share.jobs.append(job)
        else:
            self._unseen.setdefault(job.owner, deque()).append(job)
        self._woken[job.owner] = None

    def claim(self, wanted: int) -> list[Job]:
        """Start jobs of the owners who have been given least, as one claim of the database does."""
        if wanted <= 0:
            return []
        self._wake()
        passed_over: list[_Share] = []
        while True:
            owners = self._least_given(wanted, passed_over)
            planned = self._plan(owners, wanted)
            idle = [share for share in owners if not share.jobs]
            for share in idle:
                share.waiting = False
            passed_over += idle
            if not (idle and len(owners) == wanted):
                break  # else those without jobs stood in the way of others
        for listed in planned:
            self._charge(listed)
        return [listed.job for listed in planned]

    def end(self, jobs: Iterable[Job]) -> None:
        """Correct what owners were charged, now that the lengths are known."""
        ended: dict[int, list[Job]] = {}
        for job in jobs:
            ended.setdefault(job.owner, []).append(job)
        for owner, theirs in ended.items():
            share = self._shares[owner]
            share.running -= len(theirs)
            corrections = [job.seconds - (job.estimate or 0.0) for job in theirs]
            if any(corrections):
                self._correct(share, corrections, [job.seconds for job in theirs])

    def _wake(self) -> None:
        """Let owners who come back start level with the others."""
        for owner in self._woken:
            share = self._shares.get(owner)
            if share is None:
                weight = self._weights.get(owner, 1.0)
                jobs = self._unseen.pop(owner)
                self._shares[owner] = _Share(self._now_serving, weight, jobs=jobs)
            elif not share.waiting:
                share.waiting = True
                share.virtual_time = max(share.virtual_time, self._now_serving)
        self._woken.clear()

    def _least_given(self, wanted: int, passed_over: list[_Share]) -> list[_Share]:
        able = [
            share
            for share in self._shares.values()
            if share.waiting and share.running < self._max_running and share not in passed_over
        ]
        return sorted(able, key=lambda share: share.virtual_time)[:wanted]

    def _plan(self, owners: list[_Share], wanted: int) -> list[_Listed]:
        """List some jobs of each owner, and of these what goes before the first one not listed."""
        listed: list[_Listed] = []
        horizon = inf
        for share in owners:
            room = min(self._max_running - share.running, wanted)
            depth = min(room, 1 + 2 * wanted // len(owners))
            tag = share.virtual_time
            for job, _ in zip(share.jobs, range(depth), strict=False):
                listed.append(_Listed(tag, share, job))
                tag += (job.estimate or 0.0) / share.weight
            if depth < room and len(share.jobs) >= depth:
                horizon = min(horizon, tag)
        listed.sort(key=lambda found: (found.start_tag, found.job.number))
        return [found for found in listed if found.start_tag <= horizon][:wanted]

    def _charge(self, listed: _Listed) -> None:
        share = listed.share
        share.jobs.remove(listed.job)
        share.running += 1
        share.virtual_time += (listed.job.estimate or 0.0) / share.weight
        self._now_serving = max(self._now_serving, listed.start_tag)

    def _correct(self, share: _Share, corrections: list[float], lengths: list[float]) -> None:
        refund = max(0.0, -min(corrections)) / share.weight
        share.virtual_time = max(
            share.virtual_time + sum(corrections) / share.weight,
            min(share.virtual_time, self._now_serving - refund),
        )
        mean = sum(lengths) / len(lengths)
        share.mean = mean if share.mean is None else 0.8 * share.mean + 0.2 * mean
