"""The report of a run, made from its figures alone: the same figures make the same report."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.machine import Machine
from benchmarks.plots import draw

FIGURES, REPORT, PLOTS = "report.json", "report.md", "plots"
BETTER = {"higher": "↑", "lower": "↓"}
DIGITS, RATIO_DIGITS, MOST_DECIMALS = 3, 2, 4


@dataclass(frozen=True)
class Report:
    """One run. A section that was asked for has either figures or an error, or never ran."""

    machine: Machine
    rounds: int
    quick: bool
    asked: Sequence[str]
    sections: Sequence[Section] = ()
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        anchors = [
            anchor
            for section in self.sections
            for anchor in (section.id, *(line.id for line in section.measurements))
        ]
        if twice := sorted({anchor for anchor in anchors if anchors.count(anchor) > 1}):
            raise ValueError(f"Ids must be unique in the whole report: {', '.join(twice)}")

    def problems(self) -> dict[str, str]:
        """Return why each section that was asked for is missing."""
        there = {section.id for section in self.sections}
        missing = {name: "the run was ended before" for name in self.asked if name not in there}
        return missing | dict(self.errors)


REPORTS = TypeAdapter(Report)


def save(report: Report, folder: Path) -> None:
    """Write the figures of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = REPORTS.dump_json(report, indent=1, ensure_ascii=False)
    (folder / FIGURES).write_bytes(text + b"\n")


def load(folder: Path) -> Report:
    """Return a run that was saved."""
    return REPORTS.validate_json((folder / FIGURES).read_bytes())


def write(folder: Path) -> None:
    """Make the report and its pictures of the figures in ``folder``."""
    files = render(load(folder))
    for stale in (folder / PLOTS).glob("*.svg"):
        stale.unlink()
    (folder / PLOTS).mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def render(report: Report) -> dict[str, str]:
    """Return the report's files: their names and what is in them."""
    files = {REPORT: markdown(report)}
    for section in report.sections:
        for plot, measurements in pictures(section):
            files[f"{PLOTS}/{plot.id}.svg"] = draw(
                plot, measurements, systems(section.measurements)
            )
    return files


def pictures(section: Section) -> Iterator[tuple[Plot, list[Measurement]]]:
    """Yield the plots of which something was measured."""
    for plot in section.plots:
        shown = [line for line in section.measurements if line.id in plot.measurements]
        if shown:
            yield plot, shown


def markdown(report: Report) -> str:
    """Return report.md."""
    return "\n".join(lines(report)).rstrip() + "\n"


def lines(report: Report) -> Iterator[str]:
    """Yield the report's lines."""
    yield "# Benchmarks"
    yield ""
    yield from opening(report)
    yield from summary(report)
    for section in report.sections:
        yield from chapter(section, report.seconds.get(section.id))
    yield from made_on(report)


def opening(report: Report) -> Iterator[str]:
    """Yield what this is, and what is missing."""
    machine = report.machine
    rounds = f"{report.rounds} round{'s' if report.rounds != 1 else ''}"
    yield (
        f"One run of `python -m benchmarks` on {machine.date}: {rounds}, {machine.cores} cores"
        f" ({machine.processor}), {machine.memory_gib:g} GiB of memory. Everything in a line was"
        " measured side by side in that run, in turning order."
    )
    yield ""
    if report.quick:
        yield "> **Only a trial** (`--quick`): these sizes show that it works, not how fast.\n"
    for name, problem in report.problems().items():
        yield f"> **The section `{name}` is missing**: {problem}\n"
    yield (
        "A cell has the median of the rounds, then the median of the ratios to the line's baseline"
        " within a round (2.0x: twice its figure), then the smallest and the largest round."
        " ↑: higher is better, ↓: lower is better; **bold** is the best of a line."
        " How it is made and read: [README.md](README.md)."
    )
    yield ""


