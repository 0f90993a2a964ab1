"""The app on Modal: ``pgscribe deploy`` puts it there.

One call, one file: ``modal run -m modal_functions.app::transcribe --file-path https://…``

What is wrong with a recording is returned, as ``error``, not raised: remote exceptions lose their
types on the way. Only what people call raises: ``transcribe_audio``, ``update_job_status``.
No function has a secret, as recordings come by signed, short-lived URLs; but ``update_job_status``
has one, and is there only if PGSCRIBE_MODAL_SUPABASE_SECRET names it.

The folders are mounts of volumes. PGSCRIBE_AUDIO_DIR and PGSCRIBE_WEIGHTS_DIR name others where
nothing is mounted.
"""

import contextlib
import importlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import modal

from modal_functions.config import Config
from modal_functions.errors import (
    InvalidOptions,
    ModelUnavailable,
    PreparedAudioGone,
    TranscriptionError,
)
from modal_functions.fingerprint import fingerprint
from modal_functions.plan import Span
from modal_functions.steps import noted, step
from modal_functions.transcript import TranscriptionOptions, is_model_name

Answer = dict[str, Any]

AUDIO_MOUNT: Final = "/audio"
WEIGHTS_MOUNT: Final = "/weights"
KEEP_AUDIO: Final = 24 * 3600  # seconds; no job takes as long

_FASTER_WHISPER: Final = "faster-whisper"
_OPENAI_WHISPER: Final = "openai-whisper"
_MODULES: Final = {
    _FASTER_WHISPER: ("faster_whisper",),
    _OPENAI_WHISPER: ("whisper", "whisper.transcribe"),
}
_CUBLAS: Final = "/usr/local/lib/python3.11/site-packages/nvidia/cublas/lib"
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{1,200}")

config = Config.load()
app = modal.App(config.app_name)

audio = modal.Volume.from_name(config.audio_volume, create_if_missing=True)
weights = modal.Volume.from_name(config.weights_volume, create_if_missing=True)

_base_image = modal.Image.debian_slim(python_version="3.11").apt_install("ffmpeg")
cpu_image = (
    _base_image.uv_pip_install("ffmpeg-python==0.2.0", "numpy==2.4.6")
    .env(config.environment())
    .add_local_python_source("modal_functions")
)
# CTranslate2 needs cuBLAS 12, and finds it only there; torch may bring another version.
gpu_image = (
    _base_image.uv_pip_install(
        "ctranslate2==4.8.5",
        "faster-whisper==1.2.1",
        "ffmpeg-python==0.2.0",
        "numpy==2.4.6",
        "nvidia-cublas-cu12>=12.4,<13",
        "openai-whisper==20250625",
        "torch==2.13.0",
    )
    .env(config.environment() | {"LD_LIBRARY_PATH": _CUBLAS})
    .add_local_python_source("modal_functions")
)


def _audio_dir() -> Path:
    return Path(os.environ.get("PGSCRIBE_AUDIO_DIR") or AUDIO_MOUNT)


def _weights_dir() -> Path:
    return Path(os.environ.get("PGSCRIBE_WEIGHTS_DIR") or WEIGHTS_MOUNT)


def _commit(volume: modal.Volume) -> None:
    if not modal.is_local():
        volume.commit()


def _answer(machine: str, function: Callable[[], Answer]) -> Answer:
    """Return what a function returns or reports, and the seconds that it and its steps took."""
    with noted() as steps:
        try:
            answer = function()
        except TranscriptionError as exc:
            error = {"code": exc.code, "message": str(exc), "retryable": exc.retryable}
            answer = {"error": error}
    usage = {"gpu_seconds": 0.0, "cpu_seconds": 0.0}
    usage[f"{machine}_seconds"] = steps["seconds"]
    return {**answer, "usage": usage, "steps": steps}


def _new_file(key: str) -> Path:
    """Return the path for a file of its own: nobody then reads or deletes it for another.

    A container that has read a file does not see what another has put in its place since.
    """
    if not _KEY.fullmatch(key):
        raise InvalidOptions("key", "must be 1 to 200 letters, digits, '_' or '-'")
    return _audio_dir() / f"{key}.{uuid4().hex}.pcm"


