"""The fault controls: what a test does to the server, by JSON over HTTP, from any process."""

import asyncio
import inspect
from typing import Any

from aiohttp import web
from grpclib import GRPCError
from modal_proto import api_pb2 as pb

from tests.faults.proxy import Proxy
from tests.local_modal.calls import Calls
from tests.local_modal.containers import Launcher
from tests.local_modal.deployments import Deployments
from tests.local_modal.faults import Fault, Faults
from tests.local_modal.gateway import Requests
from tests.local_modal.journal import Event, Journal
from tests.local_modal.pools import Pools


class Operator:
    """Its public methods are the commands. ``control.py`` has their counterparts and says more."""

    def __init__(
        self,
        *,
        calls: Calls,
        pools: Pools,
        journal: Journal,
        faults: Faults,
        launcher: Launcher,
        deployments: Deployments,
        proxy: Proxy,
        requests: Requests,
    ) -> None:
        self._calls = calls
        self._pools = pools
        self._journal = journal
        self._faults = faults
        self._launcher = launcher
        self._deployments = deployments
        self._proxy = proxy
        self._requests = requests

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/control/{command}", self._handle)]

    async def _handle(self, request: web.Request) -> web.Response:
        name = request.match_info["command"]
        command = None if name.startswith("_") else getattr(self, name, None)
        if not inspect.iscoroutinefunction(command):
            raise web.HTTPNotFound
        try:
            return web.json_response(await command(**await request.json()))
        except (GRPCError, LookupError, ValueError, TimeoutError) as error:
            return web.Response(status=409, text=f"{type(error).__name__}: {error}")

    async def events(self, **fields: object) -> list[Event]:
        return self._journal.matching(**fields)

    async def wait(self, count: int, seconds: float, **fields: object) -> list[Event]:
        async with asyncio.timeout(seconds):
            return await self._journal.wait(count, **fields)

    async def wait_for_requests(self, rpc: str, count: int, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            await self._requests.wait(rpc, count)

    async def calls(self) -> list[dict[str, object]]:
        return [
            {
                "call_id": call.call_id,
                "function": call.name,
                "status": call.status,
                "starts": call.starts,
                "retries": call.retries,
            }
            for call in self._calls.all()
        ]

    async def containers(self) -> list[dict[str, object]]:
        return [
            {
                "container": container.task_id,
                "function": container.function.name,
                "pid": container.pid,
                "call_id": container.call.call_id if container.call else None,
            }
            for container in self._pools.containers()
        ]

    async def definitions(self) -> dict[str, dict[str, Any]]:
        return self._deployments.definitions()

    async def output(self, container: str) -> str:
        return self._launcher.log(container)

    async def requests(self) -> dict[str, int]:
        return dict(self._requests.counts)

    async def reset(self) -> None:
        await self.heal()
        self._calls.reset()
        self._journal.events.clear()
        self._requests.counts.clear()

    async def pause(self) -> None:
        self._pools.pause()

    async def resume(self) -> None:
        self._pools.resume()

    async def preempt(self, call_id: str) -> None:
        self._pools.preempt(self._calls.find(call_id))

    async def expire(self, call_id: str) -> None:
        self._calls.find(call_id).expired = True

    async def lose(self, call_id: str) -> None:
        self._calls.lose(call_id)

    async def end(self, call_id: str, status: str, exception: str) -> None:
        self._calls.end(self._calls.find(call_id), _result(status, exception))

    async def end_next(self, function: str, status: str, exception: str, times: int) -> None:
        self._calls.end_next(function, _result(status, exception), times)

    async def fail(self, **fault: Any) -> None:
        self._faults.add(Fault(**fault))

    async def fail_builds(self, exception: str) -> None:
        self._deployments.build_failure = exception

    async def black_hole(self, seconds: float | None) -> None:
        self._proxy.swallow()
        self._heal_after(seconds)

    async def hold(self, seconds: float | None) -> None:
        self._proxy.hold()
        self._heal_after(seconds)

    def _heal_after(self, seconds: float | None) -> None:
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self._proxy.heal)

    async def cut(self) -> None:
        self._proxy.cut()

    async def refuse(self) -> None:
        self._proxy.refuse()

    async def heal(self) -> None:
        self._proxy.heal()
        self._faults.clear()
        self._deployments.build_failure = None


def _result(status: str, exception: str) -> pb.GenericResult:
    value = pb.GenericResult.GenericStatus.Value(f"GENERIC_STATUS_{status}")
    return pb.GenericResult(status=value, exception=exception)
