"""What the API is, for people and for programs. Works without a connection to the internet."""

import asyncio
import functools
import importlib.util
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from web.pages import STATIC

# No script but ours and Swagger UI's; it sets styles and shows icons that are in its style sheet.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pgscribe API</title>
<link rel="icon" href="{STATIC[1:]}/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="docs/swagger/swagger-ui.css">
<script src="docs/swagger/swagger-ui-bundle.js" defer></script>
<script src="docs/page.js" defer></script>
</head>
<body><main id="api"></main></body>
</html>
"""
_SCRIPT = Path(__file__).with_name("docs.js")


@functools.cache
def _swagger() -> StaticFiles:
    """Return Swagger UI as the package swagger-ui-py carries it, which is not imported."""
    found = importlib.util.find_spec("swagger_ui")
    assert found is not None
    assert found.origin is not None
    return StaticFiles(directory=Path(found.origin).with_name("static"))


async def openapi(request: Request) -> Response:
    """``GET /openapi.json``: the OpenAPI description."""
    return JSONResponse(await asyncio.to_thread(request.app.state.openapi))


async def page(_: Request) -> Response:
    """``GET /docs``: the description as a page."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": CONTENT_SECURITY_POLICY})


async def script(_: Request) -> Response:
    """``GET /docs/page.js``: what starts the page."""
    return FileResponse(_SCRIPT, media_type="text/javascript")


def routes() -> list[Route | Mount]:
    """Return the routes of the documentation."""
    return [
        Route("/openapi.json", openapi),
        Route("/docs", page),
        Route("/docs/page.js", script),
        Mount("/docs/swagger", _swagger()),
    ]
