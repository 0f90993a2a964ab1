"""Webhooks: where owners are told that jobs have ended, and the log of what they were told."""

from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from jobs import webhooks
from jobs.database import as_user
from jobs.service import MAX_LIST
from jobs.webhooks import Delivery, DeliveryLog, Event
from web.endpoints import Answer, Endpoints, Principal, Scope
from web.routes.jobs import as_json, read_cursor, write_cursor

OK, CREATED, NO_CONTENT = HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT

endpoint = Endpoints("Webhooks")


def _check_text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be a time with its zone, such as 2026-11-26T09:00:00Z")  # noqa: TRY004 - pydantic's
    return value


Time = Annotated[AwareDatetime, BeforeValidator(_check_text)]
Events = Annotated[list[Event], Field(min_length=1, max_length=len(webhooks.EVENTS))]
Description = Annotated[str, Field(max_length=200)]


class EndpointRequest(BaseModel):
    """An endpoint to make. The database checks it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str = Field(max_length=2048, examples=["https://example.org/pgscribe"])
    events: Events = Field(list(webhooks.EVENTS), description="What it is told of.")
    description: Description | None = Field(None, description="Your own note.")


class EndpointPatch(BaseModel):
    """What to change of an endpoint. What is not named stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"minProperties": 1})

    url: Annotated[str, Field(max_length=2048)] | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = Field(None, description="false: nothing is sent to it.")

    def to_change(self) -> webhooks.EndpointChange:
        """Return it as ``jobs.webhooks`` wants it."""
        return webhooks.EndpointChange(
            self.url,
            self.events,
            self.description,
            sets_description="description" in self.model_fields_set,
            enabled=self.enabled,
        )


class EndpointList(BaseModel):
    """All endpoints, the oldest first."""

    endpoints: list[webhooks.Endpoint]


class RotationRequest(BaseModel):
    """How to replace a secret."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keep_seconds: int = Field(
        86400,
        ge=0,
        le=int(webhooks.LONGEST_OVERLAP.total_seconds()),
        description="For how long requests are signed with the one before it, too.",
    )

    @property
    def keep(self) -> timedelta:
        """For how long."""
        return timedelta(seconds=self.keep_seconds)


class Secret(BaseModel):
    """A new secret. It is not shown again."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])


class DeliveryQuery(BaseModel):
    """Which deliveries to list."""

    model_config = ConfigDict(extra="forbid")

    endpoint: UUID | None = None
    job: UUID | None = None
    status: webhooks.DeliveryStatus | None = None
    limit: int = Field(50, ge=1, le=MAX_LIST)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the last page.")


class DeliveryList(BaseModel):
    """The newest deliveries first."""

    deliveries: list[Delivery]
    next_cursor: str | None = Field(description="For the next page; null on the last.")


class ReplayRequest(BaseModel):
    """Which deliveries to send again: those of a time."""

    model_config = ConfigDict(extra="forbid")

    since: Time
    until: Time | None = None
    endpoint: UUID | None = None
    status: Literal["failed", "delivered"] = "failed"


class Replayed(BaseModel):
    """How many deliveries are sent again: the oldest ones, up to 1,000."""

    replayed: int


_ENDPOINT = {OK: Answer("The endpoint", webhooks.Endpoint)}


@endpoint("GET", "/webhooks/endpoints", scope=Scope.WEBHOOKS_READ,
          answers={OK: Answer("Your endpoints", EndpointList)})  # fmt: skip
async def list_endpoints(request: Request, user: Principal) -> Response:
    """List where you are told that jobs have ended."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.list_endpoints(conn)
    return as_json(EndpointList(endpoints=found))


@endpoint("POST", "/webhooks/endpoints", scope=Scope.WEBHOOKS_WRITE,
          answers={CREATED: Answer("The endpoint", webhooks.NewEndpoint)})  # fmt: skip
async def create_endpoint(request: Request, user: Principal, body: EndpointRequest) -> Response:
    """Be told of jobs that have ended by signed requests to a URL.

    The answer has the secret that they are signed with, as https://www.standardwebhooks.com says;
    it is not shown again. At most 10 endpoints.
    """
    async with as_user(request.app.state.pool, user.claims) as conn:
        made = await webhooks.create_endpoint(conn, body.url, body.events, body.description)
    answer = as_json(made)
    answer.status_code = CREATED
    return answer


@endpoint("GET", "/webhooks/endpoints/{endpoint_id}", scope=Scope.WEBHOOKS_READ, answers=_ENDPOINT)
async def get_endpoint(request: Request, user: Principal, endpoint_id: UUID) -> Response:
    """Get an endpoint."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.get_endpoint(conn, endpoint_id)
    return as_json(found)


