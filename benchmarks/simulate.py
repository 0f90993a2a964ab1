"""How many GPU containers a load needs, how long jobs wait, what it costs.

One simulation: ``python -m benchmarks.simulate --hours-a-day 1000 --max-containers 8``. The tables
of docs/scaling.md: ``--scenario loads``. What an hour of audio costs by GPU and engine:
``--prices``. The same options and seed give the same figures.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import click

from benchmarks import prices
from benchmarks.simulation import DAY, Load, Outcome, Record, System, percentile, simulate

HELP = {
    "hours_a_day": "Hours of audio that come in a day.",
    "days": "Days simulated; the containers then go on until all is done.",
    "owners": "Owners to whom the audio belongs, each to one at random.",
    "minutes": "Mean length of a recording.",
    "lengths": "How lengths are spread: lognormal, exponential or fixed.",
    "spread": "Sigma of the lognormal lengths; 1: half are under 0.6 of the mean.",
    "daily": "How much more comes at 14:00 than on average, and less at 2:00: 0 to 1.",
    "upload": "Files that an owner uploads at a time, on average.",
    "heavy_files": "Files that one more owner uploads at once.",
    "heavy_hour": "The hour of the first day at which that is.",
    "fair": "Fair share between owners; without it first come, first served.",
    "slots": "Jobs at a time, of all workers (PGSCRIBE_WORKER_CONCURRENCY times workers).",
    "max_running": "Jobs at a time of one owner.",
    "calls_per_job": "Chunks of one job at a time (PGSCRIBE_MAX_CHUNKS_PER_JOB).",
    "min_span": "Seconds of the shortest chunk (PGSCRIBE_MODAL_MIN_SPAN).",
    "max_span": "Seconds of the longest chunk (PGSCRIBE_MODAL_MAX_SPAN).",
    "max_containers": "GPU containers at most (PGSCRIBE_MODAL_MAX_CONTAINERS).",
    "inputs": "Calls at a time in one container; pgscribe deploys 1.",
    "speed": "Audio-seconds that a call transcribes in a second.",
    "overhead": "Seconds of a call besides: arguments, reading the audio, the result.",
    "cold_start": "Seconds until a container takes its first call, the model's loading with it.",
    "scaledown": "Seconds without a call that end a container (PGSCRIBE_MODAL_SCALEDOWN_WINDOW).",
    "prepare": "Seconds to prepare a job: its container, fetching, checking.",
    "decoding_speed": "Audio-seconds that preparing decodes in a second.",
    "preempted": "How often in an hour a container is preempted; its calls run again.",
    "price": "Dollars for a second of a container, its GPU, cores and memory.",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the documentation."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def lines(self) -> Iterator[str]:
        """Yield it as Markdown."""
        yield "| " + " | ".join(self.headers) + " |"
        yield "|---" * len(self.headers) + "|"
        for row in self.rows:
            yield "| " + " | ".join(row) + " |"


def run(load: Load, system: System, seed: int = 1) -> Outcome:
    """Simulate a load on a system."""
    return simulate(system, load.jobs(random.Random(seed)), seed)  # noqa: S311 - a simulation


def waits(records: Sequence[Record]) -> list[float]:
    """Return how long jobs waited until a GPU began with them."""
    return [record.started - record.job.arrival for record in records]


def summary(load: Load, system: System, outcome: Outcome) -> dict[str, float]:
    """Return the figures of a simulation."""
    figures: dict[str, float] = {
        "jobs": len(outcome.records),
        "audio_hours": outcome.audio_hours,
        "containers_at_once": outcome.most_containers,
        "containers_on_average": outcome.paid / load.days / DAY,
        "containers_started": outcome.containers_started,
        "gpu_seconds_paid": outcome.paid,
        "busy_share": outcome.busy / outcome.paid if outcome.paid else 0.0,
        "cold_start_share": outcome.cold / outcome.paid if outcome.paid else 0.0,
        "cost_per_audio_hour": _cost(system, outcome),
        "preemptions": outcome.preemptions,
    }
    kinds = {"": outcome.records}
    if load.heavy_files:
        kinds |= {"light_": outcome.of(bool), "heavy_": outcome.of(lambda owner: not owner)}
    for kind, records in kinds.items():
        ends = [record.ended - record.job.arrival for record in records]
        for percent in (50, 95, 99):
            figures[f"{kind}wait_p{percent}_s"] = percentile(waits(records), percent)
            figures[f"{kind}done_p{percent}_s"] = percentile(ends, percent)
    return figures


def _cost(system: System, outcome: Outcome) -> float:
    return outcome.paid * system.price / outcome.audio_hours if outcome.audio_hours else 0.0


def _seconds(value: float) -> str:
    if value < 120:  # noqa: PLR2004 - from here on minutes are easier to read
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 2 * 3600 else f"{value / 3600:.1f} h"


def _waits(records: Sequence[Record]) -> list[str]:
    values = waits(records)
    return [_seconds(percentile(values, percent)) for percent in (50, 95, 99)]


LOADS = {100: (1, 2, 20), 1000: (5, 10, 20), 10_000: (45, 90, 180)}
PATTERNS = {"steadily": Load(), "in bursts": Load(daily=0.8, upload=20.0)}


def loads(hours_a_day: Sequence[int] = tuple(LOADS)) -> Table:
    """Containers for a load, and what jobs then wait."""
    rows = []
    for hours in hours_a_day:
        for pattern, like in PATTERNS.items():
            load = replace(like, hours_a_day=hours)
            for containers in LOADS[hours]:
                system = System(max_containers=containers, slots=max(20, containers))
                outcome = run(load, system)
                rows.append([
                    f"{hours:,} h", pattern, str(containers),
                    f"{outcome.paid / DAY:.1f}", f"{outcome.busy / outcome.paid:.0%}",
                    *_waits(outcome.records),
                    _seconds(percentile([r.ended - r.job.arrival for r in outcome.records], 95)),
                    f"${_cost(system, outcome):.3f}",
                ])  # fmt: skip
    return Table(
        "GPU containers for a load",
        ("audio a day", "it comes", "containers at most", "on average", "busy",
         "wait p50", "p95", "p99", "done p95", "an audio-hour"),
        rows,
    )  # fmt: skip


BURST = Load(hours_a_day=240, heavy_files=2000)
BURST_CONTAINERS = 5


def burst() -> Table:
    """Wait of everybody else while one owner's 2,000 files are transcribed."""
    rows = []
    for fair, slots in ((False, 5), (True, 2), (True, 5), (True, 20), (True, 100), (True, 400)):
        system = System(fair=fair, slots=slots, max_containers=BURST_CONTAINERS)
        outcome = run(BURST, system)
        heavy = outcome.of(lambda owner: not owner)
        begin, end = heavy[0].job.arrival, max(record.ended for record in heavy)
        light = [r for r in outcome.of(bool) if begin <= r.job.arrival < end]
        rows.append([
            "fair share" if fair else "first come, first served", str(slots), str(len(light)),
            *_waits(light), _seconds(end - begin),
        ])  # fmt: skip
    return Table(
        "One owner uploads 2,000 files at once",
        ("order", "jobs at a time", "others' jobs", "their wait p50", "p95", "p99",
         "the 2,000 are done after"),
        rows,
    )  # fmt: skip


