"""What pgscribe speaks of. The transcript's shape belongs to the functions that produce it."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from jobs.errors import InvalidInput
from modal_functions.transcript import Segment, Transcript, TranscriptionOptions, Word

__all__ = [
    "MATCH",
    "MATCH_END",
    "Attempt",
    "Cursor",
    "Hit",
    "JobPage",
    "JobStatus",
    "JobSummary",
    "Limit",
    "NewJob",
    "ProcessingJob",
    "SearchPage",
    "SearchResult",
    "Segment",
    "Transcript",
    "TranscriptionOptions",
    "Word",
]


class JobStatus(StrEnum):
    """Status of a job, derived in the database from its queue job's."""

    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @classmethod
    def parse(cls, value: str) -> Self:
        """Return the status of that name. Raises ``InvalidInput`` that names the known ones."""
        try:
            return cls(value)
        except ValueError:
            raise InvalidInput(f"status: must be one of {', '.join(cls)}", field="status") from None

    @property
    def ended(self) -> bool:
        """Whether the job will not change any more."""
        return self in {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}


class JobSummary(BaseModel):
    """A row of ``public.processing_jobs`` without its result. Times are aware; seconds, floats."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    created_at: datetime
    updated_at: datetime
    scheduled_at: datetime | None
    started_at: datetime | None
    completed_at: datetime | None
    user_id: UUID
    job_id: str | None
    file_path: str
    audio_url: str | None
    webhook_url: str | None
    options: dict[str, Any]
    status: JobStatus
    progress: float
    attempt: int
    priority: int
    max_attempts: int | None
    idempotency_key: str | None
    traceparent: str | None = None  # servers of the version before have none
    due_at: datetime | None
    cancel_requested_at: datetime | None
    retry_requested_at: datetime | None
    audio_seconds: float | None
    estimated_seconds: float | None
    usage: dict[str, float] | None
    note: str | None
    error_code: str | None
    error: str | None


class ProcessingJob(JobSummary):
    """A whole row. ``result`` is a transcript's ``to_dict()`` once the job is completed."""

    result: dict[str, Any] | None


#: Where a list goes on: after the job that was created then and has this id.
Cursor = tuple[datetime, UUID]


@dataclass(frozen=True, slots=True)
class NewJob:
    """What an insert may say of a job. The database checks all of it."""

    file_path: str
    options: dict[str, Any] = field(default_factory=dict)
    audio_url: str | None = None
    webhook_url: str | None = None
    scheduled_at: datetime | None = None
    priority: int = 0
    max_attempts: int | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of a user's jobs, newest first. ``next``: where the list goes on; ``None``: it ends."""

    jobs: list[JobSummary]
    next: Cursor | None


class Hit(BaseModel):
    """A place that a search has found. Times are in seconds; ``None`` where they are not known.

    In ``text``, which is plain, each match stands between ``MATCH`` and ``MATCH_END``.
    """

    model_config = ConfigDict(frozen=True)

    start: float | None
    end: float | None
    text: str


#: Control characters that are nowhere else in a hit's text.
MATCH, MATCH_END = "\x02", "\x03"


class SearchResult(BaseModel):
    """A completed job in whose transcript a search has found something.

    ``hits``: up to three segments, as corrected; none if all that were found are left out.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    created_at: datetime
    file_path: str
    language: str | None
    audio_seconds: float | None
    hits: list[Hit]


@dataclass(frozen=True, slots=True)
class SearchPage:
    """Some of what a search has found, newest first. ``next``: where it goes on, if it does."""

    results: list[SearchResult]
    next: Cursor | None


class Waveform(BaseModel):
    """What a recording looks like, for players to draw."""

    duration: float | None = Field(description="In seconds, once the audio has been prepared.")
    peaks: list[int] = Field(
        description="The loudest sample of each of so many equal shares, at most 2,000: 0 to 255, "
        "the format's full range. None: the audio has not been prepared yet, or long ago."
    )


class Limit(BaseModel):
    """What a user may have, ``None`` being as much as they like, and what they have now."""

    model_config = ConfigDict(frozen=True)

    limit: str
    maximum: float | None
    current: float | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a job by a worker: what it needs to know of the job.

    ``job_id`` and ``number`` are the fence that late writers run into: each claim has a number of
    its own.
    """

    job_id: UUID
    number: int
    user_id: UUID
    file_path: str
    options: dict[str, Any]
