"""For Prometheus: what this server does, and figures of the whole database. For operators only."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from jobs import operate
from jobs.database import as_user, promptly
from jobs.errors import DatabaseUnavailable, NotAnOperator, PgscribeError
from web.endpoints import Answer, Endpoints, Principal, Scope
from web.metrics import WebMetrics

FRESH = 5.0  # seconds for which figures of the database are told again
PATIENCE = 4.0  # seconds for the database; Prometheus waits for 10 by default
REMEMBERED = 900.0  # seconds for which somebody who was let in needs no database
MOST_REMEMBERED = 1000
TEXT = "text/plain"
OPENMETRICS = "application/openmetrics-text"

endpoint = Endpoints("Operate")


class Scrapes:
    """Figures of the database that were read a moment ago, and who was let in lately.

    So many scrapers cost the database one query, and those that were let in when it was last asked
    still get what there is to say when it is away.
    """

    def __init__(self) -> None:
        self._figures: dict[str, Any] | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()
        self._let_in: OrderedDict[bytes, float] = OrderedDict()

    async def figures(self, request: Request, user: Principal) -> Mapping[str, Any]:
        """Return the database's figures. Raises ``NotAnOperator``."""
        pool, settings = request.app.state.pool, request.app.state.settings
        async with self._reading, as_user(pool, user.claims) as conn:
            if self._figures is not None and time.monotonic() - self._read_at < FRESH:
                if not await operate.is_operator(conn):
                    raise NotAnOperator
                return self._figures
            self._figures = await operate.metrics(conn, stall_timeout=settings.stall_timeout)
            self._read_at = time.monotonic()
            return self._figures

    def let_in(self, request: Request) -> None:
        """Remember who was let in."""
        digest = _digest(request)
        self._let_in[digest] = time.monotonic()
        self._let_in.move_to_end(digest)
        if len(self._let_in) > MOST_REMEMBERED:
            self._let_in.popitem(last=False)

    def turn_away(self, request: Request) -> None:
        """Forget whoever is let in no more."""
        self._let_in.pop(_digest(request), None)

    def knows(self, request: Request) -> bool:
        """Whether who is asking was let in lately."""
        at = self._let_in.get(_digest(request))
        return at is not None and time.monotonic() - at < REMEMBERED


def _digest(request: Request) -> bytes:
    names = ("authorization", "cookie", "pgscribe-user")
    # Cookies may come in several headers, of which each counts.
    who = [f"{name}:{value}" for name in names for value in request.headers.getlist(name)]
    return hashlib.sha256("\0".join(who).encode()).digest()


@endpoint(
    "GET",
    "/metrics",
    scope=Scope.OPERATE,
    answers={HTTPStatus.OK: Answer("Metrics", media_types=(TEXT, OPENMETRICS))},
)
async def show_metrics(request: Request, user: Principal) -> Response:
    """Read what this server does and figures of the whole database, as Prometheus does.

    While the database is away, whoever was let in before is told what the server does, and
    `pgscribe_database_up 0`.
    """
    figures = await _scrapes(request).figures(request, user)
    return _answer(request, figures)


async def scrape(request: Request) -> ASGIApp:
    """Answer as the endpoint does, also without the database."""
    scrapes, (declared,) = _scrapes(request), endpoint.all
    try:
        answer = await promptly(declared.respond(request), PATIENCE)
    except DatabaseUnavailable:
        if not scrapes.knows(request):
            raise
        return _answer(request, None)  # which is no reason to remember them for longer
    except PgscribeError:
        scrapes.turn_away(request)
        raise
    scrapes.let_in(request)
    return answer


def route() -> Route:
    """Return the route that answers without the database, too."""
    return Route("/metrics", scrape, methods=["GET"])


def _answer(request: Request, figures: Mapping[str, Any] | None) -> Response:
    metrics: WebMetrics = request.app.state.metrics
    body, media_type = metrics.render(request.headers.get("accept", ""), figures)
    return Response(body, headers={"Content-Type": media_type})


def _scrapes(request: Request) -> Scrapes:
    scrapes: Scrapes = request.app.state.scrapes
    return scrapes
