"""Submitting jobs and reading them."""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs import service
from jobs.database import as_user
from jobs.errors import InvalidInput, JobNotFound
from jobs.models import JobStatus, ProcessingJob
from web.auth import user_claims

MAX_BODY = 64 * 1024  # bytes of JSON


class ProcessRequest(BaseModel):
    """Body of ``POST /process``. The database checks the path and the options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file_path: str = Field(alias="filePath")
    options: dict[str, Any] = {}
    scheduled_at: AwareDatetime | None = Field(None, alias="scheduledAt", strict=False)
    priority: int = Field(0, ge=-100, le=100)


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise InvalidInput(f"The body is larger than the limit of {MAX_BODY} bytes")
    return bytes(body)


def _parse(body: bytes) -> ProcessRequest:
    try:
        return ProcessRequest.model_validate(json.loads(body))
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(part) for part in error["loc"]) or "body"
        raise InvalidInput(f"{field}: {error['msg']}", field=field) from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidInput('The body is not JSON; send {"filePath": …, "options": {…}}') from exc


async def process(request: Request) -> Response:
    """``POST /process``: {filePath, options, …} -> 202 {jobId, status, message}.

    With an ``Idempotency-Key`` that was sent before, the answer names the job of that time.
    """
    claims = user_claims(request)
    body = _parse(await _read_body(request))
    async with as_user(request.app.state.pool, claims) as conn:
        job_id = await service.submit(
            conn,
            body.file_path,
            body.options,
            scheduled_at=body.scheduled_at,
            priority=body.priority,
            idempotency_key=request.headers.get("idempotency-key"),
        )
    return JSONResponse(
        {
            "jobId": str(job_id),
            "status": JobStatus.QUEUED,
            "message": f"Queued; follow it at /jobs/{job_id}",
        },
        HTTPStatus.ACCEPTED,
        {"Location": f"/jobs/{job_id}"},
    )


async def get_job(request: Request) -> Response:
    """``GET /jobs/{jobId}``: the row."""
    return await _on_job(request, service.get)


async def cancel_job(request: Request) -> Response:
    """``POST /jobs/{jobId}/cancel``: the row; 409 if the job has completed or failed."""
    return await _on_job(request, service.cancel)


async def retry_job(request: Request) -> Response:
    """``POST /jobs/{jobId}/retry``: the row; 409 unless the job has failed or was cancelled."""
    return await _on_job(request, service.retry)


async def _on_job(
    request: Request, act: Callable[[service.Connection, UUID], Awaitable[ProcessingJob]]
) -> Response:
    claims = user_claims(request)
    try:
        job_id = UUID(request.path_params["job_id"])
    except ValueError:
        raise JobNotFound from None
    async with as_user(request.app.state.pool, claims) as conn:
        job = await act(conn, job_id)
    return JSONResponse(job.model_dump(mode="json"))


async def list_jobs(request: Request) -> Response:
    """``GET /jobs?status=&limit=``: the newest rows, without results."""
    claims = user_claims(request)
    wanted = request.query_params.get("status")
    status = JobStatus.parse(wanted) if wanted else None
    limit = _limit(request.query_params.get("limit"))
    async with as_user(request.app.state.pool, claims) as conn:
        page = await service.list_jobs(conn, status=status, limit=limit)
    return JSONResponse({"jobs": [job.model_dump(mode="json") for job in page.jobs]})


def _limit(value: str | None) -> int:
    if not value:
        return 50
    digits = len(str(service.MAX_LIST))
    if value.isascii() and value.isdigit() and len(value) <= digits:
        limit = int(value)
        if 1 <= limit <= service.MAX_LIST:
            return limit
    raise InvalidInput(f"limit: must be a number from 1 to {service.MAX_LIST}", field="limit")


routes = [
    Route("/process", process, methods=["POST"]),
    Route("/jobs", list_jobs),
    Route("/jobs/{job_id}", get_job),
    Route("/jobs/{job_id}/cancel", cancel_job, methods=["POST"]),
    Route("/jobs/{job_id}/retry", retry_job, methods=["POST"]),
]
