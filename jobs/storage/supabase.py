"""Audio in a private bucket of Supabase Storage, through the ``supabase`` client."""

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
from pydantic import ValidationError
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError
from storage3.utils import StorageException
from supabase import AsyncClient, AsyncClientOptions

from jobs.backoff import Backoff
from jobs.errors import (
    AudioNotFound,
    FileExists,
    InvalidInput,
    PgscribeError,
    StorageRefused,
    StorageUnavailable,
    UploadTooLarge,
)
from jobs.storage import tus
from jobs.storage.base import (
    RESUMABLE_ABOVE,
    TUS_CHUNK,
    UploadTicket,
    check_size,
    empty,
    media_type,
    too_large,
)

# Each wait on the network, and a whole request without a large body. In seconds.
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
REQUEST_TIMEOUT = 60.0
TRIES = 3
PAUSES = (0.2, 2.0)
UPLOAD_SECONDS = 2 * 3600  # how long Supabase's signed uploads are valid, unless they say it

# What browsers recognise as a recording all the same; the bucket takes only audio and video.
UNKNOWN_TYPE = "audio/mpeg"

# The Storage server refuses other names: https://supabase.com/docs/guides/storage/uploads.
# A question mark it would take, but writes it into signed URLs as it is.
_KEY = re.compile(r"[\w/!.*'() &$@=;:+,-]+", re.ASCII)
_CODE = re.compile(r"[\w .-]{1,60}", re.ASCII)

T = TypeVar("T")


