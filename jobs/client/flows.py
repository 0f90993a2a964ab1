"""What the clients do, step by step, without any input or output.

A flow is a generator: it yields the next step, is sent what came of it, and returns its result.
Both clients carry out the same flows, one with blocking and one with awaited calls.
"""

import base64
import json
import mimetypes
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit
from uuid import UUID, uuid4

from pydantic import BaseModel, ValidationError

from jobs.backoff import Backoff
from jobs.client import requests
from jobs.client.requests import (
    FilePart,
    JobChanged,
    JobDeleted,
    NewJob,
    PartialText,
    Reply,
    Request,
    Ticket,
    TranscriptFormat,
)
from jobs.client.server_sent_events import EventReader, StreamUnreadable
from jobs.corrections import read_transcript
from jobs.errors import InvalidInput, JobNotFound, RequestFailed, ServerUnreachable, WaitTimedOut
from jobs.models import JobStatus, ProcessingJob, Transcript

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)

TUS = {"Tus-Resumable": "1.0.0"}
TUS_CHUNK = 6 * 1024 * 1024  # bytes; Supabase asks for exactly that
POLLS = (0.25, 2.0)  # seconds between two looks at a job, at first and at most
BROKEN_STREAMS = 3  # in a row and without an event; then it is polled

_AWAY = {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
_NO_ROUTE = {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED}
_GONE = {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}
# 409 and 423: another request, perhaps one that was lost, still holds the upload.
_TUS_PASSING = _AWAY | {408, 409, 423, 429, HTTPStatus.INTERNAL_SERVER_ERROR}


# Steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer came. ``unsent``: nor did the server get the request."""

    reason: str
    unsent: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request and read all of its answer: a ``Reply`` or ``Lost``."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """As ``Send``, but leave the body of a good answer to ``Read``."""

    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    """Read on in what is open: bytes, ``None`` at its end, or ``Lost``."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Call:
    """Call what may block, and send what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Item:
    """Give the caller something on the way."""

    value: Any


Step = Send | Open | Read | Pause | Call | Item
Flow = Generator[Step, Any, T]
# Asks for so many items from a cursor on; returns them, and the next cursor.
AskPage = Callable[[int, str | None], Flow[tuple[Sequence[Any], str | None]]]


@dataclass(frozen=True, slots=True)
class Retries:
    """How long a request is tried again: ``attempts`` in all, for at most ``seconds``.

    The pauses between them double from ``first`` to ``longest`` seconds, unless the server says
    when to come back.
    """

    attempts: int = 5
    seconds: float = 60.0
    first: float = 0.25
    longest: float = 8.0


class Deadline:
    """A point in time, ``seconds`` from now; ``None``: never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Return how many seconds are left."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def cap(self, seconds: float) -> float:
        """Return at most so many seconds as are left. Raises ``WaitTimedOut`` where none are."""
        left = self.left()
        if left <= 0:
            raise WaitTimedOut
        return min(seconds, left)


@dataclass(frozen=True, slots=True)
class _Answered:
    reply: Reply
    in_doubt: bool  # whether an earlier try may have been done as well


def _collect(flow: Flow[T], use: Callable[[Any], None]) -> Flow[T]:
    """Run a flow within another one, which takes its items."""
    came: Any = None
    while True:
        try:
            step = flow.send(came)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, Item):
            use(step.value)
            came = None
        else:
            came = yield step


def _is_passing(request: Request, outcome: Reply | Lost) -> bool:
    """Whether the same request may succeed in a moment, and may be sent again."""
    if isinstance(outcome, Lost):
        return request.repeatable or outcome.unsent
    if outcome.status == HTTPStatus.TOO_MANY_REQUESTS:
        return True  # refused before anything was done
    if outcome.status == HTTPStatus.CONFLICT:
        return request.repeatable and requests.failure(outcome).code == "request_in_flight"
    return request.repeatable and outcome.status in _AWAY


