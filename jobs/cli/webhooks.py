"""``pgscribe webhooks``: everybody's webhooks, for whoever runs pgscribe."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import click

from jobs.cli.common import as_json, database, duration, echo_rows, for_each, friendly

if TYPE_CHECKING:
    from jobs.webhook_admin import AnyDelivery, AnyEndpoint

# As jobs.webhooks has them, which brings pydantic and psycopg with it.
EVENTS = ("job.completed", "job.failed", "job.cancelled")
STATUSES = ("queued", "sending", "delivered", "failed")

_of_user = click.option("--user", type=click.UUID, help="Only this user's.")
_of_endpoint = click.option("--endpoint", type=click.UUID, help="Only this endpoint's.")
_ids = click.argument("endpoint_ids", nargs=-1, required=True, type=click.UUID)


@click.group(short_help="Endpoints, secrets, the log of what was sent.")
def webhooks() -> None:
    """Tell receivers that jobs have ended: endpoints, secrets, and the log of what was sent.

    \b
    What receivers get, docs/webhooks.md says.
      pgscribe webhooks create https://example.org/pgscribe --user $USER_ID --event job.failed
      pgscribe webhooks test $ENDPOINT_ID
      pgscribe webhooks deliveries --status failed
      pgscribe webhooks show $DELIVERY_ID          what was sent, and what came back
      pgscribe webhooks replay --failed-since 6h
    """


@webhooks.command("endpoints")
@_of_user
@as_json
@friendly
def list_endpoints(*, user: UUID | None, as_json: bool) -> None:
    """List endpoints, oldest first: id, owner, state, events, URL, description.

    \b
      pgscribe webhooks endpoints --user $USER_ID
      pgscribe webhooks endpoints --json | jq '.[] | select(.disabled_at)'
    """
    from jobs import webhook_admin

    with database() as conn:
        found = webhook_admin.list_endpoints(conn, user)
    echo_rows(found, _endpoint_line, as_json=as_json, none="There are no endpoints")


@webhooks.command("create")
@click.argument("url")
@click.option("--user", required=True, type=click.UUID, help="Whose jobs it is about.")
@click.option(
    "--event",
    "events",
    multiple=True,
    type=click.Choice(EVENTS),
    help="What it is told of; may be given several times [default: all].",
)
@click.option("--description", help="A note, up to 200 characters.")
@friendly
def create_endpoint(
    *, url: str, user: UUID, events: tuple[str, ...], description: str | None
) -> None:
    """Make an endpoint and print its secret, once.

    \b
      pgscribe webhooks create https://example.org/pgscribe --user $USER_ID
      pgscribe webhooks create http://localhost:9000/ --user $USER_ID --event job.failed
    """
    from jobs import webhook_admin

    with database() as conn:
        made = webhook_admin.create_endpoint(conn, user, url, events or EVENTS, description)
    click.echo(made.secret)
    click.echo(f"Endpoint {made.id}. {_STORE_IT}", err=True)


_STORE_IT = "The secret is not shown again: give it to the receiver."


def _keep(_: click.Context, __: click.Parameter, value: str) -> timedelta:
    keep = duration(value)
    if keep is None or keep > timedelta(days=7):
        raise click.BadParameter("give hours or days, such as 24h, from 0h to 7d")
    return keep


@webhooks.command("rotate")
@click.argument("endpoint_id", required=False, type=click.UUID)
@click.option("--user", type=click.UUID, help="The secret for the webhook_url of this user's jobs.")
@click.option(
    "--keep",
    default="24h",
    show_default=True,
    callback=_keep,
    help="For how long requests are signed with the one before it, too: 0h to 7d.",
)
@friendly
def rotate(*, endpoint_id: UUID | None, user: UUID | None, keep: timedelta) -> None:
    """Make a new secret of an endpoint, or of a user, and print it, once.

    \b
      pgscribe webhooks rotate $ENDPOINT_ID
      pgscribe webhooks rotate $ENDPOINT_ID --keep 0h      the old one is known to others
      pgscribe webhooks rotate --user $USER_ID
    """
    if (endpoint_id is None) == (user is None):
        raise click.UsageError("Give either an endpoint's id or --user.")
    from jobs import webhook_admin

    with database() as conn:
        secret = webhook_admin.rotate_secret(conn, endpoint=endpoint_id, user=user, keep=keep)
    click.echo(secret)
    hours = keep // timedelta(hours=1)
    before = f"The one before it, if any, is used as well for {hours} h." if hours else ""
    click.echo(f"{_STORE_IT} {before}".strip(), err=True)


@webhooks.command("enable")
@_ids
@friendly
def enable(endpoint_ids: tuple[UUID, ...]) -> None:
    """Send to endpoints again, whyever they were disabled. What was missed, `replay` sends.

    \b
      pgscribe webhooks enable $ENDPOINT_ID
      pgscribe webhooks replay --failed-since 2d --endpoint $ENDPOINT_ID
    """
    _enable(endpoint_ids, enabled=True)


@webhooks.command("disable")
@_ids
@friendly
def disable(endpoint_ids: tuple[UUID, ...]) -> None:
    """Send nothing more to endpoints; what waits for them fails.

    \b
      pgscribe webhooks disable $ENDPOINT_ID
    """
    _enable(endpoint_ids, enabled=False)


def _enable(endpoint_ids: tuple[UUID, ...], *, enabled: bool) -> None:
    from jobs import webhook_admin

    with database() as conn:
        for_each(
            endpoint_ids,
            lambda one: _state(webhook_admin.enable_endpoint(conn, one, enabled=enabled)),
        )


@webhooks.command("test")
@click.argument("endpoint_id", type=click.UUID)
@friendly
def send_test(endpoint_id: UUID) -> None:
    """Send a webhook.test to an endpoint and print the delivery's id.

    \b
      pgscribe webhooks test $ENDPOINT_ID
    """
    from jobs import webhook_admin

    with database() as conn:
        delivery = webhook_admin.send_test(conn, endpoint_id)
    click.echo(delivery)
    click.echo(f"What came of it: pgscribe webhooks show {delivery}", err=True)


@webhooks.command("deliveries")
@_of_user
@_of_endpoint
@click.option("--status", type=click.Choice(STATUSES), help="Only deliveries with this status.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@as_json
@friendly
def list_deliveries(
    *, user: UUID | None, endpoint: UUID | None, status: str | None, limit: int, as_json: bool
) -> None:
    """List the newest deliveries: id, age, event, status, requests, last answer, URL, error.

    \b
      pgscribe webhooks deliveries --status failed
      pgscribe webhooks deliveries --endpoint $ENDPOINT_ID --limit 100 --json
    """
    from jobs import webhook_admin

    with database() as conn:
        found = webhook_admin.list_deliveries(
            conn, user=user, endpoint=endpoint, status=status, limit=limit
        )
    echo_rows(found, _delivery_line, as_json=as_json, none="There are no such deliveries")


@webhooks.command("show")
@click.argument("delivery_id", type=click.UUID)
@friendly
def show(delivery_id: UUID) -> None:
    """Show a delivery as JSON, with its payload, each request, and what came back.

    \b
      pgscribe webhooks show $DELIVERY_ID
      pgscribe webhooks show $DELIVERY_ID | jq '.log[-1]'
    """
    from jobs import webhook_admin

    with database() as conn:
        click.echo(webhook_admin.get_delivery(conn, delivery_id).model_dump_json(indent=2))


def _since(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    if value is None:
        return None
    now = datetime.now(UTC)
    ago = duration(value)
    if ago is not None:
        return now - ago
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise click.BadParameter(
            "give a time with its zone, such as 2026-11-26T09:00:00Z, or hours or days, such as 6h"
        )
    if at > now:
        raise click.BadParameter(f"{value} is in the future; give a time that has passed")
    return at


@webhooks.command("replay")
@click.argument("delivery_ids", nargs=-1, type=click.UUID)
@click.option(
    "--failed-since",
    metavar="TIME",
    callback=_since,
    help="All of jobs that ended since then, such as 6h or 2026-11-26T09:00:00Z.",
)
@_of_user
@_of_endpoint
@friendly
def replay(
    *,
    delivery_ids: tuple[UUID, ...],
    failed_since: datetime | None,
    user: UUID | None,
    endpoint: UUID | None,
) -> None:
    """Send deliveries again with the ids that they had, as often as it takes.

    \b
    Exit status 1 if one is not there or its endpoint is disabled; the others are sent.
      pgscribe webhooks replay $DELIVERY_ID
      pgscribe webhooks replay --failed-since 2d --endpoint $ENDPOINT_ID
    """
    if bool(delivery_ids) == (failed_since is not None):
        raise click.UsageError("Give either the ids of deliveries or --failed-since.")
    if failed_since is not None:
        _replay_failed(failed_since, user, endpoint)
    elif user or endpoint:
        raise click.UsageError("--user and --endpoint go with --failed-since only.")
    else:
        _replay(delivery_ids)


def _replay(delivery_ids: tuple[UUID, ...]) -> None:
    from jobs import webhook_admin

    sent = 0

    with database() as conn:

        def send(delivery: UUID) -> str:
            nonlocal sent
            if not webhook_admin.replay(conn, delivery):
                return "has not ended yet and is left as it is"
            sent += 1
            return "is sent again"

        try:
            for_each(delivery_ids, send)
        finally:
            click.echo(f"{sent} sent again")


def _replay_failed(since: datetime, user: UUID | None, endpoint: UUID | None) -> None:
    from jobs import webhook_admin

    with database() as conn:
        which = webhook_admin.FailedSince(since, user, endpoint)
        sent, left = webhook_admin.replay_failed(conn, which)
    click.echo(f"{sent} sent again")
    for disabled, count in left.items():
        click.echo(
            f"{count} not sent: their endpoint is disabled. To send them, "
            f"pgscribe webhooks enable {disabled}, and replay again.",
            err=True,
        )


def _state(endpoint: "AnyEndpoint") -> str:
    return f"disabled ({endpoint.disabled_reason})" if endpoint.disabled_at else "enabled"


def _endpoint_line(endpoint: "AnyEndpoint") -> str:
    events = ",".join(endpoint.events)
    line = f"{endpoint.id}  {endpoint.user_id}  {_state(endpoint):<18}  {events}  {endpoint.url}"
    return f"{line}  {endpoint.description}" if endpoint.description else line


def _delivery_line(delivery: "AnyDelivery") -> str:
    from jobs.cli.terminal import age

    answer = str(delivery.response_status or delivery.error_code or "-")
    line = (
        f"{delivery.id}  {age(delivery.created_at):>8} ago  {delivery.event:<13}  "
        f"{delivery.status:<9}  {delivery.attempts:>2}x  {answer:<14}  {delivery.target}"
    )
    return f"{line}  {delivery.error}" if delivery.error else line
