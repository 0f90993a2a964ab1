"""Errors as RFC 9457 problem details: a stable code, a message for people, the field to blame."""

import logging
import math
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs import errors

logger = logging.getLogger(__name__)

_STATUS: dict[type[errors.PgscribeError], HTTPStatus] = {
    errors.InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UploadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    errors.NotAllowed: HTTPStatus.FORBIDDEN,
    errors.JobNotFound: HTTPStatus.NOT_FOUND,
    errors.JobConflict: HTTPStatus.CONFLICT,
    errors.DatabaseUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.AudioNotFound: HTTPStatus.NOT_FOUND,
    errors.TooManyStreams: HTTPStatus.TOO_MANY_REQUESTS,
    errors.ServerBusy: HTTPStatus.SERVICE_UNAVAILABLE,
}


def problem(
    status: HTTPStatus, code: str, detail: str, *, field: str | None = None
) -> JSONResponse:
    """Return an ``application/problem+json`` response; ``code`` is stable, ``detail`` is not."""
    content = {"type": "about:blank", "title": status.phrase, "status": status.value}
    content |= {"code": code, "detail": detail} | ({"field": field} if field else {})
    headers = {"WWW-Authenticate": "Bearer"} if status is HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(content, status, headers, media_type="application/problem+json")


async def on_pgscribe_error(_: Request, exc: Exception) -> Response:
    """Answer with what a known error says of itself."""
    assert isinstance(exc, errors.PgscribeError)
    status = _STATUS.get(type(exc))
    if status is None:
        return await on_unexpected_error(_, exc)
    response = problem(status, exc.code, str(exc), field=getattr(exc, "field", None))
    if exc.retry_after is not None:
        response.headers["Retry-After"] = str(math.ceil(exc.retry_after))
    return response


async def on_database_away(_: Request, exc: Exception) -> Response:
    """Answer while the database is away, or has broken the transaction off."""
    logger.warning("The database does not answer: %s", exc)
    away = errors.DatabaseUnavailable()
    response = problem(HTTPStatus.SERVICE_UNAVAILABLE, away.code, str(away))
    response.headers["Retry-After"] = "2"
    return response


async def on_http_exception(_: Request, exc: Exception) -> Response:
    """Answer what routing refuses: unknown paths and methods."""
    assert isinstance(exc, HTTPException)
    status = HTTPStatus(exc.status_code)
    response = problem(status, status.name.lower(), exc.detail)
    response.headers.update(exc.headers or {})
    return response


async def on_disconnect(_: Request, __: Exception) -> Response:
    """Answer nobody: the client went away while it was sending."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def on_unexpected_error(_: Request, exc: Exception) -> Response:
    """Log the error and tell the client nothing of it."""
    logger.error("Unexpected error", exc_info=exc)
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return problem(status, "internal_error", "Something went wrong here; it has been logged.")
