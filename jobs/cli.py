"""The ``pgscribe`` command."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from jobs import __version__
from jobs.cli_doctor import doctor
from jobs.cli_webhooks import webhooks
from jobs.commands import database, duration, friendly
from jobs.errors import PgscribeError
from jobs.scopes import USUAL_SCOPES, Scope

if TYPE_CHECKING:
    from jobs.settings import Settings

HOME = Path(".pgscribe")


def _observe(settings: "Settings", name: str) -> None:
    """Set up this process's log and traces."""
    from jobs import logs, telemetry

    logs.setup(settings.log_format, secrets=settings.secrets())
    telemetry.configure(f"pgscribe-{name}")


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
    """Transcription jobs in the Postgres you already have.

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
      pgscribe setup-storage           make the bucket, for PGSCRIBE_STORAGE=supabase
      pgscribe make-keys               secrets of a self-hosted Supabase, for docker compose
      pgscribe doctor                  what is wrong with all of it, and how to mend it
    """


@main.command()
@click.option("--port", default=8000, show_default=True, help="Another one if it is taken.")
@friendly
def dev(port: int) -> None:
    """Run everything on this machine and stay up until Ctrl-C.

    Postgres, web server and worker are started together; their data lies under .pgscribe/.
    While it runs, the other commands in this folder work on it.
    """
    import shutil
    import time

    from jobs.dev import USER_EMAIL, USER_ID, Embedded, exit_on_signals

    exit_on_signals()
    program = "pgscribe" if shutil.which("pgscribe") else os.path.relpath(sys.argv[0])
    try:
        with Embedded(HOME, port=port) as embedded:
            click.echo(
                f"\npgscribe is up.\n"
                f"  web app    {embedded.url}/app\n"
                f"{_sign_in(USER_EMAIL, embedded.sign_in_password)}"
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


def _sign_in(email: str, password: str | None) -> str:
    """Return the lines that say how to sign in to the web app of ``pgscribe dev``."""
    if password is None:
        return "  sign in    with the Supabase project that your settings name\n"
    return f"  e-mail     {email}, or any other\n  password   {password}\n"


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True)
@stop_with_stdin
@friendly
def web(*, host: str, port: int, stop_with_stdin: bool) -> None:
    """Serve the REST API and the web app."""
    import asyncio

    from jobs.settings import Settings
    from web import server
    from web.access_log import hide_links
    from web.app import create_app
    from web.sign_in import refuse_other_databases, refuse_other_hosts

    settings = Settings.load()
    _observe(settings, "web")
    hide_links()
    if stop_with_stdin:
        _stop_with_stdin()
    refuse_other_hosts(settings, host)
    asyncio.run(refuse_other_databases(settings))
    server.run(create_app(settings), host=host, port=port, trusted_proxies=settings.trusted_proxies)


@main.command()
@click.option(
    "--concurrency", type=click.IntRange(1), help="Jobs at a time [PGSCRIBE_WORKER_CONCURRENCY]."
)
@click.option(
    "--health-host", help="Address of /healthz, /readyz, /metrics [PGSCRIBE_WORKER_HEALTH_HOST]."
)
@click.option(
    "--health-port",
    type=click.IntRange(1, 65535),
    help="Port of these; without one, there are none [PGSCRIBE_WORKER_HEALTH_PORT].",
)
@stop_with_stdin
@friendly
def worker(
    *,
    concurrency: int | None,
    health_host: str | None,
    health_port: int | None,
    stop_with_stdin: bool,
) -> None:
    """Run jobs as they come in, woken by LISTEN/NOTIFY.

    On SIGTERM or Ctrl-C it takes no more jobs, lets the running ones finish for
    PGSCRIBE_SHUTDOWN_TIMEOUT seconds and puts the rest back into the queue.
    """
    import asyncio

    from jobs.settings import Settings
    from jobs.worker import run_until_signalled

    given = {
        "worker_concurrency": concurrency,
        "worker_health_host": health_host,
        "worker_health_port": health_port,
    }
    settings = Settings.load(**{name: value for name, value in given.items() if value is not None})
    _observe(settings, "worker")
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
@friendly
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
    try:
        count = runner.migrate(
            url,
            lambda migration: click.echo(f"applied  {migration.filename}"),
            lambda problem: click.echo(f"waiting  {problem}", err=True),
        )
    except runner.MigrationBlocked as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"Up to date; {count} applied now")


