"""Who is asking: tokens as Supabase Auth issues them, and API keys."""

import ipaddress
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from web.jwks import SigningKeys
from web.throttle import Throttle

__all__ = ["Authenticator", "Principal", "Scope", "TokenVerifier", "authenticate", "require"]

Claims = Mapping[str, Any]

MAX_TOKEN = 8 * 1024  # characters
LEEWAY = 10  # seconds by which clocks may differ: exp, nbf and iat are read that generously
USER_HEADER = "Pgscribe-User"
KNOWN_KEYS = 1000
# A stream that a key has opened ends then, and its client comes back: the key may be revoked.
KEY_SECONDS = 300

_BAD_KEY = "The API key is not valid: it is unknown, has expired or was revoked"


def issue_token(settings: TokenSettings, user_id: UUID, *, lifetime: float, email: str = "") -> str:
    """Sign a token for a user, as Supabase Auth would; valid for ``lifetime`` seconds."""
    now = int(time.time())
    claims = {
        "sub": str(user_id),
        "role": "authenticated",
        "aud": settings.jwt_audience,
        "email": email,
        "iat": now,
        "exp": now + int(lifetime),
    }
    if settings.token_issuer:
        claims["iss"] = settings.token_issuer
    return jwt.encode(claims, settings.require_jwt_secret(), "HS256")


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

    ``requests_per_minute`` is set where an API key has a limit of its own.
    """

    user_id: UUID
    claims: Claims = field(repr=False)
    limit_key: str
    scopes: frozenset[Scope] = frozenset(Scope)
    key_id: UUID | None = None
    requests_per_minute: int | None = None


class Authenticator:
    """Tells who is asking, and refuses those who ask too often."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._verifier = TokenVerifier(settings)
        self._pool = pool
        self._requests = Throttle(settings.rate_limit, "requests")
        self._failures = Throttle(
            settings.failed_rate_limit, "requests without a valid token from this address"
        )
        self._known_keys: OrderedDict[bytes, None] = OrderedDict()

    async def authenticate(self, request: Request) -> Principal:
        """Return who is asking. Raises ``NotAuthenticated``, ``NotAllowed``, ``RateLimited``.

        Whoever sends a valid token is not held up by others who share their address and don't.
        """
        try:
            principal = await self._identify(request)
        except (NotAuthenticated, NotAllowed, InvalidInput):
            self._failures.take(_address(request))
            raise
        allowance = self._requests.take(principal.limit_key, principal.requests_per_minute)
        if allowance is not None:
            request.state.response_headers.update(allowance.headers)
        return principal

    async def _identify(self, request: Request) -> Principal:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise NotAuthenticated("Send the header `Authorization: Bearer <token or API key>`")
        if token.startswith(keys.PREFIX):
            return await self._by_key(token, request)
        claims = await self._verifier.verify(token)
        user_id = UUID(claims["sub"])
        if _stated_user(request) not in {None, user_id}:
            raise NotAllowed(f"{USER_HEADER}: only a service's API key acts for others")
        return Principal(user_id, claims, f"user:{user_id}")

    async def _by_key(self, text: str, request: Request) -> Principal:
        if not keys.well_formed(text):
            raise InvalidToken("The API key is not valid: it was not copied whole")
        digest = keys.digest(text)
        if digest not in self._known_keys:  # guesses shall not keep the database busy
            self._failures.check(_address(request))
        stated = _stated_user(request)
        async with self._pool.connection() as conn:
            key = await keys.use(conn, digest, stated)
        if key is None:
            self._known_keys.pop(digest, None)
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

    def _remember(self, digest: bytes) -> None:
        self._known_keys[digest] = None
        self._known_keys.move_to_end(digest)
        if len(self._known_keys) > KNOWN_KEYS:
            self._known_keys.popitem(last=False)

    async def aclose(self) -> None:
        """End what is under way."""
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


def _address(request: Request) -> str:
    """Return the peer's address; of IPv6 the network, as one peer has all of it."""
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

    Raises ``NotAuthenticated``, ``NotAllowed``, ``RateLimited``, ``SigningKeysUnavailable`` and,
    for a service's key that states no user, ``InvalidInput``.
    """
    authenticator: Authenticator = request.app.state.authenticator
    return await authenticator.authenticate(request)


def require(principal: Principal, scope: Scope) -> None:
    """Raise ``ScopeMissing`` unless the principal may do that."""
    if scope not in principal.scopes:
        raise ScopeMissing(scope)
