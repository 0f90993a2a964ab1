"""What a worker needs on its own machine, where calls run there."""

import asyncio
import os
import sys
import tempfile
import wave
from pathlib import Path

from jobs.compute.local import MODULES, check_installed, processes_and_threads
from jobs.doctor.checks import Context, Finding, fail, in_thread, ok, skipped, warn
from jobs.doctor.services import check_folder
from jobs.errors import SettingsError
from jobs.models import TranscriptionOptions

IMPORT_LIMIT = 60.0  # seconds; torch takes some from a cold disk
PCM_PER_SECOND = 32_000  # bytes of decoded audio
# GB of memory that a model takes on a CPU, with its engine; docs of the engines, and ours.
MEMORY = {"tiny": 0.3, "base": 0.4, "small": 0.9, "medium": 2.0, "turbo": 2.0, "large": 3.2}
RESERVE = 0.5  # GB for the worker itself and the system
ELSEWHERE = skipped("calls run on Modal (PGSCRIBE_COMPUTE=modal)")


async def check_ffmpeg(context: Context) -> Finding:
    """Decode a recording, as jobs do."""
    if context.settings.compute != "local":
        return ELSEWHERE
    try:
        decoded = await in_thread(_decode)
    except ImportError as exc:
        return fail(
            f"{exc.name} is not installed", "Run: pip install 'pgscribe[local]' on workers."
        )
    except Exception as exc:  # noqa: BLE001 - whatever it is, recordings cannot be decoded
        return fail(
            f"a recording cannot be decoded: {' '.join(str(exc).split())}",
            "Install ffmpeg (apt install ffmpeg), or the package imageio-ffmpeg, on workers.",
        )
    return ok(f"{decoded} decodes recordings")


def _decode() -> str:
    from modal_functions.audio import SAMPLE_RATE, decode, find_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tone.wav")
        with wave.open(str(path), "wb") as recording:
            recording.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            recording.writeframes(b"\0\x10\0\xf0" * (SAMPLE_RATE // 2))
        if len(decode(str(path), max_seconds=60)) != SAMPLE_RATE:
            raise ValueError("a second of sound is another length afterwards")
    return find_ffmpeg()


async def check_engine(context: Context) -> Finding:
    """Load the engine's packages, in a process of their own as workers do."""
    settings = context.settings
    if settings.compute != "local":
        return ELSEWHERE
    try:
        check_installed(settings.engine)
    except SettingsError as exc:
        return fail(str(exc), "Run what is named there, or use PGSCRIBE_COMPUTE=modal.")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"import {MODULES[settings.engine]}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [str(process.returncode)]
        return fail(
            f"{settings.engine} cannot be loaded: {lines[-1]}",
            "Install it again: pip install --force-reinstall 'pgscribe[local]'.",
        )
    return ok(f"{settings.engine} can be loaded")


def _models(context: Context) -> list[str]:
    default = TranscriptionOptions().model
    return list(dict.fromkeys((default, context.settings.openai_model)))


async def check_weights(context: Context) -> Finding:
    """See whether the models that jobs get by default are on this machine."""
    settings = context.settings
    if settings.compute != "local":
        return ELSEWHERE
    wanted = _models(context)

    def look() -> list[str]:
        from jobs.compute.packaged_weights import at_hand
        from modal_functions.engines import ALIASES

        here = at_hand(settings.engine, settings.models_dir)
        return [model for model in wanted if not {model, ALIASES.get(model, model)} & {*here}]

    try:
        missing = await in_thread(look)
    except ImportError as exc:
        return fail(f"{exc.name} is not installed", "Run: pip install 'pgscribe[local]'.")
    if missing:
        return warn(
            f"{', '.join(missing)}: no weights in {settings.models_dir / settings.engine}; the "
            "first job downloads them",
            "Let workers reach huggingface.co, or put the weights into PGSCRIBE_MODELS_DIR "
            "beforehand.",
        )
    return ok(f"{', '.join(wanted)} in {settings.models_dir}, or in packages")


async def check_scratch(context: Context) -> Finding:
    """See whether the longest recordings that may run at the same time fit when decoded."""
    settings = context.settings
    if settings.compute != "local":
        return ELSEWHERE
    need = PCM_PER_SECOND * settings.max_audio_seconds * settings.worker_concurrency
    return await in_thread(lambda: check_folder(settings.scratch_dir, "PGSCRIBE_SCRATCH_DIR", need))


async def check_memory(context: Context) -> Finding:
    """Compare what the engine processes take with what the machine has."""
    settings = context.settings
    if settings.compute != "local":
        return ELSEWHERE
    if settings.device == "cuda":
        return skipped("the models are in the GPU's memory")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes, _ = processes_and_threads(settings, cores or 1)
    largest = max(_models(context), key=_gigabytes)
    need = processes * _gigabytes(largest) + RESERVE
    have = await in_thread(_memory)
    seen = f"{processes} processes with {largest} take {need:.1f} GB; this machine has {have:.1f}"
    if need > have:
        return warn(seen, "Set PGSCRIBE_ENGINE_PROCESSES lower: engines that lack memory crash.")
    return ok(seen)


def _gigabytes(model: str) -> float:
    return next((size for name, size in MEMORY.items() if model.startswith(name)), 3.2)


def _memory() -> float:
    """Return the memory of this machine, or of the container that this is, in GB."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup", limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            sizes.append(int(text))
    return min(sizes) / 1024**3
