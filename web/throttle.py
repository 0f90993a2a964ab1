"""How many requests a minute: a bucket per name, in this process's memory.

The package ``limits`` was left alone: in memory it keeps one entry per request and a lock per name,
without an upper bound. Here a name is one number (the generic cell rate algorithm).
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from jobs.errors import RateLimited

WINDOW = 60.0  # seconds
MAX_NAMES = 100_000  # about 20 MB


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left: ``remaining`` requests now, and all ``limit`` of them in ``reset`` seconds."""

    limit: int
    remaining: int
    reset: float

    @property
    def headers(self) -> dict[str, str]:
        """Return it as draft-ietf-httpapi-ratelimit-headers-10 has it."""
        return {
            "RateLimit-Policy": f'"default";q={self.limit};w={WINDOW:.0f}',
            "RateLimit": f'"default";r={self.remaining};t={math.ceil(self.reset)}',
        }


class Throttle:
    """Lets each name have ``limit`` requests at once, refilled evenly over a minute; 0: no limit.

    Other processes count by themselves. With more names than memory is set aside for, the one that
    has been quiet for longest is forgotten. ``clock`` returns seconds.
    """

    def __init__(
        self,
        limit: int,
        what: str,
        *,
        max_names: int = MAX_NAMES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._what = what
        self._max_names = max_names
        self._clock = clock
        self.refused = 0  # requests, so far
        #: When a name's bucket will be full again.
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, name: str, limit: int | None = None) -> Allowance | None:
        """Count a request, and say what is left. Raises ``RateLimited``.

        ``limit`` replaces the throttle's own. None: there is no limit.
        """
        limit = limit or self._limit
        if not limit:
            return None
        now = self._clock()
        full_at = max(self._full_at.get(name, now), now) + WINDOW / limit
        if full_at - now > WINDOW + 1e-6:
            raise self._refusal(limit, full_at - now - WINDOW)
        self._full_at[name] = full_at
        self._full_at.move_to_end(name)
        if len(self._full_at) > self._max_names:
            self._full_at.popitem(last=False)
        remaining = int((WINDOW - (full_at - now)) * limit / WINDOW + 1e-6)
        return Allowance(limit, remaining, full_at - now)

    def check(self, name: str) -> None:
        """Raise ``RateLimited`` if ``take`` would; count nothing."""
        wait = (
            self._full_at.get(name, 0.0)
            - self._clock()
            + (WINDOW / self._limit if self._limit else 0)
        )
        if self._limit and wait > WINDOW + 1e-6:
            raise self._refusal(self._limit, wait - WINDOW)

    def _refusal(self, limit: int, wait: float) -> RateLimited:
        self.refused += 1
        return RateLimited(
            f"More than {limit} {self._what} a minute; wait {math.ceil(wait)} s",
            limit=limit,
            retry_after=wait,
        )
