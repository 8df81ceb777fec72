"""The page at /."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from gpt_jax.serve.service import Service

_PAGE = Path(__file__).parent / "page" / "index.html"
# The page is one file that talks to this server only.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


async def page(request: Request, service: Service) -> Response:
    """The file."""
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(_PAGE, media_type="text/html; charset=utf-8", headers=headers)
