"""Uploads to local storage. With Supabase Storage, clients upload there."""

import re
from http import HTTPStatus
from uuid import uuid4

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jobs.errors import InvalidInput, UploadTooLarge
from jobs.storage.base import Storage
from web.endpoints import Answer, Endpoints, Principal, Scope

MAX_NAME = 200  # bytes in UTF-8; file systems take 255
_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f/\\]+")

endpoint = Endpoints("Audio")


class Uploaded(BaseModel):
    """A file in storage."""

    file_path: str = Field(serialization_alias="filePath")
    size: int = Field(description="In bytes.")


@endpoint(
    "PUT",
    "/uploads/{name:path}",
    scope=Scope.AUDIO_WRITE,
    answers={HTTPStatus.CREATED: Answer("Stored", Uploaded)},
    raw_body={"application/octet-stream": None},
    max_body=None,
)
async def upload(request: Request, user: Principal, name: str) -> Response:
    """Upload a recording: the body is the file's bytes."""
    check_name(name)
    _check_announced_size(request)
    storage: Storage = request.app.state.storage
    file_path = f"{user.user_id}/{uuid4()}/{name}"
    size = await storage.save(file_path, request.stream())
    uploaded = Uploaded(file_path=file_path, size=size)
    return JSONResponse(uploaded.model_dump(mode="json", by_alias=True), HTTPStatus.CREATED)


def check_name(name: str) -> None:
    """Raise ``InvalidInput`` for a file's name that storage can't have."""
    usable = _FILE_NAME.fullmatch(name) and name.strip(". ")
    if not usable or len(name.encode(errors="replace")) > MAX_NAME:
        raise InvalidInput(
            f"name: 1 to {MAX_NAME} bytes of UTF-8, no slashes or control characters", field="name"
        )


def _check_announced_size(request: Request) -> None:
    """Refuse what will be too large before its bytes are sent."""
    limit = request.app.state.settings.max_upload_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise UploadTooLarge(f"The upload has {announced} bytes; the limit is {limit}", limit=limit)
