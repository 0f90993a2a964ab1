"""Where audio lies."""

from collections.abc import AsyncIterable
from typing import Protocol


class Storage(Protocol):
    """A place for audio files, by the path that a job's ``file_path`` gives."""

    async def locate(self, file_path: str) -> str:
        """Return what ffmpeg can read: a path or a short-lived URL. Raises ``AudioNotFound``."""
        ...

    async def save(self, file_path: str, chunks: AsyncIterable[bytes]) -> int:
        """Store a stream, whole or not at all, and return its size in bytes."""
        ...

    async def size(self, file_path: str) -> int | None:
        """Return a file's size in bytes, ``None`` where there is no such file."""
        ...

    async def delete(self, file_path: str) -> bool:
        """Delete a file; return whether there was one."""
        ...
