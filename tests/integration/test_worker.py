"""A real worker on a real database with a real engine: from a row to a transcript or an error."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from jobs import worker
from jobs.compute.base import Outcome, Prepare, Transcribe, Usage
from jobs.compute.local import LocalCompute
from jobs.models import Transcript, TranscriptionOptions
from jobs.settings import Settings
from modal_functions.plan import Plan, Span
from tests.processes import engine_processes

pytestmark = pytest.mark.anyio

Row = dict[str, Any]


class Jobs:
    """Submits jobs with plain SQL and waits for what becomes of them, woken by NOTIFY."""

    def __init__(self, url: str, user: UUID, storage: Path) -> None:
        self._url = url
        self.user = user
        self.folder = storage / str(user)
        self.folder.mkdir(parents=True)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(
                "create function test_notify() returns trigger language plpgsql as $$ begin"
                " notify job_changed; return null; end $$;"
                "create trigger test_notify after update on processing_jobs"
                " execute function test_notify()"
            )

    def submit(self, name: str, **options: object) -> UUID:
        with psycopg.connect(self._url, autocommit=True) as conn:
            row = conn.execute(
                "insert into processing_jobs (user_id, file_path, options) values (%s, %s, %s)"
                " returning id",
                (self.user, f"{self.user}/{name}", Jsonb(options)),
            ).fetchone()
        assert row is not None
        job_id: UUID = row[0]
        return job_id

    async def wait(self, job_id: UUID, condition: str) -> Row:
        """Return the job's row as soon as the SQL ``condition`` holds for it."""
        query = f"select *, ({condition}) as holds from processing_jobs where id = %s"
        async with (
            asyncio.timeout(90),
            await psycopg.AsyncConnection.connect(
                self._url, autocommit=True, row_factory=dict_row
            ) as conn,
        ):
            await conn.execute("listen job_changed")
            while True:
                row = await (await conn.execute(query.encode(), (job_id,))).fetchone()
                assert row is not None
                if row["holds"]:
                    return row
                async for _ in conn.notifies(stop_after=1):
                    pass

    async def end(self, job_id: UUID) -> Row:
        return await self.wait(job_id, "completed_at is not null")


@pytest.fixture
def jobs(database: str, user: UUID, settings: Settings) -> Jobs:
    return Jobs(database, user, settings.storage_dir)


@asynccontextmanager
async def running_worker(settings: Settings) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(settings, stop, asyncio.Event()))
    try:
        yield
    finally:
        stop.set()
        await task


async def test_rows_become_transcripts_also_scheduled_ones(
    jobs: Jobs, settings: Settings, clip: Path, conn: psycopg.Connection
) -> None:
    shutil.copy(clip, jobs.folder / "clip.wav")
    async with running_worker(settings):
        row = await jobs.end(jobs.submit("clip.wav", language="en", word_timestamps=True))
        with_prompt = await jobs.end(jobs.submit("clip.wav", initial_prompt="A lighthouse."))
    assert (row["status"], row["attempt"], row["progress"]) == ("completed", 1, 1)
    assert row["audio_seconds"] == pytest.approx(6, abs=0.1)
    assert row["created_at"] <= row["started_at"] <= row["completed_at"] <= row["updated_at"]
    transcript = Transcript.from_dict(row["result"])
    assert "lighthouse" in transcript.text.lower()
    assert transcript.language == "en"
    waveforms = conn.execute("select peaks from processing_job_waveforms").fetchall()
    assert [len(peaks) for (peaks,) in waveforms] == [2000, 2000]
    assert 60 < max(waveforms[0][0]) <= 255
    assert transcript.segments[0].words
    assert with_prompt["status"] == "completed"
    queue = conn.execute(
        "select status::text, count(*) from procrastinate.procrastinate_jobs"
        " where queue_name = 'transcription' group by 1"
    )
    assert queue.fetchall() == [("succeeded", 2)]


async def test_openai_whisper_does_the_same(jobs: Jobs, settings: Settings, clip: Path) -> None:
    shutil.copy(clip, jobs.folder / "clip.wav")
    async with running_worker(settings.model_copy(update={"engine": "openai-whisper"})):
        row = await jobs.end(jobs.submit("clip.wav"))
    assert row["status"] == "completed", row["error"]
    assert "lighthouse" in row["result"]["text"].lower()
    assert row["result"]["engine"] == "openai-whisper"


async def test_progress_is_written_while_the_job_runs(
    jobs: Jobs, settings: Settings, sample: Path
) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    async with running_worker(settings):
        job_id = jobs.submit("sample.mp3")
        row = await jobs.wait(job_id, "progress > 0 and status = 'processing'")
        assert 0 < row["progress"] <= 1
        assert (await jobs.end(job_id))["status"] == "completed"


