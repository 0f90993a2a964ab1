"""Signing in to the web app and out of it: pages with plain forms, which need no script."""

import base64
import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from jobs.errors import (
    InvalidInput,
    InvalidToken,
    NotAllowed,
    NotAuthenticated,
    PgscribeError,
    RateLimited,
    SigningKeysUnavailable,
    SignInUnavailable,
)
from jobs.settings import Settings
from web.auth import Authenticator, Principal, address, authenticate
from web.events import EventHub
from web.middleware import allow_body
from web.pages import HOME, SIGN_IN, render
from web.same_origin import is_https, require_same_origin
from web.sessions import SessionKey, Tokens, cookie_name, drop_cookie, sent_key, set_cookie
from web.sign_in import (
    LINK_ENDED,
    LINK_KINDS,
    REFUSED,
    LocalSignIn,
    SignIn,
    SignInRefused,
    SupabaseSignIn,
    check_email,
    refused_link,
)
from web.throttle import Throttle

logger = logging.getLogger(__name__)

MAX_FORM = 16 * 1024  # bytes
MAX_FIELDS = 10
MAX_NEXT = 2000  # characters
SHARED = 10  # times as many attempts for one user as from one address
MAX_LINKS = 3  # that one browser has asked for, and which are good for it
LINK_COOKIE_SECONDS = 3600  # as long as Supabase's links are good, unless a project changes it
LINK_SENT = f"{SIGN_IN}/link-sent"
CONFIRM = f"{SIGN_IN}/confirm"

_NEXT = re.compile(rf"{HOME}(?:[/?#][!-\[\]-~]*)?")  # printable ASCII but for the backslash
_DOTS = re.compile(r"/(?:\.|%2e){1,2}(?:[/?#]|$)", re.IGNORECASE)
_SECRET = re.compile(r"[\w.~-]{1,200}", re.ASCII)

_Refusal = SignInRefused | InvalidInput | RateLimited | SignInUnavailable | SigningKeysUnavailable
_REFUSALS = (
    SignInRefused, InvalidInput, RateLimited, SignInUnavailable, SigningKeysUnavailable
)  # fmt: skip


def safe_next(wanted: str | None) -> str:
    """Return where to go after signing in: a page of the app, whatever a link asked for."""
    text = (wanted or "")[: MAX_NEXT + 1]
    fine = len(text) <= MAX_NEXT and _NEXT.fullmatch(text) and not _DOTS.search(text)
    leads_back = text.startswith((SIGN_IN, f"{HOME}/sign-out"))
    return text if fine and not leads_back else HOME


# Pages


async def show_form(request: Request) -> Response:
    """``GET /app/sign-in``: the forms. ``next`` says where to go on."""
    return _form(request, next_page=safe_next(request.query_params.get("next")))


async def show_link_sent(request: Request) -> Response:
    """``GET /app/sign-in/link-sent``: what to do now, whether or not there is such a user."""
    return render(request, "sign_in_link_sent.html")


async def with_password(request: Request) -> Response:
    """``POST /app/sign-in``: sign in with a password."""
    fields = await _fields(request)
    email, next_page = fields.get("email", ""), safe_next(fields.get("next"))
    provider = _provider(request)
    if provider is None:
        return _form(request, next_page=next_page)
    try:
        user_email = check_email(email)
        if not fields.get("password"):
            raise InvalidInput("Enter the password.", field="password")
        _count(request, user_email)
        tokens = await provider.with_password(user_email, fields["password"])
        return await _enter(request, tokens, next_page)
    except _REFUSALS as exc:
        return _form(request, exc, email=email, next_page=next_page)


async def with_link(request: Request) -> Response:
    """``POST /app/sign-in/link``: have a link sent. The answer is the same for unknown users."""
    fields = await _fields(request)
    email, next_page = fields.get("email", ""), safe_next(fields.get("next"))
    provider = _link_provider(request)
    if provider is None:
        return _form(request, next_page=next_page)
    try:
        user_email = check_email(email)
        _count(request, user_email)
        verifier = await provider.send_link(user_email, _public_url(request) + CONFIRM)
    except _REFUSALS as exc:
        return _form(request, exc, email=email, next_page=next_page, by_link=True)
    response = RedirectResponse(LINK_SENT, HTTPStatus.SEE_OTHER)
    # Who asks twice may be sent one message only, with the link of either time.
    verifiers = [verifier, *_asked_for(request)[0]][:MAX_LINKS]
    encoded = base64.urlsafe_b64encode(next_page.encode()).decode().rstrip("=")
    value = "|".join([encoded, *verifiers])
    set_cookie(request, response, _link_cookie(request), value, max_age=LINK_COOKIE_SECONDS)
    return response


