"""One transcription as a process of its own, for ``benchmarks.engines``.

``float32``, ``int8`` and ``batched`` are the examples of faster-whisper's README, for a CPU.
``one-piece`` is pgscribe's local backend, told not to split. Segments are printed as they come.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from jobs.compute.base import Outcome, Prepare, Transcribe
from jobs.compute.local import LocalCompute
from jobs.models import Transcript, TranscriptionOptions
from jobs.settings import Settings
from modal_functions.plan import Plan

BATCH = 8  # as in the README's figures for CPUs


def sequential(model: Path, recording: Path, compute_type: str) -> None:
    """Run the README's first example."""
    from faster_whisper import WhisperModel

    whisper = WhisperModel(
        str(model), device="cpu", compute_type=compute_type, cpu_threads=os.cpu_count() or 0
    )
    segments, _ = whisper.transcribe(str(recording), beam_size=5)
    for segment in segments:
        say(segment.start, segment.end, segment.text)


def batched(model: Path, recording: Path) -> None:
    """Run the README's example of the batched pipeline."""
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    whisper = WhisperModel(
        str(model), device="cpu", compute_type="int8", cpu_threads=os.cpu_count() or 0
    )
    segments, _ = BatchedInferencePipeline(model=whisper).transcribe(
        str(recording), batch_size=BATCH
    )
    for segment in segments:
        say(segment.start, segment.end, segment.text)


async def one_piece(model: Path, recording: Path, scratch: Path) -> None:
    """Run pgscribe's local backend with a span that is as long as the recording."""
    settings = Settings.load(
        database_url="unused", scratch_dir=scratch, models_dir=model.parent.parent
    )
    whole = Prepare(
        str(recording),
        "benchmark",
        preprocessing=False,
        max_seconds=7200,
        min_span=3600.0,
        max_span=7200.0,
    )
    async with LocalCompute(settings) as compute:
        plan = Plan.from_dict((await outcome(compute, whole)).value)
        (span,) = plan.spans
        request = Transcribe(str(plan.pcm), span, TranscriptionOptions(model=model.name))
        for segment in Transcript.from_dict((await outcome(compute, request)).value).segments:
            say(segment.start, segment.end, segment.text)


async def outcome(compute: LocalCompute, request: Prepare | Transcribe) -> Outcome:
    """Return what a call returns."""
    return await compute.result(await compute.spawn(request), lambda _: None)


def say(start: float, end: float, text: str) -> None:
    """Print a segment as faster-whisper's README does."""
    click.echo(f"[{start:.2f}s -> {end:.2f}s] {text}")


def in_one_piece(model: Path, recording: Path) -> None:
    """Run it with a folder for decoded audio."""
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(one_piece(model, recording, Path(scratch)))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "float32": lambda model, recording: sequential(model, recording, "float32"),
    "int8": lambda model, recording: sequential(model, recording, "int8"),
    "batched": batched,
    "one-piece": in_one_piece,
}


@click.command()
@click.argument("way", type=click.Choice(list(WAYS)))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("recording", type=click.Path(path_type=Path))
def main(way: str, model: Path, recording: Path) -> None:
    """Transcribe RECORDING with faster-whisper's MODEL."""
    WAYS[way](model, recording)


if __name__ == "__main__":
    main()
