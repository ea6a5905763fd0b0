"""The page at `/`: files of this package as they are, and what a browser may do with them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response

_FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
_BESIDE = (
    "api.js",
    "digest.js",
    "load.js",
    "main.js",
    "mark.svg",
    "page.css",
    "receipt.js",
    "theme.js",
    "trial.js",
    "weave.js",
)
PATHS = {"/": INDEX} | {f"/page/{name}": name for name in _BESIDE}
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, no markup made of strings, in no frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, sent again when it has changed
}


@dataclass(frozen=True)
class _File:
    data: bytes
    kind: str

    def response(self, request: Request) -> Response:
        tag = f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'
        headers = _HEADERS | {"ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(self.data, headers=headers, media_type=self.kind)


def add(app: FastAPI) -> None:
    """The routes of PATHS. Files are read once."""

    def route(path: str, file: _File) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
        async def page(request: Request) -> Response:
            return file.response(request)

    for path, name in PATHS.items():
        source = _FOLDER / name
        route(path, _File(source.read_bytes(), _KINDS[source.suffix]))
