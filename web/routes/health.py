"""For whoever starts, restarts and balances web servers. Nobody is asked who they are."""

import asyncio
import os
import time
from collections.abc import Sequence
from functools import cached_property
from http import HTTPStatus
from pathlib import Path

import psycopg
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from db import migrate
from jobs.database import Pool, promptly
from jobs.errors import DatabaseUnavailable
from jobs.settings import Settings
from jobs.sql import SESSIONS

FRESH = 1.0  # seconds for which an answer is given again, whoever asks
PATIENCE = 3.0  # seconds for the database


class Readiness:
    """Whether requests would be answered well now.

    Supabase's storage is not asked: while it is away, all but audio is answered as ever.
    """

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._pool = pool
        self._folder = settings.storage_dir if settings.storage == "local" else None
        self._looking = asyncio.Lock()
        self._looked_at = -FRESH
        self._missing: str | None = None

    async def missing(self) -> str | None:
        """Return what is missing, in a word: ``database``, ``migrations`` or ``storage``."""
        async with self._looking:
            if time.monotonic() - self._looked_at >= FRESH:
                self._missing = await self._look()
                self._looked_at = time.monotonic()
            return self._missing

    async def _look(self) -> str | None:
        try:
            migrated = await promptly(self._is_migrated(), PATIENCE)
        except DatabaseUnavailable:
            return "database"
        if not migrated:
            return "migrations"
        if self._folder is not None and not _usable(self._folder):
            return "storage"
        return None

    @cached_property
    def _known(self) -> Sequence[str]:
        return [migration.version for migration in migrate.migrations()]

    async def _is_migrated(self) -> bool:
        """Return whether the database has all migrations that this version has, or newer ones."""
        async with self._pool.connection() as conn:
            try:
                cursor = await conn.execute(SESSIONS["missing_migrations"], {"known": self._known})
            except psycopg.errors.UndefinedTable:
                return False
            return await cursor.fetchone() is None


def _usable(folder: Path) -> bool:
    """Whether files can be written there; a folder that is missing is made when it is needed."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


async def healthz(_: Request) -> Response:
    """``GET /healthz``: the process answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """``GET /readyz``: it would answer requests well, or what is missing for that."""
    readiness: Readiness = request.app.state.readiness
    missing = await readiness.missing()
    if missing is None:
        return JSONResponse({"status": "ok"})
    answer = {"status": "unready", "reason": missing}
    return JSONResponse(answer, HTTPStatus.SERVICE_UNAVAILABLE)


def routes() -> list[Route]:
    """Return the routes."""
    return [Route("/healthz", healthz), Route("/readyz", readyz)]
