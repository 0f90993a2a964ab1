"""Handing work over: ``python -m benchmarks.handoff``.

- calls in flight: a worker process with as many jobs as calls, against the tests' local Modal that
  starts no container: the calls that it waits for, and the memory that it occupies then.
- whole and chunked: one recording of about eleven minutes (Debian's flite reads from the GPL, in
  two voices; without flite, the sample eleven times over), transcribed on this machine as one
  piece and in chunks, in turning order. Word errors against the text that was read, and the
  chunked time as a share of the whole's; medians of the rounds.

The last line is one JSON object.
"""

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import jiwer
import psycopg

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs.compute.base import Outcome, Prepare, Transcribe
from jobs.compute.local import LocalCompute
from jobs.models import Transcript, TranscriptionOptions
from jobs.settings import Settings
from modal_functions.merging import Part, merge
from modal_functions.plan import Plan
from tests.local_modal.server import ServerProcess
from tests.local_modal.settings import Settings as LocalModal

REPO = Path(__file__).parent.parent
GPL = Path("/usr/share/common-licenses/GPL-3")
WORDS = 1500
WORDS_A_VOICE = 250
PATIENCE = 120.0  # seconds


# Calls in flight


def hold_calls(count: int) -> dict[str, float]:
    """Return how many calls a worker has in flight, and its resident memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres")
        try:
            with (
                server,
                ServerProcess.started(LocalModal(apps=("tests.faults.speech_app:app",))) as modal,
            ):
                migrate.migrate(server.url())
                modal.control.pause()
                with (
                    psycopg.connect(server.url(), autocommit=True) as conn,
                    worker(server.url(), modal, count) as process,
                ):
                    insert(conn, count)
                    modal.control.wait("spawned", count)
                    modal.control.wait_for_requests("FunctionGetOutputs", count)
                    noted = until_noted(conn, count)
                    return {"calls_in_flight": noted, "rss_mb": resident(process.pid)}
        finally:
            server.remove()


@contextmanager
def worker(url: str, modal: ServerProcess, concurrency: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a worker that calls the local Modal."""
    environment = (
        os.environ
        | modal.environment()
        | {
            "PGSCRIBE_DATABASE_URL": url,
            "PGSCRIBE_COMPUTE": "modal",
            "PGSCRIBE_PUBLIC_URL": "http://127.0.0.1",  # its links are not followed
            "PGSCRIBE_JWT_SECRET": "a secret of thirty-two characters or more",
            "PGSCRIBE_WORKER_CONCURRENCY": str(concurrency),
            "PGSCRIBE_STORAGE_DIR": str(REPO / "examples"),
            "PGSCRIBE_SHUTDOWN_TIMEOUT": "0",
        }
    )
    command = [sys.executable, "-m", "jobs.cli", "worker"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def insert(conn: psycopg.Connection[tuple[object, ...]], count: int) -> None:
    """Insert as many jobs as calls: each prepares its audio by one."""
    conn.execute("update pgscribe.queue_settings set max_running_per_owner = %s", (count,))
    conn.execute(
        "insert into auth.users (id, email) values (%s, 'a@example.org')",
        ("00000000-0000-0000-0000-000000000001",),
    )
    conn.execute(
        "insert into public.processing_jobs (user_id, file_path)"
        " select id, 'sample.mp3' from auth.users, generate_series(1, %s)",
        (count,),
    )


def until_noted(conn: psycopg.Connection[tuple[object, ...]], count: int) -> int:
    """Wait until the database knows all calls."""
    query = "select count(*) from pgscribe.preparations where call_id is not null"
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        row = conn.execute(query).fetchone()
        if row == (count,):
            return count
        time.sleep(0.1)
    raise SystemExit(f"not within {PATIENCE:g} s: {count} calls are noted")


def resident(pid: int) -> float:
    """Return the memory that a process occupies, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


# Whole and chunked


def read_aloud(folder: Path) -> tuple[Path, str]:
    """Return a recording and its text."""
    flite, recording = shutil.which("flite"), folder / "recording.wav"
    ffmpeg = shutil.which("ffmpeg") or _packaged_ffmpeg()
    if flite is None or not GPL.is_file():
        sample = REPO / "examples" / "sample.mp3"
        subprocess.run(
            [ffmpeg, "-v", "error", "-stream_loop", "10", "-i", sample, recording], check=True
        )
        return recording, " ".join([(REPO / "examples" / "sample.txt").read_text()] * 11)
    prose = re.sub(r"https?://\S+|[<>\"()]|\b\d+\.\s", " ", GPL.read_text().split("Preamble")[1])
    words = prose.split()[:WORDS]
    parts: list[str | Path] = []
    for number, start in enumerate(range(0, WORDS, WORDS_A_VOICE)):
        part = folder / f"{number}.wav"
        text = " ".join(words[start : start + WORDS_A_VOICE])
        voice = ("slt", "rms")[number % 2]
        how = ("-voice", voice, "--setf", "duration_stretch=1.2", "-t", text, "-o", part)
        subprocess.run([flite, *how], check=True)
        parts += ["-i", part]
    joined = f"concat=n={len(parts) // 2}:v=0:a=1"
    command = [ffmpeg, "-v", "error", *parts, "-filter_complex", joined, recording]
    subprocess.run(command, check=True)
    return recording, " ".join(words)


def _packaged_ffmpeg() -> str:
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


async def transcribe(compute: LocalCompute, source: Path, *, whole: bool) -> tuple[float, str]:
    """Return how many seconds it took, and the text."""
    began = time.monotonic()
    shortest, longest = (3600.0, 7200.0) if whole else (None, None)
    prepare = Prepare(
        str(source),
        "benchmark",
        preprocessing=False,
        max_seconds=7200,
        min_span=shortest,
        max_span=longest,
    )
    plan = Plan.from_dict((await outcome(compute, prepare)).value)
    outcomes = await asyncio.gather(*(outcome(compute, call) for call in calls_of(plan)))
    parts: list[Part] = [
        (span.seconds, Transcript.from_dict(done.value))
        for span, done in zip(plan.spans, outcomes, strict=True)
    ]
    text = merge(parts, name=plan.name).text
    return time.monotonic() - began, text


def calls_of(plan: Plan) -> list[Transcribe]:
    """Return the calls for all chunks of a plan."""
    return [Transcribe(str(plan.pcm), span, TranscriptionOptions()) for span in plan.spans]


async def load_models(compute: LocalCompute, sample: Path) -> None:
    """Let all engine processes load the model, as in a worker that has been up for a while."""
    prepare = Prepare(str(sample), "warm-up", preprocessing=False, max_seconds=7200)
    (call, *_) = calls_of(Plan.from_dict((await outcome(compute, prepare)).value))
    await asyncio.gather(*(outcome(compute, call) for _ in range(2 * (os.cpu_count() or 1))))


async def outcome(compute: LocalCompute, request: Prepare | Transcribe) -> Outcome:
    """Return what a call returns."""
    return await compute.result(await compute.spawn(request), lambda _: None)


def measure(rounds: int, calls: int) -> dict[str, float]:
    """Return the figures of the last line."""
    figures = hold_calls(calls)
    with tempfile.TemporaryDirectory() as folder:
        recording, text = read_aloud(Path(folder))
        runs = asyncio.run(take_turns(recording, Path(folder), rounds))
    seconds = {how: statistics.median(s for s, _ in taken) for how, taken in runs.items()}
    errors = {
        how: statistics.median(wer(text, said) for _, said in taken) for how, taken in runs.items()
    }
    for how in runs:
        click.echo(f"{how:8} {seconds[how]:6.1f} s   {errors[how]:6.2%} word errors")
    return figures | {
        "wer_whole": round(errors["whole"], 4),
        "wer_chunked": round(errors["chunked"], 4),
        "chunked_vs_whole_time_ratio": round(seconds["chunked"] / seconds["whole"], 3),
    }


async def take_turns(
    recording: Path, folder: Path, rounds: int
) -> dict[str, list[tuple[float, str]]]:
    """Transcribe in both ways, as the local backend does by default."""
    settings = Settings.load(
        database_url="unused",
        scratch_dir=folder / "scratch",
        models_dir=REPO / ".pgscribe" / "models",
    )
    runs: dict[str, list[tuple[float, str]]] = {"whole": [], "chunked": []}
    for number in range(rounds):
        for how in sorted(runs, reverse=number % 2 == 0):
            async with LocalCompute(settings) as compute:
                await load_models(compute, REPO / "examples" / "sample.mp3")
                runs[how].append(await transcribe(compute, recording, whole=how == "whole"))
    return runs


def wer(text: str, said: str) -> float:
    """Return the word error rate, without punctuation and case."""
    plain = [" ".join(re.findall(r"[\w']+", words.casefold())) for words in (text, said)]
    return float(jiwer.wer(*plain))


@click.command()
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1))
@click.option("--calls", default=1000, show_default=True, type=click.IntRange(1))
def main(rounds: int, calls: int) -> None:
    """Measure how calls are handed over."""
    click.echo(json.dumps(measure(rounds, calls)))


if __name__ == "__main__":
    main()
