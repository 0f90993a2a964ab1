"""A procrastinate worker that claims fairly and in batches, whatever its database does."""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

import procrastinate
from procrastinate import exceptions, job_context, signals
from procrastinate import worker as procrastinate_worker

from jobs import execution, logs, metrics
from jobs.backoff import Backoff
from jobs.errors import AttemptLost, DatabaseUnavailable, PgscribeError, ResultNotStorable
from jobs.queue import LIGHT_QUEUES, QUEUE_NAME, UNUSABLE, ClaimedJob, Due, Ended, Queue, Turn
from jobs.wakeups import Wakeups, announcement

logger = logging.getLogger(__name__)

LONGEST_BEAT = 10.0  # seconds between heartbeats, at most
ECHO_TIMEOUT = 2.0  # seconds for a notification to arrive
POLL_DEAF = 2.0  # seconds between looks while notifications don't arrive
POLL = 30.0  # seconds between looks while they do, in case one was lost all the same
SWEEP_STEP = 0.02  # seconds from one worker's look for dead ones to the next one's
SIGN_OFF_TIMEOUT = 3.0  # seconds that a stopping worker tries to tell the database
WORKERS_CHANNEL = "pgscribe_workers"
JOBS_CHANNEL = f"procrastinate_queue_v1#{QUEUE_NAME}"
LIGHT_CHANNELS = frozenset(f"procrastinate_queue_v1#{name}" for name in LIGHT_QUEUES)
CHANNELS = (WORKERS_CHANNEL, JOBS_CHANNEL, *LIGHT_CHANNELS)


OnEnded = Callable[[ClaimedJob, Ended], None]


@dataclass(frozen=True, slots=True)
class Condition:
    """How a worker is.

    ``turned`` and ``contact`` are seconds since its loop went round, and since the database
    answered it; ``away``: what it sent last was not answered. ``running`` and ``slots`` are of
    transcriptions and of light jobs.
    """

    turned: float
    contact: float
    away: bool
    hears: bool
    draining: bool
    running: tuple[int, int]
    slots: tuple[int, int]


@dataclass(slots=True)
class _Running:
    """A job that runs here. ``stopped`` says why it was told to stop, if it was."""

    claimed: ClaimedJob
    task: asyncio.Task[None] | None = None
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        if self.stopped is None and self.task is not None:
            self.stopped = reason
            self.task.cancel()


