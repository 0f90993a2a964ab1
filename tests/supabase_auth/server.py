"""A stand-in for Supabase Auth on a real socket.

Written from the documented API and the errors of supabase/auth: passwords, links by e-mail with
PKCE and with token hashes, refresh tokens that rotate. It can be away, slow, and lose answers.
"""

import base64
import hashlib
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlencode
from uuid import UUID, uuid4

import anyio.to_thread
import jwt
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.jwks_server import SigningKey, ec_key
from tests.live import serve

VERSION = "2024-01-01"
REUSE_SECONDS = 10.0
LINK_SECONDS = 3600.0
CODE_SECONDS = 300.0
EMAIL_PAUSE = 60.0

# "cut": there is no answer; "lost": it is done, but there is no answer; "html": a gateway's.
Fault = Literal["cut", "lost", "html", "500", "503"]


@dataclass
class User:
    id: UUID
    email: str
    password: str
    confirmed: bool = True
    banned: bool = False
    mailed_at: float | None = None


@dataclass
class RefreshToken:
    token: str
    parent: str | None
    revoked_at: float | None = None


@dataclass
class AuthSession:
    user: User
    tokens: list[RefreshToken] = field(default_factory=list)


@dataclass
class Mail:
    """A message with a link. ``redirect_to`` is where Auth itself would lead to."""

    to: str
    token_hash: str
    redirect_to: str
    challenge: str
    sent_at: float


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Auth:
    """The server's state. ``url`` is the project's, ``key`` its publishable key."""

    def __init__(self) -> None:
        self.url = ""
        self.key = f"sb_publishable_{secrets.token_urlsafe(16)}"
        self.signing_key: SigningKey = ec_key()
        self.lifetime = 3600  # seconds of an access token
        self.redirect_urls: list[str] = []
        self.site_url = "https://site.example.org"
        self.users: dict[str, User] = {}
        self.sessions: dict[UUID, AuthSession] = {}
        self.mails: list[Mail] = []
        self.codes: dict[str, tuple[User, str, float]] = {}  # user, challenge, from when
        self.faults: dict[str, Fault] = {}  # by what a path ends with, as long as they are here
        self.limited: str | None = None  # Retry-After of those who ask too often
        self.requests: list[tuple[str, str]] = []  # path with grant type, and the body
        self.bearers: list[str] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def add(self, user_id: UUID, email: str, password: str = "correct horse") -> User:
        user = self.users[email] = User(user_id, email, password)
        return user

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    # What a session is given

    def begin(self, user: User) -> dict[str, Any]:
        session_id = uuid4()
        session = self.sessions[session_id] = AuthSession(user)
        session.tokens.append(RefreshToken(secrets.token_urlsafe(9), None))
        return self.answer(session_id)

    def answer(self, session_id: UUID) -> dict[str, Any]:
        session = self.sessions[session_id]
        user, now = session.user, int(time.time())
        claims = {
            "iss": f"{self.url}/auth/v1",
            "sub": str(user.id),
            "aud": "authenticated",
            "exp": now + self.lifetime,
            "iat": now,
            "email": user.email,
            "phone": "",
            "app_metadata": {"provider": "email", "providers": ["email"]},
            "user_metadata": {},
            "role": "authenticated",
            "aal": "aal1",
            "amr": [{"method": "password", "timestamp": now}],
            "session_id": str(session_id),
            "is_anonymous": False,
        }
        return {
            "access_token": self.signing_key.sign(claims),
            "token_type": "bearer",
            "expires_in": self.lifetime,
            "expires_at": now + self.lifetime,
            "refresh_token": session.tokens[-1].token,
            "user": self.shown(user),
        }

    def shown(self, user: User) -> dict[str, Any]:
        now = "2026-11-26T00:00:00Z"
        return {
            "id": str(user.id), "aud": "authenticated", "role": "authenticated",
            "email": user.email, "phone": "", "app_metadata": {}, "user_metadata": {},
            "identities": [], "created_at": now, "updated_at": now, "is_anonymous": False,
        }  # fmt: skip

    # Endpoints

    async def token(self, request: Request, body: dict[str, Any]) -> Response:
        match request.query_params.get("grant_type"):
            case "password":
                answer = self.by_password(body["email"], body["password"])
            case "refresh_token":
                answer = self.refreshed(body["refresh_token"])
            case "pkce":
                answer = self.by_code(body["auth_code"], body["code_verifier"])
            case _:
                raise Refused(400, "validation_failed", "unsupported_grant_type")
        return JSONResponse(answer)

    def by_password(self, email: str, password: str) -> dict[str, Any]:
        user = self.users.get(email)
        if user is not None and user.banned:
            raise Refused(400, "user_banned", "User is banned")
        if user is None or user.password != password:
            raise Refused(400, "invalid_credentials", "Invalid login credentials")
        if not user.confirmed:
            raise Refused(400, "email_not_confirmed", "Email not confirmed")
        return self.begin(user)

    def refreshed(self, text: str) -> dict[str, Any]:
        """As RefreshTokenGrant does it, with rotation."""
        known = {t.token: (id_, t) for id_, held in self.sessions.items() for t in held.tokens}
        if text not in known:
            message = "Invalid Refresh Token: Refresh Token Not Found"
            raise Refused(400, "refresh_token_not_found", message)
        session_id, token = known[text]
        session = self.sessions[session_id]
        if session.user.banned:
            raise Refused(400, "user_banned", "Invalid Refresh Token: User Banned")
        active = next((held for held in session.tokens if held.revoked_at is None), None)
        if token.revoked_at is not None:
            if active is not None and active.parent == text:
                return self.answer(session_id)
            if time.time() > token.revoked_at + REUSE_SECONDS:
                for held in session.tokens:
                    held.revoked_at = held.revoked_at or time.time()
                raise Refused(
                    400, "refresh_token_already_used", "Invalid Refresh Token: Already Used"
                )
        token.revoked_at = token.revoked_at or time.time()
        session.tokens.append(RefreshToken(secrets.token_urlsafe(9), text))
        return self.answer(session_id)

    def by_code(self, code: str, verifier: str) -> dict[str, Any]:
        if not code or not verifier:
            message = "invalid request: both auth code and code verifier should be non-empty"
            raise Refused(400, "validation_failed", message)
        if code not in self.codes:
            raise Refused(404, "flow_state_not_found", "invalid flow state, no valid flow state")
        user, challenge, since = self.codes[code]
        if time.time() > since + CODE_SECONDS:
            raise Refused(403, "flow_state_expired", "invalid flow state, flow state has expired")
        if challenge != hashed(verifier):
            message = "code challenge does not match previously saved code verifier"
            raise Refused(400, "bad_code_verifier", message)
        del self.codes[code]
        return self.begin(user)

    async def otp(self, request: Request, body: dict[str, Any]) -> Response:
        user = self.users.get(body["email"])
        if user is None:
            assert body["create_user"] is False, "nobody asked for new users"
            raise Refused(422, "otp_disabled", "Signups not allowed for otp")
        now = time.time()
        if user.mailed_at is not None and now < user.mailed_at + EMAIL_PAUSE:
            message = "For security purposes, you can only request this after 59 seconds."
            raise Refused(429, "over_email_send_rate_limit", message)
        user.mailed_at = now
        wanted = request.query_params.get("redirect_to", "")
        redirect_to = wanted if wanted in self.redirect_urls else self.site_url
        assert body["code_challenge_method"] == "s256"
        token_hash = f"pkce_{secrets.token_hex(28)}"
        self.mails.append(Mail(user.email, token_hash, redirect_to, body["code_challenge"], now))
        return JSONResponse({})

    def found(self, token_hash: str) -> Mail:
        for mail in self.mails:
            if mail.token_hash == token_hash and time.time() < mail.sent_at + LINK_SECONDS:
                self.mails.remove(mail)
                return mail
        raise Refused(403, "otp_expired", "Email link is invalid or has expired")

    async def verify(self, _: Request, body: dict[str, Any]) -> Response:
        if body["type"] not in {"email", "magiclink", "signup", "invite", "recovery"}:
            raise Refused(400, "validation_failed", "Verify requires a verification type")
        return JSONResponse(self.begin(self.users[self.found(body["token_hash"]).to]))

    async def follow(self, request: Request, _: dict[str, Any]) -> Response:
        """GET /verify: what the link of the usual template leads to."""
        try:
            mail = self.found(request.query_params["token"])
        except Refused as exc:
            said = {"error": "access_denied", "error_code": exc.code}
            query = urlencode(said | {"error_description": exc.message})
            return RedirectResponse(f"{request.query_params['redirect_to']}?{query}", 303)
        code = str(uuid4())
        self.codes[code] = (self.users[mail.to], mail.challenge, time.time())
        return RedirectResponse(f"{mail.redirect_to}?{urlencode({'code': code})}", 303)

    def session_of(self, request: Request) -> UUID:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        self.bearers.append(token)
        try:
            claims = jwt.decode(
                token, self.signing_key.private.public_key(), ["ES256"], audience="authenticated"
            )
            session_id = UUID(claims["session_id"])
            self.sessions[session_id]
        except jwt.InvalidTokenError as exc:
            raise Refused(403, "bad_jwt", f"invalid JWT: {exc}") from exc
        except KeyError:
            raise Refused(403, "session_not_found", "Session does not exist") from None
        return session_id

    async def logout(self, request: Request, _: dict[str, Any]) -> Response:
        assert request.query_params["scope"] == "local"
        del self.sessions[self.session_of(request)]
        return Response(status_code=204)

    async def user(self, request: Request, _: dict[str, Any]) -> Response:
        return JSONResponse(self.shown(self.sessions[self.session_of(request)].user))

    async def jwks(self, _: Request, __: dict[str, Any]) -> Response:
        return JSONResponse({"keys": [self.signing_key.jwk]})

    # What each request goes through

    async def handle(
        self, request: Request, act: Callable[[Request, dict[str, Any]], Awaitable[Response]]
    ) -> Response:
        path = request.url.path.removeprefix("/auth/v1")
        if grant_type := request.query_params.get("grant_type"):
            path += f"?{grant_type}"
        raw = await request.body()
        self.requests.append((path, raw.decode()))
        public = request.method == "GET"
        self.asked.set()
        if not public:
            await anyio.to_thread.run_sync(self.gate.wait)
        fault = next((kind for end, kind in self.faults.items() if path.endswith(end)), None)
        if fault is not None and fault != "lost":
            return away(fault)
        if not public and request.headers.get("apikey") != self.key:
            return JSONResponse({"message": "Invalid API key"}, 401)  # the gateway's
        if not public and self.limited is not None:
            message = "Request rate limit reached"
            limited = {"Retry-After": self.limited} if self.limited else {}
            return refusal(Refused(429, "over_request_rate_limit", message, **limited))
        try:
            answer = await act(request, await request.json() if raw else {})
        except Refused as exc:
            answer = refusal(exc)
        return _Cut() if fault == "lost" else answer

    def app(self) -> Starlette:
        def route(path: str, method: str, act: Any) -> Route:
            async def endpoint(request: Request) -> Response:
                return await self.handle(request, act)

            return Route(f"/auth/v1{path}", endpoint, methods=[method])

        return Starlette(
            routes=[
                route("/token", "POST", self.token),
                route("/otp", "POST", self.otp),
                route("/verify", "POST", self.verify),
                route("/verify", "GET", self.follow),
                route("/logout", "POST", self.logout),
                route("/user", "GET", self.user),
                route("/.well-known/jwks.json", "GET", self.jwks),
            ]
        )


def away(fault: Fault) -> Response:
    match fault:
        case "html":
            return Response("<html>bad gateway</html>", 502, media_type="text/html")
        case "503":
            return JSONResponse({"message": "upstream is away"}, 503)
        case "500":
            return refusal(Refused(500, "unexpected_failure", "Error sending magic link"))
        case _:
            return _Cut()


class _Cut(Response):
    """An answer that breaks off before there is anything of it."""

    async def __call__(self, _: Scope, __: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})
        raise ConnectionAbortedError


def refusal(refused: Refused) -> Response:
    """As the API is since version 2024-01-01, which the client asks for."""
    content = {"code": refused.code, "message": refused.message}
    headers = {"X-Supabase-Api-Version": VERSION} | refused.headers
    return JSONResponse(content, refused.status, headers)


def hashed(verifier: str) -> str:
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@contextmanager
def serving() -> Iterator[Auth]:
    """Serve on loopback, from a thread; set ``url``."""
    auth = Auth()
    with serve(auth.app()) as url:
        auth.url = url
        try:
            yield auth
        finally:
            auth.gate.set()
