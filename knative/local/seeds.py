"""Directories that are put into the embedded object store: which weights they are for, and whether they have changed since."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from knative.local.errors import PlatformError

MOST_FILES = 10_000  # of a directory, that are looked at


@dataclass(frozen=True)
class Seed:
    """A directory to be put into the object store before the first request."""

    directory: Path
    uri: str

    @property
    def place(self) -> str:
        """What the path of each of its objects begins with."""
        return _place(self.uri)

    @classmethod
    def parse(cls, text: str) -> "Seed":
        """From `DIR=s3://bucket/prefix`. Raises PlatformError."""
        directory, separator, uri = text.rpartition("=")
        if not separator or not re.match("s3://[^/]", uri):
            raise PlatformError(f"--seed {text!r}: must be DIR=s3://bucket/prefix")
        if not Path(directory).is_dir():
            raise PlatformError(f"--seed {text!r}: there is no directory {directory!r}")
        return cls(Path(directory), uri)

    def stamp(self) -> str:
        """Something that is different once a file in it was written, added or removed."""
        files = sorted(islice(self.directory.rglob("*"), MOST_FILES))
        found = hashlib.sha256()
        for file in files:
            try:
                about = file.stat()
            except OSError:
                continue  # it goes just now
            if file.is_file():
                found.update(repr((str(file), about.st_mtime_ns, about.st_size, about.st_ino)).encode())
        return found.hexdigest()


class Seeds:
    """All of them."""

    def __init__(self, seeds: Sequence[Seed] = ()) -> None:
        self.all = list(seeds)
        self._pinned: dict[tuple[str, str], str] = {}  # by place and stamp

    def of(self, uri: str) -> Seed | None:
        """The one that the weights at `uri` come from."""
        place = _place(uri)
        return next((seed for seed in self.all if place.startswith(seed.place)), None)

    def stamp(self, uri: str) -> str:
        """Which weights are in the directory for `uri` now; nothing if there is none."""
        return seed.stamp() if (seed := self.of(uri)) else ""

    def stamps(self) -> list[str]:
        """That of each directory, as it is now."""
        return [seed.stamp() for seed in self.all]

    def pin(self, seed: Seed, stamp: str, pinned: str) -> None:
        """Whoever starts with the weights of this stamp is to have these, whatever else a cache holds of the place.

        pinned: a snapshot (`s3://…#…`), or another place (`s3://…/`).
        """
        self._pinned[seed.place, stamp] = pinned

    def pinned(self, uri: str, stamp: str) -> str:
        """What a pod is told in place of `uri`, whose weights have this stamp."""
        place, seed = _place(uri), self.of(uri)
        pinned = self._pinned.get((seed.place, stamp)) if seed else None
        if not seed or not pinned or (place != seed.place and "#" in pinned):  # a snapshot is that of the whole place
            return uri
        return pinned if "#" in pinned else (pinned + place.removeprefix(seed.place)).rstrip("/")


def _place(uri: str) -> str:
    return uri.partition("#")[0].removeprefix("s3://").rstrip("/") + "/"
