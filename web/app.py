"""The Starlette application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs import database
from jobs.errors import PgscribeError
from jobs.settings import Settings
from jobs.storage.local import LocalStorage
from web import problems
from web.auth import TokenVerifier
from web.events import EventHub
from web.routes import events, jobs, uploads


async def healthz(_: Request) -> Response:
    """``GET /healthz``: the process answers."""
    return JSONResponse({"status": "ok"})


def create_app(settings: Settings) -> Starlette:
    """Return the app; its connections open with its lifespan. Raises ``SettingsError``."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with app.state.pool, app.state.events:
            yield

    app = Starlette(
        routes=[Route("/healthz", healthz), *events.routes, *jobs.routes, *uploads.routes],
        exception_handlers={
            PgscribeError: problems.on_pgscribe_error,
            HTTPException: problems.on_http_exception,
            ClientDisconnect: problems.on_disconnect,
            psycopg.OperationalError: problems.on_database_away,
            Exception: problems.on_unexpected_error,
        },
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.verifier = TokenVerifier(settings)
    app.state.storage = LocalStorage(settings.storage_dir, max_bytes=settings.max_upload_bytes)
    app.state.events = EventHub(settings)
    app.state.pool = database.make_pool(settings, name="web")
    return app
