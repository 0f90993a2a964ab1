"""``pgscribe jobs``, ``cancel``, ``retry``, ``pause``, ``resume`` and ``limit``: for operators."""

import math
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from jobs.cli.common import (
    CONNECT_TIMEOUT,
    as_json,
    database,
    echo_json,
    echo_rows,
    friendly,
)
from jobs.errors import JobNotFound, PgscribeError

if TYPE_CHECKING:
    import psycopg

    from jobs.models import ProcessingJob

    Act = Callable[[psycopg.AsyncConnection[Any], UUID], Awaitable[ProcessingJob]]

T = TypeVar("T")

STATUSES = ("queued", "processing", "completed", "failed", "cancelled")  # jobs.models.JobStatus


@click.command("jobs", short_help="List the newest jobs, or show one.")
@click.argument("job_id", required=False, type=click.UUID)
@click.option("--status", type=click.Choice(STATUSES), help="Only jobs with this status.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@as_json
@friendly
def show_jobs(*, job_id: UUID | None, status: str | None, limit: int, as_json: bool) -> None:
    """List every owner's newest jobs, or show one as JSON, with the errors of its attempts.

    \b
    For operators: it uses the database.
      pgscribe jobs --status failed
      pgscribe jobs 0b9e6a52-6a4c-4f43-9f4e-1f9a2c0d7b11
      pgscribe jobs --limit 1000 --json | jq '.[] | select(.error_code == "timeout") | .id'
    """
    from jobs import service
    from jobs.cli import terminal
    from jobs.models import JobStatus, JobSummary

    async def one(conn: "psycopg.AsyncConnection[Any]", job_id: UUID) -> dict[str, Any]:
        shown = (await service.get(conn, job_id)).model_dump(mode="json")
        return {**shown, "attempts": await service.attempts(conn, job_id)}

    async def several(conn: "psycopg.AsyncConnection[Any]") -> list[JobSummary]:
        wanted = JobStatus(status) if status else None
        return (await service.list_jobs(conn, status=wanted, limit=limit)).jobs

    if job_id is not None:
        wanted = job_id
        echo_json(_on_database(lambda conn: one(conn, wanted)))
        return
    none = f"No job is {status}" if status else "There are no jobs"
    echo_rows(_on_database(several), terminal.summary, as_json=as_json, none=none)


def _on_database(act: "Callable[[psycopg.AsyncConnection[Any]], Awaitable[T]]") -> T:
    import asyncio

    import psycopg

    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()

    async def run() -> T:
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, prepare_threshold=None, connect_timeout=CONNECT_TIMEOUT
        ) as conn:
            return await act(conn)

    try:
        return asyncio.run(run())
    except PgscribeError as exc:
        raise _to_operator(exc) from exc


@click.command(short_help="Cancel jobs.")
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def cancel(job_ids: tuple[UUID, ...]) -> None:
    """Cancel jobs of any owner: at once while they wait, within seconds while they run.

    \b
    Exit status 1 if one of them could not be cancelled; the others are.
      pgscribe cancel 0b9e6a52-6a4c-4f43-9f4e-1f9a2c0d7b11
    """
    from jobs import service

    _change_jobs(service.cancel, job_ids)


@click.command(short_help="Run failed or cancelled jobs again.")
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def retry(job_ids: tuple[UUID, ...]) -> None:
    """Run failed or cancelled jobs of any owner again, with all their attempts.

    \b
    Exit status 1 if one of them could not be run again; the others are.
      pgscribe retry 0b9e6a52-6a4c-4f43-9f4e-1f9a2c0d7b11
      pgscribe retry $(pgscribe jobs --status failed --json | jq -r '.[].id')
    """
    from jobs import service

    _change_jobs(service.retry, job_ids)


def _change_jobs(act: "Act", job_ids: tuple[UUID, ...]) -> None:
    """Change jobs of any owner; one that can't be is no reason to stop."""

    async def run(conn: "psycopg.AsyncConnection[Any]") -> bool:
        refused = False
        for job_id in job_ids:
            try:
                click.echo(f"{job_id}  {(await act(conn, job_id)).status}")
            except PgscribeError as exc:
                refused = True
                click.echo(f"{job_id}  {_to_operator(exc)}", err=True)
        return refused

    sys.exit(_on_database(run))


def _to_operator(exc: PgscribeError) -> PgscribeError:
    """Say of a job that is not there what is true for who sees all of them."""
    if isinstance(exc, JobNotFound):
        return JobNotFound("There is no such job; `pgscribe jobs` lists the newest")
    return exc


_owners = click.option(
    "--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs."
)
_queue = click.option(
    "--queue", help="transcription, webhooks or maintenance [default: transcription]."
)


@click.command(short_help="Start no more jobs, of a queue or of an owner.")
@_owners
@_queue
@friendly
def pause(*, owners: tuple[UUID, ...], queue: str | None) -> None:
    """Start no more jobs of a queue or of an owner; running ones go on.

    \b
      pgscribe pause
      pgscribe pause --owner 00000000-0000-4000-8000-000000000001
      pgscribe pause --queue webhooks
    """
    _pause_or_resume("pause", owners, queue, "is paused; what runs goes on")