def cold() -> Table:
    """Small loads, on which cold starts and waiting containers decide."""
    rows = []
    for hours in (2, 20):
        for cold_start in (5, 20):
            for window in (2, 10, 60, 300):
                system = System(cold_start=cold_start, scaledown=window, max_containers=4)
                outcome = run(Load(hours_a_day=hours, days=5), system)
                rows.append([
                    f"{hours} h", f"{cold_start} s", f"{window} s", *_waits(outcome.records)[:2],
                    f"{outcome.busy / outcome.paid:.0%}", f"${_cost(system, outcome):.3f}",
                ])  # fmt: skip
    headers = ("audio a day", "cold start", "scaledown window", "wait p50", "p95", "busy")
    return Table("Cold starts", (*headers, "an audio-hour"), rows)


DEPLOYED = System()
FRUGAL = replace(DEPLOYED, max_containers=5, calls_per_job=4)
KNOBS = {
    "as deployed": DEPLOYED,
    "`PGSCRIBE_MODAL_SCALEDOWN_WINDOW=60`": replace(DEPLOYED, scaledown=60),
    "`PGSCRIBE_MODAL_MAX_CONTAINERS=5`": replace(DEPLOYED, max_containers=5),
    "`PGSCRIBE_MAX_CHUNKS_PER_JOB=4`": replace(DEPLOYED, calls_per_job=4),
    "the last two": FRUGAL,
    "and `PGSCRIBE_MODAL_MIN_SPAN=120`, `PGSCRIBE_MODAL_MAX_SPAN=300`": replace(
        FRUGAL, min_span=120, max_span=300
    ),
    "the same, but `PGSCRIBE_MODAL_MAX_CONTAINERS=1`": replace(
        FRUGAL, min_span=120, max_span=300, max_containers=1
    ),
}


def knobs() -> Table:
    """Cost of a small load by settings."""
    rows = []
    for name, system in KNOBS.items():
        outcome = run(Load(), system)
        ends = [record.ended - record.job.arrival for record in outcome.records]
        rows.append([
            name, *_waits(outcome.records)[:2], _seconds(percentile(ends, 95)),
            str(outcome.containers_started), f"{outcome.busy / outcome.paid:.0%}",
            f"${_cost(system, outcome):.3f}",
        ])  # fmt: skip
    headers = ("set", "wait p50", "p95", "done p95", "containers started", "busy", "an audio-hour")
    return Table("Settings, for 100 h a day", headers, rows)


