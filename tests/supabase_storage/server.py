"""Supabase's Storage server, as far as pgscribe and its clients use it, in memory on a real socket.

Written from its documentation and its open source (github.com/supabase/storage): paths, bodies,
and the oddities. Errors are HTTP 400 with the real code in ``statusCode``; those of resumable
uploads are plain text with their own status. Signed uploads overwrite nothing unless signed so. A
connection on which a large upload was refused hangs, unless it was to be closed. Object names are
of ASCII. Not there: images, S3, versions, and the policies: a user's token reaches its own folder.
"""

import asyncio
import base64
import email
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

import jwt
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

KEY = re.compile(r"[\w/!.*'() &$@=;:+,?-]+", re.ASCII)
TUS_VERSION = {"Tus-Resumable": "1.0.0"}

FaultKind = Literal["500", "503", "429", "cut", "cut after", "slow", "html", "gone", "slow down"]


@dataclass
class Fault:
    """What goes wrong with the next request of that method whose path has that part.

    ``cut``: the connection, after half of the body; ``cut after``: once all is done.
    """

    method: str
    part: str
    kind: FaultKind


@dataclass
class StoredObject:
    data: bytes
    content_type: str
    created_at: float = field(default_factory=time.time)


@dataclass
class Bucket:
    public: bool = False
    file_size_limit: int | None = None
    allowed_mime_types: list[str] | None = None
    objects: dict[str, StoredObject] = field(default_factory=dict)


@dataclass
class Upload:
    bucket: str
    name: str
    content_type: str
    size: int
    upsert: bool
    expires_at: float
    data: bytearray = field(default_factory=bytearray)


class Refused(Exception):
    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error, self.message = status, error, message

    def response(self) -> Response:
        content = {"statusCode": str(self.status), "error": self.error, "message": self.message}
        return JSONResponse(content, 500 if self.status == 500 else 400)


def no_bucket() -> Refused:
    return Refused(404, "Bucket not found", "Bucket not found")


def no_object() -> Refused:
    return Refused(404, "not_found", "Object not found")


def duplicate() -> Refused:
    return Refused(409, "Duplicate", "The resource already exists")


def too_large() -> Refused:
    return Refused(413, "Payload too large", "The object exceeded the maximum allowed size")


