"""The client against all routes of the real app, which a stand-in played in test_client."""

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from jobs.client import JobChanged, JobClient, JobDeleted, NewJob, RequestFailed
from jobs.models import JobStatus
from jobs.settings import Settings
from tests.live import serve
from web.app import create_app
from web.auth import issue_token

TEXT = "the quarterly report is late"
RESULT = {
    "text": TEXT,
    "language": "en",
    "duration": 2.0,
    "engine": "faster-whisper",
    "model": "base",
    "segments": [
        {
            "start": 0.0,
            "end": 2.0,
            "text": TEXT,
            "avg_logprob": -0.1,
            "no_speech_prob": 0.0,
            "compression_ratio": 1.0,
        }
    ],
}


@pytest.fixture
def client(settings: Settings, user: UUID) -> Iterator[JobClient]:
    quiet = settings.model_copy(update={"rate_limit": 0})
    token = issue_token(settings, user, lifetime=600)
    with serve(create_app(quiet)) as url, JobClient(url, token) as running:
        yield running


def set_queue(conn: psycopg.Connection, status: str) -> None:
    conn.execute("update procrastinate.procrastinate_jobs set status = %s", (status,))


def complete(conn: psycopg.Connection) -> None:
    set_queue(conn, "doing")
    conn.execute("update processing_jobs set result = %s", (Jsonb(RESULT),))
    set_queue(conn, "succeeded")


def test_from_upload_to_subtitles(
    client: JobClient, conn: psycopg.Connection, tmp_path: Path, user: UUID
) -> None:
    recording = tmp_path / "Mein Gespräch.mp3"
    recording.write_bytes(bytes(range(256)) * 100)
    file_path = client.upload(recording)
    assert file_path.startswith(f"{user}/")
    job_id = client.submit(file_path, priority=5)
    assert client.get_job(job_id).priority == 5
    statuses: list[JobStatus] = []
    for event in client.follow(job_id):
        if isinstance(event, JobChanged):
            if not statuses:
                complete(conn)
            statuses.append(event.status)
    assert (statuses[0], statuses[-1]) == (JobStatus.QUEUED, JobStatus.COMPLETED)
    assert client.wait(job_id).result == RESULT
    assert client.transcript(job_id).text == TEXT
    assert "00:00:00,000 --> 00:00:02,000" in client.transcript(job_id, "srt")
    (found,) = client.search("report")
    assert (found.id, found.hits[0].end) == (job_id, 2.0)
    copy = tmp_path / "copy.mp3"
    assert client.download_audio(job_id, copy) == copy.stat().st_size == 25_600
    client.delete(job_id)
    with pytest.raises(RequestFailed) as refused:
        client.get_job(job_id)
    assert refused.value.code == "job_not_found"


def test_many_and_pages(client: JobClient, user: UUID) -> None:
    ids = client.submit_many([NewJob(f"{user}/{number}.mp3") for number in range(100)])
    ids += client.submit_many([NewJob(f"{user}/last.mp3")])
    listed = [job.id for job in client.list_jobs(limit=200)]
    assert listed[0] == ids[-1]
    assert sorted(listed) == sorted(ids)
    assert client.cancel(ids[0]).status == JobStatus.CANCELLED
    assert [job.id for job in client.list_jobs(JobStatus.CANCELLED)] == [ids[0]]
    assert client.retry(ids[0]).status == JobStatus.QUEUED


def test_a_job_that_is_deleted_while_it_is_followed(client: JobClient, user: UUID) -> None:
    job_id = client.submit(f"{user}/a.mp3")
    events = client.follow(job_id)
    assert isinstance(next(events), JobChanged)
    client.delete(job_id)
    assert isinstance(list(events)[-1], JobDeleted)


def test_errors_say_what_the_server_says(client: JobClient, user: UUID) -> None:
    with pytest.raises(RequestFailed) as refused:
        client.submit(f"{user}/a.mp3", {"modle": "base"})
    error = refused.value
    assert (error.status, error.code, error.field) == (422, "invalid_input", "options.modle")
