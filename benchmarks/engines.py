"""Whisper on this machine: OpenAI's own, faster-whisper, and jobs of pgscribe, side by side."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import psycopg

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.memory import resident_of_tree
from benchmarks.recordings import (
    REPO,
    Recording,
    ffmpeg_on_path,
    read_aloud,
    read_by_people,
    word_errors,
)
from db import migrate
from db.embedded import EmbeddedPostgres
from jobs.compute import packaged_weights

MODEL = "base"
MODELS = REPO / ".pgscribe" / "models"
OWNER = UUID(int=1)
ROUNDS, WORDS, WORDS_QUICK = 3, 260, 20
PATIENCE = 600.0  # seconds
PACKAGES = ("openai-whisper", "torch", "faster-whisper", "ctranslate2")
LOOK = 0.05  # seconds between two looks at memory and at a job

OPENAI, OPENAI_GREEDY = "openai-whisper", "openai-whisper greedy"
FLOAT32, INT8, BATCHED = (f"faster-whisper {how}" for how in ("float32", "int8", "int8 batched"))
JOB, JOB_OPENAI = "pgscribe", "pgscribe with openai-whisper"
ONE_PIECE = "pgscribe in one piece"

METHOD = f"""\
Each figure is of a process of its own, from its start with nothing loaded until the whole text can
be read, loading of the model included; all read the same 16 kHz WAV with the same weights of
`base`, find out the language themselves, and have all cores. They take turns, in an order that
changes with each round; at most {ROUNDS} rounds.

- `{OPENAI}`: its command line, `whisper recording.wav --model base.pt`: beam 5, temperature
  ladder, float32 as there is no GPU. `greedy`: with `--beam_size None --best_of None`.
- `faster-whisper`: the examples of its README, for the CPU: beam 5, in float32, in int8, and the
  batched pipeline in int8 with the 8 windows at a time of its figures for CPUs.
- `pgscribe`: a job that waits when `pgscribe worker` is started with default settings, until the
  row says `completed`: faster-whisper in int8, a recording of more than 90 s split at pauses and
  its chunks transcribed in parallel. `with openai-whisper`: `PGSCRIBE_ENGINE=openai-whisper`, which
  is greedy on a CPU. `in one piece`: the local backend alone, without a database, told not to
  split.

