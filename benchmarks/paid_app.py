"""What both systems of ``benchmarks.paid`` call on Modal, each its own: without a model, in time.

A recording is text: how many chunks it has. Each chunk takes ``WORK`` seconds.
"""

import itertools
import time
import urllib.request
from pathlib import Path
from typing import Any

import modal

from modal_functions.plan import SAMPLE_RATE, Plan, Span

app = modal.App("audio-processing")

LENGTH = 10  # seconds of each chunk
WORK = 0.4  # seconds that a chunk takes
CONTAINERS = 3


def plan(source: str, key: str) -> dict[str, Any]:
    """Fetch a recording, and return its plan."""
    with urllib.request.urlopen(source) as recording:  # noqa: S310 - a link of the web process
        chunks = int(recording.read())
    ends = [number * LENGTH * SAMPLE_RATE for number in range(chunks + 1)]
    spans = tuple(Span(*pair) for pair in itertools.pairwise(ends))
    made = Plan("'recording'", Path(f"/audio/{key}.pcm"), spans)
    return {"plan": made.to_dict(), "usage": {"cpu_seconds": 1.0, "gpu_seconds": 0.0}}


def transcript(start: int, end: int, engine: str, model: str) -> dict[str, Any]:
    """Take as long as a chunk takes, and return its transcript."""
    time.sleep(WORK)
    text = f"chunk {start // SAMPLE_RATE // LENGTH}"
    segment = {"start": 0.0, "end": 10.0, "text": text, "avg_logprob": 0.0}
    segment |= {"no_speech_prob": 0.0, "compression_ratio": 1.0}
    made = {
        "text": text,
        "language": "en",
        "duration": (end - start) / SAMPLE_RATE,
        "segments": [segment],
        "engine": engine,
        "model": model,
    }
    return {"transcript": made, "usage": {"cpu_seconds": 0.0, "gpu_seconds": WORK}}


@app.function(max_containers=1)
def prepare_audio(source: str, key: str, **_: Any) -> dict[str, Any]:
    """Prepare a recording for pgscribe."""
    return plan(source, key)


@app.function(max_containers=1)
def discard_audio(pcm: str) -> None:
    """Delete nothing: there is no file."""


@app.cls(max_containers=CONTAINERS)
class SpeechModel:
    """What pgscribe calls."""

    engine: str = modal.parameter()
    model: str = modal.parameter()

    @modal.method()
    def transcribe(self, pcm: str, start: int, end: int, options: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Transcribe a chunk."""
        return transcript(start, end, self.engine, self.model)


@app.function(max_containers=1)
def plain_prepare(source: str, key: str) -> dict[str, Any]:
    """Prepare a recording for the plain worker."""
    return plan(source, key)


@app.cls(max_containers=CONTAINERS)
class PlainModel:
    """What the plain worker calls."""

    engine: str = modal.parameter()
    model: str = modal.parameter()

    @modal.method()
    def transcribe(self, start: int, end: int) -> dict[str, Any]:
        """Transcribe a chunk."""
        return transcript(start, end, self.engine, self.model)
