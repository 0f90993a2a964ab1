"""Requests to the REST API and what its answers say: nothing here sends anything."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import UUID, uuid4

from pydantic import BaseModel, Field, ValidationError

from jobs.errors import InvalidInput, RequestFailed
from jobs.models import JobStatus, JobSummary, SearchResult, TranscriptionOptions

PAGE = 100  # items; the server's limit
UPLOAD_TIMEOUT = 300.0  # seconds that storage may take to answer once it has all bytes
STREAM_SILENCE = 45.0  # seconds without a byte after which a stream is dead; servers ping every 15

TextFormat = Literal["txt", "srt", "vtt", "tsv"]
TranscriptFormat = Literal["json", "txt", "srt", "vtt", "tsv"]

ModelT = TypeVar("ModelT", bound=BaseModel)


# What is sent -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FilePart:
    """``size`` bytes of a file from ``offset`` on, as a request's body."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request. ``url`` is a path of the API, or a URL elsewhere.

    ``repeatable``: sent twice, it does no more than once. ``signed``: the URL itself says what it
    allows, so that no token goes there and the URL is in no log.
    """

    method: str
    url: str = field(repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    json: Any = field(default=None, repr=False)
    body: FilePart | None = None
    repeatable: bool = True
    signed: bool = False
    read_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to be submitted: audio in storage (``file_path``) or elsewhere (``audio_url``).

    ``scheduled_at`` is aware. ``priority``, -100 to 100, is among the owner's own jobs. With an
    ``idempotency_key`` that was used before, it is the job of then.
    """

    file_path: str | None = None
    options: TranscriptionOptions | Mapping[str, Any] | None = None
    audio_url: str | None = None
    scheduled_at: datetime | None = None
    priority: int = 0
    webhook_url: str | None = None
    idempotency_key: str | None = None

    def body(self) -> dict[str, Any]:
        """Return what says so in JSON. Raises ``InvalidInput``."""
        if (self.file_path is None) is (self.audio_url is None):
            raise InvalidInput("file_path: give either that or audio_url", field="file_path")
        if self.scheduled_at is not None and self.scheduled_at.utcoffset() is None:
            raise InvalidInput("scheduled_at: needs a time zone", field="scheduled_at")
        options = self.options
        said = {
            "filePath": self.file_path,
            "audioUrl": self.audio_url,
            "options": options.to_dict() if isinstance(options, TranscriptionOptions) else options,
            "scheduledAt": self.scheduled_at and self.scheduled_at.isoformat(),
            "priority": self.priority or None,
            "webhookUrl": self.webhook_url,
        }
        return {name: value for name, value in said.items() if value is not None}


def submit(job: NewJob) -> Request:
    """Submit a job, once only."""
    return Request(
        "POST", "/process", headers={"Idempotency-Key": _key(job.idempotency_key)}, json=job.body()
    )


def submit_many(jobs: Sequence[NewJob]) -> Request:
    """Submit jobs, all or none of them, and each once only: each has a key of its own."""
    body = [job.body() | {"idempotencyKey": _key(job.idempotency_key)} for job in jobs]
    return Request("POST", "/process/batch", json={"jobs": body})


def _key(key: str | None) -> str:
    """Return what can be a header's value: the key, or one that is made up."""
    if key is None:
        return str(uuid4())
    if not re.fullmatch("[!-~]([ -~]{0,198}[!-~])?", key):
        raise InvalidInput(
            "idempotency_key: must be 1 to 200 characters of ASCII", field="idempotency_key"
        )
    return key


def get_job(job_id: UUID) -> Request:
    """Ask for a job."""
    return Request("GET", f"/jobs/{job_id}")


def list_jobs(status: JobStatus | None, limit: int, cursor: str | None) -> Request:
    """Ask for a page of jobs."""
    return Request("GET", "/jobs", _query(status=status, limit=limit, cursor=cursor))


def search(text: str, limit: int, cursor: str | None) -> Request:
    """Ask for a page of what is found in transcripts."""
    return Request("GET", "/search", _query(q=text, limit=limit, cursor=cursor))


def _query(**values: str | int | None) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}


def cancel(job_id: UUID) -> Request:
    """Cancel a job: one that is cancelled already stays so."""
    return Request("POST", f"/jobs/{job_id}/cancel")


def retry(job_id: UUID) -> Request:
    """Run a job again, which may have been done by the time that it is asked once more."""
    return Request("POST", f"/jobs/{job_id}/retry", repeatable=False)


def delete(job_id: UUID) -> Request:
    """Delete a job."""
    return Request("DELETE", f"/jobs/{job_id}")


def events(job_id: UUID, last_id: str) -> Request:
    """Open the stream of a job's events, from behind the event ``last_id``."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last_id:
        headers["Last-Event-ID"] = last_id
    return Request("GET", f"/jobs/{job_id}/events", headers=headers, read_timeout=STREAM_SILENCE)


def transcript(job_id: UUID, form: TranscriptFormat, *, original: bool) -> Request:
    """Ask for a transcript."""
    query = _query(original="true" if original else None)
    return Request("GET", f"/jobs/{job_id}/transcript.{form}", query)


def audio(job_id: UUID) -> Request:
    """Ask for a job's audio, or where it is."""
    return Request("GET", f"/jobs/{job_id}/audio", headers={"Accept": "*/*"})


