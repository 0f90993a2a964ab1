"""Transcription on this machine, in child processes.

Native code that crashes takes down one attempt and not the worker, the event loop never waits
for it, and a cancelled job stops at once because its process is killed.
"""

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any, Self

from jobs.errors import EngineCrashed, SettingsError, TranscriptionFailed
from jobs.settings import Settings
from modal_functions.transcript import Transcript, TranscriptionOptions

logger = logging.getLogger(__name__)

_CHILD = (sys.executable, "-m", "jobs.compute.engine_process")
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_MAX_ANSWER = 256 * 1024**2  # bytes; a transcript with word times is about 2 MB an hour

# The child handles untrusted audio: of the environment it gets what engines need, and no secret.
_ENVIRONMENT = frozenset(
    [
        "HF_ENDPOINT",
        "HF_HOME",
        "HOME",
        "LANG",
        "LD_LIBRARY_PATH",
        "PATH",
        "SSL_CERT_FILE",
        "TMPDIR",
        "TZ",
    ]
)
_ENVIRONMENT_PREFIXES = (
    "COVERAGE_",
    "CUDA_",
    "HF_HUB_",
    "LC_",
    "MKL_",
    "NVIDIA_",
    "OMP_",
    "PYTHON",
    "XDG_",
)

_MODULES = {"faster-whisper": "faster_whisper", "openai-whisper": "whisper"}


def _check_installed(engine: str) -> None:
    """Raise ``SettingsError`` where the extra that brings the engine is not installed."""
    missing = [name for name in ("numpy", "ffmpeg", _MODULES[engine]) if not find_spec(name)]
    if missing:
        raise SettingsError(
            f"PGSCRIBE_ENGINE: {engine} can't run here, as {', '.join(missing)} is not installed; "
            "run: pip install 'pgscribe[embedded]'"
            + (" openai-whisper" if engine == "openai-whisper" else "")
        )


def _child_environment() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }


def hide_environment() -> None:
    """Keep other processes of this system user from reading this one's environment and memory.

    The children run as the same user and handle untrusted audio; this process knows the secrets.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _describe_exit(status: int) -> str:
    how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
    return f"The engine's process ended unexpectedly ({how}); out of memory is a common cause"


class _EngineProcess:
    """One child process with one model loaded; starts when first used, and again after a crash."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def _start(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *_CHILD,
                json.dumps(self._config),
                # The child ends when its standard input does, so it never outlives this process.
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MAX_ANSWER,
                env=_child_environment(),
                start_new_session=True,  # Ctrl-C is the worker's to handle; the group is killable
            )
        return self._process

    async def request(
        self, message: dict[str, Any], on_progress: Callable[[float], None]
    ) -> dict[str, Any]:
        """Send a request and return its last answer."""
        process = await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError:
            raise EngineCrashed(_describe_exit(await process.wait())) from None
        while line := await process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise TranscriptionFailed(**answer["error"])
            if "progress" not in answer:
                return answer
            on_progress(answer["progress"])
        raise EngineCrashed(_describe_exit(await process.wait()))

    async def kill(self) -> None:
        """End the child and what it started, at once."""
        if self._process is not None:
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


class LocalCompute:
    """As many engine processes as the worker runs jobs, each transcribing one file at a time."""

    def __init__(self, settings: Settings) -> None:
        _check_installed(settings.engine)
        count = settings.worker_concurrency
        config = {
            "engine": settings.engine,
            "models_dir": str(settings.models_dir.resolve()),
            "device": settings.device,
            "threads": settings.engine_threads or max(1, (os.cpu_count() or 1) // count),
            "max_seconds": settings.max_audio_seconds,
        }
        self._processes = [_EngineProcess(config) for _ in range(count)]
        self._idle: asyncio.LifoQueue[_EngineProcess] = asyncio.LifoQueue()
        self._warming: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Start the processes; they load the default model while the worker connects."""
        hide_environment()
        self._warming = [asyncio.create_task(self._warm_up(p)) for p in self._processes]
        return self

    async def _warm_up(self, process: _EngineProcess) -> None:
        try:
            await process.request({"warm_up": TranscriptionOptions().model}, lambda _: None)
        except Exception as exc:  # noqa: BLE001 - whatever it is, a job will meet it and say so
            logger.warning("The default model is not loaded: %s", exc)
        finally:
            self._idle.put_nowait(process)

    async def __aexit__(self, *exc: object) -> None:
        """Stop the processes, whatever they do."""
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        await asyncio.gather(*(process.kill() for process in self._processes))

    @asynccontextmanager
    async def _process(self) -> AsyncIterator[_EngineProcess]:
        process = await self._idle.get()
        try:
            yield process
        except TranscriptionFailed:
            raise
        except BaseException:  # cancelled or crashed: what it was doing must not go on
            await asyncio.shield(process.kill())
            raise
        finally:
            self._idle.put_nowait(process)

    async def transcribe(
        self, source: str, options: TranscriptionOptions, on_progress: Callable[[float], None]
    ) -> Transcript:
        """Transcribe on the next idle process; see ``Compute``."""
        message = {"source": source, "options": options.to_dict()}
        async with self._process() as process:
            answer = await process.request(message, on_progress)
        return Transcript.from_dict(answer["transcript"])
