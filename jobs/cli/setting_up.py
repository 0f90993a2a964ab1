"""``pgscribe migrate``, ``deploy``, ``setup-storage`` and ``make-keys``: what comes before."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from jobs.cli.common import friendly


@click.command(short_help="Bring the database up to date.")
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

    \b
      pgscribe migrate --status
      pgscribe migrate
      pgscribe migrate --export supabase/migrations && supabase db push
    """
    from db import migrate as runner

    if export is not None:
        click.echo(f"{len(runner.export(export))} files written to {export}")
        return
    import psycopg

    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()
    if status:
        with psycopg.connect(url, autocommit=True, connect_timeout=runner.CONNECT_TIMEOUT) as conn:
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
    except (runner.MigrationBlocked, runner.MigrationFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"Up to date; {count} applied now")


@click.command(short_help="Put the functions that workers call on Modal.")
@click.option("--check", is_flag=True, help="Deploy nothing; exit status 1 unless all is in place.")
@click.option("--environment", metavar="NAME", help="Of Modal's [MODAL_ENVIRONMENT].")
@friendly
def deploy(*, check: bool, environment: str | None) -> None:
    """Put the functions that workers call on Modal, and see that they are what is called.

    Settings and token are checked first. Afterwards all functions are looked up by name, and a
    container without a GPU is started, which says what code and settings it has. Settings:
    PGSCRIBE_MODAL_… in the environment or in .env, see docs/modal.md. Token: `modal token new`.

    \b
      pgscribe deploy
      pgscribe deploy --check --environment staging
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


@click.command("setup-storage", short_help="Make the bucket in Supabase Storage.")
@click.option("--check", is_flag=True, help="Change nothing; exit status 1 unless all is in place.")
@friendly
def setup_storage(*, check: bool) -> None:
    """Make the bucket for audio in Supabase Storage, with its policies, and try it.

    A small file is uploaded, played in part and deleted. Settings: PGSCRIBE_SUPABASE_URL,
    PGSCRIBE_SUPABASE_SECRET_KEY, PGSCRIBE_DATABASE_URL, PGSCRIBE_MAX_UPLOAD_BYTES.

    \b
      pgscribe setup-storage
      pgscribe setup-storage --check
    """
    import asyncio

    from jobs.settings import Settings
    from jobs.storage import setup

    asyncio.run(setup.run(Settings.load(), click.echo, check=check))
    click.echo("Up to date; use it with PGSCRIBE_STORAGE=supabase")


@click.command("make-keys", short_help="Make the secrets of a self-hosted Supabase.")
@click.option("--missing", is_flag=True, help="Add what .env lacks; change nothing that it has.")
@click.option("--renew", "names", multiple=True, metavar="NAME", help="Replace a secret of .env.")
@friendly
def make_keys(*, missing: bool, names: tuple[str, ...]) -> None:
    """Make the secrets and keys of a self-hosted Supabase: .env, from .env.example.

    Run it in the folder with docker-compose.yml. An .env that exists is never overwritten. No
    secret is printed; only the file's owner can read it. See docs/self-hosting.md.

    \b
      pgscribe make-keys
      pgscribe make-keys --missing
      pgscribe make-keys --renew JWT_KEYS
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
