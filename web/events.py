"""Who looks on at jobs is told of changes: one connection that listens, for all streams.

A notification is a hint to look, since anybody may send one. What is sent to a stream was read from
the tables as the stream's user, under row level security. docs/decisions/0005-events.md says more.
"""

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self
from uuid import UUID, uuid4

import psycopg

from jobs import database
from jobs.backoff import Backoff
from jobs.connection import CALL_TIMEOUT, QueueConnection
from jobs.errors import (
    DatabaseUnavailable,
    JobNotFound,
    NotAuthenticated,
    PgscribeError,
    ServerBusy,
    TooManyStreams,
)
from jobs.settings import Settings
from jobs.sql import EVENTS
from web.sessions import SIGN_IN_AGAIN
from web.sse import encode

logger = logging.getLogger(__name__)

CHANNELS = ("pgscribe_events", "pgscribe_chunks")
BEAT = 10.0  # seconds between signs of life, each with an echo
ECHO_TIMEOUT = 2.0  # seconds
POLL = 3.0  # seconds between looks where notifications do not arrive
AGAIN = 1.0  # seconds from the first look to the second, which sees what committed around the first
RELOOK = 10.0  # seconds between looks that nothing has asked for
REST = 0.25  # seconds between two looks at one job
FLOOD_REST = 5.0  # seconds between two looks at all that an owner has
OPENING = 10.0  # seconds that a stream's first look may take
BATCH = 50  # users in one call
UNASKED = 10  # of them at most whom nothing has been heard of
MAX_JOBS = 200  # jobs of one user in one look
MAX_HINTED = 1000  # jobs of one user that wait to be looked at
MAX_PENDING = 300  # events that wait for one client
MAX_SNAPSHOT = 100  # jobs in a snapshot
MAX_ENDED = 600  # jobs of one user that a returning client is told the end of
MAX_KNOWN = 500  # jobs of one user that are remembered
OVERLAP = 30_000_000  # microseconds: a transaction may commit so long after its time
RESUMABLE = 600_000_000  # microseconds
_POSITION = re.compile(r"([0-9]{1,17})(-end)?")

Failures = (psycopg.Error, TimeoutError, OSError)


