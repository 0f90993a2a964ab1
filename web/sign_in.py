"""Where users sign in to the web app: with Supabase Auth, or in the embedded environment.

The web app's pages know neither; they know what is offered, and the errors below.
"""

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard, TypeVar, get_args
from uuid import UUID

import httpx
import jwt
from psycopg.conninfo import conninfo_to_dict
from pydantic import ValidationError

from jobs import database
from jobs.database import Pool
from jobs.errors import InvalidInput, RateLimited, SettingsError, SignInUnavailable
from jobs.settings import Settings
from jobs.sql import DEV
from jobs.tokens import issue_token
from web.sessions import SessionRevoked, Tokens, TokenSource

if TYPE_CHECKING:
    from supabase import ASupabaseAuthClient as AuthClient
    from supabase_auth import AsyncMemoryStorage
    from supabase_auth.errors import AuthApiError
    from supabase_auth.types import Session

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What a link in an e-mail may be for that signs its reader in.
LinkKind = Literal["email", "magiclink", "signup", "invite"]
LINK_KINDS: tuple[str, ...] = get_args(LinkKind)

REQUEST_TIMEOUT = 10.0  # seconds for one question to Supabase Auth
LINK_SECONDS = 1.0  # after which sending a link is answered, however long it takes
LOCAL_LIFETIME = 3600  # seconds
MAX_EMAIL = 254  # characters, as SMTP has it
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

_EMAIL = re.compile(r"[^\s@\x00-\x1f\x7f]+@[^\s@\x00-\x1f\x7f]+")
_CODE = re.compile(r"[a-z_]{1,60}")
_RETRY_AFTER = 60.0  # seconds, where Auth does not say

WRONG_PASSWORD = "The e-mail address or the password is wrong."  # noqa: S105 - a sentence
NOT_CONFIRMED = (
    "This e-mail address is not confirmed yet. Open the link in the message that you were sent."
)
LINK_ENDED = (
    "This link is not valid any more: it works once, for a limited time, and in the browser that "
    "asked for it. Ask for a new one."
)
LINK_FAILED = "Signing in with this link has failed. Ask for a new one, or use your password."
REFUSED = "The sign-in service refused this. Whoever runs this server finds the reason in its log."

_SENTENCES = {
    "invalid_credentials": WRONG_PASSWORD,
    # Said of users whether or not the password is right.
    "user_banned": WRONG_PASSWORD,
    "user_not_found": WRONG_PASSWORD,
    "email_not_confirmed": NOT_CONFIRMED,  # said only to whoever knows the password
    **dict.fromkeys(
        (
            "otp_expired",
            "flow_state_not_found",
            "flow_state_expired",
            "bad_code_verifier",
            "validation_failed",
        ),
        LINK_ENDED,
    ),
    **dict.fromkeys(
        (
            "refresh_token_not_found",
            "refresh_token_already_used",
            "session_not_found",
            "session_expired",
            "otp_disabled",
        ),
        REFUSED,
    ),
}
_REFUSALS = frozenset({400, 401, 403, 404, 422})


class SignInRefused(Exception):
    """Signing in failed; the message is a sentence for the user, of our own making."""


def refused_link(code: str) -> SignInRefused:
    """Return what to say of a link that leads here with an error.

    Anybody can make such a link, so none of its words are shown, and few are logged.
    """
    if _CODE.fullmatch(code):
        logger.warning("A link to sign in leads here with the error %s", code)
    return SignInRefused(LINK_ENDED if _SENTENCES.get(code) == LINK_ENDED else LINK_FAILED)


class SignIn(TokenSource, Protocol):
    """Whoever users sign in with."""

    async def with_password(self, email: str, password: str) -> Tokens:
        """Sign a user in.

        Raises ``SignInRefused``, ``SignInUnavailable``, ``RateLimited``.
        """

    async def aclose(self) -> None:
        """Close connections."""


