"""Audio in a folder of this machine, laid out like a bucket: ``<user id>/<name>``."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterable
from pathlib import Path
from typing import BinaryIO

from jobs.errors import AudioNotFound, InvalidInput, UploadTooLarge


class LocalStorage:
    """Files under ``root``; uploads of at most ``max_bytes``."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root = root.resolve()
        self._max_bytes = max_bytes

    def _resolve(self, file_path: str) -> Path:
        path = (self._root / file_path).resolve()
        if self._root not in path.parents:  # a symlink or ".." that leads out
            raise AudioNotFound(f"file_path: no file at {file_path!r} in storage")
        return path

    async def locate(self, file_path: str) -> str:
        """Return the file's path on this machine. Raises ``AudioNotFound``."""
        path = self._resolve(file_path)
        if not await asyncio.to_thread(path.is_file):
            raise AudioNotFound(
                f"file_path: no file at {file_path!r} in storage; upload it, then submit again"
            )
        return str(path)

    async def save(self, file_path: str, chunks: AsyncIterable[bytes]) -> int:
        """Stream to disk; the file appears under its name only when it is whole and synced.

        Raises ``InvalidInput`` for an empty upload and ``UploadTooLarge``; neither leaves a file.
        """
        path = self._resolve(file_path)
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        handle, name = await asyncio.to_thread(tempfile.mkstemp, prefix=".upload-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                size = await self._copy(chunks, file)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(os.replace, name, path)
        except BaseException:  # also when the client goes away: no half-written file stays
            await asyncio.to_thread(self._discard, Path(name))
            raise
        return size

    async def size(self, file_path: str) -> int | None:
        """Return a file's size in bytes, ``None`` where there is no such file."""
        try:
            return (await asyncio.to_thread(self._resolve(file_path).stat)).st_size
        except (FileNotFoundError, NotADirectoryError, AudioNotFound):
            return None

    async def delete(self, file_path: str) -> bool:
        """Delete a file, and its folder if that is empty then; return whether there was one."""
        try:
            await asyncio.to_thread(self._discard, self._resolve(file_path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, AudioNotFound):
            return False
        return True

    @staticmethod
    def _discard(upload: Path) -> None:
        upload.unlink()
        with contextlib.suppress(OSError):  # other files lie there
            upload.parent.rmdir()

    async def _copy(self, chunks: AsyncIterable[bytes], file: BinaryIO) -> int:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_bytes:
                raise UploadTooLarge(
                    f"The upload is larger than the limit of {self._max_bytes} bytes; "
                    "send a compressed format such as mp3, m4a or opus"
                )
            await asyncio.to_thread(file.write, chunk)
        if size == 0:
            raise InvalidInput("The upload is empty; send the file's bytes as the body")
        return size
