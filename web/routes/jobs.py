"""Submitting jobs, reading, cancelling, retrying and deleting them."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs import service
from jobs.database import as_user
from jobs.models import JobStatus, JobSummary, ProcessingJob
from modal_functions.transcript import INITIAL_PROMPT_MAX, MODEL_NAME, MODEL_NAME_MAX, TASKS
from web.endpoints import Answer, Endpoints, Principal, Scope

OK, ACCEPTED, CONFLICT = HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.CONFLICT

endpoint = Endpoints("Jobs")

# The database checks them: what it knows is the truth, this describes it.
_OPTIONS = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "model": {
            "type": "string",
            "pattern": f"^{MODEL_NAME.pattern}$",
            "maxLength": MODEL_NAME_MAX,
            "default": "base",
            "description": "tiny, base, small, medium, large-v3, turbo, …",
        },
        "language": {
            "type": ["string", "null"],
            "pattern": "^[a-z]{2,3}$",
            "description": "A code such as en; null detects it.",
        },
        "task": {"type": "string", "enum": list(TASKS), "default": TASKS[0]},
        "word_timestamps": {"type": "boolean", "default": False},
        "initial_prompt": {
            "type": ["string", "null"],
            "maxLength": INITIAL_PROMPT_MAX,
            "description": "Names and words to expect.",
        },
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "preprocessing": {
            "type": "boolean",
            "default": False,
            "description": "Level and clean speech before transcribing.",
        },
    },
}
Options = Annotated[dict[str, Any], WithJsonSchema(_OPTIONS)]


class ProcessRequest(BaseModel):
    """What to transcribe, and how. The database checks the path and the options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    file_path: str = Field(
        alias="filePath", min_length=1, max_length=1024, description="What the upload returned."
    )
    options: Options = {}
    scheduled_at: AwareDatetime | None = Field(
        None, alias="scheduledAt", strict=False, description="Start no earlier than this."
    )
    priority: int = Field(
        0, ge=-100, le=100, description="Which of your own jobs goes first: higher first."
    )


class Accepted(BaseModel):
    """A job that has been queued."""

    job_id: UUID = Field(serialization_alias="jobId")
    status: Literal[JobStatus.QUEUED] = JobStatus.QUEUED
    message: str


class IdempotencyKey(BaseModel):
    """A name of your own for this request, so that it can be sent again."""

    key: str | None = Field(
        None,
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="Sent again with the same body, it answers with the same job.",
    )


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = None
    limit: int = Field(50, ge=1, le=service.MAX_LIST)


class JobList(BaseModel):
    """The newest jobs first, without their results."""

    jobs: list[JobSummary]


@endpoint(
    "POST",
    "/process",
    scope=Scope.JOBS_WRITE,
    answers={ACCEPTED: Answer("Queued", Accepted, headers={"Location": "Where the job is."})},
    problems=(CONFLICT,),
)
async def process(
    request: Request, user: Principal, headers: IdempotencyKey, body: ProcessRequest
) -> Response:
    """Transcribe a recording.

    With an `Idempotency-Key` that was sent before, the answer names the job of that time; 409 while
    the first request is being worked on, 422 where the body differs.
    """
    async with as_user(request.app.state.pool, user.claims) as conn:
        job_id = await service.submit(
            conn,
            body.file_path,
            body.options,
            scheduled_at=body.scheduled_at,
            priority=body.priority,
            idempotency_key=headers.key,
        )
    return accepted(Accepted(job_id=job_id, message=f"Queued; follow it at /jobs/{job_id}"))


def accepted(answer: Accepted) -> Response:
    """Return 202 with where the job is."""
    content = answer.model_dump(mode="json", by_alias=True)
    return JSONResponse(content, ACCEPTED, {"Location": f"/jobs/{answer.job_id}"})


@endpoint("GET", "/jobs", scope=Scope.JOBS_READ, answers={OK: Answer("Your jobs", JobList)})
async def list_jobs(request: Request, user: Principal, query: ListQuery) -> Response:
    """List jobs, the newest first, without their results."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        jobs = await service.list_jobs(conn, status=query.status, limit=query.limit)
    return as_json(JobList(jobs=jobs))


_JOB = {OK: Answer("The job", ProcessingJob)}


@endpoint("GET", "/jobs/{job_id}", scope=Scope.JOBS_READ, answers=_JOB)
async def get_job(request: Request, user: Principal, job_id: UUID) -> Response:
    """Get a job: its row, with the transcript once it is completed."""
    return await _on_job(request, user, job_id, service.get)


@endpoint(
    "POST",
    "/jobs/{job_id}/cancel",
    scope=Scope.JOBS_WRITE,
    answers=_JOB,
    problems=(CONFLICT,),
)
async def cancel_job(request: Request, user: Principal, job_id: UUID) -> Response:
    """Cancel a job: at once while it waits, within seconds while it runs."""
    return await _on_job(request, user, job_id, service.cancel)


@endpoint(
    "POST",
    "/jobs/{job_id}/retry",
    scope=Scope.JOBS_WRITE,
    answers=_JOB,
    problems=(CONFLICT,),
)
async def retry_job(request: Request, user: Principal, job_id: UUID) -> Response:
    """Run a failed or cancelled job again, with all its attempts."""
    return await _on_job(request, user, job_id, service.retry)


async def _on_job(
    request: Request,
    user: Principal,
    job_id: UUID,
    act: Callable[[service.Connection, UUID], Awaitable[ProcessingJob]],
) -> Response:
    async with as_user(request.app.state.pool, user.claims) as conn:
        job = await act(conn, job_id)
    return as_json(job)


def as_json(model: BaseModel) -> Response:
    """Return 200 with the model."""
    return Response(model.model_dump_json(by_alias=True), media_type="application/json")
