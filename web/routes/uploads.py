"""How recordings get into storage, and out of it: links that are good for one file, for a while."""

import re
import unicodedata
from datetime import datetime
from http import HTTPStatus
from typing import Literal
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

from jobs import service
from jobs.database import as_user
from jobs.errors import FileExists, InvalidInput, LinkInvalid, UploadTooLarge
from jobs.models import Waveform
from jobs.storage.base import Storage, media_type
from jobs.storage.local import LocalStorage, served_type
from web.endpoints import Answer, Endpoints, Principal, Scope

CREATED = HTTPStatus.CREATED
MAX_NAME = 200  # bytes in UTF-8; file systems take 255
LISTENING = 6 * 3600  # seconds for which a link to audio is good: somebody listens to it
_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f/\\]+")
_NOT_FOR_SUPABASE = re.compile(r"[^\w!.*'() &$@=;:+,?-]", re.ASCII)

endpoint = Endpoints("Audio")

_BYTES: dict[str, type[BaseModel] | None] = {"application/octet-stream": None}


class Uploaded(BaseModel):
    """A file in storage."""

    file_path: str = Field(serialization_alias="filePath")
    size: int = Field(description="In bytes.")


class UploadRequest(BaseModel):
    """A file that is to be uploaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME, description="Its name, no path.")
    size: int = Field(ge=1, lt=2**63, description="In bytes.")
    content_type: str | None = Field(None, alias="contentType", max_length=200)


class Upload(BaseModel):
    """Where and how to upload it. Whoever has this may do so, once: keep it to yourself.

    `PUT`: send the file's bytes as the body. `TUS`: a resumable upload (https://tus.io) that is
    created at `url`, in chunks of `chunkSize` bytes, with `metadata` as Upload-Metadata.
    """

    file_path: str = Field(serialization_alias="filePath", description="For `POST /process`.")
    method: Literal["PUT", "TUS"]
    url: str = Field(description="Without a host: one of this API's.")
    headers: dict[str, str] = Field(description="To send with each request.")
    expires_at: datetime = Field(serialization_alias="expiresAt")
    chunk_size: int | None = Field(serialization_alias="chunkSize")
    metadata: dict[str, str] | None


@endpoint("POST", "/uploads", scope=Scope.AUDIO_WRITE, answers={CREATED: Answer("Ready", Upload)})
async def prepare_upload(request: Request, user: Principal, body: UploadRequest) -> Response:
    """Ask where and how to upload a recording.

    Then upload it there, and name its `filePath` in `POST /process`.
    """
    file_path = new_path(request, user, body.name)
    storage: Storage = request.app.state.storage
    ticket = await storage.sign_upload(
        file_path,
        content_type=media_type(body.name, body.content_type) or "application/octet-stream",
        size=body.size,
    )
    upload = Upload(
        file_path=ticket.file_path,
        method=ticket.method,
        url=ticket.url,
        headers=ticket.headers,
        expires_at=ticket.expires_at,
        chunk_size=ticket.chunk_size,
        metadata=ticket.metadata,
    )
    return JSONResponse(upload.model_dump(mode="json", by_alias=True), CREATED)


def new_path(request: Request, user: Principal, name: str) -> str:
    """Return where a user's new file goes. Raises ``InvalidInput`` for an unusable name."""
    check_name(name)
    if request.app.state.settings.storage == "supabase":  # which takes no other names
        plain = unicodedata.normalize("NFKD", name)
        plain = "".join(char for char in plain if not unicodedata.combining(char))
        name = _NOT_FOR_SUPABASE.sub("_", plain)
    return f"{user.user_id}/{uuid4()}/{name}"


def check_name(name: str) -> None:
    """Raise ``InvalidInput`` for a file's name that storage can't have."""
    usable = _FILE_NAME.fullmatch(name) and name.strip(". ")
    if not usable or not 0 < _size(name) <= MAX_NAME:
        raise InvalidInput(
            f"name: 1 to {MAX_NAME} bytes of UTF-8, no slashes or control characters", field="name"
        )


def _size(name: str) -> int:
    """Return a name's bytes in UTF-8, 0 where it has half a surrogate pair."""
    try:
        return len(name.encode())
    except UnicodeEncodeError:
        return 0


