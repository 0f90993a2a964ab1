"""An attempt at a job: calls are noted before they are waited for, and paid for once.

The compute side is scripted, so that each failure comes at a known moment; the database is real.
"""

import asyncio
import contextlib
import functools
import itertools
import re
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import dict_row

from db import migrate
from jobs import database, transcription
from jobs.calls import CallLog
from jobs.compute.base import OnProgress, Outcome, Prepare, Transcribe, Usage
from jobs.database import Pool
from jobs.errors import (
    AttemptLost,
    AudioNotFound,
    CallLost,
    CallTimeout,
    ComputeUnavailable,
    JobTimeout,
    PgscribeError,
    ResultNotStorable,
    TranscriptionFailed,
)
from jobs.models import Attempt, Segment, Transcript
from jobs.queue import ClaimedJob, Queue
from jobs.settings import Settings
from jobs.transcription import (
    Limits,
    Transcriber,
    cancel_stray_calls,
    discard_stray_audio,
)
from modal_functions.plan import SAMPLE_RATE, Plan, Span

pytestmark = pytest.mark.anyio

CHUNKS = 4
LIMITS = Limits(
    attempt=60,
    call=60,
    patience=60,
    audio_seconds=3600,
    chunks_per_job=20,
    calls=1000,
    gpu_second_price=2.0,
    cpu_second_price=1.0,
)


