"""The public keys that tokens are signed for: fetched from one URL, kept, fetched again.

``jwt.PyJWKClient`` was left alone: it blocks, gives up its keys when they are old and the endpoint
is away, tries again at once for each token while it fails, and reads answers of any size.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import jwt

from jobs.errors import SigningKeysUnavailable

logger = logging.getLogger(__name__)

LIFETIME = 600.0  # seconds after which the keys are fetched again
MAX_AGE = 24 * 3600.0  # seconds after which they are no longer trusted, if that never succeeds
COOLDOWN = 10.0  # seconds from one fetch to the next, whatever asks for it
TIMEOUT = 5.0  # seconds that a fetch may take in all
PATIENCE = 1.0  # seconds that a token whose key is known waits for a fetch
MAX_BYTES = 256 * 1024
MIN_RSA_BITS = 2048

_ALGORITHMS: dict[tuple[Any, Any], str] = {("EC", "P-256"): "ES256", ("RSA", None): "RS256"}


class SigningKeys:
    """The keys behind a URL. One fetch at a time; tokens never say where keys come from.

    ``clock`` returns seconds.
    """

    def __init__(
        self, url: str, *, timeout: float = TIMEOUT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = url
        self._timeout = timeout
        self._clock = clock
        self._http = httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=timeout,
            limits=httpx2.Limits(max_keepalive_connections=0),
        )
        self._keys: dict[str, jwt.PyJWK] | None = None
        self._fetched_at = 0.0
        self._tried_at: float | None = None
        self._fetch: asyncio.Task[None] | None = None

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key of that id, fetching keys where it is unknown or they are old.

        Raises ``SigningKeysUnavailable`` while there are none, or none that can still be trusted.
        """
        known = self._age() < MAX_AGE and self._keys is not None and key_id in self._keys
        if not known or self._age() >= LIFETIME:
            await self._refresh(PATIENCE if known else None)
        if self._keys is None or self._age() >= MAX_AGE:
            raise SigningKeysUnavailable
        return self._keys.get(key_id)

    def _age(self) -> float:
        return self._clock() - self._fetched_at

    async def _refresh(self, patience: float | None) -> None:
        """Wait for a fetch, at most ``patience`` seconds; start one if it is time for it."""
        if self._fetch is None:
            if self._tried_at is not None and self._clock() - self._tried_at < COOLDOWN:
                return
            self._tried_at = self._clock()
            self._fetch = asyncio.create_task(self._fetch_keys())
        await asyncio.wait({self._fetch}, timeout=patience)

    async def _fetch_keys(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._download()
            self._keys = usable_keys(json.loads(body))
            self._fetched_at = self._clock()
        except (httpx2.HTTPError, TimeoutError, ValueError, RecursionError) as exc:
            logger.warning("The signing keys at %s can't be fetched: %r", self._url, exc)
        finally:
            self._fetch = None

    async def _download(self) -> bytes:
        body = bytearray()
        async with self._http.stream("GET", self._url) as response:
            response.raise_for_status()  # also where it redirects
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ValueError(f"the answer is larger than {MAX_BYTES} bytes")
        return bytes(body)

    async def aclose(self) -> None:
        """End what is under way."""
        if self._fetch is not None:
            self._fetch.cancel()
            await asyncio.wait({self._fetch})
        await self._http.aclose()


def usable_keys(document: Any) -> dict[str, jwt.PyJWK]:
    """Return a JWK set's keys that may check a signature here, by id. Others are passed over.

    An empty set is one: so it is with projects that still sign with a secret.
    """
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("it is no JWK set")  # noqa: TRY004 - wrong data, not a wrong argument
    keys = {}
    for item in document["keys"]:
        if isinstance(item, dict) and isinstance(item.get("kid"), str):
            key = _usable_key(item)
            if key is not None:
                keys[item["kid"]] = key
    return keys


def _usable_key(item: Mapping[str, Any]) -> jwt.PyJWK | None:
    try:
        algorithm = _ALGORITHMS.get((item.get("kty"), item.get("crv")))
        wrong_use = item.get("use", "sig") != "sig" or "verify" not in item.get(
            "key_ops", ["verify"]
        )
        if algorithm is None or item.get("alg", algorithm) != algorithm or wrong_use:
            return None
        key = jwt.PyJWK(dict(item), algorithm)
    except (jwt.PyJWTError, TypeError, ValueError):
        return None
    too_short = algorithm == "RS256" and key.key.key_size < MIN_RSA_BITS
    return None if too_short else key