@endpoint(
    "PUT",
    "/uploads/signed/{token}",
    answers={CREATED: Answer("Stored", Uploaded)},
    problems=(HTTPStatus.CONFLICT, HTTPStatus.FORBIDDEN),
    raw_body=_BYTES,
    max_body=None,
)
async def upload_by_link(request: Request, token: str) -> Response:
    """Upload to local storage by the link of `POST /uploads`; the body is the file's bytes.

    The link says which path and how many bytes at most; a file that is there is not replaced.
    """
    storage = local_storage(request)
    grant = storage.verify_upload_token(token)
    check_announced_size(request, grant.max_bytes)
    if await storage.size(grant.file_path) is not None:
        raise FileExists
    size = await storage.save(
        grant.file_path, request.stream(), replace=False, max_bytes=grant.max_bytes
    )
    return _stored(grant.file_path, size)


def _stored(file_path: str, size: int) -> Response:
    uploaded = Uploaded(file_path=file_path, size=size)
    return JSONResponse(uploaded.model_dump(mode="json", by_alias=True), CREATED)


def local_storage(request: Request) -> LocalStorage:
    """Return the storage that this server serves by links. Raises ``LinkInvalid``."""
    storage = request.app.state.storage
    if not isinstance(storage, LocalStorage):
        raise LinkInvalid
    return storage


def check_announced_size(request: Request, limit: int) -> None:
    """Refuse what will be too large before its bytes are sent."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise UploadTooLarge(f"The upload has {announced} bytes; the limit is {limit}", limit=limit)


@endpoint(
    "PUT",
    "/uploads/{name:path}",
    scope=Scope.AUDIO_WRITE,
    answers={CREATED: Answer("Stored", Uploaded)},
    raw_body=_BYTES,
    max_body=None,
)
async def upload(request: Request, user: Principal, name: str) -> Response:
    """Upload a recording through this server: the body is the file's bytes.

    The short way, for `curl -T`; browsers and large files ask `POST /uploads` for a link.
    """
    file_path = new_path(request, user, name)
    check_announced_size(request, request.app.state.settings.max_upload_bytes)
    storage: Storage = request.app.state.storage
    return _stored(file_path, await storage.save(file_path, request.stream()))


class AudioQuery(BaseModel):
    """How to deliver it."""

    model_config = ConfigDict(extra="forbid")

    download: bool = Field(False, description="Save it under its name, rather than play it.")  # noqa: FBT003


@endpoint(
    "GET",
    "/jobs/{job_id}/audio",
    scope=Scope.AUDIO_READ,
    answers={
        HTTPStatus.TEMPORARY_REDIRECT: Answer(
            "To the file", media_types=(), headers={"Location": "A link that is good for hours."}
        )
    },
)
async def job_audio(request: Request, user: Principal, job_id: UUID, query: AudioQuery) -> Response:
    """Listen to a job's recording: redirects to a link that serves ranges, too."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        job = await service.get(conn, job_id, result=False)
    storage: Storage = request.app.state.storage
    name = job.file_path.rpartition("/")[2] if query.download else None
    url = await storage.sign_download(job.file_path, seconds=LISTENING, download_name=name)
    return RedirectResponse(url)


@endpoint(
    "GET",
    "/jobs/{job_id}/waveform",
    scope=Scope.AUDIO_READ,
    answers={HTTPStatus.OK: Answer("The waveform", Waveform)},
)
async def job_waveform(request: Request, user: Principal, job_id: UUID) -> Response:
    """See what a job's recording looks like: peaks, for a player to draw."""
    async with as_user(request.app.state.pool, user.claims) as conn:
        found = await service.waveform(conn, job_id)
    return JSONResponse(found.model_dump(mode="json"))


@endpoint(
    "GET",
    "/audio/{token}",
    answers={
        HTTPStatus.OK: Answer("The file", media_types=("audio/*",)),
        HTTPStatus.PARTIAL_CONTENT: Answer("A part of it", media_types=("audio/*",)),
    },
    problems=(HTTPStatus.FORBIDDEN,),
)
async def play_by_link(request: Request, token: str) -> Response:
    """Play from local storage by a link of `GET /jobs/{job_id}/audio`, whole or in ranges."""
    storage = local_storage(request)
    grant = storage.verify_download_token(token)
    headers = {
        "Cache-Control": "private, max-age=3600",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return FileResponse(
        await storage.path(grant.file_path),
        media_type=served_type(grant.file_path),
        filename=grant.download_name or grant.file_path.rpartition("/")[2],
        content_disposition_type="attachment" if grant.download_name else "inline",
        headers=headers,
    )
