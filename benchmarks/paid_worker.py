"""A plain procrastinate worker for ``benchmarks.paid``: a task that calls Modal for each chunk.

It is what one writes first: its calls are waited for in the task, and a job whose worker died runs
again from its start, by the periodic task of procrastinate's own guide.
"""

import asyncio
import os
import threading

import modal
import procrastinate

STALL_TIMEOUT = 5.0  # seconds without a heartbeat, as pgscribe's
HEARTBEAT = 1.0  # seconds
APP = "audio-processing"

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=os.environ.get("PLAIN_DATABASE_URL", ""))
)


@app.task(name="transcribe", queue="transcription")
async def transcribe(source: str, key: str, at_a_time: int) -> str:
    """Prepare a recording, transcribe its chunks, and join their texts."""
    prepare = modal.Function.from_name(APP, "plain_prepare")
    plan = (await prepare.remote.aio(source=source, key=key))["plan"]
    model = modal.Cls.from_name(APP, "PlainModel")(engine="faster-whisper", model="base")
    slots = asyncio.Semaphore(at_a_time)

    async def text(start: int, end: int) -> str:
        async with slots:
            answer = await model.transcribe.remote.aio(start=start, end=end)
        return str(answer["transcript"]["text"])

    spans = [(span["start"], span["end"]) for span in plan["spans"]]
    return " ".join(await asyncio.gather(*(text(*span) for span in spans)))


@app.periodic(cron="* * * * * */1")
@app.task(queueing_lock="retry_stalled", pass_context=True)
async def retry_stalled(context: procrastinate.JobContext, timestamp: int) -> None:  # noqa: ARG001
    """Run jobs of dead workers again."""
    manager = context.app.job_manager
    for job in await manager.get_stalled_jobs(seconds_since_heartbeat=STALL_TIMEOUT):
        await manager.retry_job(job)


def end_with_parent() -> None:
    """End when nobody holds the other end of the standard input any more."""
    os.read(0, 1)
    os._exit(1)


async def main() -> None:
    """Work until killed."""
    async with app.open_async():
        await app.run_worker_async(
            concurrency=int(os.environ["PLAIN_CONCURRENCY"]),
            update_heartbeat_interval=HEARTBEAT,
            stalled_worker_timeout=STALL_TIMEOUT,
        )


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    asyncio.run(main())
