"""The section ``queue``: pgscribe's queue next to plain procrastinate and other queues.

queue_systems.py has the systems and their processes, queue_rounds.py what is measured.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import click

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.queue_rounds import (
    BATCH,
    ONE_WAY,
    Figures,
    drain,
    enqueue,
    idle,
    in_turn,
    lateness,
    ours_of,
    pickup,
    recover,
)
from benchmarks.queue_systems import (
    PLAIN,
    PeerFailed,
    Places,
    System,
    available,
    temporary_places,
    versions,
)

METHOD = """
Workers are processes of their own; each measurement has a new database, or Redis, of its own. In
each round one system is measured right after the other; who begins changes. All are on this
machine, on one Postgres with fsync on and its default durability (`synchronous_commit = on`);
BullMQ has a Redis with an append-only file. With `appendfsync always` that loses nothing that was
confirmed, as Postgres; with `everysec` up to a second of it, and is here because it is what most
run.

**What a job is.** The jobs do nothing. pgscribe's are of the full shape all the same: the owner's
row with its checks, the queue job, its events, the status mirrored on the row, a result, fair
share between ten owners. The others' are bare: an entry in the queue with an id as its payload,
and what remains of it when it has ended. So this compares what a transcription costs in pgscribe's
queue with the least that a job costs elsewhere.

**Configuration.** Each as its own guide recommends for throughput, woken by LISTEN/NOTIFY where it
can be:

- procrastinate: its stock App, connector and worker.
- pgscribe: its defaults.
- pgqueuer: asyncpg on uvloop, durable tables, its recommended autovacuum, batches of as many jobs
  as are to run at a time. It has no limit of what runs at a time unless told, and with one, a full
  worker looks again after 0.1 s: it drains without.
- graphile-worker: a local queue of one job more than run at a time, ends in batches without delay.
- pg-boss: `notify` and `useListenNotify`; batches of as many as run at a time, fetched without a
  pause while they are full. One at a time it fetches ten and runs one after the other. For its
  shortest recovery: a heartbeat of 10 s, supervision every second, polls every half second.
- BullMQ: its defaults.

