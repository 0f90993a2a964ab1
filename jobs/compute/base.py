"""Where calls run, and what there is to call.

A *call* outlives whoever started it: its id is all that it takes to wait for it, so a new attempt
at a job goes on with the calls of the last one. Two functions can be called:

- ``prepare`` fetches a recording, checks it, decodes it to a file on the compute side and plans
  its spans;
- ``transcribe`` transcribes one span of such a file. Doing it twice has the same result.

What a function finds wrong is a value, not an exception: remote errors lose their types on the
way. Both return a mapping with ``usage`` and one of ``plan``, ``transcript`` or ``error``, and
``steps`` since there is tracing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from jobs.errors import TranscriptionFailed
from jobs.telemetry import Steps
from modal_functions.plan import Span
from modal_functions.transcript import TranscriptionOptions

OnProgress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Prepare:
    """Call ``prepare``. ``source`` is what ffmpeg can read; ``key`` begins the file's name.

    Each call makes a file of its own, so nobody deletes what another one reads.

    ``max_seconds`` is the longest that the recording may be. Its spans are ``min_span`` to
    ``max_span`` seconds long, or what the compute side finds best.
    """

    source: str
    key: str
    preprocessing: bool
    max_seconds: float
    min_span: float | None = None
    max_span: float | None = None


@dataclass(frozen=True, slots=True)
class Transcribe:
    """Call ``transcribe``. ``pcm`` is the plan's."""

    pcm: str
    span: Span
    options: TranscriptionOptions


@dataclass(frozen=True, slots=True)
class Usage:
    """What a call took, in seconds of a machine with and of one without a GPU."""

    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call returned: a plan's or a transcript's ``to_dict()``, and what it took.

    ``steps``: what it was busy with meanwhile, where the function says so.
    """

    value: dict[str, Any]
    usage: Usage
    steps: Steps | None = None

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Self:
        """Read a function's return value. Raises ``TranscriptionFailed`` where that is an error."""
        if error := answer.get("error"):
            raise TranscriptionFailed(**error, **answer["usage"])
        value = answer["plan"] if "plan" in answer else answer["transcript"]
        return cls(value, Usage(**answer["usage"]), Steps.from_answer(answer))


class Compute(Protocol):
    """Runs calls somewhere. Use as an async context manager.

    Every method has a deadline of its own and raises ``ComputeUnavailable`` where the other side
    does not answer; the call then goes on, and may be waited for again.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def spawn(self, request: Prepare | Transcribe) -> str:
        """Start a call and return its id.

        Where no answer arrives, a call may have been started whose id nobody knows.
        """
        ...

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:
        """Wait for a call's end. Cancelling the wait leaves the call running.

        ``on_progress`` gets the share that is done, 0 to 1, where the other side reports it.
        Raises ``CallLost`` where the call will never return anything, so that it has to be started
        again, and ``TranscriptionFailed`` with what the function itself reported.
        """
        ...

    async def cancel(self, call_id: str) -> None:
        """Stop a call, if it still runs; its result is then lost."""
        ...

    async def discard(self, pcm: str) -> None:
        """Delete a file that ``prepare`` decoded, a plan's ``pcm``, if it is there."""
        ...
