"""What type checkers make of the clients. mypy reads this; nobody runs it."""

from collections.abc import AsyncGenerator, Iterator
from typing import assert_type
from uuid import UUID

from jobs.client import AsyncJobClient, JobChanged, JobClient, JobEvent, NewJob, SearchResult
from jobs.models import JobSummary, ProcessingJob, Transcript, TranscriptionOptions
from jobs.webhooks import Delivery, DeliveryLog, Endpoint, NewEndpoint


def blocking(job_id: UUID) -> None:
    seen: list[JobChanged] = []
    with JobClient("https://example.org", lambda: "token", user_id=job_id) as client:
        assert_type(client, JobClient)
        assert_type(client.upload("talk.mp3"), str)
        assert_type(client.submit("u/talk.mp3", {"model": "tiny"}), UUID)
        assert_type(client.submit(audio_url="https://a/b", options=TranscriptionOptions()), UUID)
        assert_type(client.submit_many([NewJob("u/talk.mp3")]), list[UUID])
        assert_type(client.get_job(str(job_id)), ProcessingJob)
        assert_type(client.list_jobs("queued"), Iterator[JobSummary])
        assert_type(client.wait(job_id, 60, seen.append), ProcessingJob)
        assert_type(client.follow(job_id), Iterator[JobEvent])
        assert_type(client.transcript(job_id), Transcript)
        assert_type(client.transcript(job_id, "json"), Transcript)
        assert_type(client.transcript(job_id, format="srt"), str)
        assert_type(client.transcript(job_id, "srt", original=True), str)
        client.transcript(job_id, "doc")  # type: ignore[call-overload]
        assert_type(client.search("words"), Iterator[SearchResult])
        assert_type(client.download_audio(job_id, "talk.mp3"), int)
        assert_type(client.update_job_status(job_id, progress=0.5), JobChanged)
        assert_type(client.webhooks.create("https://a/b", ["job.failed"]), NewEndpoint)
        client.webhooks.create("https://a/b", ["job.started"])  # type: ignore[list-item]
        assert_type(client.webhooks.endpoints(), list[Endpoint])
        assert_type(client.webhooks.update(job_id, enabled=True), Endpoint)
        assert_type(client.webhooks.rotate_secret(), str)
        assert_type(client.webhooks.deliveries(status="failed"), Iterator[Delivery])
        assert_type(client.webhooks.replay(str(job_id)), DeliveryLog)


async def awaited(job_id: UUID) -> None:
    async def current() -> str:
        return "token"

    async with AsyncJobClient("https://example.org", current) as client:
        assert_type(client, AsyncJobClient)
        assert_type(await client.upload("talk.mp3"), str)
        assert_type(await client.submit("u/talk.mp3"), UUID)
        assert_type(await client.wait(job_id), ProcessingJob)
        assert_type(client.follow(job_id), AsyncGenerator[JobEvent, None])
        assert_type(client.list_jobs(), AsyncGenerator[JobSummary, None])
        assert_type(await client.transcript(job_id, original=True), Transcript)
        assert_type(await client.transcript(job_id, "vtt"), str)
        assert_type(await client.webhooks.send_test(job_id), DeliveryLog)
        assert_type(client.webhooks.deliveries(job=job_id), AsyncGenerator[Delivery, None])
    JobClient("https://example.org", current)  # type: ignore[arg-type]