def elsewhere(url: str) -> Request:
    """Get what a signed URL gives."""
    return Request("GET", url, headers={"Accept": "*/*"}, signed=True)


# Uploads ----------------------------------------------------------------------------------------


def ask_upload(name: str, size: int, content_type: str) -> Request:
    """Ask where and how to upload a file."""
    body = {"name": name, "size": size, "contentType": content_type}
    return Request("POST", "/uploads", json=body)


# What is answered -------------------------------------------------------------------------------


class Ticket(BaseModel):
    """Where and how to upload one file: a secret."""

    file_path: str = Field(alias="filePath")
    method: Literal["PUT", "TUS"]
    url: str = Field(repr=False)
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    chunk_size: int | None = Field(None, alias="chunkSize", ge=1)
    metadata: dict[str, str] | None = Field(None, repr=False)

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: FilePart | None = None
    ) -> Request:
        """Return a request that the ticket allows."""
        return Request(
            method, url, headers={**self.headers, **headers}, body=body, signed=True,
            read_timeout=UPLOAD_TIMEOUT,
        )  # fmt: skip


class Accepted(BaseModel):
    """A job that has been queued."""

    job_id: UUID = Field(alias="jobId")


class AllAccepted(BaseModel):
    """Jobs that have been queued, in the order in which they were sent."""

    jobs: list[Accepted]


class JobPage(BaseModel):
    """Jobs, and where the next ones are."""

    jobs: list[JobSummary]
    next_cursor: str | None = None


class SearchPage(BaseModel):
    """What was found, and where the rest is."""

    results: list[SearchResult]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; names of ``headers`` are in small letters."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the request was done."""
        return self.status in range(200, 300)

    @property
    def media_type(self) -> str:
        """What the body is."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


class _Problem(BaseModel):
    code: str = RequestFailed.code
    detail: str = ""
    field: str | None = None
    limit: int | float | str | None = None
    retry_after: float | None = None


def failure(reply: Reply) -> RequestFailed:
    """Return what a refusal says."""
    problem = _Problem()
    if "json" in reply.media_type:
        with contextlib.suppress(ValidationError):
            problem = _Problem.model_validate_json(reply.body)
    return RequestFailed(
        problem.detail or _phrase(reply),
        status=reply.status,
        code=problem.code,
        field=problem.field,
        limit=problem.limit,
        retry_after=_retry_after(reply, problem),
    )


def _phrase(reply: Reply) -> str:
    if reply.status in range(300, 400):
        return "The server redirects elsewhere; is the URL right?"
    with contextlib.suppress(ValueError):
        return HTTPStatus(reply.status).phrase
    return "The server refused the request"


def _retry_after(reply: Reply, problem: _Problem) -> float | None:
    text = reply.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError):
        moment = parsedate_to_datetime(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return problem.retry_after


def done(reply: Reply) -> Reply:
    """Return the answer. Raises ``RequestFailed`` where it is a refusal."""
    if not reply.ok:
        raise failure(reply)
    return reply


def parse(model: type[ModelT], reply: Reply) -> ModelT:
    """Return what a request was answered with. Raises ``RequestFailed``."""
    try:
        return model.model_validate_json(done(reply).body)
    except ValidationError:
        raise unexpected(reply) from None


def unexpected(reply: Reply) -> RequestFailed:
    """Say that an answer is none of pgscribe's."""
    return RequestFailed(
        "The answer is none that a pgscribe server gives; is the URL right?",
        status=reply.status,
        code="unexpected_answer",
    )


# Events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobChanged:
    """A job as it is now; ``progress`` is a share from 0 to 1."""

    job_id: UUID
    status: JobStatus
    progress: float
    note: str | None = None
    error_code: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class PartialText:
    """A job's text from its beginning, as far as it is complete."""

    job_id: UUID
    text: str


@dataclass(frozen=True, slots=True)
class JobDeleted:
    """The job is gone."""

    job_id: UUID


JobEvent = JobChanged | PartialText | JobDeleted


class _Job(BaseModel):
    id: UUID
    status: JobStatus
    progress: float
    note: str | None = None
    error_code: str | None = None
    error: str | None = None


class Partial(BaseModel):
    """What has been added to a job's text behind its first ``offset`` characters."""

    text: str
    offset: int = Field(0, ge=0)


def changed(job: JobSummary | _Job) -> JobChanged:
    """Return a job as an event tells of it."""
    return JobChanged(job.id, job.status, job.progress, job.note, job.error_code, job.error)


def job_event(job_id: UUID, name: str, data: str) -> JobChanged | Partial | JobDeleted | None:
    """Return what an event of a stream says; ``None`` where this version does not know it.

    Raises pydantic's ``ValidationError``.
    """
    if name == "job":
        return changed(_Job.model_validate_json(data))
    if name == "partial":
        return Partial.model_validate_json(data)
    return JobDeleted(job_id) if name == "deleted" else None
