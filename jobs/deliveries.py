"""Webhooks: each delivery is a signed request, made again until it is taken or days have passed.

The requests follow https://www.standardwebhooks.com. What is delivered, the database has written
in the transaction that ended the job; docs/webhooks.md tells receivers what they get.
"""

import asyncio
import contextlib
import json
import logging
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from uuid import UUID

import httpcore2
import procrastinate
import psycopg
from opentelemetry.trace import SpanKind
from procrastinate import jobs as queue_jobs
from standardwebhooks import Webhook

from jobs import logs, metrics, telemetry
from jobs.database import Pool
from jobs.errors import (
    PgscribeError,
    UrlRefused,
    UrlUnavailable,
    WebhookFailed,
    WebhookGone,
    WebhookRefused,
)
from jobs.outbound import Rules, ask, check_url, header
from jobs.sql import WEBHOOKS
from jobs.telemetry import JobTrace

logger = logging.getLogger(__name__)

TIMEOUT = 15.0  # seconds for a request, from the look-up of the name to the answer's status
EXCERPT_TIMEOUT = 2.0  # seconds
MAX_READ = 2000  # bytes of an answer that are read
MAX_EXCERPT = 500  # characters of it that are kept
#: Seconds from each failed attempt to the next one; the sum is two days and 20 hours.
PAUSES = (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800, 43200, 57600, 86400)
JITTER = 0.2  # of a pause, more or less
LONGEST_RETRY_AFTER = 86400.0  # seconds
_BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)