def _discard_old() -> None:
    """Delete what nobody has discarded, also what an interrupted call has left."""
    before = time.time() - KEEP_AUDIO
    for path in _audio_dir().glob("*.pcm"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()


@app.function(
    image=cpu_image,
    volumes={AUDIO_MOUNT: audio},
    timeout=config.prepare_timeout,
    retries=config.retries,
    max_containers=config.prepare_max_containers,
    scaledown_window=config.scaledown_window,
    cpu=config.cpu,
    memory=config.memory_mib,
)
def prepare_audio(  # noqa: PLR0913 - called by name
    *,
    source: str,
    key: str,
    preprocessing: bool,
    max_seconds: float,
    min_span: float | None = None,
    max_span: float | None = None,
) -> Answer:
    """Fetch, check and decode a recording to a file of that key, all of it, and plan its spans.

    Spans are as long as the configuration says unless the caller does.
    Returns ``plan`` or ``error``, and ``usage``. Doing it again makes another file.
    """
    from modal_functions.transcription import prepare

    def work() -> Answer:
        path = _new_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _discard_old()
        part = path.with_name(f".{path.name}")
        try:
            plan = prepare(
                source,
                part,
                preprocessing=preprocessing,
                max_seconds=max_seconds,
                min_span=min_span or config.min_span,
                max_span=max_span or config.max_span,
            )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        with step("save"):
            _commit(audio)
        return {"plan": replace(plan, pcm=path).to_dict()}

    return _answer("cpu", work)


@app.function(
    image=cpu_image,
    volumes={AUDIO_MOUNT: audio},
    timeout=60,
    retries=config.retries,
    max_containers=config.prepare_max_containers,
    scaledown_window=config.scaledown_window,
)
def discard_audio(pcm: str) -> None:
    """Delete a plan's file, if it is there."""
    _reload()
    path = _audio_dir() / Path(pcm).name
    if path.suffix == ".pcm":
        path.unlink(missing_ok=True)
    _commit(audio)


def _reload() -> None:
    """See what other containers have written since."""
    if not modal.is_local():
        audio.reload()


def _load(engine: str, model: str) -> Any:
    """Load a model from the volume, or download a known one into it."""
    from modal_functions.engines import load_engine

    root = _weights_dir() / engine
    if engine not in _MODULES:
        raise ModelUnavailable(engine, model, f"the engines are {', '.join(_MODULES)}")
    if not is_model_name(model):
        raise ModelUnavailable(engine, model, "this is not a model's name")
    path = root / model if engine == _FASTER_WHISPER else root / f"{model}.pt"
    has_weights = (path / "model.bin" if engine == _FASTER_WHISPER else path).is_file()
    loaded = load_engine(
        engine,
        model,
        path=path if has_weights else None,
        download_root=root,
        batch_size=config.batch_size,
    )
    if not has_weights:
        _commit(weights)
    return loaded


@app.cls(
    image=gpu_image,
    gpu=config.gpus,
    volumes={AUDIO_MOUNT: audio, WEIGHTS_MOUNT: weights},
    timeout=config.span_timeout,
    startup_timeout=config.startup_timeout,
    retries=config.retries,
    max_containers=config.max_containers,
    scaledown_window=config.scaledown_window,
    cpu=config.cpu,
    memory=config.memory_mib,
    enable_memory_snapshot=True,
)
class SpeechModel:
    """A loaded model that transcribes one span at a time."""

    engine: str = modal.parameter(default=_FASTER_WHISPER)
    model: str = modal.parameter(default="base")
    _loaded: Any = None
    _load_seconds: float = 0.0  # paid for, and not yet counted in any call's usage

    @modal.enter(snap=True)
    def import_engine(self) -> None:
        """Import what takes seconds, into the snapshot; there is no GPU yet."""
        for module in _MODULES.get(self.engine, ()):
            with contextlib.suppress(ImportError):  # loading says so
                importlib.import_module(module)

    @modal.enter(snap=False)
    def load(self) -> None:
        """Load the model. Where that fails each call says why, as a failed start tells nobody."""
        start = time.perf_counter()
        with contextlib.suppress(ModelUnavailable):
            self._loaded = _load(self.engine, self.model)
        self._load_seconds = time.perf_counter() - start

    @modal.method()
    def transcribe(self, pcm: str, start: int, end: int, options: dict[str, Any]) -> Answer:
        """Transcribe samples ``start`` to ``end`` of a prepared file, in times from its start.

        Returns ``transcript`` or ``error``, and ``usage``; a container's first call counts the
        loading of the model as well.
        """
        answer = _answer("gpu", lambda: self._transcribe(Path(pcm).name, Span(start, end), options))
        if self._load_seconds:
            answer["usage"]["gpu_seconds"] += self._load_seconds
            answer["steps"]["parts"].append(["load", -self._load_seconds, self._load_seconds])
            self._load_seconds = 0.0
        return answer

    def _transcribe(self, name: str, span: Span, options: dict[str, Any]) -> Answer:
        from modal_functions.audio import read_span
        from modal_functions.transcription import transcribe_chunk

        wanted = TranscriptionOptions.from_dict(options)
        if wanted.model != self.model:
            raise InvalidOptions("options.model", f"must be {self.model}, which is loaded here")
        path = _audio_dir() / name
        with step("read"):
            if not path.exists():
                _reload()
            try:
                samples = read_span(path, span)
            except (FileNotFoundError, ValueError) as exc:
                raise PreparedAudioGone from exc
        if self._loaded is None:
            with step("load"):
                self._loaded = _load(self.engine, self.model)
        return {"transcript": transcribe_chunk(samples, wanted, engine=self._loaded).to_dict()}


@app.function(
    image=gpu_image,
    gpu=config.gpus,
    volumes={AUDIO_MOUNT: audio, WEIGHTS_MOUNT: weights},
    timeout=config.file_timeout,
    startup_timeout=config.startup_timeout,
    retries=0,  # what is wrong with a file stays wrong
    max_containers=config.max_containers,
    scaledown_window=config.scaledown_window,
    cpu=config.cpu,
    memory=config.memory_mib,
)
def transcribe_audio(file_path: str, options: dict[str, Any] | None = None) -> Answer:
    """Transcribe a URL, or a path on Modal such as in the audio volume, by openai-whisper.

    Returns text, segments and language. Raises TranscriptionError, with a message for people.
    """
    from modal_functions.transcription import transcribe_file

    wanted = TranscriptionOptions.from_dict(options or {})
    transcript = transcribe_file(
        file_path,
        wanted,
        engine=_load(_OPENAI_WHISPER, wanted.model),
        max_seconds=config.max_audio_seconds,
    ).to_dict()
    return {key: transcript[key] for key in ("text", "segments", "language")}


@app.function(image=cpu_image, timeout=60, single_use_containers=True)
def describe() -> Answer:
    """Return what this container runs, by which `pgscribe deploy` knows it for its own."""
    return {"code": fingerprint(), "config": config.environment()}


@app.local_entrypoint()
def transcribe(file_path: str, options: str = "{}") -> None:
    """Transcribe one file and print the result as JSON. ``options`` is JSON, too."""
    result = transcribe_audio.remote(file_path, json.loads(options))
    print(json.dumps(result, indent=2, ensure_ascii=False))  # noqa: T201 - it is a command


if config.supabase_secret:
    status_image = (
        modal.Image.debian_slim(python_version="3.11")
        .uv_pip_install("httpx==0.28.1", "supabase==2.34.1")
        .env(config.environment())
        .add_local_python_source("modal_functions")
    )

    @app.function(
        image=status_image,
        secrets=[modal.Secret.from_name(config.supabase_secret, required_keys=["SUPABASE_URL"])],
        timeout=300,  # three tries, whose waits are bounded one by one
        retries=0,  # it tries again itself
        max_containers=config.prepare_max_containers,
        scaledown_window=config.scaledown_window,
    )
    def update_job_status(
        job_id: str, status: str, result: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Report progress and a note of a processing job; see modal_functions.status."""
        from modal_functions import status as reports

        return reports.update_job_status(job_id, status, result)
