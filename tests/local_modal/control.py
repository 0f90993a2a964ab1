"""How a test controls a local Modal: in its own process or in another, the same way."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from tests.local_modal.faults import When
from tests.local_modal.journal import Event

PATIENCE = 60.0  # seconds for what takes a few on an idle machine


class Refused(Exception):
    """The server could not do it: no such call, nothing that runs, not within the time."""


class Control:
    def __init__(self, url: str) -> None:
        self._address = urlsplit(url).netloc

    def _do(self, command: str, **arguments: object) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=2 * PATIENCE)
        try:
            connection.request("POST", f"/control/{command}", json.dumps(arguments))
            response = connection.getresponse()
            body = response.read().decode()
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise Refused(f"{command} {arguments}: {body}")
        return json.loads(body)

    # What has happened.

    def events(self, event: str, **fields: object) -> list[Event]:
        """Return the execution log's events of this kind that have these fields.

        spawned (arguments, arguments_sha256), started (attempt, container, pid), output (container,
        pid), finished (status), cancelled, ended (status: by ``end``), lost, container ended.
        All but the last have call_id and function.
        """
        events: list[Event] = self._do("events", event=event, **fields)
        return events

    def wait(self, event: str, count: int = 1, **fields: object) -> list[Event]:
        """Return these events as soon as there are ``count``."""
        events: list[Event] = self._do("wait", event=event, count=count, seconds=PATIENCE, **fields)
        return events

    def calls(self) -> list[Event]:
        """Return call_id, function, status, starts and retries of all calls."""
        calls: list[Event] = self._do("calls")
        return calls

    def containers(self) -> list[Event]:
        """Return container, function, pid and call_id of the running containers."""
        containers: list[Event] = self._do("containers")
        return containers

    def definitions(self) -> dict[str, dict[str, Any]]:
        """Return modal_proto's Function of each "app/function", and its image's commands.

        What was left at its default is absent.
        """
        definitions: dict[str, dict[str, Any]] = self._do("definitions")
        return definitions

    def output(self, container: str) -> str:
        """Return what a container has written to stdout and stderr."""
        return str(self._do("output", container=container))

    def requests(self) -> dict[str, int]:
        """Return how many requests of each RPC clients have made."""
        requests: dict[str, int] = self._do("requests")
        return requests

    def wait_for_requests(self, rpc: str, count: int) -> None:
        """Return as soon as clients have made as many requests of this RPC."""
        self._do("wait_for_requests", rpc=rpc, count=count, seconds=PATIENCE)

    # What happens to calls.

    def reset(self) -> None:
        """Forget all calls, faults and events; deployments and idle containers stay."""
        self._do("reset")

    def pause(self) -> None:
        """Give no inputs to containers until ``resume``."""
        self._do("pause")

    def resume(self) -> None:
        self._do("resume")

    def preempt(self, call_id: str) -> None:
        """Kill the container that runs the call; another gets the same input."""
        self._do("preempt", call_id=call_id)

    def expire(self, call_id: str) -> None:
        """Forget the result, now or when it comes."""
        self._do("expire", call_id=call_id)

    def lose(self, call_id: str) -> None:
        """Forget the call: NOT_FOUND."""
        self._do("lose", call_id=call_id)

    def end(self, call_id: str, status: str, exception: str = "injected") -> None:
        """End a call with a GENERIC_STATUS, such as INTERNAL_FAILURE, TIMEOUT, INIT_FAILURE."""
        self._do("end", call_id=call_id, status=status, exception=exception)

    def end_next(
        self, function: str, status: str, *, exception: str = "injected", times: int = 1
    ) -> None:
        """End the next calls of a function so, before they run."""
        self._do("end_next", function=function, status=status, exception=exception, times=times)

    # What happens to requests.

    def fail(
        self,
        rpc: str,
        status: str | None,
        *,
        times: int = 1,
        when: When = "before",
        delay: float = 0.0,
        retry_after: float | None = None,
    ) -> None:
        """Answer the next requests of an RPC with a status, or reset the connection: "CUT".

        "after": the request has been performed, and its response is lost.
        """
        self._do(
            "fail",
            rpc=rpc,
            status=status,
            times=times,
            when=when,
            delay=delay,
            retry_after=retry_after,
        )

    def delay(self, rpc: str, seconds: float, *, times: int = 1, when: When = "before") -> None:
        self.fail(rpc, None, times=times, when=when, delay=seconds)

    def fail_builds(self, exception: str) -> None:
        """Let no image be built until ``heal``."""
        self._do("fail_builds", exception=exception)

    # What happens to connections; those of containers are spared.

    def cut(self) -> None:
        """Reset all connections."""
        self._do("cut")

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones until ``heal``."""
        self._do("refuse")

    def black_hole(self, seconds: float | None = None) -> None:
        """Accept what clients send and never answer; connections of that time stay dead."""
        self._do("black_hole", seconds=seconds)

    def hold(self, seconds: float | None = None) -> None:
        """Hold up what connections carry, and deliver it then."""
        self._do("hold", seconds=seconds)

    def heal(self) -> None:
        """End all faults of requests and connections."""
        self._do("heal")
