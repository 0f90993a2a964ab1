"""Jobs as if they had been run: rows at times of one's choosing, with results of one's own."""

import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb

from db.embedded import SUPERUSER, EmbeddedPostgres

MARKS = {"avg_logprob": -0.1, "no_speech_prob": 0.0, "compression_ratio": 1.0}

_INSERT = b"""
with q as (
  insert into procrastinate.procrastinate_jobs (queue_name, task_name, args, status, worker_id)
  values ('transcription', 'transcribe', jsonb_build_object('processing_job_id', %(id)s::uuid),
          %(queue_status)s::procrastinate.procrastinate_job_status, %(worker)s) returning id)
insert into public.processing_jobs (id, user_id, file_path, job_id, status, progress, attempt,
  created_at, updated_at, started_at, completed_at, audio_seconds, estimated_seconds, error_code,
  error, note, result, usage, options)
select %(id)s, %(owner)s, %(path)s, q.id::text, %(status)s, %(progress)s, 1, %(created)s, now(),
  %(started)s, %(ended)s, %(seconds)s, 60, %(code)s, %(error)s, %(note)s, %(result)s, %(usage)s,
  %(options)s
from q
"""
_QUEUE_STATUS = {"completed": "succeeded", "queued": "todo", "processing": "doing"}


def segment(text: str, start: float, end: float, *words: str, **more: Any) -> dict[str, Any]:
    """Return a segment; with ``words`` each has the same part of its time."""
    made: dict[str, Any] = {"start": start, "end": end, "text": text, **MARKS, **more}
    if words:
        step = (end - start) / len(words)
        made["words"] = [
            {
                "start": round(start + step * number, 3),
                "end": round(start + step * (number + 1), 3),
                "word": word,
                "probability": 0.9,
            }
            for number, word in enumerate(words)
        ]
    return made


def transcript(
    segments: Sequence[dict[str, Any]], *, language: str = "en", duration: float | None = None
) -> dict[str, Any]:
    """Return a result."""
    return {
        "text": " ".join(part["text"] for part in segments),
        "language": language,
        "duration": segments[-1]["end"] if duration is None else duration,
        "segments": list(segments),
        "engine": "faster-whisper",
        "model": "base",
    }


def silent(path: Path, seconds: float) -> None:
    """Write a recording in which nothing is heard. However long it is, it takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = round(8000 * seconds)
    with wave.open(str(path), "wb") as recording:
        recording.setparams((1, 2, 8000, frames, "NONE", ""))
        recording.writeframes(b"\0\0")
    with path.open("r+b") as file:
        file.seek(4)
        file.write((36 + 2 * frames).to_bytes(4, "little"))
        file.seek(40)
        file.write((2 * frames).to_bytes(4, "little"))
        file.truncate(44 + 2 * frames)


@dataclass
class Seed:
    """Puts into the database and into storage what a test is to find there."""

    admin: psycopg.Connection
    storage: Path

    def job(
        self,
        owner: UUID,
        name: str = "talk.mp3",
        status: str = "completed",
        *,
        ago: float = 60,
        waited: float = 10,
        ran: float = 5,
        **values: Any,
    ) -> UUID:
        """Insert a job that ended ``ago`` seconds ago, or began, or has waited since then."""
        job_id = uuid4()
        at = datetime.now(UTC) - timedelta(seconds=ago)
        running = status == "processing"
        started = None if status == "queued" else at - timedelta(seconds=0 if running else ran)
        ended = None if status in {"queued", "processing"} else at
        row: dict[str, Any] = {
            "id": job_id,
            "owner": owner,
            "path": f"{owner}/{name}",
            "queue_status": _QUEUE_STATUS.get(status, status),
            "status": status,
            "created": (started or at) - timedelta(seconds=0 if status == "queued" else waited),
            "started": started,
            "ended": ended,
            "progress": 1 if status == "completed" else 0,
            "seconds": None,
            "code": None,
            "error": values.get("code") and f"{values['code']} {ago} seconds ago",
            "note": None,
            "worker": None,
            "result": {"text": "what was said"} if status == "completed" else None,
            "usage": None,
            "options": {"model": "base"},
        } | values
        for name_of_json in ("result", "usage", "options"):
            value = row[name_of_json]
            row[name_of_json] = None if value is None else Jsonb(value)
        self.admin.execute(_INSERT, row)
        return job_id

    def transcript(
        self,
        owner: UUID,
        segments: Sequence[dict[str, Any]],
        name: str = "talk.wav",
        *,
        language: str = "en",
        audio: bool = True,
        **values: Any,
    ) -> UUID:
        """Insert a completed job with a transcript and, in storage, silence as long as it."""
        result = transcript(segments, language=language)
        seconds = result["duration"]
        job_id = self.job(owner, name, result=result, seconds=seconds, **values)
        if audio:
            silent(self.storage / str(owner) / name, seconds)
        return job_id

    def peaks(self, job_id: UUID, peaks: Sequence[int]) -> None:
        """Give a job a waveform."""
        self.admin.execute(
            "insert into public.processing_job_waveforms (job_id, peaks) values (%s, %s)",
            (job_id, list(peaks)),
        )

    def chunks(self, job_id: UUID, *texts: str, seconds: float = 20) -> None:
        """Give a running job chunks; those with a text are done."""
        for index, text in enumerate(texts):
            start, end = index * seconds, (index + 1) * seconds
            result = transcript([segment(text, 0, seconds)]) if text else None
            self.admin.execute(
                "insert into public.processing_job_chunks"
                " (job_id, index, start_seconds, end_seconds, result, completed_at)"
                " values (%s, %s, %s, %s, %s, case when %s then now() end)",
                (job_id, index, start, end, result and Jsonb(result), bool(text)),
            )

    def worker(self, *, silent_for: float = 0) -> int:
        """Register a worker, whose last sign of life was so many seconds ago."""
        row = self.admin.execute(
            "insert into procrastinate.procrastinate_workers (last_heartbeat)"
            " values (now() - make_interval(secs => %s)) returning id",
            (silent_for,),
        ).fetchone()
        assert row is not None
        number: int = row[0]
        return number


@contextmanager
def seeding(postgres: EmbeddedPostgres, name: str, storage: Path) -> Iterator[Seed]:
    """Yield what fills that database. No trigger says what time it is or tells anybody."""
    url = postgres.url(user=SUPERUSER, database=name)
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("set session_replication_role = replica")
        yield Seed(admin, storage)