def plan(lengths: tuple[int, ...] = (10,) * CHUNKS) -> Plan:
    ends = [sum(lengths[: n + 1]) * SAMPLE_RATE for n in range(len(lengths))]
    spans = [Span(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return Plan("'a.mp3'", Path("/audio/key.pcm"), tuple(spans))


def spoken(span: Span) -> Transcript:
    text = f"from {span.start // SAMPLE_RATE}"
    return Transcript(text, "en", 10.0, (Segment(0, 10, text, 0, 0, 1),), "scripted", "base")


class Cloud:
    """Calls that run on whatever becomes of the workers: each once, when it is let go on."""

    def __init__(self) -> None:
        self.plan = plan()
        self.requests: dict[str, Prepare | Transcribe] = {}
        self.lost: set[str] = set()
        self.cancelled: set[str] = set()
        self.discarded: list[str] = []
        self.errors: dict[int, list[Exception]] = {}  # by chunk, raised in this order
        self.away = 0  # how many of the next requests get no answer
        self.spawned = asyncio.Event()
        self.held: set[int] = set()  # chunks that take for ever
        self.let_go = asyncio.Event()
        self.waited_for: Counter[str] = Counter()
        self.at_a_time = 0
        self.most_at_a_time = 0

    def calls(self, chunk: int) -> list[str]:
        return [
            call_id
            for call_id, request in self.requests.items()
            if isinstance(request, Transcribe) and request.span == self.plan.spans[chunk]
        ]

    @property
    def preparations(self) -> int:
        return sum(isinstance(request, Prepare) for request in self.requests.values())

    def _answer(self) -> None:
        if self.away > 0:
            self.away -= 1
            raise ComputeUnavailable

    async def spawn(self, request: Prepare | Transcribe) -> str:
        self._answer()
        call_id = f"call-{len(self.requests)}"
        self.requests[call_id] = request
        if isinstance(request, Transcribe):
            self.spawned.set()
        return call_id

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:
        self.waited_for[call_id] += 1
        self._answer()
        if call_id in self.lost | self.cancelled:
            raise CallLost
        request = self.requests[call_id]
        if isinstance(request, Prepare):
            return Outcome(self.plan.to_dict(), Usage(cpu_seconds=3.0))
        self.at_a_time += 1
        self.most_at_a_time = max(self.at_a_time, self.most_at_a_time)
        try:
            return await self._transcribe(request, on_progress)
        finally:
            self.at_a_time -= 1

    async def _transcribe(self, request: Transcribe, on_progress: OnProgress) -> Outcome:
        chunk = self.plan.spans.index(request.span)
        await asyncio.sleep(0.01)
        if chunk in self.held:
            on_progress(0.5)
            while chunk in self.held and not self.let_go.is_set():  # noqa: ASYNC110 - either may end it
                await asyncio.sleep(0.01)
        if errors := self.errors.get(chunk):
            raise errors.pop(0)
        return Outcome(spoken(request.span).to_dict(), Usage(gpu_seconds=2.0))

    async def cancel(self, call_id: str) -> None:
        self._answer()
        self.cancelled.add(call_id)

    async def discard(self, pcm: str) -> None:
        self._answer()
        self.discarded.append(pcm)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class Bucket:
    """Every file is there; each is located anew, as signed URLs expire."""

    def __init__(self) -> None:
        self.located = 0

    async def locate(self, file_path: str) -> str:
        self.located += 1
        return f"https://storage/{file_path}?signature={self.located}"

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
        return 1000 if file_path else None

    async def delete(self, file_path: str) -> bool:
        raise NotImplementedError


@dataclass
class Case:
    """One job, and what it takes to make attempts at it."""

    conn: psycopg.Connection
    pool: Pool
    queue: Queue
    job_id: UUID
    limits: Limits = LIMITS
    cloud: Cloud = field(default_factory=Cloud)
    bucket: Bucket = field(default_factory=Bucket)
    is_cancelled: bool = False
    claimed: ClaimedJob | None = None

    async def claim(self) -> Attempt:
        """Claim the job as a new worker does."""
        worker = await self.queue.register()
        (self.claimed,) = (await self.queue.turn(worker, [], 1, None)).jobs
        assert self.claimed.attempt is not None
        return self.claimed.attempt

    async def lose(self) -> None:
        """Give the job back, as a sweep does."""
        self.conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'todo', worker_id = null,"
            " attempts = attempts + 1 where status = 'doing'"
        )

    def end(self, status: str) -> None:
        """End the job as its worker does, with the attempt that it has."""
        self.conn.execute(
            "update procrastinate.procrastinate_jobs set status = %s where status = 'doing'",
            (status,),
        )

    async def run(self, attempt: Attempt | None = None) -> Transcript:
        transcriber = Transcriber(self.pool, self.bucket, self.cloud, self.limits)
        return await transcriber.run(
            attempt or await self.claim(), is_cancelled=lambda: self.is_cancelled
        )

    def start(self, attempt: Attempt) -> "asyncio.Task[Transcript]":
        return asyncio.create_task(self.run(attempt))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - what the database says has no event
                await asyncio.sleep(0.01)

    def chunks(self) -> list[dict[str, Any]]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            query = "select * from processing_job_chunks where job_id = %s order by index"
            return cursor.execute(query, (self.job_id,)).fetchall()

    def row(self) -> dict[str, Any]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            query = "select * from processing_jobs where id = %s"
            row = cursor.execute(query, (self.job_id,)).fetchone()
        assert row is not None
        return row

    def audio(self) -> list[str]:
        rows = self.conn.execute("select audio from pgscribe.stray_audio").fetchall()
        return [audio for (audio,) in rows]

    def partial(self) -> tuple[Any, ...]:
        row = self.conn.execute(
            "select ready, chunks, text from partial_transcript(%s)", (self.job_id,)
        ).fetchone()
        assert row is not None
        return row


@pytest.fixture
async def case(conn: psycopg.Connection, settings: Settings, user: UUID) -> AsyncIterator[Case]:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'u/a.mp3') returning id",
        (user,),
    ).fetchone()
    assert row is not None
    queue = Queue(
        functools.partial(database.connect, settings, name="test"), max_attempts=9, stall_timeout=30
    )
    async with database.make_pool(settings, name="test") as pool:
        yield Case(conn, pool, queue, row[0])
    await queue.close()


TEXT = "from 0 from 10 from 20 from 30"


async def test_chunks_become_one_transcript(case: Case) -> None:
    transcript = await case.run()
    assert (transcript.text, transcript.duration) == (TEXT, 40.0)
    assert [segment.start for segment in transcript.segments] == [0, 10, 20, 30]
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)] == [1] * CHUNKS
    assert case.cloud.discarded == ["/audio/key.pcm"]
    row = case.row()
    assert row["audio_seconds"] == 40
    assert row["usage"] == {
        "calls": 5,
        "gpu_seconds": 8.0,
        "cpu_seconds": 3.0,
        "estimated_cost": 19.0,
    }


async def test_a_new_attempt_waits_for_the_calls_of_the_last_one(case: Case) -> None:
    case.cloud.held = {1, 3}
    first = case.start(await case.claim())
    await case.until(lambda: [c["status"] for c in case.chunks()].count("completed") == 2)
    await case.lose()
    second = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == 4)
    case.cloud.let_go.set()
    assert (await second).text == TEXT
    with pytest.raises(AttemptLost):
        await first
    assert case.cloud.cancelled == set(), "they are the new attempt's"
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)] == [1] * CHUNKS
    assert case.cloud.preparations == 1
    waited = [case.cloud.waited_for[case.cloud.calls(n)[0]] for n in range(CHUNKS)]
    assert waited == [1, 2, 1, 2], "chunks that are done are not asked for again"


