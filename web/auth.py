"""Who is asking: tokens as Supabase Auth issues them, API keys, and sessions of browsers."""

import ipaddress
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import jwt
from starlette.requests import Request

from jobs import keys
from jobs.database import Pool
from jobs.errors import (
    InvalidInput,
    InvalidToken,
    NotAllowed,
    NotAuthenticated,
    ScopeMissing,
    SettingsError,
)
from jobs.scopes import Scope
from jobs.settings import Settings, TokenSettings
from jobs.tokens import issue_token
from web.jwks import SigningKeys
from web.same_origin import require_same_origin
from web.sessions import SessionKey, Sessions, Tokens, cookie_name, sent_key
from web.throttle import Throttle

__all__ = [
    "Authenticator",
    "Principal",
    "Scope",
    "TokenVerifier",
    "authenticate",
    "issue_token",
    "require",
]

Claims = Mapping[str, Any]

MAX_TOKEN = 8 * 1024  # characters
LEEWAY = 10  # seconds by which clocks may differ: exp, nbf and iat are read that generously
USER_HEADER = "Pgscribe-User"
KNOWN = 10_000  # keys and sessions that were good a moment ago
# A stream that a key or a session has opened ends then, and its client comes back: the key may be
# revoked, the session ended.
KEY_SECONDS = 300

_NOBODY = "Send the header `Authorization: Bearer <token or API key>`, or sign in at /app/sign-in"
_BAD_KEY = "The API key is not valid: it is unknown, has expired or was revoked"


class TokenVerifier:
    """Checks bearer tokens: signature, expiry, audience, issuer, subject and role.

    HS256 tokens are checked with the secret, ES256 and RS256 tokens with the project's public keys;
    which of them there are, the settings say. Raises ``SettingsError`` if there are none.
    """

    def __init__(self, settings: TokenSettings) -> None:
        self._secret = settings.jwt_secret
        url = settings.signing_keys_url
        self._signing_keys = SigningKeys(url) if url else None
        if self._secret is None and self._signing_keys is None:
            raise SettingsError(
                "Unusable settings:\n  PGSCRIBE_SUPABASE_URL, PGSCRIBE_JWKS_URL or "
                "PGSCRIBE_JWT_SECRET: one of them is needed to check tokens"
            )
        self._audience = settings.jwt_audience
        self._issuer = settings.token_issuer

    async def verify(self, token: str) -> Claims:
        """Return the claims. Raises ``InvalidToken`` or, for other roles, ``NotAllowed``.

        ``SigningKeysUnavailable`` says that this can't be told at the moment.
        """
        if len(token) > MAX_TOKEN:
            raise InvalidToken(f"The bearer token is longer than {MAX_TOKEN} characters")
        try:
            claims = self._decode(token, *await self._key(token))
        except jwt.InvalidTokenError as exc:
            raise InvalidToken(f"The bearer token is not valid: {exc}") from exc
        except (ArithmeticError, TypeError, ValueError) as exc:  # of the wrong type, or infinite
            raise InvalidToken("The bearer token is not valid: a claim is not usable") from exc
        if claims.get("role") != "authenticated":
            raise NotAllowed("The bearer token's role must be `authenticated`: sign in as a user")
        return claims

    async def _key(self, token: str) -> tuple[str | jwt.PyJWK, str]:
        """Return the key to check a token with, and the one algorithm that is good for it.

        Of the header only ``alg`` and ``kid`` are read, to choose among keys that are ours.
        """
        header = jwt.get_unverified_header(token)
        algorithm, key_id = str(header.get("alg")), header.get("kid")
        if algorithm == "HS256" and self._secret is not None:
            return self._secret.get_secret_value(), algorithm
        if algorithm in {"ES256", "RS256"} and self._signing_keys is not None:
            key = await self._signing_keys.get(key_id) if isinstance(key_id, str) else None
            if key is None:
                raise jwt.InvalidTokenError("it names no known signing key")
            return key, key.algorithm_name
        raise jwt.InvalidAlgorithmError("its algorithm is not accepted here")

    def _decode(self, token: str, key: str | jwt.PyJWK, algorithm: str) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=self._audience,
            issuer=self._issuer,
            leeway=LEEWAY,
            options={"require": ["exp", "sub", "aud"]},
        )
        try:
            claims["sub"] = str(UUID(claims["sub"]))
        except ValueError as exc:
            raise jwt.InvalidTokenError("sub is not a UUID") from exc
        _check_storable(claims)
        return claims

    async def aclose(self) -> None:
        """End what is under way."""
        if self._signing_keys is not None:
            await self._signing_keys.aclose()


