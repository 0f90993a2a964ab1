"""What whoever runs pgscribe does with everybody's webhooks, straight on the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row, scalar_row

from jobs.errors import DeliveryNotFound, EndpointNotFound, InvalidInput, WebhookRefused
from jobs.refusals import refusals
from jobs.sql import WEBHOOKS
from jobs.webhooks import (
    LONGEST_OVERLAP,
    MAX_REPLAYED,
    Delivery,
    DeliveryLog,
    Endpoint,
    NewEndpoint,
)

Connection = psycopg.Connection[Any]


class AnyEndpoint(Endpoint):
    """An endpoint, and whose it is."""

    user_id: UUID


class AnyDelivery(Delivery):
    """A delivery, whose it is, and where it goes to now."""

    user_id: UUID
    target: str


class AnyDeliveryLog(DeliveryLog, AnyDelivery):
    """As ``AnyDelivery``, with what it says and its requests."""


@dataclass(frozen=True, slots=True)
class FailedSince:
    """Deliveries from some time on that have failed; ``None``: everybody's, at any endpoint."""

    since: datetime
    user: UUID | None = None
    endpoint: UUID | None = None


@dataclass(frozen=True, slots=True)
class _Replayed:
    replayed: int
    disabled: UUID | None


@dataclass(frozen=True, slots=True)
class _Batch:
    chosen: int
    replayed: int
    at: datetime


def list_endpoints(conn: Connection, user: UUID | None = None) -> list[AnyEndpoint]:
    """Return all endpoints, the oldest first, or those of a user."""
    _check_user(conn, user)
    return _endpoints(conn, user=user)


def get_endpoint(conn: Connection, endpoint: UUID) -> AnyEndpoint:
    """Return an endpoint. Raises ``EndpointNotFound``."""
    found = _endpoints(conn, endpoint=endpoint)
    if not found:
        raise EndpointNotFound(
            f"There is no webhook endpoint {endpoint}; `pgscribe webhooks endpoints` lists them"
        )
    return found[0]


def _endpoints(
    conn: Connection, *, endpoint: UUID | None = None, user: UUID | None = None
) -> list[AnyEndpoint]:
    with conn.cursor(row_factory=class_row(AnyEndpoint)) as cursor:
        values = {"id": endpoint, "user": user}
        return cursor.execute(WEBHOOKS["admin_list_endpoints"], values).fetchall()


def create_endpoint(
    conn: Connection, user: UUID, url: str, events: Sequence[str], description: str | None
) -> NewEndpoint:
    """Make an endpoint of a user's and return it with its secret, which is not shown again.

    Raises ``InvalidInput``, which names the field, for what the database refuses.
    """
    _check_user(conn, user)
    values = {"user": user, "url": url, "events": list(events), "description": description}
    with refusals():
        return NewEndpoint.model_validate(_scalar(conn, "admin_create_endpoint", values))


def enable_endpoint(conn: Connection, endpoint: UUID, *, enabled: bool) -> AnyEndpoint:
    """Send to an endpoint again, or nothing more, and return it. Raises ``EndpointNotFound``."""
    conn.execute(WEBHOOKS["admin_enable_endpoint"], {"id": endpoint, "enabled": enabled})
    return get_endpoint(conn, endpoint)


def rotate_secret(
    conn: Connection, *, endpoint: UUID | None = None, user: UUID | None = None, keep: timedelta
) -> str:
    """Make a new secret for an endpoint, or for the webhook URLs of a user's jobs; return it.

    Requests are signed with the one before it, too, for as long as ``keep`` says.
    """
    if not timedelta(0) <= keep <= LONGEST_OVERLAP:
        raise InvalidInput(f"keep: must be from 0 to {LONGEST_OVERLAP.days} days", field="keep")
    if endpoint is not None:
        user = get_endpoint(conn, endpoint).user_id
    _check_user(conn, user)
    values = {"user": user, "endpoint": endpoint, "keep": keep.total_seconds()}
    with refusals():
        secret: str = _scalar(conn, "admin_rotate_secret", values)
    return secret


