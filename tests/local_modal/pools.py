"""Which container runs which call: one pool of containers for each function and variant."""

import asyncio
from collections import deque

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from modal_proto import api_pb2 as pb

from tests.local_modal.call import Call
from tests.local_modal.containers import Container, Launcher
from tests.local_modal.deployments import Deployed
from tests.local_modal.journal import Journal
from tests.local_modal.settings import Settings

DEFAULT_TIMEOUT = 300.0  # seconds, as at Modal
HEARTBEAT = 10.0  # seconds that a container's heartbeat waits for cancellations

RETRIED = (pb.GenericResult.GENERIC_STATUS_FAILURE, pb.GenericResult.GENERIC_STATUS_TIMEOUT)


class Pool:
    def __init__(self, function: Deployed, settings: Settings) -> None:
        scaling = function.definition.autoscaler_settings
        self.function = function
        self.limit = scaling.max_containers or settings.containers
        self.scaledown_window = scaling.scaledown_window or settings.scaledown_window
        self.timeout = float(function.definition.timeout_secs or DEFAULT_TIMEOUT)
        self.queue: deque[Call] = deque()
        self.containers: list[Container] = []
        self.waiting: dict[Container, asyncio.Future[Call | None]] = {}
        self.failed_starts = 0

    @property
    def wanted(self) -> int:
        """How many more containers would be of use, and are allowed."""
        coming = sum(container.will_ask for container in self.containers)
        return min(len(self.queue) - coming, self.limit - len(self.containers))


