"""A function call: what the client holds an id of. It has one input and at most one result."""

import asyncio
import time
from dataclasses import dataclass, field

from modal_proto import api_pb2 as pb

from tests.local_modal.deployments import Deployed
from tests.local_modal.settings import new_id


@dataclass(eq=False)
class Call:
    function: Deployed
    input: pb.FunctionInput
    invocation_type: "pb.FunctionCallInvocationType.ValueType"
    call_id: str = field(default_factory=lambda: new_id("fc"))
    input_id: str = field(default_factory=lambda: new_id("in"))
    starts: int = 0
    retries: int = 0
    crashes: int = 0
    output: pb.FunctionGetOutputsItem | None = None
    finished_at: float = 0.0
    expired: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The function as a reader of its source knows it: ``double``, ``Model.transcribe``."""
        name = self.function.name
        return name.replace("*", self.input.method_name) if self.input.method_name else name

    @property
    def status(self) -> str:
        if self.output is None:
            return "running" if self.starts else "queued"
        return str(pb.GenericResult.GenericStatus.Name(self.output.result.status))

    def finish(
        self, result: pb.GenericResult, data_format: "pb.DataFormat.ValueType | None" = None
    ) -> bool:
        """Take the result, unless there is one: the first wins between an output and a cancel."""
        if self.output is not None:
            return False
        self.finished_at = time.time()
        self.output = pb.FunctionGetOutputsItem(
            result=result,
            idx=0,
            input_id=self.input_id,
            retry_count=self.retries,
            output_created_at=self.finished_at,
        )
        if data_format is not None:
            self.output.data_format = data_format
        self.done.set()
        return True