async def test_a_late_attempt_leaves_calls_and_audio_to_the_new_one(case: Case) -> None:
    case.cloud.held = {0, 1, 2, 3}
    first = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    await case.lose()
    await case.claim()
    case.cloud.held.remove(0)
    with pytest.raises(AttemptLost):
        await first
    assert (case.cloud.cancelled, case.cloud.discarded) == (set(), [])


@pytest.mark.parametrize("how", ["completed", "failed"])
async def test_audio_that_cannot_be_deleted_keeps_no_job_from_its_end(case: Case, how: str) -> None:
    async def refuse(pcm: str) -> None:
        raise PermissionError(pcm)

    case.cloud.discard = refuse  # type: ignore[method-assign]
    if how == "completed":
        assert (await case.run()).text == TEXT
    else:
        case.cloud.errors = {3: [TranscriptionFailed("no_speech", "Silent.", retryable=False)]}
        with pytest.raises(TranscriptionFailed, match="Silent"):
            await case.run()
    assert case.audio() == ["/audio/key.pcm"], "it is found later"


async def test_a_call_is_noted_before_it_is_waited_for(case: Case) -> None:
    noted: list[bool] = []
    result = case.cloud.result

    async def checked(call_id: str, on_progress: OnProgress) -> Outcome:
        query = (
            "select exists (select from pgscribe.preparations where call_id = %(id)s"
            " union all select from processing_job_chunks where call_id = %(id)s)"
        )
        row = case.conn.execute(query, {"id": call_id}).fetchone()
        noted.append(row == (True,))
        return await result(call_id, on_progress)

    case.cloud.result = checked  # type: ignore[method-assign]
    await case.run()
    assert noted == [True] * 5


async def test_a_lost_call_is_started_again_and_counted(case: Case) -> None:
    case.cloud.errors = {2: [CallLost(), CallLost()]}
    assert (await case.run()).text == TEXT
    assert len(case.cloud.calls(2)) == 3
    assert [chunk["calls"] for chunk in case.chunks()] == [1, 1, 3, 1]


async def test_a_call_that_is_always_lost_ends_the_attempt(case: Case) -> None:
    case.cloud.errors = {2: [CallLost() for _ in range(20)]}
    with pytest.raises(CallLost) as caught:
        await case.run()
    assert caught.value.retryable
    assert len(case.cloud.calls(2)) == 4


async def test_a_compute_side_that_is_away_is_asked_again_for_the_same_call(case: Case) -> None:
    case.cloud.away = 3
    case.cloud.errors = {1: [ComputeUnavailable(), ComputeUnavailable()]}
    assert (await case.run()).text == TEXT
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)] == [1] * CHUNKS


async def test_without_patience_the_attempt_ends_and_its_calls_go_on(case: Case) -> None:
    case.limits = Limits(**{**_fields(LIMITS), "patience": 0})
    case.cloud.errors = {1: [ComputeUnavailable()]}
    with pytest.raises(ComputeUnavailable):
        await case.run()
    assert case.cloud.cancelled == set()
    await case.lose()
    assert (await case.run()).text == TEXT
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)] == [1] * CHUNKS


def _fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__slots__}


async def test_an_error_of_the_recording_ends_the_job_and_its_other_calls(case: Case) -> None:
    case.cloud.held = {0, 1, 2}
    case.cloud.errors = {3: [TranscriptionFailed("no_speech", "Silent.", retryable=False)]}
    with pytest.raises(TranscriptionFailed, match="Silent"):
        await case.run()
    assert case.cloud.cancelled == {case.cloud.calls(n)[0] for n in range(3)}
    assert case.cloud.discarded == ["/audio/key.pcm"]
    case.end("failed")
    assert await discard_stray_audio(case.pool, case.cloud) == 0, "it was deleted already"
    assert await cancel_stray_calls(case.pool, case.cloud) == 0, "they were cancelled already"


