"""What has been transcribed of a job that still runs. On connections that act as its owner."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from jobs.models import ProcessingJob, Transcript
from jobs.sql import TRANSCRIPTS
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
