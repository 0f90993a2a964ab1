"""Requests that a browser may have been led to by somebody else's page, and cookies' surroundings.

No token in pages: browsers say themselves whose page a request comes from, by ``Sec-Fetch-Site``
to https and to this machine, and by ``Origin`` everywhere, and no page can forge either.
"""

from urllib.parse import urlsplit

from starlette.requests import Request

from jobs.errors import CrossSiteRequest

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]  # scheme, host, port


def is_https(request: Request) -> bool:
    """Return whether the browser speaks https, if perhaps to a proxy in front of this server.

    That is what a trusted proxy says, or what PGSCRIBE_PUBLIC_URL says of the host asked for.
    """
    if request.url.scheme == "https":
        return True
    public = _public_origin(request)
    return (
        public is not None
        and public[0] == "https"
        and public == _origin(f"https://{request.headers.get('host', '')}")
    )


def require_same_origin(request: Request) -> None:
    """Raise ``CrossSiteRequest`` where another origin's page may have made a browser ask that.

    Reading is never refused: a GET changes nothing, and other pages can't read its answer.
    """
    if request.method in SAFE_METHODS:
        return
    sites = request.headers.getlist("sec-fetch-site")
    if sites:
        if sites != ["same-origin"]:
            raise CrossSiteRequest
        return
    origins = request.headers.getlist("origin")
    stated = _origin(origins[0]) if len(origins) == 1 else None
    if stated is None or stated not in _own_origins(request):
        raise CrossSiteRequest(
            "The request does not say that it comes from a page of this server: open it there. "
            "Behind a proxy, PGSCRIBE_PUBLIC_URL tells this server its own address"
        )


def _own_origins(request: Request) -> set[Origin | None]:
    """Return what pages of this server have as their origin.

    Behind a proxy that is not trusted, the scheme may be another one than the browser's. That is
    not let pass for any host: then a page that somebody on the way has put under http could act
    under https. PGSCRIBE_PUBLIC_URL says what the scheme is.
    """
    scheme = "https" if is_https(request) else request.url.scheme
    own = {_origin(f"{scheme}://{request.headers.get('host', '')}"), _public_origin(request)}
    return own - {None}


def _public_origin(request: Request) -> Origin | None:
    url: str | None = request.app.state.settings.public_url
    return _origin(url) if url else None


def _origin(url: str) -> Origin | None:
    """Return a URL's origin; none if it has none, as ``null``."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    return parts.scheme, parts.hostname, port or _PORTS[parts.scheme]
