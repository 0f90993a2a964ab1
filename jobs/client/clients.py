"""Clients of the REST API for Python: ``JobClient`` blocks, ``AsyncJobClient`` is awaited.

Both do the same: what they do is in ``jobs.client.flows``, what they say and are told in
``jobs.client.requests``. They try again on broken connections, HTTP 429, 502, 503 and 504,
but never what would then be done twice: a job is submitted under an idempotency key.

All methods raise ``RequestFailed``, with the server's own code and message, and
``ServerUnreachable``. ``webhooks`` has the methods for webhooks.
"""

import asyncio
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from datetime import datetime
from functools import partial
from inspect import isawaitable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload
from urllib.parse import urlsplit
from uuid import UUID

import httpx2

from jobs import __version__
from jobs.client import requests
from jobs.client.flows import (
    Call,
    Flow,
    Flows,
    Item,
    Lost,
    Open,
    Pause,
    Read,
    Retries,
    Send,
    Step,
)
from jobs.client.requests import (
    FilePart,
    JobChanged,
    JobEvent,
    NewJob,
    Reply,
    Request,
    TextFormat,
    TranscriptFormat,
)
from jobs.client.webhooks import AsyncWebhooks, Webhooks
from jobs.errors import (
    InvalidInput,
    RequestFailed,
    ServerUnreachable,
)
from jobs.models import (
    JobStatus,
    JobSummary,
    ProcessingJob,
    SearchResult,
    Transcript,
    TranscriptionOptions,
)
from modal_functions import status as reports

CONNECT_TIMEOUT = 10.0  # seconds
BLOCK = 256 * 1024  # bytes that are read from a file at a time

T = TypeVar("T")
TokenT = TypeVar("TokenT")
Options = TranscriptionOptions | Mapping[str, Any]
OnChange = Callable[[JobChanged], None]


