"""Pauses between tries: each about twice as long as the last, with jitter."""

import asyncio
import random


class Backoff:
    """Pauses of ``first`` seconds, then about twice as long each, at most ``longest``.

    The jitter (half to all of each pause) keeps many processes from trying at the same moment.
    """

    def __init__(self, first: float = 0.1, longest: float = 5.0) -> None:
        self._first = first
        self._longest = longest
        self._tries = 0

    def reset(self) -> None:
        """Start again with the first pause."""
        self._tries = 0

    def next(self) -> float:
        """Return the next pause in seconds."""
        pause = min(self._longest, self._first * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return pause * random.uniform(0.5, 1)  # noqa: S311 - jitter is no secret

    async def sleep(self) -> None:
        """Pause."""
        await asyncio.sleep(self.next())
