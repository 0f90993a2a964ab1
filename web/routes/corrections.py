"""Correcting transcripts: texts of segments, and who speaks."""

from http import HTTPStatus
from typing import Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from jobs import service, transcripts
from jobs.corrections import Change, Correction
from jobs.database import as_user
from web.endpoints import Answer, Endpoints, Principal, Scope
from web.routes.jobs import as_json

MAX_CORRECTIONS = 5000
MAX_BODY = 1024 * 1024  # bytes of JSON

endpoint = Endpoints("Transcripts")


class CorrectionList(BaseModel):
    """What is corrected of a transcript, in order; segments without a correction have no entry."""

    corrections: list[Correction]


class NewCorrection(BaseModel):
    """What to change of a segment. What is not named stays as it is. The database checks it."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"anyOf": [{"required": ["text"]}, {"required": ["speaker"]}]},
    )

    segment: int = Field(ge=0, lt=2**31, description="Its place in the transcript, from 0.")
    text: str | None = Field(
        None,
        description="What was said; null: as transcribed; empty: leave the segment out.",
        json_schema_extra={"maxLength": 10_000},
    )
    speaker: str | None = Field(
        None,
        description="Who said it; null: not known.",
        json_schema_extra={"minLength": 1, "maxLength": 100},
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.model_fields_set == {"segment"}:
            raise ValueError("has neither text nor speaker; send what is to change")
        return self

    @property
    def change(self) -> Change:
        """Return what was sent of it."""
        return Change(self.segment, self.model_dump(exclude={"segment"}, exclude_unset=True))


class CorrectionsRequest(BaseModel):
    """Corrections to make, all or none of them; one entry for a segment."""

    model_config = ConfigDict(extra="forbid")

    corrections: list[NewCorrection] = Field(min_length=1, max_length=MAX_CORRECTIONS)


_ANSWERS = {HTTPStatus.OK: Answer("What is corrected", CorrectionList)}


@endpoint("GET", "/jobs/{job_id}/corrections", scope=Scope.JOBS_READ, answers=_ANSWERS)
async def get_corrections(request: Request, user: Principal, job_id: UUID) -> Response:
    """Get what is corrected of a job's transcript: nothing, before anybody has."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        await service.status(conn, job_id)
        found = await transcripts.corrections(conn, job_id)
    return as_json(CorrectionList(corrections=found))


@endpoint(
    "PATCH",
    "/jobs/{job_id}/corrections",
    scope=Scope.JOBS_WRITE,
    answers=_ANSWERS,
    problems=(HTTPStatus.CONFLICT,),
    max_body=MAX_BODY,
)
async def correct(
    request: Request, user: Principal, job_id: UUID, body: CorrectionsRequest
) -> Response:
    """Correct a completed job's transcript: texts of segments, and who speaks.

    All of it is done, or nothing. The job's result stays as it was transcribed; transcripts have
    the corrections in them. Who corrects a field of a segment last wins; all else stays. 409 with
    `transcript_not_ready` until the job has completed, and with `no_transcript` if it did not.
    """
    async with as_user(request.app.state.pool, user.claims) as conn:
        await transcripts.correct(conn, job_id, [entry.change for entry in body.corrections])
        found = await transcripts.corrections(conn, job_id)
    return as_json(CorrectionList(corrections=found))
