"""Every error of pgscribe: one root, each with a stable code and a message for people."""


class PgscribeError(Exception):
    """Something went wrong inside pgscribe; its log says what."""

    code = "internal_error"
    #: Whether another attempt at the same job may end better. This, and nothing else, decides.
    retryable = False
    #: Seconds before another attempt makes sense, where whoever refused this one said so.
    retry_after: float | None = None

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


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


class UploadTooLarge(PgscribeError):
    """The upload is larger than the limit."""

    code = "upload_too_large"


class NotAuthenticated(PgscribeError):
    """A valid bearer token is needed."""

    code = "not_authenticated"


class NotAllowed(PgscribeError):
    """This user may not do that."""

    code = "not_allowed"


class JobNotFound(PgscribeError):
    """There is no such job, or it is not yours."""

    code = "job_not_found"


class AudioNotFound(PgscribeError):
    """There is no such file in storage."""

    code = "file_not_found"


class JobConflict(PgscribeError):
    """The job's status does not allow that."""

    code = "job_conflict"


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
    """The server refused a request; the message is its own."""

    code = "request_failed"