async def test_after_an_error_to_retry_the_other_calls_go_on(case: Case) -> None:
    case.cloud.held = {0}
    error = TranscriptionFailed("internal_error", "Broken.", retryable=True, gpu_seconds=5)
    case.cloud.errors = {3: [error]}
    with pytest.raises(TranscriptionFailed, match="Broken"):
        await case.run()
    assert case.cloud.cancelled == set()
    usage = case.row()["usage"]
    assert (usage["calls"], usage["cpu_seconds"]) == (5, 3)
    assert usage["gpu_seconds"] in {5, 7, 9}, "of the error, and of those that came before it"
    case.cloud.let_go.set()
    await case.lose()
    assert (await case.run()).text == TEXT
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)] == [1, 1, 1, 2]
    usage = {"calls": 6, "gpu_seconds": 13, "cpu_seconds": 3, "estimated_cost": 29}
    assert case.row()["usage"] == usage


async def test_a_cancelled_job_cancels_its_calls(case: Case) -> None:
    case.cloud.held = {0, 1, 2, 3}
    running = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    case.is_cancelled = True
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert case.cloud.cancelled == {case.cloud.calls(n)[0] for n in range(CHUNKS)}


async def test_a_deleted_job_cancels_its_calls(case: Case) -> None:
    case.cloud.held = {0, 1, 2, 3}
    running = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    case.conn.execute("delete from processing_jobs")
    case.is_cancelled = True
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert case.cloud.cancelled == {case.cloud.calls(n)[0] for n in range(CHUNKS)}
    assert await cancel_stray_calls(case.pool, case.cloud) == 0


async def test_a_stopping_worker_leaves_its_calls_to_the_next_one(case: Case) -> None:
    case.cloud.held = {0, 1, 2, 3}
    running = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert case.cloud.cancelled == set()
    case.cloud.let_go.set()
    await case.lose()
    assert (await case.run()).text == TEXT
    assert len(case.cloud.requests) == 1 + CHUNKS


async def test_a_worker_that_stops_while_it_starts_a_call_notes_it(case: Case) -> None:
    case.cloud.held = {0, 1, 2, 3}
    spawn = case.cloud.spawn

    async def slow(request: Prepare | Transcribe) -> str:
        call_id = await spawn(request)
        await asyncio.sleep(0.3)
        return call_id

    case.cloud.spawn = slow  # type: ignore[method-assign]
    running = case.start(await case.claim())
    await case.cloud.spawned.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [chunk["status"] for chunk in case.chunks()] == ["processing"] * CHUNKS


async def test_a_call_started_by_an_attempt_that_has_lost_its_job_is_cancelled(case: Case) -> None:
    attempt = await case.claim()
    case.cloud.held = {0, 1, 2, 3}
    spawn = case.cloud.spawn

    async def spawn_and_lose(request: Prepare | Transcribe) -> str:
        if isinstance(request, Transcribe) and not case.cloud.spawned.is_set():
            await case.lose()
        return await spawn(request)

    case.cloud.spawn = spawn_and_lose  # type: ignore[method-assign]
    with pytest.raises(AttemptLost):
        await case.run(attempt)
    assert {call_id for n in range(CHUNKS) for call_id in case.cloud.calls(n)} == (
        case.cloud.cancelled
    )
    assert [chunk["call_id"] for chunk in case.chunks()] == [None] * CHUNKS


async def test_an_attempt_that_takes_too_long_fails_and_cancels_its_calls(case: Case) -> None:
    case.limits = Limits(**{**_fields(LIMITS), "attempt": 2})
    case.cloud.held = {1}
    with pytest.raises(JobTimeout, match="PGSCRIBE_JOB_TIMEOUT"):
        await case.run()
    left = [chunk["index"] for chunk in case.chunks() if chunk["status"] != "completed"]
    assert 1 in left
    assert case.cloud.cancelled == {call for index in left for call in case.cloud.calls(index)}


async def test_a_call_that_takes_too_long_is_cancelled_and_started_anew_next_time(
    case: Case,
) -> None:
    case.limits = Limits(**{**_fields(LIMITS), "call": 1})
    case.cloud.held = {1}
    with pytest.raises(CallTimeout) as caught:
        await case.run()
    assert caught.value.retryable
    assert case.cloud.cancelled == set(case.cloud.calls(1))
    case.cloud.let_go.set()
    await case.lose()
    assert (await case.run()).text == TEXT
    assert len(case.cloud.calls(1)) == 2


async def test_no_more_chunks_run_at_a_time_than_the_job_may(case: Case) -> None:
    case.limits = Limits(**{**_fields(LIMITS), "chunks_per_job": 2})
    case.cloud.held = set(range(CHUNKS))
    running = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == 2)
    case.cloud.let_go.set()
    await running
    assert case.cloud.most_at_a_time == 2