def choose(settings: Settings, pool: Pool) -> SignIn | None:
    """Return what the settings ask for. Raises ``SettingsError`` where that can't be."""
    if settings.local_sign_in_password is not None:
        return LocalSignIn(settings, pool)
    if settings.supabase_publishable_key is None:
        return None
    if settings.supabase_url is None:
        raise SettingsError(
            "Unusable settings:\n  PGSCRIBE_SUPABASE_URL: needed with "
            "PGSCRIBE_SUPABASE_PUBLISHABLE_KEY, so that users can sign in"
        )
    return SupabaseSignIn(settings.supabase_url, settings.supabase_publishable_key)


def check_email(text: str) -> str:
    """Return an e-mail address as it is compared. Raises ``InvalidInput``.

    Whether there is such an address, only a message to it can tell.
    """
    email = text.strip().lower()
    if len(email) > MAX_EMAIL or not _EMAIL.fullmatch(email):
        raise InvalidInput(
            f"Enter an e-mail address, name@example.org, of up to {MAX_EMAIL} characters.",
            field="email",
        )
    return email


class SupabaseSignIn:
    """Supabase Auth of the project at ``url``, by its publishable key."""

    def __init__(self, url: str, key: str) -> None:
        import supabase  # noqa: F401 - takes its time, which is better spent now

        self._url = url
        self._key = key
        self._http: httpx.AsyncClient | None = None
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def _shared_http(self) -> httpx.AsyncClient:
        """The HTTP client. It keeps no cookies, as all users share it."""
        if self._http is None:
            policy = DefaultCookiePolicy(allowed_domains=[])
            self._http = httpx.AsyncClient(
                timeout=REQUEST_TIMEOUT, follow_redirects=False, cookies=CookieJar(policy)
            )
        return self._http

    async def _auth(self, storage: "AsyncMemoryStorage | None" = None) -> "AuthClient":
        """Return a client for one request, as each remembers who has signed in with it."""
        from supabase import AsyncClientOptions, acreate_client
        from supabase_auth import AsyncMemoryStorage

        options = AsyncClientOptions(
            httpx_client=self._shared_http,
            auto_refresh_token=False,
            persist_session=False,
            flow_type="pkce",
            storage=storage or AsyncMemoryStorage(),
        )
        return (await acreate_client(self._url, self._key, options)).auth

    async def with_password(self, email: str, password: str) -> Tokens:
        """Sign a user in."""
        auth = await self._auth()
        credentials: Any = {"email": email, "password": password}
        answer = await _ask(lambda: auth.sign_in_with_password(credentials), WRONG_PASSWORD)
        return _tokens(answer.session)

    async def send_link(self, email: str, redirect_to: str) -> str:
        """Have a link sent to a user, and return the code that only this browser shall know.

        Whether there is such a user, neither the answer tells nor how long it takes: it comes
        after a second, and sending goes on if that takes longer.
        """
        from supabase_auth import AsyncMemoryStorage

        storage = AsyncMemoryStorage()  # where the client puts that code
        auth = await self._auth(storage)
        options = {"email_redirect_to": redirect_to, "should_create_user": False}
        credentials: Any = {"email": email, "options": options}
        sending = asyncio.create_task(_send(lambda: auth.sign_in_with_otp(credentials)))
        self._sending.add(sending)
        sending.add_done_callback(self._sent)
        await asyncio.gather(
            asyncio.sleep(LINK_SECONDS), asyncio.wait([sending], timeout=LINK_SECONDS)
        )
        if sending.done():
            sending.result()
        (verifier,) = storage.storage.values()
        return verifier

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._sending.discard(sending)
        if not sending.cancelled() and sending.exception() is not None:
            logger.warning("A link to sign in was not sent: the service does not answer")

    async def with_code(self, code: str, verifiers: Sequence[str]) -> Tokens:
        """Sign in whoever asked for the link that the code is from; one of the verifiers is its."""
        auth = await self._auth()
        *others, last = verifiers
        for verifier in others:
            with contextlib.suppress(SignInRefused):
                return await self._exchange(auth, code, verifier)
        return await self._exchange(auth, code, last)

    async def _exchange(self, auth: "AuthClient", code: str, verifier: str) -> Tokens:
        parameters: Any = {"auth_code": code, "code_verifier": verifier}
        answer = await _ask(lambda: auth.exchange_code_for_session(parameters), LINK_ENDED)
        return _tokens(answer.session)

    async def with_token_hash(self, token_hash: str, kind: str) -> Tokens:
        """Sign in whoever was sent the link that has this hash."""
        auth = await self._auth()
        parameters: Any = {"token_hash": token_hash, "type": kind}
        answer = await _ask(lambda: auth.verify_otp(parameters), LINK_ENDED)
        return _tokens(answer.session)

    async def refresh(self, tokens: Tokens) -> Tokens:
        """Use the refresh token. Raises ``SessionRevoked``."""
        auth = await self._auth()
        try:
            answer = await _ask(lambda: auth.refresh_session(tokens.refresh_token), REFUSED)
        except SignInRefused as exc:
            raise SessionRevoked from exc
        except RateLimited as exc:
            raise SignInUnavailable from exc
        return _tokens(answer.session)

    async def revoke(self, tokens: Tokens) -> None:
        """End the session there, and none of the user's others. Only a good token can do that."""
        if tokens.expires_at <= time.time():
            tokens = await self.refresh(tokens)
        auth = await self._auth()
        try:
            await _ask(lambda: auth.admin.sign_out(tokens.access_token, "local"), REFUSED)
        except (SignInRefused, RateLimited) as exc:
            raise SessionRevoked from exc

    async def aclose(self) -> None:
        """Let links be sent, and close the connections."""
        if self._sending:
            _, late = await asyncio.wait(self._sending, timeout=LINK_SECONDS)
            for sending in late:
                sending.cancel()
        if self._http is not None:
            await self._http.aclose()
        self._http = None


