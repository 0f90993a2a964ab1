"""Uploads to local storage. With Supabase Storage, clients upload there."""

import re
from http import HTTPStatus
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs.errors import InvalidInput, UploadTooLarge
from jobs.storage.base import Storage
from web.auth import Scope, authenticate, require
from web.middleware import allow_body

MAX_NAME = 200  # bytes in UTF-8; file systems take 255
_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f/\\]+")


async def upload(request: Request) -> Response:
    """``PUT /uploads/{name}``: the file's bytes as the body -> 201 {filePath, size}."""
    user = await authenticate(request)
    require(user, Scope.AUDIO_WRITE)
    allow_body(request, None)  # the storage counts
    name = request.path_params["name"]
    usable = _FILE_NAME.fullmatch(name) and name.strip(". ")
    if not usable or len(name.encode(errors="replace")) > MAX_NAME:
        raise InvalidInput(
            f"name: 1 to {MAX_NAME} bytes of UTF-8, no slashes or control characters", field="name"
        )
    _check_announced_size(request)
    storage: Storage = request.app.state.storage
    file_path = f"{user.user_id}/{uuid4()}/{name}"
    size = await storage.save(file_path, request.stream())
    return JSONResponse({"filePath": file_path, "size": size}, HTTPStatus.CREATED)


def _check_announced_size(request: Request) -> None:
    """Refuse what will be too large before its bytes are sent."""
    limit = request.app.state.settings.max_upload_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise UploadTooLarge(f"The upload has {announced} bytes; the limit is {limit}")


routes = [Route("/uploads/{name:path}", upload, methods=["PUT"])]
