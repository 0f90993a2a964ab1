"""The ``pgscribe`` command."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from uuid import UUID

import click

from jobs import __version__
from jobs.errors import PgscribeError

HOME = Path(".pgscribe")


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show known errors as one plain message, without a stack."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PgscribeError as exc:
            raise click.ClickException(str(exc)) from exc
        except Exception as exc:
            psycopg = sys.modules.get("psycopg")  # imported only by what uses the database
            if psycopg is None or not isinstance(exc, psycopg.OperationalError):
                raise
            raise click.ClickException(f"The database is out of reach: {exc}") from exc

    return wrapped


def _setup_logging() -> None:
    import logging

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _stop_with_stdin() -> None:
    """End this process as SIGTERM would, once whoever started it is gone."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


stop_with_stdin = click.option(
    "--stop-with-stdin", is_flag=True, hidden=True, help="Stop when standard input ends."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="pgscribe")
def main() -> None:
    r"""Transcription jobs in the Postgres you already have.

    \b
    Try it, with nothing but this machine:
      pgscribe dev                     everything embedded; prints a URL and a token
      pgscribe transcribe talk.mp3     in another terminal: upload, wait, print the text

    \b
    Run it for real (settings: PGSCRIBE_DATABASE_URL, PGSCRIBE_JWT_SECRET, … or a .env file):
      pgscribe migrate                 prepare the database
      pgscribe web                     the REST API
      pgscribe worker                  as many as you like
      pgscribe deploy                  put the functions on Modal, for PGSCRIBE_COMPUTE=modal
    """


@main.command()
@click.option("--port", default=8000, show_default=True, help="Another one if it is taken.")
@_friendly
def dev(port: int) -> None:
    """Run everything on this machine and stay up until Ctrl-C.

    Postgres, web server and worker are started together; their data lies under .pgscribe/.
    While it runs, the other commands in this folder work on it.
    """
    import shutil
    import time

    from jobs.dev import USER_ID, Embedded, exit_on_signals

    exit_on_signals()
    program = "pgscribe" if shutil.which("pgscribe") else os.path.relpath(sys.argv[0])
    try:
        with Embedded(HOME, port=port) as embedded:
            click.echo(
                f"\npgscribe is up.\n"
                f"  REST API   {embedded.url}\n"
                f"  database   {embedded.postgres.url()}\n"
                f"  user       {USER_ID}\n"
                f"  token      {embedded.token}\n"
                f"Try: {program} transcribe examples/sample.mp3      Stop: Ctrl-C\n"
            )
            while True:
                embedded.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        click.echo("Stopped.")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@stop_with_stdin
@_friendly
def web(*, host: str, port: int, stop_with_stdin: bool) -> None:
    """Serve the REST API."""
    from jobs.settings import Settings
    from web import server
    from web.app import create_app

    _setup_logging()
    if stop_with_stdin:
        _stop_with_stdin()
    server.run(create_app(Settings.load()), host=host, port=port)


@main.command()
@click.option(
    "--concurrency", type=click.IntRange(1), help="Jobs at a time [PGSCRIBE_WORKER_CONCURRENCY]."
)
@stop_with_stdin
@_friendly
def worker(*, concurrency: int | None, stop_with_stdin: bool) -> None:
    """Run jobs as they come in, woken by LISTEN/NOTIFY.

    On SIGTERM or Ctrl-C it takes no more jobs, lets the running ones finish for
    PGSCRIBE_SHUTDOWN_TIMEOUT seconds and puts the rest back into the queue.
    """
    import asyncio

    from jobs.settings import Settings
    from jobs.worker import run_until_signalled

    _setup_logging()
    overrides = {} if concurrency is None else {"worker_concurrency": concurrency}
    settings = Settings.load(**overrides)
    if stop_with_stdin:
        _stop_with_stdin()
    asyncio.run(run_until_signalled(settings))