class _SecretURL(httpx2.URL):
    """A URL that allows something by itself: httpx2 logs the URLs of all requests as text."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/…"


class _Connection(Generic[TokenT]):
    """What both clients know of their server, and how requests become httpx2's."""

    def __init__(
        self,
        url: str,
        token: TokenT,
        *,
        user_id: UUID | str | None,
        timeout: float,
        retries: Retries | None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise InvalidInput(
                "url: must be the server's, such as https://example.org", field="url"
            )
        self._url = url.rstrip("/")
        if token is None:  # as of a variable that is not set
            raise InvalidInput("token: is missing; give a token or an API key", field="token")
        self._token = token
        self._flows = Flows(self._url, retries or Retries())
        self._timeout = timeout
        self._user = {} if user_id is None else {"Pgscribe-User": str(_uuid("user_id", user_id))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def _transport(self) -> dict[str, Any]:
        return {
            "headers": {"User-Agent": f"pgscribe/{__version__}"},
            "timeout": httpx2.Timeout(self._timeout, connect=min(CONNECT_TIMEOUT, self._timeout)),
        }

    def _build(
        self, http: httpx2.Client | httpx2.AsyncClient, request: Request, token: str, content: Any
    ) -> httpx2.Request:
        headers = dict(request.headers)
        if not request.signed:
            headers |= self._user | {"Authorization": f"Bearer {_usable(token)}"}
        if request.body is not None:
            headers["Content-Length"] = str(request.body.size)
        timeout = httpx2.Timeout(
            http.timeout.read if request.read_timeout is None else request.read_timeout,
            connect=http.timeout.connect,
            write=self._timeout,
            pool=self._timeout,
        )
        built = http.build_request(
            request.method,
            self._flows.resolve(request.url),
            params=request.query or None,
            headers=headers,
            json=request.json,
            content=content,
            timeout=timeout,
        )
        if request.signed:
            built.url = _SecretURL(built.url)
        return built


def _usable(token: str) -> str:
    """Return a token that can be sent; what is wrong with another one is said without it."""
    if not re.fullmatch("[!-~]+", token):
        raise InvalidInput("token: must be a bearer token: ASCII without spaces", field="token")
    return token


def _lost(exc: httpx2.TransportError) -> Lost:
    """Say what happened. Errors of the protocol are not quoted: they quote headers."""
    name = type(exc).__name__
    told = isinstance(exc, httpx2.NetworkError | httpx2.TimeoutException) and str(exc)
    unsent = isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    return Lost(f"{name}: {told}" if told else name, unsent)


def _reply(response: httpx2.Response, body: bytes) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, body)


def _uuid(field: str, value: UUID | str) -> UUID:
    """Return an id. Raises ``InvalidInput``."""
    try:
        return value if isinstance(value, UUID) else UUID(value)
    except ValueError:
        raise InvalidInput(f"{field}: must be a UUID", field=field) from None


_job_id = partial(_uuid, "job_id")


def _report(job_id: UUID, progress: float | None, note: str | None) -> JobChanged:
    """Report on a job through the supabase client."""
    report = {"progress": progress, "note": note}
    try:
        row = reports.update_job_status(str(job_id), "processing", report)
    except reports.InvalidReport as exc:
        raise InvalidInput(str(exc)) from None
    except reports.ReportRefused as exc:
        raise RequestFailed(str(exc), status=400, code="report_refused") from None
    except reports.StatusError as exc:
        raise ServerUnreachable(str(exc)) from None
    return JobChanged(UUID(row["id"]), JobStatus(row["status"]), row["progress"], row["note"])


class _Wire:
    """Takes the steps of one flow with blocking calls."""

    def __init__(self, client: "JobClient", http: httpx2.Client) -> None:
        self._client = client
        self._http = http
        self._open: httpx2.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def take(self, step: Step) -> Any:
        if isinstance(step, Send | Open):
            return self._send(step.request, keep_open=isinstance(step, Open))
        if isinstance(step, Read):
            return self._read()
        if isinstance(step, Call):
            return step.function()
        assert isinstance(step, Pause)
        time.sleep(step.seconds)
        return None

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _send(self, request: Request, *, keep_open: bool) -> Reply | Lost:
        self.close()
        content = None if request.body is None else _blocks(request.body)
        built = self._client._build(self._http, request, self._client._current(), content)  # noqa: SLF001
        try:
            response = self._http.send(built, stream=True)
        except httpx2.TransportError as exc:
            return _lost(exc)
        if keep_open and response.is_success:
            self._open, self._chunks = response, response.iter_bytes()
            return _reply(response, b"")
        try:
            return _reply(response, response.read())
        except httpx2.TransportError as exc:
            return _lost(exc)
        finally:
            response.close()

    def _read(self) -> bytes | Lost | None:
        try:
            return next(self._chunks, None)
        except httpx2.TransportError as exc:
            return _lost(exc)


def _blocks(part: FilePart) -> Iterator[bytes]:
    with part.path.open("rb") as file:
        file.seek(part.offset)
        left = part.size
        while left > 0 and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            yield block


class JobClient(_Connection[str | Callable[[], str]]):
    """Talks to the pgscribe server at ``url``. Use as a context manager; threads may share it.

    ``token`` is a user's, or an API key that acts for ``user_id``; a function that returns it is
    called before each request. ``timeout``: seconds to wait for an answer. ``retries``: how long
    to insist.
    """

    def __init__(
        self,
        url: str,
        token: str | Callable[[], str],
        *,
        user_id: UUID | str | None = None,
        timeout: float = 30.0,
        retries: Retries | None = None,
    ) -> None:
        super().__init__(url, token, user_id=user_id, timeout=timeout, retries=retries)
        self._http = httpx2.Client(**self._transport())
        self.webhooks = Webhooks(self._flows, self._run, self._items)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _current(self) -> str:
        return self._token if isinstance(self._token, str) else self._token()

    def _items(self, flow: Flow[T]) -> Generator[Any, None, T]:
        wire = _Wire(self, self._http)
        try:
            came: Any = None
            while True:
                step = flow.send(came)
                came = None
                if isinstance(step, Item):
                    yield step.value
                else:
                    came = wire.take(step)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            wire.close()
            flow.close()

    def _run(self, flow: Flow[T]) -> T:
        items = self._items(flow)
        try:
            next(items)
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("A flow without items yielded one")

    def upload(self, path: Path | str) -> str:
        """Upload a file and return its ``file_path`` in storage."""
        return self._run(self._flows.upload(Path(path)))

    def submit(  # noqa: PLR0913 - what a job may say
        self,
        file_path: str | None = None,
        options: Options | None = None,
        *,
        audio_url: str | None = None,
        scheduled_at: datetime | None = None,
        priority: int = 0,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
    ) -> UUID:
        """Submit a job for audio in storage or at a URL, and return its id.

        With an ``idempotency_key`` that was used before, that is the job of then. Without, the
        client makes one up, so that a broken connection can't submit twice.
        """
        job = NewJob(
            file_path, options, audio_url, scheduled_at, priority, webhook_url, idempotency_key
        )
        return self._run(self._flows.submit(job))

    def submit_many(self, jobs: Iterable[NewJob]) -> list[UUID]:
        """Submit jobs in one transaction and return their ids, in the same order.

        Those without an ``idempotency_key`` get one, as with ``submit``.
        """
        return self._run(self._flows.submit_many(list(jobs)))

    def get_job(self, job_id: UUID | str) -> ProcessingJob:
        """Return a job as it is now."""
        return self._run(self._flows.job(requests.get_job(_job_id(job_id))))

    def list_jobs(
        self, status: JobStatus | str | None = None, limit: int | None = None
    ) -> Iterator[JobSummary]:
        """Yield jobs, the newest first and without their results; at most ``limit``."""
        wanted = None if status is None else JobStatus.parse(status)
        return self._items(self._flows.list_jobs(wanted, limit))

    def search(self, text: str, limit: int | None = None) -> Iterator[SearchResult]:
        """Yield the jobs whose transcripts have these words, the newest first."""
        return self._items(self._flows.search(text, limit))

    def cancel(self, job_id: UUID | str) -> ProcessingJob:
        """Cancel a job: at once while it waits, within seconds while it runs."""
        return self._run(self._flows.job(requests.cancel(_job_id(job_id))))

    def retry(self, job_id: UUID | str) -> ProcessingJob:
        """Run a failed or cancelled job again, with all its attempts."""
        return self._run(self._flows.job(requests.retry(_job_id(job_id))))

    def delete(self, job_id: UUID | str) -> None:
        """Delete a job and its transcript."""
        self._run(self._flows.delete(requests.delete(_job_id(job_id))))

    def follow(self, job_id: UUID | str) -> Iterator[JobEvent]:
        """Yield a job's events as they happen, until it has ended or is deleted.

        ``PartialText`` comes only from servers with event streams.
        """
        return self._items(self._flows.follow(_job_id(job_id)))

    def wait(
        self,
        job_id: UUID | str,
        timeout: float | None = None,
        on_change: OnChange | None = None,
    ) -> ProcessingJob:
        """Wait until a job has ended and return it; ``on_change`` sees it on the way.

        Raises ``WaitTimedOut`` after ``timeout`` seconds; the job goes on.
        """
        return self._run(self._flows.wait(_job_id(job_id), timeout, on_change))

    @overload
    def transcript(
        self, job_id: UUID | str, format: Literal["json"] = ..., *, original: bool = ...
    ) -> Transcript: ...
    @overload
    def transcript(
        self, job_id: UUID | str, format: TextFormat, *, original: bool = ...
    ) -> str: ...
    def transcript(
        self,
        job_id: UUID | str,
        format: TranscriptFormat = "json",  # noqa: A002
        *,
        original: bool = False,
    ) -> Transcript | str:
        """Return a completed job's transcript: as data, as text, or as subtitles.

        It is as its owner has corrected it, or, with ``original``, as it was transcribed.
        """
        return self._run(self._flows.transcript(_job_id(job_id), format, original=original))

    def download_audio(self, job_id: UUID | str, path: Path | str) -> int:
        """Save a job's audio at ``path``, whole or not at all; return its size in bytes."""
        return self._run(self._flows.download(_job_id(job_id), Path(path)))

    def update_job_status(
        self, job_id: UUID | str, *, progress: float | None = None, note: str | None = None
    ) -> JobChanged:
        """Report progress (0 to 1) and a note on a processing job, as its owner can't.

        That takes a secret key of the Supabase project, which this client neither has nor sends:
        it is ``modal_functions.status.update_job_status``, with SUPABASE_URL and
        SUPABASE_SECRET_KEY from the environment. Raises ``InvalidInput`` where they are missing.
        """
        return self._run(_calling(lambda: _report(_job_id(job_id), progress, note)))


def _calling(function: Callable[[], T]) -> Flow[T]:
    result: T = yield Call(function)
    return result


class _AsyncWire:
    """Takes the steps of one flow with awaited calls."""

    def __init__(self, client: "AsyncJobClient", http: httpx2.AsyncClient) -> None:
        self._client = client
        self._http = http
        self._open: httpx2.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def take(self, step: Step) -> Any:
        if isinstance(step, Send | Open):
            return await self._send(step.request, keep_open=isinstance(step, Open))
        if isinstance(step, Read):
            return await self._read()
        if isinstance(step, Call):
            return await asyncio.to_thread(step.function)
        assert isinstance(step, Pause)
        await asyncio.sleep(step.seconds)
        return None

    async def close(self) -> None:
        if self._open is not None:
            response, self._open = self._open, None
            await response.aclose()

    async def _send(self, request: Request, *, keep_open: bool) -> Reply | Lost:
        await self.close()
        content = None if request.body is None else _async_blocks(request.body)
        token = await self._client._current()  # noqa: SLF001 - a part of it
        built = self._client._build(self._http, request, token, content)  # noqa: SLF001
        try:
            response = await self._http.send(built, stream=True)
        except httpx2.TransportError as exc:
            return _lost(exc)
        if keep_open and response.is_success:
            self._open, self._chunks = response, response.aiter_bytes()
            return _reply(response, b"")
        try:
            return _reply(response, await response.aread())
        except httpx2.TransportError as exc:
            return _lost(exc)
        finally:
            await response.aclose()

    async def _read(self) -> bytes | Lost | None:
        assert self._chunks is not None
        try:
            return await anext(self._chunks, None)
        except httpx2.TransportError as exc:
            return _lost(exc)


async def _async_blocks(part: FilePart) -> AsyncIterator[bytes]:
    blocks = _blocks(part)
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        yield block


AsyncToken = str | Callable[[], str | Awaitable[str]]


class AsyncJobClient(_Connection[AsyncToken]):
    """As ``JobClient``, for asyncio. The function for ``token`` may be a coroutine's."""

    def __init__(
        self,
        url: str,
        token: AsyncToken,
        *,
        user_id: UUID | str | None = None,
        timeout: float = 30.0,
        retries: Retries | None = None,
    ) -> None:
        super().__init__(url, token, user_id=user_id, timeout=timeout, retries=retries)
        self._http = httpx2.AsyncClient(**self._transport())
        self.webhooks = AsyncWebhooks(self._flows, self._run, self._items)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _current(self) -> str:
        if isinstance(self._token, str):
            return self._token
        token = self._token()
        return await token if isawaitable(token) else token

    async def _items(self, flow: Flow[None]) -> AsyncGenerator[Any, None]:
        wire = _AsyncWire(self, self._http)
        try:
            came: Any = None
            while True:
                try:
                    step = flow.send(came)
                except StopIteration:
                    return
                came = None
                if isinstance(step, Item):
                    yield step.value
                else:
                    came = await wire.take(step)
        finally:
            await wire.close()
            flow.close()

    async def _run(self, flow: Flow[T]) -> T:
        wire = _AsyncWire(self, self._http)
        try:
            came: Any = None
            while True:
                try:
                    step = flow.send(came)
                except StopIteration as end:
                    result: T = end.value
                    return result
                came = await wire.take(step)
        finally:
            await wire.close()
            flow.close()

    async def upload(self, path: Path | str) -> str:
        """Upload a file and return its ``file_path`` in storage."""
        return await self._run(self._flows.upload(Path(path)))

    async def submit(  # noqa: PLR0913 - what a job may say
        self,
        file_path: str | None = None,
        options: Options | None = None,
        *,
        audio_url: str | None = None,
        scheduled_at: datetime | None = None,
        priority: int = 0,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
    ) -> UUID:
        """Submit a job and return its id, as ``JobClient.submit`` does."""
        job = NewJob(
            file_path, options, audio_url, scheduled_at, priority, webhook_url, idempotency_key
        )
        return await self._run(self._flows.submit(job))

    async def submit_many(self, jobs: Iterable[NewJob]) -> list[UUID]:
        """Submit jobs in one transaction, as ``JobClient.submit_many`` does."""
        return await self._run(self._flows.submit_many(list(jobs)))

    async def get_job(self, job_id: UUID | str) -> ProcessingJob:
        """Return a job as it is now."""
        return await self._run(self._flows.job(requests.get_job(_job_id(job_id))))

    def list_jobs(
        self, status: JobStatus | str | None = None, limit: int | None = None
    ) -> AsyncGenerator[JobSummary, None]:
        """Yield jobs, the newest first and without their results; at most ``limit``."""
        wanted = None if status is None else JobStatus.parse(status)
        return self._items(self._flows.list_jobs(wanted, limit))

    def search(self, text: str, limit: int | None = None) -> AsyncGenerator[SearchResult, None]:
        """Yield the jobs whose transcripts have these words, the newest first."""
        return self._items(self._flows.search(text, limit))

    async def cancel(self, job_id: UUID | str) -> ProcessingJob:
        """Cancel a job: at once while it waits, within seconds while it runs."""
        return await self._run(self._flows.job(requests.cancel(_job_id(job_id))))

    async def retry(self, job_id: UUID | str) -> ProcessingJob:
        """Run a failed or cancelled job again, with all its attempts."""
        return await self._run(self._flows.job(requests.retry(_job_id(job_id))))

    async def delete(self, job_id: UUID | str) -> None:
        """Delete a job and its transcript."""
        await self._run(self._flows.delete(requests.delete(_job_id(job_id))))

    def follow(self, job_id: UUID | str) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events as they happen, as ``JobClient.follow`` does.

        Whoever leaves it early should close it: ``async with aclosing(client.follow(…))``.
        """
        return self._items(self._flows.follow(_job_id(job_id)))

    async def wait(
        self,
        job_id: UUID | str,
        timeout: float | None = None,  # noqa: ASYNC109 - the same as JobClient's
        on_change: OnChange | None = None,
    ) -> ProcessingJob:
        """Wait until a job has ended and return it, as ``JobClient.wait`` does."""
        return await self._run(self._flows.wait(_job_id(job_id), timeout, on_change))

    @overload
    async def transcript(
        self,
        job_id: UUID | str,
        format: Literal["json"] = ...,
        *,
        original: bool = ...,
    ) -> Transcript: ...
    @overload
    async def transcript(
        self, job_id: UUID | str, format: TextFormat, *, original: bool = ...
    ) -> str: ...
    async def transcript(
        self,
        job_id: UUID | str,
        format: TranscriptFormat = "json",  # noqa: A002
        *,
        original: bool = False,
    ) -> Transcript | str:
        """Return a completed job's transcript, as ``JobClient.transcript`` does."""
        return await self._run(self._flows.transcript(_job_id(job_id), format, original=original))

    async def download_audio(self, job_id: UUID | str, path: Path | str) -> int:
        """Save a job's audio at ``path``, whole or not at all; return its size in bytes."""
        return await self._run(self._flows.download(_job_id(job_id), Path(path)))

    async def update_job_status(
        self, job_id: UUID | str, *, progress: float | None = None, note: str | None = None
    ) -> JobChanged:
        """Report on a processing job, as ``JobClient.update_job_status`` does."""
        return await self._run(_calling(lambda: _report(_job_id(job_id), progress, note)))
