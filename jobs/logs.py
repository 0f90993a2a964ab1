"""What the processes log: as text or as JSON, with what it is about, and without secrets.

Whoever works on something binds its id once; each line that is logged meanwhile has it, also those
of other packages.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from opentelemetry import trace

LogFormat = Literal["text", "json"]

SHORTEST = 6  # characters of a secret that is known; what is shorter would hide other words

_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default={})  # noqa: B039 - never changed

#: What is a secret by its looks, and what is left of it.
_SECRETS = (
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"), r"\1…"),  # the password in a URL
    (re.compile(r"\b(pgs_[0-9a-f]{8}_|whsec_|sb_secret_)[\w+/=-]{6,}"), r"\1…"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), r"\1 …"),
    (re.compile(r"\beyJ[\w-]{6,}\.[\w-]{6,}(\.[\w-]*)?"), "eyJ…"),  # JWT, also in signed links
    (
        re.compile(
            r"((?:[?&]|\b)(?:X-Amz-(?:Signature|Credential|Security-Token)|token_hash|token|sig|"
            r"signature|apikey|api_key|password|passwd|secret)=)[^&\s'\"]+",
            re.IGNORECASE,
        ),
        r"\1…",
    ),
)


def begin(**about: object) -> None:
    """Say what lines are about that are logged in this task from now on, and nothing else."""
    _context.set({})
    bind(**about)


def bind(**about: object) -> None:
    """Say what else lines are about that are logged in this task from now on."""
    named = {name: value if isinstance(value, int) else str(value) for name, value in about.items()}
    _context.set({**_context.get(), **named})


def context() -> dict[str, Any]:
    """Return what lines are about that are logged now, ready for JSON."""
    return dict(_context.get())


def setup(form: LogFormat, *, level: int = logging.INFO, secrets: Iterable[str] = ()) -> None:
    """Log to standard error, all packages' lines in one form, and what nobody catches, too.

    ``secrets`` are left out of all lines, like what looks like one.
    """
    handler = logging.StreamHandler()
    handler.setFormatter((_Json if form == "json" else _Text)(secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # noqa: FBT003 - its one argument
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(least)
    adopt(*_HAVE_THEIR_OWN)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


_QUIET = {
    "httpx": logging.WARNING,  # they log URLs
    "httpx2": logging.WARNING,
    "opentelemetry.exporter": logging.ERROR,  # it warns of each of its tries
}
_HAVE_THEIR_OWN = ("modal-client", "modal-utils")


def adopt(*names: str) -> None:
    """Take from loggers the handlers of their own, if ``setup`` was called."""
    if not any(isinstance(h.formatter, _Formatter) for h in logging.getLogger().handlers):
        return
    for name in names or _HAVE_THEIR_OWN:
        logger = logging.getLogger(name)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)


def _log_uncaught(
    kind: type[BaseException], exc: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, traceback)
        return
    logging.getLogger("pgscribe").critical("Uncaught", exc_info=(kind, exc, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


class _Formatter(logging.Formatter):
    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        known = sorted({s for s in secrets if len(s) >= SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def _parts(self, record: logging.LogRecord) -> tuple[str, dict[str, Any], str]:
        """Return message, what it is about, and the traceback, all without secrets."""
        error = self.formatException(record.exc_info) if record.exc_info else ""
        if record.stack_info:
            error += f"\n{record.stack_info}"
        about = context()
        place = trace.get_current_span().get_span_context()
        if place.is_valid:
            about |= {"trace_id": f"{place.trace_id:032x}", "span_id": f"{place.span_id:016x}"}
        return self._hide(record.getMessage()), about, self._hide(error)

    def _hide(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub("…", text)
        for looks, left in _SECRETS:
            text = looks.sub(left, text)
        return text


class _Text(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message, about, error = self._parts(record)
        named = " ".join(f"{name}={value}" for name, value in about.items())
        line = f"{_time(record)} {record.levelname} {record.name} [{named or '-'}]: {message}"
        return f"{line}\n{error}" if error else line


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message, about, error = self._parts(record)
        line = {
            "timestamp": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **about,
        }
        if error:
            line["exception"] = error
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
