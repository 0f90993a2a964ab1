"""Calls in real child processes: a real ffmpeg, a real engine with real weights."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import ffmpeg
import imageio_ffmpeg
import pytest

from jobs.compute import local
from jobs.compute.base import Compute, Outcome, Prepare, Transcribe
from jobs.compute.local import LocalCompute, processes_and_threads
from jobs.errors import (
    CallLost,
    ComputeUnavailable,
    EngineCrashed,
    SettingsError,
    TranscriptionFailed,
)
from jobs.settings import Settings
from modal_functions.plan import Plan, Span
from modal_functions.transcript import TranscriptionOptions
from tests.processes import engine_processes

pytestmark = pytest.mark.anyio

TINY = TranscriptionOptions(model="tiny.en")
BASE = TranscriptionOptions()


@pytest.fixture
def settings(tmp_path: Path, models_dir: Path) -> Settings:
    return Settings.load(
        database_url="postgresql://nowhere",
        models_dir=models_dir,
        scratch_dir=tmp_path / "scratch",
        engine_processes=2,
        engine_threads=1,
    )


@pytest.fixture
async def compute(settings: Settings) -> AsyncIterator[LocalCompute]:
    async with LocalCompute(settings) as compute:
        yield compute


@pytest.fixture(scope="session")
def minutes(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample eight times: what transcribes it is busy while another process starts."""
    path = tmp_path_factory.mktemp("audio") / "minutes.wav"
    recording = ffmpeg.input(str(sample), stream_loop=7).output(str(path), ac=1, ar=16000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


@pytest.fixture
def hanging_url() -> Iterator[tuple[str, Event]]:
    """Return the URL of a recording that never arrives, and what is set when it is asked for."""
    asked, stop = Event(), Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            stop.wait(60)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/a.wav", asked
        stop.set()
        server.shutdown()


def to_prepare(source: Path | str, key: str = "job") -> Prepare:
    return Prepare(str(source), key, preprocessing=False, max_seconds=600)


async def end(compute: Compute, call_id: str, progress: list[float] | None = None) -> Outcome:
    async with asyncio.timeout(60):
        return await compute.result(call_id, (progress if progress is not None else []).append)


async def prepared(compute: Compute, source: Path, key: str = "job") -> Plan:
    outcome = await end(compute, await compute.spawn(to_prepare(source, key)))
    return Plan.from_dict(outcome.value)


def whole(plan: Plan, options: TranscriptionOptions = TINY) -> Transcribe:
    (span,) = plan.spans
    return Transcribe(str(plan.pcm), span, options)


@asynccontextmanager
async def running(
    compute: Compute, request: Transcribe
) -> AsyncIterator[tuple[str, asyncio.Task[Outcome]]]:
    """Start a transcription and wait until it has made progress."""
    call_id, has_begun = await compute.spawn(request), asyncio.Event()
    waiting = asyncio.create_task(compute.result(call_id, lambda _: has_begun.set()))
    async with asyncio.timeout(60):
        await has_begun.wait()
    assert not waiting.done()
    try:
        yield call_id, waiting
    finally:
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_recording_becomes_a_plan_and_that_a_transcript(
    compute: LocalCompute, settings: Settings, sample: Path
) -> None:
    call_id = await compute.spawn(to_prepare(sample))
    assert call_id.startswith("local-")
    outcome = await end(compute, call_id)
    plan = Plan.from_dict(outcome.value)
    assert plan.duration == pytest.approx(58.2, abs=0.2)
    assert plan.pcm == settings.scratch_dir / f"job.{call_id}.pcm"
    assert plan.pcm.stat().st_size == 2 * plan.sample_count
    assert list(settings.scratch_dir.iterdir()) == [plan.pcm]
    assert outcome.usage.cpu_seconds > 0

    progress: list[float] = []
    started = time.monotonic()
    outcome = await end(compute, await compute.spawn(whole(plan)), progress)
    wall = time.monotonic() - started
    assert "lighthouse" in outcome.value["text"].lower()
    assert outcome.value["model"] == "tiny.en"
    assert progress == sorted(set(progress))
    assert len(progress) > 2
    assert progress[-1] == 1
    assert 0.5 < outcome.usage.cpu_seconds < 4 * wall
    assert outcome.usage.gpu_seconds == 0


async def test_what_is_wrong_is_told_and_leaves_no_file(
    compute: LocalCompute, settings: Settings, clip: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.wav"
    text.write_text("not a recording\n" * 99)
    plan = await prepared(compute, clip)
    for request, code, retryable in (
        (to_prepare(text, "a"), "invalid_audio", False),
        (replace(to_prepare(clip, "b"), max_seconds=2), "audio_too_long", False),
        (whole(plan, replace(TINY, language="xx")), "invalid_options", False),
        (whole(plan, replace(TINY, model="enormous")), "model_unavailable", False),
        (whole(replace(plan, pcm=tmp_path / "c.pcm")), "prepared_audio_gone", True),
    ):
        call_id = await compute.spawn(request)
        for _ in range(2):
            with pytest.raises(TranscriptionFailed) as caught:
                await end(compute, call_id)
            assert (caught.value.code, caught.value.retryable) == (code, retryable)
            assert str(tmp_path) not in str(caught.value)
    assert list(settings.scratch_dir.iterdir()) == [plan.pcm]


async def test_a_worker_whose_disk_is_full_asks_others_to_go_on(
    compute: LocalCompute, settings: Settings, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = uuid4()
    (settings.scratch_dir / f".local-{number}.pcm").symlink_to("/dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(local, "uuid4", lambda: number)
        call_id = await compute.spawn(to_prepare(clip))
    with pytest.raises(TranscriptionFailed, match="PGSCRIBE_SCRATCH_DIR has no room") as caught:
        await end(compute, call_id)
    assert (caught.value.code, caught.value.retryable) == (ComputeUnavailable.code, True)
    assert caught.value.retry_after == 30
    assert list(settings.scratch_dir.iterdir()) == []
    plan = await prepared(compute, clip)

    monkeypatch.setattr(local, "LEAST_ROOM", shutil.disk_usage(settings.scratch_dir).total + 1)
    with pytest.raises(ComputeUnavailable, match=r"PGSCRIBE_SCRATCH_DIR is full: [0-9]+ MiB"):
        await compute.spawn(to_prepare(clip))
    await end(compute, await compute.spawn(whole(plan)))  # it needs no room

    monkeypatch.setattr(local, "LEAST_ROOM", 0)
    shutil.rmtree(settings.scratch_dir)
    with pytest.raises(ComputeUnavailable, match=r"can't be used \(No such file or directory\)"):
        await compute.spawn(to_prepare(clip))


async def test_prepared_audio_can_be_gone_or_cut_off(compute: LocalCompute, clip: Path) -> None:
    plan = await prepared(compute, clip)
    os.truncate(plan.pcm, 1000)
    for _ in range(2):
        with pytest.raises(TranscriptionFailed, match="prepared again") as caught:
            await end(compute, await compute.spawn(whole(plan)))
        assert (caught.value.code, caught.value.retryable) == ("prepared_audio_gone", True)
        await compute.discard(str(plan.pcm))
        assert not plan.pcm.exists()


async def test_only_the_scratch_folder_is_read_and_written(
    compute: LocalCompute, settings: Settings, clip: Path, tmp_path: Path
) -> None:
    plan = await prepared(compute, clip)
    elsewhere = replace(plan, pcm=tmp_path / "moved" / plan.pcm.name)
    assert (await end(compute, await compute.spawn(whole(elsewhere)))).value["text"]
    moved = plan.pcm.rename(tmp_path / plan.pcm.name)
    with pytest.raises(TranscriptionFailed):
        await end(compute, await compute.spawn(whole(replace(plan, pcm=moved))))
    for key in ("../job", "a/b", "/job"):
        with pytest.raises(ValueError, match="not usable"):
            await compute.spawn(to_prepare(clip, key))
        await compute.discard(f"{tmp_path}/{key}")
    await compute.discard(str(moved))
    assert moved.exists()
    assert list(settings.scratch_dir.iterdir()) == []


async def test_a_wait_can_be_cancelled_shared_and_repeated(
    compute: LocalCompute, sample: Path
) -> None:
    plan = await prepared(compute, sample)
    async with running(compute, whole(plan)) as (call_id, waiting):
        processes = engine_processes()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    progress: list[float] = []
    first, second = await asyncio.gather(end(compute, call_id, progress), end(compute, call_id))
    assert "lighthouse" in first.value["text"].lower()
    assert first == second == await end(compute, call_id)
    assert 0 < progress[0] <= 1
    assert engine_processes() == processes, "the call went on where it was"


async def test_ended_calls_are_remembered_but_not_all(
    compute: LocalCompute, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_KEEP_ENDED", 2)
    call_ids = []
    for _ in range(4):
        call_ids.append(await compute.spawn(to_prepare(clip)))
        await end(compute, call_ids[-1])
    with pytest.raises(CallLost):
        await end(compute, call_ids[0])
    for call_id in call_ids[1:]:
        await end(compute, call_id)


async def test_unknown_calls_are_lost(compute: LocalCompute) -> None:
    with pytest.raises(CallLost):
        await end(compute, "local-of-another-worker")
    await compute.cancel("local-of-another-worker")


async def test_a_running_call_is_cancelled_at_once_and_the_next_gets_a_fresh_process(
    compute: LocalCompute, sample: Path, clip: Path
) -> None:
    long, short = await prepared(compute, sample, "long"), await prepared(compute, clip, "short")
    before = engine_processes()
    async with running(compute, whole(long)) as (call_id, waiting):
        async with asyncio.timeout(5):
            await compute.cancel(call_id)
            with pytest.raises(CallLost):
                await waiting
        assert len(before & engine_processes()) == 1, "only the one that prepares is left"
    with pytest.raises(CallLost):
        await end(compute, call_id)
    assert (await end(compute, await compute.spawn(whole(short)))).value["text"]


async def test_a_waiting_call_is_cancelled_and_those_around_it_are_not(
    settings: Settings, sample: Path, clip: Path
) -> None:
    async with LocalCompute(settings.model_copy(update={"engine_processes": 1})) as compute:
        long, short = (
            await prepared(compute, sample, "long"),
            await prepared(compute, clip, "short"),
        )
        async with running(compute, whole(long)) as (_, waiting):
            second, third = [await compute.spawn(whole(short)) for _ in range(2)]
            await compute.cancel(second)
            with pytest.raises(CallLost):
                await end(compute, second)
            assert not waiting.done()
            assert (await end(compute, third)).value["text"]
            assert waiting.done(), "calls are served in the order in which they were started"
            assert (await waiting).value["text"]


async def test_a_call_is_cancelled_before_it_began(compute: LocalCompute, clip: Path) -> None:
    """The cancellations come before the tasks have begun, and while processes are started."""
    for pause in (0, 0, 1, 1, 3, 3):
        call_id = await compute.spawn(to_prepare(clip, "cancelled"))
        for _ in range(pause):
            await asyncio.sleep(0)
        await compute.cancel(call_id)
    assert (await prepared(compute, clip)).spans
    assert len(engine_processes()) == 2


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
async def test_a_crash_ends_its_call_and_nothing_else(
    compute: LocalCompute, sample: Path, number: signal.Signals
) -> None:
    plan = await prepared(compute, sample)
    preparing = engine_processes()
    async with running(compute, whole(plan)) as (call_id, waiting):
        (pid,) = engine_processes() - {min(preparing), max(preparing)} or {
            pid for pid in preparing if _has_model(pid)
        }
        os.kill(pid, number)
        with pytest.raises(EngineCrashed, match=number.name) as caught:
            await waiting
        assert caught.value.retryable
    with pytest.raises(CallLost):
        await end(compute, call_id)
    assert (await end(compute, await compute.spawn(whole(plan)))).value["text"]


def _has_model(pid: int) -> bool:
    return "libctranslate2" in Path(f"/proc/{pid}/maps").read_text()


async def test_a_crash_is_told_to_who_comes_later(compute: LocalCompute, sample: Path) -> None:
    plan = await prepared(compute, sample)
    async with running(compute, whole(plan)) as (call_id, waiting):
        waiting.cancel()
    for pid in engine_processes():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineCrashed):
        await end(compute, call_id)
    with pytest.raises(CallLost):
        await end(compute, call_id)


async def test_a_process_that_does_not_start_fails_its_call(
    compute: LocalCompute, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(local, "_CHILD", ("/nowhere/python",))
        with pytest.raises(EngineCrashed, match="log says more"):
            await prepared(compute, clip)
    assert (await prepared(compute, clip)).spans


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - files and processes have no event
            await asyncio.sleep(0.01)


async def test_half_a_file_is_never_seen(
    compute: LocalCompute, settings: Settings, sample: Path, hanging_url: tuple[str, Event]
) -> None:
    """A prepare call is cancelled and one crashes, while their files are there but unfinished."""
    url, asked = hanging_url
    plan = await prepared(compute, sample)
    for crashes in (False, True):
        asked.clear()
        call_id = await compute.spawn(to_prepare(url))
        assert await asyncio.to_thread(asked.wait, 30)
        files = sorted(settings.scratch_dir.iterdir())
        assert files == [settings.scratch_dir / f".{call_id}.pcm", plan.pcm]
        if crashes:
            for pid in engine_processes():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineCrashed):
                await end(compute, call_id)
        else:
            await compute.cancel(call_id)
        assert list(settings.scratch_dir.iterdir()) == [plan.pcm]
        assert plan.pcm.stat().st_size == 2 * plan.sample_count, "the one from before is whole"


async def test_preparing_does_not_wait_for_transcriptions(
    settings: Settings, sample: Path, clip: Path
) -> None:
    async with LocalCompute(settings.model_copy(update={"engine_processes": 1})) as compute:
        plan = await prepared(compute, sample)
        async with running(compute, whole(plan, BASE)) as (_, waiting):
            await prepared(compute, clip, "other")
            assert not waiting.done()


async def test_a_second_process_starts_when_a_second_call_waits(
    compute: LocalCompute, minutes: Path, clip: Path
) -> None:
    async with asyncio.timeout(30):  # a process has its name a moment after it was started
        while len(engine_processes()) != 1:  # noqa: ASYNC110 - nobody says that it has one
            await asyncio.sleep(0.01)
    short = await prepared(compute, clip, "short")
    plan = await prepared(compute, minutes, "long")
    long = Transcribe(str(plan.pcm), Span(0, plan.sample_count), TINY)
    with_one = engine_processes()
    assert len(with_one) == 2, "one that transcribes and one that prepares"
    for options in (BASE, TINY, BASE):
        await end(compute, await compute.spawn(whole(short, options)))
    assert engine_processes() == with_one
    async with running(compute, long) as (_, waiting):
        await end(compute, await compute.spawn(whole(short)))
        assert not waiting.done()
        with_two = engine_processes()
        assert len(with_two - with_one) == 1
        await compute.spawn(whole(short))
        await end(compute, await compute.spawn(whole(short)))
        assert engine_processes() == with_two
    (preparing,) = [pid for pid in with_two if not _has_model(pid)]
    assert preparing in with_one, "it loads no engine"


async def test_processes_get_no_secret_and_end_with_the_compute(
    settings: Settings, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://x:secret@db/x")
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "secret")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    async with LocalCompute(settings) as compute:
        plan = await prepared(compute, sample)
        async with running(compute, whole(plan)) as (_, waiting):
            processes = engine_processes()
            assert len(processes) == 2
            for pid in processes:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
                assert b"secret" not in environment
                assert b"OMP_WAIT_POLICY=PASSIVE\0" in environment
            await compute.__aexit__()
            with pytest.raises(CallLost):
                await waiting
            assert engine_processes() == set()


async def test_what_was_left_in_the_scratch_folder_goes_after_a_day(settings: Settings) -> None:
    scratch = settings.scratch_dir
    scratch.mkdir()
    old = time.time() - 25 * 3600
    for name in ("old.pcm", ".local-1.pcm", "notes.txt"):
        (scratch / name).touch()
        os.utime(scratch / name, (old, old))
    (scratch / "new.pcm").touch()
    async with LocalCompute(settings) as compute:
        assert {path.name for path in scratch.iterdir()} == {"new.pcm", "notes.txt"}
        os.utime(scratch / "new.pcm", (old, old))
        await compute.discard("another.pcm")
        assert {path.name for path in scratch.iterdir()} == {"notes.txt"}


async def test_a_default_model_that_cannot_be_loaded_stops_nobody(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_CHILD", ("/nowhere/python",))
    async with LocalCompute(settings):
        assert engine_processes() == set()


def test_an_engine_that_is_not_installed_is_named(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None if name == "faster_whisper" else name)
    with pytest.raises(SettingsError, match="faster_whisper is not installed"):
        LocalCompute(settings)


@pytest.mark.parametrize(
    ("cores", "chosen", "expected"),
    [
        (1, {}, (1, 1)),
        (2, {}, (2, 2)),
        (4, {}, (4, 2)),
        (16, {}, (4, 8)),
        (8, {"device": "cuda"}, (1, 8)),
        (2, {"engine_processes": 1}, (1, 2)),
        (2, {"engine_processes": 8}, (8, 1)),
        (8, {"engine_threads": 3}, (4, 3)),
    ],
)
def test_processes_share_the_cores(
    settings: Settings,
    cores: int,
    chosen: dict[str, Any],
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unset = {"engine_processes": None, "engine_threads": None}
    monkeypatch.setattr(local, "has_gpu", lambda: False)
    assert processes_and_threads(settings.model_copy(update=unset | chosen), cores) == expected


def test_a_gpu_gets_one_process(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "has_gpu", lambda: True)
    unset = {"engine_processes": None, "engine_threads": None}
    for device, processes in (("auto", 1), ("cpu", 4)):
        chosen = settings.model_copy(update=unset | {"device": device})
        assert processes_and_threads(chosen, 8)[0] == processes
