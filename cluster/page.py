"""What does a browser get at `/`? A page that draws the service, and /requests, which it reads beside /status.

Three static files of the package, read once. They load nothing from anywhere else, which the content security policy
enforces: it works where there is no internet, and shows nothing to anybody else.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

Recent = Callable[[int], dict[str, object]]  # that many of the latest requests, as JSON; 0: all that are kept

REQUESTS_PATH = "/requests"  # a key is needed for it, where keys are needed: the requests are other clients'
_LIMIT = re.compile("[0-9]{1,6}", re.ASCII)
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI, recent: Recent) -> None:
    """Serve the page and what it alone reads."""
    for path, (name, media_type) in _FILES.items():
        content = (files("cluster") / "static" / name).read_bytes()
        app.add_api_route(path, _static(content, media_type), methods=["GET"], include_in_schema=False)

    @app.get(REQUESTS_PATH)
    async def requests(request: Request) -> Response:
        given = request.query_params.get("limit", "0")
        if not _LIMIT.fullmatch(given):
            raise HTTPException(400, f"limit: must be a number of requests, got {given!r}")
        return JSONResponse(recent(int(given)))


def _static(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return answer
