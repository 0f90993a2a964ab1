"""The gRPC front: who calls, what it asks for, and what is to go wrong with it."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Stream
from modal_proto import api_pb2 as pb

from tests.local_modal.blobs import Blobs
from tests.local_modal.calls import Calls
from tests.local_modal.containers import TASK_HEADER, Container
from tests.local_modal.deployments import Deployments
from tests.local_modal.faults import CUT, Fault, Faults, When
from tests.local_modal.pools import Pools
from tests.local_modal.settings import Settings

SERVICE = pb.DESCRIPTOR.services_by_name["ModalClient"]

ServerStream = Stream[Message, Message]
Method = Callable[[Any], Awaitable[Message]]
ContainerMethod = Callable[[Any, Container], Awaitable[Message]]


class Requests:
    """Counts what clients ask for; containers and deployments do not count."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._news = asyncio.Event()

    def add(self, rpc: str) -> None:
        self.counts[rpc] += 1
        self._news.set()
        self._news = asyncio.Event()

    async def wait(self, rpc: str, count: int) -> None:
        while self.counts[rpc] < count:
            await self._news.wait()


class Gateway:
    """A grpclib service of those RPCs that are named here; all others are UNIMPLEMENTED."""

    def __init__(
        self,
        settings: Settings,
        deployments: Deployments,
        calls: Calls,
        pools: Pools,
        blobs: Blobs,
        faults: Faults,
        cut: Callable[[], None],
    ) -> None:
        self.requests = Requests()
        self._settings = settings
        self._pools = pools
        self._calls = calls
        self._faults = faults
        self._cut = cut
        self._methods: dict[str, Method] = {
            "ClientHello": _hello,
            "WorkspaceNameLookup": _workspace,
            "FunctionGet": deployments.function_get,
            "ClassGet": deployments.class_get,
            "FunctionBindParams": deployments.function_bind_params,
            "FunctionGetOutputs": calls.function_get_outputs,
            "FunctionCallCancel": calls.function_call_cancel,
            "FunctionCallFromId": calls.function_call_from_id,
            "BlobCreate": blobs.blob_create,
            "BlobGet": blobs.blob_get,
            # `modal deploy`
            "AppGetByDeploymentName": deployments.app_get_by_deployment_name,
            "AppCreate": deployments.app_create,
            "AppGetLayout": deployments.app_get_layout,
            "AppPublish": deployments.app_publish,
            "AppHeartbeat": _nothing,
            "AppClientDisconnect": _nothing,
            "FunctionPrecreate": deployments.function_precreate,
            "FunctionCreate": deployments.function_create,
            "ClassCreate": deployments.class_create,
            "EnvironmentGetOrCreate": deployments.environment_get_or_create,
            "ImageGetOrCreate": deployments.image_get_or_create,
            "MountGetOrCreate": deployments.mount_get_or_create,
            "MountPutFile": deployments.mount_put_file,
            "MountBatchedCheckExistence": deployments.mount_batched_check_existence,
            "VolumeGetOrCreate": deployments.volume_get_or_create,
            "VolumeCommit": deployments.volume_commit,
            "VolumeReload": _nothing,
            "SecretGetOrCreate": deployments.secret_get_or_create,
        }
        self._container_methods: dict[str, ContainerMethod] = {
            "ContainerHello": pools.container_hello,
            "ContainerHeartbeat": pools.container_heartbeat,
            "FunctionGetInputs": pools.function_get_inputs,
            "FunctionPutOutputs": pools.function_put_outputs,
            "TaskResult": pools.task_result,
        }

    def __mapping__(self) -> dict[str, Handler]:
        names = [*self._methods, "FunctionMap", *self._container_methods]
        return {f"/{SERVICE.full_name}/{name}": self._handler(name) for name in names}

    def _handler(self, name: str) -> Handler:
        method = SERVICE.methods_by_name[name]

        async def handle(stream: ServerStream) -> None:
            await self._serve(name, stream)

        return Handler(
            handle,
            Cardinality.UNARY_UNARY,
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
        )

    async def _serve(self, name: str, stream: ServerStream) -> None:
        container = self._authenticate(stream)
        request = await stream.recv_message()
        assert request is not None
        if container is not None:
            await stream.send_message(await self._perform(name, stream, request, container))
            return
        self.requests.add(name)
        fault = self._faults.take(name)
        await self._inject(fault, "before")
        response = await self._perform(name, stream, request, None)
        await self._inject(fault, "after")
        await stream.send_message(response)

    async def _inject(self, fault: Fault | None, when: When) -> None:
        if fault is None or fault.when != when:
            return
        await asyncio.sleep(fault.delay)
        if fault.status == CUT:
            self._cut()
        elif fault.status is not None:
            raise fault.error()

    def _authenticate(self, stream: ServerStream) -> Container | None:
        """Return the container that calls, or None for a client with the right token."""
        metadata = _metadata(stream)
        if TASK_HEADER in metadata:
            container = self._pools.container(metadata[TASK_HEADER])
            if container is None:
                raise GRPCError(Status.UNAUTHENTICATED, "No such container")
            return container
        token = (metadata.get("x-modal-token-id"), metadata.get("x-modal-token-secret"))
        if token != (self._settings.token_id, self._settings.token_secret):
            raise GRPCError(Status.UNAUTHENTICATED, "Token ID or secret is not valid")
        return None

    async def _perform(
        self, name: str, stream: ServerStream, request: Message, container: Container | None
    ) -> Message:
        if name in self._container_methods:
            if container is None:
                raise GRPCError(Status.PERMISSION_DENIED, f"{name} is for containers")
            return await self._container_methods[name](request, container)
        if name == "FunctionMap":
            assert isinstance(request, pb.FunctionMapRequest)
            return await self._calls.function_map(request, _metadata(stream)["x-idempotency-key"])
        return await self._methods[name](request)


def _metadata(stream: ServerStream) -> dict[str, str]:
    return {name: str(value) for name, value in (stream.metadata or {}).items()}


async def _hello(_request: Message) -> Message:
    return pb.ClientHelloResponse()


async def _workspace(_request: Message) -> Message:
    return pb.WorkspaceNameLookupResponse(workspace_name="local", username="local")


async def _nothing(_request: Message) -> Message:
    return Empty()
