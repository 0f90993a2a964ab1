"""Errors in the form that OpenAI's clients understand, for all paths under ``/v1``."""

import functools
import json
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

PREFIX = "/v1/"

#: What those clients expect where problem details have another status.
STATUSES = {HTTPStatus.UNPROCESSABLE_ENTITY: HTTPStatus.BAD_REQUEST}

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}

ExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(description="A class of errors: invalid_request_error, server_error, …")
    param: str | None = Field(None, description="The field to blame.")
    code: str | None = Field(None, description="Stable: it never changes its meaning.")


class OpenAIError(BaseModel):
    """An error as OpenAI's API gives it."""

    error: ErrorDetail


def detail(status: HTTPStatus, code: str, message: str, *, param: str | None = None) -> OpenAIError:
    """Return an error of that status."""
    usual = (
        "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    )
    kind = _TYPES.get(status, usual)
    return OpenAIError(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def respond(
    status: HTTPStatus, error: OpenAIError, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error as a response."""
    return JSONResponse(error.model_dump(), status, headers)


def in_openai_form(handler: ExceptionHandler) -> ExceptionHandler:
    """Return an exception handler whose problem details take OpenAI's form under ``/v1``."""

    @functools.wraps(handler)
    async def handle(request: Request, exc: Exception) -> Response:
        response = await handler(request, exc)
        if not request.url.path.startswith(PREFIX):
            return response
        response = translated(response)
        if job_id := getattr(request.state, "job_id", None):
            response.headers["Pgscribe-Job-Id"] = str(job_id)
        return response

    return handle


def translated(response: Response) -> Response:
    """Return problem details in OpenAI's form, with their headers; other responses as they are."""
    if response.media_type != "application/problem+json":
        return response
    problem = json.loads(bytes(response.body))
    status = STATUSES.get(HTTPStatus(problem["status"]), HTTPStatus(problem["status"]))
    error = detail(status, problem["code"], problem["detail"], param=problem.get("field"))
    kept = {
        name: value
        for name, value in response.headers.items()
        if name not in {"content-type", "content-length"}
    }
    return respond(status, error, kept)