Memory is the largest sum, seen every 50 ms, of the resident sets of a process and all below it (in
which pages that they share count for each); the embedded Postgres is not counted. First text: when
the first segment was printed, or `partial_transcript(id)` first had text. Word errors are counted
by jiwer, without case and punctuation."""


@dataclass
class Run:
    """What one transcription took, from the start of its process, and what it heard."""

    started: float = field(default_factory=time.monotonic)
    first_text: float = 0.0  # seconds
    seconds: float = 0.0
    memory: float = 0.0  # MB
    text: str = ""

    def hear(self, text: str) -> None:
        """Take the text up to now."""
        if text.strip():
            self.seconds = time.monotonic() - self.started
            self.first_text = self.first_text or self.seconds
            self.text = text

    def look(self, pid: int) -> None:
        """See how much memory is taken."""
        self.memory = max(self.memory, resident_of_tree(pid))


class System(Protocol):
    """A way to get from a recording to its text."""

    def transcribe(self, recording: Path) -> Run:
        """Do it."""


class Program:
    """A program that prints its segments: ``[from -> to] text``."""

    def __init__(self, *command: str | Path, path: Path | None = None) -> None:
        self._command = command
        # It runs in a folder of its own, from where ours would not be found.
        self._environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPO)}
        if path is not None:
            self._environment["PATH"] = f"{path}{os.pathsep}{self._environment['PATH']}"

    def transcribe(self, recording: Path) -> Run:
        """Run the program."""
        with tempfile.TemporaryDirectory() as folder:
            run = Run()
            process = subprocess.Popen(
                [*self._command, recording],
                env=self._environment,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            with process:
                heard = threading.Thread(target=_hear, args=(process, run))
                heard.start()
                while process.poll() is None:
                    run.look(process.pid)
                    time.sleep(LOOK)
                heard.join()
                assert process.stderr is not None
                if process.returncode or not run.text:
                    raise RuntimeError(f"{self._command} failed: {process.stderr.read()[-2000:]}")
        return run


def _hear(process: "subprocess.Popen[str]", run: Run) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if segment := re.match(r"\[\S+ --?> \S+\](.*)", line):
            run.hear(f"{run.text} {segment[1].strip()}")


class Job:
    """A job that waits for a worker, which is then started."""

    def __init__(self, url: str, storage: Path, engine: str) -> None:
        self._url = url
        self._storage = storage
        self._environment = {
            "PGSCRIBE_DATABASE_URL": url,
            "PGSCRIBE_STORAGE_DIR": str(storage),
            "PGSCRIBE_SCRATCH_DIR": str(storage.parent / "scratch"),
            "PGSCRIBE_MODELS_DIR": str(MODELS),
            "PGSCRIBE_ENGINE": engine,
        }

    def transcribe(self, recording: Path) -> Run:
        """Insert the job and let a worker do it."""
        audio = self._storage / str(OWNER) / recording.name
        audio.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recording, audio)
        with psycopg.connect(self._url, autocommit=True) as conn:
            row = conn.execute(
                "insert into public.processing_jobs (user_id, file_path) values (%s, %s)"
                " returning id",
                (OWNER, f"{OWNER}/{recording.name}"),
            ).fetchone()
            assert row is not None
            run = Run()
            with self._worker() as worker:
                _follow(conn, row[0], worker, run)
        return run

    @contextmanager
    def _worker(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [sys.executable, "-m", "jobs.cli", "worker", "--stop-with-stdin"]
        with subprocess.Popen(
            command,
            env=os.environ | self._environment,
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as worker:
            try:
                yield worker
            finally:
                worker.terminate()


def _follow(
    conn: psycopg.Connection[Any], job: UUID, worker: "subprocess.Popen[bytes]", run: Run
) -> None:
    while time.monotonic() - run.started < PATIENCE and worker.poll() is None:
        run.look(worker.pid)
        row = conn.execute(
            "select j.status::text, coalesce(j.result ->> 'text', p.text, ''), j.error"
            "  from public.processing_jobs j, public.partial_transcript(j.id) p where j.id = %s",
            (job,),
        ).fetchone()
        assert row is not None
        status, text, error = row
        if status == "failed":
            raise RuntimeError(f"The job failed: {error}")
        if status == "completed" or text != run.text:
            run.hear(text)
        if status == "completed":
            return
        time.sleep(LOOK)
    raise RuntimeError("The worker did not complete the job")


def systems(stack: ExitStack, folder: Path, left_out: dict[str, str]) -> Mapping[str, System]:
    """Return all that can be measured here, and note why others cannot."""
    faster = packaged_weights.ensure("faster-whisper", MODEL, MODELS)
    if faster is None:
        raise RuntimeError(f"No weights of {MODEL} in {MODELS}, nor in packages: make demo")
    own = [sys.executable, "-m", "benchmarks.engine_process"]
    storage, url = folder / "storage", _database(stack, folder)
    found: dict[str, System] = {}
    if find_spec("whisper") is None:
        reason = "the package openai-whisper is not installed"
        left_out |= dict.fromkeys((OPENAI, OPENAI_GREEDY, JOB_OPENAI), reason)
    else:
        weights = packaged_weights.ensure("openai-whisper", MODEL, MODELS)
        assert weights is not None
        path = ffmpeg_on_path(folder / "bin")
        cli: list[str | Path] = [Path(sys.executable).with_name("whisper"), "--model", weights]
        greedy = ["--beam_size", "None", "--best_of", "None"]
        found |= {
            OPENAI: Program(*cli, path=path),
            OPENAI_GREEDY: Program(*cli, *greedy, path=path),
            JOB_OPENAI: Job(url, storage, "openai-whisper"),
        }
    found |= {
        FLOAT32: Program(*own, "float32", faster),
        INT8: Program(*own, "int8", faster),
        BATCHED: Program(*own, "batched", faster),
        ONE_PIECE: Program(*own, "one-piece", faster),
        JOB: Job(url, storage, "faster-whisper"),
    }
    order = (OPENAI, OPENAI_GREEDY, FLOAT32, INT8, BATCHED, ONE_PIECE, JOB_OPENAI, JOB)
    return {name: found[name] for name in order if name in found}


def _database(stack: ExitStack, folder: Path) -> str:
    server = EmbeddedPostgres(folder / "postgres")
    stack.callback(server.remove)
    server.start()
    migrate.migrate(server.url())
    with psycopg.connect(server.url(), autocommit=True) as conn:
        conn.execute("insert into auth.users (id, email) values (%s, 'a@example.org')", (OWNER,))
    return server.url()


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Transcribe the long recording in each round, and once what people have read."""
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = systems(stack, folder, left_out)
        long = read_aloud(folder, WORDS_QUICK if quick else WORDS)
        people = None if quick else read_by_people(folder)
        runs: dict[str, list[Run]] = defaultdict(list)
        for number in range(min(rounds, ROUNDS)):
            for name in list(ways)[:: -1 if number % 2 else 1]:
                runs[name].append(ways[name].transcribe(long.path))
        said = {name: way.transcribe(people.path) for name, way in ways.items()} if people else {}
    missing = () if find_spec("whisper") else ("openai-whisper", "torch")
    if people is None and not quick:
        left_out["speech of people"] = "Debian's package pocketsphinx-testdata is not installed"
    ordered = {name: runs[name] for name in ways}
    return Section(
        "engines",
        "Engines",
        METHOD + _recordings(long, people),
        [*_of_long(long, ordered), *(_of_people(people, said) if people else ())],
        plots=[
            Plot("engines-speed-plot", "Seconds of audio per second", "bars", ["engines-speed"]),
            Plot("engines-memory-plot", "Peak memory, MB", "bars", ["engines-memory"]),
        ],
        left_out=left_out,
        versions={name: version(name) for name in PACKAGES if name not in missing},
    )


