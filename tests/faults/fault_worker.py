"""The real worker process, but its jobs do what their file's name says, and it can kill itself.

``<user>/sleep-0.3`` sleeps, ``<user>/poison`` kills the process, and so on: see ``ACTIONS``. Each
execution leaves lines in ``FAULT_LEDGER``. ``FAULT_KILL_AT`` names a step, such as "after the
claim", at which the process ends by SIGKILL; ``FAULT_CLOCK_OFFSET`` is how far its clock is off.
"""

import asyncio
import datetime as dt
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar
from uuid import uuid4

from jobs import queue, transcription, worker
from jobs.calls import Call, CallLog, Chunk, Known
from jobs.compute import local
from jobs.compute.base import OnProgress, Outcome, Prepare, Transcribe, Usage
from jobs.connection import QueueConnection
from jobs.errors import CallLost, EngineCrashed, PgscribeError
from jobs.models import Attempt, Segment, Transcript
from jobs.queue import Ended, Queue, Turn
from jobs.settings import Settings
from jobs.storage.base import AudioSource
from jobs.transcription import Transcriber
from modal_functions.plan import SAMPLE_RATE, Plan, Span

T = TypeVar("T")

KILL_AT = os.environ.get("FAULT_KILL_AT", "")
LEDGER = os.open(os.environ["FAULT_LEDGER"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
SOON = 0.001  # seconds: within a call to the database
AWKWARD = {"nul": "a\0b", "surrogate": "a\ud800b"}

attempt_of_task: ContextVar[Attempt] = ContextVar("attempt_of_task")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def note(event: str, attempt: Attempt) -> None:
    line = f"{event} {attempt.job_id} {attempt.number} {os.getpid()} {time.monotonic()}\n"
    os.write(LEDGER, line.encode())
    say(event, attempt.job_id, attempt.number)


async def sleep(_: Attempt, seconds: str) -> None:
    await asyncio.sleep(float(seconds or 0))


async def long_once(attempt: Attempt, seconds: str) -> None:
    """Take long, but only at the first attempt."""
    await asyncio.sleep(float(seconds) if attempt.number == 1 else 0.05)


async def stubborn(attempt: Attempt, seconds: str) -> None:
    """Take very long at the first attempt, and long to stop when told to; then take even longer."""
    if attempt.number > 1:
        await asyncio.sleep(3 * float(seconds))
        return
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(float(seconds))


async def poison(_: Attempt, seconds: str) -> None:
    """Kill the process, after a while."""
    await asyncio.sleep(float(seconds or 0))
    die()


async def retryable(attempt: Attempt, times: str) -> None:
    if attempt.number <= int(times):
        raise EngineCrashed


async def fail(_: Attempt, __: str) -> None:
    raise PgscribeError


async def cancelled(_: Attempt, __: str) -> None:
    """End as if something that the task waited for had been cancelled."""
    raise asyncio.CancelledError


async def succeed(_: Attempt, __: str) -> None:
    pass


Action = Callable[[Attempt, str], Awaitable[None]]
ACTIONS: dict[str, Action] = {
    "sleep": sleep,
    "long_once": long_once,
    "stubborn": stubborn,
    "poison": poison,
    "retryable": retryable,
    "fail": fail,
    "cancelled": cancelled,
}


class ScriptedCompute:
    """Calls that do what the file's name says, and are lost with this process."""

    def __init__(self, _: Settings) -> None:
        self._calls: dict[str, Prepare | Transcribe] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def spawn(self, request: Prepare | Transcribe) -> str:
        call_id = str(uuid4())
        self._calls[call_id] = request
        return call_id

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:
        if KILL_AT == "while a call runs":
            die()
        match self._calls.get(call_id):
            case None:
                raise CallLost
            case Prepare(source=source):
                plan = Plan(source, Path(source), (Span(0, 10 * SAMPLE_RATE),))
                return Outcome(plan.to_dict(), Usage(cpu_seconds=1.0))
            case Transcribe() as request:
                transcript = await self._transcribe(request, on_progress)
                return Outcome(transcript.to_dict(), Usage(gpu_seconds=1.0))

    @staticmethod
    async def _transcribe(request: Transcribe, on_progress: OnProgress) -> Transcript:
        attempt = attempt_of_task.get()
        action, _, argument = request.pcm.rpartition("/")[2].partition("-")
        on_progress(0.1)
        await ACTIONS.get(action, succeed)(attempt, argument)
        text = AWKWARD.get(action, f"{attempt.job_id} {attempt.number}")
        segment = Segment(0, 10, text, 0, 0, 1)
        if action == "nan":
            segment = NotANumber(0, 10, text, 0, 0, 1)
        return Transcript(text, "en", 10.0, (segment,), "scripted", request.options.model)

    async def cancel(self, call_id: str) -> None:
        pass

    async def discard(self, pcm: str) -> None:
        pass


class NotANumber(Segment):
    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"start": float("nan")}


class NoStorage:
    """Every file is there; FAULT_AUDIO is what is in all of them."""

    async def locate(self, file_path: str) -> str:
        if KILL_AT == "after the audio is located":
            die()
        return os.environ.get("FAULT_AUDIO", file_path)

    async def save(
        self,
        file_path: str,
        chunks: AsyncIterable[bytes],
        content_type: str | None = None,
        *,
        replace: bool = True,
    ) -> int:
        raise NotImplementedError

    async def size(self, file_path: str) -> int | None:
        raise NotImplementedError


class ScriptedTranscriber(Transcriber):
    def __init__(self, pool: Any, _: AudioSource, *arguments: Any) -> None:
        super().__init__(pool, NoStorage(), *arguments)

    async def run(self, attempt: Attempt, *, is_cancelled: Callable[[], bool]) -> Transcript:
        attempt_of_task.set(attempt)
        note("start", attempt)
        if KILL_AT == "while a job runs":
            die()
        transcript = await super().run(attempt, is_cancelled=is_cancelled)
        note("end", attempt)
        return transcript


class ScriptedCallLog(CallLog):
    async def store_plan(self, call: Call, outcome: Outcome) -> Known:
        known = await super().store_plan(call, outcome)
        if KILL_AT == "after the plan is stored":
            die()
        return known

    async def note_call(self, call: Call, call_id: str) -> None:
        if call.index is not None and KILL_AT == "before the call is noted":
            die()
        await super().note_call(call, call_id)
        if call.index is not None and KILL_AT == "after the call is noted":
            die()

    async def store_chunk(self, chunk: Chunk, outcome: Outcome) -> None:
        if KILL_AT == "during the chunk's storing":
            asyncio.get_running_loop().call_later(SOON, die)
        await super().store_chunk(chunk, outcome)
        if KILL_AT == "after the chunk is stored":
            die()

    async def note_usage(self, gpu_second_price: float, cpu_second_price: float) -> None:
        await super().note_usage(gpu_second_price, cpu_second_price)
        if KILL_AT == "after the usage is noted":
            die()

    async def forget_audio(self) -> None:
        await super().forget_audio()
        if KILL_AT == "after the audio is forgotten":
            die()


class ScriptedQueue(Queue):
    """Tells the test what it has done, unless it kills its process before that."""

    async def register(self) -> int:
        worker_id = await self._step("registering", super().register())
        say("registered", worker_id)
        return worker_id

    async def turn(
        self, worker_id: int, ended: Sequence[Ended], *arguments: Any, **options: Any
    ) -> Turn:
        say("turn")
        outcomes = {end.outcome for end in ended}
        turn = super().turn(worker_id, ended, *arguments, **options)
        if "succeeded" in outcomes:
            return await self._step("the end", turn)
        if "released" in outcomes:
            return await self._step("giving back", turn)
        return await self._step("the claim", turn, lambda turn: bool(turn.jobs))

    async def sign_off(self, worker_id: int) -> None:
        await self._step("signing off", super().sign_off(worker_id))

    @staticmethod
    async def _step(
        name: str, call: Coroutine[Any, Any, T], counts: Callable[[T], bool] = lambda _: True
    ) -> T:
        if f"before {name}" == KILL_AT:
            die()
        if f"during {name}" == KILL_AT:
            asyncio.get_running_loop().call_later(SOON, die)
        answer = await call
        if f"after {name}" == KILL_AT and counts(answer):
            die()
        return answer


class TalkativeConnection(QueueConnection):
    def listen(self, *arguments: Any, on_connect: Callable[[], None], **options: Any) -> None:
        def connected() -> None:
            say("listening")
            on_connect()

        super().listen(*arguments, on_connect=connected, **options)


class ShiftedDatetime(dt.datetime):
    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(time.time(), tz)


def shift_clock(offset: float) -> None:
    """Make what this process takes for the time of day wrong."""
    real_time = time.time
    time.time = lambda: real_time() + offset
    for module in list(sys.modules.values()):
        if module is dt or module.__name__.startswith(("jobs.", "procrastinate")):
            for name, value in list(vars(module).items()):
                if value is ShiftedDatetime.__base__:
                    setattr(module, name, ShiftedDatetime)


def end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    threading.Thread(target=end_with_parent, daemon=True).start()
    for module, name, replacement in (
        (local, "LocalCompute", ScriptedCompute),
        (transcription, "CallLog", ScriptedCallLog),
        (worker, "Transcriber", ScriptedTranscriber),
        (worker, "Queue", ScriptedQueue),
        (queue, "QueueConnection", TalkativeConnection),
    ):
        setattr(module, name, replacement)
    if offset := float(os.environ.get("FAULT_CLOCK_OFFSET", "0")):
        shift_clock(offset)
    settings = Settings.load().model_copy(
        update={"stall_timeout": float(os.environ["FAULT_STALL_TIMEOUT"])}
    )
    asyncio.run(worker.run_until_signalled(settings))
    say("ended")


if __name__ == "__main__":
    main()
