"""A model of pgscribe in front of GPU containers, in simulated time; simulate.py runs it.

A job waits in the queue for one of the workers' slots, in the queue's own order (fair_queue.py).
It is prepared (fetched, decoded, split), and each of its spans is a call. Calls wait at the
containers first come, first served, whoever's they are. A container starts when more calls wait
than others are starting for, takes calls until none has come for the scaledown window, and is paid
for from its start to its end.

Not in it: the milliseconds that a claim takes, the limit on all calls of a worker, the containers
that prepare (there is always one) and jobs that fail.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import cos, inf, log, pi

import simpy

from benchmarks.fair_queue import FairShare, FirstComeFirstServed, Job, Order
from jobs.settings import GPU_PRICES, Settings
from modal_functions.config import Config

DAY = 86_400.0
_DEPLOYED = Config()
_FIELDS = Settings.model_fields
_PEAK = 14 * 3600.0  # when most comes in a day


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What comes. ``heavy_files`` come at once from an owner of their own, whose number is 0."""

    hours_a_day: float = 100.0
    days: float = 1.0
    owners: int = 20
    minutes: float = 10.0
    lengths: str = "lognormal"
    spread: float = 1.0
    daily: float = 0.0
    upload: float = 1.0
    heavy_files: int = 0
    heavy_hour: float = 9.0

    def jobs(self, rng: random.Random) -> list[Job]:
        """Return the jobs in the order in which they come."""
        arrivals = [
            (at, rng.randint(1, self.owners))
            for at in self._uploads(rng)
            for _ in range(_geometric(rng, self.upload))
        ]
        # One upload is one owner's, however many files it has.
        owners: dict[float, int] = {}
        arrivals = [(at, owners.setdefault(at, owner)) for at, owner in arrivals]
        arrivals += [(self.heavy_hour * 3600, 0)] * self.heavy_files
        arrivals.sort(key=lambda arrival: arrival[0])
        return [
            Job(number, at, owner, self._seconds(rng))
            for number, (at, owner) in enumerate(arrivals)
        ]

    def _uploads(self, rng: random.Random) -> Iterable[float]:
        rate = self.hours_a_day * 3600 / DAY / (self.minutes * 60) / self.upload
        at = 0.0
        while (at := at + rng.expovariate(rate * (1 + self.daily))) < self.days * DAY:
            relative = 1 + self.daily * cos(2 * pi * (at - _PEAK) / DAY)
            if rng.random() * (1 + self.daily) < relative:
                yield at

    def _seconds(self, rng: random.Random) -> float:
        mean = self.minutes * 60
        if self.lengths == "fixed":
            return mean
        if self.lengths == "exponential":
            return rng.expovariate(1 / mean)
        drawn = rng.lognormvariate(log(mean) - self.spread**2 / 2, self.spread)
        return min(max(1.0, drawn), float(_DEPLOYED.max_audio_seconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What there is to do it with. The defaults are pgscribe's where it has one."""

    fair: bool = True
    slots: int = 20
    max_running: int = 100
    calls_per_job: int = _FIELDS["max_chunks_per_job"].default
    min_span: float = _DEPLOYED.min_span
    max_span: float = _DEPLOYED.max_span
    max_containers: int = _DEPLOYED.max_containers
    inputs: int = 1
    speed: float = 15.0
    overhead: float = 1.0
    cold_start: float = 20.0
    scaledown: float = float(_DEPLOYED.scaledown_window)
    prepare: float = 3.0
    decoding_speed: float = 100.0
    preempted: float = 0.0
    price: float = GPU_PRICES[_DEPLOYED.gpu] + _FIELDS["cpu_second_price"].default

    def order(self) -> Order:
        """Return a new queue."""
        return FairShare(max_running=self.max_running) if self.fair else FirstComeFirstServed()


@dataclass(slots=True)
class Record:
    """What became of a job, by the clock."""

    job: Job
    claimed: float
    started: float = inf
    first_text: float = inf
    ended: float = inf


@dataclass(slots=True)
class Outcome:
    """What a simulation found. Times in seconds; ``records`` in the order of claims."""

    records: list[Record] = field(default_factory=list)
    paid: float = 0.0
    busy: float = 0.0
    cold: float = 0.0
    containers_started: int = 0
    most_containers: int = 0
    preemptions: int = 0

    def of(self, owners: Callable[[int], bool]) -> list[Record]:
        """Return what became of some owners' jobs."""
        return [record for record in self.records if owners(record.job.owner)]

    @property
    def audio_hours(self) -> float:
        """How much audio came."""
        return sum(record.job.seconds for record in self.records) / 3600


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least so many per cent do not exceed."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, -int(-percent * len(ordered) // 100) - 1)]


def spans(seconds: float, shortest: float, longest: float, rng: random.Random) -> list[float]:
    """Return lengths as ``modal_functions.splitting.split`` would cut them.

    It takes the longest pause within reach, and no place within reach is likelier than another to
    have it. No cut leaves less than the minimum behind it.
    """
    lengths = []
    while seconds > longest:
        lengths.append(rng.uniform(shortest, min(longest, seconds - shortest)))
        seconds -= lengths[-1]
    return [*lengths, seconds]


def simulate(system: System, jobs: Iterable[Job], seed: int = 1) -> Outcome:
    """Let the jobs come, in their order, until all are done and no container is left."""
    simulation = _Simulation(system, jobs, random.Random(seed))  # noqa: S311 - a simulation
    simulation.env.run()
    return simulation.outcome


def _geometric(rng: random.Random, mean: float) -> int:
    """Return 1, 2, … with that mean."""
    return 1 if mean <= 1 else 1 + int(log(1 - rng.random()) / log(1 - 1 / mean))


@dataclass(slots=True)
class _Call:
    seconds: float
    started: Callable[[], None]
    ended: Callable[[], None]


@dataclass(slots=True, eq=False)
class _Container:
    since: float
    until: float = inf  # when it is preempted
    calls: int = 0
    idle_since: float = inf
    gone: bool = False


class _Simulation:
    """The workers: they claim, and start the calls of what they have claimed."""

    def __init__(self, system: System, jobs: Iterable[Job], rng: random.Random) -> None:
        self.env = simpy.Environment()
        self.outcome = Outcome()
        self._system = system
        self._rng = rng
        self._order = system.order()
        self._containers = _Containers(self.env, system, self.outcome, rng)
        self._free = system.slots
        self._ended: list[Job] = []
        self._turn_is_due = False
        self._arrivals = iter(jobs)
        self._await_arrival()

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        _after(self.env, seconds, then)

    def _await_arrival(self) -> None:
        job = next(self._arrivals, None)
        if job is not None:
            self._after(max(0.0, job.arrival - self.env.now), partial(self._arrive, job))

    def _arrive(self, job: Job) -> None:
        self._order.insert(job)
        self._need_turn()
        self._await_arrival()

    def _need_turn(self) -> None:
        """Take a turn after all that happens at this time."""
        if not self._turn_is_due:
            self._turn_is_due = True
            self._after(0, self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        self._order.end(self._ended)
        self._ended = []
        while claimed := self._order.claim(self._free):
            for job in claimed:
                self._free -= 1
                record = Record(job, self.env.now)
                self.outcome.records.append(record)
                preparing = self._system.prepare + job.seconds / self._system.decoding_speed
                self._after(preparing, partial(self._transcribe, record))

    def _transcribe(self, record: Record) -> None:
        system = self._system
        left = deque(spans(record.job.seconds, system.min_span, system.max_span, self._rng))
        running = 0

        def begin() -> None:
            nonlocal running
            while left and running < system.calls_per_job:
                running += 1
                self._containers.call(_Call(left.popleft(), started, ended))

        def started() -> None:
            record.started = min(record.started, self.env.now)

        def ended() -> None:
            nonlocal running
            running -= 1
            record.first_text = min(record.first_text, self.env.now)
            begin()
            if not running:
                record.ended = self.env.now
                self._ended.append(record.job)
                self._free += 1
                self._need_turn()

        begin()


class _Containers:
    """One pool of containers, as Modal runs it."""

    def __init__(
        self, env: simpy.Environment, system: System, outcome: Outcome, rng: random.Random
    ) -> None:
        self._env = env
        self._system = system
        self._outcome = outcome
        self._rng = rng
        self._waiting: deque[_Call] = deque()
        self._open: list[_Container] = []  # with room for a call, the last used at the end
        self._running = 0
        self._starting = 0

    def call(self, call: _Call) -> None:
        """Take a call; it waits if it must."""
        self._waiting.append(call)
        self._feed()

    def _feed(self) -> None:
        while self._waiting and self._open:
            self._begin(self._open[-1], self._waiting.popleft())
        limit = self._system.max_containers
        while self._starting * self._system.inputs < len(self._waiting) and self._running < limit:
            self._start()

    def _start(self) -> None:
        self._running += 1
        self._starting += 1
        self._outcome.containers_started += 1
        self._outcome.most_containers = max(self._outcome.most_containers, self._running)
        self._outcome.cold += self._system.cold_start
        container = _Container(self._env.now)
        _after(self._env, self._system.cold_start, partial(self._ready, container))

    def _ready(self, container: _Container) -> None:
        self._starting -= 1
        if self._system.preempted:
            seconds = self._rng.expovariate(self._system.preempted / 3600)
            container.until = self._env.now + seconds
            _after(self._env, seconds, partial(self._preempt, container))
        self._open.append(container)
        self._feed()
        self._watch_idle(container)

    def _begin(self, container: _Container, call: _Call) -> None:
        container.calls += 1
        container.idle_since = inf
        if container.calls == self._system.inputs:
            self._open.remove(container)
        call.started()
        seconds = self._system.overhead + call.seconds / self._system.speed
        if self._env.now + seconds > container.until:
            return_to_line = partial(self._return, call)
            _after(self._env, container.until - self._env.now, return_to_line)
            return
        _after(self._env, seconds, partial(self._end, container, call, seconds))

    def _end(self, container: _Container, call: _Call, seconds: float) -> None:
        self._outcome.busy += seconds
        if container.calls == self._system.inputs:
            self._open.append(container)
        container.calls -= 1
        call.ended()
        self._feed()
        self._watch_idle(container)

    def _watch_idle(self, container: _Container) -> None:
        if container.calls or container.gone or self._system.scaledown == inf:
            return
        container.idle_since = since = self._env.now
        _after(self._env, self._system.scaledown, partial(self._scale_down, container, since))

    def _scale_down(self, container: _Container, since: float) -> None:
        if container.idle_since == since and not container.gone:
            self._stop(container)

    def _preempt(self, container: _Container) -> None:
        if not container.gone:
            self._outcome.preemptions += 1
            self._stop(container)

    def _stop(self, container: _Container) -> None:
        container.gone = True
        self._running -= 1
        if container in self._open:
            self._open.remove(container)
        self._outcome.paid += self._env.now - container.since
        self._feed()

    def _return(self, call: _Call) -> None:
        """Give what a preempted container ran to the next one."""
        self._waiting.appendleft(call)
        self._feed()


def _after(env: simpy.Environment, seconds: float, then: Callable[[], None]) -> None:
    event = env.timeout(seconds)
    event.callbacks.append(lambda _: then())