@main.command()
@click.option("--status", is_flag=True, help="Only say what is missing; exit status 1 if anything.")
@click.option(
    "--export",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the files for `supabase db push`, usually to supabase/migrations.",
)
@_friendly
def migrate(*, status: bool, export: Path | None) -> None:
    """Bring the database up to date: procrastinate's migrations, then pgscribe's.

    The ledger is the Supabase CLI's, so `supabase db push` over the exported files does the same.
    """
    import psycopg

    from db import migrate as runner
    from jobs.settings import Settings

    if export is not None:
        click.echo(f"{len(runner.export(export))} files written to {export}")
        return
    url = Settings.load().database_url.get_secret_value()
    if status:
        with psycopg.connect(url, autocommit=True) as conn:
            missing = runner.pending(conn)
        for migration in missing:
            click.echo(f"missing  {migration.filename}")
        click.echo(f"{len(missing)} of {len(runner.migrations())} migrations are missing")
        sys.exit(bool(missing))
    count = runner.migrate(url, lambda migration: click.echo(f"applied  {migration.filename}"))
    click.echo(f"Up to date; {count} applied now")


@main.command()
@click.option("--check", is_flag=True, help="Deploy nothing; exit status 1 unless all is in place.")
@click.option("--environment", metavar="NAME", help="Of Modal's [MODAL_ENVIRONMENT].")
@_friendly
def deploy(*, check: bool, environment: str | None) -> None:
    """Put the functions that workers call on Modal, and see that they are what is called.

    Settings and token are checked first. Afterwards all functions are looked up by name, and a
    container without a GPU is started, which says what code and settings it has. Settings:
    PGSCRIBE_MODAL_… in the environment or in .env, see docs/modal.md. Token: `modal token new`.
    """
    import asyncio

    with _modal():
        from jobs import deploy as deployment

    try:
        asyncio.run(deployment.run(click.echo, check=check, environment=environment))
    except KeyboardInterrupt:
        click.echo("Stopped; `pgscribe deploy --check` says what is deployed.", err=True)
        sys.exit(130)
    if check:
        click.echo("Up to date")
        return
    variables = f" and MODAL_ENVIRONMENT={environment}" if environment else ""
    click.echo(f"Done; workers use it with PGSCRIBE_COMPUTE=modal{variables}")


@contextmanager
def _modal() -> Iterator[None]:
    """Show what Modal's client finds wrong with its configuration as it is imported."""
    try:
        yield
    except Exception as exc:
        if type(exc).__module__ != "modal.exception":
            raise
        raise click.ClickException(
            "Modal's configuration is not usable: correct ~/.modal.toml, or the file that "
            "MODAL_CONFIG_PATH names."
        ) from exc


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}


@main.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--model", help="tiny, base, small, medium, large, turbo, … [default: base]")
@click.option("--language", help="Language spoken, such as en [default: detected]")
@click.option("--translate", is_flag=True, help="Translate into English.")
@click.option("--word-timestamps", is_flag=True, help="Times for each word (in json).")
@click.option("--initial-prompt", help="Names and words to expect.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["text", "timestamps", "json"]),
    default="text",
    show_default=True,
)
@_friendly
def transcribe(  # noqa: PLR0913 - one argument per option
    *,
    files: tuple[Path, ...],
    model: str | None,
    language: str | None,
    translate: bool,
    word_timestamps: bool,
    initial_prompt: str | None,
    output: str,
) -> None:
    r"""Upload FILES to a pgscribe server, wait and print their transcripts.

    \b
    The server is the one that runs with `pgscribe dev` in this folder, or PGSCRIBE_URL with
    PGSCRIBE_TOKEN. Exit status 1 if any file failed.
      pgscribe transcribe talk.mp3
      pgscribe transcribe --format timestamps --language de *.m4a > all.txt
    """
    from jobs import terminal
    from jobs.client import Client
    from jobs.models import Transcript
    from jobs.settings import ClientSettings

    options = _options(
        model=model,
        language=language,
        task="translate" if translate else None,
        word_timestamps=word_timestamps,
        initial_prompt=initial_prompt,
    )
    settings = ClientSettings.load()
    failed = False
    with Client(settings.url, settings.token.get_secret_value()) as client:
        submitted = [(file, client.process(client.upload(file), options)) for file in files]
        for file, job_id in submitted:
            with terminal.progress(file.name) as on_change:
                job = client.wait(job_id, on_change)
            if job.result is None:
                failed = True
                click.echo(f"{file.name}: {job.status}: {job.error}", err=True)
            elif output == "json":
                click.echo(json.dumps({"file": file.name, **job.result}, ensure_ascii=False))
            else:
                transcript = Transcript.from_dict(job.result)
                text = terminal.lines(transcript) if output == "timestamps" else [transcript.text]
                click.echo("\n".join(text))
    sys.exit(failed)


