"""Sessions of browsers: a cookie of random bits, and tokens that nothing else can decrypt.

In the database a session has an id and encrypted tokens. Id and key both follow from the cookie,
by different labels: whoever reads the database can use neither, and there is no key to look after.
"""

import asyncio
import base64
import functools
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self
from uuid import UUID

import psycopg
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from starlette.requests import Request
from starlette.responses import Response

from jobs.database import Pool
from jobs.errors import NotAllowed, NotAuthenticated, SignInUnavailable
from jobs.settings import Settings
from jobs.sql import WEB_SESSIONS
from web.same_origin import is_https

logger = logging.getLogger(__name__)

MARGIN = 60  # seconds before an access token's end from which on it is refreshed
PATIENCE = 10.0  # seconds that a request waits for new tokens
REFRESH_TIMEOUT = 8.0  # seconds that the service which issues them has
REVOKE_TIMEOUT = 3.0  # seconds that signing out there may take
COOLDOWN = 5.0  # seconds for which a session is not refreshed after that has failed

SECURE_COOKIE = "__Host-pgscribe"
PLAIN_COOKIE = "pgscribe-session"

_ID = b"pgscribe web session: id\0"
_KEY = b"pgscribe web session: key of its tokens"
_COOKIE = re.compile(r"[A-Za-z0-9_-]{43}")
_NONCE_BYTES = 12

SIGN_IN_AGAIN = "The session has ended; sign in again"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a user has signed in with. ``expires_at`` is the access token's end, in Unix time."""

    access_token: str = field(repr=False)
    refresh_token: str = field(repr=False)
    expires_at: int


class SessionRevoked(Exception):
    """Whoever issued the tokens gives no new ones: the session has ended."""


class TokenSource(Protocol):
    """Whoever issues tokens. Raises ``SignInUnavailable`` where that can't be done now."""

    async def refresh(self, tokens: Tokens) -> Tokens:
        """Return new tokens for old ones. Raises ``SessionRevoked``."""

    async def revoke(self, tokens: Tokens) -> None:
        """End the session that the tokens are of."""


