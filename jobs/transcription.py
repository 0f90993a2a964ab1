"""A job from audio to transcript: prepare the audio, transcribe its chunks, merge them.

All that was paid for is in Postgres before anything is made of it (``jobs/calls.py``), so an
attempt goes on where the last one was: it waits for the calls that run, and starts those that are
missing.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import psycopg
from opentelemetry import trace
from psycopg_pool import PoolTimeout

from jobs import metrics, telemetry
from jobs.backoff import Backoff
from jobs.calls import (
    STATEMENT_TIMEOUT,
    Call,
    CallLog,
    Chunk,
    Known,
    forget_stray_audio,
    forget_stray_calls,
    stray_audio,
    stray_calls,
)
from jobs.compute.base import Compute, OnProgress, Outcome, Prepare, Transcribe, Usage
from jobs.database import Pool, deadline
from jobs.errors import (
    AttemptLost,
    AudioNotFound,
    CallLost,
    CallTimeout,
    ComputeUnavailable,
    FileTooLarge,
    JobTimeout,
    PgscribeError,
    StorageUnavailable,
    TranscriptionFailed,
)
from jobs.fetching import Fetched, Fetcher
from jobs.models import Attempt, Transcript, TranscriptionOptions
from jobs.settings import Settings
from jobs.sql import ATTEMPTS
from jobs.storage.base import AudioSource
from modal_functions.merging import merge
from modal_functions.plan import SAMPLE_RATE, Plan, Span

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.5  # seconds between two writes of an attempt's progress
# A cancelled job has stopped after 2 s, even if the database and the compute side hang.
NOTE_TIMEOUT = 0.9  # seconds in which a call that is being started may still be noted
CLEAN_UP_TIMEOUT = 0.9  # seconds; the janitor finds the rest
STOP_TIMEOUT = 0.1  # seconds for a write of the progress to stop
CALL_PAUSES = (0.5, 15.0)  # seconds before a lost call is started again, the first and the longest
MOST_CALLS = 4  # for one chunk in an attempt: the first, and those that replace lost ones
GONE = "prepared_audio_gone"

T = TypeVar("T")
MakeRequest = Callable[[], Awaitable[Prepare | Transcribe]]
Fetch = Callable[[str], AbstractAsyncContextManager[Fetched]]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a worker does at a time, and for how long. Times are in seconds.

    ``patience``: how long the compute side may be out of reach before the attempt gives up; what
    it has started goes on, and the next attempt waits for that.
    """

    attempt: float
    call: float
    patience: float
    audio_seconds: float
    chunks_per_job: int
    calls: int
    gpu_second_price: float
    cpu_second_price: float
    gpu: str = "none"

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return what the settings say."""
        return cls(
            attempt=settings.job_timeout,
            call=settings.call_timeout,
            patience=settings.compute_patience,
            audio_seconds=settings.max_audio_seconds,
            chunks_per_job=settings.max_chunks_per_job,
            calls=settings.max_calls,
            gpu_second_price=settings.gpu_second_price,
            cpu_second_price=settings.cpu_second_price,
            gpu=settings.gpu,
        )


class Transcriber:
    """Carries out attempts."""

    def __init__(
        self,
        pool: Pool,
        storage: AudioSource,
        compute: Compute,
        limits: Limits,
        fetch: Fetch | None = None,
    ) -> None:
        self._pool = pool
        self._storage = storage
        self._compute = compute
        self._limits = limits
        self._fetch = fetch or Fetcher()
        self._calls = asyncio.Semaphore(limits.calls)

    async def run(self, attempt: Attempt, *, is_cancelled: Callable[[], bool]) -> Transcript:
        """Transcribe the attempt's audio; meanwhile its progress is on the job's row.

        When the task is cancelled, calls go on for the next attempt, unless ``is_cancelled`` says
        that the job is to stop. Raises ``PgscribeError``; its ``retryable`` says whether another
        attempt makes sense.
        """
        run = _Run(
            self._pool,
            self._storage,
            self._compute,
            self._limits,
            self._calls,
            self._fetch,
            attempt,
        )
        try:
            async with asyncio.timeout(self._limits.attempt):
                return await run.transcript()
        except TimeoutError as exc:
            await run.clean_up()
            raise JobTimeout(
                f"The attempt took longer than the limit of {self._limits.attempt:g} s; "
                "split the recording or raise PGSCRIBE_JOB_TIMEOUT"
            ) from exc
        except asyncio.CancelledError:
            if is_cancelled():
                await run.clean_up()
            raise
        except AttemptLost:  # the calls and the decoded audio are another attempt's now
            raise
        except PgscribeError as exc:
            await (run.note_usage() if exc.retryable else run.clean_up())
            raise


class _Run:
    """One attempt."""

    def __init__(  # noqa: PLR0913, PLR0917 - the transcriber's parts
        self,
        pool: Pool,
        storage: AudioSource,
        compute: Compute,
        limits: Limits,
        calls: asyncio.Semaphore,
        fetch: Fetch,
        attempt: Attempt,
    ) -> None:
        self._pool = pool
        self._storage = storage
        self._compute = compute
        self._limits = limits
        self._calls = calls
        self._fetch = fetch
        self._attempt = attempt
        self._options = TranscriptionOptions.from_dict(attempt.options)
        self._log = CallLog(pool, attempt)
        self._known: set[str] = set()  # calls for this job
        self._unnoted: set[str] = set()  # calls of which the database does not know yet
        self._progress = _Progress()
        self._spans: Sequence[Span] = ()

    async def transcript(self) -> Transcript:
        known = await self._log.load()
        metrics.picked_up(await self._log.waited_seconds())
        self._known |= {call.id for call in (known.preparation, *known.chunks) if call.id}
        writer = asyncio.create_task(self._write_progress())
        try:
            return await self._transcript(known)
        finally:
            await _stop(writer)

    async def _transcript(self, known: Known) -> Transcript:
        try:
            plan, chunks = await self._transcribe(known)
        except TranscriptionFailed as exc:
            if exc.code != GONE:
                raise
            # A day has passed, or another machine goes on; chunks that are done stay done.
            await self._log.forget_plan()
            plan, chunks = await self._transcribe(await self._log.load())
        with telemetry.span("merge", {"pgscribe.chunks": len(chunks)}):
            transcript = await asyncio.to_thread(_merge, plan, chunks, self._options)
        with telemetry.span("store"):
            await self._log.note_usage(*self._prices)
            await self._log.forget_audio()
            await _within(CLEAN_UP_TIMEOUT, self._discard(str(plan.pcm)))
        return transcript

    def _count_usage(self, usage: Usage) -> None:
        metrics.used(self._limits.gpu, usage.gpu_seconds, usage.cpu_seconds, self._prices)

    @property
    def _prices(self) -> tuple[float, float]:
        return self._limits.gpu_second_price, self._limits.cpu_second_price

    async def _transcribe(self, known: Known) -> tuple[Plan, list[Chunk]]:
        if known.plan is None:
            outcome = await self._outcome(known.preparation, self._prepare, lambda _: None)
            known = await self._log.store_plan(known.preparation, outcome)
            self._count_usage(outcome.usage)
        plan = known.plan
        assert plan is not None
        if known.refusal is not None:
            code, message = known.refusal["code"], known.refusal["message"]
            raise TranscriptionFailed(code, message, retryable=False)
        self._spans = plan.spans
        self._progress.start(plan, known.chunks)
        slots = asyncio.Semaphore(self._limits.chunks_per_job)
        await _all_of(
            [
                self._transcribe_chunk(plan, chunk, slots)
                for chunk in known.chunks
                if chunk.result is None
            ]
        )
        return plan, known.chunks

    async def _transcribe_chunk(self, plan: Plan, chunk: Chunk, slots: asyncio.Semaphore) -> None:
        assert chunk.index is not None
        report = self._progress.of(chunk.index)
        request = Transcribe(str(plan.pcm), plan.spans[chunk.index], self._options)

        async def transcribe() -> Transcribe:
            return request

        async with slots, self._calls:
            outcome = await self._outcome(chunk, transcribe, report)
            await self._log.store_chunk(chunk, outcome)
        metrics.CHUNKS.inc()
        self._count_usage(outcome.usage)
        report(1.0)

    async def _prepare(self) -> Prepare:
        largest, longest = await self._log.limits()
        source = await self._source()
        await self._check_size(largest)
        longest = min(self._limits.audio_seconds, longest or math.inf)
        return Prepare(source, str(self._attempt.job_id), self._options.preprocessing, longest)

    async def _check_size(self, largest: int | None) -> None:
        if largest is None:
            return
        size = await self._storage.size(self._attempt.file_path)
        if size is not None and size > largest:
            raise FileTooLarge(
                f"max_file_bytes: the file has {size} bytes, more than the limit of {largest}; "
                "send a compressed format such as mp3, m4a or opus, or ask for a higher limit"
            )

    async def _source(self) -> str:
        """Return what ffmpeg can read; audio by URL is brought into storage first."""
        path = self._attempt.file_path
        try:
            return await self._storage.locate(path)
        except AudioNotFound:
            url = await self._log.audio_url()
            if url is None:
                raise
        with telemetry.span("fetch"):
            async with self._fetch(url) as fetched:
                await self._storage.save(path, fetched.chunks, fetched.content_type)
        return await self._storage.locate(path)

    # One call

    async def _outcome(self, call: Call, make_request: MakeRequest, report: OnProgress) -> Outcome:
        """Return what the call returns; start it if there is none, and again where it is lost."""
        backoff = Backoff(*CALL_PAUSES)
        for _ in range(MOST_CALLS):
            with self._call_span(call) as span:
                started = None
                if call.id is None:
                    started = time.time_ns()
                    await _unless_killed(self._start(call, make_request))
                assert call.id is not None
                span.set_attribute("pgscribe.call.id", call.id)
                try:
                    with metrics.waiting_for_call(call.kind):
                        outcome = await self._wait(call.id, report)
                except CallLost as exc:
                    telemetry.note_error(span, exc)
                    logger.warning("Call %s was lost and is started again", call.id)
                    await self._log.forget_call(call)
                    await backoff.sleep()  # what lost one may lose the next as well
                except ComputeUnavailable:
                    raise  # it goes on, for the next attempt
                except TranscriptionFailed as exc:
                    await self._log.fail_call(call, exc)
                    self._count_usage(Usage(exc.gpu_seconds, exc.cpu_seconds))
                    raise
                except PgscribeError:
                    await self._log.forget_call(call)
                    raise
                else:
                    telemetry.add_steps(span, outcome.steps, started)
                    return outcome
        raise CallLost

    def _call_span(self, call: Call) -> AbstractContextManager[trace.Span]:
        """Return the span of a call: from its start, or from when this attempt waits for it."""
        named: dict[str, str | bool | int | float] = {"pgscribe.call.resumed": call.id is not None}
        if call.index is None:
            return telemetry.span("prepare", named)
        span = self._spans[call.index]
        named |= {
            "pgscribe.chunk": call.index,
            "pgscribe.audio_seconds": (span.end - span.start) / SAMPLE_RATE,
            "pgscribe.model": self._options.model,
        }
        return telemetry.span("transcribe", named)

    async def _start(self, call: Call, make_request: MakeRequest) -> None:
        """Start a call and note it. In between, and only there, a crash loses a call."""
        request = await self._patiently(make_request)
        call_id = await self._patiently(lambda: self._compute.spawn(request))
        metrics.call_started(call.kind)
        self._known.add(call_id)
        self._unnoted.add(call_id)
        try:
            await self._log.note_call(call, call_id)
        except AttemptLost:
            await _within(CLEAN_UP_TIMEOUT, self._compute.cancel(call_id))
            raise
        self._unnoted.remove(call_id)

    async def _wait(self, call_id: str, report: OnProgress) -> Outcome:
        try:
            async with asyncio.timeout(self._limits.call):
                return await self._patiently(lambda: self._compute.result(call_id, report))
        except TimeoutError as exc:
            await _within(CLEAN_UP_TIMEOUT, self._compute.cancel(call_id))
            raise CallTimeout(
                f"A call took longer than the limit of {self._limits.call:g} s; "
                "see PGSCRIBE_CALL_TIMEOUT"
            ) from exc

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again for as long as the compute side, or the storage, may be out of reach."""
        backoff = Backoff(0.2, 15.0)
        give_up_at: float | None = None
        while True:
            try:
                return await ask()
            except (ComputeUnavailable, StorageUnavailable) as exc:
                metrics.not_answered(exc)
                now = time.monotonic()
                give_up_at = give_up_at or now + self._limits.patience
                if now >= give_up_at:
                    raise
                logger.warning("Asked again in a moment: %s", exc)
                await backoff.sleep()

    async def note_usage(self) -> None:
        """Add up on the job's row what its calls took so far, unless that takes too long."""
        await _within(CLEAN_UP_TIMEOUT, self._log.note_usage(*self._prices))

    async def clean_up(self) -> None:
        """Stop all that runs for this job and delete its decoded audio, unless it was lost."""
        await _within(CLEAN_UP_TIMEOUT, self._clean_up())

    async def _clean_up(self) -> None:
        await _all(_done(list(self._unnoted), self._compute.cancel), self._release())

    async def _release(self) -> None:
        held, calls, audio = await self._log.release_calls(self._known)
        work = []
        if held:
            work.append(self._log.note_usage(*self._prices))
        if calls:
            work.append(self._cancel(calls))
        if audio:
            work.append(self._discard(audio))
        await _all(*work)

    async def _cancel(self, calls: Sequence[str]) -> None:
        await forget_stray_calls(self._pool, await _done(calls, self._compute.cancel))

    async def _discard(self, audio: str) -> None:
        await forget_stray_audio(self._pool, await _done([audio], self._compute.discard))

    # Progress

    async def _write_progress(self) -> None:
        written = 0.0
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL)
            fraction = self._progress.fraction
            if fraction > written:
                written = fraction
                try:
                    await self._write(written)
                except (psycopg.OperationalError, PoolTimeout) as exc:
                    # The next one may get through.
                    logger.warning("Progress not written: %s", exc)

    async def _write(self, progress: float) -> None:
        fence = {"job_id": self._attempt.job_id, "attempt": self._attempt.number}
        async with self._pool.connection() as conn:
            with deadline(conn, STATEMENT_TIMEOUT):
                await conn.execute(ATTEMPTS["write_progress"], {**fence, "progress": progress})


