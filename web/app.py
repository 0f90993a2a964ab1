"""The Starlette application."""

import functools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import psycopg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from jobs import __version__, database
from jobs.errors import PgscribeError
from jobs.settings import Settings
from jobs.storage.choose import make_storage
from web import endpoints, openapi, problems
from web.auth import Authenticator
from web.events import EventHub
from web.metrics import Measured, WebMetrics
from web.middleware import middleware
from web.openai_errors import in_openai_form
from web.pages import ExceptionHandler, as_page
from web.rendering import Renderer
from web.routes import (
    corrections,
    docs,
    events,
    health,
    jobs,
    metrics,
    openai,
    operate,
    pages,
    resumable,
    sign_in,
    transcripts,
    uploads,
    webhooks,
)
from web.sessions import Sessions
from web.sign_in import choose, refuse_other_databases
from web.throttle import Throttle
from web.waiting import Waiters

TAGS = {
    "Jobs": "Transcription jobs.",
    "Live": "What happens to jobs, as server-sent events.",
    "Transcripts": "What was said, as text and as subtitles.",
    "Audio": "Recordings in storage.",
    "Webhooks": "Signed requests to you when jobs have ended, and their log.",
    "Operate": "The queue and everybody's jobs, for operators.",
    "OpenAI-compatible": "Transcriptions as OpenAI's API has them: change `base_url`, no more.",
}

# In the order in which they are matched.
ENDPOINTS = [
    *events.endpoint.all,
    *jobs.endpoint.all,
    *transcripts.endpoint.all,
    *corrections.endpoint.all,
    *resumable.endpoint.all,
    *uploads.endpoint.all,
    *webhooks.endpoint.all,
    *operate.endpoint.all,
    *metrics.endpoint.all,
    *openai.endpoint.all,
]


def _in_its_form(handler: ExceptionHandler) -> ExceptionHandler:
    return as_page(in_openai_form(handler))


def create_app(settings: Settings) -> Starlette:
    """Return the app; its connections open with its lifespan. Raises ``SettingsError``."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        state = app.state
        await refuse_other_databases(settings)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(state.pool)
            if state.sign_in is not None:
                await stack.enter_async_context(aclosing(state.sign_in))
            await stack.enter_async_context(aclosing(state.authenticator))
            await stack.enter_async_context(aclosing(state.storage))
            await stack.enter_async_context(state.renderer)
            await stack.enter_async_context(state.events)
            yield

    figures = WebMetrics()
    app = Starlette(
        routes=[
            *health.routes(),
            metrics.route(),  # before its endpoint, which needs the database
            *docs.routes(),
            *sign_in.routes(),
            *endpoints.routes(ENDPOINTS),
            *pages.routes(),
        ],
        exception_handlers={
            PgscribeError: _in_its_form(problems.on_pgscribe_error),
            HTTPException: _in_its_form(problems.on_http_exception),
            ClientDisconnect: _in_its_form(problems.on_disconnect),
            psycopg.OperationalError: _in_its_form(problems.on_database_away),
            Exception: _in_its_form(problems.on_unexpected_error),
        },
        middleware=[Middleware(Measured, metrics=figures), *middleware(settings)],
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.metrics = figures
    app.state.events = EventHub(settings)
    app.state.waiters = Waiters()
    app.state.renderer = Renderer()
    app.state.openapi = functools.cache(lambda: openapi.describe(ENDPOINTS, TAGS))
    app.state.pool = database.make_pool(settings, name=f"web {__version__}")
    app.state.sign_in = choose(settings, app.state.pool)
    app.state.attempts = Throttle(settings.sign_in_rate_limit, "attempts to sign in")
    sessions = Sessions(settings, app.state.pool, app.state.sign_in)
    app.state.authenticator = Authenticator(settings, app.state.pool, sessions)
    app.state.storage = make_storage(settings, signs=True)
    app.state.readiness = health.Readiness(settings, app.state.pool)
    app.state.scrapes = metrics.Scrapes()
    figures.watch(app)
    return app
