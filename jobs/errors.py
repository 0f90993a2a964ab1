"""Every error of pgscribe: one root, each with a stable code and a message for people."""

import copyreg
from typing import Any


class PgscribeError(Exception):
    """Something went wrong inside pgscribe; its log says what."""

    code = "internal_error"
    #: Whether another attempt at the same job may end better. This, and nothing else, decides.
    retryable = False
    #: Seconds before another attempt makes sense, where whoever refused this one said so.
    retry_after: float | None = None

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let pools of processes pass it on: what ``__init__`` was told it does not take again."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class SettingsError(PgscribeError):
    """The settings are not usable."""

    code = "invalid_settings"


class DeploymentFailed(PgscribeError):
    """What is on Modal is not what it should be."""

    code = "deployment_failed"


class InvalidInput(PgscribeError):
    """The request is not usable. ``field`` names the part of it that is to blame."""

    code = "invalid_input"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WebhookNotVerified(PgscribeError):
    """A request was not made by pgscribe, or not for this secret, or long ago."""

    code = "webhook_not_verified"


class TooLarge(PgscribeError):
    """What was sent is larger than the limit. ``limit`` is in bytes."""

    def __init__(self, message: str | None = None, *, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class UploadTooLarge(TooLarge):
    """The upload is larger than the limit."""

    code = "upload_too_large"


class BodyTooLarge(TooLarge):
    """The request's body is larger than the limit."""

    code = "body_too_large"


class LimitReached(PgscribeError):
    """You have as much as you may have.

    ``limit`` is the limit's name and ``retry_after`` after how many seconds more may be possible.
    """

    code = "limit_reached"

    def __init__(self, message: str, *, limit: str | None, retry_after: float) -> None:
        super().__init__(message)
        self.limit = self.field = limit
        self.retry_after = retry_after


class FileTooLarge(PgscribeError):
    """The audio is larger than its owner's limit."""

    code = "file_too_large"


class NotAuthenticated(PgscribeError):
    """A valid bearer token is needed."""

    code = "not_authenticated"


class InvalidToken(NotAuthenticated):
    """The bearer token is not valid."""


class NotAllowed(PgscribeError):
    """This user may not do that."""

    code = "not_allowed"


class CrossSiteRequest(NotAllowed):
    """The request does not come from a page of this server: open it there and try again."""

    code = "cross_site_request"


class ScopeMissing(NotAllowed):
    """The API key was not made for that. ``scope`` is what it lacks."""

    code = "insufficient_scope"

    def __init__(self, scope: str) -> None:
        super().__init__(f"This API key lacks the scope `{scope}`; make one that has it")
        self.scope = scope


class NotAnOperator(NotAllowed):
    """Only operators may do that; `pgscribe operators add <user id>` makes somebody one."""

    code = "not_an_operator"


class RateLimited(PgscribeError):
    """Too many requests. ``limit``: how many a minute, or a moment, may hold."""

    code = "rate_limited"
    retryable = True

    def __init__(self, message: str, *, limit: int, retry_after: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after = retry_after


class SigningKeysUnavailable(PgscribeError):
    """The keys that tokens are checked with can't be fetched; try again in a moment."""

    code = "signing_keys_unavailable"
    retryable = True
    retry_after = 5.0


class SignInUnavailable(PgscribeError):
    """The service that signs users in does not answer; try again in a moment."""

    code = "sign_in_unavailable"
    retryable = True
    retry_after = 5.0


class KeyNotFound(PgscribeError):
    """There is no such API key."""

    code = "key_not_found"


class UserNotFound(PgscribeError):
    """There is no such user in auth.users."""

    code = "user_not_found"


class JobNotFound(PgscribeError):
    """There is no such job, or it is not yours."""

    code = "job_not_found"


class AudioNotFound(PgscribeError):
    """There is no such file in storage."""

    code = "file_not_found"


class FileExists(PgscribeError):
    """There is a file at that path already; ask for a new upload."""

    code = "file_exists"


class LinkInvalid(PgscribeError):
    """This link is not valid; ask for a new one."""

    code = "link_invalid"


class LinkExpired(LinkInvalid):
    """The link has expired; ask for a new one."""


class UploadGone(PgscribeError):
    """There is no such upload, or no more; begin it again, or ask for a new one."""

    code = "upload_gone"


class UploadLocked(PgscribeError):
    """Another request is writing to this upload; ask how much has arrived in a moment."""

    code = "upload_locked"
    retry_after = 3.0


class UploadStalled(PgscribeError):
    """No more bytes came; ask how much has arrived, and go on there."""

    code = "upload_stalled"


class OffsetConflict(PgscribeError):
    """The upload has another offset; ask how much has arrived, and go on there."""

    code = "offset_conflict"


class UnsupportedVersion(PgscribeError):
    """The protocol's version is not supported."""

    code = "unsupported_version"


class UnsupportedMediaType(PgscribeError):
    """The body's media type is not supported."""

    code = "unsupported_media_type"


class StorageUnavailable(PgscribeError):
    """The storage does not answer; try again in a moment."""

    code = "storage_unavailable"
    retryable = True

    def __init__(self, message: str | None = None, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StorageRefused(PgscribeError):
    """The storage refuses requests of this server; `pgscribe setup-storage --check` says why."""

    code = "storage_refused"


class UrlRefused(InvalidInput):
    """The audio's URL is none that may be fetched. The message has neither address nor query."""

    code = "url_refused"

    def __init__(self, problem: str) -> None:
        super().__init__(f"audio_url: {problem}", field="audio_url")
        self.problem = problem


class UrlUnavailable(PgscribeError):
    """The audio's URL could not be fetched; ``retryable`` says whether that may pass."""

    code = "url_unavailable"
    field = "audio_url"

    def __init__(
        self, problem: str, *, retryable: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(f"audio_url: {problem}")
        self.problem = problem
        self.retryable = retryable
        self.retry_after = retry_after


class EndpointNotFound(PgscribeError):
    """There is no such webhook endpoint, or it is not yours."""

    code = "endpoint_not_found"


class DeliveryNotFound(PgscribeError):
    """There is no such delivery of a webhook, or it is not yours."""

    code = "delivery_not_found"


class WebhookFailed(PgscribeError):
    """The receiver of a webhook did not take it; a later attempt may end better."""

    code = "webhook_failed"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WebhookGone(PgscribeError):
    """The receiver of a webhook wants no more of them."""

    code = "webhook_gone"


class WebhookRefused(PgscribeError):
    """A webhook is not sent. ``code`` says why: ``url_refused`` or ``endpoint_disabled``."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class JobConflict(PgscribeError):
    """The job's status does not allow that."""

    code = "job_conflict"


class NotAcceptable(PgscribeError):
    """The answer can't be had in that form."""

    code = "not_acceptable"


class TranscriptNotReady(PgscribeError):
    """The job has no text yet; ask again while it runs, or once it has completed."""

    code = "transcript_not_ready"
    retry_after = 2.0


class NoTranscript(PgscribeError):
    """The job ended without a transcript."""

    code = "no_transcript"


class RequestInFlight(PgscribeError):
    """A request with the same Idempotency-Key is being worked on; try again in a second."""

    code = "request_in_flight"
    retry_after = 1.0


class TooManyStreams(PgscribeError):
    """You have as many streams of events open as you may; close one, or try again later."""

    code = "too_many_streams"
    retry_after = 10.0


class ServerBusy(PgscribeError):
    """This server has as many streams of events open as it takes; try again in a moment."""

    code = "server_busy"
    retry_after = 5.0


class TranscriptionFailed(PgscribeError):
    """The transcription function reported an error: its code and message are passed on.

    ``cpu_seconds`` and ``gpu_seconds`` are what the call took all the same.
    """

    def __init__(  # noqa: PLR0913 - each has a name
        self,
        code: str,
        message: str,
        *,
        retryable: bool,
        retry_after: float | None = None,
        cpu_seconds: float = 0.0,
        gpu_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.retry_after = retry_after
        self.cpu_seconds = cpu_seconds
        self.gpu_seconds = gpu_seconds


class EngineCrashed(PgscribeError):
    """The engine's process ended unexpectedly."""

    code = "engine_crashed"
    retryable = True


class ComputeUnavailable(PgscribeError):
    """The machines that transcribe do not answer; another attempt goes on where this one was."""

    code = "compute_unavailable"
    retryable = True


class CallLost(PgscribeError):
    """A remote call ended without a result, again and again."""

    code = "call_lost"
    retryable = True


class CallTimeout(PgscribeError):
    """A remote call took longer than the limit."""

    code = "call_timeout"
    retryable = True


class AttemptLost(PgscribeError):
    """The job was taken from this attempt, which changes nothing any more."""

    code = "attempt_lost"


class DatabaseUnavailable(PgscribeError):
    """The database does not answer; try again in a moment."""

    code = "database_unavailable"
    retryable = True


class ResultNotStorable(PgscribeError):
    """The result holds what Postgres can't store; the worker's log says more."""

    code = "result_not_storable"


class JobTimeout(PgscribeError):
    """The transcription took longer than the limit."""

    code = "timeout"


class ServerUnreachable(PgscribeError):
    """No pgscribe server answers at that URL."""

    code = "server_unreachable"


class RequestFailed(PgscribeError):
    """The server refused a request: ``detail`` and ``code`` are its own, ``status`` is HTTP's.

    ``field`` is to blame, ``limit`` was hit, and in ``retry_after`` seconds it may be otherwise,
    where the server said so.
    """

    code = "request_failed"

    def __init__(  # noqa: PLR0913 - each has a name
        self,
        detail: str,
        *,
        status: int,
        code: str | None = None,
        field: str | None = None,
        limit: float | str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{detail} (HTTP {status})")
        self.detail = detail
        self.status = status
        self.code = code or type(self).code
        self.field = field
        self.limit = limit
        self.retry_after = retry_after


class WaitTimedOut(PgscribeError):
    """The job had not ended when the time to wait for it was over; it goes on."""

    code = "wait_timed_out"