@main.command()
@click.option("--check", is_flag=True, help="Deploy nothing; exit status 1 unless all is in place.")
@click.option("--environment", metavar="NAME", help="Of Modal's [MODAL_ENVIRONMENT].")
@friendly
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


@main.command("setup-storage")
@click.option("--check", is_flag=True, help="Change nothing; exit status 1 unless all is in place.")
@friendly
def setup_storage(*, check: bool) -> None:
    """Make the bucket for audio in Supabase Storage, with its policies, and try it.

    A small file is uploaded, played in part and deleted. Settings: PGSCRIBE_SUPABASE_URL,
    PGSCRIBE_SUPABASE_SECRET_KEY, PGSCRIBE_DATABASE_URL, PGSCRIBE_MAX_UPLOAD_BYTES.
    """
    import asyncio

    from jobs.settings import Settings
    from jobs.storage import setup

    asyncio.run(setup.run(Settings.load(), click.echo, check=check))
    click.echo("Up to date; use it with PGSCRIBE_STORAGE=supabase")


@main.command("make-keys")
@click.option("--missing", is_flag=True, help="Add what .env lacks; change nothing that it has.")
@click.option("--renew", "names", multiple=True, metavar="NAME", help="Replace a secret of .env.")
@friendly
def make_keys(*, missing: bool, names: tuple[str, ...]) -> None:
    """Make the secrets and keys of a self-hosted Supabase: .env, from .env.example.

    Run it in the folder with docker-compose.yml. An .env that exists is never overwritten. No
    secret is printed; only the file's owner can read it. See docs/self-hosting.md.
    """
    from jobs import self_hosting

    template, target = Path(".env.example"), Path(".env")
    if missing and names:
        raise click.UsageError("Give either --missing or --renew.")
    if names:
        made = self_hosting.renew(target, names)
    elif missing:
        made = self_hosting.complete(template, target)
    else:
        made = self_hosting.create(template, target)
    for name in made:
        click.echo(f"made  {name}")
    click.echo(f"{target} has all secrets; keep a copy where your backups are")


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
@friendly
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
    """Upload FILES to a pgscribe server, wait and print their transcripts.

    \b
    The server is the one that runs with `pgscribe dev` in this folder, or PGSCRIBE_URL with
    PGSCRIBE_TOKEN. Exit status 1 if any file failed.
      pgscribe transcribe talk.mp3
      pgscribe transcribe --format timestamps --language de *.m4a > all.txt
    """
    from jobs import terminal
    from jobs.client import JobClient
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
    with JobClient(settings.url, settings.token.get_secret_value()) as client:
        submitted = [(file, client.submit(client.upload(file), options)) for file in files]
        for file, job_id in submitted:
            with terminal.progress(file.name) as on_change:
                job = client.wait(job_id, on_change=on_change)
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
@friendly
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


@main.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def cancel(job_ids: tuple[UUID, ...]) -> None:
    """Cancel jobs of any owner: at once while they wait, within seconds while they run."""
    _change_jobs("cancel", job_ids)


