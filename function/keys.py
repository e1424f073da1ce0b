"""Bearer tokens: who may call the function at all."""

import hashlib
import hmac
from pathlib import Path

from function.errors import Unauthorized
from weights_cache.environment import SettingsError


class Keys:
    """The keys in a file, one a line; `#` begins a comment. The file is read again when it changes, as a mounted Secret does."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError if the file cannot be read or holds no key."""
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._digests: list[bytes] = []
        self._look()

    def check(self, authorization: str) -> None:
        """Raises Unauthorized unless the header's value has one of the keys."""
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthorized("a key is needed: send Authorization: Bearer <key>")
        try:
            self._look()
        except SettingsError:
            pass  # a Secret that is just being replaced; the keys that were good still are
        found = _digest(token.strip().encode())
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        if not sum(hmac.compare_digest(found, digest) for digest in self._digests):
            raise Unauthorized("this key is not known here")

    def _look(self) -> None:
        try:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_ino) == self._seen:
                return
            lines = [line.strip() for line in self._path.read_bytes().splitlines()]
        except OSError as error:
            raise SettingsError(f"FUNCTION_API_KEYS_FILE={str(self._path)!r}: {error.strerror}") from error
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys:
            raise SettingsError(f"FUNCTION_API_KEYS_FILE={str(self._path)!r}: holds no key; one a line is expected")
        self._digests, self._seen = [_digest(key) for key in keys], (stat.st_mtime_ns, stat.st_ino)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
