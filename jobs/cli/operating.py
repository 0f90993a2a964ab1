"""``pgscribe jobs``, ``cancel``, ``retry``, ``pause``, ``resume`` and ``limit``: for operators."""

import json
import sys
from typing import Any
from uuid import UUID

import click

from jobs.cli.common import friendly
from jobs.errors import PgscribeError


@click.command("jobs")
@click.argument("job_id", required=False, type=click.UUID)
@click.option("--status", help="Only jobs with this status.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@friendly
def show_jobs(*, job_id: UUID | None, status: str | None, limit: int) -> None:
    """List every owner's newest jobs, or show one as JSON (for operators: uses the database)."""
    import asyncio

    import psycopg

    from jobs import service
    from jobs.cli import terminal
    from jobs.models import JobStatus
    from jobs.settings import Settings

    wanted = JobStatus.parse(status) if status else None
    url = Settings.load().database_url.get_secret_value()

    async def show() -> None:
        async with await psycopg.AsyncConnection.connect(url) as conn:
            if job_id is not None:
                shown = (await service.get(conn, job_id)).model_dump(mode="json")
                shown["attempts"] = await service.attempts(conn, job_id)
                click.echo(json.dumps(shown, indent=2, ensure_ascii=False, default=str))
                return
            page = await service.list_jobs(conn, status=wanted, limit=limit)
            for job in page.jobs:
                click.echo(terminal.summary(job))

    asyncio.run(show())


def _on_database(query: bytes, rows: list[dict[str, Any]]) -> None:
    """Run an operator's statement once for each row of values."""
    import psycopg

    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()
    with psycopg.connect(url, prepare_threshold=None) as conn:
        for values in rows:
            conn.execute(query, values)


def _change_jobs(change: str, job_ids: tuple[UUID, ...]) -> None:
    """Cancel or retry jobs of any owner; one that can't be is no reason to stop."""
    import asyncio

    import psycopg

    from jobs import service
    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()
    act = {"cancel": service.cancel, "retry": service.retry}[change]

    async def run() -> bool:
        refused = False
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
            for job_id in job_ids:
                try:
                    job = await act(conn, job_id)
                except PgscribeError as exc:
                    refused = True
                    click.echo(f"{job_id}  {exc}", err=True)
                else:
                    click.echo(f"{job_id}  {job.status}")
        return refused

    sys.exit(asyncio.run(run()))


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def cancel(job_ids: tuple[UUID, ...]) -> None:
    """Cancel jobs of any owner: at once while they wait, within seconds while they run."""
    _change_jobs("cancel", job_ids)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def retry(job_ids: tuple[UUID, ...]) -> None:
    """Run failed or cancelled jobs again, with all their attempts."""
    _change_jobs("retry", job_ids)


@click.command()
@click.option("--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs.")
@click.option("--queue", default="transcription", show_default=True)
@friendly
def pause(*, owners: tuple[UUID, ...], queue: str) -> None:
    """Start no more jobs of a queue or of an owner; running ones go on."""
    _pause_or_resume("pause", owners, queue)


@click.command()
@click.option("--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs.")
@click.option("--queue", default="transcription", show_default=True)
@friendly
def resume(*, owners: tuple[UUID, ...], queue: str) -> None:
    """Start jobs of a paused queue or owner again."""
    _pause_or_resume("resume", owners, queue)


def _pause_or_resume(change: str, owners: tuple[UUID, ...], queue: str) -> None:
    from jobs.sql import OPERATE

    if owners:
        _on_database(OPERATE[f"{change}_owner"], [{"owner": owner} for owner in owners])
    else:
        _on_database(OPERATE[f"{change}_queue"], [{"name": queue}])


@click.command()
@click.argument("owner", required=False, type=click.UUID)
@click.option(
    "--default", "everybody", is_flag=True, help="For owners without limits of their own."
)
@click.option("--max-running", type=click.IntRange(1), help="Jobs at a time [100].")
@click.option("--weight", type=click.FloatRange(0, min_open=True), help="Share; others have 1.")
@click.option("--max-queued", type=click.IntRange(0), help="Jobs that wait [10000].")
@click.option(
    "--max-audio-seconds-per-month", type=click.FloatRange(0), help="Of calendar months, UTC."
)
@click.option("--max-file-bytes", type=click.IntRange(0), help="Of one recording.")
@click.option("--max-duration", type=click.FloatRange(0), help="Seconds of one recording.")
@friendly
def limit(*, owner: UUID | None, everybody: bool, weight: float | None, **values: Any) -> None:
    """Set all limits of an OWNER, or with --default those of owners who have none of their own.

    \b
    What is not given is as --default has it; there, as shown in brackets, or without a limit.
      pgscribe limit --default --max-audio-seconds-per-month 360000 --max-duration 14400
      pgscribe limit 00000000-0000-4000-8000-000000000001 --max-audio-seconds-per-month inf
    """
    from jobs.sql import OPERATE

    if everybody == (owner is not None):
        raise click.UsageError("Name an owner, or give --default.")
    if everybody and weight is not None:
        raise click.UsageError("--weight is an owner's: others have 1.")
    query = OPERATE["limit_owners" if everybody else "limit_owner"]
    _on_database(query, [{"owner": owner, "weight": weight, **values}])
