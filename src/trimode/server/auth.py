"""Checks API keys, and keeps their computed prefixes apart."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path

from trimode.errors import UsageError
from trimode.server.errors import ApiError

_SCHEME = "bearer "


class ApiKeys:
    """Holds digests of the keys; the keys themselves are not kept.

    Args:
        keys: Keys that are accepted; none = everybody may ask.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """Read keys from a file, one a line.

        Blank lines and lines that begin with ``#`` do not count.

        Raises:
            UsageError: the file cannot be read, or has no key.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UsageError(
                f"{path}: expected a readable file of API keys, found: {error}",
                "write one key a line",
            ) from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UsageError(f"{path}: expected an API key, found none", "write one key a line")
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def check(self, authorization: str | None) -> str | None:
        """Return the digest of a header's key; None without keys.

        The header is ``Authorization``.

        Raises:
            ApiError: 401, the header holds none of the keys.
        """
        if not self._digests:
            return None
        given = authorization or ""
        key = given[len(_SCHEME) :].strip() if given.lower().startswith(_SCHEME) else ""
        digest = _digest(key)
        # All are compared, so that time tells nothing
        matches = [hmac.compare_digest(digest, one) for one in self._digests]
        if key and any(matches):
            return digest
        raise ApiError(
            401,
            "expected a valid API key in the header Authorization: Bearer KEY, found "
            + ("another one" if key else "none"),
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def salt_of(key: str | None, cache_salt: str) -> str:
    """Return the salt under which the engine shares what it has computed.

    Time to the first token tells whether somebody has asked the same before (CVE-2025-46570). So a
    client's salt divides what its own key has computed, and never joins another key's.

    Args:
        key: Digest of the API key; None without keys.
        cache_salt: Salt of the client; may be empty.
    """
    return json.dumps([key, cache_salt]) if key is not None else cache_salt


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
