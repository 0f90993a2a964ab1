"""What is too large for a message: PUT to and fetched from this server over HTTP."""

import base64
import hashlib

from aiohttp import web
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.local_modal.settings import new_id

LARGEST = 2**30


class Blobs:
    """``url`` must be set once the HTTP server knows its port."""

    def __init__(self) -> None:
        self.url = ""
        self._blobs: dict[str, bytes] = {}

    def routes(self) -> list[web.RouteDef]:
        return [web.put("/blobs/{id}", self._put), web.get("/blobs/{id}", self._get)]

    def get(self, blob_id: str) -> bytes:
        if blob_id not in self._blobs:
            raise GRPCError(Status.NOT_FOUND, f"Blob {blob_id} not found")
        return self._blobs[blob_id]

    async def blob_create(self, request: pb.BlobCreateRequest) -> Message:
        if request.content_length > LARGEST:
            raise GRPCError(Status.UNIMPLEMENTED, "No multipart uploads here")
        blob_id = new_id("bl")
        urls = pb.UploadUrlList(items=[f"{self.url}/blobs/{blob_id}"])
        return pb.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    async def blob_get(self, request: pb.BlobGetRequest) -> Message:
        self.get(request.blob_id)
        return pb.BlobGetResponse(download_url=f"{self.url}/blobs/{request.blob_id}")

    async def _put(self, request: web.Request) -> web.Response:
        data = await request.read()
        digest = hashlib.md5(data, usedforsecurity=False)
        expected = request.headers.get("Content-MD5")
        if expected and base64.b64decode(expected) != digest.digest():
            text = "The Content-MD5 you specified did not match what we received."
            return web.Response(status=400, text=text)
        self._blobs[request.match_info["id"]] = data
        return web.Response(headers={"ETag": f'"{digest.hexdigest()}"'})

    async def _get(self, request: web.Request) -> web.Response:
        data = self._blobs.get(request.match_info["id"])
        return web.Response(status=404) if data is None else web.Response(body=data)