async def test_no_more_calls_run_at_a_time_than_the_worker_may(case: Case) -> None:
    case.limits = Limits(**{**_fields(LIMITS), "calls": 1})
    await case.run()
    assert case.cloud.most_at_a_time == 1


async def test_audio_that_is_gone_is_prepared_again_and_done_chunks_stay(case: Case) -> None:
    case.cloud.errors = {3: [TranscriptionFailed("prepared_audio_gone", "Gone.", retryable=True)]}
    assert (await case.run()).text == TEXT
    assert case.cloud.preparations == 2
    assert case.bucket.located == 2, "a signed URL is used once"
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)][3] == 2


async def test_chunks_with_other_spans_do_not_survive_another_plan(case: Case) -> None:
    case.cloud.errors = {3: [TranscriptionFailed("no", "No.", retryable=True)]}
    with pytest.raises(TranscriptionFailed):
        await case.run()
    case.conn.execute("update pgscribe.preparations set plan = null")
    case.cloud.plan = plan((10, 10, 5, 15))
    await case.lose()
    assert (await case.run()).text == "from 0 from 10 from 20 from 25"
    assert [chunk["end_seconds"] for chunk in case.chunks()] == [10, 20, 25, 40]


async def test_text_can_be_read_in_order_while_the_job_runs(case: Case) -> None:
    case.cloud.held = {1}
    with psycopg.connect(
        case.conn.info.dsn, password=case.conn.info.password, autocommit=True
    ) as listener:
        listener.execute("listen pgscribe_chunks")
        running = case.start(await case.claim())
        await case.until(lambda: [c["status"] for c in case.chunks()].count("completed") == 3)
        assert case.partial() == (1, 4, "from 0")
        await case.until(lambda: case.row()["progress"] > 0.8)
        assert case.row()["progress"] == pytest.approx(3.5 / 4)
        case.cloud.let_go.set()
        await running
        assert case.partial() == (4, 4, TEXT)
        heard = [n.payload for n in listener.notifies(timeout=60, stop_after=2)]
    assert [f'"ready" : {ready}}}' in payload for ready, payload in zip((1, 4), heard, strict=True)]


@pytest.mark.parametrize(
    ("task", "language", "text"),
    [("transcribe", "ja", "AB"), ("translate", "ja", "A B"), ("transcribe", "de", "A B")],
)
async def test_partial_text_is_joined_as_the_language_is_written(
    case: Case, task: str, language: str, text: str
) -> None:
    await case.run()
    case.conn.execute(
        "update processing_job_chunks set result = case when index < 3 then"
        " jsonb_build_object('text', (array['A', '', 'B'])[index + 1], 'language', %s::text) end",
        (language,),
    )
    row = case.conn.execute(
        "insert into processing_jobs (user_id, file_path, options)"
        " select user_id, file_path, jsonb_build_object('task', %s::text) from processing_jobs"
        " returning id",
        (task,),
    ).fetchone()
    assert row is not None
    case.conn.execute("update processing_job_chunks set job_id = %s", row)
    case.job_id = row[0]
    assert case.partial() == (3, CHUNKS, text)