@endpoint(
    "PATCH", "/webhooks/endpoints/{endpoint_id}", scope=Scope.WEBHOOKS_WRITE, answers=_ENDPOINT
)
async def update_endpoint(
    request: Request, user: Principal, endpoint_id: UUID, body: EndpointPatch
) -> Response:
    """Change an endpoint, disable it, or enable it again."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.update_endpoint(conn, endpoint_id, body.to_change())
    return as_json(found)


@endpoint("DELETE", "/webhooks/endpoints/{endpoint_id}", scope=Scope.WEBHOOKS_WRITE,
          answers={NO_CONTENT: Answer("Deleted", media_types=())})  # fmt: skip
async def delete_endpoint(request: Request, user: Principal, endpoint_id: UUID) -> Response:
    """Delete an endpoint with its log. What waits for it is not sent any more."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        await webhooks.delete_endpoint(conn, endpoint_id)
    return Response(status_code=NO_CONTENT)


@endpoint("POST", "/webhooks/endpoints/{endpoint_id}/secret", scope=Scope.WEBHOOKS_WRITE,
          answers={OK: Answer("The new secret", Secret)})  # fmt: skip
async def rotate_secret(
    request: Request, user: Principal, endpoint_id: UUID, body: RotationRequest
) -> Response:
    """Replace an endpoint's secret. For a while, requests are signed with both."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        secret = await webhooks.rotate_secret(conn, endpoint_id, body.keep)
    return as_json(Secret(secret=secret))


@endpoint("POST", "/webhooks/secret", scope=Scope.WEBHOOKS_WRITE,
          answers={OK: Answer("The new secret", Secret)})  # fmt: skip
async def rotate_own_secret(request: Request, user: Principal, body: RotationRequest) -> Response:
    """Make the secret that requests to the `webhookUrl` of your jobs are signed with, anew.

    This is how to get it for the first time, too.
    """
    async with as_user(request.app.state.pool, user.claims) as conn:
        secret = await webhooks.rotate_secret(conn, None, body.keep)
    return as_json(Secret(secret=secret))


@endpoint("POST", "/webhooks/endpoints/{endpoint_id}/test", scope=Scope.WEBHOOKS_WRITE,
          answers={OK: Answer("The delivery, which waits", DeliveryLog)})  # fmt: skip
async def send_test(request: Request, user: Principal, endpoint_id: UUID) -> Response:
    """Send a `webhook.test` to an endpoint. What came of it, the delivery says a moment later."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.send_test(conn, endpoint_id)
    return as_json(found)


@endpoint("GET", "/webhooks/deliveries", scope=Scope.WEBHOOKS_READ,
          answers={OK: Answer("Deliveries", DeliveryList)})  # fmt: skip
async def list_deliveries(request: Request, user: Principal, query: DeliveryQuery) -> Response:
    """List what you were told, or are to be told, by webhook."""
    which = webhooks.DeliveryFilter(query.endpoint, query.job, query.status)
    async with as_user(request.app.state.pool, user.claims) as conn:
        page, rest = await webhooks.list_deliveries(
            conn, which, limit=query.limit, after=read_cursor(query.cursor)
        )
    return as_json(DeliveryList(deliveries=page, next_cursor=write_cursor(rest)))


@endpoint("POST", "/webhooks/replay", scope=Scope.WEBHOOKS_WRITE,
          answers={OK: Answer("How many", Replayed)})  # fmt: skip
async def replay_deliveries(request: Request, user: Principal, body: ReplayRequest) -> Response:
    """Send deliveries again that have failed, or were delivered, in some time."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        count = await webhooks.replay_all(
            conn, since=body.since, until=body.until, endpoint=body.endpoint, status=body.status
        )
    return as_json(Replayed(replayed=count))


@endpoint("GET", "/webhooks/deliveries/{delivery_id}", scope=Scope.WEBHOOKS_READ,
          answers={OK: Answer("The delivery", DeliveryLog)})  # fmt: skip
async def get_delivery(request: Request, user: Principal, delivery_id: UUID) -> Response:
    """Get a delivery with what it says, the requests that were made, and what came back."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.get_delivery(conn, delivery_id)
    return as_json(found)


@endpoint("POST", "/webhooks/deliveries/{delivery_id}/replay", scope=Scope.WEBHOOKS_WRITE,
          answers={OK: Answer("The delivery", DeliveryLog)})  # fmt: skip
async def replay_delivery(request: Request, user: Principal, delivery_id: UUID) -> Response:
    """Send a delivery again, with the same id: a receiver knows that it has had it."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await webhooks.replay(conn, delivery_id)
    return as_json(found)
