"""What goes wrong, in the shape that OpenAI's clients understand."""

import re

from starlette.responses import JSONResponse, Response

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
      status: The HTTP status.
      message: A sentence for people.
      param: The field of the request that it is about.
      code: A word for programs.
      headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict:
        """What clients read."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The answer."""
        return JSONResponse(self.body, self.status, self.headers)


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A mistake in a request's field; the message begins with it."""
    text = f"{param}: {message}" if param else message
    return ApiError(400, text, param, code)


def from_value_error(error: ValueError, names: dict[str, str] | None = None) -> ApiError:
    """A 400 of one of our own errors, whose text begins with the field and a colon.

    Args:
      error: The error.
      names: Our names of fields -> the request's.
    """
    text = " ".join(str(error).split())
    found = re.match(r"([\w.\[\]]{1,80}): ", text)
    if found is None:
        return ApiError(400, text)
    param = (names or {}).get(found[1], found[1])
    return bad_request(param, text[found.end() :])


def too_many(message: str) -> ApiError:
    """There is no place; a client may try again."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def too_long(seconds: float) -> ApiError:
    """An answer would have come too late."""
    return ApiError(504, f"The answer took longer than {seconds:g} seconds.", code="timeout")


def model_not_found(name: str) -> ApiError:
    """Another model than the one that is served."""
    return ApiError(404, f"The model {name[:200]!r} does not exist.", "model", "model_not_found")


def unknown_route(method: str, path: str) -> ApiError:
    """A path that this server does not know."""
    return ApiError(404, f"Unknown request URL: {method} {path[:200]}.", code="unknown_url")


def internal(reason: str = "The server had an error while it worked on the request.") -> ApiError:
    """Our own mistake; what it was stands in the log."""
    return ApiError(500, reason, code="internal_error")
