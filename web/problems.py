"""Errors as RFC 9457 problem details: a stable code, a message for people, the field to blame."""

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs import errors

logger = logging.getLogger(__name__)

_STATUS: dict[type[errors.PgscribeError], HTTPStatus] = {
    errors.InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    errors.NotAllowed: HTTPStatus.FORBIDDEN,
    errors.JobNotFound: HTTPStatus.NOT_FOUND,
    errors.UserNotFound: HTTPStatus.NOT_FOUND,
    errors.EndpointNotFound: HTTPStatus.NOT_FOUND,
    errors.DeliveryNotFound: HTTPStatus.NOT_FOUND,
    errors.JobConflict: HTTPStatus.CONFLICT,
    errors.RequestInFlight: HTTPStatus.CONFLICT,
    errors.NotAcceptable: HTTPStatus.NOT_ACCEPTABLE,
    errors.TranscriptNotReady: HTTPStatus.CONFLICT,
    errors.NoTranscript: HTTPStatus.CONFLICT,
    errors.LimitReached: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DatabaseUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.AudioNotFound: HTTPStatus.NOT_FOUND,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.SigningKeysUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.SignInUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.FileExists: HTTPStatus.CONFLICT,
    errors.LinkInvalid: HTTPStatus.FORBIDDEN,
    errors.UploadGone: HTTPStatus.GONE,
    errors.UploadLocked: HTTPStatus.LOCKED,
    errors.UploadStalled: HTTPStatus.REQUEST_TIMEOUT,
    errors.OffsetConflict: HTTPStatus.CONFLICT,
    errors.UnsupportedVersion: HTTPStatus.PRECONDITION_FAILED,
    errors.UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.StorageUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.UrlRefused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UrlUnavailable: HTTPStatus.BAD_GATEWAY,
    errors.TooManyStreams: HTTPStatus.TOO_MANY_REQUESTS,
    errors.ServerBusy: HTTPStatus.SERVICE_UNAVAILABLE,
}


class Problem(BaseModel):
    """A problem detail (RFC 9457). Programs read ``code``; ``detail`` is for people."""

    type: str
    title: str = Field(description="The status, in words.")
    status: int
    code: str = Field(description="Stable: it never changes its meaning.")
    detail: str
    field: str | None = Field(None, description="Path of the field to blame, `options.model`.")
    limit: int | float | str | None = Field(None, description="The limit that was hit.")
    retry_after: int | None = Field(None, description="Seconds; also in the header Retry-After.")


def problem(  # noqa: PLR0913 - each has a name
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    field: str | None = None,
    limit: float | str | None = None,
    retry_after: float | None = None,
) -> JSONResponse:
    """Return an ``application/problem+json`` response; ``code`` is stable, ``detail`` is not."""
    seconds = None if retry_after is None else max(1, math.ceil(retry_after))
    content = Problem(
        type="about:blank",
        title=status.phrase,
        status=status.value,
        code=code,
        detail=detail,
        field=field,
        limit=limit,
        retry_after=seconds,
    )
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return JSONResponse(
        content.model_dump(exclude_none=True), status, headers, "application/problem+json"
    )


def _status(exc: errors.PgscribeError) -> HTTPStatus | None:
    return next((_STATUS[kind] for kind in type(exc).__mro__ if kind in _STATUS), None)


async def on_pgscribe_error(_: Request, exc: Exception) -> Response:
    """Answer with what a known error says of itself."""
    assert isinstance(exc, errors.PgscribeError)
    status = _status(exc)
    if status is None:
        return await on_unexpected_error(_, exc)
    named: dict[str, Any] = {name: getattr(exc, name, None) for name in ("field", "limit")}
    response = problem(status, exc.code, str(exc), retry_after=exc.retry_after, **named)
    if challenge := _challenge(exc):
        response.headers["WWW-Authenticate"] = challenge
    return response


def _challenge(exc: errors.PgscribeError) -> str | None:
    """Return what RFC 6750 wants said of a token. Whoever sent none is told no error."""
    if isinstance(exc, errors.InvalidToken):
        return 'Bearer error="invalid_token"'
    if isinstance(exc, errors.ScopeMissing):
        return f'Bearer error="insufficient_scope", scope="{exc.scope}"'
    return "Bearer" if isinstance(exc, errors.NotAuthenticated) else None


async def on_database_away(_: Request, exc: Exception) -> Response:
    """Answer while the database is away, or has broken the transaction off."""
    logger.warning("The database does not answer: %s", exc)
    away = errors.DatabaseUnavailable()
    return problem(HTTPStatus.SERVICE_UNAVAILABLE, away.code, str(away), retry_after=2)


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """Answer what routing refuses: unknown paths and methods."""
    assert isinstance(exc, HTTPException)
    status = HTTPStatus(exc.status_code)
    detail = exc.detail
    if detail == status.phrase:  # nobody has said more
        detail = _unrouted(request, status, exc.headers or {}) or detail
    response = problem(status, status.name.lower(), detail)
    response.headers.update(exc.headers or {})
    return response


def _unrouted(request: Request, status: HTTPStatus, headers: Mapping[str, str]) -> str | None:
    if status is HTTPStatus.NOT_FOUND:
        return "There is nothing under this path; /docs has all that there are"
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "another method")
        return f"{request.method} is not for this path; use {allowed}"
    return None


async def on_disconnect(_: Request, __: Exception) -> Response:
    """Answer nobody: the client went away while it was sending."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def on_unexpected_error(_: Request, exc: Exception) -> Response:
    """Log the error and tell the client nothing of it."""
    logger.error("Unexpected error", exc_info=exc)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return problem(status, "internal_error", "Something went wrong here; it has been logged.")
