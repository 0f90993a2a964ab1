"""Signed links to local audio. With Supabase Storage, its server has its own."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from jobs.errors import FileExists, LinkInvalid, UploadTooLarge
from jobs.storage.local import LocalStorage, served_type


def _local(request: Request) -> LocalStorage:
    storage = request.app.state.storage
    if not isinstance(storage, LocalStorage):
        raise LinkInvalid
    return storage


async def upload_by_link(request: Request) -> Response:
    """``PUT /uploads/signed/{token}``: the file's bytes as the body -> 201 {filePath, size}.

    The link says which path and how many bytes at most; a file that is there is not replaced.
    """
    storage = _local(request)
    grant = storage.verify_upload_token(request.path_params["token"])
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > grant.max_bytes:
        raise UploadTooLarge(
            f"The upload has {announced} bytes; this link allows {grant.max_bytes}"
        )
    if await storage.size(grant.file_path) is not None:
        raise FileExists
    size = await storage.save(
        grant.file_path, request.stream(), replace=False, max_bytes=grant.max_bytes
    )
    return JSONResponse({"filePath": grant.file_path, "size": size}, HTTPStatus.CREATED)


async def play_by_link(request: Request) -> Response:
    """``GET /audio/{token}``: the file, whole or in the ranges that are asked for."""
    storage = _local(request)
    grant = storage.verify_download_token(request.path_params["token"])
    return FileResponse(
        await storage.path(grant.file_path),
        media_type=served_type(grant.file_path),
        filename=grant.download_name or grant.file_path.rpartition("/")[2],
        content_disposition_type="attachment" if grant.download_name else "inline",
        headers={
            "Cache-Control": "private, max-age=3600",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


routes = [
    Route("/uploads/signed/{token}", upload_by_link, methods=["PUT"]),
    Route("/audio/{token}", play_by_link, methods=["GET"]),
]
