"""Calls to the functions that ``pgscribe deploy`` has put on Modal.

The client retries by itself, and has no deadline that holds (in a black hole ``get(timeout=5)``
takes 39 s), so every request here has one of ours. What its errors say of a call is in ``_LOST``,
``AWAY`` and ``_REFUSED``; docs/decisions/0003-calls.md says how that was found out.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import modal
from grpclib.exceptions import GRPCError, StreamTerminatedError
from modal import exception
from modal.config import config
from opentelemetry import trace

from jobs import logs
from jobs.compute.base import OnProgress, Outcome, Prepare, Transcribe
from jobs.errors import (
    CallLost,
    ComputeUnavailable,
    EngineCrashed,
    SettingsError,
    TranscriptionFailed,
)
from jobs.settings import Settings

logger = logging.getLogger(__name__)

logs.adopt()  # the client has handlers of its own

PREPARE = "prepare_audio"
DISCARD = "discard_audio"
MODEL = "SpeechModel"

CONNECT_TIMEOUT = 10.0  # seconds until a worker goes on without; the client's own tries take 56 s
REQUEST_TIMEOUT = 30.0  # seconds for anything but waiting
POLL = 50.0  # seconds that a request waits for a result; the client's own are 55 s long
LATE = 20.0  # seconds that its answer may be late

# The call is over, and its result is nowhere. RemoteError is all that the client says of a
# container that was cancelled, evicted or never started: our own database knows whether the job is
# still to be done, and how often it was tried.
_LOST = (
    exception.OutputExpiredError,
    exception.NotFoundError,
    exception.InternalFailure,
    exception.FunctionTimeoutError,
    exception.RemoteError,
    exception.ExecutionError,
    exception.DeserializationError,
)
# Nobody answers, or says so only for now; the call may well be running.
AWAY = (
    exception.ServiceError,
    exception.InternalError,
    exception.ResourceExhaustedError,
    exception.ConnectionError,
    exception.ClientClosed,
    StreamTerminatedError,
    GRPCError,
    OSError,
    TimeoutError,
)
_REFUSED = (
    exception.AuthError,
    exception.PermissionDeniedError,
    exception.InvalidError,
    exception.ConflictError,
    exception.VersionError,
)


def token() -> tuple[str, str]:
    """Return the token that Modal's own configuration names. Raises ``SettingsError``."""
    token_id, token_secret = config.get("token_id"), config.get("token_secret")
    if not (token_id and token_secret):
        raise SettingsError(
            "MODAL_TOKEN_ID, MODAL_TOKEN_SECRET: needed to call Modal; set both in the environment "
            "(no .env is read for them), or run `modal token new`, which writes ~/.modal.toml"
        )
    return token_id, token_secret


class _Connection:
    """A connection to Modal, made when it is first needed."""

    def __init__(self, token: tuple[str, str]) -> None:
        self._token = token
        self._client: modal.Client | None = None
        self._connecting = asyncio.Lock()

    async def client(self) -> modal.Client:
        """Return the client. Raises what it does where Modal does not answer or refuses."""
        async with self._connecting:
            if self._client is None:
                self._client = await modal.Client.from_credentials.aio(*self._token)
            return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close.aio()


class ModalCompute:
    """Calls functions on Modal.

    It has two connections: a server lets each have only so many requests open, and those that
    wait for results must not hold up those that start and cancel calls.
    """

    def __init__(self, settings: Settings) -> None:
        self._app = settings.modal_app_name
        self._engine = settings.engine
        self._gpu = settings.modal_gpu
        self._connection = _Connection(token())
        self._waiting = _Connection(token())

    async def __aenter__(self) -> Self:
        """Connect, and go on where Modal does not answer now. Raises ``SettingsError``."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                client = await self._connection.client()
                await client.hello.aio()  # type: ignore[no-untyped-call]
        except exception.AuthError as exc:
            raise SettingsError(
                "MODAL_TOKEN_ID, MODAL_TOKEN_SECRET: Modal refuses this token; see "
                "`pgscribe deploy --check`"
            ) from exc
        except AWAY as exc:
            logger.warning("Modal does not answer (%s); calls will wait", type(exc).__name__)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close the connections; what was called goes on."""
        for connection in (self._connection, self._waiting):
            await connection.close()

    async def spawn(self, request: Prepare | Transcribe) -> str:
        """Start a call; see ``Compute``."""
        with _explained(self._app):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                call = await self._start(request)
        call_id: str = call.object_id
        return call_id

    async def _start(self, request: Prepare | Transcribe) -> Any:
        client = await self._connection.client()
        if isinstance(request, Prepare):
            prepare = modal.Function.from_name(self._app, PREPARE, client=client)
            return await prepare.spawn.aio(
                source=request.source,
                key=request.key,
                preprocessing=request.preprocessing,
                max_seconds=request.max_seconds,
                min_span=request.min_span,
                max_span=request.max_span,
            )
        trace.get_current_span().set_attribute("pgscribe.gpu", self._gpu)
        model = modal.Cls.from_name(self._app, MODEL, client=client)(
            engine=self._engine, model=request.options.model
        )
        return await model.transcribe.spawn.aio(
            pcm=request.pcm,
            start=request.span.start,
            end=request.span.end,
            options=request.options.to_dict(),
        )

    async def result(self, call_id: str, on_progress: OnProgress) -> Outcome:  # noqa: ARG002
        """Wait for a call's end; see ``Compute``. Modal reports no progress."""
        while True:
            with _explained(self._app, lost=call_id):
                async with asyncio.timeout(POLL + LATE):
                    client = await self._waiting.client()
                    call = modal.FunctionCall.from_id(call_id, client=client)
                    try:
                        answer = await call.get.aio(timeout=POLL)
                    except TimeoutError:  # of the poll; our own deadline comes as a cancellation
                        continue
            return Outcome.from_answer(answer)

    async def cancel(self, call_id: str) -> None:
        """Stop a call; see ``Compute``."""
        try:
            with _explained(self._app, lost=call_id):
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    client = await self._connection.client()
                    await modal.FunctionCall.from_id(call_id, client=client).cancel.aio()
        except CallLost:
            pass  # nothing is left to be cancelled

    async def discard(self, pcm: str) -> None:
        """Delete a decoded file; see ``Compute``. Nobody waits for that."""
        with _explained(self._app):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                client = await self._connection.client()
                discard = modal.Function.from_name(self._app, DISCARD, client=client)
                await discard.spawn.aio(pcm=pcm)


@contextmanager
def _explained(app: str, lost: str | None = None) -> Iterator[None]:
    """Turn what the client raises into what it says of the call; ``lost`` is the call's id."""
    try:
        yield
    except _REFUSED as exc:
        logger.exception("Modal refuses a request")
        raise TranscriptionFailed(
            "compute_refused",
            f"Modal refuses to run this ({type(exc).__name__}); the worker's log says why.",
            retryable=False,
        ) from exc
    except _LOST as exc:
        if lost is None:
            raise ComputeUnavailable(
                f"Modal has no app {app} with what is called ({type(exc).__name__}); "
                "run `pgscribe deploy`."
            ) from exc
        logger.warning("Call %s returns nothing: %s: %s", lost, type(exc).__name__, exc)
        raise CallLost from exc
    except AWAY as exc:
        raise ComputeUnavailable(f"Modal does not answer ({type(exc).__name__})") from exc
    except Exception as exc:
        logger.exception("Call %s failed unexpectedly", lost)
        raise EngineCrashed(
            f"The function on Modal failed unexpectedly ({type(exc).__name__}); the worker's log "
            "and Modal's say more."
        ) from exc