**Lines.** *Drain*: jobs a second from the start of a worker to the commit of the last end; "1 ms
away" has a proxy between worker and database that adds half a millisecond each way. procrastinate,
the slowest, drains three tenths of the jobs, 1 ms away one tenth. *Pickup*: from when the commit
of one job is sent (or has returned) to its start in an idle worker, on the clock that all
processes share; the systems take turns, job by job. BullMQ has no transactions: from when the job
is sent. *Late*: how much later than its time a scheduled job starts, and one that is tried again;
how long after the end of an owner's job the next one starts, for an owner who may have one at a
time. *Enqueue*: jobs a second from one connection with the system's own client. *Recovery*: from
`kill -9` of a worker to the start of its job in another one that was there; all samples wait side
by side. *Idle*: what an idle worker sends to its database, transaction control included (with
Redis, commands, those of its scripts included), and the CPU that the server's processes for it
use; once for all rounds, all side by side. pgscribe's has what `pgscribe worker` does every minute
in it: it looks for calls and audio that ended jobs have left behind.
"""

LEFT_OUT = {
    "procrastinate, recovery": "nothing gives a dead worker's jobs back by itself; its guide shows"
    " a periodic task that does.",
    "graphile-worker, recovery": "a dead worker's jobs run again after four hours, says its"
    " documentation, and no option changes that (its paid Worker Pro recovers sooner).",
    "pg-boss, recovery by default": "after `expireInSeconds`, 15 minutes, says its documentation.",
    "Other systems, late": "pgscribe's alone: schedules, retries and limits per owner differ in"
    " kind from system to system.",
}


@dataclass(frozen=True)
class Line:
    """A line of the report."""

    id: str
    what: str
    unit: str
    better: Literal["higher", "lower"] = "lower"
    headline: bool = False
    note: str = ""


LINES = (
    Line("drain-c1", "Drain, 1 at a time", "jobs/s", "higher"),
    Line("drain-c10", "Drain, 10 at a time", "jobs/s", "higher"),
    Line("drain-c100", "Drain, 100 at a time", "jobs/s", "higher", headline=True),
    Line("drain-c100-rtt1ms", "Drain, 100 at a time, 1 ms away", "jobs/s", "higher"),
    Line("pickup-p50", "Pickup, p50", "ms", headline=True),
    Line("pickup-p99", "Pickup, p99", "ms"),
    Line("pickup-p50-returned", "Pickup from the commit's return, p50", "ms"),
    Line("pickup-p99-returned", "Pickup from the commit's return, p99", "ms"),
    Line("late-scheduled", "Late, scheduled", "ms"),
    Line("late-retried", "Late, tried again", "ms"),
    Line("late-slot", "Late, after a released slot", "ms"),
    Line("enqueue-single", "Enqueue, one by one", "jobs/s", "higher"),
    Line("enqueue-batch", "Enqueue, 1,000 in a statement", "jobs/s", "higher"),
    Line(
        "recovery-short",
        "Recovery, shortest setting",
        "s",
        headline=True,
        note="stalled after 5 s; pg-boss 10 s, its minimum",
    ),
    Line("recovery-default", "Recovery, default settings", "s"),
    Line("idle-statements", "Idle worker, statements", "/s"),
    Line("idle-cpu", "Idle worker, the server's CPU", "s/minute"),
)

PLOTS = (
    Plot(
        "queue-drain",
        "Drain: jobs a second",
        "bars",
        ["drain-c1", "drain-c10", "drain-c100", "drain-c100-rtt1ms"],
        logarithmic=True,
    ),
    Plot("queue-pickup", "Pickup: milliseconds", "bars", ["pickup-p50", "pickup-p99"]),
    Plot(
        "queue-enqueue",
        "Enqueue: jobs a second",
        "bars",
        ["enqueue-single", "enqueue-batch"],
        logarithmic=True,
    ),
    Plot(
        "queue-recovery",
        "Recovery: seconds after kill -9",
        "bars",
        ["recovery-short", "recovery-default"],
    ),
)


RECOVERIES = 3  # at most, of each system: two processes and a database each


@dataclass(frozen=True)
class Sizes:
    """How much of each to measure."""

    drained: Mapping[int, int]  # concurrency: jobs
    pickups: int = 100
    late: int = 5
    singles: int = 1_000
    batches: int = 10
    idle_seconds: float = 60.0
    default_recovery: bool = True  # takes more than a minute


FULL = Sizes({1: 1_000, 10: 4_000, 100: 10_000})
QUICK = Sizes({1: 100, 10: 200, 100: 400}, 10, 1, 50, 1, 2.0, default_recovery=False)


class Comparison:
    """All figures of a run; a peer that fails is left out from then on, and says why."""

    def __init__(self, places: Places, systems: Sequence[System]) -> None:
        self._places = places
        self.systems = list(systems)
        self.failed: dict[str, str] = {}
        self.figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for system in systems:
            self._attempt(partial(places.prepare, system))

    def _attempt(self, measure: Callable[[], object]) -> None:
        try:
            measure()
        except PeerFailed as error:
            self.systems = [system for system in self.systems if system.name != error.system]
            self.failed[error.system] = f"it failed: {error}"

    def each(self, line: str, number: int, measure: Callable[[System], float]) -> None:
        """Measure one system after the other, in this round's order."""
        for system in in_turn(self.systems, number):
            self._attempt(partial(self._measure, line, system, measure))

    def _measure(self, line: str, system: System, measure: Callable[[System], float]) -> None:
        self.figures[line][system.name].append(measure(system))

    def together(self, measure: Callable[[], Mapping[str, Figures]]) -> None:
        """Measure all at the same time, and again without those that then fail."""
        before = len(self.systems)
        self._attempt(lambda: self._add(measure()))
        if len(self.systems) < before:
            self.together(measure)

    def recoveries(self, line: str, stalls: Mapping[str, int | None], samples: int) -> None:
        """Measure the recovery of those who have such a setting."""

        def measure() -> dict[str, Figures]:
            systems = [system for system in self.systems if system.name in stalls]
            stalled = [stalls[system.name] for system in systems]
            self.figures[line].update(recover(self._places, systems, stalled, samples))
            return {}

        self.together(measure)

    def _add(self, figures: Mapping[str, Figures]) -> None:
        for line, by_system in figures.items():
            for name, figure in by_system.items():
                self.figures[line][name].append(figure)

    def measurements(self, order: Iterable[str]) -> list[Measurement]:
        """Return the report's lines."""
        order = [name for name in order if name not in self.failed]
        measured = []
        for line in LINES:
            figures = self.figures.get(line.id, {})
            values = {name: figures[name] for name in order if figures.get(name)}
            if values:
                baseline = PLAIN if PLAIN in values and len(values) > 1 else None
                measured.append(
                    Measurement(
                        line.id,
                        line.what,
                        line.unit,
                        line.better,
                        values,
                        baseline,
                        line.note,
                        line.headline,
                    )
                )
        return measured


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - benchmarks.figures.Measure
    """Measure all systems that are on this machine."""
    logging.getLogger("procrastinate.blueprints").setLevel(logging.ERROR)
    sizes = QUICK if quick else FULL
    systems, missing = available()
    with temporary_places() as places:
        comparison = Comparison(places, systems)
        for number in range(rounds):
            click.echo(f"queue: round {number + 1} of {rounds}", err=True)
            measure_round(places, comparison, sizes, number)
        comparison.together(lambda: idle(places, comparison.systems, sizes.idle_seconds))
        shortest = {s.name: s.shortest_stall for s in systems if s.shortest_stall}
        samples = min(rounds, RECOVERIES)
        comparison.recoveries("recovery-short", shortest, samples)
        if sizes.default_recovery:
            default = {system.name: None for system in systems if system.recovers}
            comparison.recoveries("recovery-default", default, samples)
    return Section(
        id="queue",
        title="The queue, next to others",
        method=METHOD,
        measurements=comparison.measurements(system.name for system in systems),
        plots=PLOTS,
        left_out={**LEFT_OUT, **missing, **comparison.failed},
        versions=versions(systems),
    )


def measure_round(places: Places, comparison: Comparison, sizes: Sizes, number: int) -> None:
    """Measure once what is measured in rounds."""
    for concurrency, jobs in sizes.drained.items():
        measure = partial(drain, places, jobs=jobs, concurrency=concurrency)
        comparison.each(f"drain-c{concurrency}", number, measure)
    jobs = sizes.drained[100]
    comparison.each("drain-c100-rtt1ms", number, lambda s: drain(places, s, jobs, 100, ONE_WAY))
    comparison.together(lambda: pickup(places, comparison.systems, sizes.pickups))
    comparison.together(lambda: lateness(places, ours_of(comparison.systems), sizes.late))
    comparison.each("enqueue-single", number, lambda s: enqueue(places, s, sizes.singles, 1))
    comparison.each(
        "enqueue-batch", number, lambda s: enqueue(places, s, sizes.batches * BATCH, BATCH)
    )