async def show_confirm(request: Request) -> Response:
    """``GET /app/sign-in/confirm``: where links in e-mails lead.

    ``code`` is good only with the cookie of the browser that asked for the link, and so for no
    scanner of e-mails. ``token_hash`` is good by itself: it is used when a button is pressed.
    """
    query = request.query_params
    if request.method == "HEAD":
        return Response()
    if query.keys() & {"error", "error_code", "error_description"}:
        return _form(request, refused_link(query.get("error_code", "")))
    if "code" in query:
        return await _with_code(request, query["code"])
    token_hash, kind = query.get("token_hash", ""), query.get("type", "")
    if not _SECRET.fullmatch(token_hash) or kind not in LINK_KINDS:
        return _form(request, SignInRefused(LINK_ENDED))
    user = await _present_user(request)
    context = {"token_hash": token_hash, "kind": kind}
    return render(request, "sign_in_confirm.html", context, user=user)


async def _present_user(request: Request) -> Principal | None:
    """Return whose session a link would replace: anybody may send anybody one of their own."""
    if sent_key(request) is None:
        return None
    try:
        return await authenticate(request)
    except (NotAuthenticated, NotAllowed):
        return None


def _saying_who(next_page: str) -> str:
    """Return a page that says who is signed in, as a link does not say for whom it was made."""
    parts = urlsplit(next_page)
    query = f"{parts.query}&signed-in=1" if parts.query else "signed-in=1"
    return urlunsplit(parts._replace(query=query))


async def _with_code(request: Request, code: str) -> Response:
    verifiers, next_page = _asked_for(request)
    provider = _link_provider(request)
    try:
        if provider is None or not verifiers or not _SECRET.fullmatch(code):
            raise SignInRefused(LINK_ENDED)
        _count(request)
        tokens = await provider.with_code(code, verifiers)
        return await _enter(request, tokens, _saying_who(next_page))
    except _REFUSALS as exc:
        return _form(request, exc, next_page=next_page)


async def confirm(request: Request) -> Response:
    """``POST /app/sign-in/confirm``: the button that a link leads to was pressed."""
    fields = await _fields(request)
    token_hash, kind = fields.get("token_hash", ""), fields.get("type", "")
    _, next_page = _asked_for(request)
    provider = _provider(request)
    try:
        usable = _SECRET.fullmatch(token_hash) and kind in LINK_KINDS
        if not isinstance(provider, SupabaseSignIn) or not usable:
            raise SignInRefused(LINK_ENDED)
        _count(request)
        tokens = await provider.with_token_hash(token_hash, kind)
        return await _enter(request, tokens, _saying_who(next_page))
    except _REFUSALS as exc:
        return _form(request, exc, next_page=next_page)


async def sign_out(request: Request) -> Response:
    """``POST /app/sign-out``: end the session."""
    require_same_origin(request)
    key = sent_key(request)
    if key is not None:
        authenticator: Authenticator = request.app.state.authenticator
        await authenticator.sign_out(key)
        _end_streams(request, key)
    response = RedirectResponse(SIGN_IN, HTTPStatus.SEE_OTHER)
    drop_cookie(request, response, cookie_name(request))
    return response


# Their parts


def _form(
    request: Request,
    refusal: _Refusal | None = None,
    *,
    email: str = "",
    next_page: str = HOME,
    by_link: bool = False,
) -> Response:
    """Return the forms, with what went wrong."""
    if isinstance(refusal, SignInRefused):
        request.app.state.metrics.sign_ins.labels("refused").inc()
    provider = _provider(request)
    context = {
        "offered": provider is not None,
        "local": isinstance(provider, LocalSignIn),
        "links": _link_provider(request) is not None,
        "error": str(refusal) if refusal else "",
        "faulty": getattr(refusal, "field", None),
        "by_link": by_link,
        "email": email[:300],
        "next": next_page,
    }
    status = HTTPStatus.OK if refusal is None else _status(refusal)
    response = render(request, "sign_in.html", context, status=status)
    wait = refusal.retry_after if isinstance(refusal, PgscribeError) else None
    if wait is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return response


