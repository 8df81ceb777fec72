"""Bearer keys."""

import hashlib
import hmac
from pathlib import Path

from gpt_jax.serve.errors import ApiError

# What needs no key: the page holds nothing, and a load balancer has none.
OPEN_PATHS = ("/", "/health")


class Keys:
    """The keys that let clients in."""

    def __init__(self, path: str):
        """
        Args:
          path: A file of one key a line; empty lines and those that begin with # are skipped.
            "": no key is needed.

        Raises:
          ValueError: the file does not exist, is no text, or holds no key.
        """
        self._digests: tuple[bytes, ...] = ()
        if not path:
            return
        if not Path(path).is_file():
            raise ValueError(f"api_keys: {path!r} is not a file")
        try:
            lines = [line.strip() for line in Path(path).read_text().splitlines()]
        except UnicodeDecodeError:
            raise ValueError(f"api_keys: {path!r} is no text") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"api_keys: {path!r} holds no key")
        self._digests = tuple(_digest(key.encode()) for key in keys)

    def check(self, path: str, authorization: bytes | None) -> None:
        """Lets a request in.

        The time that it takes tells nothing about the keys: digests of one length are compared,
        each to its end, and all of them.

        Raises:
          ApiError: 401.
        """
        if not self._digests or path in OPEN_PATHS:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        known = False
        for digest in self._digests:
            known |= hmac.compare_digest(given, digest)
        if scheme.lower() != b"bearer" or not known:
            said = "Incorrect API key provided." if authorization else "No API key was provided."
            raise ApiError(
                401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