class _Progress:
    """The share of the recording that is done, of all chunks together."""

    def __init__(self) -> None:
        self._samples: list[int] = []
        self._done: list[float] = []

    def start(self, plan: Plan, chunks: Iterable[Chunk]) -> None:
        """Begin to count."""
        self._samples = [span.end - span.start for span in plan.spans]
        self._done = [float(chunk.result is not None) for chunk in chunks]

    def of(self, index: int) -> OnProgress:
        """Return what reports a chunk's own share."""

        def report(fraction: float) -> None:
            self._done[index] = fraction

        return report

    @property
    def fraction(self) -> float:
        """The share, 0 to 1."""
        done = sum(n * share for n, share in zip(self._samples, self._done, strict=True))
        return done / sum(self._samples) if self._samples else 0.0


async def clean_up(pool: Pool, compute: Compute) -> None:
    """Cancel and delete on the compute side what jobs have left that have ended."""
    await asyncio.gather(cancel_stray_calls(pool, compute), discard_stray_audio(pool, compute))


async def cancel_stray_calls(pool: Pool, compute: Compute) -> int:
    """Cancel calls that nobody waits for any more, and return how many."""
    cancelled = await _done(await stray_calls(pool), compute.cancel)
    await forget_stray_calls(pool, cancelled)
    return len(cancelled)


