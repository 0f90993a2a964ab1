"""What there is of a transcript while its job runs, and what is corrected of it afterwards.

On connections that act as the job's owner.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from jobs.corrections import Change, Correction
from jobs.errors import InvalidInput, JobNotFound, NoTranscript, TranscriptNotReady
from jobs.models import JobStatus, ProcessingJob, Transcript
from jobs.sql import CORRECTIONS, JOBS, TRANSCRIPTS
from modal_functions.errors import NoSpeech
from modal_functions.merging import Part, merge

Connection = psycopg.AsyncConnection[Any]


@dataclass(frozen=True, slots=True)
class PartialTranscript:
    """The text of a job's first ``ready`` of ``chunks`` chunks; 0 chunks: it is not split yet."""

    ready: int
    chunks: int
    text: str


async def partial(conn: Connection, job_id: UUID) -> PartialTranscript:
    """Return the text as far as it is complete: empty, too, where there is no such job."""
    async with conn.cursor(row_factory=class_row(PartialTranscript)) as cursor:
        await cursor.execute(TRANSCRIPTS["partial"], {"id": job_id})
        found = await cursor.fetchone()
    assert found is not None
    return found


async def so_far(conn: Connection, job: ProcessingJob) -> Transcript:
    """Return the transcript of the chunks that ``partial`` counts as ready; it may be empty."""
    cursor = await conn.execute(TRANSCRIPTS["ready_chunks"], {"id": job.id})
    parts: list[Part] = [
        ((start, end), Transcript.from_dict(result)) async for start, end, result in cursor
    ]
    task = job.options.get("task", "transcribe")
    try:
        return merge(parts, name=job.file_path, task=task)
    except (NoSpeech, ValueError):  # nobody has spoken yet, or nothing is ready
        return Transcript("", "", parts[-1][0][1] if parts else 0.0, (), "", "")


async def corrections(conn: Connection, job_id: UUID) -> list[Correction]:
    """Return what is corrected of a transcript, in order. Nothing, too, where no such job is."""
    async with conn.cursor(row_factory=class_row(Correction)) as cursor:
        await cursor.execute(CORRECTIONS["list"], {"id": job_id})
        return await cursor.fetchall()


async def correct(conn: Connection, job_id: UUID, changes: Sequence[Change]) -> None:
    """Correct the transcript of a completed job: all of the changes are made, or none.

    What others have corrected stays, but for the same field of the same segment: the last one
    wins. The database checks the changes: ``InvalidInput`` names the field,
    ``corrections[3].text``. Raises ``JobNotFound``, and ``TranscriptNotReady`` or ``NoTranscript``
    where the job has not completed.
    """
    await _require_completed(conn, job_id)
    _check(changes)
    async with conn.transaction():
        await conn.execute(CORRECTIONS["lock"], {"id": job_id})
        await _set(conn, job_id, changes, "text", "set_texts")
        await _set(conn, job_id, changes, "speaker", "set_speakers")


async def _require_completed(conn: Connection, job_id: UUID) -> None:
    row = await (await conn.execute(JOBS["status"], {"id": job_id})).fetchone()
    if row is None:
        raise JobNotFound
    status = JobStatus(row[0])
    if not status.ended:
        raise TranscriptNotReady(
            f"The job is {status}; correct its transcript once it is completed"
        )
    if status is not JobStatus.COMPLETED:
        raise NoTranscript(f"The job is {status}, so it has no transcript to correct")


def _check(changes: Sequence[Change]) -> None:
    """Refuse what can't be told to the database."""
    seen = set[int]()
    for number, change in enumerate(changes):
        if change.segment in seen:
            field = f"corrections[{number}].segment"
            raise InvalidInput(
                f"{field}: {change.segment} comes twice; send one entry for each", field=field
            )
        seen.add(change.segment)
        for name, value in change.fields.items():
            if value is not None and not _is_storable(value):
                field = f"corrections[{number}].{name}"
                raise InvalidInput(
                    f"{field}: holds a NUL character or half a surrogate pair; leave it out",
                    field=field,
                )


def _is_storable(text: str) -> bool:
    return not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text)


async def _set(
    conn: Connection, job_id: UUID, changes: Sequence[Change], name: str, query: str
) -> None:
    values = {c.segment: c.fields[name] for c in changes if name in c.fields}
    if values:
        columns = {"segments": list(values), "values": list(values.values())}
        with _refusals([change.segment for change in changes]):
            await conn.execute(CORRECTIONS[query], {"id": job_id, **columns})


@contextmanager
def _refusals(segments: Sequence[int]) -> Iterator[None]:
    """Say which entry of the request the database has refused."""
    try:
        yield
    except psycopg.errors.CheckViolation as exc:
        said = exc.diag
        number = segments.index(json.loads(said.message_detail or "")["segment"])
        where = f"corrections[{number}]."
        raise InvalidInput(
            f"{where}{said.message_primary}. {said.message_hint}",
            field=f"{where}{said.column_name}",
        ) from exc
    except psycopg.errors.ForeignKeyViolation as exc:  # it has just been deleted
        raise JobNotFound from exc
