"""OpenAI's own package, with only ``base_url`` changed, against a real server, worker and model."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import openai
import psycopg
import pytest
import srt
import uvicorn
import webvtt
from openai import AsyncOpenAI, OpenAI
from openai.types.audio import TranscriptionTextDoneEvent

from jobs import worker
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    app = create_app(settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture
def token(settings: Settings, user: UUID) -> str:
    return issue_token(settings, user, lifetime=600)


@asynccontextmanager
async def running_worker(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(settings, stop, asyncio.Event()))
    try:
        yield
    finally:
        stop.set()
        await task


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # in OpenAI's package
async def test_everything_with_the_async_client(
    url: str, token: str, settings: Settings, clip: Path, sample: Path, silence: Path
) -> None:
    async with (
        running_worker(settings.model_copy(update={"worker_concurrency": 2})),
        AsyncOpenAI(api_key=token, base_url=url, timeout=120) as client,
    ):
        create: Any = client.audio.transcriptions.create
        text, subtitles, captions, verbose, translation, silent = await asyncio.gather(
            create(model="whisper-1", file=clip, response_format="text", language="en"),
            create(model="base", file=clip, response_format="srt"),
            create(model="base", file=clip, response_format="vtt"),
            create(
                model="base",
                file=clip,
                response_format="verbose_json",
                timestamp_granularities=["word", "segment"],
            ),
            client.audio.translations.create(model="whisper-1", file=clip),
            create(model="base", file=silence),
        )
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="base", file=("song.mp3", b"no sound at all"))
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="our/own", file=clip)
        stream = await create(model="base", file=sample, stream=True)
        *deltas, done = [event async for event in stream]
    assert "lighthouse" in text.lower()
    assert "lighthouse" in " ".join(cue.content for cue in srt.parse(subtitles)).lower()
    assert "lighthouse" in " ".join(c.text for c in webvtt.from_string(captions).captions).lower()
    assert verbose.language == "english"
    assert verbose.duration == pytest.approx(6, abs=0.1)
    assert "".join(word.word for word in verbose.words) == verbose.text.replace(" ", "")
    assert verbose.segments[0].avg_logprob < 0
    assert "lighthouse" in translation.text.lower()
    assert silent.text == ""
    assert (bad.value.code, bad.value.param) == ("invalid_audio", "file")
    assert "song.mp3" in bad.value.message
    assert (unknown.value.code, unknown.value.param) == ("model_unavailable", "model")
    assert isinstance(done, TranscriptionTextDoneEvent)
    assert "".join(delta.delta for delta in deltas) == done.text
    assert done.text.endswith("home.")


async def test_the_sync_client_and_a_client_that_leaves(
    url: str, token: str, settings: Settings, clip: Path, conn: psycopg.Connection
) -> None:
    with OpenAI(api_key=token, base_url=url, timeout=120) as client:
        create = client.audio.transcriptions.create
        hasty = client.with_options(timeout=1, max_retries=0).audio.transcriptions.create
        with pytest.raises(openai.APITimeoutError):
            await asyncio.to_thread(hasty, model="base", file=clip, language="en")
        async with running_worker(settings):
            transcription = await asyncio.to_thread(create, model="whisper-1", file=clip)
            async with asyncio.timeout(60):
                query = "select status, count(*) from processing_jobs group by status"
                while conn.execute(query).fetchall() != [("completed", 2)]:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
    assert "lighthouse" in transcription.text.lower()
    left = conn.execute(
        "select result ->> 'text' from processing_jobs order by created_at limit 1"
    ).fetchone()
    assert left is not None
    assert "lighthouse" in left[0].lower()
