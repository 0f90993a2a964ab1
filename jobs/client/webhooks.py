"""Webhooks for the clients: ``JobClient.webhooks`` and ``AsyncJobClient.webhooks``.

Both have the same methods; what they ask for is in ``_Requests``. What would make a second secret,
or send a second test, is not tried again where the first answer was lost.
"""

from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel, Field
from standardwebhooks import Webhook, WebhookVerificationError
from standardwebhooks.webhooks import EmptyWebhookSecretError

from jobs.client.flows import Flow, Flows
from jobs.client.requests import Request
from jobs.errors import InvalidInput, WebhookNotVerified
from jobs.webhook_models import (
    EVENTS,
    Delivery,
    DeliveryLog,
    DeliveryStatus,
    Endpoint,
    Event,
    NewEndpoint,
)

T = TypeVar("T")

DAY = timedelta(days=1)


class EndpointList(BaseModel):
    """All endpoints of an owner."""

    endpoints: list[Endpoint]


class DeliveryPage(BaseModel):
    """Deliveries, and where the next ones are."""

    deliveries: list[Delivery]
    next_cursor: str | None = None


class Secret(BaseModel):
    """A new secret."""

    secret: str = Field(repr=False)


class Replayed(BaseModel):
    """How many deliveries are sent again."""

    replayed: int


def verify_webhook(secret: str, headers: Mapping[str, str], body: bytes | str) -> dict[str, Any]:
    """Return what a request says that came to your endpoint. Raises ``WebhookNotVerified``.

    ``body`` is as it came, byte for byte; names of ``headers`` may be written in any way. Requests
    that are more than five minutes old are refused. Remember each ``webhook-id``: one may come
    twice. Raises ``InvalidInput`` if the secret itself is none, so that no request could be right.
    """
    try:
        webhook = Webhook(secret)
    except (EmptyWebhookSecretError, ValueError):
        raise InvalidInput("secret: must be as it was shown, whsec_…", field="secret") from None
    try:
        said = webhook.verify(body, dict(headers))
    except (WebhookVerificationError, ValueError) as exc:  # what it can't read is a ValueError
        raise WebhookNotVerified(f"The request is not one of pgscribe's: {exc}") from exc
    if not isinstance(said, dict):
        raise WebhookNotVerified("The request is not one of pgscribe's: it says nothing known")
    return said


def _id(field: str, value: UUID | str) -> UUID:
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except ValueError:
        raise InvalidInput(f"{field}: must be a UUID", field=field) from None


