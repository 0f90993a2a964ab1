"""Reports on a running job from code on Modal, through the supabase client.

Progress and a note are all that can be reported: a job's status is derived from the queue, in the
database. The project's URL and key come from the environment, as SUPABASE_URL and
SUPABASE_SECRET_KEY or SUPABASE_SERVICE_ROLE_KEY; the key is in no message.
"""

import os
import re
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit
from uuid import UUID

TIMEOUT: Final = 10.0  # seconds, for connecting and for each wait after that
PAUSES: Final = (1.0, 2.0)  # seconds, before the second try and before the third

_REPORTS: Final = ("note", "progress")
_KEYS: Final = ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
_INSTEAD: Final = {
    "queued": "rpc('retry_processing_job', {'id': …}) runs a failed or cancelled job again.",
    "completed": "The worker completes it once the transcript is there.",
    "failed": "The worker fails it; an exception in the function it calls says why.",
    "cancelled": "rpc('cancel_processing_job', {'id': …}) cancels it.",
}
# Codes of PostgREST, Postgres and gateways that say nothing about the report: no connection,
# overload, shutdown, a lock or a statement that took too long.
_PASSING: Final = re.compile(r"PGRST00\d|08...|40...|53...|55P03|57...|408|429|50[234]|52\d")


class StatusError(Exception):
    """A report did not reach its job."""

    retryable: ClassVar[bool] = False


class InvalidReport(StatusError):
    """The arguments or the environment can't be used; the message names the field."""


class ReportRefused(StatusError):
    """The database or its API refused the report; nothing has changed.

    ``code`` is Postgres' or PostgREST's, ``hint`` the way out where there is one.
    """

    def __init__(self, message: str, code: str, hint: str = "") -> None:
        super().__init__(message, code, hint)
        self.message = message
        self.code = code
        self.hint = hint

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.message.rstrip('.')}.", self.hint, f"({self.code})")))


class SupabaseUnavailable(StatusError):
    """Nobody answered, several times. The report may have arrived; sending it again is harmless."""

    retryable = True


def update_job_status(
    job_id: str, status: str, result: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Report on a processing job: ``status`` is "processing", ``result`` has progress and note.

    ``progress`` is a share from 0 to 1. It never goes back, and 1 counts as 0.99: the queue
    completes jobs. ``note`` is a line for the owner, up to 500 characters; an empty one removes
    the last. Returns the job's id, status, progress and note.

    Raises InvalidReport, ReportRefused and, within a minute or so, SupabaseUnavailable.
    """
    report = _report(job_id, status, {} if result is None else result)
    row = _send(*_credentials(os.environ), report)
    return {name: row[name] for name in ("id", "status", "progress", "note")}


def _report(job_id: str, status: str, result: dict[str, Any]) -> dict[str, Any]:
    try:
        report: dict[str, Any] = {"id": str(UUID(job_id))}
    except (ValueError, AttributeError, TypeError):
        raise InvalidReport(
            f"job_id: must be the id of a row of processing_jobs, not {_shown(job_id)}"
        ) from None
    if status != "processing":
        instead = _INSTEAD.get(status, "") if isinstance(status, str) else ""
        raise InvalidReport(
            f"status: must be 'processing', not {_shown(status)}: it is derived from the queue, "
            f"and reports are of jobs that are processing. {instead}".rstrip()
        )
    if not isinstance(result, dict):
        raise InvalidReport(f"result: must have progress or note, not be {_shown(result)}")
    for name in result:
        if name not in _REPORTS:
            raise InvalidReport(
                f"result: {_shown(name)} is unknown; known: {', '.join(_REPORTS)}. "
                "The transcript is the worker's to write."
            )
    report |= {name: value for name, value in result.items() if value is not None}
    if "progress" in report:
        _check_progress(report["progress"])
    if "note" in report:
        _check_note(report["note"])
    return report


def _check_progress(progress: object) -> None:
    if (
        not isinstance(progress, int | float)
        or isinstance(progress, bool)
        or not 0 <= progress <= 1
    ):
        raise InvalidReport(f"progress: must be a number from 0 to 1, not {_shown(progress)}")


def _check_note(note: object) -> None:
    """Check what could not be sent; the database checks the rest."""
    if not isinstance(note, str) or re.search("[\0\ud800-\udfff]", note):
        raise InvalidReport(f"note: must be a text, not {_shown(note)}")


def _shown(value: object) -> str:
    return ascii(value)[:60]


def _credentials(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return URL and key. What is wrong with the key is said without it."""
    url = environment.get("SUPABASE_URL", "").strip()
    key = next(filter(None, (environment.get(name, "").strip() for name in _KEYS)), "")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and "@" not in parts.netloc
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise InvalidReport(
            "SUPABASE_URL: must be the project's URL, such as https://<ref>.supabase.co. "
            "Put it into the Modal Secret that PGSCRIBE_MODAL_SUPABASE_SECRET names."
        )
    if not re.fullmatch(r"[!-~]+", key) or key.startswith("sb_publishable_"):
        raise InvalidReport(
            f"{' or '.join(_KEYS)}: must be a secret key of the project (sb_secret_…, or a "
            "service_role token). Put it into the Modal Secret with SUPABASE_URL."
        )
    return url, key


def _send(url: str, key: str, report: dict[str, Any]) -> dict[str, Any]:
    """Call report_progress and return the row. Doing it twice has the same result."""
    import httpx
    import supabase

    # A client of our own: supabase's would follow redirects and take the key along, and speaks
    # HTTP/2, whose library logs all headers.
    statuses: list[int] = []  # of the answers; not all that a gateway says has a code

    def remember(response: httpx.Response) -> None:
        statuses.append(response.status_code)

    with httpx.Client(timeout=TIMEOUT, event_hooks={"response": [remember]}) as http:
        options = supabase.ClientOptions(
            httpx_client=http, auto_refresh_token=False, persist_session=False
        )
        client = supabase.create_client(url, key, options)
        for pause in (*PAUSES, None):
            problem: StatusError
            try:
                row = client.rpc("report_progress", report).execute().data
            except supabase.PostgrestAPIError as exc:
                problem = _refusal(exc.message, exc.code or str(statuses[-1]), exc.hint, key)
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as exc:
                problem = _silence(f"{type(exc).__name__}: {exc}", key)
            else:
                if isinstance(row, dict) and row.get("id") and row.get("status"):
                    return row
                problem = ReportRefused(
                    "The answer is no job", "200", "Is SUPABASE_URL the project's URL?"
                )
            if pause is None or not problem.retryable:
                break
            time.sleep(pause)
    # Out of reach of the client's own exception, which holds the request and with it the key.
    raise problem


def _refusal(message: str | None, code: str | None, hint: str | None, key: str) -> StatusError:
    message, code, hint = (_without(key, text) for text in (message, code, hint))
    if _PASSING.fullmatch(code):
        return _silence(f"{message} ({code})", key)
    return ReportRefused(message or "The report was refused", code, hint)


def _silence(reason: str, key: str) -> SupabaseUnavailable:
    return SupabaseUnavailable(
        f"Supabase did not take the report, in {1 + len(PAUSES)} tries: {_without(key, reason)}. "
        "Send it again later; if it stays so, see whether SUPABASE_URL is right."
    )


def _without(key: str, text: str | None) -> str:
    return (text or "").replace(key, "…")[:500]