@click.command(short_help="Start them again.")
@_owners
@_queue
@friendly
def resume(*, owners: tuple[UUID, ...], queue: str | None) -> None:
    """Start jobs of a paused queue or owner again.

    \b
      pgscribe resume
      pgscribe resume --owner 00000000-0000-4000-8000-000000000001
    """
    _pause_or_resume("resume", owners, queue, "is not paused")


def _pause_or_resume(change: str, owners: tuple[UUID, ...], queue: str | None, now: str) -> None:
    if owners and queue:
        raise click.UsageError("Give either --owner or --queue.")
    from jobs.refusals import refusals
    from jobs.sql import OPERATE

    with database() as conn, conn.transaction(), refusals():
        for owner in owners:
            conn.execute(OPERATE[f"{change}_owner"], {"owner": owner})
        if not owners:
            conn.execute(OPERATE[f"{change}_queue"], {"name": queue or "transcription"})
    for name in [f"owner {owner}" for owner in owners] or [f"queue {queue or 'transcription'}"]:
        click.echo(f"{name} {now}")


class _Amount(click.FloatRange):
    """A number, perhaps an infinite one; what is none would limit nothing, and not say so."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


# More than anybody has, and no more than the columns hold.
_COUNT = 10**9
_BYTES = 10**15


@click.command(short_help="Show or set what owners may have.")
@click.argument("owner", required=False, type=click.UUID)
@click.option(
    "--default", "everybody", is_flag=True, help="For owners without limits of their own."
)
@click.option("--max-running", type=click.IntRange(1, _COUNT), help="Jobs at a time [100].")
@click.option("--weight", type=_Amount(0.001, 1000), help="Share; others have 1.")
@click.option("--max-queued", type=click.IntRange(0, _COUNT), help="Jobs that wait [10000].")
@click.option("--max-audio-seconds-per-month", type=_Amount(0), help="Of calendar months, UTC.")
@click.option("--max-file-bytes", type=click.IntRange(0, _BYTES), help="Of one recording.")
@click.option("--max-duration", type=_Amount(0), help="Seconds of one recording.")
@click.option("--reset", is_flag=True, help="Set them as if none had ever been given.")
@as_json
@friendly
def limit(
    *, owner: UUID | None, everybody: bool, reset: bool, as_json: bool, **values: float | None
) -> None:
    """Set all limits of an OWNER, or with --default those of owners who have none of their own.

    \b
    What is not given is as --default has it; there, as shown in brackets, or without a limit.
    Without any it changes nothing. Either way it prints what holds then.
      pgscribe limit 00000000-0000-4000-8000-000000000001
      pgscribe limit 00000000-0000-4000-8000-000000000001 --max-audio-seconds-per-month inf
      pgscribe limit --default --max-audio-seconds-per-month 360000 --max-duration 14400
      pgscribe limit 00000000-0000-4000-8000-000000000001 --reset
    """
    if everybody == (owner is not None):
        raise click.UsageError("Give either an owner or --default.")
    if everybody and values["weight"] is not None:
        raise click.UsageError("--weight is an owner's: others have 1.")
    given = any(value is not None for value in values.values())
    if given and reset:
        raise click.UsageError("--reset goes with no other limit: it takes all of them back.")
    with database() as conn:
        if owner is not None:
            _check_owner(conn, owner)
        if given or reset:
            _set_limits(conn, owner, values)
        rows = _read_limits(conn, owner)
    echo_rows(rows, _limit_line, as_json=as_json, none="")


def _check_owner(conn: "psycopg.Connection[Any]", owner: UUID) -> None:
    from jobs.errors import UserNotFound
    from jobs.sql import OPERATE

    if not conn.execute(OPERATE["find_users"], {"user": str(owner)}).fetchall():
        raise UserNotFound(f"owner: there is no user {owner} in auth.users")


def _set_limits(
    conn: "psycopg.Connection[Any]", owner: UUID | None, values: dict[str, float | None]
) -> None:
    from jobs.sql import OPERATE

    query = OPERATE["limit_owners" if owner is None else "limit_owner"]
    conn.execute(query, {"owner": owner, **values})


def _read_limits(conn: "psycopg.Connection[Any]", owner: UUID | None) -> list[dict[str, Any]]:
    from psycopg.rows import dict_row

    from jobs.sql import OPERATE

    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(OPERATE["show_limits"], {"owner": owner}).fetchall()


def _limit_line(row: dict[str, Any]) -> str:
    """Return a limit as a line; an infinite one is none."""
    value = "no limit" if row["value"] in {None, float("inf")} else f"{row['value']:.15g}"
    return f"{row['limit']:<28} {value:<12} {'' if row['is_own'] else 'default'}".rstrip()