def _write_wav(path: Path, frames: bytes) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(frames)


def _truncated(path: Path, clip: Path) -> None:
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])


BAD_INPUT: dict[str, tuple[Callable[[Path, Path], object], dict[str, object], str]] = {
    "missing.mp3": (lambda _path, _clip: None, {}, "file_not_found"),
    "folder": (lambda path, _: path.mkdir(), {}, "file_not_found"),
    "empty.mp3": (lambda path, _: path.touch(), {}, "empty_file"),
    "text.mp3": (lambda path, _: path.write_text("not a recording\n" * 99), {}, "invalid_audio"),
    "truncated.wav": (_truncated, {}, "truncated_audio"),
    "no-samples.wav": (lambda path, _: _write_wav(path, b""), {}, "empty_audio"),
    "silence.wav": (lambda path, _: _write_wav(path, bytes(64000)), {}, "no_speech"),
    "model.wav": (shutil.copy, {"model": "enormous"}, "model_unavailable"),
    "language.wav": (shutil.copy, {"language": "xx"}, "invalid_options"),
}


async def test_bad_input_ends_with_a_clear_error(
    jobs: Jobs, settings: Settings, clip: Path
) -> None:
    async with running_worker(settings):
        submitted = {}
        for name, (make, options, _) in BAD_INPUT.items():
            path = jobs.folder / name
            make(clip, path) if make is shutil.copy else make(path, clip)
            submitted[name] = jobs.submit(name, **options)
        rows = {name: await jobs.end(job_id) for name, job_id in submitted.items()}
        shutil.copy(clip, jobs.folder / "good.wav")
        assert (await jobs.end(jobs.submit("good.wav")))["status"] == "completed"
    for name, row in rows.items():
        assert (row["status"], row["error_code"]) == ("failed", BAD_INPUT[name][2]), (name, row)
        assert row["attempt"] == 1, "an error that is final is not tried again"
        assert row["result"] is None
        assert len(row["error"]) > 20
        assert str(settings.storage_dir) not in row["error"], "no path of the server is shown"


async def test_a_crash_of_native_code_costs_one_attempt(
    jobs: Jobs, settings: Settings, sample: Path
) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    async with running_worker(settings):
        job_id = jobs.submit("sample.mp3")
        await jobs.wait(job_id, "progress > 0")
        for engine in engine_processes():
            os.kill(engine, signal.SIGSEGV)
        crashed = await jobs.wait(job_id, "status = 'queued'")
        assert crashed["error_code"] == "engine_crashed"
        assert "SIGSEGV" in crashed["error"]
        row = await jobs.end(job_id)
    assert (row["status"], row["attempt"], row["error"]) == ("completed", 2, None)


async def test_attempts_are_limited(jobs: Jobs, settings: Settings, sample: Path) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    async with running_worker(settings.model_copy(update={"max_attempts": 1})):
        job_id = jobs.submit("sample.mp3")
        await jobs.wait(job_id, "progress > 0")
        for engine in engine_processes():
            os.kill(engine, signal.SIGKILL)
        row = await jobs.end(job_id)
    assert (row["status"], row["error_code"]) == ("failed", "engine_crashed")


async def test_an_attempt_has_a_deadline(jobs: Jobs, settings: Settings, sample: Path) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    async with running_worker(settings.model_copy(update={"job_timeout": 1})):
        row = await jobs.end(jobs.submit("sample.mp3"))
    assert (row["status"], row["error_code"]) == ("failed", "timeout")
    assert "1 s" in row["error"]


async def test_a_deleted_job_stops_and_the_next_one_runs(
    jobs: Jobs, settings: Settings, sample: Path, clip: Path, conn: psycopg.Connection
) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    shutil.copy(clip, jobs.folder / "clip.wav")
    async with running_worker(settings):
        job_id = jobs.submit("sample.mp3")
        await jobs.wait(job_id, "progress > 0")
        before = engine_processes()
        conn.execute("delete from processing_jobs where id = %s", (job_id,))
        row = await jobs.end(jobs.submit("clip.wav"))
        assert row["status"] == "completed"
        assert before - engine_processes(), "the deleted job's engine was stopped"
    queue = conn.execute(
        "select status::text from procrastinate.procrastinate_jobs"
        " where queue_name = 'transcription' order by id"
    )
    assert queue.fetchall() == [("succeeded",)]


@pytest.fixture
def worker_process(settings: Settings) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `pgscribe worker` as an operator would; whatever is left is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "worker", "--concurrency", "1"],
            env=os.environ
            | {
                "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
                "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
                "PGSCRIBE_MODELS_DIR": str(settings.models_dir),
            }
            | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