class Listener:
    """One stream: what waits to be sent. A job's newer state takes the place of its older one."""

    __slots__ = (
        "_frames", "_on_close", "_over", "_text_due", "_text_sent", "_text_version", "_wake",
        "audience", "ended", "ended_before", "expires", "gap", "job_id", "live", "opened",
        "session_id", "since",
    )  # fmt: skip

    def __init__(self, audience: "Audience", job_id: UUID | None, on_close: "Forget") -> None:
        self.audience = audience
        self.job_id = job_id  # None: all jobs of the owner's
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.live = False  # whether it has had the look that it begins with
        self.since: int | None = None  # the position that the client has reached, in microseconds
        self.ended_before = False  # whether the client says that it knows the job's end
        self.ended = False
        self.gap = False  # whether it may have missed something
        self.expires = float("inf")  # seconds since 1970
        self.session_id: bytes | None = None  # of the browser's session that has opened it
        self._on_close = on_close
        self._frames: dict[object, bytes] = {}
        self._text_due: Topic | None = None
        self._text_version = self._text_sent = 0
        self._wake = asyncio.Event()
        self._over = False

    def open(self) -> None:
        """Say that it has had the look that it begins with."""
        self.live = True
        if not self.opened.done():
            self.opened.set_result(None)

    def fail(self, error: PgscribeError) -> None:
        """End it at once; who waits for its first look gets the error."""
        self.end_at_once()
        if not self.opened.done():
            self.opened.set_exception(error)

    def reopen(self) -> None:
        """Forget what waits: a snapshot takes its place, which says that there is a gap."""
        self._frames.clear()
        self.gap = True
        self.live = False

    @property
    def overflowing(self) -> bool:
        """Whether more waits than for a client that keeps up."""
        return len(self._frames) > MAX_PENDING

    def push(self, key: object, frame: bytes) -> None:
        """Have an event sent, instead of an older one with the same key."""
        if not self._over:
            self._frames[key] = frame
            self._wake.set()

    def push_text(self, topic: "Topic") -> None:
        """Have the text sent that the client does not have, as it is then."""
        news = (self._text_version, self._text_sent) != (topic.version, len(topic.text))
        if news and not self._over:
            self._text_due = topic
            self._wake.set()

    def finish(self, reason: str | None = None, *, position: str | None = None) -> None:
        """End the stream after what waits; with a ``reason``, the client need not come back."""
        if not self._over and reason is not None:
            self.push("end", encode("end", {"reason": reason}, position=position))
        self._over = True
        self._wake.set()

    def end_at_once(self) -> None:
        """End the stream without what waits: the client comes back for it."""
        self._frames.clear()
        self._text_due = None
        self.finish()

    async def next(self, seconds: float) -> bytes | None:
        """Return what waits; ``b""`` if nothing came for so long, ``None`` at the end."""
        if not self._wake.is_set():
            left = min(seconds, self.expires - time.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()
        self._wake.clear()
        if time.time() >= self.expires:
            self.finish("token_expired")
        frames = self._text() + b"".join(self._frames.values())
        self._frames.clear()
        if self._over:
            self._wake.set()
        return None if self._over and not frames else frames

    def _text(self) -> bytes:
        topic, self._text_due = self._text_due, None
        if topic is None:
            return b""
        if self._text_version != topic.version:
            self._text_version, self._text_sent = topic.version, 0
        offset, self._text_sent = self._text_sent, len(topic.text)
        data = {"id": str(self.job_id), "ready": topic.ready, "chunks": topic.chunks}
        return encode("partial", data | {"offset": offset, "text": topic.text[offset:]})

    def close(self) -> None:
        """Take the stream off the hub."""
        self.end_at_once()
        self._on_close(self)


Forget = Callable[[Listener], None]


class Topic:
    """A job that streams of one audience are about: its state and text as last read."""

    __slots__ = ("chunks", "listeners", "mark", "ready", "state", "text", "version")

    def __init__(self) -> None:
        self.listeners: set[Listener] = set()
        self.state: int | None = None  # None: not read yet
        self.text = ""
        self.version = 0  # of the text: it grows at its end only, else this changes
        self.ready = 0
        self.chunks = 0
        self.mark: str | None = None

    def read(self, answer: Mapping[str, Any]) -> None:
        """Take in text that was not known."""
        if answer["since"] != self.ready and self.text:
            self.version += 1
            self.text = ""
        self.ready, self.chunks, self.mark = answer["ready"], answer["chunks"], answer["mark"]
        added = answer["text"] or ""
        self.text += added if self.text else added.removeprefix(" ")


class Audience:
    """All streams with the same claims: what one of them may see, all may."""

    def __init__(self, owner: UUID, claims: str) -> None:
        self.owner = owner
        self.claims = claims
        self.all_jobs: set[Listener] = set()
        self.topics: dict[UUID, Topic] = {}
        self.active: dict[UUID, int] = {}  # states as last sent
        self.ended: dict[UUID, int] = {}
        self.since: int | None = None  # microseconds: what ended before is no news
        self.hinted: dict[UUID, None] = {}
        self.list_due = False
        self.next_look = 0.0
        self.next_flood = 0.0
        self._rest: dict[UUID, float] = {}

    @property
    def empty(self) -> bool:
        """Whether nobody is left."""
        return not (self.all_jobs or self.topics)

    @property
    def listeners(self) -> list[Listener]:
        """All streams."""
        return [*self.all_jobs, *(one for topic in self.topics.values() for one in topic.listeners)]

    @property
    def opening(self) -> bool:
        """Whether a stream waits for its first look."""
        return any(not one.live for one in self.listeners)

    def hint(self, job_id: UUID) -> None:
        """Note that a job may have changed."""
        if self.all_jobs or job_id in self.topics:
            if len(self.hinted) < MAX_HINTED:
                self.hinted[job_id] = None
            else:
                self.flood()

    def flood(self) -> None:
        """Note that any job may have changed, and more of them than can be told one by one."""
        self.hinted = dict.fromkeys(self.topics)
        for listener in self.all_jobs:
            listener.reopen()
        self.next_look = max(time.monotonic(), self.next_flood)
        self.next_flood = self.next_look + FLOOD_REST

    def relook(self) -> None:
        """Have all looked at that is known."""
        self.hinted |= dict.fromkeys([*self.topics, *self.active])
        self.list_due = bool(self.all_jobs)

    def asked(self, now: float) -> bool:
        """Whether something may have changed, or somebody waits for their first look."""
        if self.next_look <= now and self.opening:
            return True
        return any(self._rest.get(job_id, 0.0) <= now for job_id in self.hinted)

    def due_at(self) -> float:
        """Return when to look, on the monotonic clock."""
        due = self.next_look
        for job_id in self.hinted:
            due = min(due, self._rest.get(job_id, 0.0))
        return due

    def take(self) -> list[UUID]:
        """Return the jobs to look at now, which then have a rest."""
        now = time.monotonic()
        if len(self._rest) > MAX_KNOWN:
            self._rest = {job_id: at for job_id, at in self._rest.items() if at > now}
        opening = self.opening
        taken = [job_id for job_id in self.hinted if opening or self._rest.get(job_id, 0.0) <= now][
            :MAX_JOBS
        ]
        for job_id in taken:
            del self.hinted[job_id]
            self._rest[job_id] = now + REST
        return taken


class Look:
    """One look at the jobs of one audience, and what it means for its streams."""

    def __init__(self, audience: Audience) -> None:
        self.audience = audience
        self._list = audience.list_due or any(not one.live for one in audience.all_jobs)
        self._opening = [one for one in audience.listeners if not one.live]
        for listener in self._opening:
            if listener.job_id is not None:
                audience.hinted.setdefault(listener.job_id)
        self._asked = audience.take()
        audience.list_due = False

    def request(self) -> dict[str, Any]:
        """Return what ``pgscribe.look`` is asked."""
        topics = self.audience.topics
        return {
            "claims": self.audience.claims,
            "owner": str(self.audience.owner),
            "list": self._list,
            "jobs": [str(job_id) for job_id in self._asked],
            "texts": [
                {"job": str(job_id), "known": topics[job_id].ready, "mark": topics[job_id].mark}
                for job_id in self._asked
                if job_id in topics
            ],
        }

    def undo(self) -> None:
        """Ask again later: there was no answer."""
        self.audience.hinted |= dict.fromkeys(self._asked)
        self.audience.list_due = self._list

    def tell(self, answer: Mapping[str, Any], now: int) -> None:
        """Send what is new to the streams. ``now`` is the database's time in microseconds."""
        audience = self.audience
        if audience.since is None:
            audience.since = now
        jobs = {UUID(job["id"]): job for job in answer["jobs"] or ()}
        texts = {UUID(text["job"]): text for text in answer["texts"] or ()}
        if self._list:
            self._tell_snapshot(jobs, answer["running"], now)
        for job_id, job in reversed(list(jobs.items())):
            self._tell_state(job_id, job, now)
            if topic := audience.topics.get(job_id):
                self._tell_topic(job_id, topic, job, texts.get(job_id), now)
        for job_id in self._asked:
            if job_id not in jobs:
                self._tell_gone(job_id, now)
        for listener in self._opening:
            listener.open()
        self._start_over_where_too_much_waits()

    def _tell_snapshot(
        self, jobs: Mapping[UUID, dict[str, Any]], running: Iterable[str], now: int
    ) -> None:
        new = [one for one in self._opening if one.job_id is None]
        if not new:
            return
        first = dict.fromkeys(map(UUID, running))
        active = [
            jobs[job_id] for job_id in (*first, *jobs) if job_id in jobs and _active(jobs[job_id])
        ]
        unique = {job["id"]: _public(job) for job in active}
        shown = list(unique.values())[:MAX_SNAPSHOT]
        for listener in new:
            data = {"jobs": shown, "gap": listener.gap}
            listener.push("snapshot", encode("snapshot", data, position=str(now)))
            for job_id, job in reversed(list(jobs.items())):
                if listener.since is not None and (job["ended"] or 0) >= listener.since:
                    listener.push(job_id, _job_frame(job, now))
            listener.gap, listener.since = False, None

    def _tell_state(self, job_id: UUID, job: dict[str, Any], now: int) -> None:
        audience = self.audience
        if not audience.all_jobs:
            return
        state = _fingerprint(job)
        known = audience.active.pop(job_id, None) or audience.ended.pop(job_id, None)
        (audience.active if _active(job) else audience.ended)[job_id] = state
        while len(audience.ended) > MAX_KNOWN:
            del audience.ended[next(iter(audience.ended))]
        while len(audience.active) > MAX_KNOWN:
            del audience.active[next(iter(audience.active))]
        news = job["ended"] is None or job["ended"] >= (audience.since or 0) - OVERLAP
        if known == state or (known is None and not news):
            return
        frame = _job_frame(job, now)
        for listener in audience.all_jobs:
            if listener.live:
                listener.push(job_id, frame)

    def _tell_topic(
        self,
        job_id: UUID,
        topic: Topic,
        job: dict[str, Any],
        text: Mapping[str, Any] | None,
        now: int,
    ) -> None:
        state = _fingerprint(job)
        changed, topic.state = topic.state != state, state
        if text is not None:
            topic.read(text)
        frame = _job_frame(job, now)
        for listener in list(topic.listeners):
            if changed or not listener.live:
                listener.push(job_id, frame)
            if not _active(job):
                listener.ended = True
                listener.finish("job_ended", position=f"{now}-end")
            else:
                listener.push_text(topic)

    def _tell_gone(self, job_id: UUID, now: int) -> None:
        audience = self.audience
        frame = encode("deleted", {"id": str(job_id)}, position=str(now))
        if topic := audience.topics.get(job_id):
            for listener in list(topic.listeners):
                if not listener.live:
                    listener.fail(JobNotFound())
                elif topic.state is not None:
                    listener.push(job_id, frame)
                    listener.finish("job_deleted", position=f"{now}-end")
        known = audience.active.pop(job_id, None) or audience.ended.pop(job_id, None)
        if known is not None:
            for listener in audience.all_jobs:
                if listener.live:
                    listener.push(job_id, frame)

    def _start_over_where_too_much_waits(self) -> None:
        for listener in self.audience.all_jobs:
            if listener.overflowing:
                listener.reopen()


def _active(job: Mapping[str, Any]) -> bool:
    return job["ended"] is None


def _public(job: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != "ended"}


def _fingerprint(job: Mapping[str, Any]) -> int:
    return hash(tuple(value for name, value in job.items() if name != "updated_at")) or 1


def _job_frame(job: Mapping[str, Any], now: int) -> bytes:
    return encode("job", _public(job), position=str(now))


class EventHub:
    """All streams of this process and the connection that listens for them.

    It opens the connection for the first stream and closes it after the last. While the database is
    away the streams stay open; afterwards each gets what has changed meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        self._id = str(uuid4())
        self._max_streams = settings.max_streams
        self._max_per_owner = settings.max_streams_per_user
        connect = functools.partial(database.connect, settings, name="events")
        self._connection = QueueConnection(connect, EVENTS)
        self._connection.listen(
            CHANNELS, on_notify=self._hear, on_connect=self._on_connect, on_loss=self._on_loss
        )
        self._audiences: dict[str, Audience] = {}
        self._by_owner: dict[UUID, set[Audience]] = {}
        self._by_job: dict[UUID, set[Audience]] = {}
        self._streams: Counter[UUID] = Counter()
        self._watched: set[UUID] = set()
        self._changed = asyncio.Event()
        self._next_beat = 0.0
        self._echo_check: float | None = None
        self._next_poll = 0.0
        self._deaf = False
        self._reached: int | None = None  # what ended before that has been looked at
        self._caught_up = True
        self._stopped = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end_streams()
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._sign_off()

    # Streams

    @property
    def streams(self) -> int:
        """How many are open."""
        return self._streams.total()

    async def listen(
        self,
        claims: Mapping[str, Any],
        *,
        job_id: UUID | None = None,
        last_event_id: str = "",
        session_id: bytes | None = None,
    ) -> Listener:
        """Return a stream of one job's events, or of all of the user's; ``close`` it in the end.

        ``session_id``: of the browser's session that opens it, for ``end_session``. Raises
        ``JobNotFound``, ``TooManyStreams``, ``ServerBusy``, ``DatabaseUnavailable`` and, if the
        session ends meanwhile, ``NotAuthenticated``.
        """
        owner = UUID(claims["sub"])
        self._check_limits(owner)
        listener = self._add(owner, claims, job_id)
        position = _POSITION.fullmatch(last_event_id)
        if position:
            listener.since = int(position[1]) - OVERLAP
            listener.ended_before = position[2] is not None
        listener.expires = float(claims.get("exp", "inf"))
        listener.session_id = session_id
        self._changed.set()
        try:
            async with asyncio.timeout(OPENING):
                await listener.opened
        except TimeoutError:
            listener.close()
            raise DatabaseUnavailable from None
        except BaseException:
            listener.close()
            raise
        return listener

    def end_streams(self) -> None:
        """End all streams, as the server stops: their clients come back to another one."""
        self._stopped = True
        for audience in list(self._audiences.values()):
            for listener in audience.listeners:
                listener.fail(ServerBusy())

    def end_session(self, session_id: bytes) -> None:
        """End the streams of a session that has ended; those of the user's others go on."""
        for audience in list(self._audiences.values()):
            for listener in audience.listeners:
                if listener.session_id == session_id:
                    listener.fail(NotAuthenticated(SIGN_IN_AGAIN))

    def _check_limits(self, owner: UUID) -> None:
        if self._streams[owner] >= self._max_per_owner:
            raise TooManyStreams(
                f"You have {self._max_per_owner} streams of events open, which is the limit; "
                "close one, or follow all jobs with one at /jobs/events"
            )
        if self._stopped or self.streams >= self._max_streams:
            raise ServerBusy

    def _add(self, owner: UUID, claims: Mapping[str, Any], job_id: UUID | None) -> Listener:
        key = json.dumps(dict(claims), sort_keys=True)
        audience = self._audiences.get(key)
        if audience is None:
            audience = self._audiences[key] = Audience(owner, key)
            self._by_owner.setdefault(owner, set()).add(audience)
        listener = Listener(audience, job_id, self._forget)
        if job_id is None:
            audience.all_jobs.add(listener)
        else:
            audience.topics.setdefault(job_id, Topic()).listeners.add(listener)
            self._by_job.setdefault(job_id, set()).add(audience)
        self._streams[owner] += 1
        audience.next_look = 0.0
        return listener

    def _forget(self, listener: Listener) -> None:
        audience, job_id = listener.audience, listener.job_id
        if job_id is None:
            if listener not in audience.all_jobs:
                return
            audience.all_jobs.remove(listener)
        else:
            topic = audience.topics.get(job_id)
            if topic is None or listener not in topic.listeners:
                return
            topic.listeners.remove(listener)
            if not topic.listeners:
                del audience.topics[job_id]
                _discard(self._by_job, job_id, audience)
        self._streams[audience.owner] -= 1
        if not self._streams[audience.owner]:
            del self._streams[audience.owner]
        if audience.empty:
            del self._audiences[audience.claims]
            _discard(self._by_owner, audience.owner, audience)

    # Hints

    def _hear(self, channel: str, payload: str) -> None:
        try:
            hint = json.loads(payload)
            if channel == CHANNELS[0]:
                self._hear_of_jobs(UUID(hint["owner"]), hint["jobs"])
            else:
                self._hear_of_jobs(None, [hint["job_id"]])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            logger.warning("Somebody sends nonsense to %s", channel)
        self._changed.set()

    def _hear_of_jobs(self, owner: UUID | None, jobs: Sequence[str] | None) -> None:
        audiences = self._by_owner.get(owner, set()) if owner else set()
        if jobs is None:
            for audience in audiences:
                audience.flood()
            return
        for job_id in map(UUID, jobs):
            for audience in audiences | self._by_job.get(job_id, set()):
                audience.hint(job_id)

    def _on_connect(self) -> None:
        """Have everything looked at: nobody knows what was notified meanwhile."""
        self._watched.clear()
        self._next_beat = 0.0
        self._relook()

    def _on_loss(self) -> None:
        self._next_beat = 0.0
        self._changed.set()

    def _relook(self) -> None:
        self._caught_up = False
        for audience in self._audiences.values():
            audience.relook()

    # The loop that talks to the database

    async def _run(self) -> None:
        backoff, away = Backoff(), False
        while True:
            try:
                await self._turn()
                backoff.reset()
                if away:
                    logger.warning("Streams of events are in touch with the database again")
                    away = False
            except Failures as exc:
                if not away:
                    away = True
                    logger.warning("The database does not answer streams of events: %s", exc)
                self._next_beat = 0.0
                await backoff.sleep()
            except Exception:
                logger.exception("Streams of events failed; they go on")
                await asyncio.sleep(1)

    async def _turn(self) -> None:
        self._changed.clear()
        now = time.monotonic()
        if not self._audiences:
            await self._rest(now)
            return
        if self._echo_check is not None and now >= self._echo_check:
            await self._check_echo()
        if now >= self._next_beat:
            await self._beat(now)
        elif new := self._by_owner.keys() - self._watched:
            await self._watch(new)
        if not self._connection.hears and now >= self._next_poll:
            self._next_poll = now + POLL
            self._relook()
        await self._catch_up()
        if not await self._look():
            await self._wait()

    async def _rest(self, now: float) -> None:
        """Wait for a stream; after a while without any, without a connection."""
        if now >= self._next_beat:
            await self._sign_off()
            await self._changed.wait()
            self._next_beat = 0.0
        else:
            await self._wait()

    async def _sign_off(self) -> None:
        if self._connection.is_open:
            self._connection.call_timeout = ECHO_TIMEOUT
            with contextlib.suppress(*Failures):
                await self._connection.call("unwatch", {"hub": self._id})
            self._connection.call_timeout = CALL_TIMEOUT
            await self._connection.close()
        self._watched.clear()
        self._echo_check = self._reached = None

    async def _beat(self, now: float) -> None:
        owners = set(self._by_owner)
        self._connection.expect_echo()
        row = await self._connection.call(
            "watch",
            {
                "hub": self._id,
                "owners": [str(owner) for owner in owners],
                "complete": True,
                "echo_channel": self._connection.echo_channel,
            },
        )
        self._watched = owners
        self._reached = self._reached or row["now"]
        self._next_beat = now + BEAT
        self._echo_check = now + ECHO_TIMEOUT

    async def _watch(self, owners: set[UUID]) -> None:
        values = {"hub": self._id, "complete": False, "echo_channel": None}
        values["owners"] = [str(owner) for owner in owners]
        await self._connection.call("watch", values)
        self._watched |= owners

    async def _check_echo(self) -> None:
        self._echo_check = None
        await self._connection.check_echo()
        if self._connection.hears:
            self._deaf = False
        elif not self._deaf:
            self._deaf = True
            logger.warning(
                "Notifications do not arrive, so streams of events look every %g s. Is there a "
                "pooler in transaction mode? Use the direct or session-pooler URL.",
                POLL,
            )

    async def _catch_up(self) -> None:
        """Have those jobs looked at that ended while nobody could tell."""
        since: dict[UUID, int] = {}
        if not self._caught_up and self._reached is not None:
            owners = (
                owner for owner, found in self._by_owner.items() if any(a.all_jobs for a in found)
            )
            since = dict.fromkeys(owners, self._reached - OVERLAP)
        oldest = (self._reached or 0) - RESUMABLE
        for listener in self._resuming():
            assert listener.since is not None
            if listener.since < oldest:
                listener.gap, listener.since = True, None
                continue
            audience = listener.audience
            audience.since = min(audience.since or listener.since, listener.since)
            since[audience.owner] = min(since.get(audience.owner, listener.since), listener.since)
        if since:
            await self._find_ended(since)
        self._caught_up = True

    def _resuming(self) -> list[Listener]:
        return [
            listener
            for audience in self._audiences.values()
            for listener in audience.all_jobs
            if listener.since is not None and not listener.live
        ]

    async def _find_ended(self, since: Mapping[UUID, int]) -> None:
        values = {"owners": list(map(str, since)), "since": min(since.values()), "most": MAX_ENDED}
        row = await self._connection.call("ended_since", values)
        for owner, jobs in (row["found"] or {}).items():
            self._hear_of_jobs(UUID(owner), jobs)

    async def _look(self) -> bool:
        """Look at what is due, and say whether there was anything."""
        now = time.monotonic()
        asked = [one for one in self._audiences.values() if one.asked(now)][:BATCH]
        due = [one for one in self._audiences.values() if one.next_look <= now]
        batch = dict.fromkeys([*asked, *due[:UNASKED]])
        for audience in batch:
            if audience.next_look <= now:
                # What was under way when its owner began to be watched was not notified.
                audience.next_look = now + (AGAIN if audience.since is None else RELOOK)
                audience.relook()
        if batch:
            await self._ask([Look(audience) for audience in batch])
        return bool(batch)

    async def _ask(self, looks: Sequence[Look]) -> None:
        lookups = json.dumps([look.request() for look in looks])
        try:
            row = await self._connection.call("look", {"lookups": lookups})
        except BaseException as exc:
            for look in looks:
                look.undo()
            # One user's look that the database can't make is no reason to keep others from theirs.
            if not isinstance(exc, psycopg.Error) or not self._connection.is_open:
                raise
            if len(looks) == 1:
                logger.exception("A user's streams of events failed and are closed")
                self._drop(looks[0].audience)
                return
        else:
            for look, answer in zip(looks, row["answers"], strict=True):
                look.tell(answer, row["now"])
            self._reached = row["now"]
            return
        for look in looks:
            await self._ask([Look(look.audience)])

    @staticmethod
    def _drop(audience: Audience) -> None:
        for listener in audience.listeners:
            listener.fail(PgscribeError())

    async def _wait(self) -> None:
        times = [self._next_beat, *(audience.due_at() for audience in self._audiences.values())]
        if self._echo_check is not None:
            times.append(self._echo_check)
        if not self._connection.hears:
            times.append(self._next_poll)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(times)):
                await self._changed.wait()


def _discard(index: dict[UUID, set[Audience]], key: UUID, audience: Audience) -> None:
    found = index.get(key, set())
    found.discard(audience)
    if not found:
        index.pop(key, None)
