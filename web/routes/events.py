"""Following jobs as they change, as server-sent events."""

from http import HTTPStatus
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobs.errors import JobNotFound
from web.auth import user_claims
from web.events import EventHub
from web.sse import HEADERS, EventStream


async def job_events(request: Request) -> Response | EventStream:
    """``GET /jobs/{jobId}/events``: the job's state, then what changes, until it has ended."""
    try:
        job_id = UUID(request.path_params["job_id"])
    except ValueError:
        user_claims(request)
        raise JobNotFound from None
    return await _stream(request, job_id)


async def events(request: Request) -> Response | EventStream:
    """``GET /jobs/events``: a snapshot of the user's active jobs, then what changes."""
    return await _stream(request, None)


async def _stream(request: Request, job_id: UUID | None) -> Response | EventStream:
    claims = user_claims(request)
    if request.method == "HEAD":
        return Response(headers=HEADERS)
    hub: EventHub = request.app.state.events
    listener = await hub.listen(
        claims, job_id=job_id, last_event_id=request.headers.get("last-event-id", "")
    )
    if listener.ended and listener.ended_before:
        listener.close()
        return Response(status_code=HTTPStatus.NO_CONTENT)  # EventSource does not come back then
    return EventStream(listener)


routes = [
    Route("/jobs/events", events, methods=["GET"]),
    Route("/jobs/{job_id}/events", job_events, methods=["GET"]),
]
