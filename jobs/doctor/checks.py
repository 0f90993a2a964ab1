"""What a check is, and what comes of it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from jobs.settings import Settings

Status = Literal["ok", "warn", "fail", "skipped"]

T = TypeVar("T")

_RANK: dict[Status, int] = {"skipped": 0, "ok": 1, "warn": 2, "fail": 3}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has seen, and how to mend it where that is not as it should be."""

    status: Status
    seen: str
    mend: str | None = None


def ok(seen: str) -> Finding:
    """Say that all is well."""
    return Finding("ok", seen)


def warn(seen: str, mend: str) -> Finding:
    """Say what works, but not as well as it should, or not for long."""
    return Finding("warn", seen, mend)


def fail(seen: str, mend: str) -> Finding:
    """Say what does not work."""
    return Finding("fail", seen, mend)


def skipped(reason: str) -> Finding:
    """Say why it was not looked at."""
    return Finding("skipped", reason)


def together(problems: Iterable[Finding], otherwise: Finding) -> Finding:
    """Return all problems as one finding, the worst first, or what holds where there is none."""
    found = sorted(problems, key=lambda problem: -_RANK[problem.status])
    if not found:
        return otherwise
    mends = dict.fromkeys(problem.mend for problem in found if problem.mend)
    return Finding(
        found[0].status, "; ".join(problem.seen for problem in found), " ".join(mends) or None
    )


def worst(statuses: Iterable[Status]) -> Status:
    """Return the worst of them."""
    return max(statuses, key=_RANK.__getitem__, default="ok")


@dataclass(slots=True)
class Context:
    """What checks know: the settings, once they could be read, and what earlier ones found."""

    loaded: Settings | None = None
    address: str | None = None  # of the database, as it was reached
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        """The settings; only for checks that need ``settings``."""
        assert self.loaded is not None
        return self.loaded


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. ``needs``: ids of checks without which it makes no sense.

    ``limit``: seconds after which it is given up.
    """

    id: str
    title: str
    run: Callable[[Context], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    limit: float = 15.0


async def in_thread(function: Callable[[], T]) -> T:
    """Run what blocks in a thread that nobody has to wait for: a dead disk hangs for ever."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(set_it: Callable[[], None]) -> None:
        if not future.done():
            set_it()

    def work() -> None:
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            problem = exc
            tell(lambda: future.set_exception(problem))
        else:
            tell(lambda: future.set_result(result))

    def tell(set_it: Callable[[], None]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(deliver, set_it)

    threading.Thread(target=work, daemon=True, name="doctor").start()
    return await future
