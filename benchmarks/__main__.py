"""Measure, and make the report of it: ``python -m benchmarks``; README.md says more."""

import importlib
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import FrameType

import click

from benchmarks import machine, report
from benchmarks.figures import Measure, Section

# The sections in their order. Each module has a function ``measure``.
SECTIONS = {
    "queue": "benchmarks.queue",
    "engines": "benchmarks.engines",
    "fairness": "benchmarks.fairness",
    "faults": "benchmarks.faults",
    "promises": "benchmarks.promises",
    "growth": "benchmarks.growth",
    "api": "benchmarks.api",
    "listeners": "benchmarks.listeners",
    "calls": "benchmarks.calls",
    "pages": "benchmarks.pages",
    "traces": "benchmarks.tracing",
    "commits": "benchmarks.commits",
    "storage": "benchmarks.storage",
    "simulated": "benchmarks.simulated",
}
HERE = Path(__file__).parent
ASIDE = machine.REPO / ".pgscribe" / "benchmarks"
DIGITS = 6  # significant; there are no better clocks, and report.json stays readable


def run(asked: list[str], rounds: int, *, quick: bool, folder: Path) -> report.Report:
    """Measure one section after the other; save after each, so that none loses the others."""
    result = report.Report(machine.describe(), rounds, quick, asked)
    for name in asked:
        begin = time.monotonic()
        click.echo(f"{name} …", err=True)
        try:
            measure: Measure = importlib.import_module(SECTIONS[name]).measure
            result = replace(result, sections=[*result.sections, tidy(measure(rounds, quick))])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
            traceback.print_exc()
            message = machine.without_paths(f"{type(error).__name__}: {error}".splitlines()[0])
            result = replace(result, errors={**result.errors, name: message})
        seconds = {**result.seconds, name: round(time.monotonic() - begin, 1)}
        result = replace(result, seconds=seconds)
        report.save(result, folder)
    return result


def tidy(section: Section) -> Section:
    """Round a section's figures."""
    return replace(
        section,
        measurements=[
            replace(
                measurement,
                values={
                    system: [float(f"{figure:.{DIGITS}g}") for figure in figures]
                    for system, figures in measurement.values.items()
                },
            )
            for measurement in section.measurements
        ],
    )


def exit_on_signal(number: int, _frame: FrameType | None) -> None:
    """Leave by way of all clean-up."""
    sys.exit(128 + number)


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Small sizes: to see that it works.")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="May be repeated.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="The report's folder: benchmarks/ for a full run, else .pgscribe/benchmarks/.",
)
@click.option("--render", is_flag=True, help="Measure nothing: make the report again.")
def main(
    rounds: int, only: tuple[str, ...], output: Path | None, *, quick: bool, render: bool
) -> None:
    """Measure everything side by side, and write report.json, report.md and plots/*.svg."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    full = not quick and not only
    folder = output or (HERE if full or render else ASIDE)
    problems: dict[str, str] = {}
    if not render:
        asked = [name for name in SECTIONS if not only or name in only]
        problems = run(asked, rounds, quick=quick, folder=folder).problems()
    report.write(folder)
    click.echo(folder / report.REPORT)
    for name, problem in problems.items():
        click.echo(f"{name} failed: {problem}", err=True)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