async def _send(send: Callable[[], Awaitable[object]]) -> None:
    """Send a link. Raises ``SignInUnavailable`` and ``RateLimited``.

    Auth refuses addresses that it does not know, and those that it has just sent something to.
    Neither is told; nor is a failure in sending, as only known addresses come so far.
    """
    from supabase_auth.errors import AuthApiError

    try:
        await _ask(send, REFUSED)
    except SignInRefused:
        pass
    except (SignInUnavailable, RateLimited) as exc:
        cause = exc.__cause__
        if not isinstance(cause, AuthApiError) or _is_gateways(cause):
            raise
        if cause.code == "over_request_rate_limit":
            raise


async def _ask(ask: Callable[[], Awaitable[T]], otherwise: str) -> T:
    """Ask Supabase Auth. ``otherwise`` is the sentence for a refusal without a known reason.

    Raises ``SignInRefused``, ``SignInUnavailable``, ``RateLimited``. What Auth says itself is not
    passed on: it may hold an e-mail address, and tell whether there is such a user.
    """
    from supabase_auth.errors import AuthApiError, AuthError

    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            return await ask()
    except AuthApiError as exc:
        raise _understood(exc, otherwise) from exc
    except (AuthError, httpx.HTTPError, ValidationError, TimeoutError) as exc:
        logger.warning("Supabase Auth does not answer: %s", type(exc).__name__)
        raise SignInUnavailable from exc


def _understood(exc: "AuthApiError", otherwise: str) -> Exception:
    code, status = exc.code, exc.status
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        wait = _retry_after(exc)
        message = f"Too many attempts. Wait {math.ceil(wait)} s, then try again."
        return RateLimited(message, limit=0, retry_after=wait)
    if _is_gateways(exc):
        logger.error(
            "The project refuses PGSCRIBE_SUPABASE_PUBLISHABLE_KEY or has no Auth at "
            "PGSCRIBE_SUPABASE_URL (HTTP %d)",
            status,
        )
        return SignInUnavailable()
    if status not in _REFUSALS:
        logger.warning("Supabase Auth answers with HTTP %d (%s)", status, code)
        return SignInUnavailable()
    if code is not None and code not in _SENTENCES:
        logger.warning("Supabase Auth refuses with HTTP %d (%s)", status, code)
        return SignInRefused(REFUSED)
    return SignInRefused(_SENTENCES.get(str(code), otherwise))