def _status(refusal: _Refusal) -> HTTPStatus:
    if isinstance(refusal, RateLimited):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(refusal, SignInUnavailable | SigningKeysUnavailable):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.UNPROCESSABLE_ENTITY


async def _fields(request: Request) -> Mapping[str, str]:
    """Return a form's fields. Raises ``CrossSiteRequest``, ``BodyTooLarge``, ``InvalidInput``."""
    require_same_origin(request)
    allow_body(request, MAX_FORM)
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as exc:
        raise InvalidInput("body: is not a form of this page", field="body") from exc
    return dict(pairs)


def _count(request: Request, email: str | None = None) -> None:
    """Count an attempt of this address, and for this user. Raises ``RateLimited``.

    One address can use up only a part of what all may try for a user, who can still sign in.
    """
    attempts: Throttle = request.app.state.attempts
    attempts.take(f"address {address(request)}")
    if email is not None:
        attempts.take(f"e-mail {email}", SHARED * _settings(request).sign_in_rate_limit)


async def _enter(request: Request, tokens: Tokens, next_page: str) -> Response:
    """Begin a session and go on. Raises ``SignInRefused``, ``SigningKeysUnavailable``."""
    authenticator: Authenticator = request.app.state.authenticator
    try:
        cookie = await authenticator.sign_in(request, tokens)
    except (InvalidToken, NotAllowed) as exc:
        logger.error("What the sign-in service issues is not good here: %s", exc)  # noqa: TRY400
        raise SignInRefused(REFUSED) from exc
    request.app.state.metrics.sign_ins.labels("succeeded").inc()
    if replaced := sent_key(request):
        _end_streams(request, replaced)
    response = RedirectResponse(next_page, HTTPStatus.SEE_OTHER)
    max_age = _settings(request).session_days * 24 * 3600
    set_cookie(request, response, cookie_name(request), cookie, max_age=max_age)
    if _link_cookie(request) in request.cookies:
        drop_cookie(request, response, _link_cookie(request))
    return response


def _end_streams(request: Request, ended: SessionKey) -> None:
    hub: EventHub = request.app.state.events
    hub.end_session(ended.id)


def _link_cookie(request: Request) -> str:
    """Return the name of the cookie that shows who has asked for a link."""
    return "__Host-pgscribe-link" if is_https(request) else "pgscribe-link"


def _asked_for(request: Request) -> tuple[list[str], str]:
    """Return the codes that only the browser has that asked for links, and where it was going."""
    encoded, *verifiers = request.cookies.get(_link_cookie(request), "").split("|")
    try:
        wanted = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
    except ValueError:
        return [], HOME
    return [v for v in verifiers[:MAX_LINKS] if _SECRET.fullmatch(v)], safe_next(wanted)


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _provider(request: Request) -> SignIn | None:
    provider: SignIn | None = request.app.state.sign_in
    return provider


def _link_provider(request: Request) -> SupabaseSignIn | None:
    """Return who sends links: only to this server's own address, which no request may choose."""
    provider = _provider(request)
    known = _settings(request).public_url is not None
    return provider if known and isinstance(provider, SupabaseSignIn) else None


def _public_url(request: Request) -> str:
    return (_settings(request).public_url or "").rstrip("/")


def routes() -> list[Route]:
    """Return the routes; they come before those of other pages."""
    pages: list[tuple[str, str, Any]] = [
        ("GET", SIGN_IN, show_form),
        ("POST", SIGN_IN, with_password),
        ("POST", f"{SIGN_IN}/link", with_link),
        ("GET", LINK_SENT, show_link_sent),
        ("GET", CONFIRM, show_confirm),
        ("POST", CONFIRM, confirm),
        ("POST", f"{HOME}/sign-out", sign_out),
    ]
    return [Route(path, page, methods=[method]) for method, path, page in pages]