async def test_owners_read_their_chunks_without_the_ids_of_calls(
    case: Case, make_user: Callable[[], UUID]
) -> None:
    await case.run()
    owner = case.row()["user_id"]
    for user, visible in ((owner, CHUNKS), (make_user(), 0)):
        with case.conn.transaction():
            case.conn.execute("set local role authenticated")
            case.conn.execute(
                "select set_config('request.jwt.claims',"
                " json_build_object('sub', %s::text)::text, true)",
                (str(user),),
            )
            row = case.conn.execute("select count(*) from processing_job_chunks").fetchone()
            assert row == (visible,)
            with pytest.raises(psycopg.errors.InsufficientPrivilege), case.conn.transaction():
                case.conn.execute("select call_id from processing_job_chunks")
            with pytest.raises(psycopg.errors.InsufficientPrivilege), case.conn.transaction():
                case.conn.execute("update processing_job_chunks set result = '{}'")


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
async def test_a_transcript_that_postgres_cannot_store_fails_the_job(
    case: Case, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Transcript(text, "en", 10.0, (), "scripted", "base")
    monkeypatch.setitem(globals(), "spoken", lambda _: bad)
    with pytest.raises(ResultNotStorable) as caught:
        await case.run()
    assert not caught.value.retryable


@pytest.mark.parametrize("how", ["cancelled", "deleted"])
async def test_calls_of_jobs_that_end_without_their_worker_are_cancelled(
    case: Case, how: str
) -> None:
    case.cloud.held = {0, 1, 2, 3}
    running = case.start(await case.claim())
    await case.until(lambda: [c["status"] for c in case.chunks()] == ["processing"] * CHUNKS)
    running.cancel()  # its worker is killed
    await asyncio.gather(running, return_exceptions=True)
    assert await cancel_stray_calls(case.pool, case.cloud) == 0, "the job is still to be done"
    if how == "deleted":
        case.conn.execute("delete from processing_jobs")
    else:
        case.conn.execute("update procrastinate.procrastinate_jobs set status = 'aborted'")
    case.cloud.away = 2
    assert await cancel_stray_calls(case.pool, case.cloud) == 2
    assert await cancel_stray_calls(case.pool, case.cloud) == 2, "what failed is tried again"
    assert case.cloud.cancelled == {case.cloud.calls(n)[0] for n in range(CHUNKS)}
    assert await cancel_stray_calls(case.pool, case.cloud) == 0


@pytest.mark.parametrize("how", ["failed", "cancelled", "deleted", "deleted while queued"])
async def test_audio_that_jobs_leave_is_deleted(case: Case, how: str) -> None:
    case.cloud.errors = {3: [TranscriptionFailed("internal_error", "Broken.", retryable=True)]}
    with pytest.raises(TranscriptionFailed):
        await case.run()
    assert await discard_stray_audio(case.pool, case.cloud) == 0, "the job is still to be done"
    if how in {"cancelled", "deleted while queued"}:
        await case.lose()
    if how == "failed":
        case.end("failed")
    elif how == "cancelled":
        case.conn.execute("select cancel_processing_job(%s)", (case.job_id,))
    else:
        case.conn.execute("delete from processing_jobs")
    case.cloud.away = 1
    assert await discard_stray_audio(case.pool, case.cloud) == 0
    assert await discard_stray_audio(case.pool, case.cloud) == 1, "what failed is tried again"
    assert case.cloud.discarded == ["/audio/key.pcm"]
    assert await discard_stray_audio(case.pool, case.cloud) == 0


async def test_a_retried_job_reads_no_audio_that_is_to_be_deleted(case: Case) -> None:
    case.cloud.errors = {3: [TranscriptionFailed("internal_error", "Broken.", retryable=True)]}
    with pytest.raises(TranscriptionFailed):
        await case.run()
    case.end("failed")
    case.conn.execute("select retry_processing_job(%s)", (case.job_id,))
    case.cloud.plan = replace(case.cloud.plan, pcm=Path("/audio/key-2.pcm"))
    case.cloud.held = {3}
    running = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == 1)
    assert await discard_stray_audio(case.pool, case.cloud) == 1
    assert case.cloud.discarded == ["/audio/key.pcm"]
    case.cloud.let_go.set()
    assert (await running).text == TEXT
    assert case.cloud.preparations == 2
    assert [len(case.cloud.calls(n)) for n in range(CHUNKS)][3] == 2
    assert case.cloud.discarded == ["/audio/key.pcm", "/audio/key-2.pcm"]
    assert case.audio() == []


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
async def test_a_late_attempt_that_ends_leaves_all_to_the_new_one(case: Case, how: str) -> None:
    case.cloud.held = {0, 1, 2, 3}
    if how == "timeout":
        case.limits = Limits(**{**_fields(LIMITS), "attempt": 3.0})
    first = case.start(await case.claim())
    await case.until(lambda: [c["status"] for c in case.chunks()] == ["processing"] * CHUNKS)
    await case.lose()
    await case.claim()
    if how == "cancelled":
        case.is_cancelled = True
        first.cancel()
    with pytest.raises((JobTimeout, asyncio.CancelledError)):
        await first
    assert (case.cloud.cancelled, case.cloud.discarded) == (set(), [])
    assert [c["status"] for c in case.chunks()] == ["processing"] * CHUNKS