def _recordings(long: Recording, people: Recording | None) -> str:
    text = f"\n\nThe recording: {long.seconds:.0f} s, {long.source}."
    if people is not None:
        text += f" People's speech: {people.seconds:.1f} s, {people.source}, once."
    return text


def _of_long(long: Recording, runs: Mapping[str, list[Run]]) -> Iterator[Measurement]:
    baseline = OPENAI if OPENAI in runs else None
    yield Measurement(
        "engines-speed",
        "Audio transcribed in a second, with start and loading",
        "s/s",
        "higher",
        {name: [long.seconds / run.seconds for run in found] for name, found in runs.items()},
        baseline,
        headline=True,
    )
    yield Measurement(
        "engines-first-text",
        "From the start of the process to the first text",
        "s",
        "lower",
        {name: [run.first_text for run in found] for name, found in runs.items()},
        baseline,
        "A chunk's text appears when all of the chunk is done, so parallel chunks come late.",
    )
    yield Measurement(
        "engines-wer",
        "Word errors",
        "%",
        "lower",
        {name: [word_errors(long.text, r.text) for r in found] for name, found in runs.items()},
        baseline,
        headline=True,
    )
    yield Measurement(
        "engines-memory",
        "Peak memory",
        "MB",
        "lower",
        {name: [run.memory for run in found] for name, found in runs.items()},
        baseline,
        "pgscribe: the worker, and a model in each of its engine processes.",
        headline=True,
    )


def _of_people(people: Recording, runs: Mapping[str, Run]) -> Iterator[Measurement]:
    baseline = OPENAI if OPENAI in runs else None
    yield Measurement(
        "engines-people-wer",
        "Word errors in people's speech",
        "%",
        "lower",
        {name: [word_errors(people.text, run.text)] for name, run in runs.items()},
        baseline,
    )
    yield Measurement(
        "engines-people-seconds",
        f"From the start of the process to the text of {people.seconds:.0f} s",
        "s",
        "lower",
        {name: [run.seconds] for name, run in runs.items()},
        baseline,
        "Too short to be split: one chunk.",
    )
