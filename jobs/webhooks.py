"""What an owner can do with webhooks: endpoints, their secrets, and the log of deliveries.

Every function runs on a connection that acts as that user. How requests are made is in
``jobs.deliveries``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import psycopg
from psycopg.rows import class_row, scalar_row

from jobs.errors import DeliveryNotFound, EndpointNotFound
from jobs.models import Cursor
from jobs.refusals import refusals
from jobs.sql import WEBHOOKS
from jobs.webhook_models import (
    EVENTS,
    Delivery,
    DeliveryAttempt,
    DeliveryLog,
    DeliveryStatus,
    Endpoint,
    Event,
    NewEndpoint,
)

__all__ = [
    "EVENTS",
    "LONGEST_OVERLAP",
    "MAX_ENDPOINTS",
    "MAX_REPLAYED",
    "Delivery",
    "DeliveryAttempt",
    "DeliveryFilter",
    "DeliveryLog",
    "DeliveryStatus",
    "Endpoint",
    "EndpointChange",
    "Event",
    "NewEndpoint",
    "create_endpoint",
    "delete_endpoint",
    "get_delivery",
    "get_endpoint",
    "list_deliveries",
    "list_endpoints",
    "replay",
    "replay_all",
    "rotate_secret",
    "send_test",
    "update_endpoint",
]

Connection = psycopg.AsyncConnection[Any]

MAX_ENDPOINTS = 10
MAX_REPLAYED = 1000  # deliveries that one request sends again
LONGEST_OVERLAP = timedelta(days=7)  # for which a replaced secret is used as well


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """Which deliveries; ``None``: all."""

    endpoint: UUID | None = None
    job: UUID | None = None
    status: DeliveryStatus | None = None


@dataclass(frozen=True, slots=True)
class EndpointChange:
    """What to change of an endpoint; ``None`` leaves it, but for a description that is set."""

    url: str | None = None
    events: Sequence[Event] | None = None
    description: str | None = None
    sets_description: bool = False
    enabled: bool | None = None


async def list_endpoints(conn: Connection, endpoint: UUID | None = None) -> list[Endpoint]:
    """Return the user's endpoints, the oldest first, or one of them."""
    async with conn.cursor(row_factory=class_row(Endpoint)) as cursor:
        await cursor.execute(WEBHOOKS["list_endpoints"], {"id": endpoint})
        return await cursor.fetchall()


async def get_endpoint(conn: Connection, endpoint: UUID) -> Endpoint:
    """Return an endpoint of the user's. Raises ``EndpointNotFound``."""
    found = await list_endpoints(conn, endpoint)
    if not found:
        raise EndpointNotFound
    return found[0]


async def create_endpoint(
    conn: Connection, url: str, events: Sequence[Event], description: str | None
) -> NewEndpoint:
    """Make an endpoint and return it with its secret.

    The database checks it: ``InvalidInput`` names the field, and says when there are too many.
    """
    values = {"url": url, "events": list(events), "description": description}
    with refusals():
        return NewEndpoint.model_validate(await _scalar(conn, "create_endpoint", values))


async def update_endpoint(conn: Connection, endpoint: UUID, change: EndpointChange) -> Endpoint:
    """Change an endpoint and return it. Raises ``EndpointNotFound`` and ``InvalidInput``."""
    values = {name: getattr(change, name) for name in change.__slots__} | {"id": endpoint}
    values["events"] = None if change.events is None else list(change.events)
    with refusals():
        await conn.execute(WEBHOOKS["update_endpoint"], values)
    return await get_endpoint(conn, endpoint)


async def delete_endpoint(conn: Connection, endpoint: UUID) -> None:
    """Delete an endpoint with its log; what waits for it is not sent.

    Raises ``EndpointNotFound``.
    """
    cursor = await conn.execute(WEBHOOKS["delete_endpoint"], {"id": endpoint})
    if not cursor.rowcount:
        raise EndpointNotFound


async def rotate_secret(conn: Connection, endpoint: UUID | None, keep: timedelta) -> str:
    """Make a new secret for an endpoint, or for the webhook URLs of the user's jobs; return it.

    Requests are signed with the one before it, too, for as long as ``keep`` says. Raises
    ``EndpointNotFound``, and ``InvalidInput`` beyond ``LONGEST_OVERLAP``.
    """
    if endpoint is not None:
        await get_endpoint(conn, endpoint)
    with refusals():
        secret: str = await _scalar(
            conn, "rotate_secret", {"id": endpoint, "keep": keep.total_seconds()}
        )
    return secret


async def send_test(conn: Connection, endpoint: UUID) -> DeliveryLog:
    """Send a ``webhook.test`` to an endpoint and return the delivery, which waits.

    Raises ``EndpointNotFound``, ``InvalidInput`` where it is disabled, and ``LimitReached``.
    """
    with refusals():
        delivery = await _scalar(conn, "send_test", {"id": endpoint})
    if delivery is None:
        raise EndpointNotFound
    return await get_delivery(conn, delivery)


async def list_deliveries(
    conn: Connection, which: DeliveryFilter, *, limit: int = 50, after: Cursor | None = None
) -> tuple[list[Delivery], Cursor | None]:
    """Return some deliveries, newest first, and where the list goes on, if it does."""
    at, delivery = after or (None, None)
    values = {name: getattr(which, name) for name in which.__slots__}
    values |= {"limit": limit + 1, "after_at": at, "after_id": delivery}
    async with conn.cursor(row_factory=class_row(Delivery)) as cursor:
        await cursor.execute(WEBHOOKS["list_deliveries"], values)
        found = await cursor.fetchall()
    page = found[:limit]
    return page, (page[-1].created_at, page[-1].id) if len(found) > limit else None


async def get_delivery(conn: Connection, delivery: UUID) -> DeliveryLog:
    """Return a delivery with its requests. Raises ``DeliveryNotFound``."""
    async with conn.cursor(row_factory=class_row(DeliveryLog)) as cursor:
        await cursor.execute(WEBHOOKS["get_delivery"], {"id": delivery})
        found = await cursor.fetchone()
    if found is None:
        raise DeliveryNotFound
    return found


async def replay(conn: Connection, delivery: UUID) -> DeliveryLog:
    """Send a delivery again, with the same id; one that waits is left as it is.

    Raises ``DeliveryNotFound``, and ``InvalidInput`` where its endpoint is disabled.
    """
    with refusals():
        found = await _scalar(conn, "replay_delivery", {"id": delivery})
    if found is None:
        raise DeliveryNotFound
    return await get_delivery(conn, delivery)


async def replay_all(
    conn: Connection,
    *,
    since: datetime,
    until: datetime | None = None,
    endpoint: UUID | None = None,
    status: Literal["failed", "delivered"] = "failed",
) -> int:
    """Send the oldest ``MAX_REPLAYED`` deliveries of that time again and return how many."""
    values = {"since": since, "until": until, "endpoint": endpoint, "status": status}
    with refusals():
        count: int = await _scalar(conn, "replay_deliveries", values)
    return count


async def _scalar(conn: Connection, query: str, values: dict[str, Any]) -> Any:
    async with conn.cursor(row_factory=scalar_row) as cursor:
        await cursor.execute(WEBHOOKS[query], values)
        return await cursor.fetchone()