def summary(report: Report) -> Iterator[str]:
    """Yield the lines that the sections consider the most important."""
    headlines = [
        measurement
        for section in report.sections
        for measurement in section.measurements
        if measurement.headline
    ]
    if not headlines:
        return
    yield "## In short"
    yield ""
    yield "| | from the best to the worst |"
    yield "|---|---|"
    for measurement in headlines:
        ranked = ", ".join(
            f"{system} {printed(measurement.median(system))}" for system in measurement.from_best()
        )
        yield f"| [{measurement.what}](#{measurement.id}), {unit(measurement)} | {ranked} |"
    yield ""


def chapter(section: Section, seconds: float | None) -> Iterator[str]:
    """Yield a section."""
    yield f'## <a id="{section.id}"></a>{section.title}'
    yield ""
    yield section.method.strip()
    yield ""
    for measurements in tables(section.measurements):
        yield from table(measurements)
        yield ""
    for plot, _ in pictures(section):
        yield f"![{plot.title}]({PLOTS}/{plot.id}.svg)"
        yield ""
    if section.left_out:
        yield "Left out:"
        yield ""
        yield from (f"- **{what}**: {why}" for what, why in section.left_out.items())
        yield ""
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    took = [f"It took {seconds / 60:.1f} minutes."] if seconds is not None else []
    yield " ".join(([f"Compared: {versions}."] if versions else []) + took)
    yield ""


def tables(measurements: Sequence[Measurement]) -> Iterator[list[Measurement]]:
    """Yield measurements that share a table: those in a row that have a system in common."""
    gathered: list[Measurement] = []
    for measurement in measurements:
        if gathered and not set(systems(gathered)) & set(measurement.values):
            yield gathered
            gathered = []
        gathered.append(measurement)
    if gathered:
        yield gathered


def systems(measurements: Sequence[Measurement]) -> list[str]:
    """Return the columns of a table."""
    return list(dict.fromkeys(itertools.chain.from_iterable(m.values for m in measurements)))


def table(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yield a table: a line for each measurement, a column for each system."""
    columns = systems(measurements)
    yield f"| | unit | {' | '.join(columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    for measurement in measurements:
        what = f'<a id="{measurement.id}"></a>{measurement.what}'
        if measurement.note:
            what += f"<br><small>{measurement.note}</small>"
        cells = " | ".join(cell(measurement, system) for system in columns)
        yield f"| {what} | {unit(measurement)} | {cells} |"


def unit(measurement: Measurement) -> str:
    """Return the unit, and which direction is better."""
    return f"{measurement.unit} {BETTER[measurement.better]}"


def cell(measurement: Measurement, system: str) -> str:
    """Return what a table says of one system."""
    figures = measurement.values.get(system)
    if figures is None:
        return ""
    median = printed(measurement.median(system))
    if len(measurement.values) > 1 and system == measurement.from_best()[0]:
        median = f"**{median}**"
    ratio = measurement.ratio(system)
    if ratio is not None:
        median += f" ({printed_ratio(ratio)})"
    if len(figures) > 1:
        median += f"<br><small>{printed(min(figures))} to {printed(max(figures))}</small>"
    return median


def made_on(report: Report) -> Iterator[str]:
    """Yield the machine and the software."""
    machine = report.machine
    state = ", with changes that are not committed" if machine.dirty else ""
    yield '## <a id="machine"></a>Machine and software'
    yield ""
    for what, value in {
        "Processor": f"{machine.processor}, {machine.cores} cores",
        "Memory": f"{machine.memory_gib:g} GiB",
        "System": machine.system,
        "Load before the start": f"{machine.load:g}",
        "Date": machine.date,
        "Commit": f"{machine.commit}{state}" if machine.commit else "not known",
        **machine.versions,
    }.items():
        yield f"- {what}: {value}"


def printed(figure: float) -> str:
    """Return a figure as the report prints it: with three digits that say something.

    What was counted is whole, and shown so.
    """
    text = _rounded(figure, DIGITS)
    return text.partition(".")[0] if float(figure).is_integer() else text


def printed_ratio(ratio: float) -> str:
    """Return a ratio as the report prints it."""
    return f"{_rounded(ratio, RATIO_DIGITS)}x"


def _rounded(figure: float, digits: int) -> str:
    if not figure:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(figure)))
    return f"{round(figure, decimals):,.{min(max(decimals, 0), MOST_DECIMALS)}f}"
