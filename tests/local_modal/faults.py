"""What can go wrong with requests, on purpose."""

from dataclasses import dataclass
from typing import Literal

from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

CUT = "CUT"  # instead of a status: all connections are reset
When = Literal["before", "after"]


@dataclass
class Fault:
    """What happens to the next ``times`` requests of an RPC, before or after they are performed.

    A status is answered; CUT resets all connections instead; none only delays.
    """

    rpc: str
    status: str | None = None
    times: int = 1
    when: When = "before"
    delay: float = 0.0
    retry_after: float | None = None

    def error(self) -> GRPCError:
        assert self.status is not None
        details: list[Message] = []
        if self.retry_after is not None:
            details.append(pb.RPCRetryPolicy(retry_after_secs=self.retry_after))
        return GRPCError(Status[self.status], f"injected for {self.rpc}", details or None)


class Faults:
    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        self._faults.append(fault)

    def clear(self) -> None:
        self._faults.clear()

    def take(self, rpc: str) -> Fault | None:
        for fault in self._faults:
            if fault.rpc == rpc:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                return fault
        return None
