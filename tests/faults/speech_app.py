"""The functions that workers call on Modal, without a model: they say when the work was done.

A recording called ``chunks-20`` has twenty chunks of ten seconds, each done in a third of one.
"""

import time
from typing import Any

import modal

from modal_functions.plan import SAMPLE_RATE, Plan, Span

app = modal.App("audio-processing")

LENGTH = 10  # seconds of each chunk
WORK = 0.3  # seconds that a chunk takes


@app.function(max_containers=2)
def prepare_audio(
    *, source: str, key: str, preprocessing: bool, max_seconds: float, **_: Any
) -> dict[str, Any]:
    assert not preprocessing
    count = int(source.rpartition("-")[2])
    assert count * LENGTH <= max_seconds
    ends = range(LENGTH, count * LENGTH + 1, LENGTH)
    spans = [Span((end - LENGTH) * SAMPLE_RATE, end * SAMPLE_RATE) for end in ends]
    plan = Plan("'recording'", f"/audio/{key}.pcm", tuple(spans))  # type: ignore[arg-type]
    return {"plan": plan.to_dict(), "usage": {"cpu_seconds": 1.0, "gpu_seconds": 0.0}}


@app.function()
def discard_audio(pcm: str) -> None:
    assert pcm.endswith(".pcm")


@app.cls(max_containers=2)
class SpeechModel:
    engine: str = modal.parameter()
    model: str = modal.parameter()

    @modal.method()
    def transcribe(self, pcm: str, start: int, end: int, options: dict[str, Any]) -> dict[str, Any]:
        assert pcm.endswith(".pcm")
        time.sleep(WORK)
        text = f"chunk {start // SAMPLE_RATE // LENGTH}"
        segment = {"start": 0.0, "end": 10.0, "text": text, "avg_logprob": 0.0}
        segment |= {"no_speech_prob": 0.0, "compression_ratio": 1.0}
        transcript = {
            "text": text,
            "language": options["language"] or "en",
            "duration": (end - start) / SAMPLE_RATE,
            "segments": [segment],
            "engine": self.engine,
            "model": self.model,
        }
        return {"transcript": transcript, "usage": {"cpu_seconds": 0.0, "gpu_seconds": WORK}}
