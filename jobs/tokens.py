"""Tokens for users, as Supabase Auth would sign them; ``web.auth`` checks them."""

import time
from uuid import UUID

import jwt

from jobs.settings import TokenSettings


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
