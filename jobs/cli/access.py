"""``pgscribe keys``, ``operators`` and ``token``: who may."""

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import click

from jobs.cli.common import as_json, database, duration, echo_rows, for_each, friendly
from jobs.scopes import USUAL_SCOPES, Scope

if TYPE_CHECKING:
    from jobs.keys import ApiKey
    from jobs.operate import Operator


def _lifetime(_: click.Context, __: click.Parameter, value: str | None) -> timedelta | None:
    if value is None:
        return None
    lifetime = duration(value)
    if not lifetime:
        raise click.BadParameter("give hours or days, such as 12h or 90d")
    return lifetime


@click.group(short_help="API keys for services: make, list, revoke.")
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
    help="What for; may be given several times "
    f"[default: all but {' and '.join(sorted(frozenset(Scope) - USUAL_SCOPES))}].",
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
    """Make a key and print it, once: only its hash is stored.

    \b
      pgscribe keys create nightly-import --user $USER_ID --scope jobs:write --expires 90d
      pgscribe keys create backend --any-user
    """
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
@as_json
@friendly
def list_keys(*, as_json: bool) -> None:
    """List all keys, oldest first, with when each was last used.

    \b
      pgscribe keys list
      pgscribe keys list --json | jq '.[] | select(.last_used_at == null) | .name'
    """
    from jobs import keys as api_keys

    with database() as conn:
        found = api_keys.list_all(conn)
    echo_rows(found, _key_line, as_json=as_json, none="There are no API keys")


def _key_line(key: "ApiKey") -> str:
    used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never used"
    whose = key.user_id or "any user"
    scopes = ",".join(key.scopes)
    return (
        f"{key.id}  {key.prefix}…  {key.state:<7}  {used:<15}  {whose!s:<36}  {scopes}  {key.name}"
    )


@keys.command("revoke")
@click.argument("key_ids", nargs=-1, required=True, type=click.UUID)
@friendly
def revoke_keys(key_ids: tuple[UUID, ...]) -> None:
    """Refuse keys from now on, by their ids, on all servers at once.

    \b
    Exit status 1 if one of them is not there; the others are revoked.
      pgscribe keys revoke 5b7f3f0e-2f0d-4a3e-9d63-0c6f5f0a8c11
    """
    from jobs import keys as api_keys

    with database() as conn:

        def revoke(key_id: UUID) -> str:
            api_keys.revoke(conn, key_id)
            return "revoked"

        for_each(key_ids, revoke)


@click.group(short_help="Who sees the queue and everybody's jobs.")
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
    """Make users operators, from their next request on.

    \b
      pgscribe operators add anna@example.org
    """
    from jobs import operate

    with database() as conn:
        for user in users:
            click.echo(f"{operate.add(conn, user)}  is an operator")


@operators.command("list")
@as_json
@friendly
def list_operators(*, as_json: bool) -> None:
    """List all operators, in the order in which they were added.

    \b
      pgscribe operators list
      pgscribe operators list --json
    """
    from jobs import operate

    with database() as conn:
        found = operate.list_all(conn)
    none = "There are no operators; `pgscribe operators add` makes one"
    echo_rows(found, _operator_line, as_json=as_json, none=none)


def _operator_line(operator: "Operator") -> str:
    email = operator.email or "(no e-mail address)"
    return f"{operator.user_id}  since {operator.added_at:%Y-%m-%d}  {email}"


@operators.command("remove")
@click.argument("users", nargs=-1, required=True, metavar="USER_ID_OR_EMAIL...")
@friendly
def remove_operators(users: tuple[str, ...]) -> None:
    """Make users operators no more, from their next request on.

    \b
      pgscribe operators remove anna@example.org
    """
    from jobs import operate

    with database() as conn:
        for user in users:
            click.echo(f"{operate.remove(conn, user)}  is no operator")


@click.command(short_help="Print a token for a user.")
@click.option("--user", "user_id", required=True, type=click.UUID, help="Id in auth.users.")
@click.option(
    "--lifetime", default=3600, show_default=True, type=click.IntRange(1), help="Seconds."
)
@friendly
def token(user_id: UUID, lifetime: int) -> None:
    """Print a token for a user, signed with PGSCRIBE_JWT_SECRET.

    \b
      pgscribe token --user $USER_ID --lifetime 86400
      curl -H "Authorization: Bearer $(pgscribe token --user $USER_ID)" localhost:8000/jobs
    """
    from jobs.settings import TokenSettings
    from jobs.tokens import issue_token

    click.echo(issue_token(TokenSettings.load(), user_id, lifetime=lifetime))
