"""When an idle worker looks for jobs: at once if it is alone, in turn if there are others.

Postgres tells every listening worker of every new job. If all of them looked, fifty idle workers
would make fifty claims for one job. So each waits a little, by its distance from a first one that
the job's id picks; and whoever has looked and has free slots left tells the others which wake-ups
that covers: those that reached it before it looked, so that its look has seen their jobs.
"""

import itertools
import json
from collections.abc import Callable, Iterable

STEP = 0.004  # seconds from one worker to the next: about a claim and its announcement
LONGEST_STAGGER = 0.1  # seconds that the last of many workers waits
MAX_COVERED = 500  # wake-ups in one announcement, of which a notification holds 8,000 bytes

Token = int | str  # what all workers have in common is an int


class Wakeups:
    """The wake-ups that this worker has not acted on. ``clock`` gives seconds, ever increasing.

    ``workers`` and ``rank`` say how many there are and which of them this one is, from 0.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pending: dict[Token, tuple[float, float]] = {}  # when due, when to look
        self._own = itertools.count()
        self.rank = 0
        self.workers = 1

    def add(self, token: int, delay: float = 0.0) -> None:
        """Note a wake-up that all workers have, due in ``delay`` seconds."""
        if token not in self._pending:
            distance = (self.rank - token) % self.workers
            due = self._clock() + delay
            stagger = distance * min(STEP, LONGEST_STAGGER / self.workers)
            self._pending[token] = (due, due + stagger)

    def add_own(self, delay: float = 0.0) -> None:
        """Note a wake-up that only this worker has, due in ``delay`` seconds."""
        due = self._clock() + delay
        self._pending[f"own {next(self._own)}"] = (due, due)

    def next(self) -> float | None:
        """Return when to look next, on the clock; ``None``: there is nothing to look for."""
        return min((look for _, look in self._pending.values()), default=None)

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        at = self.next()
        return at is not None and at <= self._clock()

    def reached(self) -> list[Token]:
        """Return the wake-ups that a look which starts now will cover."""
        now = self._clock()
        return [token for token, (due, _) in self._pending.items() if due <= now]

    def forget(self, tokens: Iterable[Token]) -> None:
        """Drop wake-ups that a look has covered, this worker's or another one's."""
        for token in tokens:
            self._pending.pop(token, None)


def announcement(tokens: Iterable[Token]) -> str | None:
    """Return what to tell other workers of a look that covered ``tokens``, if anything."""
    shared = [token for token in tokens if isinstance(token, int)]
    return json.dumps(shared) if 0 < len(shared) <= MAX_COVERED else None
