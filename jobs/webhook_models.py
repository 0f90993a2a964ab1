"""Webhooks, as the database, the REST API and its clients show them to their owners."""

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

Event = Literal["job.completed", "job.failed", "job.cancelled"]
DeliveryStatus = Literal["queued", "sending", "delivered", "failed"]

EVENTS: tuple[Event, ...] = ("job.completed", "job.failed", "job.cancelled")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Endpoint(_Frozen):
    """Where an owner is told that jobs have ended.

    ``disabled_reason`` is ``owner``, ``gone`` (it answered 410) or ``failing`` (nothing came
    through for days).
    """

    id: UUID
    url: str
    events: list[Event]
    description: str | None
    created_at: datetime
    updated_at: datetime
    disabled_at: datetime | None
    disabled_reason: Literal["owner", "gone", "failing"] | None


class NewEndpoint(Endpoint):
    """An endpoint with its ``secret``, which is not shown again."""

    secret: str = Field(repr=False)


class Delivery(_Frozen):
    """What an owner is told once, at an endpoint or at ``url``, the job's own.

    ``attempts`` counts requests; ``due_at`` is when the next one is made, if it waits for that.
    """

    id: UUID
    endpoint_id: UUID | None
    job_id: UUID | None
    url: str | None
    event: str
    status: DeliveryStatus
    attempts: int
    created_at: datetime
    due_at: datetime | None
    completed_at: datetime | None
    response_status: int | None
    error_code: str | None
    error: str | None


class DeliveryAttempt(_Frozen):
    """One request, and what came back. ``seconds`` is how long that took."""

    attempt: int
    started_at: datetime
    seconds: float
    response_status: int | None
    response_excerpt: str | None
    error_code: str | None
    error: str | None


class DeliveryLog(Delivery):
    """A delivery with what it says and its requests."""

    payload: dict[str, Any]
    log: list[DeliveryAttempt]