class StandIn:
    """The server's state. ``url`` is the project's, ``secret_key`` what servers use."""

    def __init__(self) -> None:
        self.url = ""
        self.jwt_secret = secrets.token_hex(32)
        self.secret_key = jwt.encode({"role": "service_role"}, self.jwt_secret, "HS256")
        self.file_size_limit = 50 * 1024**2
        self.signed_upload_seconds = 7200
        self.upload_seconds = 3600.0
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, Upload] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.largest_body = 0
        self.transports: dict[tuple[str, int], asyncio.BaseTransport] = {}
        self.hanging: set[tuple[str, int]] = set()

    def user_token(self, user: object) -> str:
        return jwt.encode({"sub": str(user), "role": "authenticated"}, self.jwt_secret, "HS256")

    def object(self, name: str, bucket: str = "audio") -> StoredObject:
        return self.buckets[bucket].objects[name]

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path, _ in self.requests)

    # What each request goes through

    async def handle(
        self, request: Request, act: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        assert request.client is not None
        client = (request.client.host, request.client.port)
        self.requests.append((request.method, request.url.path, dict(request.headers)))
        if client in self.hanging:
            await asyncio.sleep(3600)
        # The answer may get lost where a connection is closed with something unread.
        await request.body()
        fault = next(
            (f for f in self.faults if f.method == request.method and f.part in request.url.path),
            None,
        )
        if fault is None:
            return await act(request)
        self.faults.remove(fault)
        return await self._fail(fault, request, act, client)

    async def _fail(
        self,
        fault: Fault,
        request: Request,
        act: Callable[[Request], Awaitable[Response]],
        client: tuple[str, int],
    ) -> Response:
        match fault.kind:
            case "500":
                return Refused(500, "Internal", "Internal Server Error").response()
            case "503":
                return Response("upstream connect error", 503)
            case "429":
                return Refused(429, "SlowDown", "Too many requests").response()
            case "html":
                return Response("<html>gateway</html>", 200, media_type="text/html")
            case "gone":
                self.uploads.clear()
                return await act(request)
            case "cut":
                request.state.cut = True
                await act(request)
            case "cut after":
                await act(request)
            case _:
                await asyncio.sleep(3600)
        transport = self.transports[client]
        assert isinstance(transport, asyncio.Transport)
        transport.abort()
        return Response()

    def claims(self, request: Request) -> Mapping[str, Any]:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            claims: Mapping[str, Any] = jwt.decode(token, self.jwt_secret, algorithms=["HS256"])
        except jwt.InvalidTokenError as exc:
            raise Refused(403, "Unauthorized", "Invalid Compact JWS") from exc
        return claims

    def authorize(self, request: Request, name: str) -> None:
        claims = self.claims(request)
        if claims["role"] != "service_role" and name.partition("/")[0] != claims.get("sub"):
            raise Refused(403, "Unauthorized", "new row violates row-level security policy")

    def bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise no_bucket()
        return self.buckets[name]

    def find(self, bucket: str, name: str) -> StoredObject:
        found = self.bucket(bucket).objects.get(name)
        if found is None:
            raise no_object()
        return found

    def limit(self, bucket: Bucket) -> int:
        return min(bucket.file_size_limit or self.file_size_limit, self.file_size_limit)

    def check(self, bucket: Bucket, name: str, content_type: str, *, upsert: bool) -> None:
        if not KEY.fullmatch(name):
            raise Refused(400, "InvalidKey", f"Invalid key: {name}")
        allowed = bucket.allowed_mime_types
        kinds = {content_type, content_type.partition("/")[0] + "/*"}
        if allowed and not kinds & set(allowed):
            raise Refused(415, "invalid_mime_type", f"mime type {content_type} is not supported")
        if name in bucket.objects and not upsert:
            raise duplicate()

    def sign(self, seconds: float, **claims: Any) -> str:
        now = int(time.time())
        claims |= {"iat": now, "exp": now + int(seconds)}
        return jwt.encode(claims, self.jwt_secret, "HS256")

    def verify(self, token: str, bucket: str, name: str, use: str) -> Mapping[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(token, self.jwt_secret, algorithms=["HS256"])
        except jwt.ExpiredSignatureError as exc:
            raise Refused(400, "InvalidJWT", '"exp" claim timestamp check failed') from exc
        except jwt.InvalidTokenError as exc:
            raise Refused(400, "InvalidJWT", "jwt malformed") from exc
        if claims.get("url") != f"{bucket}/{name}" or claims.get("use") != use:
            raise Refused(400, "InvalidSignature", "The url do not match the signature")
        return claims


async def body(request: Request) -> bytes:
    data = await request.body()
    if getattr(request.state, "cut", False):
        data = data[: len(data) // 2]
    return data


def file_of(request: Request, data: bytes) -> tuple[bytes, str]:
    """Return the file in a body, and its type."""
    kind = request.headers.get("content-type", "application/octet-stream")
    if not kind.startswith("multipart/form-data"):
        return data, kind
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + data)
    for part in message.walk():
        if part.get_filename():
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            return payload, part.get_content_type()
    raise Refused(400, "no_file_provided", "No file provided")


class Api:
    """The endpoints under ``/storage/v1``."""

    def __init__(self, state: StandIn) -> None:
        self.state = state

    async def _put(self, request: Request, *, upsert: bool) -> Response:
        state, name = self.state, request.path_params["name"]
        bucket = state.bucket(request.path_params["bucket"])
        data = await body(request)
        state.largest_body = max(state.largest_body, len(data))
        data, kind = file_of(request, data)
        state.check(bucket, name, kind, upsert=upsert)
        if len(data) > state.limit(bucket):
            if request.headers.get("connection", "").lower() != "close":
                assert request.client is not None
                state.hanging.add((request.client.host, request.client.port))
            raise too_large()
        if getattr(request.state, "cut", False):
            return Response()
        bucket.objects[name] = StoredObject(data, kind)
        key = f"{request.path_params['bucket']}/{name}"
        return JSONResponse({"Key": key, "Id": str(uuid4())})

    async def create(self, request: Request) -> Response:
        self.state.authorize(request, request.path_params["name"])
        return await self._put(request, upsert=request.headers.get("x-upsert") == "true")

    async def info(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.state.authorize(request, name)
        found = self.state.find(request.path_params["bucket"], name)
        return JSONResponse(
            {"id": str(uuid4()), "name": name, "size": len(found.data),
             "content_type": found.content_type}
        )  # fmt: skip

    async def remove(self, request: Request) -> Response:
        self.state.claims(request)
        objects = self.state.bucket(request.path_params["bucket"]).objects
        names = (await request.json())["prefixes"]
        found = [name for name in names if objects.pop(name, None)]
        return JSONResponse([{"name": name} for name in found])

    async def list(self, request: Request) -> Response:
        self.state.claims(request)
        objects = self.state.bucket(request.path_params["bucket"]).objects
        prefix = (await request.json())["prefix"].rstrip("/") + "/"
        names = sorted(name for name in objects if name.startswith(prefix))
        return JSONResponse([{"name": name.removeprefix(prefix)} for name in names])

    # Signed URLs

    async def sign_upload(self, request: Request) -> Response:
        bucket, name = request.path_params["bucket"], request.path_params["name"]
        self.state.authorize(request, name)
        upsert = request.headers.get("x-upsert") == "true"
        self.state.check(self.state.bucket(bucket), name, "audio/*", upsert=upsert)
        token = self.state.sign(
            self.state.signed_upload_seconds, url=f"{bucket}/{name}", use="upload", upsert=upsert
        )
        url = f"/object/upload/sign/{bucket}/{name}?token={token}"
        return JSONResponse({"url": url, "token": token})

    async def upload_signed(self, request: Request) -> Response:
        token = request.query_params.get("token", "")
        path = request.path_params
        claims = self.state.verify(token, path["bucket"], path["name"], "upload")
        return await self._put(request, upsert=claims["upsert"])

    async def sign(self, request: Request) -> Response:
        bucket, name = request.path_params["bucket"], request.path_params["name"]
        self.state.authorize(request, name)
        self.state.find(bucket, name)
        seconds = int((await request.json())["expiresIn"])
        token = self.state.sign(seconds, url=f"{bucket}/{name}", use="download")
        return JSONResponse({"signedURL": f"/object/sign/{bucket}/{name}?token={token}"})

    async def download(self, request: Request) -> Response:
        path = request.path_params
        self.state.verify(
            request.query_params.get("token", ""), path["bucket"], path["name"], "download"
        )
        found = self.state.find(path["bucket"], path["name"])
        headers = {"Accept-Ranges": "bytes"}
        if (name := request.query_params.get("download")) is not None:
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if wanted is None:
            return Response(found.data, 200, headers, found.content_type)
        start, end = int(wanted[1]), int(wanted[2] or len(found.data) - 1)
        if start >= len(found.data):
            return Response("", 416, {"Content-Range": f"bytes */{len(found.data)}"})
        data = found.data[start : end + 1]
        headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{len(found.data)}"
        return Response(data, 206, headers, found.content_type)

    # Buckets

    def _render(self, name: str) -> dict[str, Any]:
        bucket = self.state.bucket(name)
        now = "2026-11-24T00:00:00.000Z"
        return {
            "id": name, "name": name, "owner": "", "public": bucket.public,
            "file_size_limit": bucket.file_size_limit,
            "allowed_mime_types": bucket.allowed_mime_types,
            "created_at": now, "updated_at": now, "type": "STANDARD",
        }  # fmt: skip

    async def _settings(self, request: Request) -> dict[str, Any]:
        claims = self.state.claims(request)
        if claims["role"] != "service_role":
            raise Refused(403, "Unauthorized", "new row violates row-level security policy")
        settings: dict[str, Any] = await request.json()
        if (settings.get("file_size_limit") or 0) > self.state.file_size_limit:
            raise too_large()
        return settings

    async def create_bucket(self, request: Request) -> Response:
        settings = await self._settings(request)
        name = settings.pop("id")
        settings.pop("name")
        if name in self.state.buckets:
            raise duplicate()
        self.state.buckets[name] = Bucket(**settings)
        return JSONResponse({"name": name})

    async def update_bucket(self, request: Request) -> Response:
        settings = await self._settings(request)
        bucket = self.state.bucket(request.path_params["bucket"])
        for name in ("public", "file_size_limit", "allowed_mime_types"):
            setattr(bucket, name, settings.get(name, getattr(bucket, name)))
        return JSONResponse({"message": "Successfully updated"})

    async def get_bucket(self, request: Request) -> Response:
        self.state.claims(request)
        return JSONResponse(self._render(request.path_params["bucket"]))

    async def list_buckets(self, request: Request) -> Response:
        self.state.claims(request)
        return JSONResponse([self._render(name) for name in self.state.buckets])

    # Resumable uploads

    def _may_upload(self, request: Request, bucket: str, name: str) -> bool:
        """Return whether it may overwrite."""
        if "/resumable/sign" not in request.url.path:
            self.state.authorize(request, name)
            return request.headers.get("x-upsert") == "true"
        signature = request.headers.get("x-signature")
        if not signature:
            raise Refused(400, "InvalidSignature", "Missing x-signature header")
        upsert: bool = self.state.verify(signature, bucket, name, "upload")["upsert"]
        return upsert

    async def tus_create(self, request: Request) -> Response:
        state = self.state
        pairs = [pair.split(" ") for pair in request.headers["upload-metadata"].split(",")]
        metadata = {key: base64.b64decode(value).decode() for key, value in pairs}
        bucket, name = metadata["bucketName"], metadata["objectName"]
        upsert = self._may_upload(request, bucket, name)
        size = int(request.headers["upload-length"])
        state.check(state.bucket(bucket), name, metadata["contentType"], upsert=upsert)
        if size > state.limit(state.bucket(bucket)):
            raise Refused(413, "", "Maximum size exceeded")
        upload_id = base64.urlsafe_b64encode(f"{bucket}/{name}/{uuid4()}".encode()).decode()
        state.uploads[upload_id] = Upload(
            bucket, name, metadata["contentType"], size, upsert, time.time() + state.upload_seconds
        )
        # As behind a gateway that says nothing of itself: another host, without a port.
        location = f"https://storage.internal{request.url.path}/{upload_id}"
        return Response(None, 201, TUS_VERSION | {"Location": location})

    def _upload(self, request: Request) -> Upload:
        upload = self.state.uploads.get(request.path_params["upload"].rstrip("/"))
        if upload is None:
            raise Refused(404, "", "The file for this url was not found")
        if upload.expires_at < time.time():
            raise Refused(410, "", "The file for this url no longer exists")
        return upload

    async def tus_head(self, request: Request) -> Response:
        upload = self._upload(request)
        headers = {"Upload-Offset": str(len(upload.data)), "Upload-Length": str(upload.size)}
        return Response(None, 200, TUS_VERSION | headers | {"Cache-Control": "no-store"})

    async def tus_patch(self, request: Request) -> Response:
        upload = self._upload(request)
        self._may_upload(request, upload.bucket, upload.name)
        if request.headers["content-type"] != "application/offset+octet-stream":
            raise Refused(403, "", "Content-Type header required")
        if int(request.headers["upload-offset"]) != len(upload.data):
            raise Refused(409, "", "Upload-Offset conflict")
        data = await body(request)
        self.state.largest_body = max(self.state.largest_body, len(data))
        if len(upload.data) + len(data) > upload.size:
            raise Refused(413, "", "Maximum size exceeded")
        upload.data += data
        headers = {"Upload-Offset": str(len(upload.data))}
        if len(upload.data) == upload.size:
            objects = self.state.bucket(upload.bucket).objects
            if upload.name in objects and not upload.upsert:
                raise duplicate()
            objects[upload.name] = StoredObject(bytes(upload.data), upload.content_type)
            headers["Tus-Complete"] = "1"
        return Response(None, 204, TUS_VERSION | headers)


def make_app(state: StandIn) -> Starlette:
    api = Api(state)

    def route(path: str, method: str, act: Callable[[Request], Awaitable[Response]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await state.handle(request, act)
            except Refused as refused:
                if "/upload/resumable" in path:
                    return PlainTextResponse(refused.message, refused.status, TUS_VERSION)
                return refused.response()
            except ClientDisconnect:
                return Response()

        return Route(f"/storage/v1{path}", endpoint, methods=[method])

    file = "/{bucket}/{name:path}"
    tus = "/upload/resumable"
    return Starlette(
        routes=[
            route("/bucket", "POST", api.create_bucket),
            route("/bucket", "GET", api.list_buckets),
            route("/bucket/{bucket}", "GET", api.get_bucket),
            route("/bucket/{bucket}", "PUT", api.update_bucket),
            route(f"/object/upload/sign{file}", "POST", api.sign_upload),
            route(f"/object/upload/sign{file}", "PUT", api.upload_signed),
            route(f"/object/sign{file}", "POST", api.sign),
            route(f"/object/sign{file}", "GET", api.download),
            route(f"/object/info{file}", "GET", api.info),
            route("/object/list/{bucket}", "POST", api.list),
            route("/object/{bucket}", "DELETE", api.remove),
            route(f"/object{file}", "POST", api.create),
            route(tus, "POST", api.tus_create),
            route(f"{tus}/sign", "POST", api.tus_create),
            route(f"{tus}/sign/{{upload:path}}", "HEAD", api.tus_head),
            route(f"{tus}/sign/{{upload:path}}", "PATCH", api.tus_patch),
            route(f"{tus}/{{upload:path}}", "HEAD", api.tus_head),
            route(f"{tus}/{{upload:path}}", "PATCH", api.tus_patch),
        ]
    )


@contextmanager
def serving(state: StandIn) -> Iterator[StandIn]:
    """Serve on loopback, from a thread; set ``url``."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            state.transports[transport.get_extra_info("peername")[:2]] = transport
            super().connection_made(transport)

    config = uvicorn.Config(
        make_app(state), port=0, log_config=None, http=Protocol, lifespan="off",
        timeout_graceful_shutdown=0,
    )  # fmt: skip
    server = uvicorn.Server(config)
    started = threading.Event()
    startup = server.startup

    async def start(sockets: Any = None) -> None:
        await startup(sockets)
        started.set()

    server.startup = start  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(60)
    state.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.should_exit = True
        thread.join()


async def pieces(data: bytes, size: int = 64 * 1024) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
