"""Where audio lies."""

import mimetypes
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal, Protocol

from jobs.errors import InvalidInput, UploadTooLarge

RESUMABLE_ABOVE = 6 * 1024 * 1024  # bytes; Supabase advises TUS above that
TUS_CHUNK = 6 * 1024 * 1024  # bytes; Supabase asks for chunks of exactly that

# What `mimetypes` does not know everywhere, or not as a recording.
_TYPES = {
    ".aac": "audio/aac",
    ".amr": "audio/amr",
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".m4b": "audio/mp4",
    ".mka": "audio/x-matroska",
    ".mkv": "video/x-matroska",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".ts": "video/mp2t",
    ".wav": "audio/wav",
    ".webm": "video/webm",
    ".wma": "audio/x-ms-wma",
}


@dataclass(frozen=True, slots=True)
class UploadTicket:
    """Where and how a client uploads one file. Whoever has it may do so: it is a secret.

    ``PUT``: the file's bytes as the body, to ``url``, with ``headers``. ``TUS``: a resumable
    upload that is created at ``url``, in chunks of ``chunk_size`` bytes, with ``headers`` on each
    request and ``metadata`` as Upload-Metadata. A ``url`` without a host is one of this API's.
    """

    method: Literal["PUT", "TUS"]
    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    file_path: str
    expires_at: datetime
    chunk_size: int | None = None
    metadata: dict[str, str] | None = None


class AudioSource(Protocol):
    """What a worker needs of a storage to transcribe what lies there."""

    async def locate(self, file_path: str) -> str:
        """Return what ffmpeg can read: a path or a short-lived URL. Raises ``AudioNotFound``."""
        ...

    async def size(self, file_path: str) -> int | None:
        """Return a file's size in bytes, ``None`` where there is no such file."""
        ...

    async def save(
        self,
        file_path: str,
        chunks: AsyncIterable[bytes],
        content_type: str | None = None,
        *,
        replace: bool = True,
    ) -> int:
        """Store a stream, whole or not at all, and return its size in bytes.

        Raises ``InvalidInput`` for an empty one, ``UploadTooLarge`` and, unless it may ``replace``
        what is there, ``FileExists``.
        """
        ...


class Storage(AudioSource, Protocol):
    """A place for audio files, by the path that a job's ``file_path`` gives.

    All methods raise ``StorageUnavailable`` where nobody answers, which passes, and
    ``StorageRefused`` where the set-up is wrong, which does not.
    """

    async def delete(self, file_path: str) -> bool:
        """Delete a file; return whether there was one."""
        ...

    async def sign_upload(self, file_path: str, *, content_type: str, size: int) -> UploadTicket:
        """Let whoever has the ticket upload a file of ``size`` bytes, where there is none yet.

        Raises ``UploadTooLarge``, and ``InvalidInput`` for a path or a size that can't be.
        """
        ...

    async def sign_download(
        self, file_path: str, *, seconds: float, download_name: str | None = None
    ) -> str:
        """Return a URL that plays the file for so long, in ranges as well.

        With a ``download_name`` browsers save it under that name. Raises ``AudioNotFound``.
        """
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


def media_type(name: str, content_type: str | None = None) -> str | None:
    """Return a type that begins with audio/ or video/: the stated one, else the name's, if any."""
    guesses = (content_type, _TYPES.get(PurePosixPath(name).suffix.lower()))
    for guess in (*guesses, mimetypes.guess_type(PurePosixPath(name).name)[0]):
        plain = (guess or "").partition(";")[0].strip().lower()
        if plain.startswith(("audio/", "video/")) and plain.isascii() and plain.isprintable():
            return plain
    return None


def check_size(size: int, limit: int) -> None:
    """Refuse an upload before its bytes are sent. Raises ``InvalidInput``, ``UploadTooLarge``."""
    if size < 1:
        raise InvalidInput("size: must be the file's size in bytes, at least 1", field="size")
    if size > limit:
        raise UploadTooLarge(
            f"size: the upload has {size} bytes; the limit is {limit}", limit=limit
        )


def too_large(limit: int) -> UploadTooLarge:
    """Say that a stream went past the limit, in bytes."""
    return UploadTooLarge(
        f"The upload is larger than the limit of {limit} bytes; "
        "send a compressed format such as mp3, m4a or opus",
        limit=limit,
    )


def empty() -> InvalidInput:
    """Say that a stream had no bytes."""
    return InvalidInput("The upload is empty; send the file's bytes as the body")