class SupabaseStorage:
    """Files in ``bucket`` of the project at ``url``, by its secret key, past its policies.

    Uploads have at most ``max_bytes``; those of unknown length wait in ``spool_dir`` until they
    are whole. ``locate_seconds`` is how long a located file's URL is valid.
    """

    def __init__(  # noqa: PLR0913 - each has a name
        self,
        url: str,
        key: str,
        *,
        bucket: str,
        max_bytes: int,
        locate_seconds: float,
        spool_dir: Path,
        pauses: tuple[float, float] = PAUSES,
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self.bucket = bucket
        self._max_bytes = max_bytes
        self._locate_seconds = locate_seconds
        self._spool_dir = spool_dir
        self._pauses = pauses
        self._http: httpx.AsyncClient | None = None
        self._client: AsyncStorageClient | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        if self._http is not None:
            await self._http.aclose()
        self._http = self._client = None

    @property
    def http(self) -> httpx.AsyncClient:
        """The HTTP client; it follows no redirects, as these could lead the key elsewhere."""
        if self._http is None:
            self._http = httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False)
        return self._http

    @property
    def client(self) -> AsyncStorageClient:
        """The ``supabase`` client's part for Storage."""
        if self._client is None:
            options = AsyncClientOptions(
                httpx_client=self.http, auto_refresh_token=False, persist_session=False
            )
            self._client = AsyncClient(self._url, self._key, options).storage
        return self._client

    # Files

    async def locate(self, file_path: str) -> str:
        """Return a short-lived signed URL. Raises ``AudioNotFound``."""
        return await self.sign_download(file_path, seconds=self._locate_seconds)

    async def size(self, file_path: str) -> int | None:
        """Return a file's size in bytes, ``None`` where there is no such file."""
        if not _KEY.fullmatch(file_path):
            return None
        try:
            info = await self.ask(lambda: self._files.info(file_path))
        except AudioNotFound:
            return None
        size = info.get("size")
        if not isinstance(size, int):
            raise StorageUnavailable("The storage's answer has no size")
        return size

    async def save(
        self,
        file_path: str,
        chunks: AsyncIterable[bytes],
        content_type: str | None = None,
        *,
        replace: bool = True,
    ) -> int:
        """Store a stream: it is read to its end first, in bounded memory, then uploaded.

        Raises ``InvalidInput`` for an empty one, ``UploadTooLarge`` and ``FileExists``.
        """
        _check_key(file_path)
        kind = media_type(file_path, content_type) or UNKNOWN_TYPE
        await asyncio.to_thread(self._spool_dir.mkdir, parents=True, exist_ok=True)
        with tempfile.SpooledTemporaryFile(RESUMABLE_ABOVE, dir=str(self._spool_dir)) as file:
            size = await self._spool(chunks, file)
            if size <= RESUMABLE_ABOVE:
                await self._upload(file_path, file.read(), kind, replace=replace)
            else:
                await self._upload_in_chunks(file_path, file, size, kind, replace=replace)
        return size

    async def _spool(self, chunks: AsyncIterable[bytes], file: Any) -> int:
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            if size > self._max_bytes:
                raise too_large(self._max_bytes)
            await asyncio.to_thread(file.write, chunk)
        if size == 0:
            raise empty()
        file.seek(0)
        return size

    async def _upload(self, file_path: str, data: bytes, kind: str, *, replace: bool) -> None:
        # Supabase may leave a connection hanging on which it has refused an upload.
        headers = {"Connection": "close"}
        upsert = str(replace).lower()
        await self.ask(
            lambda: self._files.upload(
                file_path, data, {"content-type": kind, "upsert": upsert, "headers": headers}
            )
        )

    async def _upload_in_chunks(
        self, file_path: str, file: Any, size: int, kind: str, *, replace: bool
    ) -> None:
        headers = {"Authorization": f"Bearer {self._key}", "apikey": self._key}
        spooled: BinaryIO = file
        upload = tus.Upload(
            self.http,
            f"{self._url}/storage/v1/upload/resumable",
            headers | {"x-upsert": str(replace).lower()},
            self._metadata(file_path, kind),
            spooled,
            size,
            self._pauses,
        )
        for _ in range(TRIES):
            if await upload.run() or await self.size(file_path) == size:
                return
        raise StorageUnavailable

    async def delete(self, file_path: str) -> bool:
        """Delete a file; return whether there was one."""
        if not _KEY.fullmatch(file_path):
            return False
        return bool(await self.ask(lambda: self._files.remove([file_path])))

    # Signed URLs

    async def sign_upload(self, file_path: str, *, content_type: str, size: int) -> UploadTicket:
        """Return a ``PUT``, or for large files ``TUS``, to the Storage server itself."""
        check_size(size, self._max_bytes)
        _check_key(file_path)
        signed = await self.ask(lambda: self._files.create_signed_upload_url(file_path))
        token, kind = signed["token"], media_type(file_path, content_type) or UNKNOWN_TYPE
        if size <= RESUMABLE_ABOVE:
            headers = {"Content-Type": kind}
            return UploadTicket("PUT", signed["signed_url"], headers, file_path, _expiry(token))
        return UploadTicket(
            "TUS",
            f"{self._url}/storage/v1/upload/resumable/sign",
            {"x-signature": token},
            file_path,
            _expiry(token),
            TUS_CHUNK,
            self._metadata(file_path, kind),
        )

    def _metadata(self, file_path: str, kind: str) -> dict[str, str]:
        return {"bucketName": self.bucket, "objectName": file_path, "contentType": kind}

    async def sign_download(
        self, file_path: str, *, seconds: float, download_name: str | None = None
    ) -> str:
        """Return a signed URL of the Storage server. Raises ``AudioNotFound``."""
        if not _KEY.fullmatch(file_path):
            raise _not_found()
        lifetime = max(1, int(seconds))
        options: Any = {"download": download_name} if download_name else {}
        signed = await self.ask(lambda: self._files.create_signed_url(file_path, lifetime, options))
        url: str | None = signed["signedUrl"]
        if not url or not parse_qs(urlsplit(url).query).get("token"):
            raise StorageUnavailable("The storage's answer has no signed URL")
        return url

    # Requests

    @property
    def _files(self) -> Any:
        return self.client.from_(self.bucket)

    async def ask(self, request: Callable[[], Awaitable[T]]) -> T:
        """Return the answer to a request that may be repeated, as it is where nobody answers.

        Raises ``AudioNotFound`` and what ``Storage`` names. No message has the key or a URL.
        """
        backoff = Backoff(*self._pauses)
        for _ in range(TRIES - 1):
            with contextlib.suppress(StorageUnavailable):
                return await self._ask(request)
            await backoff.sleep()
        return await self._ask(request)

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                return await request()
        except StorageApiError as exc:
            raise self._explained(exc) from None
        except (httpx.HTTPError, TimeoutError) as exc:
            raise StorageUnavailable(
                f"The storage does not answer ({type(exc).__name__}); try again in a moment"
            ) from None
        except (StorageException, ValidationError, LookupError, TypeError, ValueError) as exc:
            raise StorageUnavailable(
                f"The storage's answer is of no use ({type(exc).__name__}); see "
                "PGSCRIBE_SUPABASE_URL"
            ) from None

    def _explained(self, exc: StorageApiError) -> PgscribeError:
        """Say what an error of the Storage API means; its HTTP status is mostly 400."""
        status = int(exc.status) if str(exc.status).isdigit() else 0
        code = found.group() if (found := _CODE.match(str(exc.code))) else "unknown"
        if status == 404 and "bucket" in code.lower():  # noqa: PLR2004 - HTTP's
            return StorageRefused(
                f"PGSCRIBE_SUPABASE_BUCKET: there is no bucket {self.bucket!r}; "
                "`pgscribe setup-storage` makes it"
            )
        known: Mapping[int, Callable[[], PgscribeError]] = {
            404: _not_found,
            409: FileExists,
            413: lambda: UploadTooLarge(
                "The upload is larger than the bucket's or the project's limit"
            ),
            415: lambda: InvalidInput(
                "content_type: the bucket takes audio/* and video/* only", field="content_type"
            ),
        }
        if status in known:
            return known[status]()
        if status == 0 or status in {408, 423, 425, 429} or status >= 500:  # noqa: PLR2004
            return StorageUnavailable(f"The storage can't answer now ({status}, {code})")
        return StorageRefused(
            f"The storage refuses a request of this server ({status}, {code}); check "
            "PGSCRIBE_SUPABASE_SECRET_KEY, then run `pgscribe setup-storage --check`"
        )


def _check_key(file_path: str) -> None:
    if not _KEY.fullmatch(file_path) or {"", ".", ".."} & set(file_path.split("/")):
        raise InvalidInput(
            "file_path: Supabase Storage takes ASCII letters, digits and _ / ! - . * ' ( ) & $ @ "
            "= ; : + , in names, and spaces",
            field="file_path",
        )


def _not_found() -> AudioNotFound:
    return AudioNotFound(
        "file_path: there is no such file in storage; upload it, then submit again"
    )


def _expiry(token: str) -> datetime:
    """Return when a signed upload ends, as its token says: the server's setting decides."""
    try:
        claims = jwt.decode(token, options={"verify_signature": False, "verify_exp": False})
        return datetime.fromtimestamp(int(claims["exp"]), UTC)
    except (jwt.InvalidTokenError, LookupError, TypeError, ValueError, OverflowError):
        return datetime.fromtimestamp(int(time.time()) + UPLOAD_SECONDS, UTC)
