"""The web app's pages. What they show they fetch from the REST API, with the session's cookie."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route

from jobs import operate as operators
from jobs import service
from jobs.database import as_user
from jobs.errors import JobNotFound, NotAnOperator
from jobs.webhooks import EVENTS
from web.auth import Principal
from web.languages import NAMES
from web.pages import HOME, page_user, render, static_files

MODELS = ("tiny", "base", "small", "medium", "large-v3", "turbo")

Page = Callable[[Request, Principal], Awaitable[Response]]


def _signed_in(page: Page) -> Callable[[Request], Awaitable[Response]]:
    """Send whoever is not signed in to where they can, and then back."""

    async def respond(request: Request) -> Response:
        user = await page_user(request)
        if isinstance(user, Response):
            return user
        async with as_user(request.app.state.pool, user.claims) as conn:
            request.state.operator = await operators.is_operator(conn)
        return await page(request, user)

    return respond


async def home(_: Request) -> Response:
    """``GET /``: the app."""
    return RedirectResponse(HOME)


async def jobs(request: Request, user: Principal) -> Response:
    """``GET /app``: upload recordings, watch them being transcribed, find transcripts."""
    languages = sorted((name.title(), code) for code, name in NAMES.items())
    return render(request, "jobs.html", {"languages": languages, "models": MODELS}, user=user)


async def webhooks(request: Request, user: Principal) -> Response:
    """``GET /app/webhooks``: who is told that jobs have ended, and what they were told."""
    return render(request, "webhooks.html", {"events": EVENTS}, user=user)


async def operate(request: Request, user: Principal) -> Response:
    """``GET /app/operate``: the queue, its workers and owners, failures, cost."""
    if not request.state.operator:
        raise NotAnOperator
    return render(request, "operate.html", user=user)


async def unknown(_: Request, __: Principal) -> Response:
    """Any other path: there is no such page."""
    raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such page.")


async def job(request: Request, user: Principal) -> Response:
    """``GET /app/jobs/{job_id}``: a transcript, or how far it has come."""
    try:
        job_id = UUID(request.path_params["job_id"])
        async with as_user(request.app.state.pool, user.claims) as conn:
            found = await service.get(conn, job_id, result=False)
    except ValueError:
        raise JobNotFound from None
    name = found.file_path.rpartition("/")[2]
    return render(request, "job.html", {"job_id": job_id, "name": name}, user=user)


def routes() -> list[Route | Mount]:
    """Return the routes of the pages and of what they load."""
    return [
        Route("/", home),
        static_files(),
        Route(HOME, _signed_in(jobs)),
        Route(f"{HOME}/jobs/{{job_id}}", _signed_in(job)),
        Route(f"{HOME}/webhooks", _signed_in(webhooks)),
        Route(f"{HOME}/operate", _signed_in(operate)),
        Route(f"{HOME}/{{path:path}}", _signed_in(unknown)),
    ]
