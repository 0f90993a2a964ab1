"""Uploads to local storage that go on where they broke off: TUS 1.0.0 (https://tus.io).

A link is for one upload, and is its address, too: so whoever lost the answer to its creation may
create it again.
"""

from email.utils import formatdate
from http import HTTPStatus
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import InvalidInput, UnsupportedMediaType, UnsupportedVersion, UploadTooLarge
from jobs.storage.links import ResumableGrant
from web.endpoints import Answer, Endpoints
from web.routes.uploads import check_announced_size, local_storage

PATH = "/uploads/resumable/{token}"
VERSION = "1.0.0"
BYTES = "application/offset+octet-stream"

endpoint = Endpoints("Audio", headers={"Tus-Resumable": VERSION, "Tus-Version": VERSION})

_OFFSET = {"Upload-Offset": "How many bytes have arrived."}
_EXPIRES = {"Upload-Expires": "When it can't go on any more."}
_LENGTH = {"Upload-Length": "The file's size in bytes."}


def _check_version(version: str) -> str:
    if version != VERSION:
        raise UnsupportedVersion(f"Tus-Resumable: must be {VERSION}")
    return version


def _check_type(media_type: str) -> str:
    if media_type.partition(";")[0].strip().lower() != BYTES:
        raise UnsupportedMediaType(f"Content-Type: must be {BYTES}")
    return media_type


class Tus(BaseModel):
    """What each request says. The version is looked at first, whatever else there is."""

    version: Annotated[str, AfterValidator(_check_version)] = Field(
        "", alias="Tus-Resumable", validate_default=True, examples=[VERSION]
    )


class Creation(Tus):
    """An upload that is to begin."""

    length: int = Field(alias="Upload-Length", ge=1, lt=2**63, description="As the link says.")


class Piece(Tus):
    """Where the bytes that follow begin."""

    media_type: Annotated[str, AfterValidator(_check_type)] = Field(
        "", alias="Content-Type", validate_default=True, examples=[BYTES]
    )
    offset: int = Field(
        alias="Upload-Offset", ge=0, lt=2**63, description="How many bytes have arrived."
    )


@endpoint(
    "POST",
    PATH,
    answers={
        HTTPStatus.CREATED: Answer(
            "Begun", media_types=(), headers={"Location": "The upload's URL."} | _EXPIRES
        )
    },
    problems=(
        HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT, HTTPStatus.GONE, HTTPStatus.PRECONDITION_FAILED,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ),
)  # fmt: skip
async def begin_upload(request: Request, token: str, headers: Creation) -> Response:
    """Begin a resumable upload by the link of `POST /uploads`; once begun, it stays as it is.

    The link says which path and how many bytes; a file that is there is not replaced.
    """
    storage = local_storage(request)
    grant = storage.verify_resumable_token(token)
    if headers.length > grant.size:
        raise UploadTooLarge(
            f"Upload-Length: {headers.length} bytes; the link is for {grant.size}", limit=grant.size
        )
    if headers.length < grant.size:
        raise InvalidInput(
            f"Upload-Length: must be {grant.size}, as asked for with the link",
            field="Upload-Length",
        )
    await storage.begin_upload(grant)
    # Relative to this URL, whatever it is by which a proxy leads here.
    return _answer(HTTPStatus.CREATED, grant, {"Location": token})


@endpoint(
    "HEAD",
    PATH,
    answers={
        HTTPStatus.OK: Answer("So far", media_types=(), headers=_OFFSET | _LENGTH | _EXPIRES)
    },
    problems=(
        HTTPStatus.FORBIDDEN, HTTPStatus.CONFLICT, HTTPStatus.GONE, HTTPStatus.PRECONDITION_FAILED,
        HTTPStatus.LOCKED,
    ),
)  # fmt: skip
async def upload_offset(request: Request, token: str, headers: Tus) -> Response:  # noqa: ARG001
    """Ask how much of a resumable upload has arrived: all of it means that it is done."""
    storage = local_storage(request)
    grant = storage.verify_resumable_token(token)
    arrived = str(await storage.upload_offset(grant))
    return _answer(
        HTTPStatus.OK, grant, {"Upload-Offset": arrived, "Upload-Length": str(grant.size)}
    )


@endpoint(
    "PATCH",
    PATH,
    answers={
        HTTPStatus.NO_CONTENT: Answer("Arrived", media_types=(), headers=_OFFSET | _EXPIRES)
    },
    problems=(
        HTTPStatus.FORBIDDEN, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.GONE,
        HTTPStatus.PRECONDITION_FAILED, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, HTTPStatus.LOCKED,
    ),
    raw_body={BYTES: None},
    max_body=None,
)  # fmt: skip
async def append_to_upload(request: Request, token: str, headers: Piece) -> Response:
    """Go on with a resumable upload: the body is the bytes behind those that have arrived.

    What arrives stays, also where the connection breaks. With its last byte the file is stored.
    """
    storage = local_storage(request)
    grant = storage.verify_resumable_token(token)
    check_announced_size(request, max(0, grant.size - headers.offset))
    reached = await storage.append(grant, headers.offset, request.stream())
    return _answer(HTTPStatus.NO_CONTENT, grant, {"Upload-Offset": str(reached)})


@endpoint(
    "DELETE",
    PATH,
    answers={HTTPStatus.NO_CONTENT: Answer("Deleted", media_types=())},
    problems=(
        HTTPStatus.FORBIDDEN, HTTPStatus.GONE, HTTPStatus.PRECONDITION_FAILED, HTTPStatus.LOCKED,
    ),
)  # fmt: skip
async def give_up_upload(request: Request, token: str, headers: Tus) -> Response:  # noqa: ARG001
    """Give up a resumable upload: what has arrived is deleted, unless it is whole already."""
    storage = local_storage(request)
    await storage.give_up_upload(storage.verify_resumable_token(token))
    return Response(status_code=HTTPStatus.NO_CONTENT)


@endpoint(
    "OPTIONS",
    PATH,
    answers={
        HTTPStatus.NO_CONTENT: Answer(
            "What there is", media_types=(),
            headers={"Tus-Extension": "Extensions.", "Tus-Max-Size": "Bytes of an upload."},
        )
    },
    problems=(HTTPStatus.FORBIDDEN,),
)  # fmt: skip
async def upload_options(request: Request, token: str) -> Response:  # noqa: ARG001
    """Ask what of TUS there is."""
    local_storage(request)
    largest = request.app.state.settings.max_upload_bytes
    headers = {"Tus-Extension": "creation,expiration,termination", "Tus-Max-Size": str(largest)}
    return Response(status_code=HTTPStatus.NO_CONTENT, headers=headers)


def _answer(status: HTTPStatus, grant: ResumableGrant, headers: dict[str, str]) -> Response:
    expires = {"Upload-Expires": formatdate(grant.expires_at, usegmt=True)}
    return Response(status_code=status, headers=headers | expires)