class Worker(procrastinate_worker.Worker):
    """Runs procrastinate's tasks; see docs/decisions/0002-queue.md for what it adds.

    One loop talks to the database: a *turn* ends what has ended and claims what there are slots
    for, a *beat* says that this worker is alive. What is ready goes at once; what becomes ready
    during a turn waits for the next one, so batches form by themselves. An error of the
    database only delays the next turn. Light jobs, which are webhooks and maintenance, have
    ``light_slots`` of their own.
    """

    def __init__(
        self,
        app: procrastinate.App,
        *,
        queue: Queue,
        stall_timeout: float,
        light_slots: int,
        on_ended: OnEnded | None = None,
        **options: Any,
    ) -> None:
        super().__init__(app, **options)
        self._on_ended = on_ended
        self._light_slots = light_slots
        self._queue = queue
        queue.connection.listen(
            CHANNELS,
            on_notify=self._on_notify,
            on_connect=self._on_listening,
            on_loss=self._on_loss,
        )
        self._beat_interval = min(LONGEST_BEAT, stall_timeout / 3)
        self._stall_timeout = stall_timeout
        self._id = 0
        self._wakeups = Wakeups(time.monotonic)
        self._light_wakeups = Wakeups(time.monotonic)
        self._changed = asyncio.Event()
        self._running: dict[tuple[int, int], _Running] = {}  # by ClaimedJob.key
        self._ended: deque[tuple[ClaimedJob, Ended]] = deque()
        self._most_ends: int | None = None  # how many a turn takes, after one that failed
        self._busy: list[tuple[ClaimedJob, Ended]] = []  # their rows are locked by somebody else
        self._busy_backoff = Backoff(0.02, 1.0)
        self._busy_until = 0.0
        self._missed_backoff = Backoff(0.05, 2.0)
        self._abort_requested = False
        self._turning = False
        self._next_beat = 0.0
        self._next_poll = 0.0
        self._next_echo_check: float | None = None
        self._last_contact = self._turned_at = time.monotonic()
        self._away = True  # until the database has answered for the first time
        self._sweep_from = 0.0
        self._draining = False
        self._stop_at: float | None = None
        self._give_up_at = math.inf

    # Starting and stopping

    async def run(self) -> None:
        """Run until stopped or cancelled; then let running jobs finish for the graceful timeout.

        Jobs that take longer are given back to the queue. Without ``wait`` it also ends once there
        is nothing to do; nothing else ends it.
        """
        self._stop_event.clear()
        self._loop = asyncio.get_running_loop()
        talking = asyncio.create_task(self._talk())
        stopping = asyncio.create_task(self._drain_when_stopped())
        periodic = asyncio.create_task(self._forever(self._periodic_deferrer))
        on_signals = signals.on_stop if self.install_signal_handlers else contextlib.nullcontext
        try:
            with on_signals(self.stop):
                await asyncio.shield(talking)
        except asyncio.CancelledError:
            self.stop()
            await talking
            raise
        finally:
            self._loop = None
            for task in (stopping, periodic):
                task.cancel()
            for running in self._running.values():
                running.stop("shutdown")
            await asyncio.gather(stopping, periodic, return_exceptions=True)
            await self._queue.close()

    def stop(self) -> None:
        """Claim no more jobs, let the running ones finish for the graceful timeout, then end."""
        super().stop()  # type: ignore[no-untyped-call]

    def stop_now(self) -> None:
        """Stop without waiting for running jobs; they are given back to the queue."""
        self.shutdown_graceful_timeout = 0.0
        self.stop()
        self._stop_at = 0.0
        self._give_up_at = min(self._give_up_at, time.monotonic() + SIGN_OFF_TIMEOUT)
        self._changed.set()

    @property
    def condition(self) -> Condition:
        """How the worker is. Any thread may ask."""
        now = time.monotonic()
        running = list(self._running.values())
        light = sum(job.claimed.attempt is None for job in running)
        return Condition(
            turned=now - self._turned_at,
            contact=now - self._last_contact,
            away=self._away,
            hears=self._queue.connection.hears,
            draining=self._draining,
            running=(len(running) - light, light),
            slots=(self.concurrency, self._light_slots),
        )

    async def _drain_when_stopped(self) -> None:
        await self._stop_event.wait()
        self._draining = True
        if self.shutdown_graceful_timeout is not None and self._stop_at is None:
            self._stop_at = time.monotonic() + self.shutdown_graceful_timeout
        if self._stop_at is not None:
            self._give_up_at = max(self._stop_at, time.monotonic()) + SIGN_OFF_TIMEOUT
        self._queue.connection.call_timeout = SIGN_OFF_TIMEOUT
        self._changed.set()

    async def _forever(self, side_task: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run a side task for as long as the worker runs: whatever ends it, it is started again."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                await side_task()
            except exceptions.ConnectorException as exc:
                said = str(exc.__cause__ or exc).strip()  # procrastinate's own says little
                logger.warning("The database does not answer a side task of the worker: %s", said)
            except Exception:
                logger.exception("A side task of the worker failed; it is started again")
            await backoff.sleep()

    # The loop that talks to the database

    async def _talk(self) -> None:
        backoff = Backoff()
        away_since: float | None = None
        while not self._done():
            self._turned_at = time.monotonic()
            try:
                if not self._id:
                    self._id = await self._queue.register()
                    self.worker_id = self._id
                    self._next_beat = 0.0
                    self._look_for_all()
                await self._take_turn_or_wait()
                self._away = False
                backoff.reset()
                if away_since is not None:
                    logger.warning("Back in touch after %.1f s", time.monotonic() - away_since)
                    away_since = None
            except DatabaseUnavailable as exc:
                self._away = True
                if away_since is None:
                    away_since = time.monotonic()
                    logger.warning("The database does not answer, trying again: %s", exc)
                if time.monotonic() > self._give_up_at:
                    logger.warning("Gave up signing off: the database is out of reach")
                    return
                self._stop_what_takes_too_long()
                self._next_beat = 0.0  # what was sent may have been done: compare
                await backoff.sleep()
        with contextlib.suppress(DatabaseUnavailable):
            await self._queue.sign_off(self._id)

    def _done(self) -> bool:
        if time.monotonic() > self._give_up_at:
            return True  # signing off gives back what could not be ended, or does not stop
        return self._draining and not (self._running or self._ended or self._busy)

    async def _take_turn_or_wait(self) -> None:
        now = time.monotonic()
        self._stop_what_takes_too_long()
        if self._next_echo_check is not None and now >= self._next_echo_check:
            self._next_echo_check = None
            await self._queue.connection.check_echo()
        if now >= self._next_beat:
            await self._beat()
            if not self._id:
                return
        if self._busy and now >= self._busy_until:
            self._ended.extend(self._busy)
            self._busy.clear()
        self._changed.clear()
        free, light = self._free_slots()
        if now >= self._next_poll and (free or light):
            metrics.POLLS.inc()
            self._look_for_all()
        due = (free and self._wakeups.due) or (light and self._light_wakeups.due)
        if self._ended or self._abort_requested or due:
            await self._turn(free, light)
        elif not self._done():
            times = [self._next_beat, self._next_echo_check, self._busy_until, self._stop_at]
            times.append(self._give_up_at)
            times += [self._next_poll] if free or light else []
            times += [self._wakeups.next()] if free else []
            times += [self._light_wakeups.next()] if light else []
            await self._wait_for_change(min(at for at in times if at and at > now))

    def _free_slots(self) -> tuple[int, int]:
        """Return how many jobs may start, and how many light ones."""
        if self._draining:
            return 0, 0
        light = sum(running.claimed.attempt is None for running in self._running.values())
        return self.concurrency - (len(self._running) - light), self._light_slots - light

    def _look_for_all(self) -> None:
        self._wakeups.add_own()
        self._light_wakeups.add_own()

    async def _wait_for_change(self, until: float) -> None:
        pause = until - time.monotonic()
        alarm = asyncio.get_running_loop().call_later(pause, self._changed.set)
        await self._changed.wait()
        alarm.cancel()

    async def _turn(self, free: int, light: int) -> None:
        ended = list(self._ended)[: self._most_ends]
        reached, light_reached = self._wakeups.reached(), self._light_wakeups.reached()
        self._abort_requested = False
        self._turning = True
        try:
            with metrics.TURN_SECONDS.time():
                turn = await self._queue.turn(
                    self._id,
                    [end for _, end in ended],
                    free,
                    announcement(reached) if free and self._wakeups.workers > 1 else None,
                    light=light,
                    light_announcement=(
                        announcement(light_reached) if light and self._wakeups.workers > 1 else None
                    ),
                    running=bool(self._running),
                )
        except UNUSABLE:
            await self._end_one_by_one(ended)
            return
        except DatabaseUnavailable:
            self._most_ends = max(1, len(ended) // 2)  # perhaps they were too many for its deadline
            raise
        finally:
            self._turning = False
        self._last_contact = time.monotonic()
        for _ in ended:
            self._ended.popleft()
        if self._most_ends is not None:
            self._most_ends = 2 * self._most_ends if self._ended else None
        busy = [
            (claimed, end)
            for claimed, end in ended
            if end.job_id in turn.busy or end.queue_job_id in turn.light_busy
        ]
        self._put_off(busy)
        self._tell(pair for pair in ended if pair not in busy)
        for claimed in turn.jobs:
            self._start(claimed)
        await asyncio.sleep(0)  # so that they start before anything else is done
        self._stop_cancelled(turn.abort)
        if light:
            self._light_wakeups.forget(light_reached)
            if turn.light_more:
                self._light_wakeups.add_own()
            self._plan(self._light_wakeups, turn.light_due)
        if free:
            self._wakeups.forget(reached)
            self._plan_next_look(turn)
        if free or light:
            hears = self._queue.connection.hears
            self._next_poll = time.monotonic() + (POLL if hears else POLL_DEAF)

    def _tell(self, stored: Iterable[tuple[ClaimedJob, Ended]]) -> None:
        if self._on_ended is not None:
            for claimed, end in stored:
                self._on_ended(claimed, end)

    def _stop_cancelled(self, queue_job_ids: frozenset[int]) -> None:
        for (queue_job_id, _), running in self._running.items():
            if queue_job_id in queue_job_ids:
                running.stop("cancel")

    def _put_off(self, busy: list[tuple[ClaimedJob, Ended]]) -> None:
        """End these a little later: somebody else has locked their rows."""
        if busy:
            self._busy.extend(busy)
            self._busy_until = time.monotonic() + self._busy_backoff.next()
        else:
            self._busy_backoff.reset()

    def _plan_next_look(self, turn: Turn) -> None:
        if turn.more and turn.jobs:
            self._wakeups.add_own()
        if turn.missed:
            self._wakeups.add_own(self._missed_backoff.next())
        else:
            self._missed_backoff.reset()
        self._plan(self._wakeups, turn.due)
        if not (self.wait or self._running or turn.more):
            self.stop()

    def _plan(self, wakeups: Wakeups, due: Due) -> None:
        if due is not None:
            at, seconds = due
            # The other kind may fall due in the same millisecond, and is another token.
            token = int(at * 1000) * (1 if wakeups is self._wakeups else -1)
            wakeups.add(token, max(seconds, 0.0) + 0.001)

    async def _end_one_by_one(self, ended: list[tuple[ClaimedJob, Ended]]) -> None:
        """Find the result that Postgres can't store, and fail its job; end the others."""
        for claimed, end in ended:
            stored = end
            try:
                await self._queue.turn(self._id, [end], 0, None)
            except UNUSABLE as unusable:
                refused = ResultNotStorable()
                stored = claimed.end("failed", error_code=refused.code, error=str(refused))
                try:
                    await self._queue.turn(self._id, [stored], 0, None)
                except UNUSABLE as also:  # so it is not the result
                    raise DatabaseUnavailable(str(also)) from also
                logger.exception(
                    "How queue job %s ended can't be stored", end.queue_job_id, exc_info=unusable
                )
            self._ended.popleft()
            self._tell([(claimed, stored)])

    async def _beat(self) -> None:
        held = [running.claimed for running in self._running.values()]
        held += [claimed for claimed, _ in (*self._ended, *self._busy)]
        now = time.monotonic()
        if now - self._last_contact > self._stall_timeout:
            # Out of touch for that long: the others may have been, too, and need time to report.
            self._sweep_from = now + self._stall_timeout
        beat = await self._queue.beat(self._id, held, sweep=now >= self._sweep_from)
        self._last_contact = now = time.monotonic()
        self._next_beat = now + self._beat_interval
        self._next_echo_check = now + min(ECHO_TIMEOUT, self._beat_interval / 2)
        if beat is None:
            metrics.PRESUMED_DEAD.inc()
            logger.warning("Worker %s was presumed dead; its jobs are no longer its own", self._id)
            self._id = 0
            self._ended.clear()
            self._busy.clear()
            for running in self._running.values():
                running.stop("lost")
            return
        for wakeups in (self._wakeups, self._light_wakeups):
            wakeups.rank, wakeups.workers = beat.rank, max(beat.workers, 1)
        if beat.stall is not None:
            # In turn, and not too often while nobody may be swept yet.
            pause = beat.stall + SWEEP_STEP * (beat.rank + 1) if beat.stall > 0 else 1.0
            self._next_beat = min(self._next_beat, now + pause)
        if beat.orphans:
            logger.warning("Gave back %s jobs whose claim went unheard", beat.orphans)
        metrics.SWEPT.inc(beat.swept)
        if beat.swept:
            logger.warning("Swept %s jobs of workers presumed dead", beat.swept)
        for running in self._running.values():
            if running.claimed.key in beat.lost:
                running.stop("lost")
        self._stop_cancelled(beat.abort)

    # Notifications: hints to look, never the truth

    def _on_listening(self) -> None:
        metrics.CONNECTIONS.inc()
        self._look_for_all()  # whatever was sent during the gap
        self._abort_requested = True
        self._changed.set()

    def _on_loss(self) -> None:
        self._next_beat = 0.0
        self._changed.set()

    def _on_notify(self, channel: str, payload: str) -> None:
        try:
            message = json.loads(payload)
        except (ValueError, RecursionError):
            return
        if channel == WORKERS_CHANNEL and isinstance(message, list):
            tokens = [token for token in message if isinstance(token, int)]
            self._wakeups.forget(tokens)
            self._light_wakeups.forget(tokens)
            return
        match message:
            case {"type": "abort_job_requested", "job_id": int(job_id)}:
                # While a turn is under way it may be for a job that this turn claims.
                if self._turning or any(job_id == queue_job for queue_job, _ in self._running):
                    self._abort_requested = True
                    self._changed.set()
            case {"type": "job_inserted", "job_id": int(job_id)}:
                light = channel in LIGHT_CHANNELS
                if self._free_slots()[light] > 0:
                    metrics.NOTIFICATIONS.labels("light" if light else "transcription").inc()
                    (self._light_wakeups if light else self._wakeups).add(job_id)
                    self._changed.set()

    # Running jobs

    def _start(self, claimed: ClaimedJob) -> None:
        running = _Running(claimed)
        self._running[claimed.key] = running
        running.task = asyncio.create_task(self._run_job(running))

    async def _run_job(self, running: _Running) -> None:
        claimed = running.claimed
        logs.begin(**claimed.context, worker=self._id)
        started = time.monotonic()
        end: Ended | None
        try:
            context = {
                "app": self.app,
                "worker_name": self.worker_name,
                "worker_queues": self.queues,
                "additional_context": dict(self.additional_context or {}),
                "abort_reason": lambda: _abort_reason(running),
            }
            end = await execution.execute(claimed, self, context)
        except asyncio.CancelledError:
            end = {
                "cancel": claimed.end("cancelled"),
                "shutdown": claimed.end("released"),
                "lost": None,
                None: self._end_of_unforeseen(claimed),
            }[running.stopped]
        except Exception:
            logger.exception("Queue job %s could not be run", claimed.queue_job_id)
            end = self._end_of_unforeseen(claimed)
        finally:
            del self._running[claimed.key]
        _count(claimed, end, time.monotonic() - started)
        if end is not None:
            self._ended.append((claimed, end))
        self._changed.set()

    @staticmethod
    def _end_of_unforeseen(claimed: ClaimedJob) -> Ended:
        return claimed.end("failed", error_code=PgscribeError.code, error=str(PgscribeError()))

    def _stop_what_takes_too_long(self) -> None:
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            for running in self._running.values():
                running.stop("shutdown")


def _count(claimed: ClaimedJob, end: Ended | None, seconds: float) -> None:
    outcome, error_code = (end.outcome, end.error_code) if end else ("lost", None)
    if error_code == AttemptLost.code:  # it saw that by itself, before a beat said so
        outcome, error_code = "lost", None
    if claimed.attempt is None:
        metrics.light_attempt_ended(claimed.queue_name, outcome)
    else:
        metrics.attempt_ended(outcome, error_code, seconds, end.audio_seconds if end else None)


def _abort_reason(running: _Running) -> job_context.AbortReason | None:
    reasons: dict[str | None, job_context.AbortReason] = {
        "cancel": job_context.AbortReason.USER_REQUEST,
        "shutdown": job_context.AbortReason.SHUTDOWN,
        "lost": job_context.AbortReason.SHUTDOWN,
    }
    return reasons.get(running.stopped)


class App(procrastinate.App):
    """procrastinate's app, whose worker is ours: also for ``procrastinate worker``."""

    def __init__(
        self,
        *,
        queue: Callable[[], Queue],
        stall_timeout: float,
        light_slots: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._new_queue = queue
        self._stall_timeout = stall_timeout
        self._light_slots = light_slots

    def _worker(self, **options: Any) -> Worker:
        return Worker(
            self,
            queue=self._new_queue(),
            stall_timeout=self._stall_timeout,
            light_slots=self._light_slots,
            **{**self.worker_defaults, **options},
        )

    #: A worker that is not running yet; its options are procrastinate's.
    new_worker = _worker