# The client's operations ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flows:
    """The flows for a server at ``url``. All raise ``RequestFailed`` and ``ServerUnreachable``."""

    url: str
    retries: Retries = field(default_factory=Retries)

    def _exchange(self, request: Request, deadline: Deadline | None = None) -> Flow[_Answered]:
        """Send a request, again and again where that makes sense. The answer may be a refusal."""
        backoff = Backoff(self.retries.first, self.retries.longest)
        budget = Deadline(min(self.retries.seconds, deadline.left() if deadline else float("inf")))
        in_doubt = False
        for attempt in count(1):
            outcome = yield Send(request)
            pause = backoff.next()
            if isinstance(outcome, Reply):
                pause = max(pause, requests.failure(outcome).retry_after or 0)
            if (
                attempt >= self.retries.attempts
                or not _is_passing(request, outcome)
                or pause >= budget.left()
            ):
                if isinstance(outcome, Lost):
                    raise self.unreachable(outcome)
                return _Answered(outcome, in_doubt)
            in_doubt = in_doubt or not isinstance(outcome, Reply) or outcome.status in _AWAY
            yield Pause(pause)
        raise AssertionError

    def unreachable(self, lost: Lost) -> ServerUnreachable:
        """Say that nobody answers, without what may stand before the host."""
        parts = urlsplit(self.url)
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return ServerUnreachable(
            f"No pgscribe server answers at {where} ({lost.reason}); start one with `pgscribe dev`"
        )

    def _ask(self, request: Request, deadline: Deadline | None = None) -> Flow[Reply]:
        answered = yield from self._exchange(request, deadline)
        return requests.done(answered.reply)

    def submit(self, job: NewJob) -> Flow[UUID]:
        """Submit a job."""
        reply = yield from self._ask(requests.submit(job))
        return requests.parse(requests.Accepted, reply).job_id

    def submit_many(self, jobs: Sequence[NewJob]) -> Flow[list[UUID]]:
        """Submit jobs in one transaction."""
        reply = yield from self._ask(requests.submit_many(jobs))
        return [job.job_id for job in requests.parse(requests.AllAccepted, reply).jobs]

    def job(self, request: Request, deadline: Deadline | None = None) -> Flow[ProcessingJob]:
        """Send a request that is answered with a job."""
        reply = yield from self._ask(request, deadline)
        return requests.parse(ProcessingJob, reply)

    def answer(self, model: type[ModelT], request: Request) -> Flow[ModelT]:
        """Send a request, and return what it is answered with."""
        reply = yield from self._ask(request)
        return requests.parse(model, reply)

    def pages(self, ask: AskPage, limit: int | None) -> Flow[None]:
        """Yield what is on all pages, at most ``limit``."""
        yield from _pages(ask, limit)

    def list_jobs(self, status: JobStatus | None, limit: int | None) -> Flow[None]:
        """Yield jobs, page by page."""

        def ask(size: int, cursor: str | None) -> Flow[tuple[Sequence[Any], str | None]]:
            reply = yield from self._ask(requests.list_jobs(status, size, cursor))
            page = requests.parse(requests.JobPage, reply)
            return page.jobs, page.next_cursor

        yield from _pages(ask, limit)

    def search(self, text: str, limit: int | None) -> Flow[None]:
        """Yield what is found, page by page."""

        def ask(size: int, cursor: str | None) -> Flow[tuple[Sequence[Any], str | None]]:
            reply = yield from self._ask(requests.search(text, size, cursor))
            page = requests.parse(requests.SearchPage, reply)
            return page.results, page.next_cursor

        yield from _pages(ask, limit)

    def delete(self, request: Request) -> Flow[None]:
        """Delete something. If no answer came the first time, it may be gone the second."""
        answered = yield from self._exchange(request)
        if not (answered.in_doubt and answered.reply.status == HTTPStatus.NOT_FOUND):
            requests.done(answered.reply)

    def transcript(
        self, job_id: UUID, form: TranscriptFormat, *, original: bool
    ) -> Flow[Transcript | str]:
        """Get a transcript."""
        reply = yield from self._ask(requests.transcript(job_id, form, original=original))
        if reply.headers.get("pgscribe-partial") == "true":
            raise RequestFailed(
                "The job is not completed yet; wait for it, or follow it for its text",
                status=reply.status,
                code="transcript_not_ready",
            )
        if form != "json":
            return reply.body.decode()
        try:
            said = json.loads(reply.body)
            return read_transcript({part.name: said[part.name] for part in fields(Transcript)})
        except (KeyError, TypeError, ValueError):
            raise requests.unexpected(reply) from None

    # Audio --------------------------------------------------------------------------------------

    def upload(self, path: Path) -> Flow[str]:
        """Upload a file as the server says."""
        size = (yield Call(path.stat)).st_size
        if not size:
            raise InvalidInput(
                f"path: {path.name!r} is empty, there is nothing in it", field="path"
            )
        guess = mimetypes.guess_type(path.name)[0] or ""
        kind = guess if guess.startswith(("audio/", "video/")) else "application/octet-stream"
        reply = yield from self._ask(requests.ask_upload(path.name, size, kind))
        part = FilePart(path, 0, size)
        ticket = requests.parse(Ticket, reply)
        url = self.resolve(ticket.url)
        if ticket.method == "PUT":
            yield from self._put(ticket, url, part)
        else:
            yield from _Tus(self, ticket, url, part).run()
        return ticket.file_path

    def resolve(self, url: str) -> str:
        """Return a URL that the server gave: one without a host is the API's own."""
        return url if urlsplit(url).scheme else self.url + url

    def _put(self, ticket: Ticket, url: str, part: FilePart) -> Flow[None]:
        answered = yield from self._exchange(ticket.request("PUT", url, {}, part))
        if not (answered.in_doubt and _is_there_already(answered.reply)):
            requests.done(answered.reply)

    def download(self, job_id: UUID, path: Path) -> Flow[int]:
        """Save a job's audio, whole or not at all, and return its size in bytes."""
        part = path.with_name(f".{path.name}.{uuid4().hex}.part")
        backoff = Backoff(self.retries.first, self.retries.longest)
        try:
            for attempt in count(1):
                outcome = yield from self._fetch(requests.audio(job_id), part)
                if isinstance(outcome, int):
                    yield Call(lambda: part.replace(path))
                    return outcome
                if attempt >= self.retries.attempts:
                    raise self.unreachable(outcome)
                yield Pause(backoff.next())
        finally:
            part.unlink(missing_ok=True)
        raise AssertionError

    def _fetch(self, request: Request, part: Path) -> Flow[int | Lost]:
        """Get audio from where it is; the token does not go along to there."""
        opened = yield Open(request)
        if isinstance(opened, Reply) and opened.status in range(300, 400):
            where = self.resolve(opened.headers.get("location", ""))
            opened = yield Open(requests.elsewhere(where))
        if isinstance(opened, Lost):
            return opened
        if opened.status in _AWAY or opened.status == HTTPStatus.TOO_MANY_REQUESTS:
            pause = requests.failure(opened).retry_after or 0
            if pause > self.retries.seconds:
                raise requests.failure(opened)
            yield Pause(pause)
            return Lost(f"HTTP {opened.status}")
        requests.done(opened)
        with (yield Call(lambda: part.open("wb"))) as file:
            while (data := (yield Read())) is not None:
                if isinstance(data, Lost):
                    return data
                yield Call(partial(file.write, data))
            return int(file.tell())

    # Following ----------------------------------------------------------------------------------

    def follow(self, job_id: UUID, deadline: Deadline | None = None) -> Flow[None]:
        """Yield a job's events until it has ended or is deleted. Raises ``WaitTimedOut``."""
        yield from _Following(self, job_id, deadline or Deadline(None)).run()

    def wait(
        self, job_id: UUID, seconds: float | None, on_change: Callable[[JobChanged], None] | None
    ) -> Flow[ProcessingJob]:
        """Wait until a job has ended and return it."""
        deadline = Deadline(seconds)

        def see(event: object) -> None:
            if isinstance(event, JobDeleted):
                raise _deleted()
            if isinstance(event, JobChanged) and on_change is not None:
                on_change(event)

        while True:
            yield from _collect(self.follow(job_id, deadline), see)
            job = yield from self.job(requests.get_job(job_id), deadline)
            if job.status.ended:  # else somebody has retried it
                return job