def _check_storable(claims: Claims) -> None:
    """Raise ``jwt.InvalidTokenError`` for claims that Postgres can't hold as JSON."""
    try:
        text = json.dumps(claims, allow_nan=False, ensure_ascii=False)
        text.encode()
    except ValueError as exc:
        raise jwt.InvalidTokenError("a claim holds what JSON can't") from exc
    if "\\u0000" in text:
        raise jwt.InvalidTokenError("a claim holds a NUL character")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request acts for. ``claims`` are what its transactions run with.

    ``requests_per_minute`` is set where an API key has a limit of its own, ``session_id`` where a
    browser's session is why.
    """

    user_id: UUID
    claims: Claims = field(repr=False)
    limit_key: str
    scopes: frozenset[Scope] = frozenset(Scope)
    key_id: UUID | None = None
    requests_per_minute: int | None = None
    session_id: bytes | None = field(default=None, repr=False)


def session_claims(claims: Claims, session_id: bytes, now: float) -> Claims:
    """Return a session's claims, good for ``KEY_SECONDS`` or up to a fifth less.

    For that fifth they stay the same, as streams with the same claims share their looks. Each
    session has its own times, so that not the streams of all come back at once.
    """
    step = KEY_SECONDS // 5
    shift = int.from_bytes(session_id[:4]) % step
    end = (int(now) - shift) // step * step + shift + KEY_SECONDS
    return {**claims, "exp": min(int(claims["exp"]), end)}


class Authenticator:
    """Tells who is asking, and refuses those who ask too often."""

    def __init__(self, settings: Settings, pool: Pool, sessions: Sessions) -> None:
        self._verifier = TokenVerifier(settings)
        self._pool = pool
        self._sessions = sessions
        self._requests = Throttle(settings.rate_limit, "requests")
        self._failures = Throttle(
            settings.failed_rate_limit, "requests without a valid token from this address"
        )
        self.refused = 0  # requests that did not say, or not validly, whose they are
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of keys, ids of sessions

    async def authenticate(self, request: Request) -> Principal:
        """Return who is asking. Raises ``NotAuthenticated``, ``NotAllowed``, ``RateLimited``.

        Whoever sends a valid token is not held up by others who share their address and don't.
        ``SignInUnavailable``: a session's tokens have ended, and there are no new ones now.
        """
        try:
            principal = await self._identify(request)
        except (NotAuthenticated, NotAllowed, InvalidInput):
            self.refused += 1
            self._failures.take(address(request))
            raise
        allowance = self._requests.take(principal.limit_key, principal.requests_per_minute)
        if allowance is not None:
            request.state.response_headers.update(allowance.headers)
        return principal

    async def _identify(self, request: Request) -> Principal:
        authorization = request.headers.get("authorization")
        if authorization is None and cookie_name(request) in request.cookies:
            return await self._by_session(request)
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise NotAuthenticated(_NOBODY)
        if token.startswith(keys.PREFIX):
            return await self._by_key(token, request)
        return await self._by_token(token, request)

    async def _by_session(self, request: Request) -> Principal:
        """Return whose session it is. Browsers send its cookie, whoever has made them ask."""
        require_same_origin(request)
        key = sent_key(request)
        if key is None:
            raise NotAuthenticated(_NOBODY)
        self._slow_down_guesses(key.id, request)
        try:
            tokens = await self._sessions.tokens(key)
        except NotAuthenticated:
            self._known.pop(key.id, None)
            raise
        self._remember(key.id)
        user = await self._by_token(tokens.access_token, request)
        claims = session_claims(user.claims, key.id, time.time())
        return replace(user, claims=claims, session_id=key.id)

    async def _by_token(self, token: str, request: Request) -> Principal:
        claims = await self._verifier.verify(token)
        user_id = UUID(claims["sub"])
        if _stated_user(request) not in {None, user_id}:
            raise NotAllowed(f"{USER_HEADER}: only a service's API key acts for others")
        return Principal(user_id, claims, f"user:{user_id}")

    async def _by_key(self, text: str, request: Request) -> Principal:
        if not keys.well_formed(text):
            raise InvalidToken("The API key is not valid: it was not copied whole")
        digest = keys.digest(text)
        self._slow_down_guesses(digest, request)
        stated = _stated_user(request)
        async with self._pool.connection() as conn:
            key = await keys.use(conn, digest, stated)
        if key is None:
            self._known.pop(digest, None)
            raise InvalidToken(_BAD_KEY)
        self._remember(digest)
        user_id = _acted_for(key, stated)
        claims = {
            "sub": str(user_id),
            "role": "authenticated",
            "pgscribe_key": str(key.id),
            "exp": int(time.time()) + KEY_SECONDS,
        }
        scopes = frozenset(scope for scope in Scope if scope in key.scopes)
        return Principal(user_id, claims, f"key:{key.id}", scopes, key.id, key.requests_per_minute)

    def _slow_down_guesses(self, digest: bytes, request: Request) -> None:
        """Raise ``RateLimited`` rather than ask the database for what may be one guess of many."""
        if digest not in self._known:
            self._failures.check(address(request))

    def _remember(self, digest: bytes) -> None:
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > KNOWN:
            self._known.popitem(last=False)

    async def sign_in(self, request: Request, tokens: Tokens) -> str:
        """Begin a session in place of the browser's old one, and return its cookie.

        Raises ``InvalidToken`` or ``NotAllowed`` where this server would not take the tokens.
        """
        claims = await self._verifier.verify(tokens.access_token)
        key, cookie = await self._sessions.begin(
            UUID(claims["sub"]), tokens, replaced=sent_key(request)
        )
        self._remember(key.id)
        return cookie

    async def sign_out(self, key: SessionKey) -> None:
        """End a session."""
        self._known.pop(key.id, None)
        await self._sessions.end(key)

    @property
    def rate_limited(self) -> dict[str, int]:
        """How many requests were too many, by what was counted."""
        return {"requests": self._requests.refused, "unauthenticated": self._failures.refused}

    async def aclose(self) -> None:
        """End what is under way."""
        await self._sessions.aclose()
        await self._verifier.aclose()


def _stated_user(request: Request) -> UUID | None:
    """Return the user whom a request says that it acts for. Raises ``InvalidInput``."""
    stated = request.headers.getlist(USER_HEADER)
    if not stated:
        return None
    try:
        (text,) = stated
        return UUID(text)
    except ValueError:
        raise InvalidInput(
            f"{USER_HEADER}: must be the id of one user, a UUID", field=USER_HEADER
        ) from None


def _acted_for(key: keys.UsableKey, stated: UUID | None) -> UUID:
    """Return whom a key acts for. Raises ``InvalidInput`` or ``NotAllowed``."""
    user_id = key.bound_to or stated
    if user_id is None:
        raise InvalidInput(
            f"{USER_HEADER}: this API key acts for many users; state one by their id",
            field=USER_HEADER,
        )
    if stated not in {None, user_id}:
        raise NotAllowed(f"This API key acts for one user, not for the one in {USER_HEADER}")
    if not key.user_exists:
        raise NotAllowed("There is no such user in auth.users, or they are banned")
    return user_id


def address(request: Request) -> str:
    """Return the peer's address, by which requests are counted.

    Of IPv6 it is the network, as one peer has all of that.
    """
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


async def authenticate(request: Request) -> Principal:
    """Return who is asking, counted against their rate limit.

    Raises ``NotAuthenticated``, ``NotAllowed``, ``RateLimited``, ``SigningKeysUnavailable``,
    ``SignInUnavailable`` and, for a service's key that states no user, ``InvalidInput``.
    """
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator.authenticate(request)


def require(principal: Principal, scope: Scope) -> None:
    """Raise ``ScopeMissing`` unless the principal may do that."""
    if scope not in principal.scopes:
        raise ScopeMissing(scope)
