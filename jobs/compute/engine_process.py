"""The child process that ``LocalCompute`` starts: JSON lines in, JSON lines out.

Requests: ``{"warm_up": model}`` or ``{"source": …, "options": {…}}``. Answers: any number of
``{"progress": 0..1}``, then one of ``{"ready": true}``, ``{"transcript": {…}}`` or
``{"error": {"code", "message", "retryable"}}``.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from jobs.compute import packaged_weights
from modal_functions.engines import Engine, load_engine
from modal_functions.errors import TranscriptionError
from modal_functions.transcript import TranscriptionOptions
from modal_functions.transcription import transcribe_file

logger = logging.getLogger(__name__)

PROGRESS_STEP = 0.01  # an engine may report thousands of steps; these are plenty


class _EngineProcess:
    def __init__(self, config: dict[str, Any], answers: int) -> None:
        self._config = config
        self._answers = os.fdopen(answers, "w", encoding="utf-8", buffering=1)
        self._loaded: tuple[str, Engine] | None = None
        self._reported = 0.0

    def answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")

    def engine(self, model: str) -> Engine:
        """Return the engine with ``model`` loaded; one model is kept, as memory is limited."""
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None
            engine, models_dir = self._config["engine"], Path(self._config["models_dir"])
            self._loaded = (
                model,
                load_engine(
                    engine,
                    model,
                    path=packaged_weights.ensure(engine, model, models_dir),
                    device=self._config["device"],
                    threads=self._config["threads"],
                    download_root=models_dir / engine,
                    at_hand=packaged_weights.at_hand(engine, models_dir),
                ),
            )
        return self._loaded[1]

    def on_progress(self, fraction: float) -> None:
        if fraction - self._reported >= PROGRESS_STEP or fraction >= 1 > self._reported:
            self._reported = fraction
            self.answer({"progress": fraction})

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        if "warm_up" in request:
            self.engine(request["warm_up"])
            return {"ready": True}
        self._reported = 0.0
        options = TranscriptionOptions.from_dict(request["options"])
        transcript = transcribe_file(
            request["source"],
            options,
            engine=self.engine(options.model),
            max_seconds=self._config["max_seconds"],
            on_progress=self.on_progress,
        )
        return {"transcript": transcript.to_dict()}

    def serve(self, requests: "queue.SimpleQueue[str]") -> None:
        while True:
            request = json.loads(requests.get())
            try:
                self.answer(self.handle(request))
            except TranscriptionError as exc:
                error = {"code": exc.code, "message": str(exc), "retryable": exc.retryable}
                self.answer({"error": error})
            except Exception:  # whatever a model or a decoder raises ends this attempt only
                logger.exception("Unexpected error in the engine")
                message = "The engine failed unexpectedly; the worker's log says more."
                error = {"code": "internal_error", "message": message, "retryable": True}
                self.answer({"error": error})


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    """Read until the parent is gone, then end at once, ffmpeg included."""
    for line in sys.stdin:
        requests.put(line)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve requests until standard input ends."""
    logging.basicConfig(level=logging.WARNING)
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _EngineProcess(json.loads(sys.argv[1]), answers).serve(requests)


if __name__ == "__main__":
    main()