def _pages(ask: AskPage, limit: int | None) -> Flow[None]:
    cursor: str | None = None
    left = float("inf") if limit is None else limit
    while left > 0:
        items, cursor = yield from ask(int(min(left, requests.PAGE)), cursor)
        for item in items[: int(min(left, len(items)))]:
            yield Item(item)
        left -= len(items)
        if cursor is None:
            return


def _is_there_already(reply: Reply) -> bool:
    """Whether storage refuses a file as it has it: ours, or Supabase's way to say 409."""
    return reply.status in {HTTPStatus.CONFLICT, HTTPStatus.BAD_REQUEST} and (
        requests.failure(reply).code == "file_exists" or b"already exists" in reply.body
    )


def _deleted() -> RequestFailed:
    return RequestFailed(
        "The job has been deleted", status=HTTPStatus.NOT_FOUND, code=JobNotFound.code
    )


@dataclass(slots=True)
class _Tus:
    """A resumable upload (https://tus.io): where it was broken off is asked, and it goes on."""

    flows: Flows
    ticket: Ticket
    endpoint: str
    part: FilePart
    url: str | None = None
    offset: int = 0
    lost: bool = False  # whether it has to be asked how much has arrived
    tries: int = 0  # since there was progress
    in_doubt: bool = False

    def run(self) -> Flow[None]:
        """Upload the file."""
        retries = self.flows.retries
        backoff = Backoff(retries.first, retries.longest)
        while self.url is None or self.offset < self.part.size:
            before = self.offset
            outcome = yield from self._next()
            if outcome is None:
                if self.offset > before:
                    self.tries = 0
                    backoff.reset()
                continue
            if isinstance(outcome, Reply) and _is_there_already(outcome):
                if self.in_doubt:
                    return
                raise requests.failure(outcome)
            self.tries += 1
            pause = self._pause(outcome, backoff.next())
            self.in_doubt = self.lost = True
            yield Pause(pause)

    def _pause(self, outcome: Reply | Lost, pause: float) -> float:
        """Return how long to wait before going on, or raise why there is no going on."""
        retries = self.flows.retries
        if isinstance(outcome, Lost):
            if self.tries >= retries.attempts:
                raise self.flows.unreachable(outcome)
            return pause
        failed = requests.failure(outcome)
        if outcome.status in _GONE and self.url is not None:
            self.url, self.offset = None, 0  # it has expired: from the beginning
        elif outcome.status not in _TUS_PASSING:
            raise failed
        pause = max(pause, failed.retry_after or 0)
        if self.tries >= retries.attempts or pause > retries.seconds:
            raise failed
        return pause

    def _next(self) -> Flow[Reply | Lost | None]:
        """Take one step; return what went wrong with it."""
        if self.url is None:
            return (yield from self._create())
        if self.lost:
            reply = yield Send(self.ticket.request("HEAD", self.url, TUS))
            problem = self._take_offset(reply)
            self.lost = problem is not None
            return problem
        return (yield from self._send(self.url))

    def _create(self) -> Flow[Reply | Lost | None]:
        pairs = (
            f"{name} {base64.b64encode(value.encode()).decode()}"
            for name, value in (self.ticket.metadata or {}).items()
        )
        headers = {"Upload-Length": str(self.part.size), "Upload-Metadata": ",".join(pairs)}
        made: Reply | Lost = yield Send(self.ticket.request("POST", self.endpoint, TUS | headers))
        if isinstance(made, Lost) or not made.ok:
            return made
        self.url = self._located(made.headers.get("location", ""))
        self.lost = False
        return None if self.url else Lost("the answer names no upload")

    def _located(self, location: str) -> str | None:
        """Return an upload's URL, at the endpoint's host: nobody else gets what ``headers`` has."""
        url = urljoin(self.endpoint, location)
        if urlsplit(url)[:2] == urlsplit(self.endpoint)[:2]:
            return url if location else None
        return f"{self.endpoint.rstrip('/')}/{url.rstrip('/').rpartition('/')[2]}"

    def _send(self, url: str) -> Flow[Reply | Lost | None]:
        size = min(self.ticket.chunk_size or TUS_CHUNK, self.part.size - self.offset)
        headers = {
            "Upload-Offset": str(self.offset),
            "Content-Type": "application/offset+octet-stream",
        }
        part = FilePart(self.part.path, self.offset, size)
        before = self.offset
        reply = yield Send(self.ticket.request("PATCH", url, TUS | headers, part))
        problem = self._take_offset(reply)
        if problem is None and self.offset <= before:
            return Lost("nothing has arrived")
        return problem

    def _take_offset(self, reply: Reply | Lost) -> Reply | Lost | None:
        if isinstance(reply, Lost) or not reply.ok:
            return reply
        text = reply.headers.get("upload-offset", "")
        if not (text.isascii() and text.isdigit() and int(text) <= self.part.size):
            return Lost("the answer has no usable offset")
        self.offset = int(text)
        return None


