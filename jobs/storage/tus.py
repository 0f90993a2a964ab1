"""Resumable uploads by the TUS protocol (https://tus.io), as Supabase Storage and we speak it."""

import asyncio
import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import BinaryIO
from urllib.parse import urljoin

import httpx

from jobs.backoff import Backoff
from jobs.errors import FileExists, StorageRefused, StorageUnavailable, UploadTooLarge
from jobs.storage.base import TUS_CHUNK

logger = logging.getLogger(__name__)

VERSION = {"Tus-Resumable": "1.0.0"}
REQUEST_TIMEOUT = 120.0  # seconds for a chunk, whatever trickles in
TRIES = 6  # without a byte of progress
PAUSES = (0.5, 10.0)  # seconds before the second try, and the longest

_GONE = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
_EXISTS = ("already exists", FileExists.code)  # Supabase's words, and ours
_PASSING = {408, 409, 423, 425, 429}  # 409 and 423: another request holds the upload


class _Interrupted(Exception):
    """An answer got lost, or says to try again: how much has arrived is to be asked."""


class _Gone(Exception):
    """The upload has expired."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of ``size`` bytes to be uploaded to ``endpoint``, with ``headers`` on each request.

    What ``headers`` hold goes to ``endpoint`` only, wherever the server says that the upload is.
    """

    client: httpx.AsyncClient
    endpoint: str
    headers: Mapping[str, str]
    metadata: Mapping[str, str]
    file: BinaryIO
    size: int
    pauses: tuple[float, float] = PAUSES

    async def run(self) -> bool:
        """Upload the file; return whether the server said that it is there.

        ``False``: all bytes have arrived, but the answer that says what became of them got lost.
        Raises ``StorageUnavailable`` after several tries without progress, ``UploadTooLarge``,
        ``FileExists`` and ``StorageRefused``.
        """
        backoff, tries, created = Backoff(*self.pauses), 0, 0
        url, offset = None, 0
        while True:
            try:
                if url is None:
                    created += 1
                    url, offset = await self._create(), 0
                elif tries:
                    reached = await self._offset(url)
                    tries = 0 if reached > offset else tries
                    offset = reached
                if offset == self.size:
                    return False
                while offset < self.size:
                    offset = await self._send(url, offset)
                    tries = 0
            except (_Interrupted, _Gone) as exc:
                tries += 1
                if max(tries, created) >= TRIES:
                    raise StorageUnavailable from exc
                url = None if isinstance(exc, _Gone) else url
                logger.warning("An upload goes on after an interruption: %s", exc)
                await backoff.sleep()
            else:
                return True

    async def _create(self) -> str:
        pairs = (
            f"{key} {base64.b64encode(value.encode()).decode()}"
            for key, value in self.metadata.items()
        )
        headers = {"Upload-Length": str(self.size), "Upload-Metadata": ",".join(pairs)}
        response = await self._request("POST", self.endpoint, headers)
        location = response.headers.get("location", "")
        name = location.rstrip("/").rpartition("/")[2]
        if response.status_code != HTTPStatus.CREATED or not name:
            raise _Interrupted("no upload was made")
        if urljoin(self.endpoint, location) == self.endpoint:  # a link of ours is for one upload
            return self.endpoint
        return f"{self.endpoint}/{name}"

    async def _offset(self, url: str) -> int:
        return _offset(await self._request("HEAD", url, {}), self.size)

    async def _send(self, url: str, offset: int) -> int:
        chunk = await asyncio.to_thread(_read, self.file, offset)
        headers = {
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            # Supabase may leave a connection hanging on which it has refused an upload.
            "Connection": "close",
        }
        reached = _offset(await self._request("PATCH", url, headers, chunk), self.size)
        if reached <= offset:
            raise _Interrupted("nothing has arrived")
        return reached

    async def _request(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None = None
    ) -> httpx.Response:
        headers = {**VERSION, **self.headers, **headers}
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                response = await self.client.request(method, url, headers=headers, content=content)
        except (httpx.HTTPError, TimeoutError) as exc:
            raise _Interrupted(type(exc).__name__) from exc
        if response.is_success:
            return response
        raise _error(response)


def _read(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(TUS_CHUNK)


def _offset(response: httpx.Response, size: int) -> int:
    text = response.headers.get("upload-offset", "")
    if not (text.isascii() and text.isdigit() and int(text) <= size):
        raise _Interrupted("the answer has no usable offset")
    return int(text)


def _status(response: httpx.Response) -> int:
    """Return the status that is meant: what refuses before TUS answers 400 with it in the body."""
    try:
        return int(response.json()["statusCode"])
    except (LookupError, TypeError, ValueError):
        return response.status_code


def _error(response: httpx.Response) -> Exception:
    """Say what a refusal means. Its own text is in no message: only the code is known."""
    status = _status(response)
    if status == HTTPStatus.CONFLICT and any(said in response.text for said in _EXISTS):
        return FileExists()
    if status in _GONE:
        return _Gone(f"HTTP {status}")
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _Interrupted(f"HTTP {status}")
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return UploadTooLarge("The upload is larger than the bucket's or the project's limit")
    return StorageRefused(
        f"The storage refuses a resumable upload (HTTP {status}); "
        "`pgscribe setup-storage --check` says why"
    )