@main.command("jobs")
@click.argument("job_id", required=False, type=click.UUID)
@click.option("--status", help="Only jobs with this status.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@_friendly
def show_jobs(*, job_id: UUID | None, status: str | None, limit: int) -> None:
    """List every owner's newest jobs, or show one as JSON (for operators: uses the database)."""
    import asyncio

    import psycopg

    from jobs import service, terminal
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
            for job in await service.list_jobs(conn, status=wanted, limit=limit):
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


@main.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@_friendly
def cancel(job_ids: tuple[UUID, ...]) -> None:
    """Cancel jobs of any owner: at once while they wait, within seconds while they run."""
    _change_jobs("cancel", job_ids)


@main.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@_friendly
def retry(job_ids: tuple[UUID, ...]) -> None:
    """Run failed or cancelled jobs again, with all their attempts."""
    _change_jobs("retry", job_ids)


@main.command()
@click.option("--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs.")
@click.option("--queue", default="transcription", show_default=True)
@_friendly
def pause(*, owners: tuple[UUID, ...], queue: str) -> None:
    """Start no more jobs of a queue or of an owner; running ones go on."""
    _pause_or_resume("pause", owners, queue)


@main.command()
@click.option("--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs.")
@click.option("--queue", default="transcription", show_default=True)
@_friendly
def resume(*, owners: tuple[UUID, ...], queue: str) -> None:
    """Start jobs of a paused queue or owner again."""
    _pause_or_resume("resume", owners, queue)


def _pause_or_resume(change: str, owners: tuple[UUID, ...], queue: str) -> None:
    from jobs.sql import OPERATE

    if owners:
        _on_database(OPERATE[f"{change}_owner"], [{"owner": owner} for owner in owners])
    else:
        _on_database(OPERATE[f"{change}_queue"], [{"name": queue}])


@main.command()
@click.argument("owner", type=click.UUID)
@click.option("--max-running", type=click.IntRange(1), help="Jobs at a time [the queue's default].")
@click.option("--weight", type=click.FloatRange(0, min_open=True), help="Share; others have 1.")
@_friendly
def limit(*, owner: UUID, max_running: int | None, weight: float | None) -> None:
    """Set how many jobs an owner may have running, and how large their share is."""
    from jobs.sql import OPERATE

    values = {"owner": owner, "max_running": max_running, "weight": weight}
    _on_database(OPERATE["limit_owner"], [values])


@main.command()
@click.option("--user", "user_id", required=True, type=click.UUID, help="Id in auth.users.")
@click.option(
    "--lifetime", default=3600, show_default=True, type=click.IntRange(1), help="Seconds."
)
@_friendly
def token(user_id: UUID, lifetime: int) -> None:
    r"""Print a token for a user, signed with PGSCRIBE_JWT_SECRET.

    \b
      curl -H "Authorization: Bearer $(pgscribe token --user $USER_ID)" localhost:8000/jobs
    """
    from jobs.settings import TokenSettings
    from web.auth import issue_token

    click.echo(issue_token(TokenSettings.load(), user_id, lifetime=lifetime))


if __name__ == "__main__":
    main()