class Pools:
    """Starts containers for calls, gives them inputs and takes their outputs."""

    def __init__(self, settings: Settings, launcher: Launcher, journal: Journal) -> None:
        self.paused = False
        self._settings = settings
        self._launcher = launcher
        self._journal = journal
        self._pools: dict[str, Pool] = {}
        self._running: dict[Container, asyncio.Task[None]] = {}

    # Calls come and go.

    def submit(self, call: Call) -> None:
        pool = self._pool(call.function)
        pool.function = call.function  # as deployed last; containers that run keep what they had
        pool.queue.append(call)
        self._dispatch(pool)

    def cancel(self, call: Call, *, at_once: bool) -> None:
        """End the work on a call: by an exception in its container, or by killing that."""
        queue = self._pool(call.function).queue
        if call in queue:
            queue.remove(call)
        for container in self.containers():
            if container.call is not call:
                continue
            if at_once:
                container.kill("cancelled")
            else:
                container.ask_to_cancel(call)
                loop = asyncio.get_running_loop()
                loop.call_later(self._settings.cancel_grace, self._end_grace, container, call)

    @staticmethod
    def _end_grace(container: Container, call: Call) -> None:
        if container.call is call:
            container.kill("cancelled")

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        for pool in self._pools.values():
            self._dispatch(pool)

    def preempt(self, call: Call) -> None:
        for container in self.containers():
            if container.call is call:
                container.kill("preempted")
                return
        raise LookupError(f"{call.call_id} does not run")

    def containers(self) -> list[Container]:
        return list(self._running)

    def container(self, task_id: str) -> Container | None:
        return next((each for each in self._running if each.task_id == task_id), None)

    def reset(self) -> None:
        """Drop all calls, and the containers that have one."""
        for pool in self._pools.values():
            pool.queue.clear()
        for container in self.containers():
            if container.call is not None:
                container.release()
                container.kill("reset")
        self.resume()

    async def close(self) -> None:
        self.pause()
        for container in self.containers():
            container.kill("closed")
        if self._running:
            await asyncio.wait(self._running.values())

    # Containers come and go.

    def _pool(self, function: Deployed) -> Pool:
        if function.function_id not in self._pools:
            self._pools[function.function_id] = Pool(function, self._settings)
        return self._pools[function.function_id]

    def _dispatch(self, pool: Pool) -> None:
        if self.paused:
            return
        while pool.queue and pool.waiting:
            container, asked = pool.waiting.popitem()
            if not asked.done():
                self._give(pool, container, pool.queue.popleft())
                asked.set_result(container.call)
        for _ in range(pool.wanted):
            container = Container(pool.function)
            pool.containers.append(container)
            self._running[container] = asyncio.create_task(self._run(pool, container))

    async def _run(self, pool: Pool, container: Container) -> None:
        await self._launcher.launch(container)
        assert container.process is not None
        await container.process.wait()
        self._record("container ended", container, killed=container.killed)
        pool.containers.remove(container)
        del self._running[container]
        self._start_failed(pool, container)
        self._take_back(pool, container)
        self._dispatch(pool)

    def _start_failed(self, pool: Pool, container: Container) -> None:
        """Fail what waits once containers have failed to start again and again."""
        if container.ready or container.killed:
            return
        pool.failed_starts += 1
        if pool.failed_starts < self._settings.init_attempts:
            return
        pool.failed_starts = 0
        result = container.failure or pb.GenericResult(
            status=pb.GenericResult.GENERIC_STATUS_INIT_FAILURE,
            exception=f"Container {container.task_id} did not start",
        )
        while pool.queue:
            self._finish(pool.queue.popleft(), result)

    def _take_back(self, pool: Pool, container: Container) -> None:
        """Queue the input of a container that is gone, before all others."""
        call = container.call
        container.release()
        if call is None or call.output is not None:
            return
        call.crashes += 1
        limit = self._settings.max_crashes
        if limit is None or call.crashes <= limit:
            pool.queue.appendleft(call)
        else:
            exception = "The container crashed too often"
            status = pb.GenericResult.GENERIC_STATUS_FAILURE
            self._finish(call, pb.GenericResult(status=status, exception=exception))

    def _give(self, pool: Pool, container: Container, call: Call) -> None:
        call.starts += 1
        container.call = call
        loop = asyncio.get_running_loop()
        container.timer = loop.call_later(pool.timeout, self._time_out, pool, container, call)
        self._record("started", container, attempt=call.starts)

    def _time_out(self, pool: Pool, container: Container, call: Call) -> None:
        container.release()
        container.kill("timeout")
        text = f"Task's current input {call.input_id} hit its timeout of {pool.timeout:g}s"
        status = pb.GenericResult.GENERIC_STATUS_TIMEOUT
        self._settle(call, pb.GenericResult(status=status, exception=text), None)

    def _settle(
        self, call: Call, result: pb.GenericResult, data_format: "pb.DataFormat.ValueType | None"
    ) -> None:
        """Finish a call, or retry it if it failed and its function says so."""
        policy = call.function.definition.retry_policy
        if result.status not in RETRIED or call.retries >= policy.retries or call.output:
            self._finish(call, result, data_format)
            return
        delay = policy.initial_delay_ms / 1000 * (policy.backoff_coefficient or 1) ** call.retries
        call.retries += 1
        asyncio.get_running_loop().call_later(delay, self._retry, call)

    def _retry(self, call: Call) -> None:
        if call.output is None:
            self.submit(call)

    def _finish(
        self,
        call: Call,
        result: pb.GenericResult,
        data_format: "pb.DataFormat.ValueType | None" = None,
    ) -> None:
        if call.finish(result, data_format):
            self._journal.add(
                "finished", call_id=call.call_id, function=call.name, status=call.status
            )

    def _record(self, event: str, container: Container, **fields: object) -> None:
        call = container.call
        self._journal.add(
            event,
            call_id=call.call_id if call else None,
            function=call.name if call else container.function.name,
            container=container.task_id,
            pid=container.pid,
            **fields,
        )

    # What containers ask for.

    async def container_hello(self, _request: Message, _container: Container) -> Message:
        return Empty()

    async def container_heartbeat(
        self, _request: pb.ContainerHeartbeatRequest, container: Container
    ) -> Message:
        input_ids = await container.cancellations(HEARTBEAT)
        if not input_ids:
            return pb.ContainerHeartbeatResponse()
        event = pb.CancelInputEvent(input_ids=input_ids)
        return pb.ContainerHeartbeatResponse(cancel_input_event=event)

    async def function_get_inputs(
        self, _request: pb.FunctionGetInputsRequest, container: Container
    ) -> Message:
        pool = self._pool(container.function)
        pool.failed_starts = 0
        container.ready = True
        call = await self._next_call(pool, container)
        if call is None:
            item = pb.FunctionGetInputsItem(kill_switch=True)
        else:
            item = pb.FunctionGetInputsItem(
                input_id=call.input_id,
                input=call.input,
                function_call_id=call.call_id,
                function_call_invocation_type=call.invocation_type,
                retry_count=call.retries,
            )
        return pb.FunctionGetInputsResponse(inputs=[item])

    async def _next_call(self, pool: Pool, container: Container) -> Call | None:
        """Wait for a call, or for the order to scale down."""
        loop = asyncio.get_running_loop()
        asked = pool.waiting[container] = loop.create_future()
        self._dispatch(pool)
        scale_down = loop.call_later(pool.scaledown_window, _answer_nothing, asked)
        try:
            call: Call | None = await asked
            container.leaving = call is None
            return call
        finally:
            scale_down.cancel()
            pool.waiting.pop(container, None)

    async def function_put_outputs(
        self, request: pb.FunctionPutOutputsRequest, container: Container
    ) -> Message:
        for output in request.outputs:
            call = container.call
            if call is None or call.input_id != output.input_id:
                continue
            self._record("output", container, attempt=call.starts)
            container.leaving = container.function.definition.single_use_containers
            container.release()
            self._settle(call, output.result, output.data_format)
        return Empty()

    async def task_result(self, request: pb.TaskResultRequest, container: Container) -> Message:
        container.failure = request.result
        return Empty()


def _answer_nothing(asked: "asyncio.Future[Call | None]") -> None:
    if not asked.done():
        asked.set_result(None)