@dataclass(slots=True)
class _Following:
    """Events from a stream; where there is none, or it breaks, from looking at the job."""

    flows: Flows
    job_id: UUID
    deadline: Deadline
    seen: JobChanged | None = None
    over: bool = False
    streams: bool = True
    broken: int = 0  # streams in a row that brought no event
    reader: EventReader = field(default_factory=EventReader)
    text: str = ""

    def run(self) -> Flow[None]:
        """Yield events until the job has ended or is deleted."""
        reconnecting = Backoff(self.flows.retries.first, self.flows.retries.longest)
        polling = Backoff(*POLLS)
        while True:
            # A stream may be silent for so long; the last seconds are exact only if it is polled.
            if self.streams and self.deadline.left() > requests.STREAM_SILENCE:
                came = self.broken
                yield from self._stream()
                if self.broken <= came:
                    reconnecting.reset()
                self.streams = self.streams and self.broken < BROKEN_STREAMS
                pause = max(reconnecting.next(), self.reader.retry or 0) if self.streams else 0
            else:
                pause = polling.next()
            if not self.over:
                yield from self._poll()
            if self.over:
                return
            yield Pause(self.deadline.cap(pause))

    def _stream(self) -> Flow[None]:
        """Yield what a stream brings until it ends or breaks."""
        opened = yield Open(requests.events(self.job_id, self.reader.last_id))
        self.broken += 1
        if isinstance(opened, Lost):
            return
        if not opened.ok:
            self._refused(opened)
            return
        if opened.media_type != "text/event-stream":
            self.streams = False
            return
        last_id, retry = self.reader.last_id, self.reader.retry
        self.reader = EventReader(last_id)
        self.reader.retry = retry
        yield from self._read()

    def _refused(self, reply: Reply) -> None:
        """Note that there are no streams here, or not now. Raises what polling would run into."""
        failed = requests.failure(reply)
        if reply.status in _NO_ROUTE and failed.code != JobNotFound.code:
            self.streams = False
        elif reply.status not in _AWAY | {HTTPStatus.TOO_MANY_REQUESTS, *_NO_ROUTE}:
            raise failed

    def _read(self) -> Flow[None]:
        while not self.over:
            data = yield Read()
            if data is None or isinstance(data, Lost):
                return
            try:
                ended = yield from self._tell(data)
            except (StreamUnreadable, ValidationError):
                self.streams = False
                return
            if ended or self.deadline.left() <= requests.STREAM_SILENCE:
                return

    def _tell(self, data: bytes) -> Flow[bool]:
        """Yield what events say; return whether the stream says that it ends."""
        for event in self.reader.feed(data):
            self.broken = 0
            if event.name == "end":  # of this stream: a token may have expired
                self.over |= self.seen is not None and self.seen.status.ended
                return True
            told = requests.job_event(self.job_id, event.name, event.data)
            if isinstance(told, requests.Partial):
                self.text = self.text[: told.offset] + told.text
                yield Item(PartialText(self.job_id, self.text))
            elif told is not None and told != self.seen:
                self.seen = told if isinstance(told, JobChanged) else self.seen
                self.over = isinstance(told, JobDeleted)
                yield Item(told)
        return False

    def _poll(self) -> Flow[None]:
        answered = yield from self.flows._exchange(  # noqa: SLF001 - a part of it
            requests.get_job(self.job_id), self.deadline
        )
        if answered.reply.status == HTTPStatus.NOT_FOUND and self.seen is not None:
            self.over = True
            yield Item(JobDeleted(self.job_id))
            return
        now = requests.changed(requests.parse(ProcessingJob, answered.reply))
        if now != self.seen:
            self.seen = now
            yield Item(now)
        self.over = now.status.ended
