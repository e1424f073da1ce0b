"""Bearer tokens: who may call the function at all."""

import hashlib
import hmac
import logging
import os
import re
import stat
import threading
import time
from pathlib import Path

from function.errors import Unauthorized, Unavailable
from weights_cache.environment import SettingsError

MOST_BYTES = 1 << 20
SETTLED_S = 2.0  # a file that was changed later than so long ago may change again without its times telling
AGAIN_S = 5.0  # when a caller who cannot be judged may ask again
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors put at the beginning
_NOTE = re.compile(rb"(?:^|\s)#.*")  # a key itself may have a `#` in it

log = logging.getLogger("relight.function")

Version = tuple[int, ...]  # of a file


class Keys:
    """The keys in a file, one a line; what follows a `#` at the beginning or after a space is a comment.

    The file is read again when it changes, as a mounted Secret does, and what it says counts at once. While it holds no key, or cannot be
    read, nobody is let in.
    """

    def __init__(self, path: Path) -> None:
        """Raises SettingsError if the file cannot be read or holds no key."""
        if "/" not in str(path) and not path.exists():
            raise SettingsError("FUNCTION_API_KEYS_FILE: there is no file of this name here; it is not repeated, as it may be a key itself")
        self._path = path.absolute()  # an agent may change the working directory
        self._lock = threading.Lock()  # guards what follows
        self._seen: Version | None = None  # the file's, whose keys these are; None if it is to be read again
        self._digests: list[bytes] = []
        self._is_lost = False  # there are no keys, as the log says
        self._look()

    def check(self, authorization: str) -> str:
        """Who has the key in the header's value. Raises Unauthorized if it is not known, Unavailable while that cannot be told."""
        kind, _, token = authorization.partition(" ")
        token = token.strip(" \t")
        if kind.lower() != "bearer" or not token:
            raise Unauthorized("a key is needed: send Authorization: Bearer <key>")
        digests = self._current()
        try:
            found = _digest(token.encode("latin-1"))  # the bytes as they were sent
        except UnicodeEncodeError:
            raise Unauthorized("this key is not known here") from None
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        if not sum(hmac.compare_digest(found, digest) for digest in digests):
            raise Unauthorized("this key is not known here")
        return f"key:{found.hex()}"

    def _current(self) -> list[bytes]:
        """The keys that the file holds now. Raises Unavailable if there are none."""
        with self._lock:
            try:
                self._look()
            except SettingsError as error:
                self._lose(error)
                raise Unavailable("the keys cannot be checked now; the function's log says why", AGAIN_S) from None
            if self._is_lost:
                self._is_lost = False
                log.info("FUNCTION_API_KEYS_FILE=%r holds keys again", str(self._path))
            return self._digests

    def _lose(self, error: SettingsError) -> None:
        self._digests, self._seen = [], None
        if not self._is_lost:
            self._is_lost = True
            log.warning("%s; calls that need a key are refused until that changes", error)

    def _look(self) -> None:
        """Read the file if it may have changed. Raises SettingsError."""
        try:
            if self._seen is not None and _version(os.stat(self._path)) == self._seen:  # noqa: PTH116  half the time
                return
            version, content = _read(self._path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"FUNCTION_API_KEYS_FILE={str(self._path)!r}: {reason}") from error
        keys = [_NOTE.sub(b"", line).strip() for line in content.removeprefix(_MARK).splitlines()]
        if not any(keys):
            raise SettingsError(f"FUNCTION_API_KEYS_FILE={str(self._path)!r}: holds no key; one a line is expected")
        self._digests, self._seen = [_digest(key) for key in keys if key], version


def _read(path: Path) -> tuple[Version | None, bytes]:
    """A file's version, None if another may pass for it, and its content. Raises OSError, and ValueError for what is no file of keys."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # who opens a pipe would wait
    with open(fd, "rb") as file:  # noqa: PTH123
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("is no file")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"is larger than {MOST_BYTES} bytes")
    changed = max(about.st_mtime, about.st_ctime)
    return (_version(about) if time.time() - changed > SETTLED_S else None), content


def _version(about: os.stat_result) -> Version:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
