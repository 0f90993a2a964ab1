"""Calls on this machine, in child processes.

Native code that crashes takes down one call and not the worker, the event loop never waits for
it, and a cancelled call stops at once because its process is killed. The calls end with the worker:
whoever asks for one of another worker's is told that it is lost.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import functools
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from jobs import logs
from jobs.compute.base import OnProgress, Outcome, Prepare, Transcribe
from jobs.errors import CallLost, ComputeUnavailable, EngineCrashed, SettingsError
from jobs.settings import Settings
from modal_functions.transcript import TranscriptionOptions

logger = logging.getLogger(__name__)

_CHILD = (sys.executable, "-m", "jobs.compute.engine_process")
_PR_SET_DUMPABLE = 4  # linux/prctl.h
_KEEP_SCRATCH = 24 * 3600  # seconds after which a decoded file was forgotten by its job
LEAST_ROOM = 64 * 1024**2  # bytes of scratch space: half an hour of decoded audio
_KEEP_ENDED = 256  # calls whose answers are remembered; a chunk's takes some 50 kB
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

# Seconds on two cores with base, the model loaded, medians of three runs of faster-whisper in int8
# and the better of two of openai-whisper:
#
#   processes x threads                             1 x 1   1 x 2   2 x 1   2 x 2
#   faster-whisper, 58 s                              4.4     4.5
#   faster-whisper, 291 s in one piece                       24.1
#   faster-whisper, 291 s in spans of 30 to 90 s             25.0    12.7    14.2
#   openai-whisper, 58 s                              8.3     6.2
#
# So each process has twice its share of the cores: spans in parallel lose a little by it, and a
# recording that is alone, or whose model gains by threads, is as fast as in a process of its own.
_MAX_PROCESSES = 4  # each has the model in memory: 0.4 GB for base, 2 to 3 GB for large ones

MODULES = {"faster-whisper": "faster_whisper", "openai-whisper": "whisper"}


def check_installed(engine: str) -> None:
    """Raise ``SettingsError`` where the extra that brings the engine is not installed."""
    missing = [name for name in ("numpy", "ffmpeg", MODULES[engine]) if not find_spec(name)]
    if missing:
        raise SettingsError(
            f"PGSCRIBE_ENGINE: {engine} can't run here, as {', '.join(missing)} is not installed; "
            "run: pip install 'pgscribe[local]'"
            + (" openai-whisper" if engine == "openai-whisper" else "")
        )


def _child_environment() -> dict[str, str]:
    # Threads of torch that spin while they wait would take the cores from the other processes'.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | {
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


def has_gpu() -> bool:
    """Whether there is a GPU for CUDA, as far as that can be seen without loading any of it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def processes_and_threads(settings: Settings, cores: int) -> tuple[int, int]:
    """Return how many engine processes may run on so many cores, and the threads of each."""
    on_gpu = settings.device == "cuda" or (settings.device == "auto" and has_gpu())
    default = 1 if on_gpu else min(cores, _MAX_PROCESSES)
    processes = settings.engine_processes or default
    return processes, settings.engine_threads or max(1, min(cores, 2 * cores // processes))


class _Process:
    """One child process with at most one model loaded; starts when used, and after a crash."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self.model: str | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

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

    async def _send(self, message: Mapping[str, Any]) -> asyncio.subprocess.Process:
        process = await self._start()
        self.model = message.get("model", self.model)
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        except ConnectionError:
            raise EngineCrashed(_describe_exit(await process.wait())) from None
        return process

    async def warm_up(self, model: str) -> None:
        """Start, and load a model unless a call comes first for another; nobody waits for it."""
        await self._send({"function": "warm_up", "model": model})

    async def request(self, message: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Send a request and return its last answer. Raises ``EngineCrashed``."""
        process = await self._send(message)
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            if "progress" not in answer:
                return answer
            on_progress(answer["progress"])
        raise EngineCrashed(_describe_exit(await process.wait()))

    async def kill(self) -> None:
        """End the child and what it started, at once; the next request gets a fresh one."""
        process, self._process, self.model = self._process, None, None
        if process is not None:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class _Call:
    """A call, from its start until nobody remembers it."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.message = message
        self.progress = 0.0
        self.serving: asyncio.Task[None] | None = None
        self._end: Callable[[], Outcome] | None = None
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._end is not None

    def report(self, fraction: float) -> None:
        self.progress = fraction
        self._tell()

    def end(self, end: Callable[[], Outcome]) -> None:
        """Let the waiting have what ``end`` returns or raises; a call ends only once."""
        if self._end is None:
            self._end = end
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def wait(self, on_progress: OnProgress) -> Outcome:
        reported = 0.0
        while True:
            news = self._news
            if self.progress > reported:
                reported = self.progress
                on_progress(reported)
            if self._end is not None:
                return self._end()
            await news.wait()


def _lost() -> Outcome:
    raise CallLost


def _crash(message: str) -> Outcome:
    raise EngineCrashed(message)


class _Lane:
    """Calls in the order in which they were started, and the processes that serve them.

    A process is started when a call waits for which there is none.
    """

    def __init__(self, config: Mapping[str, Any], size: int) -> None:
        self._processes = [_Process(config) for _ in range(size)]
        self._idle = list(self._processes)
        self._waiting: deque[_Call] = deque()
        self._serving: dict[asyncio.Task[None], _Process] = {}

    async def warm_up(self, model: str) -> None:
        await self._processes[0].warm_up(model)

    def add(self, call: _Call) -> None:
        self._waiting.append(call)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._idle:
            call = self._waiting.popleft()
            model = call.message.get("model")
            process = max(self._idle, key=lambda p: (p.model == model, p.is_running))
            self._idle.remove(process)
            task = call.serving = asyncio.create_task(self._serve(process, call))
            self._serving[task] = process
            task.add_done_callback(self._release)  # one that is cancelled at once never begins

    def _release(self, task: asyncio.Task[None]) -> None:
        if process := self._serving.pop(task, None):
            self._idle.append(process)
            self._go_on()

    async def _serve(self, process: _Process, call: _Call) -> None:
        try:
            answer = await process.request(call.message, call.report)
            end: Callable[[], Outcome] = functools.partial(Outcome.from_answer, answer)
        except BaseException as exc:  # crashed or cancelled: what it was doing must not go on
            await process.kill()
            if unfinished := call.message.get("unfinished"):
                _delete(Path(unfinished))
            if isinstance(exc, EngineCrashed):
                end = functools.partial(_crash, str(exc))
            elif isinstance(exc, Exception):
                logger.exception("An engine process could not be started or understood")
                end = functools.partial(
                    _crash, "The engine's process failed; the worker's log says more"
                )
            else:
                raise
        task = asyncio.current_task()
        assert task is not None
        self._release(task)  # first, so that who was told can have the same process again
        call.end(end)

    async def drop(self, call: _Call) -> None:
        """Forget a call that waits, kill the process of one that runs."""
        call.end(_lost)
        if call in self._waiting:
            self._waiting.remove(call)
        if call.serving is not None:
            call.serving.cancel()
            await asyncio.wait([call.serving])

    async def close(self) -> None:
        self._waiting.clear()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await asyncio.gather(*(process.kill() for process in self._processes))


class LocalCompute:
    """Runs calls in child processes, one call at a time in each.

    ``prepare`` has processes of its own, one for each job of the worker, so that no job waits for
    the transcriptions of another to learn that its recording cannot be used. They load no model.
    """

    def __init__(self, settings: Settings) -> None:
        check_installed(settings.engine)
        processes, threads = processes_and_threads(settings, os.cpu_count() or 1)
        config = {
            "engine": settings.engine,
            "models_dir": str(settings.models_dir.resolve()),
            "device": settings.device,
            "threads": threads,
            "log_format": settings.log_format,
        }
        self._scratch = settings.scratch_dir.resolve()
        self._lanes = {
            Prepare: _Lane(config, settings.worker_concurrency),
            Transcribe: _Lane(config, processes),
        }
        self._calls: dict[str, _Call] = {}

    async def __aenter__(self) -> Self:
        """Start one engine process; it loads the default model while the worker connects."""
        hide_environment()
        await asyncio.to_thread(_tidy, self._scratch)
        try:
            await self._lanes[Transcribe].warm_up(TranscriptionOptions().model)
        except (EngineCrashed, OSError) as exc:  # a call will meet it and say so
            logger.warning("The default model is not loaded: %s", exc)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop the processes, whatever they do."""
        for call in self._calls.values():
            call.end(_lost)
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))

    async def spawn(self, request: Prepare | Transcribe) -> str:
        """Start a call on the next idle process of its kind; see ``Compute``.

        Raises ``ComputeUnavailable`` where a recording has no room. Else a worker whose disk is
        full would fail job after job, sooner than other workers take them.
        """
        if isinstance(request, Prepare):
            await asyncio.to_thread(_check_room, self._scratch)
        call_id = f"local-{uuid4()}"
        self._forget_old()
        call = self._calls[call_id] = _Call(
            self._message(call_id, request) | {"about": logs.context()}
        )
        self._lanes[type(request)].add(call)
        return call_id

    def _forget_old(self) -> None:
        ended = [call_id for call_id, call in self._calls.items() if call.is_over]
        for call_id in ended[:-_KEEP_ENDED]:
            del self._calls[call_id]

    def _message(self, call_id: str, request: Prepare | Transcribe) -> dict[str, Any]:
        if isinstance(request, Prepare):
            return {
                "function": "prepare",
                "source": request.source,
                "preprocessing": request.preprocessing,
                "max_seconds": request.max_seconds,
                "min_span": request.min_span,
                "max_span": request.max_span,
                "pcm": str(self._decoded(f"{request.key}.{call_id}.pcm")),
                "unfinished": str(self._scratch / f".{call_id}.pcm"),
            }
        return {
            "function": "transcribe",
            "model": request.options.model,
            "options": request.options.to_dict(),
            # Wherever it was when it was prepared: this is the only folder that may be read.
            "pcm": str(self._decoded(Path(request.pcm).name)),
            "span": dataclasses.asdict(request.span),
        }

    def _decoded(self, name: str) -> Path:
        path = self._scratch / name
        if path.parent != self._scratch:
            raise ValueError(f"{name!r} is not usable as the name of a file")
        return path

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:
        """Wait for a call's end; see ``Compute``.

        Raises ``EngineCrashed`` where the call's process ended; the call is then over.
        """
        if (call := self._calls.get(call_id)) is None:
            raise CallLost
        try:
            return await call.wait(on_progress)
        except EngineCrashed:
            self._calls.pop(call_id, None)
            raise

    async def cancel(self, call_id: str) -> None:
        """Drop a call that waits, kill the process of one that runs, forget one that ended."""
        if (call := self._calls.pop(call_id, None)) is None:
            return
        is_prepare = call.message["function"] == "prepare"
        await self._lanes[Prepare if is_prepare else Transcribe].drop(call)

    async def discard(self, pcm: str) -> None:
        """Delete a file that ``prepare`` decoded, if it is there, and forgotten ones with it."""
        await asyncio.to_thread(_delete, self._decoded(Path(pcm).name))
        await asyncio.to_thread(_tidy, self._scratch)


def _check_room(scratch: Path) -> None:
    try:
        free = shutil.disk_usage(scratch).free
    except OSError as exc:
        raise ComputeUnavailable(
            f"The worker's PGSCRIBE_SCRATCH_DIR can't be used ({exc.strerror})"
        ) from exc
    if free < LEAST_ROOM:
        raise ComputeUnavailable(
            f"The worker's PGSCRIBE_SCRATCH_DIR is full: {free / 1024**2:.0f} MiB are free"
        )


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)


def _tidy(scratch: Path) -> None:
    """Make the folder, and delete what was left there by jobs of more than a day ago."""
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise SettingsError(
            f"PGSCRIBE_SCRATCH_DIR: the folder {scratch} can't be made ({exc.strerror}); name one "
            "that this user may write to"
        ) from exc
    latest = time.time() - _KEEP_SCRATCH
    for path in scratch.glob("*.pcm"):
        with contextlib.suppress(FileNotFoundError):  # another worker tidies up, too
            if path.stat().st_mtime < latest:
                path.unlink()
