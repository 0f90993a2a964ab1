"""Audio in a folder of this machine, laid out like a bucket: ``<user id>/<name>``."""

import asyncio
import contextlib
import errno
import logging
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from jobs.errors import (
    AudioNotFound,
    FileExists,
    LinkInvalid,
    SettingsError,
    StorageUnavailable,
    UploadStalled,
)
from jobs.storage.base import (
    RESUMABLE_ABOVE,
    TUS_CHUNK,
    UploadTicket,
    check_size,
    empty,
    media_type,
    too_large,
)
from jobs.storage.links import DownloadGrant, LinkSigner, ResumableGrant, UploadGrant
from jobs.storage.partial import PartialUpload

logger = logging.getLogger(__name__)

UPLOAD_PATH = "/uploads/signed/"
RESUMABLE_PATH = "/uploads/resumable/"
DOWNLOAD_PATH = "/audio/"
UPLOAD_SECONDS = 2 * 3600  # as long as Supabase's
RESUMABLE_SECONDS = 24 * 3600  # large files, slow lines, and people who go on the next morning
SILENCE = 10.0  # seconds without a byte, after which a client may be gone
OTHER_TYPE = "application/octet-stream"

# What a disk says that is full, gone, or not ours; a client that is gone says something else.
_OF_THE_DISK = frozenset(
    [
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.ENODEV,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
    ]
)