async def test_an_attempt_ends_while_its_progress_waits_for_a_connection(
    case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one connection, and as soon as the attempt returns it, its progress gets it."""
    looks = itertools.count(1)
    monkeypatch.setattr(transcription, "PROGRESS_INTERVAL", 0)
    monkeypatch.setattr(
        transcription._Progress,  # noqa: SLF001 - so that there is always something to write
        "fraction",
        property(lambda _: next(looks) / 1_000_000),
    )
    one = settings.model_copy(update={"database_pool_size": 1})
    async with database.make_pool(one, name="test", for_queue=True) as case.pool:
        async with asyncio.timeout(30):
            assert (await case.run()).text == TEXT
        looked = next(looks)
        await asyncio.sleep(0.1)
        assert next(looks) == looked + 1, "its progress is not written any more"
    assert looked > 2


@pytest.mark.alone
@pytest.mark.parametrize(
    "hangs", ["the database", "the compute side", "starting a call", "the progress"]
)
async def test_a_cancelled_job_has_stopped_after_two_seconds(
    case: Case, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> Any:
        await asyncio.sleep(30)

    written = asyncio.Event()

    async def hang_on(*_: object) -> Any:  # as psycopg does, whose cancelling takes seconds
        written.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(30)
        await asyncio.sleep(5)

    case.cloud.held = {0, 1, 2, 3}
    if hangs == "starting a call":
        monkeypatch.setattr(case.cloud, "spawn", hang)
    if hangs == "the progress":
        monkeypatch.setattr(transcription, "PROGRESS_INTERVAL", 0.01)
        monkeypatch.setattr(transcription._Run, "_write", hang_on)  # noqa: SLF001
    running = case.start(await case.claim())
    if hangs == "starting a call":
        await asyncio.sleep(0.3)
    else:
        await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    if hangs == "the progress":
        await case.until(written.is_set)
    monkeypatch.setattr(case.cloud, "cancel", hang)
    monkeypatch.setattr(case.cloud, "discard", hang)
    if hangs == "the database":
        monkeypatch.setattr(CallLog, "_execute", hang_on)
    case.is_cancelled = True
    began = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - began < 2


async def test_a_job_without_calls_has_no_usage(case: Case) -> None:
    async def missing(file_path: str) -> str:  # noqa: ARG001
        raise AudioNotFound

    case.bucket.locate = missing  # type: ignore[method-assign]
    with pytest.raises(AudioNotFound):
        await case.run()
    assert case.row()["usage"] is None


async def test_a_plan_is_stored_once(case: Case) -> None:
    attempt = await case.claim()
    log = CallLog(case.pool, attempt)
    call = (await log.load()).preparation
    await log.note_call(call, "call-1")
    await log.note_call(call, "call-1")
    outcome = Outcome(case.cloud.plan.to_dict(), Usage(cpu_seconds=3.0))
    for _ in range(2):  # as after a broken connection
        known = await log.store_plan(call, outcome)
    await log.note_usage(2.0, 1.0)
    assert case.row()["usage"]["cpu_seconds"] == 3
    assert case.row()["usage"]["calls"] == 1
    assert len(known.chunks) == CHUNKS


def waveform(case: Case) -> list[int] | None:
    query = "select peaks from processing_job_waveforms where job_id = %s"
    row = case.conn.execute(query, (case.job_id,)).fetchone()
    return None if row is None else row[0]


async def test_peaks_come_with_the_plan_and_are_kept_apart(case: Case) -> None:
    case.cloud.plan = replace(plan(), peaks=(0, 128, 255))
    assert (await case.run()).text == TEXT
    assert waveform(case) == [0, 128, 255]
    kept = case.conn.execute("select plan from pgscribe.preparations").fetchone()
    assert kept is not None
    assert "peaks" not in kept[0]
    case.end("failed")
    case.conn.execute("delete from processing_jobs")
    assert waveform(case) is None


async def test_a_second_preparation_has_its_own_peaks(case: Case) -> None:
    log = CallLog(case.pool, await case.claim())
    for number, peaks in enumerate([(1, 2), (3,), ()]):
        call = (await log.load()).preparation
        await log.note_call(call, f"call-{number}")
        answer = replace(case.cloud.plan, peaks=peaks).to_dict()
        for _ in range(2):  # as after a broken connection
            await log.store_plan(call, Outcome(answer, Usage()))
    assert waveform(case) == [3], "one without any changes nothing"


async def test_functions_of_the_version_before_send_no_peaks(case: Case) -> None:
    log = CallLog(case.pool, await case.claim())
    call = (await log.load()).preparation
    await log.note_call(call, "call-1")
    answer = case.cloud.plan.to_dict()
    del answer["peaks"]
    known = await log.store_plan(call, Outcome(answer, Usage()))
    assert known.plan == case.cloud.plan
    assert waveform(case) is None


async def test_workers_run_on_the_schema_of_the_version_before(case: Case) -> None:
    """There the plan is kept as it comes."""
    (before,) = (m.sql for m in migrate.migrations() if m.name == "limits")
    start = before.index("create or replace function pgscribe.store_plan")
    case.conn.execute(before[start : before.index("end $$;", start) + len("end $$;")].encode())
    case.cloud.plan = replace(plan(), peaks=(0, 128, 255))
    assert (await case.run()).text == TEXT
    assert waveform(case) is None


async def test_what_was_paid_for_is_kept_while_the_database_is_away(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections break off at each statement's first try; none of the calls is made twice."""
    execute = psycopg.AsyncConnection.execute
    failed: set[bytes] = set()

    async def flaky(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(query, bytes) and b"pgscribe." in query and query not in failed:
            failed.add(query)
            await self.close()
        return await execute(self, query, *arguments, **options)

    attempt = await case.claim()
    monkeypatch.setattr(psycopg.AsyncConnection, "execute", flaky)
    assert (await case.run(attempt)).text == TEXT
    assert len(failed) >= 5
    assert len(case.cloud.requests) == 1 + CHUNKS


async def test_errors_say_whether_another_attempt_makes_sense() -> None:
    retryable = {CallLost, CallTimeout, ComputeUnavailable}
    final = {AttemptLost, JobTimeout, ResultNotStorable}
    assert all(error.retryable for error in retryable)
    assert not any(error.retryable for error in final)
    assert all(issubclass(error, PgscribeError) for error in retryable | final)


# Limits of the owner's


async def refusal(case: Case) -> str:
    attempt = await case.claim()
    with pytest.raises(PgscribeError) as caught:
        await case.run(attempt)
    assert not caught.value.retryable
    assert sum(isinstance(r, Transcribe) for r in case.cloud.requests.values()) == 0
    return f"{caught.value.code}, {caught.value}"


def limit_owner(case: Case, limit: str, value: float) -> None:
    query = f"select limit_owner(user_id, {limit} => %s) from processing_jobs limit 1"
    case.conn.execute(query.encode(), (value,))


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("max_duration", 39.5, "audio_too_long, max_duration: .* 40.0 s, .* limit of 39.5 s"),
        ("max_audio_seconds_per_month", 39.5, "quota_exceeded, .* 40.0 s, .* 39.5 s are left"),
        ("max_file_bytes", 999, "file_too_large, max_file_bytes: .* 1000 bytes, .* limit of 999"),
    ],
)
async def test_what_is_over_a_limit_is_refused_before_it_is_transcribed(
    case: Case, limit: str, value: float, message: str
) -> None:
    limit_owner(case, limit, value)
    assert re.match(message, await refusal(case))
    case.end("failed")
    assert case.audio() == []
    case.conn.execute("update procrastinate.procrastinate_jobs set status = 'todo'")
    limit_owner(case, limit, {"max_file_bytes": 1000}.get(limit, 40))
    assert (await case.run()).text == TEXT


