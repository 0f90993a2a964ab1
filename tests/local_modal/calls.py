"""Taking calls and handing out their results."""

import asyncio
import time

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.local_modal.blobs import Blobs
from tests.local_modal.call import Call
from tests.local_modal.deployments import Deployments
from tests.local_modal.journal import Journal, describe_arguments
from tests.local_modal.pools import Pools
from tests.local_modal.settings import Settings

SUCCESS = pb.GenericResult.GENERIC_STATUS_SUCCESS


class Calls:
    """The part of the control plane that takes calls and hands out results."""

    def __init__(
        self,
        settings: Settings,
        deployments: Deployments,
        blobs: Blobs,
        pools: Pools,
        journal: Journal,
    ) -> None:
        self._settings = settings
        self._deployments = deployments
        self._blobs = blobs
        self._pools = pools
        self._journal = journal
        self._calls: dict[str, Call] = {}
        self._by_key: dict[str, Call] = {}
        self._ends_to_come: list[tuple[str, pb.GenericResult]] = []

    def find(self, call_id: str) -> Call:
        if call_id not in self._calls:
            raise GRPCError(Status.NOT_FOUND, f"Function call {call_id} not found")
        return self._calls[call_id]

    def all(self) -> list[Call]:
        return list(self._calls.values())

    def reset(self) -> None:
        """Forget all calls."""
        for call in self._calls.values():
            call.finish(pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED))
        self._pools.reset()
        self._calls.clear()
        self._by_key.clear()
        self._ends_to_come.clear()

    def lose(self, call_id: str) -> None:
        call = self.find(call_id)
        del self._calls[call_id]
        call.done.set()
        self._pools.cancel(call, at_once=True)
        self._journal.add("lost", call_id=call_id, function=call.name)

    def end(self, call: Call, result: pb.GenericResult) -> None:
        """Give a call a result that no container gave."""
        if call.finish(result):
            self._journal.add("ended", call_id=call.call_id, function=call.name, status=call.status)
            self._pools.cancel(call, at_once=True)

    def end_next(self, function: str, result: pb.GenericResult, times: int) -> None:
        self._ends_to_come += [(function, result)] * times

    async def function_map(
        self, request: pb.FunctionMapRequest, idempotency_key: str
    ) -> pb.FunctionMapResponse:
        call = self._by_key.get(idempotency_key) or self._start(request, idempotency_key)
        answer = pb.FunctionPutInputsResponseItem(idx=0, input_id=call.input_id, input_jwt="local")
        return pb.FunctionMapResponse(
            function_call_id=call.call_id,
            function_call_jwt="local",
            pipelined_inputs=[answer],
            retry_policy=call.function.definition.retry_policy,
        )

    def _start(self, request: pb.FunctionMapRequest, idempotency_key: str) -> Call:
        if len(request.pipelined_inputs) != 1:
            raise GRPCError(Status.UNIMPLEMENTED, "Only spawn and remote are served: one input")
        call = Call(
            self._deployments.find(request.function_id),
            request.pipelined_inputs[0].input,
            request.function_call_invocation_type,
        )
        self._calls[call.call_id] = call
        self._by_key[idempotency_key] = call
        arguments = describe_arguments(self._arguments(call), call.input.data_format)
        self._journal.add("spawned", call_id=call.call_id, function=call.name, **arguments)
        self._enqueue(call)
        return call

    def _arguments(self, call: Call) -> bytes:
        if call.input.WhichOneof("args_oneof") == "args_blob_id":
            return self._blobs.get(call.input.args_blob_id)
        return call.input.args

    def _enqueue(self, call: Call) -> None:
        for planned in self._ends_to_come:
            if planned[0] == call.name:
                self._ends_to_come.remove(planned)
                self.end(call, planned[1])
                return
        self._pools.submit(call)

    async def function_get_outputs(self, request: pb.FunctionGetOutputsRequest) -> Message:
        """Wait for the result as long as the client asks for."""
        call = self.find(request.function_call_id)
        try:
            async with asyncio.timeout(request.timeout):
                await call.done.wait()
                self.find(call.call_id)  # it may have been lost meanwhile
                if self._expired(call):
                    # An answer at once would make the client ask again at once.
                    await asyncio.sleep(request.timeout)
        except TimeoutError:
            pass
        response = pb.FunctionGetOutputsResponse(
            last_entry_id="0-0", num_unfinished_inputs=int(call.output is None)
        )
        if call.output is not None and not self._expired(call):
            response.outputs.append(call.output)
            call.expired = request.clear_on_success and call.output.result.status == SUCCESS
        return response

    def _expired(self, call: Call) -> bool:
        old = call.output is not None and call.finished_at + self._settings.result_ttl < time.time()
        return call.expired or old

    async def function_call_cancel(self, request: pb.FunctionCallCancelRequest) -> Message:
        call = self.find(request.function_call_id)
        cancelled = pb.GenericResult(
            status=pb.GenericResult.GENERIC_STATUS_TERMINATED,
            exception="Input was cancelled by user",
        )
        if call.finish(cancelled):
            self._journal.add("cancelled", call_id=call.call_id, function=call.name)
            self._pools.cancel(call, at_once=request.terminate_containers)
        return Empty()

    async def function_call_from_id(self, request: pb.FunctionCallFromIdRequest) -> Message:
        call = self.find(request.function_call_id)
        return pb.FunctionCallFromIdResponse(
            function_call_id=call.call_id,
            num_inputs=1,
            metadata=pb.FunctionCallHandleMetadata(
                app_id=call.function.app_id, function_id=call.function.function_id
            ),
        )
