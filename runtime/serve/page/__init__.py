"""The page to chat in at /, and its files at /page/."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

from gemma3n_onnx.runtime.serve.not_found import NotFoundError

INDEX = "index.html"
TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Scripts and requests stay on this server, and no text can become script.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_routes(app: FastAPI) -> None:
    files = {file.name: file.read_bytes() for file in (resources.files(__package__) / "static").iterdir()}

    def sent(name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"The page has no file {name!r}; open the server's address itself.")
        kind = TYPES[name[name.rindex(".") :]]
        return Response(files[name], media_type=kind, headers=HEADERS)

    @app.get("/")
    async def index() -> Response:
        return sent(INDEX)

    @app.get("/page/{name}")
    async def file(name: str) -> Response:
        return sent(name)
