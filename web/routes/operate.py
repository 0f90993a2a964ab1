"""For operators: the queue and everybody's jobs. Who is one, the database says at each request."""

import logging
from http import HTTPStatus
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from jobs import operate
from jobs.database import as_user
from jobs.models import JobStatus
from jobs.service import MAX_LIST
from web.endpoints import Answer, Endpoints, Principal, Scope
from web.routes.jobs import as_json, read_cursor, write_cursor

logger = logging.getLogger(__name__)

MAX_CHANGE_BODY = 128 * 1024  # bytes of JSON: 1,000 ids, however they are set out

OK, NO_CONTENT = HTTPStatus.OK, HTTPStatus.NO_CONTENT
_DONE = {NO_CONTENT: Answer("Done", media_types=())}

endpoint = Endpoints("Operate")

ErrorCode = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$", max_length=100)]


class Me(BaseModel):
    """Who is asking."""

    user_id: UUID
    email: str | None
    operator: bool = Field(description="Whether you may use what is under `/operate`.")


class OverviewQuery(BaseModel):
    """How far to look back."""

    model_config = ConfigDict(extra="forbid")

    hours: int = Field(24, ge=1, le=operate.MAX_HOURS)


class Filter(BaseModel):
    """Which jobs: those for which all of this is so."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    status: JobStatus | None = None
    owner: UUID | None = None
    error_code: ErrorCode | None = None

    def to_filter(self) -> operate.JobFilter:
        """Return it as ``jobs.operate`` wants it."""
        return operate.JobFilter(self.status, self.owner, self.error_code)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.to_filter() == operate.JobFilter():
            raise ValueError("is empty; name a status, an owner or an error_code")
        return self


class JobsQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = None
    owner: UUID | None = None
    error_code: ErrorCode | None = None
    limit: int = Field(50, ge=1, le=MAX_LIST)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the last page.")


class OperatorJobList(BaseModel):
    """The newest jobs first."""

    jobs: list[operate.OperatorJob]
    next_cursor: str | None = Field(description="For the next page; null on the last.")


class DeliveriesQuery(BaseModel):
    """Which deliveries of webhooks to list."""

    model_config = ConfigDict(extra="forbid")

    status: operate.OpenStatus = "failed"
    owner: UUID | None = None
    limit: int = Field(50, ge=1, le=MAX_LIST)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the last page.")


class OperatorDeliveryList(BaseModel):
    """The newest deliveries first."""

    deliveries: list[operate.OperatorDelivery]
    next_cursor: str | None = Field(description="For the next page; null on the last.")


class DeliverySelection(BaseModel):
    """Which deliveries to send again."""

    model_config = ConfigDict(extra="forbid")

    ids: list[UUID] = Field(min_length=1, max_length=operate.MAX_CHANGED)


class Replayed(BaseModel):
    """How many deliveries are sent again."""

    replayed: int


class Selection(BaseModel):
    """Which jobs to change: `ids` or `filter`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": ["ids"]}, {"required": ["filter"]}]},
    )

    ids: list[UUID] | None = Field(None, min_length=1, max_length=operate.MAX_CHANGED)
    filter: Filter | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("must have either ids or filter")
        return self

    def jobs(self) -> operate.JobFilter | list[UUID]:
        """Return it as ``jobs.operate`` wants it."""
        return self.filter.to_filter() if self.filter else self.ids or []


class RetrySelection(Selection):
    """Which jobs to run again."""

    ended_before: AwareDatetime | None = Field(
        None,
        description="Only jobs that ended before then. With `at` of the first answer, requests "
        "that follow it retry no job again that has failed again since.",
    )


@endpoint("GET", "/me", answers={OK: Answer("You", Me)})
async def me(request: Request, user: Principal) -> Response:
    """Say who you are, and whether you are an operator."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        operator = await operate.is_operator(conn)
    email = user.claims.get("email")
    named = email if isinstance(email, str) and email else None
    return as_json(Me(user_id=user.user_id, email=named, operator=operator))


@endpoint(
    "GET",
    "/operate/overview",
    scope=Scope.OPERATE,
    answers={OK: Answer("What goes on", operate.Overview)},
)
async def overview(request: Request, user: Principal, query: OverviewQuery) -> Response:
    """See the queue, workers and owners now, what ended lately, and what each day cost."""
    stall_timeout = request.app.state.settings.stall_timeout
    async with as_user(request.app.state.pool, user.claims) as conn:
        seen = await operate.overview(conn, hours=query.hours, stall_timeout=stall_timeout)
    return as_json(seen)


@endpoint(
    "GET",
    "/operate/jobs",
    scope=Scope.OPERATE,
    answers={OK: Answer("Jobs of all owners", OperatorJobList)},
)
async def operator_jobs(request: Request, user: Principal, query: JobsQuery) -> Response:
    """List everybody's jobs, the newest first, without transcripts and prompts."""
    wanted = operate.JobFilter(query.status, query.owner, query.error_code)
    after = read_cursor(query.cursor)
    async with as_user(request.app.state.pool, user.claims) as conn:
        jobs, following = await operate.list_jobs(conn, wanted, limit=query.limit, after=after)
    return as_json(OperatorJobList(jobs=jobs, next_cursor=write_cursor(following)))


