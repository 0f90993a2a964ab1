"""Where transcription runs."""

from collections.abc import Callable
from typing import Protocol, Self

from modal_functions.transcript import Transcript, TranscriptionOptions


class Compute(Protocol):
    """Runs the transcription functions somewhere. Use as an async context manager."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def transcribe(
        self, source: str, options: TranscriptionOptions, on_progress: Callable[[float], None]
    ) -> Transcript:
        """Transcribe what ffmpeg can read at ``source``.

        ``on_progress`` gets the share of the audio done, 0 to 1. Raises ``TranscriptionFailed``
        or ``EngineCrashed``. When the task is cancelled, the work stops at once.
        """
        ...
