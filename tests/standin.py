"""Stands in for the routes that the API does not have yet, as their contract describes them.

Jobs are scripted, not run. Uploads are real: signed PUT, and TUS (https://tus.io) as far as
Supabase Storage speaks it. Once the app has a route, its tests belong on the app.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote
from uuid import UUID, uuid4

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

TRANSCRIPT = {
    "text": "Hello there.",
    "language": "en",
    "duration": 2.0,
    "model": "tiny",
    "engine": "faster-whisper",
    "segments": [],
}


def job_row(job_id: UUID, **values: Any) -> dict[str, Any]:
    """Return a job as ``GET /jobs/{id}`` does."""
    now = datetime.now(UTC).isoformat()
    empty = dict.fromkeys(
        ("scheduled_at", "started_at", "completed_at", "max_attempts", "idempotency_key", "due_at",
         "cancel_requested_at", "retry_requested_at", "audio_seconds", "estimated_seconds", "usage",
         "note", "error_code", "error", "result")
    )  # fmt: skip
    user_id = str(UUID(int=1))
    return empty | {
        "id": str(job_id), "created_at": now, "updated_at": now, "user_id": user_id,
        "job_id": "1", "file_path": f"{user_id}/talk.mp3", "options": {}, "status": "queued",
        "audio_url": None, "webhook_url": None, "progress": 0.0, "attempt": 0, "priority": 0,
    } | values  # fmt: skip


def event(name: str, event_id: str, **data: Any) -> bytes:
    """Return an event as it is on the wire."""
    return f"event: {name}\r\nid: {event_id}\r\ndata: {json.dumps(data)}\r\n\r\n".encode()


def problem(status: int, code: str, **more: Any) -> Response:
    """Return a problem as the app does."""
    content = {"status": status, "code": code, "detail": code.replace("_", " ")} | more
    return JSONResponse(content, status, media_type="application/problem+json")


@dataclass
class Standin:
    """What it has and was told. ``streams``: what each connection to a job's events brings next."""

    jobs: dict[UUID, dict[str, Any]] = field(default_factory=dict)
    streams: list[list[bytes]] = field(default_factory=list)
    resumed_from: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    partial: dict[str, tuple[int, bytearray, str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    keys: dict[str, UUID] = field(default_factory=dict)
    expire: bool = False  # the next HEAD finds no upload
    location: str = ""  # where uploads are said to be; by default where they are

    def app(self) -> Starlette:
        """Return the app."""
        return Starlette(
            routes=[
                Route("/uploads", self.ticket, methods=["POST"]),
                Route("/uploads/signed/{path:path}", self.put, methods=["PUT"]),
                Route("/resumable", self.create, methods=["POST"]),
                Route("/resumable/{name}", self.resume, methods=["HEAD", "PATCH"]),
                Route("/process/batch", self.batch, methods=["POST"]),
                Route("/jobs", self.list, methods=["GET"]),
                Route("/jobs/{job_id:uuid}", self.job, methods=["GET", "DELETE"]),
                Route("/jobs/{job_id:uuid}/events", self.events),
                Route("/jobs/{job_id:uuid}/transcript.{form}", self.transcript),
                Route("/jobs/{job_id:uuid}/audio", self.audio),
                Route("/audio/{path:path}", self.signed_audio),
                Route("/search", self.search),
            ]
        )

    def add(self, **values: Any) -> UUID:
        """Add a job."""
        job_id = uuid4()
        self.jobs[job_id] = job_row(job_id, **values)
        return job_id

    def _authorize(self, request: Request) -> None:
        scheme, _, token = request.headers["authorization"].partition(" ")
        assert scheme == "Bearer"
        self.tokens.append(token)

    # Uploads

    async def ticket(self, request: Request) -> Response:
        self._authorize(request)
        wanted = await request.json()
        assert set(wanted) == {"name", "size", "contentType"}
        path = f"{UUID(int=1)}/{uuid4()}/{wanted['name']}"
        ticket: dict[str, Any] = {"filePath": path, "expiresAt": datetime.now(UTC).isoformat()}
        if wanted["size"] > 1000:
            ticket |= {
                "method": "TUS", "url": f"{request.base_url}resumable", "chunkSize": 1000,
                "headers": {"x-signature": "secret"},
                "metadata": {"objectName": path, "contentType": wanted["contentType"]},
            }  # fmt: skip
        else:
            ticket |= {
                "method": "PUT", "url": f"/uploads/signed/{path}?token=secret",
                "headers": {"content-type": wanted["contentType"]},
            }  # fmt: skip
        return JSONResponse(ticket, HTTPStatus.CREATED)

    async def put(self, request: Request) -> Response:
        path = unquote(request.path_params["path"])
        assert "authorization" not in request.headers
        assert request.query_params["token"] == "secret"
        body = await request.body()
        if path in self.files:
            return problem(409, "file_exists")
        self.files[path] = body
        return JSONResponse({"filePath": path, "size": len(body)}, HTTPStatus.CREATED)

    def _check_tus(self, request: Request) -> None:
        assert request.headers["tus-resumable"] == "1.0.0"
        assert request.headers["x-signature"] == "secret"
        assert "authorization" not in request.headers

    async def create(self, request: Request) -> Response:
        self._check_tus(request)
        pairs = (pair.split(" ") for pair in request.headers["upload-metadata"].split(","))
        metadata = {name: base64.b64decode(value).decode() for name, value in pairs}
        if metadata["objectName"] in self.files:
            # Supabase: https://supabase.com/docs/guides/storage/debugging/error-codes
            return Response("The resource already exists", HTTPStatus.CONFLICT)
        name = uuid4().hex
        size = int(request.headers["upload-length"])
        self.partial[name] = (size, bytearray(), metadata["objectName"])
        location = self.location or f"{request.base_url}resumable"
        return Response(status_code=HTTPStatus.CREATED, headers={"location": f"{location}/{name}"})

    async def resume(self, request: Request) -> Response:
        self._check_tus(request)
        if request.method == "HEAD" and self.expire:
            self.expire = False
            self.partial.clear()
        name = request.path_params["name"]
        if name not in self.partial:
            return Response(status_code=HTTPStatus.GONE)
        size, received, path = self.partial[name]
        if request.method == "PATCH":
            assert request.headers["content-type"] == "application/offset+octet-stream"
            if int(request.headers["upload-offset"]) != len(received):
                return Response(status_code=HTTPStatus.CONFLICT)
            received += await request.body()
            if len(received) == size:
                self.files[path] = bytes(received)
        return Response(
            status_code=HTTPStatus.NO_CONTENT if request.method == "PATCH" else HTTPStatus.OK,
            headers={"upload-offset": str(len(received)), "upload-length": str(size)},
        )

    # Jobs

    async def batch(self, request: Request) -> Response:
        self._authorize(request)
        ids = []
        for job in (await request.json())["jobs"]:
            key = job["idempotencyKey"]
            if key not in self.keys:
                self.keys[key] = self.add(file_path=job["filePath"], idempotency_key=key)
            ids.append(self.keys[key])
        jobs = [{"jobId": str(job), "status": "queued", "message": ""} for job in ids]
        return JSONResponse({"jobs": jobs}, HTTPStatus.ACCEPTED)

    async def list(self, request: Request) -> Response:
        first = int(request.query_params.get("cursor", "0"))
        end = first + int(request.query_params["limit"])
        jobs = list(self.jobs.values())
        page = [{k: v for k, v in job.items() if k != "result"} for job in jobs[first:end]]
        return JSONResponse({"jobs": page, "next_cursor": str(end) if end < len(jobs) else None})

    async def job(self, request: Request) -> Response:
        job_id = request.path_params["job_id"]
        if job_id not in self.jobs:
            return problem(404, "job_not_found")
        if request.method == "DELETE":
            del self.jobs[job_id]
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return JSONResponse(self.jobs[job_id])

    async def events(self, request: Request) -> Response:
        self._authorize(request)
        if request.path_params["job_id"] not in self.jobs:
            return problem(404, "job_not_found")
        self.resumed_from.append(request.headers.get("last-event-id", ""))
        chunks = self.streams.pop(0)

        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk
                await asyncio.sleep(0)

        return StreamingResponse(body(), media_type="text/event-stream")

    async def transcript(self, request: Request) -> Response:
        form = request.path_params["form"]
        if form == "json":
            return JSONResponse(TRANSCRIPT)
        return PlainTextResponse(f"{form}: Grüße")

    async def audio(self, request: Request) -> Response:
        self._authorize(request)
        path = self.jobs[request.path_params["job_id"]]["file_path"]
        return RedirectResponse(f"/audio/{path}?token=secret", HTTPStatus.TEMPORARY_REDIRECT)

    async def signed_audio(self, request: Request) -> Response:
        assert "authorization" not in request.headers
        path = request.path_params["path"]
        return Response(self.files[path], media_type="audio/mpeg")

    async def search(self, request: Request) -> Response:
        hit = {"start": 1.5, "end": 3, "text": request.query_params["q"]}
        shown = ("id", "created_at", "file_path", "audio_seconds")
        results = [
            {name: job[name] for name in shown} | {"language": "en", "hits": [hit]}
            for job in self.jobs.values()
        ]
        return JSONResponse({"results": results, "next_cursor": None})