class LocalStorage:
    """Files under ``root``; uploads of at most ``max_bytes``.

    ``links`` signs the links that this API serves itself; they have no host, as clients know under
    which they reach it. With ``locate_seconds`` files are located by such a link under
    ``public_url``, for machines that have no ``root``.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_bytes: int,
        links: LinkSigner | None = None,
        public_url: str = "",
        locate_seconds: float | None = None,
    ) -> None:
        self._root = root.resolve()
        self._partial = self._root / ".partial"
        self._max_bytes = max_bytes
        self._links = links
        self._public_url = public_url.rstrip("/")
        self._locate_seconds = locate_seconds

    async def aclose(self) -> None:
        """Nothing is open."""

    def _resolve(self, file_path: str) -> Path:
        try:
            path = (self._root / file_path).resolve()
        except ValueError:  # a NUL character
            path = self._root
        inside = self._root in path.parents  # no symlink or ".." leads out
        if not inside or self._partial in (path, *path.parents):
            raise _not_found(file_path)
        return path

    async def path(self, file_path: str) -> Path:
        """Return where the file lies on this machine. Raises ``AudioNotFound``."""
        path = self._resolve(file_path)
        if not await asyncio.to_thread(path.is_file):
            raise _not_found(file_path)
        return path

    async def locate(self, file_path: str) -> str:
        """Return the file's path on this machine, or a link to it. Raises ``AudioNotFound``."""
        if self._locate_seconds is not None:
            link = await self.sign_download(file_path, seconds=self._locate_seconds)
            return self._public_url + link
        return str(await self.path(file_path))

    async def size(self, file_path: str) -> int | None:
        """Return the file's size in bytes, ``None`` where there is none."""
        try:
            found = await asyncio.to_thread(os.stat, self._resolve(file_path))
        except (OSError, AudioNotFound):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    async def save(
        self,
        file_path: str,
        chunks: AsyncIterable[bytes],
        content_type: str | None = None,  # noqa: ARG002 - a file system keeps none
        *,
        replace: bool = True,
        max_bytes: int | None = None,
    ) -> int:
        """Stream to disk; the file appears under its name only when it is whole and synced.

        ``max_bytes`` is a tighter limit than the storage's. Raises ``InvalidInput`` for an empty
        upload, ``UploadTooLarge``, ``FileExists`` and ``StorageUnavailable``; none leaves a file.
        """
        path = self._resolve(file_path)
        limit = self._max_bytes if max_bytes is None else min(max_bytes, self._max_bytes)
        with _written():
            return await self._save(path, chunks, limit, replace=replace)

    async def _save(
        self, path: Path, chunks: AsyncIterable[bytes], limit: int, *, replace: bool
    ) -> int:
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        handle, name = await asyncio.to_thread(tempfile.mkstemp, prefix=".upload-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                size = await _copy(chunks, file, limit)
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(_put, Path(name), path, replace=replace)
        except BaseException:  # also when the client goes away: no half-written file stays
            await asyncio.to_thread(_discard, Path(name))
            raise
        return size

    async def delete(self, file_path: str) -> bool:
        """Delete a file, and its folder if that is empty then; return whether there was one."""
        try:
            await asyncio.to_thread(_discard, self._resolve(file_path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, AudioNotFound):
            return False
        return True

    # Resumable uploads

    def _upload(self, grant: ResumableGrant) -> PartialUpload:
        return PartialUpload(self._partial, self._resolve(grant.file_path), grant)

    async def begin_upload(self, grant: ResumableGrant) -> None:
        """Make room for an upload; one that has begun stays as it is. Raises ``FileExists``."""
        with _written():
            await asyncio.to_thread(self._upload(grant).begin)

    async def upload_offset(self, grant: ResumableGrant) -> int:
        """Return how many bytes of an upload have arrived.

        Raises ``UploadGone`` and, where they all have, ``UploadLocked``, ``FileExists`` and
        ``StorageUnavailable``.
        """
        with _written():
            return await asyncio.to_thread(self._upload(grant).offset)

    async def append(self, grant: ResumableGrant, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Add a stream to what has arrived, ``offset`` bytes, and return how many it is then.

        What came before the stream broke off stays. When all is there, the file appears under its
        name. Raises ``UploadGone``, ``UploadLocked``, ``UploadStalled``, ``OffsetConflict``,
        ``UploadTooLarge``, ``FileExists`` and ``StorageUnavailable``.
        """
        upload = self._upload(grant)
        with _written(), await asyncio.to_thread(upload.open, offset) as file:
            async for chunk in _not_silent(chunks):
                offset += len(chunk)
                if offset > grant.size:
                    raise too_large(grant.size)
                await asyncio.to_thread(_write, file, chunk)
            await asyncio.to_thread(upload.keep, file)
        return offset

    async def give_up_upload(self, grant: ResumableGrant) -> None:
        """Delete what has arrived of an upload. Raises ``UploadGone`` and ``UploadLocked``."""
        await asyncio.to_thread(self._upload(grant).give_up)

    # Links

    @property
    def _signer(self) -> LinkSigner:
        if self._links is None:
            raise SettingsError("PGSCRIBE_JWT_SECRET: needed to sign links to local audio")
        return self._links

    async def sign_upload(self, file_path: str, *, content_type: str, size: int) -> UploadTicket:
        """Return a ``PUT``, or for large files ``TUS``, to this API."""
        check_size(size, self._max_bytes)
        self._resolve(file_path)
        if size > RESUMABLE_ABOVE:
            return self._resumable(file_path, size)
        expires_at = int(time.time()) + UPLOAD_SECONDS
        grant = UploadGrant(file_path, size, content_type)
        token = self._signer.sign_upload(grant, expires_at=expires_at)
        return UploadTicket(
            method="PUT",
            url=UPLOAD_PATH + token,
            headers={"Content-Type": content_type},
            file_path=file_path,
            expires_at=datetime.fromtimestamp(expires_at, UTC),
        )

    def _resumable(self, file_path: str, size: int) -> UploadTicket:
        grant = ResumableGrant(file_path, size, int(time.time()) + RESUMABLE_SECONDS)
        return UploadTicket(
            method="TUS",
            url=RESUMABLE_PATH + self._signer.sign_resumable(grant),
            headers={},
            file_path=file_path,
            expires_at=datetime.fromtimestamp(grant.expires_at, UTC),
            chunk_size=TUS_CHUNK,
            metadata={},
        )

    async def sign_download(
        self, file_path: str, *, seconds: float, download_name: str | None = None
    ) -> str:
        """Return a link of this API to the file."""
        await self.path(file_path)
        grant = DownloadGrant(file_path, download_name)
        token = self._signer.sign_download(grant, expires_at=int(time.time() + seconds))
        return DOWNLOAD_PATH + token

    def verify_upload_token(self, token: str) -> UploadGrant:
        """Return what an upload link's token allows. Raises ``LinkInvalid``."""
        if self._links is None:
            raise LinkInvalid
        return self._links.verify_upload(token)

    def verify_resumable_token(self, token: str) -> ResumableGrant:
        """Return what a resumable upload's token allows. Raises ``LinkInvalid``, ``UploadGone``."""
        if self._links is None:
            raise LinkInvalid
        return self._links.verify_resumable(token)

    def verify_download_token(self, token: str) -> DownloadGrant:
        """Return what a download link's token allows. Raises ``LinkInvalid``."""
        if self._links is None:
            raise LinkInvalid
        return self._links.verify_download(token)


def served_type(file_path: str) -> str:
    """Return a type to serve a file with that no browser runs or renders as a page."""
    return media_type(file_path) or OTHER_TYPE


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Tell the log what is wrong with the disk, and the client that it may try again."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _OF_THE_DISK:
            raise
        logger.error("PGSCRIBE_STORAGE_DIR can't be written to: %s", exc)  # noqa: TRY400 - all of it
        raise StorageUnavailable from exc


def _not_found(file_path: str) -> AudioNotFound:
    return AudioNotFound(
        f"file_path: no file at {file_path!r} in storage; upload it, then submit again"
    )


async def _copy(chunks: AsyncIterable[bytes], file: BinaryIO, limit: int) -> int:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        await asyncio.to_thread(file.write, chunk)
    if size == 0:
        raise empty()
    return size


async def _not_silent(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield chunks as long as they come: whoever is gone without a word holds nothing up."""
    while True:
        try:
            async with asyncio.timeout(SILENCE):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as exc:
            raise UploadStalled from exc
        yield chunk


def _write(file: BinaryIO, chunk: bytes) -> None:
    file.write(chunk)
    file.flush()  # from now on it survives this process


def _put(upload: Path, path: Path, *, replace: bool) -> None:
    if replace:
        upload.replace(path)
        return
    try:
        os.link(upload, path)  # unlike a rename, it does not take the place of what is there
    except FileExistsError as exc:
        raise FileExists from exc
    upload.unlink()


def _discard(upload: Path) -> None:
    upload.unlink()
    with contextlib.suppress(OSError):  # other files lie there
        upload.parent.rmdir()