_CHANGED = {OK: Answer("So many", operate.Changed)}


@endpoint(
    "POST",
    "/operate/jobs/cancel",
    scope=Scope.OPERATE,
    answers=_CHANGED,
    max_body=MAX_CHANGE_BODY,
)
async def cancel_jobs(request: Request, user: Principal, body: Selection) -> Response:
    """Cancel jobs that wait or run: up to 1,000 at a time; repeat it while there are `more`."""
    return await _change_jobs(request, user, "cancel", body)


@endpoint(
    "POST",
    "/operate/jobs/retry",
    scope=Scope.OPERATE,
    answers=_CHANGED,
    max_body=MAX_CHANGE_BODY,
)
async def retry_jobs(request: Request, user: Principal, body: RetrySelection) -> Response:
    """Run failed and cancelled jobs again: up to 1,000 at a time.

    While there are `more`, repeat it with `at` of the first answer as `ended_before`.

    They count as their owners' jobs that wait: those are `refused` that would be too many.
    """
    return await _change_jobs(request, user, "retry", body)


async def _change_jobs(
    request: Request, user: Principal, action: operate.Action, body: Selection
) -> Response:
    jobs = body.jobs()
    ended_before = body.ended_before if isinstance(body, RetrySelection) else None
    async with as_user(request.app.state.pool, user.claims) as conn:
        changed = await operate.change_jobs(conn, action, jobs, ended_before=ended_before)
    which = jobs.values() if isinstance(jobs, operate.JobFilter) else {"ids": len(jobs)}
    _log(user, f"{action}_jobs", **which, **changed.model_dump(exclude={"at"}))
    return as_json(changed)


@endpoint(
    "GET",
    "/operate/webhooks/deliveries",
    scope=Scope.OPERATE,
    answers={OK: Answer("Deliveries of all owners", OperatorDeliveryList)},
)
async def operator_deliveries(
    request: Request, user: Principal, query: DeliveriesQuery
) -> Response:
    """List everybody's webhooks that have failed, wait or are being sent, the newest first."""
    after = read_cursor(query.cursor)
    async with as_user(request.app.state.pool, user.claims) as conn:
        found, following = await operate.list_deliveries(
            conn, query.status, owner=query.owner, limit=query.limit, after=after
        )
    return as_json(OperatorDeliveryList(deliveries=found, next_cursor=write_cursor(following)))


@endpoint(
    "POST",
    "/operate/webhooks/replay",
    scope=Scope.OPERATE,
    answers={OK: Answer("So many", Replayed)},
    max_body=MAX_CHANGE_BODY,
)
async def replay_deliveries(request: Request, user: Principal, body: DeliverySelection) -> Response:
    """Send webhooks again, with the same ids: up to 1,000 at a time.

    Those that wait, or whose endpoint is disabled, are left as they are.
    """
    async with as_user(request.app.state.pool, user.claims) as conn:
        count = await operate.replay_deliveries(conn, body.ids)
    _log(user, "replay_deliveries", ids=len(body.ids), replayed=count)
    return as_json(Replayed(replayed=count))


@endpoint("POST", "/operate/queue/pause", scope=Scope.OPERATE, answers=_DONE)
async def pause_queue(request: Request, user: Principal) -> Response:
    """Start no more jobs; running ones go on."""
    return await _pause_or_resume(request, user, "pause")


@endpoint("POST", "/operate/queue/resume", scope=Scope.OPERATE, answers=_DONE)
async def resume_queue(request: Request, user: Principal) -> Response:
    """Start jobs again."""
    return await _pause_or_resume(request, user, "resume")


@endpoint("POST", "/operate/owners/{owner_id}/pause", scope=Scope.OPERATE, answers=_DONE)
async def pause_owner(request: Request, user: Principal, owner_id: UUID) -> Response:
    """Start no more jobs of an owner; running ones go on."""
    return await _pause_or_resume(request, user, "pause", owner_id)


@endpoint("POST", "/operate/owners/{owner_id}/resume", scope=Scope.OPERATE, answers=_DONE)
async def resume_owner(request: Request, user: Principal, owner_id: UUID) -> Response:
    """Start jobs of an owner again."""
    return await _pause_or_resume(request, user, "resume", owner_id)


async def _pause_or_resume(
    request: Request,
    user: Principal,
    action: Literal["pause", "resume"],
    owner: UUID | None = None,
) -> Response:
    async with as_user(request.app.state.pool, user.claims) as conn:
        if owner is None:
            await operate.pause_or_resume_queue(conn, action)
        else:
            await operate.pause_or_resume_owner(conn, action, owner)
    _log(user, f"{action}_{'queue' if owner is None else 'owner'}", owner=owner)
    return Response(status_code=NO_CONTENT)


def _log(user: Principal, action: str, **said: Any) -> None:
    """Log an action that is committed, for whoever asks later who did it."""
    known = {"operator": user.user_id, "key": user.key_id, "action": action, **said}
    text = " ".join(f"{name}={value}" for name, value in known.items() if value is not None)
    logger.info("Operator's action: %s", text)
