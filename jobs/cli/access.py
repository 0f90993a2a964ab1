"""``pgscribe keys``, ``operators`` and ``token``: who may."""

from datetime import timedelta
from uuid import UUID

import click

from jobs.cli.common import database, duration, friendly
from jobs.scopes import USUAL_SCOPES, Scope


def _lifetime(_: click.Context, __: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    lifetime = duration(value)
    if not lifetime:
        raise click.BadParameter("give hours or days, such as 12h or 90d")
    return lifetime


@click.group()
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


@click.group()
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


@click.command()
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
    from jobs.tokens import issue_token

    click.echo(issue_token(TokenSettings.load(), user_id, lifetime=lifetime))