@main.command()
@click.argument("job_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def retry(job_ids: tuple[UUID, ...]) -> None:
    """Run failed or cancelled jobs again, with all their attempts."""
    _change_jobs("retry", job_ids)


@main.command()
@click.option("--owner", "owners", multiple=True, type=click.UUID, help="Only this owner's jobs.")
@click.option("--queue", default="transcription", show_default=True)
@friendly
def pause(*, owners: tuple[UUID, ...], queue: str) -> None:
    """Start no more jobs of a queue or of an owner; running ones go on."""
    _pause_or_resume("pause", owners, queue)


@main.command()
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


@main.command()
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


def _lifetime(_: click.Context, __: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    lifetime = duration(value)
    if not lifetime:
        raise click.BadParameter("give hours or days, such as 12h or 90d")
    return lifetime


@main.group()
def keys() -> None:
    """Make, list and revoke API keys, with which services use the REST API.

    \b
      pgscribe keys create nightly-import --user $USER_ID --scope jobs:write --expires 90d
      curl -H "Authorization: Bearer pgs_…" localhost:8000/jobs
      pgscribe keys create backend --any-user       requests state: Pgscribe-User: <user id>
    """


@keys.command("create")
@click.argument("name")
@click.option("--user", "user_id", type=click.UUID, help="Act for this user of auth.users.")
@click.option("--any-user", is_flag=True, help="Act for the user that each request states.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What for; may be given several times [default: everything but operate].",
)
@click.option("--expires", callback=_lifetime, help="Hours or days, such as 90d [default: never].")
@click.option(
    "--requests-per-minute", type=click.IntRange(1), help="[default: PGSCRIBE_RATE_LIMIT]"
)
@friendly
def create_key(  # noqa: PLR0913 - one argument per option
    *,
    name: str,
    user_id: UUID | None,
    any_user: bool,
    scopes: tuple[str, ...],
    expires: timedelta | None,
    requests_per_minute: int | None,
) -> None:
    """Make a key and print it, once: only its hash is stored."""
    if any_user == (user_id is not None):
        raise click.UsageError("Give either --user or --any-user.")
    from jobs import keys as api_keys

    with database() as conn:
        stored, key = api_keys.create(
            conn,
            name,
            user_id=user_id,
            scopes={Scope(scope) for scope in scopes or USUAL_SCOPES},
            requests_per_minute=requests_per_minute,
            lifetime=expires,
        )
    click.echo(key)
    until = f"expires {stored.expires_at:%Y-%m-%d %H:%M %Z}" if stored.expires_at else "no expiry"
    click.echo(f"Key {stored.id}, {until}. It is not shown again: store it safely.", err=True)


@keys.command("list")
@friendly
def list_keys() -> None:
    """List all keys, oldest first, with when each was last used."""
    from jobs import keys as api_keys

    with database() as conn:
        for key in api_keys.list_all(conn):
            used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never used"
            whose = key.user_id or "any user"
            scopes = ",".join(key.scopes)
            click.echo(
                f"{key.id}  {key.prefix}…  {key.state:<7}  {used:<15}  {whose!s:<36}  {scopes}  "
                f"{key.name}"
            )


@keys.command("revoke")
@click.argument("key_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def revoke_keys(key_ids: tuple[UUID, ...]) -> None:
    """Refuse keys from now on, by their ids, on all servers at once."""
    from jobs import keys as api_keys

    with database() as conn:
        for key_id in key_ids:
            api_keys.revoke(conn, key_id)
            click.echo(f"{key_id}  revoked")


@main.group()
def operators() -> None:
    """Say who is an operator: sees the queue and everybody's jobs, may pause, cancel and retry.

    \b
    What was said in the recordings of others they don't see. See docs/operate.md.
      pgscribe operators add anna@example.org
      pgscribe operators remove anna@example.org
    """


@operators.command("add")
@click.argument("users", nargs=-1, required=True, metavar="USER_ID_OR_EMAIL...")
@friendly
def add_operators(users: tuple[str, ...]) -> None:
    """Make users operators, from their next request on."""
    from jobs import operate

    with database() as conn:
        for user in users:
            click.echo(f"{operate.add(conn, user)}  is an operator")


@operators.command("list")
@friendly
def list_operators() -> None:
    """List all operators, in the order in which they were added."""
    from jobs import operate

    with database() as conn:
        for operator in operate.list_all(conn):
            email = operator.email or "(no e-mail address)"
            click.echo(f"{operator.user_id}  since {operator.added_at:%Y-%m-%d}  {email}")


@operators.command("remove")
@click.argument("users", nargs=-1, required=True, metavar="USER_ID_OR_EMAIL...")
@friendly
def remove_operators(users: tuple[str, ...]) -> None:
    """Make users operators no more, from their next request on."""
    from jobs import operate

    with database() as conn:
        for user in users:
            click.echo(f"{operate.remove(conn, user)}  is no operator")


main.add_command(webhooks)
main.add_command(doctor)


@main.command()
@click.option("--user", "user_id", required=True, type=click.UUID, help="Id in auth.users.")
@click.option(
    "--lifetime", default=3600, show_default=True, type=click.IntRange(1), help="Seconds."
)
@friendly
def token(user_id: UUID, lifetime: int) -> None:
    """Print a token for a user, signed with PGSCRIBE_JWT_SECRET.

    \b
      curl -H "Authorization: Bearer $(pgscribe token --user $USER_ID)" localhost:8000/jobs
    """
    from jobs.settings import TokenSettings
    from web.auth import issue_token

    click.echo(issue_token(TokenSettings.load(), user_id, lifetime=lifetime))


if __name__ == "__main__":
    main()