def _is_gateways(exc: "AuthApiError") -> bool:
    """Return whether not Auth refuses but what stands before it; nobody's session ends by that."""
    return exc.code is None and exc.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND}


def _retry_after(exc: "AuthApiError") -> float:
    cause = exc.__cause__
    said = cause.response.headers.get("retry-after", "") if _has_response(cause) else ""
    return float(said) if re.fullmatch(r"\d{1,5}", said) else _RETRY_AFTER


def _has_response(cause: BaseException | None) -> TypeGuard[httpx.HTTPStatusError]:
    return isinstance(cause, httpx.HTTPStatusError)


def _tokens(session: "Session | None") -> Tokens:
    """Return a session's tokens. Raises ``SignInUnavailable`` if the answer has none."""
    if session is None:
        logger.warning("Supabase Auth answers without a session")
        raise SignInUnavailable
    ends = session.expires_at or int(time.time()) + session.expires_in
    return Tokens(session.access_token, session.refresh_token, ends)


class LocalSignIn:
    """Anybody who knows the one password, as any user: in the embedded environment only.

    Raises ``SettingsError`` where the settings alone show that this is none.
    """

    def __init__(self, settings: Settings, pool: Pool) -> None:
        if settings.supabase_url or settings.supabase_publishable_key:
            raise _not_embedded(
                "PGSCRIBE_SUPABASE_URL and PGSCRIBE_SUPABASE_PUBLISHABLE_KEY must be unset"
            )
        assert settings.local_sign_in_password is not None
        settings.require_jwt_secret()
        self._settings = settings
        self._password = settings.local_sign_in_password.get_secret_value().encode()
        self._pool = pool

    async def with_password(self, email: str, password: str) -> Tokens:
        """Sign a user in, who is made if there is none with that address."""
        if not secrets.compare_digest(password.encode(), self._password):
            raise SignInRefused(WRONG_PASSWORD)
        async with self._pool.connection() as conn:
            row = await (await conn.execute(DEV["user_of_email"], {"email": email})).fetchone()
        if row is None:  # somebody else has made them in this moment
            raise SignInUnavailable
        return self._issue(row[0], email)

    def _issue(self, user_id: UUID, email: str) -> Tokens:
        token = issue_token(self._settings, user_id, lifetime=LOCAL_LIFETIME, email=email)
        return Tokens(token, "", int(time.time()) + LOCAL_LIFETIME)

    async def refresh(self, tokens: Tokens) -> Tokens:
        """Issue others. The old ones come out of the session, where nobody can change them."""
        claims = jwt.decode(tokens.access_token, options={"verify_signature": False})
        return self._issue(UUID(claims["sub"]), claims["email"])

    async def revoke(self, tokens: Tokens) -> None:
        """Do nothing: there is no session but ours."""

    async def aclose(self) -> None:
        """Do nothing."""


def _not_embedded(reason: str) -> SettingsError:
    return SettingsError(
        "Unusable settings:\n  PGSCRIBE_LOCAL_SIGN_IN_PASSWORD: is for `pgscribe dev` only, as it "
        f"lets its holder sign in as anybody: {reason}"
    )


def refuse_other_hosts(settings: Settings, host: str) -> None:
    """Raise ``SettingsError`` where the local password would be good for other machines."""
    if settings.local_sign_in_password is not None and host not in LOOPBACK:
        raise _not_embedded("the web server must listen on 127.0.0.1 (--host)")


async def refuse_other_databases(settings: Settings) -> None:
    """Raise ``SettingsError`` where the local password would be good for a real database.

    Asked of the database itself, as a URL may lead through a tunnel.
    """
    if settings.local_sign_in_password is None:
        return
    url = conninfo_to_dict(settings.database_url.get_secret_value())
    if url.get("hostaddr", url.get("host")) in LOOPBACK:
        async with await database.connect(settings, name="web") as conn:
            row = await (await conn.execute(DEV["embedded"])).fetchone()
        if row == (True,):
            return
    raise _not_embedded("the database must be the embedded one, on this machine")