class SessionKey:
    """What follows from a cookie: a session's id, and the key of its tokens."""

    def __init__(self, secret: bytes) -> None:
        self.id = hashlib.sha256(_ID + secret).digest()
        self._secret = secret

    @classmethod
    def read(cls, cookie: str) -> Self | None:
        """Return the key that a cookie is; none for what is no cookie of ours."""
        if not _COOKIE.fullmatch(cookie):
            return None
        return cls(base64.urlsafe_b64decode(cookie + "="))

    @functools.cached_property
    def _cipher(self) -> AESGCM:
        return AESGCM(HKDF(SHA256(), 32, salt=None, info=_KEY).derive(self._secret))

    def seal(self, tokens: Tokens) -> bytes:
        """Encrypt tokens, for this session alone."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, json.dumps(asdict(tokens)).encode(), self.id)

    def open(self, sealed: bytes) -> Tokens:
        """Decrypt what ``seal`` made. Raises ``InvalidTag`` if it is anything else."""
        nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        return Tokens(**json.loads(self._cipher.decrypt(nonce, text, self.id)))


class Sessions:
    """The sessions in the database. ``source``: who issues their tokens; none where nobody does."""

    def __init__(self, settings: Settings, pool: Pool, source: TokenSource | None) -> None:
        self._pool = pool
        self._source = source
        self._days = {"idle_days": settings.session_idle_days, "days": settings.session_days}
        self._refreshes: dict[bytes, asyncio.Task[Tokens]] = {}
        # A refresh has a connection while it waits; requests need the others.
        self._slots = asyncio.Semaphore(max(1, settings.database_pool_size // 2))

    async def begin(
        self, user_id: UUID, tokens: Tokens, *, replaced: SessionKey | None
    ) -> tuple[SessionKey, str]:
        """Begin a session in place of another, if any. Return its key and cookie, both new.

        Raises ``NotAllowed`` for a user who is not in this database.
        """
        secret = secrets.token_bytes(32)
        key = SessionKey(secret)
        values = {"user_id": user_id, "sealed": key.seal(tokens), "replaced": _id(replaced)}
        try:
            async with self._pool.connection() as conn:
                await conn.execute(WEB_SESSIONS["create"], {"id": key.id} | values | self._days)
        except psycopg.errors.ForeignKeyViolation:
            raise NotAllowed("There is no such user in auth.users of this database") from None
        return key, base64.urlsafe_b64encode(secret).rstrip(b"=").decode()

    async def tokens(self, key: SessionKey) -> Tokens:
        """Return tokens that are good for a while, new ones where the old ones are about to end.

        Raises ``NotAuthenticated`` and, only where the old ones have ended, ``SignInUnavailable``.
        """
        async with self._pool.connection() as conn:
            tokens = await _read(conn, "use", {"id": key.id} | self._days, key)
        if tokens is None or self._source is None:
            raise NotAuthenticated(SIGN_IN_AGAIN)
        if _is_fresh(tokens):
            return tokens
        try:
            return await self._refreshed(key, self._source)
        except SignInUnavailable:
            if tokens.expires_at > time.time():
                return tokens
            raise

    async def _refreshed(self, key: SessionKey, source: TokenSource) -> Tokens:
        """Wait for new tokens. One task gets them, which goes on if those who wait go away."""
        task = self._refreshes.get(key.id)
        if task is None:
            task = asyncio.create_task(self._refresh(key, source))
            self._refreshes[key.id] = task
            task.add_done_callback(functools.partial(self._forget, key.id))
        await asyncio.wait([task], timeout=PATIENCE)
        if not task.done():
            raise SignInUnavailable
        return task.result()

    def _forget(self, session_id: bytes, task: asyncio.Task[Tokens]) -> None:
        """Let the next request try again, after a failure only a little later."""
        if not task.cancelled() and isinstance(task.exception(), SignInUnavailable):
            loop = asyncio.get_running_loop()
            loop.call_later(COOLDOWN, self._refreshes.pop, session_id, None)
        else:
            self._refreshes.pop(session_id, None)

    async def _refresh(self, key: SessionKey, source: TokenSource) -> Tokens:
        """Use the refresh token, unless another process has done so while this one waited.

        Where this process is killed after the answer and before the commit, the old token is used
        once more. Supabase Auth allows that: for some seconds to anybody, and later as long as
        the old token is the parent of the active one, which it then returns again.
        """
        try:
            async with self._slots, self._pool.connection() as conn, conn.transaction():
                tokens = await _read(conn, "lock", {"id": key.id}, key)
                if tokens is None or _is_fresh(tokens):
                    new = tokens
                else:
                    new = await _ask(source, tokens)
                    await _replace(conn, key, new)
        except psycopg.errors.LockNotAvailable as exc:
            raise SignInUnavailable from exc
        if new is None:
            raise NotAuthenticated(SIGN_IN_AGAIN)
        return new

    async def end(self, key: SessionKey) -> None:
        """End a session here at once, and where its tokens are from if that is possible."""
        async with self._pool.connection() as conn:
            tokens = await _read(conn, "end", {"id": key.id}, key)
        if tokens is None or self._source is None:
            return
        try:
            async with asyncio.timeout(REVOKE_TIMEOUT):
                await self._source.revoke(tokens)
        except (SignInUnavailable, SessionRevoked, TimeoutError) as exc:
            logger.warning("Signed out here, but not with the service: %s", type(exc).__name__)

    async def aclose(self) -> None:
        """Let refreshes end, as what they were given would be lost; break off those that hang."""
        tasks = list(self._refreshes.values())
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=REVOKE_TIMEOUT)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_fresh(tokens: Tokens) -> bool:
    return tokens.expires_at - time.time() >= MARGIN


def _id(key: SessionKey | None) -> bytes | None:
    return None if key is None else key.id


async def _read(
    conn: psycopg.AsyncConnection[Any], query: str, values: Mapping[str, Any], key: SessionKey
) -> Tokens | None:
    """Return the tokens that a query yields; none where there are none, or not of this key."""
    row = await (await conn.execute(WEB_SESSIONS[query], values)).fetchone()
    if row is None or row[0] is None:
        return None
    try:
        return key.open(row[0])
    except InvalidTag:
        logger.exception("A session's tokens were changed in the database")
        return None


async def _ask(source: TokenSource, tokens: Tokens) -> Tokens | None:
    """Return new tokens, or none where the session was ended. Raises ``SignInUnavailable``."""
    try:
        async with asyncio.timeout(REFRESH_TIMEOUT):
            return await source.refresh(tokens)
    except TimeoutError as exc:
        raise SignInUnavailable from exc
    except SessionRevoked:
        logger.info("A session ends, as the service that issued its tokens issues no others")
        return None


async def _replace(
    conn: psycopg.AsyncConnection[Any], key: SessionKey, tokens: Tokens | None
) -> None:
    if tokens is None:
        await conn.execute(WEB_SESSIONS["end"], {"id": key.id})
    else:
        values = {"id": key.id, "sealed": key.seal(tokens)}
        await conn.execute(WEB_SESSIONS["refresh"], values)


# Cookies


def cookie_name(request: Request) -> str:
    """Return the name that the session's cookie has here.

    No page under http, and none of another host of the domain, can set one that begins with
    ``__Host-``, so under https no other is read.
    """
    return SECURE_COOKIE if is_https(request) else PLAIN_COOKIE


def sent_key(request: Request) -> SessionKey | None:
    """Return what the request's cookie is a key of, if it has one in the right form."""
    return SessionKey.read(request.cookies.get(cookie_name(request), ""))


def set_cookie(
    request: Request, response: Response, name: str, value: str, *, max_age: int
) -> None:
    """Set a cookie that scripts can't read, other sites' forms don't send and https keeps."""
    response.set_cookie(
        name, value, max_age=max_age, secure=is_https(request), httponly=True, samesite="lax"
    )


def drop_cookie(request: Request, response: Response, name: str) -> None:
    """Have the browser forget a cookie."""
    set_cookie(request, response, name, "", max_age=0)
