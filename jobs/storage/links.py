"""Links of ours to local audio: signed, for one file, for a time."""

import hashlib
import hmac
import time
from dataclasses import dataclass
from typing import Any

import jwt

from jobs.errors import LinkExpired, LinkInvalid, UploadGone

_ALGORITHM = "HS256"
_UPLOAD = "pgscribe:upload"
_RESUMABLE = "pgscribe:resumable"
_DOWNLOAD = "pgscribe:download"


@dataclass(frozen=True, slots=True)
class UploadGrant:
    """What an upload link allows: one file of at most ``max_bytes`` bytes."""

    file_path: str
    max_bytes: int
    content_type: str


@dataclass(frozen=True, slots=True)
class ResumableGrant:
    """What a link to a resumable upload allows: one file of exactly ``size`` bytes.

    ``expires_at`` is in seconds since the epoch.
    """

    file_path: str
    size: int
    expires_at: int


@dataclass(frozen=True, slots=True)
class DownloadGrant:
    """What a download link allows; ``download_name`` is what it is to be saved as."""

    file_path: str
    download_name: str | None


class LinkSigner:
    """Signs links and checks them.

    Each kind of link has a key of its own, derived from the secret that signs users' tokens: a
    link is no token, a token no link, and a link to read allows no upload.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def sign_upload(self, grant: UploadGrant, *, expires_at: int) -> str:
        """Return a token that allows an upload; ``expires_at`` is in seconds since the epoch."""
        claims = {"path": grant.file_path, "max": grant.max_bytes, "type": grant.content_type}
        return self._sign(_UPLOAD, claims, expires_at)

    def sign_resumable(self, grant: ResumableGrant) -> str:
        """Return a token that allows a resumable upload."""
        claims = {"path": grant.file_path, "size": grant.size}
        return self._sign(_RESUMABLE, claims, grant.expires_at)

    def sign_download(self, grant: DownloadGrant, *, expires_at: int) -> str:
        """Return a token that allows a download; ``expires_at`` is in seconds since the epoch."""
        return self._sign(
            _DOWNLOAD, {"path": grant.file_path, "name": grant.download_name}, expires_at
        )

    def verify_upload(self, token: str) -> UploadGrant:
        """Return what the token allows. Raises ``LinkInvalid``."""
        claims = self._verify(_UPLOAD, token)
        return UploadGrant(claims["path"], claims["max"], claims["type"])

    def verify_resumable(self, token: str) -> ResumableGrant:
        """Return what the token allows. Raises ``UploadGone`` and ``LinkInvalid``."""
        try:
            claims = self._verify(_RESUMABLE, token)
        except LinkExpired as exc:
            raise UploadGone("The upload has expired; ask for a new one") from exc
        return ResumableGrant(claims["path"], claims["size"], claims["exp"])

    def verify_download(self, token: str) -> DownloadGrant:
        """Return what the token allows. Raises ``LinkInvalid``."""
        claims = self._verify(_DOWNLOAD, token)
        return DownloadGrant(claims["path"], claims["name"])

    def _key(self, audience: str) -> bytes:
        return hmac.digest(self._secret, f"{audience}:link:v1".encode(), hashlib.sha256)

    def _sign(self, audience: str, claims: dict[str, Any], expires_at: int) -> str:
        claims |= {"aud": audience, "exp": expires_at, "iat": int(time.time())}
        return jwt.encode(claims, self._key(audience), _ALGORITHM)

    def _verify(self, audience: str, token: str) -> dict[str, Any]:
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key(audience),
                algorithms=[_ALGORITHM],
                audience=audience,
                options={"require": ["exp", "aud"]},
            )
        except jwt.ExpiredSignatureError as exc:
            raise LinkExpired from exc
        except (jwt.InvalidTokenError, ValueError) as exc:
            raise LinkInvalid from exc
        return claims
