"""What the real Modal client raises, and what the worker makes of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from jobs import telemetry
from jobs.compute import modal as modal_compute
from jobs.compute.base import Outcome, Prepare, Transcribe
from jobs.compute.modal import ModalCompute
from jobs.errors import (
    CallLost,
    ComputeUnavailable,
    EngineCrashed,
    PgscribeError,
    SettingsError,
)
from jobs.models import TranscriptionOptions
from jobs.settings import Settings
from modal_functions.plan import SAMPLE_RATE, Span
from tests.local_modal import settings as local_modal
from tests.local_modal.server import Address, in_thread
from tests.spans import made_here

pytestmark = pytest.mark.anyio

OPTIONS = TranscriptionOptions(language="de")
CHUNK = Transcribe("/audio/key.pcm", Span(0, 10 * SAMPLE_RATE), OPTIONS)
UNLUCKY = Transcribe("not a file", Span(0, 10 * SAMPLE_RATE), OPTIONS)
PREPARE = Prepare("recording/chunks-3", "key", preprocessing=False, max_seconds=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    with in_thread(local_modal.Settings(apps=("tests.faults.speech_app:app",))) as address:
        yield address


@pytest.fixture
def cloud(server: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(modal_compute, "REQUEST_TIMEOUT", 5.0)
    monkeypatch.setattr(modal_compute, "POLL", 0.5)
    monkeypatch.setattr(modal_compute, "LATE", 5.0)
    yield server.control
    server.control.reset()


@pytest.fixture
async def compute(cloud: Any, settings: Settings) -> AsyncIterator[ModalCompute]:  # noqa: ARG001
    async with ModalCompute(settings) as compute:
        yield compute


async def result(compute: ModalCompute, call_id: str) -> Outcome:
    async with asyncio.timeout(30):
        return await compute.result(call_id, lambda _: None)


async def test_calls_return_what_the_functions_do(compute: ModalCompute) -> None:
    plan = await result(compute, await compute.spawn(PREPARE))
    assert len(plan.value["spans"]) == 3
    assert plan.usage.cpu_seconds == 1
    assert plan.steps is None  # as of an app that was deployed by the version before
    transcript = await result(compute, await compute.spawn(CHUNK))
    assert transcript.value["text"] == "chunk 0"
    assert transcript.value["language"] == "de"
    assert transcript.value["engine"] == "faster-whisper"
    assert transcript.usage.gpu_seconds == pytest.approx(0.3)
    await compute.discard("/audio/key.pcm")


async def test_a_span_says_what_gpu_was_asked_for(compute: ModalCompute) -> None:
    with made_here() as spans, telemetry.span("transcribe"):
        await compute.spawn(CHUNK)
    (span,) = spans.get_finished_spans()
    assert span.attributes == {"pgscribe.gpu": "L4"}


async def test_another_process_waits_for_the_same_call(
    compute: ModalCompute, settings: Settings
) -> None:
    call_id = await compute.spawn(CHUNK)
    async with ModalCompute(settings) as another:
        assert (await result(another, call_id)).value["text"] == "chunk 0"
    assert (await result(compute, call_id)).value["text"] == "chunk 0"


async def test_a_wait_lasts_longer_than_one_poll(compute: ModalCompute, cloud: Any) -> None:
    cloud.pause()
    call_id = await compute.spawn(CHUNK)
    waiting = asyncio.create_task(result(compute, call_id))
    await asyncio.sleep(3 * modal_compute.POLL)
    assert not waiting.done()
    cloud.resume()
    assert (await waiting).value["text"] == "chunk 0"


@pytest.mark.parametrize(
    "status", ["INTERNAL_FAILURE", "TIMEOUT", "INIT_FAILURE", "TERMINATED", "lose", "expire"]
)
async def test_a_call_without_a_result_is_lost(
    compute: ModalCompute, cloud: Any, status: str
) -> None:
    cloud.pause()
    call_id = await compute.spawn(CHUNK)
    if status in {"lose", "expire"}:
        await asyncio.to_thread(getattr(cloud, status), call_id)
        cloud.resume()
    else:
        await asyncio.to_thread(cloud.end, call_id, status)
    with pytest.raises(CallLost):
        await result(compute, call_id)


async def test_a_cancelled_call_is_lost(compute: ModalCompute, cloud: Any) -> None:
    cloud.pause()
    call_id = await compute.spawn(CHUNK)
    await compute.cancel(call_id)
    with pytest.raises(CallLost):
        await result(compute, call_id)
    await compute.cancel(call_id)
    await compute.cancel("fc-nobody-knows")


async def test_an_exception_of_the_function_is_its_crash(compute: ModalCompute) -> None:
    call_id = await compute.spawn(UNLUCKY)
    with pytest.raises(EngineCrashed, match="AssertionError") as caught:
        await result(compute, call_id)
    assert caught.value.retryable


@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL", "RESOURCE_EXHAUSTED", "CUT"])
async def test_a_server_in_trouble_is_asked_again(
    compute: ModalCompute, cloud: Any, status: str
) -> None:
    call_id = await compute.spawn(CHUNK)
    cloud.fail("FunctionGetOutputs", status, times=50)
    with pytest.raises(ComputeUnavailable) as caught:
        await result(compute, call_id)
    assert caught.value.retryable
    cloud.heal()
    assert (await result(compute, call_id)).value["text"] == "chunk 0"


async def test_a_black_hole_ends_at_our_own_deadline(
    compute: ModalCompute, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_id = await compute.spawn(CHUNK)
    monkeypatch.setattr(modal_compute, "REQUEST_TIMEOUT", 1.0)
    monkeypatch.setattr(modal_compute, "LATE", 0.5)
    cloud.black_hole()
    began = time.monotonic()
    with pytest.raises(ComputeUnavailable):
        await compute.spawn(CHUNK)
    with pytest.raises(ComputeUnavailable):
        await result(compute, call_id)
    assert time.monotonic() - began < 10, "the client itself takes 39 s"
    cloud.heal()


async def test_a_spawn_whose_answer_gets_lost_is_performed_once(
    compute: ModalCompute, cloud: Any
) -> None:
    cloud.fail("FunctionMap", "UNAVAILABLE", when="after")
    call_id = await compute.spawn(CHUNK)
    assert (await result(compute, call_id)).value["text"] == "chunk 0"
    assert len(cloud.events("spawned")) == 1


async def test_a_cancel_does_not_wait_behind_a_thousand_polls(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This server takes as few requests a connection as h2 announces by itself."""
    few = local_modal.Settings(apps=("tests.faults.speech_app:app",), streams=100)
    with in_thread(few) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        async with ModalCompute(settings) as compute:
            server.control.pause()
            calls = await asyncio.gather(*(compute.spawn(CHUNK) for _ in range(300)))
            waits = [asyncio.create_task(result(compute, call_id)) for call_id in calls]
            await asyncio.to_thread(server.control.wait_for_requests, "FunctionGetOutputs", 100)
            async with asyncio.timeout(5):
                await compute.cancel(calls[-1])
                await compute.spawn(CHUNK)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def test_an_app_that_is_not_deployed_says_how_to_deploy_it(
    cloud: Any,  # noqa: ARG001
    settings: Settings,
) -> None:
    elsewhere = settings.model_copy(update={"modal_app_name": "elsewhere"})
    async with ModalCompute(elsewhere) as compute:
        for request in (PREPARE, CHUNK):
            with pytest.raises(ComputeUnavailable, match=r"no app elsewhere .*pgscribe deploy"):
                await compute.spawn(request)


async def test_a_wrong_token_is_refused_and_not_shown(
    cloud: Any,  # noqa: ARG001
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MODAL_TOKEN_SECRET", "as-wrong-and-secret")
    with pytest.raises(SettingsError, match="Modal refuses this token") as caught:
        async with ModalCompute(settings):
            pass
    assert "as-wrong-and-secret" not in caplog.text + str(caught.value)


def test_without_a_token_the_error_says_where_to_get_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="modal token new"):
        ModalCompute(settings)


def test_errors_have_codes_and_say_whether_to_try_again() -> None:
    codes = {error.code for error in (CallLost, ComputeUnavailable, EngineCrashed)}
    assert len(codes) == 3
    assert all(issubclass(error, PgscribeError) for error in (CallLost, ComputeUnavailable))