def send_test(conn: Connection, endpoint: UUID) -> UUID:
    """Send a ``webhook.test`` to an endpoint and return the delivery's id.

    Raises ``EndpointNotFound``, ``WebhookRefused`` where it is disabled, and ``LimitReached``.
    """
    if get_endpoint(conn, endpoint).disabled_at is not None:
        raise _disabled(endpoint)
    with refusals():
        delivery: UUID = _scalar(conn, "admin_send_test", {"id": endpoint})
    return delivery


def list_deliveries(
    conn: Connection,
    *,
    user: UUID | None = None,
    endpoint: UUID | None = None,
    status: str | None = None,
    limit: int,
) -> list[AnyDelivery]:
    """Return the newest deliveries, newest first."""
    _check_user(conn, user)
    if endpoint is not None:
        get_endpoint(conn, endpoint)
    values = {"user": user, "endpoint": endpoint, "status": status, "limit": limit}
    with conn.cursor(row_factory=class_row(AnyDelivery)) as cursor:
        return cursor.execute(WEBHOOKS["admin_list_deliveries"], values).fetchall()


def get_delivery(conn: Connection, delivery: UUID) -> AnyDeliveryLog:
    """Return a delivery with its requests. Raises ``DeliveryNotFound``."""
    with conn.cursor(row_factory=class_row(AnyDeliveryLog)) as cursor:
        found = cursor.execute(WEBHOOKS["admin_get_delivery"], {"id": delivery}).fetchone()
    if found is None:
        raise _no_delivery(delivery)
    return found


def replay(conn: Connection, delivery: UUID) -> bool:
    """Send a delivery again; one that waits or is being sent is left as it is: ``False``.

    Raises ``DeliveryNotFound``, and ``WebhookRefused`` where its endpoint is disabled.
    """
    with conn.cursor(row_factory=class_row(_Replayed)) as cursor:
        found = cursor.execute(WEBHOOKS["admin_replay_delivery"], {"id": delivery}).fetchone()
    if found is None:
        raise _no_delivery(delivery)
    if found.disabled is not None:
        raise _disabled(found.disabled)
    return found.replayed > 0


def replay_failed(conn: Connection, which: FailedSince) -> tuple[int, dict[UUID, int]]:
    """Send what has failed again. Return how many, and how many are left at disabled endpoints.

    They go in batches, each a transaction of its own. What fails again meanwhile is left.
    """
    _check_user(conn, which.user)
    if which.endpoint is not None:
        get_endpoint(conn, which.endpoint)
    values = {"since": which.since, "user": which.user, "endpoint": which.endpoint}
    left = dict(conn.execute(WEBHOOKS["admin_failed_at_disabled"], values).fetchall())
    before: datetime | None = None
    total = 0
    while True:
        batch = _replay_batch(conn, values | {"before": before, "limit": MAX_REPLAYED})
        total += batch.replayed
        if batch.chosen < MAX_REPLAYED:
            return total, left
        before = before or batch.at


def _replay_batch(conn: Connection, values: dict[str, Any]) -> _Batch:
    with conn.cursor(row_factory=class_row(_Batch)) as cursor:
        batch = cursor.execute(WEBHOOKS["admin_replay_failed"], values).fetchone()
    assert batch is not None
    return batch


def _check_user(conn: Connection, user: UUID | None) -> None:
    if user is not None and not _scalar(conn, "admin_has_user", {"user": user}):
        raise InvalidInput(f"user: there is no user {user} in auth.users", field="user")


def _disabled(endpoint: UUID) -> WebhookRefused:
    return WebhookRefused(
        f"endpoint {endpoint} is disabled, so nothing is sent to it; "
        f"enable it first: pgscribe webhooks enable {endpoint}",
        code="endpoint_disabled",
    )


def _no_delivery(delivery: UUID) -> DeliveryNotFound:
    return DeliveryNotFound(
        f"There is no delivery {delivery}; `pgscribe webhooks deliveries` lists them"
    )


def _scalar(conn: Connection, query: str, values: dict[str, Any]) -> Any:
    with conn.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(WEBHOOKS[query], values).fetchone()