class DeliveryPolicy(procrastinate.BaseRetryStrategy):
    """Says when a failed delivery is tried again: whatever the reason, but where it is hopeless."""

    def get_retry_decision(
        self, *, exception: BaseException, job: queue_jobs.Job
    ) -> procrastinate.RetryDecision | None:
        """Return a pause with jitter, no shorter than what the receiver asked for."""
        if isinstance(exception, WebhookGone | WebhookRefused) or job.attempts >= len(PAUSES):
            return None
        jitter = random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - it is no secret
        asked = exception.retry_after if isinstance(exception, PgscribeError) else None
        seconds = max(PAUSES[job.attempts] * jitter, asked or 0.0)
        return procrastinate.RetryDecision(retry_in={"seconds": round(seconds)})


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of a request. ``error`` is ``None`` where it was taken."""

    error: WebhookFailed | WebhookGone | WebhookRefused | None = None
    status: int | None = None
    excerpt: str | None = None

    @property
    def name(self) -> str:
        """What became of it, in a word."""
        if self.error is None:
            return "delivered"
        return "failed" if isinstance(self.error, WebhookFailed) else "given_up"


@dataclass(frozen=True, slots=True)
class Deliverer:
    """Makes deliveries. ``public_url`` is where receivers reach the REST API, for links."""

    pool: Pool
    public_url: str | None
    rules: Rules

    async def deliver(self, delivery: UUID) -> None:
        """Make one attempt at a delivery and note what came of it.

        One that has been taken already is not made again. Raises ``WebhookFailed`` where another
        attempt may help, ``WebhookGone`` and ``WebhookRefused`` where none does.
        """
        begun = await self._execute("begin_delivery", delivery=delivery)
        if begun is None:
            return
        if begun["disabled"]:
            refused = WebhookRefused("the endpoint is disabled", code="endpoint_disabled")
            await self._execute(
                "refuse_delivery", delivery=delivery, error_code=refused.code, error=str(refused)
            )
            raise refused
        body = self._body(begun["payload"])
        trace = JobTrace.from_row(begun["trace"]) if begun["trace"] else None
        logs.bind(delivery=delivery, **({"job_id": trace.job_id} if trace else {}))
        named = {"pgscribe.delivery.id": str(delivery), "pgscribe.event": begun["payload"]["type"]}
        with telemetry.span(
            "webhook", named, kind=SpanKind.CLIENT, within=trace.place() if trace else None
        ) as span:
            headers = _sign(delivery, body, begun["secrets"]) + _traced(trace)
            started = time.monotonic()
            outcome = await self._send(begun["url"], body, headers)
            seconds = time.monotonic() - started
            metrics.webhook_sent(outcome.name, outcome.status, seconds)
            if outcome.status is not None:
                span.set_attribute("http.response.status_code", outcome.status)
            await self._insist(
                "record_delivery",
                delivery=delivery,
                seconds=seconds,
                status=outcome.status,
                excerpt=outcome.excerpt,
                error_code=outcome.error and outcome.error.code,
                error=outcome.error and str(outcome.error),
            )
            if outcome.error is not None:
                raise outcome.error

    async def _insist(self, query: str, **values: Any) -> None:
        """Execute it although the database may be away for a moment: else it is sent twice."""
        for pause in (0.1, 1.0, 5.0):
            with contextlib.suppress(psycopg.OperationalError):
                await self._execute(query, **values)
                return
            await asyncio.sleep(pause)
        await self._execute(query, **values)

    async def _execute(self, query: str, **values: Any) -> Any:
        async with self.pool.connection() as conn:
            cursor = await conn.execute(WEBHOOKS[query], values)
            row = await cursor.fetchone()
        assert row is not None
        return row[0]

    def _body(self, payload: dict[str, Any]) -> bytes:
        data = payload["data"]
        if self.public_url and "id" in data:
            data = data | {"url": f"{self.public_url.rstrip('/')}/jobs/{data['id']}"}
        return json.dumps(payload | {"data": data}, ensure_ascii=False, sort_keys=True).encode()

    async def _send(self, url: str, body: bytes, headers: list[tuple[bytes, bytes]]) -> _Outcome:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(TIMEOUT):
                    target = check_url(url, ports=None)
                    response = await ask(stack, target, self.rules, headers, body)
                return await _judge(response)
        except UrlRefused as exc:
            return _Outcome(WebhookRefused(exc.problem, code="url_refused"))
        except UrlUnavailable as exc:
            return _Outcome(WebhookFailed(exc.problem))
        except TimeoutError:
            return _Outcome(WebhookFailed(f"it did not answer within {TIMEOUT:g} s"))


def _sign(delivery: UUID, body: bytes, secrets: list[str]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a request, signed with each of the secrets."""
    now = datetime.now(UTC)
    signatures = [Webhook(secret).sign(str(delivery), now, body.decode()) for secret in secrets]
    return [
        (b"Content-Type", b"application/json"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Webhook-Id", str(delivery).encode()),
        (b"Webhook-Timestamp", b"%d" % now.timestamp()),
        (b"Webhook-Signature", " ".join(signatures).encode()),
    ]


def _traced(trace: JobTrace | None) -> list[tuple[bytes, bytes]]:
    """Return the header that lets a receiver go on with the trace.

    A worker that makes no spans passes on what the job's caller has sent.
    """
    place = telemetry.traceparent() if telemetry.is_on() else trace and trace.traceparent
    return [(b"Traceparent", place.encode())] if place else []


async def _judge(response: httpcore2.Response) -> _Outcome:
    status = response.status
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return _Outcome(status=status)  # whatever else it says
    said = f"it answered with HTTP {status}"
    error: WebhookFailed | WebhookGone
    if status == HTTPStatus.GONE:
        error = WebhookGone(said)
    elif status < HTTPStatus.BAD_REQUEST:
        error = WebhookFailed(f"{said}; redirects are not followed: give the URL they lead to")
    else:
        error = WebhookFailed(said, retry_after=_retry_after(header(response, b"retry-after")))
    return _Outcome(error, status, await _excerpt(response))


async def _excerpt(response: httpcore2.Response) -> str | None:
    """Return how an answer begins, as far as it comes."""
    began = b""
    try:
        async with asyncio.timeout(EXCERPT_TIMEOUT):
            async for part in response.aiter_stream():
                began += part
                if len(began) >= MAX_READ:
                    break
    except (*_BROKEN, TimeoutError):
        pass  # the status is what counts
    text = began[:MAX_READ].decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text.strip()[:MAX_EXCERPT] or None


def _retry_after(value: str | None) -> float | None:
    """Read a number of seconds or a date, as RFC 9110 has it; nonsense counts as nothing."""
    if not value:
        return None
    try:
        if value.isascii() and value.isdigit():
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
