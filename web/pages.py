"""Pages of the web app: templates, the files that browsers load, and what a page may do."""

import functools
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import Scope

from jobs.errors import NotAuthenticated
from jobs.settings import Settings
from web.auth import Principal, authenticate

ExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]

HOME = "/app"
SIGN_IN = f"{HOME}/sign-in"
_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
_A_YEAR = "public, max-age=31536000, immutable"


def _fingerprint(folder: Path) -> str:
    """Return a name for what the folder's files hold: another one once any of them changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# In the path, not in a query: modules import each other by relative paths, and so by version.
STATIC = f"{HOME}/static/{_fingerprint(_STATIC)}"

_IMPORT = re.compile(r'from "\./([\w-]+\.js)"')


@functools.cache
def modules(name: str) -> list[str]:
    """Return a module and all that it imports, in that order, so that they can load at once."""
    found = [name]
    for module in found:
        text = (_STATIC / "js" / module).read_text(encoding="utf-8")
        found += [other for other in _IMPORT.findall(text) if other not in found]
    return found


_templates = Jinja2Templates(
    env=jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
)
_templates.env.globals |= {
    "static": STATIC, "home": HOME, "sign_in": SIGN_IN, "modules": modules
}  # fmt: skip


class _Versioned(StaticFiles):
    """Files that browsers need not ask for again: another version has another path."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        if response.status_code in {HTTPStatus.OK, HTTPStatus.NOT_MODIFIED}:
            response.headers["Cache-Control"] = _A_YEAR
        return response


def static_files() -> Mount:
    """Return the route of what pages load."""
    return Mount(STATIC, _Versioned(directory=_STATIC))


def content_security_policy(settings: Settings) -> str:
    """Return what a page may load, run and connect to: what is ours, and audio where it lies.

    No script or style stands in a page, and no script can make a string into HTML.
    """
    audio = _origin(settings.supabase_url) if settings.storage == "supabase" else ""
    ours = f"'self' {audio}".rstrip()
    rules = {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "manifest-src": "'self'",
        "connect-src": ours,
        "media-src": f"{ours} blob:",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _origin(url: str | None) -> str:
    parts = urlsplit(url or "")
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else ""


def render(
    request: Request,
    template: str,
    context: Mapping[str, Any] | None = None,
    *,
    user: Principal | None = None,
    status: HTTPStatus = HTTPStatus.OK,
) -> Response:
    """Return a page; ``user`` is who is signed in. Whatever the context holds is escaped."""
    settings: Settings = request.app.state.settings
    headers = {
        "Content-Security-Policy": content_security_policy(settings),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
        "Referrer-Policy": "same-origin",
    }
    operator = getattr(request.state, "operator", False)
    name = user and (user.claims.get("email") or user.user_id)
    values = {"user": user, "user_name": name, "operator": operator, **(context or {})}
    return _templates.TemplateResponse(request, template, values, status, headers)


async def page_user(request: Request) -> Principal | RedirectResponse:
    """Return who is signed in, or the way to sign in and back here."""
    try:
        return await authenticate(request)
    except NotAuthenticated:
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{SIGN_IN}?next={quote(here, safe='')}", HTTPStatus.SEE_OTHER)


def as_page(handler: ExceptionHandler) -> ExceptionHandler:
    """Return an exception handler whose problem details are pages where pages are asked for."""

    @functools.wraps(handler)
    async def handle(request: Request, exc: Exception) -> Response:
        response = await handler(request, exc)
        is_problem = response.media_type == "application/problem+json"
        if not is_problem or not f"{request.url.path}/".startswith(f"{HOME}/"):
            return response
        problem = json.loads(bytes(response.body))
        status = HTTPStatus(problem["status"])
        context = {"title": status.phrase, "text": problem["detail"]}
        page = render(request, "error.html", context, status=status)
        if "retry-after" in response.headers:
            page.headers["Retry-After"] = response.headers["retry-after"]
        return page

    return handle
