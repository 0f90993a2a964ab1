"""``pgscribe doctor``."""

import sys
from typing import TYPE_CHECKING

import click

from jobs.cli.common import printable

if TYPE_CHECKING:
    from jobs.doctor.examination import Result

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "bright_black"}


def _ids(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> set[str]:
    """Return the ids that were given, separately or with commas between them."""
    if not values:
        return set()
    from jobs.doctor.all import CHECKS

    known = [check.id for check in CHECKS]
    given = {part.strip() for value in values for part in value.split(",") if part.strip()}
    if unknown := sorted(given - {*known}):
        raise click.BadParameter(
            f"there is no check {', '.join(unknown)}; there are: {', '.join(known)}",
            param=parameter,
        )
    return given


@click.command(short_help="Say what is wrong, and how to mend it.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for programs.")
@click.option("--strict", is_flag=True, help="Exit status 1 on warnings, too.")
@click.option("--only", multiple=True, metavar="ID", callback=_ids, help="These checks only.")
@click.option("--skip", multiple=True, metavar="ID", callback=_ids, help="Not these checks.")
def doctor(*, as_json: bool, strict: bool, only: set[str], skip: set[str]) -> None:
    """Look for what is wrong with this set-up, and say how to mend it.

    Run it where a worker or web server runs, with their settings. Exit status 0: nothing has
    failed; 1: something has; 2: the command was not understood. No secret is shown.

    \b
      pgscribe doctor
      pgscribe doctor --only database,migrations
      pgscribe doctor --skip modal --strict --json
    """
    import asyncio
    import json

    from jobs.doctor import examination
    from jobs.doctor.all import CHECKS
    from jobs.doctor.checks import Context

    checks = examination.wanted(CHECKS, only, skip)
    width = max((len(check.id) for check in checks), default=0)

    def show(result: "Result") -> None:
        if not as_json:
            click.echo(_line(result, width))

    results = asyncio.run(examination.examine(checks, Context(), show))
    if as_json:
        click.echo(json.dumps(examination.report(results), indent=2))
    else:
        click.echo(_summary(results))
    sys.exit(0 if examination.succeeded(results, strict=strict) else 1)


def _line(result: "Result", width: int) -> str:
    status = click.style(f"{result.status:<7}", fg=_COLOURS[result.status])
    line = f"{status}  {result.id:<{width}}  {printable(result.seen)}"
    if result.mend:
        line += f"\n{'':<{width + 9}}  → {printable(result.mend)}"
    return line


def _summary(results: "list[Result]") -> str:
    counts = [(sum(r.status == status for r in results), status) for status in _COLOURS]
    return "\n" + ", ".join(f"{count} {status}" for count, status in counts if count)
