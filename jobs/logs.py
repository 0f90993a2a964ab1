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
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO
from urllib.parse import quote, quote_plus

from opentelemetry import trace

LogFormat = Literal["text", "json"]

SHORTEST = 6  # characters of a secret that is known; what is shorter would hide other words
LONGEST = 32_768  # characters of the beginning and of the end of a message or a traceback
AT_A_CUT = 4096  # characters, more than secrets have

_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default={})  # noqa: B039 - never changed

#: What is a secret by its looks, and what is left of it.
_SECRETS = (
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"), r"\1…"),  # the password in a URL
    (re.compile(r"\b(pgs_[0-9a-f]{8}_|whsec_|sb_secret_)[\w+/=-]{6,}"), r"\1…"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), r"\1 …"),
    # JWT, also in signed links. Its first part is short; without a limit, whoever sends many
    # beginnings would have each looked at to the end.
    (re.compile(r"\beyJ[\w-]{6,512}+\.[\w-]{6,}(\.[\w-]*)?"), "eyJ…"),
    (
        re.compile(
            r"((?:(?<![^\W_])|(?<=%3F)|(?<=%26))"
            r"(?:X-Amz-(?:Signature|Credential|Security-Token)|token_hash|token|sig|signature|apikey|"
            r"api_key|password|passwd|secret)"
            r"(?:=|%3D|['\"]?: ?(?=['\"]))['\"]?)[^&\s'\"]+",
            re.IGNORECASE,
        ),
        r"\1…",
    ),
)

#: What would end a line or tell a terminal what to do, and surrogates, which can't be written.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _visible(text: str) -> str:
    """Return text, of which users' may be part, with what can't be seen as JSON has it."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


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
    handler = _Handler()
    handler.setFormatter((_Json if form == "json" else _Text)(secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)  # noqa: FBT003 - its one argument
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(least)
    adopt(*_HAVE_THEIR_OWN)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable


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


def _log_unraisable(args: "sys.UnraisableHookArgs") -> None:
    if args.exc_value is not None:
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Say what could not be logged: the library would print the arguments as they are."""
        kind = sys.exc_info()[0]
        what = f"A line could not be logged: {kind.__name__ if kind else 'unknown error'}"
        with suppress(Exception):
            self.stream.write(
                self.format(logging.makeLogRecord(vars(record) | _PLAIN | {"msg": what}))
                + self.terminator
            )


_PLAIN = {"args": None, "exc_info": None, "exc_text": None, "stack_info": None}


def _forms(secret: str) -> set[str]:
    """Return a secret as it is, and as it is in URLs, JSON and Python's own notation."""
    return {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}  # fmt: skip


class _Formatter(logging.Formatter):
    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        forms = {form for s in secrets if len(s) >= SHORTEST for form in _forms(s)}
        known = sorted(forms, key=len, reverse=True)
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
        return self._shown(record.getMessage()), about, self._shown(error)

    def _shown(self, text: str) -> str:
        if len(text) <= 2 * LONGEST:
            return self._hide(text)
        # A secret that is cut is not known: what is next to the cut goes, too.
        beginning, end = self._hide(text[:LONGEST]), self._hide(text[-LONGEST:])
        return f"{beginning[:-AT_A_CUT]}\n…\n{end[AT_A_CUT:]}"

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
        line = (
            f"{_time(record)} {record.levelname} {record.name} [{named or '-'}]: {message}".rstrip()
        )
        # What goes on is indented, so that nothing that is logged looks like a line of ours.
        return _visible(f"{line}\n{error}" if error else line).replace("\n", "\n  ")


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
        return _visible(json.dumps(line, ensure_ascii=False))


def _time(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
