"""Submitting jobs, reading, cancelling, retrying and deleting them."""

import base64
import functools
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit
from uuid import UUID, uuid4, uuid5

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs import logs, models, service
from jobs.database import as_user
from jobs.errors import InvalidInput, NotAllowed
from jobs.models import JobStatus, JobSummary, ProcessingJob
from jobs.outbound import check_url
from modal_functions.transcript import INITIAL_PROMPT_MAX, MODEL_NAME, MODEL_NAME_MAX, TASKS
from web.auth import require
from web.endpoints import Answer, Endpoints, Principal, Scope

MAX_BATCH_BODY = 1024 * 1024  # bytes of JSON
MAX_NAME = 100  # characters of a URL's last part that name the file
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")

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


class NewJob(BaseModel):
    """What to transcribe, and how: `filePath`, `audioUrl` or both. The database checks the rest."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"anyOf": [{"required": ["filePath"]}, {"required": ["audioUrl"]}]},
    )

    file_path: str | None = Field(
        None, alias="filePath", min_length=1, max_length=1024, description="What `/uploads` said."
    )
    audio_url: str | None = Field(
        None,
        alias="audioUrl",
        max_length=2048,
        description="Where a worker fetches the recording from: http(s), on the public internet.",
    )
    options: Options = {}
    webhook_url: str | None = Field(
        None,
        alias="webhookUrl",
        max_length=2048,
        description="Is told when the job has ended, by a signed request.",
    )
    scheduled_at: AwareDatetime | None = Field(
        None, alias="scheduledAt", strict=False, description="Start no earlier than this."
    )
    priority: int = Field(
        0, ge=-100, le=100, description="Which of your own jobs goes first: higher first."
    )


_ALIASES = {name: field.alias for name, field in NewJob.model_fields.items() if field.alias}
_COLUMN = re.compile(rf"\A((?:jobs\[\d+\]\.)?)({'|'.join(_ALIASES)})\b")


class ProcessRequest(NewJob):
    """Body of `POST /process`."""


class BatchJob(NewJob):
    """A job of a batch."""

    idempotency_key: str | None = Field(
        None, alias="idempotencyKey", min_length=1, max_length=200, description="As the header."
    )


class BatchRequest(BaseModel):
    """Jobs to submit, all or none of them."""

    model_config = ConfigDict(extra="forbid")

    jobs: list[BatchJob] = Field(min_length=1, max_length=service.MAX_BATCH)


class Accepted(BaseModel):
    """A job that has been queued."""

    job_id: UUID = Field(serialization_alias="jobId")
    status: Literal[JobStatus.QUEUED] = JobStatus.QUEUED
    message: str

    @classmethod
    def of(cls, job_id: UUID) -> Self:
        """Say that a job has been queued."""
        return cls(job_id=job_id, message=f"Queued; follow it at /jobs/{job_id}")


class AcceptedBatch(BaseModel):
    """Jobs that have been queued, in the order in which they came."""

    jobs: list[Accepted]


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
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the last page.")


class JobList(BaseModel):
    """The newest jobs first, without their results."""

    jobs: list[JobSummary]
    next_cursor: str | None = Field(description="For the next page; null on the last.")


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
    with _as_sent():
        job = _new_job(body, user, headers.key)
        async with as_user(request.app.state.pool, user.claims) as conn:
            job_id = await service.submit(
                conn, **{part.name: getattr(job, part.name) for part in fields(job)}
            )
    logs.bind(job_id=job_id)
    content = Accepted.of(job_id).model_dump(mode="json", by_alias=True)
    return JSONResponse(content, ACCEPTED, {"Location": f"/jobs/{job_id}"})


@endpoint(
    "POST",
    "/process/batch",
    scope=Scope.JOBS_WRITE,
    answers={ACCEPTED: Answer("All queued", AcceptedBatch)},
    problems=(CONFLICT,),
    max_body=MAX_BATCH_BODY,
)
async def process_batch(request: Request, user: Principal, body: BatchRequest) -> Response:
    """Transcribe up to 100 recordings: all are queued, or none."""
    jobs = []
    with _as_sent():
        for index, job in enumerate(body.jobs):
            with _within(f"jobs[{index}]."):
                jobs.append(_new_job(job, user, job.idempotency_key))
        async with as_user(request.app.state.pool, user.claims) as conn:
            job_ids = await service.submit_many(conn, jobs)
    answer = AcceptedBatch(jobs=[Accepted.of(job_id) for job_id in job_ids])
    return JSONResponse(answer.model_dump(mode="json", by_alias=True), ACCEPTED)


@contextmanager
def _as_sent() -> Iterator[None]:
    """Name what is refused as the request does; the database knows columns."""
    try:
        yield
    except (InvalidInput, NotAllowed) as exc:
        exc.args = (_sent_as(str(exc)),)
        if isinstance(exc, InvalidInput) and exc.field is not None:
            exc.field = _sent_as(exc.field)
        raise


def _sent_as(text: str) -> str:
    return _COLUMN.sub(lambda found: f"{found[1]}{_ALIASES[found[2]]}", text, count=1)


@contextmanager
def _within(where: str) -> Iterator[None]:
    """Say in which part of the request it is that is refused."""
    try:
        yield
    except InvalidInput as exc:
        raise InvalidInput(f"{where}{exc}", field=f"{where}{exc.field}") from exc


def _new_job(body: NewJob, user: Principal, key: str | None) -> models.NewJob:
    if body.audio_url is not None:
        check_url(body.audio_url)
    elif body.file_path is None:
        raise InvalidInput("filePath: is missing; send it, or audioUrl", field="filePath")
    return models.NewJob(
        body.file_path or _path_for(body.audio_url or "", user, key),
        body.options,
        audio_url=body.audio_url,
        webhook_url=body.webhook_url,
        scheduled_at=body.scheduled_at,
        priority=body.priority,
        idempotency_key=key,
    )


def _path_for(url: str, user: Principal, key: str | None) -> str:
    """Return where fetched audio goes: for the same key to the same place."""
    folder = uuid4() if key is None else uuid5(user.user_id, f"{key} {url}")
    name = _NOT_IN_NAMES.sub("_", urlsplit(url).path.rpartition("/")[2])[-MAX_NAME:].strip(". ")
    return f"{user.user_id}/{folder}/{name or 'audio'}"


@endpoint("GET", "/jobs", scope=Scope.JOBS_READ, answers={OK: Answer("Your jobs", JobList)})
async def list_jobs(request: Request, user: Principal, query: ListQuery) -> Response:
    """List jobs, the newest first, without their results."""
    after = read_cursor(query.cursor)
    async with as_user(request.app.state.pool, user.claims) as conn:
        page = await service.list_jobs(conn, status=query.status, limit=query.limit, after=after)
    return as_json(JobList(jobs=page.jobs, next_cursor=write_cursor(page.next)))


def write_cursor(cursor: models.Cursor | None) -> str | None:
    """Return a place in a list as text that says nothing to its reader."""
    if cursor is None:
        return None
    return base64.urlsafe_b64encode(f"{cursor[0].isoformat()} {cursor[1]}".encode()).decode()


def read_cursor(text: str | None) -> models.Cursor | None:
    """Return what ``write_cursor`` wrote. Raises ``InvalidInput``."""
    if text is None:
        return None
    try:
        at, _, job_id = base64.urlsafe_b64decode(text.encode()).decode().partition(" ")
        cursor = datetime.fromisoformat(at), UUID(job_id)
    except ValueError:
        cursor = None
    if cursor is None or cursor[0].tzinfo is None:
        raise InvalidInput("cursor: is none; take `next_cursor` of the last page", field="cursor")
    return cursor


_JOB = {OK: Answer("The job", ProcessingJob)}


class JobQuery(BaseModel):
    """What to read of a job."""

    model_config = ConfigDict(extra="forbid")

    result: bool = Field(default=True, description="false: `result` is null, also if there is one.")


@endpoint("GET", "/jobs/{job_id}", scope=Scope.JOBS_READ, answers=_JOB)
async def get_job(request: Request, user: Principal, job_id: UUID, query: JobQuery) -> Response:
    """Get a job: its row, with the transcript once it is completed."""
    get = functools.partial(service.get, result=query.result)
    return await _on_job(request, user, job_id, get)


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


class DeleteQuery(BaseModel):
    """What to keep."""

    model_config = ConfigDict(extra="forbid")

    keep_audio: bool = Field(False, description="Delete the job and its transcript only.")  # noqa: FBT003


@endpoint(
    "DELETE",
    "/jobs/{job_id}",
    scope=Scope.JOBS_WRITE,
    answers={HTTPStatus.NO_CONTENT: Answer("Deleted", media_types=())},
)
async def delete_job(
    request: Request, user: Principal, job_id: UUID, query: DeleteQuery
) -> Response:
    """Delete a job with its transcript and, unless another job needs that, its audio.

    A job that runs is stopped. The audio goes within minutes; a key needs `audio:write` for that.
    """
    if not query.keep_audio:
        require(user, Scope.AUDIO_WRITE)
    async with as_user(request.app.state.pool, user.claims) as conn:
        await service.delete(conn, job_id, keep_audio=query.keep_audio)
    return Response(status_code=HTTPStatus.NO_CONTENT)


class SearchQuery(BaseModel):
    """What to look for."""

    model_config = ConfigDict(extra="forbid")

    q: str = Field(min_length=1, max_length=200, description='Words, "a phrase", or, -excluded.')
    limit: int = Field(20, ge=1, le=service.MAX_LIST)
    cursor: str | None = Field(None, max_length=200, description="`next_cursor` of the last page.")


class SearchResults(BaseModel):
    """Jobs in whose transcripts something was found, the newest first."""

    results: list[models.SearchResult]
    next_cursor: str | None = Field(description="For the next page; null on the last.")


@endpoint("GET", "/search", scope=Scope.JOBS_READ, answers={OK: Answer("Found", SearchResults)})
async def search(request: Request, user: Principal, query: SearchQuery) -> Response:
    """Search your transcripts. Of the last word the beginning will do."""
    after = read_cursor(query.cursor)
    async with as_user(request.app.state.pool, user.claims) as conn:
        page = await service.search(conn, query.q, limit=query.limit, after=after)
    return as_json(SearchResults(results=page.results, next_cursor=write_cursor(page.next)))


class Limits(BaseModel):
    """What you may have, and what you have."""

    limits: list[models.Limit]


@endpoint("GET", "/limits", scope=Scope.JOBS_READ, answers={OK: Answer("Your limits", Limits)})
async def limits(request: Request, user: Principal) -> Response:
    """Read your limits; null: there is none, or nothing to count."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        return as_json(Limits(limits=await service.limits(conn)))


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
