"""Setting transcripts: in threads that nothing else waits for, each user's one at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self, TypeVar
from uuid import UUID

from jobs.errors import RateLimited

MOST = 20  # that a user may wait for at a time: each holds its transcript in memory
_THREADS = 2  # so that one user's long transcript leaves a thread to the others
_RETRY_AFTER = 2.0  # seconds

_T = TypeVar("_T")


@dataclass(slots=True)
class _Turns:
    """A user's transcripts, set in the order in which they were asked for."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Renderer:
    """Runs what takes a moment of processor time for a user's answer."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(_THREADS, "render")
        self._turns: dict[UUID, _Turns] = {}

    async def __aenter__(self) -> Self:
        """Return the renderer; its threads start when they are needed."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Begin nothing more."""
        self.executor.shutdown(wait=False, cancel_futures=True)

    async def run(self, user_id: UUID, function: Callable[[], _T]) -> _T:
        """Return what a function does. Raises ``RateLimited`` if the user has ``MOST`` waiting."""
        turns = self._turns.setdefault(user_id, _Turns())
        if turns.waiting >= MOST:
            raise RateLimited(
                f"You wait for {MOST} transcripts already; ask for fewer at a time",
                limit=MOST,
                retry_after=_RETRY_AFTER,
            )
        turns.waiting += 1
        try:
            async with turns.lock:
                return await asyncio.get_running_loop().run_in_executor(self.executor, function)
        finally:
            turns.waiting -= 1
            if not turns.waiting:
                del self._turns[user_id]
