"""What a call is busy with, and for how long: reported with its answer, for whoever traces it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_parts: ContextVar[list[list[Any]] | None] = ContextVar("parts", default=None)
_start: ContextVar[float] = ContextVar("start")


@contextmanager
def noted() -> Iterator[dict[str, Any]]:
    """Note the steps of what happens meanwhile; the mapping that is yielded has them in the end.

    ``at``: when it began, in seconds since the epoch; ``seconds``: how long it took; ``parts``:
    name, beginning from ``at`` and length in seconds of each step.
    """
    parts: list[list[Any]] = []
    report: dict[str, Any] = {"at": time.time(), "seconds": 0.0, "parts": parts}
    start = time.perf_counter()
    tokens = _parts.set(parts), _start.set(start)
    try:
        yield report
    finally:
        _parts.reset(tokens[0])
        _start.reset(tokens[1])
        report["seconds"] = time.perf_counter() - start


@contextmanager
def step(name: str) -> Iterator[None]:
    """Note how long this takes, if steps are noted."""
    parts = _parts.get()
    if parts is None:
        yield
        return
    begin = time.perf_counter()
    try:
        yield
    finally:
        parts.append([name, begin - _start.get(), time.perf_counter() - begin])