def price_table(added: Sequence[prices.Speed], busy: float) -> Table:
    """Cost of an hour of audio by GPU and engine."""
    rows = []
    for speed in (*prices.speeds(), *added):
        price, cost = speed.price, speed.cost(busy)
        rows.append([
            speed.gpu,
            "" if price is None else f"${price:.6f}",
            speed.engine,
            f"{speed.speed:.1f}",
            speed.source,
            "" if cost is None else f"${cost:.3f}",
        ])  # fmt: skip
    headers = ("GPU", "a second", "engine, large model", "times as fast as spoken", "whose figure")
    return Table("Prices", (*headers, "an audio-hour"), rows)


SCENARIOS = {"loads": loads, "knobs": knobs, "burst": burst, "cold": cold}


def _options(command: Any) -> Any:
    """Add an option for each field of a load and a system."""
    for field in reversed([*fields(Load), *fields(System)]):
        name = field.name.replace("_", "-")
        if field.name == "lengths":
            kind: Any = click.Choice(["lognormal", "exponential", "fixed"])
        elif field.name == "fair":
            kind, name = bool, "fair/--first-come-first-served"
        else:
            kind = _range(field.name, type(field.default))
        command = click.option(
            f"--{name}", field.name, type=kind, default=field.default, show_default=True,
            help=HELP[field.name],
        )(command)  # fmt: skip
    return command


def _range(name: str, kind: type) -> click.IntRange | click.FloatRange:
    lowest = 0 if name in {"daily", "heavy_files", "heavy_hour", "preempted"} else None
    may_be_nothing = lowest == 0 or name in {"overhead", "cold_start", "prepare", "price"}
    highest = 1 if name == "daily" else None
    if kind is int:
        return click.IntRange(0 if may_be_nothing else 1, highest)
    return click.FloatRange(0, highest, min_open=not may_be_nothing)


def _own_speed(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> list[prices.Speed]:
    """Read each NAME:PRICE:SPEED."""
    found: list[prices.Speed] = []
    for text in given:
        name, _separator, figures = text.partition(":")
        try:
            price, speed = map(float, figures.split(":"))
        except ValueError:
            price = speed = 0.0
        if not name or price <= 0 or speed <= 0:
            raise click.BadParameter(
                f"{text!r} must be NAME:DOLLARS_A_SECOND:SPEED, such as L4:0.000222:20"
            )
        found.append(prices.Speed(name, "yours", speed, "yours", price))
    return found


@click.command(help=__doc__)
@click.option("--scenario", type=click.Choice([*SCENARIOS, "all"]), help="A table of the docs.")
@click.option("--prices", "show_prices", is_flag=True, help="Cost by GPU and engine, and no more.")
@click.option(
    "--gpu", multiple=True, callback=_own_speed, metavar="NAME:PRICE:SPEED",
    help="With --prices, one more line: dollars a second, audio-seconds a second.",
)  # fmt: skip
@click.option(
    "--busy", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
    help="With --prices, the part of the paid time in which containers transcribe.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--seed", default=1, show_default=True, help="Of the random numbers; scenarios have 1."
)
@_options
def main(  # noqa: PLR0913 - one per option
    *,
    scenario: str | None,
    show_prices: bool,
    gpu: list[prices.Speed],
    busy: float,
    as_json: bool,
    seed: int,
    **values: Any,
) -> None:
    """Simulate."""
    if show_prices:
        _show([price_table(gpu, busy)], as_json=as_json)
    elif scenario:
        names = list(SCENARIOS) if scenario == "all" else [scenario]
        _show([SCENARIOS[name]() for name in names], as_json=as_json)
    else:
        load = Load(**{field.name: values[field.name] for field in fields(Load)})
        system = System(**{field.name: values[field.name] for field in fields(System)})
        figures = summary(load, system, run(load, system, seed))
        if as_json:
            click.echo(json.dumps({**asdict(load), **asdict(system), "seed": seed, **figures}))
        for name, figure in {} if as_json else figures.items():
            click.echo(f"{name:24}{figure:14,.3f}")


def _show(tables: Sequence[Table], *, as_json: bool) -> None:
    """Print tables: one as it stands in the documentation, several with their titles."""
    if as_json:
        click.echo(json.dumps({table.title: [table.headers, *table.rows] for table in tables}))
        return
    for table in tables:
        if len(tables) > 1:
            click.echo(f"\n{table.title}\n")
        for line in table.lines():
            click.echo(line)


if __name__ == "__main__":
    main()
