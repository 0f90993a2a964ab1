"""Transcripts: whole or as far as they are there, as json, text and subtitles."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response

from jobs import corrections, service, subtitles, transcripts
from jobs.corrections import Correction
from jobs.database import as_user
from jobs.errors import NotAcceptable, NoTranscript, TranscriptNotReady
from jobs.models import JobStatus, ProcessingJob, Transcript
from jobs.subtitles import MAX_LINE_LENGTH, MAX_LINES, MIN_LINE_LENGTH, Layout
from jobs.transcripts import PartialTranscript
from web import negotiation
from web.endpoints import Answer, Endpoints, Principal, Scope

endpoint = Endpoints("Transcripts")

MEDIA_TYPES: Mapping[str, str] = {
    "json": "application/json",
    "txt": "text/plain",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
    "tsv": "text/tab-separated-values",
}
_FORMATS = {media_type: name for name, media_type in MEDIA_TYPES.items()}
_FORMATS |= {"text/srt": "srt", "application/srt": "srt"}  # what srt is called as well

_PARTIAL = "Pgscribe-Partial"


class WordTimes(BaseModel):
    """A word with its punctuation."""

    start: float
    end: float
    word: str
    probability: float


class SegmentDocument(BaseModel):
    """A sentence or a part of one. Times in seconds."""

    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    words: list[WordTimes] | None = Field(None, description="If word_timestamps was asked for.")
    flags: list[str] | None = Field(
        None, description="Why to doubt it: repetition, low_confidence, no_speech."
    )
    speaker: str | None = Field(None, description="Who says it, where somebody has said so.")
    corrected: Literal[True] | None = Field(
        None, description="Whether its text was corrected. An empty text: it is left out."
    )
    original: str | None = Field(None, description="Its text before that.")


class TranscriptDocument(BaseModel):
    """A completed job's transcript, as corrected."""

    text: str
    language: str
    duration: float = Field(description="Of the recording, in seconds.")
    segments: list[SegmentDocument]
    engine: str
    model: str


class PartialDocument(BaseModel):
    """What there is of a transcript while its job runs."""

    status: Literal[JobStatus.QUEUED, JobStatus.PROCESSING]
    partial: Literal[True] = True
    text: str
    ready: int = Field(description="How many chunks the text is of: the first ones.")
    chunks: int = Field(description="How many there are; 0 while the audio is prepared.")


class TranscriptAnswer(RootModel[TranscriptDocument | PartialDocument]):
    """A transcript, or what there is of it."""


class TranscriptQuery(BaseModel):
    """How to set subtitles, and whether to save the answer as a file."""

    model_config = ConfigDict(extra="forbid")

    max_line_length: int | None = Field(
        None,
        ge=MIN_LINE_LENGTH,
        le=MAX_LINE_LENGTH,
        description="For srt and vtt, in characters; full-width ones count as two. "
        "By default 42, or 32 for text that is mostly full-width.",
    )
    max_lines: int | None = Field(
        None, ge=1, le=MAX_LINES, description="By default 2, or 1 for full-width text."
    )
    download: bool = Field(
        default=False, description="Offer the answer as a file, named as the audio."
    )
    original: bool = Field(
        default=False, description="As it was transcribed, without what was corrected since."
    )

    @property
    def layout(self) -> Layout:
        """Return how subtitles are set."""
        return Layout(self.max_line_length, self.max_lines)