async def discard_stray_audio(pool: Pool, compute: Compute) -> int:
    """Delete decoded audio that nobody reads any more, and return how many files."""
    discarded = await _done(await stray_audio(pool), compute.discard)
    await forget_stray_audio(pool, discarded)
    return len(discarded)


async def _done(items: Sequence[T], act: Callable[[T], Awaitable[None]]) -> list[T]:
    """Act on all of them at the same time; return those with which that worked."""
    answers = await asyncio.gather(*map(act, items), return_exceptions=True)
    return [
        item
        for item, answer in zip(items, answers, strict=True)
        if not isinstance(answer, BaseException)
    ]


def _merge(plan: Plan, chunks: Sequence[Chunk], options: TranscriptionOptions) -> Transcript:
    parts = [
        (span.seconds, Transcript.from_dict(chunk.result or {}))
        for span, chunk in zip(plan.spans, chunks, strict=True)
    ]
    return merge(parts, name=plan.name, task=options.task)


async def _all_of(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run them together; where some fail, raise what decides about the attempt."""
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine)
    except BaseExceptionGroup as failed:
        errors = failed.exceptions
        raise next((e for e in errors if not getattr(e, "retryable", False)), errors[0]) from None


async def _unless_killed(coroutine: Coroutine[Any, Any, None]) -> None:
    """Let it come to its end, or nearly so, although the task is cancelled meanwhile."""
    task = asyncio.ensure_future(coroutine)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await _within(NOTE_TIMEOUT, task)
        raise


async def _all(*work: Awaitable[object]) -> None:
    """Let all come to their end, whatever goes wrong with one; raise what first did."""
    for answer in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(answer, BaseException):
            raise answer


_abandoned: set[asyncio.Future[Any]] = set()


async def _within(seconds: float, work: Awaitable[None]) -> None:
    """Let it come to its end if that takes no longer; what goes wrong with it is only logged.

    What takes longer is cancelled and not waited for: a statement that hangs takes seconds to end.
    """
    task = asyncio.ensure_future(work)
    _abandoned.add(task)
    task.add_done_callback(_report)
    await asyncio.wait([task], timeout=seconds)
    task.cancel()


async def _stop(task: asyncio.Task[None]) -> None:
    """Cancel it and wait a moment, no longer: a statement that hangs takes seconds to end.

    What it still writes harms nobody: the database takes it only while the attempt has its job.
    """
    task.cancel()
    _abandoned.add(task)
    task.add_done_callback(_forget)
    await asyncio.wait([task], timeout=STOP_TIMEOUT)


def _forget(task: asyncio.Future[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled() and task.exception() is not None:
        logger.warning("Writing the progress failed: %r", task.exception())


def _report(task: asyncio.Future[Any]) -> None:
    _abandoned.discard(task)
    if task.cancelled():
        logger.warning("Cleaning up took too long; the janitor does the rest")
    elif not isinstance(task.exception(), AttemptLost | None):
        logger.warning("Not all was cleaned up; the janitor does the rest: %r", task.exception())