async def test_the_compute_side_knows_the_longest_duration(case: Case) -> None:
    limit_owner(case, "max_duration", 50)
    await case.run()
    (prepare,) = (r for r in case.cloud.requests.values() if isinstance(r, Prepare))
    assert prepare.max_seconds == 50


async def test_jobs_that_run_at_the_same_time_share_the_month(case: Case) -> None:
    limit_owner(case, "max_audio_seconds_per_month", 79)
    case.conn.execute(
        "insert into processing_jobs (user_id, file_path)"
        " select user_id, 'u/b.mp3' from processing_jobs"
    )
    case.cloud.held = set(range(CHUNKS))
    first = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    before = len(case.cloud.requests)
    attempt = await case.claim()
    with pytest.raises(
        TranscriptionFailed, match=r"40.0 s, .* limit of 79 s a month 39.0 s are left"
    ):
        await case.run(attempt)
    assert len(case.cloud.requests) == before + 1, "its preparation"
    case.cloud.let_go.set()
    assert (await first).text == TEXT


async def test_an_attempt_that_was_let_through_stays_so(case: Case) -> None:
    case.cloud.held = set(range(CHUNKS))
    first = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == CHUNKS)
    limit_owner(case, "max_duration", 1)
    await case.lose()
    second = case.start(await case.claim())
    await case.until(lambda: case.cloud.at_a_time == 2 * CHUNKS)
    case.cloud.let_go.set()
    assert (await second).text == TEXT
    with pytest.raises(AttemptLost):
        await first