def _time(field: str, value: datetime | None) -> str | None:
    if value is not None and value.utcoffset() is None:
        raise InvalidInput(f"{field}: needs a time zone", field=field)
    return None if value is None else value.isoformat()


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class _Requests:
    """The flows behind the methods of both kinds."""

    def __init__(self, flows: Flows) -> None:
        self._flows = flows

    def create(
        self, url: str, events: Sequence[Event], description: str | None
    ) -> Flow[NewEndpoint]:
        body = _said(url=url, events=list(events), description=description)
        request = Request("POST", "/webhooks/endpoints", json=body, repeatable=False)
        return self._flows.answer(NewEndpoint, request)

    def endpoints(self) -> Flow[list[Endpoint]]:
        found = yield from self._flows.answer(EndpointList, Request("GET", "/webhooks/endpoints"))
        return found.endpoints

    def endpoint(
        self, endpoint_id: UUID | str, method: str = "GET", body: Any = None
    ) -> Flow[Endpoint]:
        return self._flows.answer(Endpoint, Request(method, self._path(endpoint_id), json=body))

    def delete(self, endpoint_id: UUID | str) -> Flow[None]:
        return self._flows.delete(Request("DELETE", self._path(endpoint_id)))

    def rotate_secret(self, endpoint_id: UUID | str | None, keep: timedelta) -> Flow[str]:
        path = "/webhooks" if endpoint_id is None else self._path(endpoint_id)
        body = {"keep_seconds": int(keep.total_seconds())}
        request = Request("POST", f"{path}/secret", json=body, repeatable=False)
        made = yield from self._flows.answer(Secret, request)
        return made.secret

    def send_test(self, endpoint_id: UUID | str) -> Flow[DeliveryLog]:
        request = Request("POST", f"{self._path(endpoint_id)}/test", repeatable=False)
        return self._flows.answer(DeliveryLog, request)

    def deliveries(
        self,
        endpoint: UUID | str | None,
        job: UUID | str | None,
        status: DeliveryStatus | None,
        limit: int | None,
    ) -> Flow[None]:
        which = _said(
            endpoint=endpoint and str(_id("endpoint", endpoint)),
            job=job and str(_id("job", job)),
            status=status,
        )

        def ask(size: int, cursor: str | None) -> Flow[tuple[Sequence[Any], str | None]]:
            query = which | _said(limit=str(size), cursor=cursor)
            request = Request("GET", "/webhooks/deliveries", query)
            page = yield from self._flows.answer(DeliveryPage, request)
            return page.deliveries, page.next_cursor

        return self._flows.pages(ask, limit)

    def delivery(self, delivery_id: UUID | str) -> Flow[DeliveryLog]:
        path = f"/webhooks/deliveries/{_id('delivery_id', delivery_id)}"
        return self._flows.answer(DeliveryLog, Request("GET", path))

    def replay(self, delivery_id: UUID | str) -> Flow[DeliveryLog]:
        path = f"/webhooks/deliveries/{_id('delivery_id', delivery_id)}/replay"
        return self._flows.answer(DeliveryLog, Request("POST", path, repeatable=False))

    def replay_all(
        self,
        since: datetime,
        until: datetime | None,
        endpoint: UUID | str | None,
        status: DeliveryStatus,
    ) -> Flow[int]:
        body = _said(
            since=_time("since", since),
            until=_time("until", until),
            endpoint=endpoint and str(_id("endpoint", endpoint)),
            status=status,
        )
        request = Request("POST", "/webhooks/replay", json=body, repeatable=False)
        answer = yield from self._flows.answer(Replayed, request)
        return answer.replayed

    def _path(self, endpoint_id: UUID | str) -> str:
        return f"/webhooks/endpoints/{_id('endpoint_id', endpoint_id)}"


def _change(
    url: str | None,
    events: Sequence[Event] | None,
    description: str | None,
    enabled: bool | None,  # noqa: FBT001 - as the caller's keyword
) -> dict[str, Any]:
    said = _said(url=url, events=events and list(events), enabled=enabled)
    return said if description is None else said | {"description": description or None}


class _Run(Protocol):
    def __call__(self, flow: Flow[T], /) -> T: ...


class _Items(Protocol):
    def __call__(self, flow: Flow[None], /) -> Iterator[Any]: ...