class TranscriptHeaders(BaseModel):
    """What the client has already."""

    if_none_match: str | None = Field(
        None, alias="If-None-Match", description="An ETag: 304 if the transcript is still that."
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """A job with its transcript, or with what there is of it."""

    job: ProcessingJob
    corrections: Sequence[Correction] = ()
    partial: PartialTranscript | None = None
    so_far: Transcript | None = None


_ANSWERS = {
    HTTPStatus.OK: Answer(
        "The transcript, or what there is of it",
        TranscriptAnswer,
        tuple(MEDIA_TYPES.values()),
        {_PARTIAL: "true while the job runs", "ETag": "Of a completed job's transcript"},
    ),
    HTTPStatus.NOT_MODIFIED: Answer("The transcript is the one that you have", media_types=()),
}
_PROBLEMS = (HTTPStatus.CONFLICT, HTTPStatus.NOT_ACCEPTABLE)


@endpoint(
    "GET",
    "/jobs/{job_id}/transcript",
    scope=Scope.JOBS_READ,
    answers=_ANSWERS,
    problems=_PROBLEMS,
)
async def get_transcript(
    request: Request,
    user: Principal,
    job_id: UUID,
    query: TranscriptQuery,
    headers: TranscriptHeaders,
) -> Response:
    """Get a transcript as json, txt, srt, vtt or tsv, whichever `Accept` prefers.

    It is as it was corrected, unless `original` is asked for.
    While the job runs, the answer is what there is of it, and says so in the header
    `Pgscribe-Partial`. 409 with `transcript_not_ready` while there can't be any, and with
    `no_transcript` for failed and cancelled jobs.
    """
    chosen = negotiation.choose(request.headers.get("accept", ""), _FORMATS)
    if chosen is None:
        raise _not_acceptable("Accept")
    response = await _answer(request, user, job_id, _FORMATS[chosen], query, headers)
    response.headers["Vary"] = "Accept"
    return response


@endpoint(
    "GET",
    "/jobs/{job_id}/transcript.{extension}",
    scope=Scope.JOBS_READ,
    answers=_ANSWERS,
    problems=_PROBLEMS,
)
async def get_transcript_as(  # noqa: PLR0913, PLR0917 - what the endpoint takes
    request: Request,
    user: Principal,
    job_id: UUID,
    extension: str,
    query: TranscriptQuery,
    headers: TranscriptHeaders,
) -> Response:
    """Get a transcript as json, txt, srt, vtt or tsv, by extension, whatever `Accept` says."""
    if extension not in MEDIA_TYPES:
        raise _not_acceptable("The extension")
    return await _answer(request, user, job_id, extension, query, headers)


def _not_acceptable(what: str) -> NotAcceptable:
    offered = ", ".join(f"{media_type} (.{name})" for name, media_type in MEDIA_TYPES.items())
    return NotAcceptable(f"{what} names no form that transcripts can be had in: {offered}")


async def _answer(  # noqa: PLR0913, PLR0917
    request: Request,
    user: Principal,
    job_id: UUID,
    name: str,
    query: TranscriptQuery,
    headers: TranscriptHeaders,
) -> Response:
    found = await _find(request, user, job_id, name, query)
    if found.partial is not None:
        more = {_PARTIAL: "true", "Cache-Control": "no-store"}
    else:
        more = {"ETag": _etag(found, name, query), "Cache-Control": "private, no-cache"}
        if _matches(headers.if_none_match, more["ETag"]):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=more)
    if query.download:
        more["Content-Disposition"] = negotiation.attachment(_file_name(found.job, name))
    text = await request.app.state.renderer.run(
        user.user_id, lambda: _render(found, name, query.layout)
    )
    more["Content-Type"] = MEDIA_TYPES[name] + ("" if name == "json" else "; charset=utf-8")
    return Response(text, headers=more)


async def _find(
    request: Request, user: Principal, job_id: UUID, name: str, query: TranscriptQuery
) -> _Found:
    async with as_user(request.app.state.pool, user.claims) as conn:
        job = await service.get(conn, job_id)
        if job.status is JobStatus.COMPLETED:
            return _Found(
                job, () if query.original else await transcripts.corrections(conn, job_id)
            )
        if job.status.ended:
            code = f" with {job.error_code}" if job.error_code else ""
            raise NoTranscript(f"The job is {job.status}{code}, so it has no transcript")
        partial = await transcripts.partial(conn, job_id)
        if job.status is JobStatus.QUEUED and not partial.chunks:
            raise TranscriptNotReady
        timed = name not in {"json", "txt"}
        return _Found(job, (), partial, await transcripts.so_far(conn, job) if timed else None)


def _render(found: _Found, name: str, layout: Layout) -> str:
    if found.partial is None:
        assert found.job.result is not None
        if name == "json" and not found.corrections:
            return json.dumps(found.job.result, ensure_ascii=False)
        transcript = Transcript.from_dict(found.job.result)
        if found.corrections:
            task = found.job.options.get("task", "transcribe")
            transcript = corrections.apply(transcript, found.corrections, task=task)
        return subtitles.FORMATS[name](transcript, layout)
    if found.so_far is not None:
        return subtitles.FORMATS[name](found.so_far, layout)
    if name == "txt":
        return found.partial.text + "\n" * bool(found.partial.text)
    return _partial_document(found.job, found.partial).model_dump_json()


def _partial_document(job: ProcessingJob, partial: PartialTranscript) -> PartialDocument:
    values: dict[str, Any] = {"status": job.status, "text": partial.text}
    return PartialDocument(**values, ready=partial.ready, chunks=partial.chunks)


def _etag(found: _Found, name: str, query: TranscriptQuery) -> str:
    moment = int(found.job.updated_at.timestamp() * 1_000_000)
    corrected = corrections.fingerprint(found.corrections)
    layout = f"{query.max_line_length or ''}.{query.max_lines or ''}"
    return f'"{moment:x}.{name}.{layout}{corrected and "."}{corrected}"'


def _matches(if_none_match: str | None, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in tags or "*" in tags


def _file_name(job: ProcessingJob, extension: str) -> str:
    return f"{PurePosixPath(job.file_path).stem}.{extension}"
