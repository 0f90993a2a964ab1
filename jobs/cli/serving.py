"""``pgscribe dev``, ``web`` and ``worker``: what stays up."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.cli.common import friendly

if TYPE_CHECKING:
    from jobs.settings import Settings

HOME = Path(".pgscribe")
PATIENCE = 2  # seconds, before a process goes on without having looked


def _observe(settings: "Settings", name: str) -> None:
    """Set up this process's log and traces."""
    from jobs import logs, telemetry

    logs.setup(settings.log_format, secrets=settings.secrets())
    telemetry.configure(f"pgscribe-{name}")


def _look_over(settings: "Settings") -> None:
    """Log what keeps no process from starting, and yet is not what somebody meant."""
    import logging

    from psycopg.conninfo import conninfo_to_dict

    from jobs.doctor.environment import unknown_variables

    for finding in unknown_variables():
        logging.getLogger(__name__).warning("%s. %s", finding.seen, finding.mend)
    url = settings.database_url.get_secret_value()
    conninfo_to_dict(url)  # what can't be read becomes right by no waiting
    # A pooler without a database, or a lock on the ledger, would hold this up for minutes.
    looking = threading.Thread(target=_look_at_migrations, args=(url,), daemon=True)
    looking.start()
    looking.join(PATIENCE)


def _look_at_migrations(url: str) -> None:
    import logging

    import psycopg

    from db import migrate

    try:
        with psycopg.connect(
            url, connect_timeout=PATIENCE, prepare_threshold=None, autocommit=True
        ) as conn:
            missing = migrate.pending(conn)
    except psycopg.Error:
        return  # whoever needs the database says so, and tries again
    if missing:
        logging.getLogger(__name__).warning(
            "%d of %d migrations are missing in the database, the first is %s: run "
            "`pgscribe migrate`",
            len(missing),
            len(migrate.migrations()),
            missing[0].filename,
        )


def _stop_with_stdin() -> None:
    """End this process as SIGTERM would, once whoever started it is gone."""

    def watch() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


stop_with_stdin = click.option(
    "--stop-with-stdin", is_flag=True, hidden=True, help="Stop when standard input ends."
)


PORT = click.IntRange(0, 65535)  # 0: any that is free


@click.command(short_help="Run everything on this machine.")
@click.option(
    "--port", default=8000, show_default=True, type=PORT, help="Another one if it is taken."
)
@friendly
def dev(port: int) -> None:
    """Run everything on this machine and stay up until Ctrl-C.

    Postgres, web server and worker are started together; their data lies under .pgscribe/.
    While it runs, the other commands in this folder work on it.

    \b
      pgscribe dev
      pgscribe dev --port 8080
    """
    import shutil
    import time

    from jobs.dev import USER_EMAIL, USER_ID, Embedded, exit_on_signals

    exit_on_signals()
    program = "pgscribe" if shutil.which("pgscribe") else os.path.relpath(sys.argv[0])
    if Path(program).name == "__main__.py":
        program = f"{os.path.relpath(sys.executable)} -m jobs.cli"
    sample = Path("examples/sample.mp3")
    recording = sample if sample.exists() else "talk.mp3"
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
                f"Try: {program} transcribe {recording}      Stop: Ctrl-C\n"
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


@click.command(short_help="Serve the REST API and the web app.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=PORT)
@click.option("--listener", type=int, hidden=True, help="Inherited socket to serve, no other.")
@stop_with_stdin
@friendly
def web(*, host: str, port: int, listener: int | None, stop_with_stdin: bool) -> None:
    """Serve the REST API and the web app, until SIGTERM or Ctrl-C.

    \b
    Exit status 3 if it can't listen there.
      pgscribe web
      pgscribe web --host 0.0.0.0 --port 8080
    """
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
    _look_over(settings)
    refuse_other_hosts(settings, host)
    asyncio.run(refuse_other_databases(settings))
    server.run(
        create_app(settings),
        host=host,
        port=port,
        listener=listener,
        trusted_proxies=settings.trusted_proxies,
    )


@click.command()
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

    \b
      pgscribe worker --concurrency 2
      pgscribe worker --health-port 9100        /healthz, /readyz, /metrics
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
    _look_over(settings)
    asyncio.run(run_until_signalled(settings))
