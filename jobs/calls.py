"""What Postgres knows of a job's calls: which were started, and what they returned."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg.types.json import Jsonb
from psycopg_pool import PoolTimeout

from jobs.backoff import Backoff
from jobs.compute.base import Outcome
from jobs.database import Pool, deadline
from jobs.errors import AttemptLost, ResultNotStorable, TranscriptionFailed
from jobs.models import Attempt
from jobs.sql import CALLS
from modal_functions.plan import Plan

logger = logging.getLogger(__name__)

STRAY_BATCH = 100
STATEMENT_TIMEOUT = 10.0  # seconds; what takes longer is tried again


@dataclass(slots=True)
class Call:
    """The call for one chunk, or with ``index`` ``None`` the one that prepares the audio.

    ``id`` is that of a call to wait for, if one has been started; ``calls`` counts all of them.
    """

    index: int | None
    id: str | None = None
    calls: int = 0

    @property
    def kind(self) -> str:
        """Which of the two functions it calls."""
        return "prepare" if self.index is None else "transcribe"


@dataclass(slots=True)
class Chunk(Call):
    """A chunk's call, and its transcript's ``to_dict()`` once that has been returned."""

    result: dict[str, Any] | None = None


@dataclass(slots=True)
class Known:
    """What earlier attempts at a job have done. ``chunks`` are the plan's spans, in order.

    ``refusal``: code and message, where the plan would be more than the owner may have.
    """

    preparation: Call
    plan: Plan | None
    chunks: list[Chunk]
    refusal: dict[str, str] | None = None


class Released(NamedTuple):
    """What an attempt has given up: nobody waits for the calls or reads the file any more."""

    held: bool
    calls: list[str]
    audio: str | None


class CallLog:
    """Reads and writes for one attempt, and only while that holds its job.

    Whatever is noted here was paid for, so each statement is repeated until the database takes it:
    bound it by a time-out. All methods raise ``AttemptLost`` once the attempt has lost its job.
    """

    def __init__(self, pool: Pool, attempt: Attempt) -> None:
        self._pool = pool
        self._fence = {"job_id": attempt.job_id, "attempt": attempt.number}

    async def load(self) -> Known:
        """Return what earlier attempts have done."""
        held, preparation, chunks = await self._execute("load_calls")
        self._check(held=held)
        done = preparation or {"call_id": None, "calls": 0, "plan": None}
        return Known(
            Call(None, done["call_id"], done["calls"]),
            None if done["plan"] is None else Plan.from_dict(done["plan"]),
            [Chunk(c["index"], c["call_id"], c["calls"], c["result"]) for c in chunks or ()],
            done.get("refusal"),
        )

    async def waited_seconds(self) -> float | None:
        """Return how long the job could have started before it did; none: it is lost."""
        waited: float | None
        (waited,) = await self._execute("waited_seconds")
        return waited

    async def audio_url(self) -> str | None:
        """Return where the job's audio is to be fetched from, if it says so."""
        url: str | None
        (url,) = await self._execute("audio_url")
        return url

    async def limits(self) -> tuple[int | None, float | None]:
        """Return how many bytes the owner's files and seconds their recordings may have."""
        largest, longest = await self._execute("job_limits")
        return largest, longest

    async def note_call(self, call: Call, call_id: str) -> None:
        """Note a call that has been started, before anybody waits for it."""
        await self._write("note_call", chunk=call.index, call_id=call_id)
        call.id, call.calls = call_id, call.calls + 1

    async def forget_call(self, call: Call) -> None:
        """Note that a call will never return anything."""
        await self._write("forget_call", chunk=call.index, call_id=call.id)
        call.id = None

    async def fail_call(self, call: Call, error: TranscriptionFailed) -> None:
        """Note that a call has returned an error, and what it took."""
        usage = {"cpu_seconds": error.cpu_seconds, "gpu_seconds": error.gpu_seconds}
        await self._write("fail_call", chunk=call.index, call_id=call.id, **usage)
        call.id = None

    async def store_plan(self, call: Call, outcome: Outcome) -> Known:
        """Store what the preparation returned, and return the chunks that are now there."""
        await self._write(
            "store_plan", call_id=call.id, plan=Jsonb(outcome.value), **_usage(outcome)
        )
        return await self.load()

    async def forget_plan(self) -> None:
        """Note that the decoded audio is gone."""
        await self._write("forget_plan")

    async def forget_audio(self) -> None:
        """Note that all chunks are done: from now on the decoded audio is stray."""
        await self._write("forget_audio")

    async def release_calls(self, known: Iterable[str]) -> Released:
        """Give up what runs for the job. What is returned is stray from now on.

        Of an attempt that has lost its job: those of the calls ``known`` to it that are nobody's.
        """
        held, calls, audio = await self._execute("release_calls", known=list(known))
        return Released(held, calls or [], audio)

    async def store_chunk(self, chunk: Chunk, outcome: Outcome) -> None:
        """Store a chunk's transcript. Raises ``ResultNotStorable``."""
        await self._write(
            "store_chunk", chunk=chunk.index, result=Jsonb(outcome.value), **_usage(outcome)
        )
        chunk.id, chunk.result = None, outcome.value

    async def note_usage(self, gpu_second_price: float, cpu_second_price: float) -> None:
        """Add up on the job's row what its calls took."""
        await self._write(
            "note_usage", gpu_second_price=gpu_second_price, cpu_second_price=cpu_second_price
        )

    async def _write(self, query: str, **values: Any) -> None:
        (held,) = await self._execute(query, **values)
        self._check(held=held)

    @staticmethod
    def _check(*, held: bool) -> None:
        if not held:
            raise AttemptLost

    async def _execute(self, query: str, **values: Any) -> tuple[Any, ...]:
        backoff = Backoff()
        while True:
            try:
                async with self._pool.connection() as conn:
                    with deadline(conn, STATEMENT_TIMEOUT):
                        cursor = await conn.execute(CALLS[query], {**self._fence, **values})
                        row = await cursor.fetchone()
            except (psycopg.OperationalError, psycopg.InternalError, PoolTimeout) as exc:
                logger.warning("%s is tried again: %s", query, exc)
                await backoff.sleep()
            except psycopg.DataError as exc:
                raise ResultNotStorable from exc
            else:
                assert row is not None
                return row


def _usage(outcome: Outcome) -> dict[str, float]:
    usage = outcome.usage
    return {"cpu_seconds": usage.cpu_seconds, "gpu_seconds": usage.gpu_seconds}


async def stray_calls(pool: Pool) -> list[str]:
    """Return calls that nobody waits for any more: their jobs have ended or are gone."""
    calls: list[str] = await _call(pool, "stray_calls", batch=STRAY_BATCH)
    return calls


async def forget_stray_calls(pool: Pool, calls: Sequence[str]) -> None:
    """Note that these calls have been cancelled."""
    await _call(pool, "forget_stray_calls", calls=list(calls))


async def stray_audio(pool: Pool) -> list[str]:
    """Return files of decoded audio that nobody reads any more."""
    files: list[str] = await _call(pool, "stray_audio", batch=STRAY_BATCH)
    return files


async def forget_stray_audio(pool: Pool, files: Sequence[str]) -> None:
    """Note that these files have been deleted."""
    await _call(pool, "forget_stray_audio", files=list(files))


async def _call(pool: Pool, query: str, **values: Any) -> Any:
    async with pool.connection() as conn:
        with deadline(conn, STATEMENT_TIMEOUT):
            cursor = await conn.execute(CALLS[query], values)
            row = await cursor.fetchone()
    assert row is not None
    return row[0]