class Webhooks:
    """Where you are told that jobs have ended, and the log of it."""

    def __init__(self, flows: Flows, run: _Run, items: _Items) -> None:
        self._flows = _Requests(flows)
        self._run = run
        self._items = items

    def create(
        self, url: str, events: Sequence[Event] = EVENTS, description: str | None = None
    ) -> NewEndpoint:
        """Make an endpoint. Its ``secret``, for ``verify_webhook``, is not shown again."""
        return self._run(self._flows.create(url, events, description))

    def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, the oldest first."""
        return self._run(self._flows.endpoints())

    def endpoint(self, endpoint_id: UUID | str) -> Endpoint:
        """Return an endpoint."""
        return self._run(self._flows.endpoint(endpoint_id))

    def update(
        self,
        endpoint_id: UUID | str,
        *,
        url: str | None = None,
        events: Sequence[Event] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Endpoint:
        """Change an endpoint, disable it, or enable it again. An empty description removes it."""
        change = _change(url, events, description, enabled)
        return self._run(self._flows.endpoint(endpoint_id, "PATCH", change))

    def delete(self, endpoint_id: UUID | str) -> None:
        """Delete an endpoint with its log."""
        self._run(self._flows.delete(endpoint_id))

    def rotate_secret(self, endpoint_id: UUID | str | None = None, keep: timedelta = DAY) -> str:
        """Return a new secret; requests are signed with the old one, too, while it is kept.

        Without an endpoint it is the secret for your jobs' own ``webhook_url``.
        """
        return self._run(self._flows.rotate_secret(endpoint_id, keep))

    def send_test(self, endpoint_id: UUID | str) -> DeliveryLog:
        """Send a ``webhook.test``; what came of it, ``delivery`` says a moment later."""
        return self._run(self._flows.send_test(endpoint_id))

    def deliveries(
        self,
        *,
        endpoint: UUID | str | None = None,
        job: UUID | str | None = None,
        status: DeliveryStatus | None = None,
        limit: int | None = None,
    ) -> Iterator[Delivery]:
        """Yield what you were told, or are to be told, the newest first."""
        return self._items(self._flows.deliveries(endpoint, job, status, limit))

    def delivery(self, delivery_id: UUID | str) -> DeliveryLog:
        """Return a delivery with what it says, its requests, and what came back."""
        return self._run(self._flows.delivery(delivery_id))

    def replay(self, delivery_id: UUID | str) -> DeliveryLog:
        """Send a delivery again, with the same id."""
        return self._run(self._flows.replay(delivery_id))

    def replay_all(
        self,
        since: datetime,
        *,
        until: datetime | None = None,
        endpoint: UUID | str | None = None,
        status: DeliveryStatus = "failed",
    ) -> int:
        """Send deliveries of a time again, up to 1,000, and return how many."""
        return self._run(self._flows.replay_all(since, until, endpoint, status))


class _AsyncRun(Protocol):
    def __call__(self, flow: Flow[T], /) -> Awaitable[T]: ...


class _AsyncItems(Protocol):
    def __call__(self, flow: Flow[None], /) -> AsyncGenerator[Any, None]: ...


class AsyncWebhooks:
    """As ``Webhooks``, to be awaited."""

    def __init__(self, flows: Flows, run: _AsyncRun, items: _AsyncItems) -> None:
        self._flows = _Requests(flows)
        self._run = run
        self._items = items

    async def create(
        self, url: str, events: Sequence[Event] = EVENTS, description: str | None = None
    ) -> NewEndpoint:
        """Make an endpoint. Its ``secret``, for ``verify_webhook``, is not shown again."""
        return await self._run(self._flows.create(url, events, description))

    async def endpoints(self) -> list[Endpoint]:
        """Return all endpoints, the oldest first."""
        return await self._run(self._flows.endpoints())

    async def endpoint(self, endpoint_id: UUID | str) -> Endpoint:
        """Return an endpoint."""
        return await self._run(self._flows.endpoint(endpoint_id))

    async def update(
        self,
        endpoint_id: UUID | str,
        *,
        url: str | None = None,
        events: Sequence[Event] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Endpoint:
        """Change an endpoint, disable it, or enable it again. An empty description removes it."""
        change = _change(url, events, description, enabled)
        return await self._run(self._flows.endpoint(endpoint_id, "PATCH", change))

    async def delete(self, endpoint_id: UUID | str) -> None:
        """Delete an endpoint with its log."""
        await self._run(self._flows.delete(endpoint_id))

    async def rotate_secret(
        self, endpoint_id: UUID | str | None = None, keep: timedelta = DAY
    ) -> str:
        """Return a new secret; requests are signed with the old one, too, while it is kept.

        Without an endpoint it is the secret for your jobs' own ``webhook_url``.
        """
        return await self._run(self._flows.rotate_secret(endpoint_id, keep))

    async def send_test(self, endpoint_id: UUID | str) -> DeliveryLog:
        """Send a ``webhook.test``; what came of it, ``delivery`` says a moment later."""
        return await self._run(self._flows.send_test(endpoint_id))

    def deliveries(
        self,
        *,
        endpoint: UUID | str | None = None,
        job: UUID | str | None = None,
        status: DeliveryStatus | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Delivery, None]:
        """Yield what you were told, or are to be told, the newest first."""
        return self._items(self._flows.deliveries(endpoint, job, status, limit))

    async def delivery(self, delivery_id: UUID | str) -> DeliveryLog:
        """Return a delivery with what it says, its requests, and what came back."""
        return await self._run(self._flows.delivery(delivery_id))

    async def replay(self, delivery_id: UUID | str) -> DeliveryLog:
        """Send a delivery again, with the same id."""
        return await self._run(self._flows.replay(delivery_id))

    async def replay_all(
        self,
        since: datetime,
        *,
        until: datetime | None = None,
        endpoint: UUID | str | None = None,
        status: DeliveryStatus = "failed",
    ) -> int:
        """Send deliveries of a time again, up to 1,000, and return how many."""
        return await self._run(self._flows.replay_all(since, until, endpoint, status))
