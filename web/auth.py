"""Who is asking: HS256 tokens as Supabase issues them."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import jwt
from starlette.requests import Request

from jobs.errors import NotAllowed, NotAuthenticated
from jobs.settings import TokenSettings

Claims = Mapping[str, Any]


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
    if settings.jwt_issuer:
        claims["iss"] = settings.jwt_issuer
    return jwt.encode(claims, settings.require_jwt_secret(), "HS256")


class TokenVerifier:
    """Checks bearer tokens: signature, expiry, audience, issuer, subject and role."""

    def __init__(self, settings: TokenSettings) -> None:
        self._secret = settings.require_jwt_secret()
        self._audience = settings.jwt_audience
        self._issuer = settings.jwt_issuer

    def verify(self, token: str) -> Claims:
        """Return the claims. Raises ``NotAuthenticated`` or, for other roles, ``NotAllowed``."""
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                audience=self._audience,
                issuer=self._issuer,
                options={"require": ["exp", "sub", "aud"]},
            )
            claims["sub"] = str(UUID(claims["sub"]))
            _check_storable(claims)
        except (jwt.InvalidTokenError, ValueError) as exc:
            reason = str(exc) if isinstance(exc, jwt.InvalidTokenError) else "sub is not a UUID"
            raise NotAuthenticated(f"The bearer token is not valid: {reason}") from exc
        if claims.get("role") != "authenticated":
            raise NotAllowed("The bearer token's role must be `authenticated`: sign in as a user")
        return claims


def _check_storable(claims: Claims) -> None:
    """Raise ``jwt.InvalidTokenError`` for claims that Postgres can't hold as JSON."""
    try:
        text = json.dumps(claims, allow_nan=False, ensure_ascii=False)
        text.encode()
    except ValueError as exc:
        raise jwt.InvalidTokenError("a claim holds what JSON can't") from exc
    if "\\u0000" in text:
        raise jwt.InvalidTokenError("a claim holds a NUL character")


class Scope(StrEnum):
    """What an API key may be used for; a signed-in user may do all of it."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    AUDIO_READ = "audio:read"
    AUDIO_WRITE = "audio:write"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request acts for. ``claims`` are what its transactions run with."""

    user_id: UUID
    claims: Claims
    scopes: frozenset[Scope] = frozenset(Scope)


async def authenticate(request: Request) -> Principal:
    """Return who is asking. Raises ``NotAuthenticated``, ``NotAllowed``."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise NotAuthenticated("Send the header `Authorization: Bearer <token>`")
    verifier: TokenVerifier = request.app.state.verifier
    claims = verifier.verify(token.strip())
    return Principal(UUID(claims["sub"]), claims)


def require(user: Principal, scope: Scope) -> None:
    """Raise ``NotAllowed`` unless the user may do that."""
    if scope not in user.scopes:
        raise NotAllowed(f"The key has not the scope `{scope}`")
