"""Following jobs as they change, as server-sent events."""

from http import HTTPStatus
from uuid import UUID

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from web.endpoints import Answer, Endpoints, Principal, Scope
from web.events import EventHub
from web.sse import HEADERS, EventStream

endpoint = Endpoints("Live")

_EVENTS = {HTTPStatus.OK: Answer("Events", media_types=("text/event-stream",))}
_NOTHING_LEFT = {HTTPStatus.NO_CONTENT: Answer("It has ended, as you know", media_types=())}


class LastEvent(BaseModel):
    """Where the stream broke off; EventSource sends it by itself."""

    id: str = Field("", alias="Last-Event-ID", max_length=100)


@endpoint("GET", "/jobs/events", scope=Scope.JOBS_READ, answers=_EVENTS)
async def events(request: Request, user: Principal, headers: LastEvent) -> Response | EventStream:
    """Follow all your jobs: a snapshot of the active ones, then what changes."""
    return await _stream(request, user, headers.id, None)


@endpoint(
    "GET",
    "/jobs/{job_id}/events",
    scope=Scope.JOBS_READ,
    answers=_EVENTS | _NOTHING_LEFT,
)
async def job_events(
    request: Request, user: Principal, headers: LastEvent, job_id: UUID
) -> Response | EventStream:
    """Follow a job: its state, then what changes, until it has ended.

    `job`: its status, progress and so on. `partial`: more of its text. `deleted`. `end`: nothing
    more will come, and why. With `Last-Event-ID` only what is newer; 204 where there is nothing.
    """
    return await _stream(request, user, headers.id, job_id)


async def _stream(
    request: Request, user: Principal, last_event_id: str, job_id: UUID | None
) -> Response | EventStream:
    if request.method == "HEAD":
        return Response(headers=HEADERS)
    hub: EventHub = request.app.state.events
    listener = await hub.listen(
        user.claims, job_id=job_id, last_event_id=last_event_id, session_id=user.session_id
    )
    if listener.ended and listener.ended_before:
        listener.close()
        return Response(status_code=HTTPStatus.NO_CONTENT)  # EventSource does not come back then
    return EventStream(listener)
