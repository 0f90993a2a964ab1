"""``make demo``: the main job end to end, on this machine alone.

Starts everything embedded, uploads the sample through the REST API, follows the job, then submits
the same audio with plain SQL as another service would, and compares.
"""

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import jiwer
import psycopg

from jobs.cli import terminal
from jobs.cli.serving import HOME
from jobs.client import JobClient
from jobs.dev import USER_ID, Embedded, exit_on_signals
from jobs.models import ProcessingJob, Transcript

SAMPLE = Path(__file__).parent / "sample.mp3"
TEXT = Path(__file__).parent / "sample.txt"
INSERT = b"insert into public.processing_jobs (user_id, file_path) values (%s, %s) returning id"

_SPELLING = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)


def word_error_rate(expected: str, actual: str) -> float:
    """Return the word error rate, 0 to 1, regardless of case and punctuation."""
    rate: float = jiwer.wer(
        expected, actual, reference_transform=_SPELLING, hypothesis_transform=_SPELLING
    )
    return rate


def insert_with_sql(url: str, file_path: str) -> tuple[UUID, datetime]:
    """Insert a job over an ordinary connection; return its id and the time just before commit."""
    with psycopg.connect(url) as conn:
        row = conn.execute(INSERT, (USER_ID, file_path)).fetchone()
        assert row is not None
        committing = datetime.now(UTC)
    return row[0], committing


def finished(job: ProcessingJob) -> Transcript:
    """Return the job's transcript, or end the demo with its error."""
    if job.result is None:
        sys.exit(f"The job {job.status}: {job.error_code}: {job.error}")
    return Transcript.from_dict(job.result)


def seconds_running(job: ProcessingJob) -> float:
    """Return how long the job's attempt took."""
    assert job.started_at is not None
    assert job.completed_at is not None
    return (job.completed_at - job.started_at).total_seconds()


def run(embedded: Embedded) -> None:
    """Run both jobs and print what comes of them."""
    with JobClient(embedded.url, embedded.token) as client:
        file_path = client.upload(SAMPLE)
        print(f"1. Uploaded {SAMPLE.name} and submitted it through the REST API.\n")
        job_id = client.submit(file_path)
        with terminal.progress("   transcribing") as on_change:
            job = client.wait(job_id, on_change=on_change)
        transcript = finished(job)
        print(*terminal.lines(transcript), sep="\n")
        error_rate = word_error_rate(TEXT.read_text(encoding="utf-8"), transcript.text)
        speed = transcript.duration / seconds_running(job)
        print(
            f"\n   word error rate   {error_rate:.1%} against the known text"
            f"\n   real-time factor  {1 / speed:.2f} ({speed:.0f} s of audio per second),"
            f" {transcript.engine} {transcript.model}\n"
        )

        print("2. The same audio, submitted by another service with plain SQL:")
        print(f"   {INSERT.decode()}\n")
        job_id, committing = insert_with_sql(embedded.postgres.url(), file_path)
        with terminal.progress("   transcribing") as on_change:
            second = client.wait(job_id, on_change=on_change)
        same = finished(second).text == transcript.text
        assert second.started_at is not None
        pickup = (second.started_at - committing).total_seconds()
        print(
            f"\n   commit to start   {pickup * 1000:.0f} ms (the worker was woken by NOTIFY)"
            f"\n   same transcript   {'yes' if same else 'no'}"
        )


def main() -> None:
    """Run the demo. Exit status 0 if all went well; nothing that it started stays."""
    exit_on_signals()
    started = time.monotonic()
    print("Starting embedded Postgres, web server and worker …")
    try:
        with Embedded(HOME, quiet=True) as embedded:
            print(f"Up after {time.monotonic() - started:.1f} s at {embedded.url}\n")
            run(embedded)
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    print("\nAll stopped. Next: `make dev` keeps it running.")


if __name__ == "__main__":
    main()
