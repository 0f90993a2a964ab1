"""API keys: ``pgs_<8 hex digits>_<43 letters and digits>_<CRC-32>``. Only hashes are stored.

Secret scanners find them by that pattern and tell them from look-alikes by the checksum.
"""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import class_row

from jobs.errors import InvalidInput, KeyNotFound
from jobs.scopes import Scope
from jobs.sql import KEYS

PREFIX = "pgs_"
_ALPHABET = string.ascii_letters + string.digits
_SECRET_LENGTH = 43  # 62 ** 43 is more than 2 ** 256
_KEY = re.compile(rf"(pgs_[0-9a-f]{{8}}_[0-9A-Za-z]{{{_SECRET_LENGTH}}})_([0-9a-f]{{8}})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is stored of a key. ``state``: usable, expired or revoked."""

    id: UUID
    name: str
    prefix: str
    user_id: UUID | None
    scopes: list[str]
    requests_per_minute: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    state: str


@dataclass(frozen=True, slots=True)
class UsableKey:
    """A key that is good now. ``user_exists`` is about the user whom it acts for."""

    id: UUID
    bound_to: UUID | None
    scopes: list[str]
    requests_per_minute: int | None
    user_exists: bool


def generate(key_id: UUID) -> str:
    """Return a new key that begins as ``key_id`` does."""
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    body = f"{PREFIX}{key_id.hex[:8]}_{secret}"
    return f"{body}_{_checksum(body)}"


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def well_formed(key: str) -> bool:
    """Return whether a key's form and checksum are right, which says nothing of its being good."""
    match = _KEY.fullmatch(key)
    return match is not None and _checksum(match[1]) == match[2]


def digest(key: str) -> bytes:
    """Return what is stored of a key, and what it is looked up by.

    As whoever guesses can't choose a hash, how long the look-up takes tells them nothing.
    """
    return hashlib.sha256(key.encode()).digest()


async def use(
    conn: psycopg.AsyncConnection[Any], key_hash: bytes, stated_user: UUID | None
) -> UsableKey | None:
    """Return the key with that hash if it is good now, and note its use, at most once a minute.

    ``stated_user`` is whom a key that is bound to nobody is to act for.
    """
    async with conn.cursor(row_factory=class_row(UsableKey)) as cursor:
        await cursor.execute(KEYS["use"], {"hash": key_hash, "stated_user": stated_user})
        return await cursor.fetchone()


def create(  # noqa: PLR0913 - what a key may be
    conn: psycopg.Connection[Any],
    name: str,
    *,
    user_id: UUID | None,
    scopes: Collection[Scope],
    requests_per_minute: int | None = None,
    lifetime: timedelta | None = None,
) -> tuple[ApiKey, str]:
    """Make a key and return what is stored of it, and the key itself, which is not stored.

    Without a ``user_id`` it is a service's key: its requests each state the user they act for.
    Raises ``InvalidInput`` for a user who does not exist and a name that can't be stored.
    """
    key_id = uuid4()
    key = generate(key_id)
    values = {
        "id": key_id,
        "name": name,
        "prefix": f"{PREFIX}{key_id.hex[:8]}",
        "hash": digest(key),
        "user_id": user_id,
        "scopes": sorted(scopes),
        "requests_per_minute": requests_per_minute,
        "lifetime": lifetime,
    }
    try:
        with conn.transaction(), conn.cursor(row_factory=class_row(ApiKey)) as cursor:
            stored = cursor.execute(KEYS["create"], values).fetchone()
    except psycopg.errors.ForeignKeyViolation:
        raise InvalidInput(
            f"user: there is no user {user_id} in auth.users", field="user"
        ) from None
    except (psycopg.errors.CheckViolation, psycopg.DataError):
        # The original names all values of the row, with the hash.
        raise InvalidInput(
            "A key needs a name of 1 to 100 characters, at least one scope, a rate of at least 1 "
            "and an end that a calendar has",
            field="name",
        ) from None
    assert stored is not None
    return stored, key


def list_all(conn: psycopg.Connection[Any]) -> list[ApiKey]:
    """Return all keys, oldest first, also those that are expired or revoked."""
    with conn.cursor(row_factory=class_row(ApiKey)) as cursor:
        return cursor.execute(KEYS["list"]).fetchall()


def revoke(conn: psycopg.Connection[Any], key_id: UUID) -> None:
    """Refuse a key from now on, on all servers at once. Raises ``KeyNotFound``."""
    if conn.execute(KEYS["revoke"], {"id": key_id}).fetchone() is None:
        raise KeyNotFound