async def test_sigterm_lets_a_job_finish(
    jobs: Jobs, clip: Path, worker_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    shutil.copy(clip, jobs.folder / "clip.wav")
    process = worker_process(PGSCRIBE_SHUTDOWN_TIMEOUT="60")
    job_id = jobs.submit("clip.wav")
    await jobs.wait(job_id, "status = 'processing'")
    process.terminate()
    assert (await jobs.end(job_id))["status"] == "completed"
    assert process.wait(60) == 0


async def test_sigterm_gives_a_long_job_back(
    jobs: Jobs, sample: Path, worker_process: Callable[..., subprocess.Popen[bytes]]
) -> None:
    shutil.copy(sample, jobs.folder / "sample.mp3")
    process = worker_process(PGSCRIBE_SHUTDOWN_TIMEOUT="0.2")
    job_id = jobs.submit("sample.mp3")
    await jobs.wait(job_id, "progress > 0")
    process.terminate()
    row = await jobs.wait(job_id, "status = 'queued'")
    assert (row["attempt"], row["error"]) == (1, None)
    assert process.wait(60) == 0
    worker_process()
    assert (await jobs.end(job_id))["attempt"] == 2


class HostileCompute:
    """Does something in the middle of a transcription."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def spawn(self, request: Prepare | Transcribe) -> str:
        return type(request).__name__

    async def result(self, call_id: str, on_progress: Callable[[float], None]) -> Outcome:
        if call_id == Prepare.__name__:
            return Outcome(Plan("'a.wav'", Path("a.pcm"), (Span(0, 16_000),)).to_dict(), Usage())
        self._act()
        on_progress(1)
        return Outcome(Transcript("late", "en", 1.0, (), "test", "base").to_dict(), Usage())

    async def cancel(self, call_id: str) -> None:
        pass

    async def discard(self, key: str) -> None:
        pass


async def test_a_late_writer_loses(
    jobs: Jobs, settings: Settings, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the attempt runs, its job is taken away and given to somebody else."""
    (jobs.folder / "a.wav").touch()
    job_id = jobs.submit("a.wav")

    def take_over() -> None:
        for status in ("todo", "doing"):
            conn.execute(
                f"update procrastinate.procrastinate_jobs set status = '{status}'".encode()
            )
        stopping.set()

    stopping = asyncio.Event()
    monkeypatch.setattr(worker, "make_compute", lambda _: HostileCompute(take_over))
    async with running_worker(settings):
        await stopping.wait()
    row = await jobs.wait(job_id, "true")
    assert (row["attempt"], row["result"], row["error"]) == (2, None, None)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("a secret detail"), "failed", "internal_error"),
        (psycopg.OperationalError("a secret detail"), "queued", "database_unavailable"),
    ],
)
async def test_unexpected_errors_show_no_internals(
    jobs: Jobs,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    status: str,
    code: str,
) -> None:
    (jobs.folder / "a.wav").touch()

    def fail() -> None:
        raise error

    monkeypatch.setattr(worker, "make_compute", lambda _: HostileCompute(fail))
    async with running_worker(settings):
        row = await jobs.wait(jobs.submit("a.wav"), "error is not null")
    assert (row["status"], row["error_code"]) == (status, code)
    assert "a secret detail" not in row["error"]
    assert ("a secret detail" in caplog.text) == (code == "internal_error")


async def test_engines_get_no_secret_and_end_with_the_worker(
    settings: Settings, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://x:secret@db/x")
    monkeypatch.setenv("SUPABASE_SERVICE_ROLE_KEY", "secret")
    async with LocalCompute(settings) as compute:

        async def outcome(request: Prepare | Transcribe) -> dict[str, Any]:
            return (await compute.result(await compute.spawn(request), lambda _: None)).value

        prepare = Prepare(str(clip), "clip", preprocessing=False, max_seconds=60)
        plan = Plan.from_dict(await outcome(prepare))
        transcribe = Transcribe(str(plan.pcm), plan.spans[0], TranscriptionOptions())
        assert "lighthouse" in (await outcome(transcribe))["text"].lower()
        engines = engine_processes()
        assert len(engines) == 2, "one prepares, one transcribes"
        for engine in engines:
            assert b"secret" not in Path(f"/proc/{engine}/environ").read_bytes()
    assert engine_processes() == set()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_engines_cannot_read_the_workers_environment() -> None:
    """Two processes of one unprivileged user: the first hides, the second looks."""
    code = """if True:
        import ctypes, os, sys
        from jobs.compute.local import hide_environment
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process is that never changed its user
        if "hide" in sys.argv:
            hide_environment()
        if (child := os.fork()) == 0:
            try:
                open(f"/proc/{os.getppid()}/environ", "rb").read()
            except PermissionError:
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    outcomes = [
        subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
        ).stdout.strip()
        for argument in ("show", "hide")
    ]
    assert outcomes == ["0", "1"]
