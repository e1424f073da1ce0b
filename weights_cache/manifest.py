"""`relight-manifest.json`: what `push` says of the files it uploaded, written last, so that a pull can tell one version from another.

    {"relight": 1, "chunk_bytes": 1048576, "digest": "crc64nvme",
     "files": {path: {"size", "etag", "sha256", "chunks": 16 hex digits for each chunk, one after the other}}}

It is an object like the others, and the snapshot it belongs to is exactly the files it names and itself.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_cache.cache import FileRef
from weights_cache.chunks import CHUNK_BYTES, DIGEST_BYTES, count_chunks
from weights_cache.errors import ObjectChanged, StoreError

MANIFEST = "relight-manifest.json"

_VERSION = 1
_ALGORITHM = "crc64nvme"
_MARKS = 64  # quotes and brackets of one entry, and more
MAX_MANIFEST_BYTES = 32 << 20  # of 2 TB of weights


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file. size: in bytes; sha256: of the whole file, hex; chunks: the digest of each chunk."""

    size: int
    etag: str
    sha256: str
    chunks: Sequence[int]


Manifest = Mapping[str, Entry]
"""Entries by path below the prefix."""


def measure(file: Path) -> Entry:
    """Read a local file once: its size and digests, the ETag still to come."""
    from weights_cache.digest import chunk_digest

    sha256, chunks, size = hashlib.sha256(), [], 0
    with file.open("rb", buffering=0) as opened:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while length := _fill(opened.readinto, buffer):
            sha256.update(buffer[:length])
            chunks.append(chunk_digest(buffer[:length]))
            size += length
    return Entry(size, "", sha256.hexdigest(), chunks)


def _fill(readinto: Callable[[memoryview], int | None], buffer: memoryview) -> int:
    """Read until the buffer is full or the file at its end; returns the bytes read."""
    have = 0
    while have < len(buffer) and (got := readinto(buffer[have:])):
        have += got
    return have


def dump(manifest: Manifest) -> bytes:
    """The manifest as the object's bytes."""
    files = {
        path: {
            "size": entry.size,
            "etag": entry.etag,
            "sha256": entry.sha256,
            "chunks": b"".join(digest.to_bytes(DIGEST_BYTES, "big") for digest in entry.chunks).hex(),
        }
        for path, entry in sorted(manifest.items())
    }
    return json.dumps({"relight": _VERSION, "chunk_bytes": CHUNK_BYTES, "digest": _ALGORITHM, "files": files}, indent=1).encode()


def check_size(size: int, where: str) -> None:
    """Raise StoreError, naming `where`, if an object is too large to be read as a manifest."""
    if size > MAX_MANIFEST_BYTES:
        raise StoreError(f"{where} has {size:,} bytes, {MAX_MANIFEST_BYTES:,} are allowed; push the weights again")


def parse(data: bytes, where: str, listed: Iterable[FileRef] | None = None) -> Manifest:
    """The manifest in an object's bytes. Raises StoreError, naming `where`, if it is none that this version understands.

    listed: the objects that it may be about. If it has many more values than a manifest of these it is not looked at: what JSON holds may
    take fifty times the memory of its text.
    """
    try:
        if listed is not None:
            most = _MARKS + sum(_MARKS + 2 * len(file.path) for file in listed)
            if sum(map(data.count, (b'"', b"{", b"["))) > most:
                raise ValueError("it has more in it than these files need")
        document = json.loads(data)
        if (document["relight"], document["chunk_bytes"], document["digest"]) != (_VERSION, CHUNK_BYTES, _ALGORITHM):
            raise StoreError(f"{where} was written by another version of Relight; push the weights again, or use that version")
        if MANIFEST in document["files"]:
            raise ValueError("it names itself")
        return {path: _entry(fields) for path, fields in document["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} is damaged ({type(error).__name__}: {error}); push the weights again") from error


def _entry(fields: Mapping[str, Any]) -> Entry:
    size, digests = fields["size"], bytes.fromhex(fields["chunks"])
    if type(size) is not int or size < 0 or len(digests) != count_chunks(size) * DIGEST_BYTES:
        raise ValueError(f"{size!r} bytes with {len(digests)} bytes of digests")
    if not isinstance(fields["etag"], str) or not re.fullmatch("[0-9a-f]{64}", fields["sha256"]):
        raise ValueError("an etag or sha256 that is none")
    chunks = [int.from_bytes(digests[at : at + DIGEST_BYTES], "big") for at in range(0, len(digests), DIGEST_BYTES)]
    return Entry(size, fields["etag"], fields["sha256"], chunks)


def select(listed: Iterable[FileRef], manifest: Manifest, where: str) -> list[FileRef]:
    """Of the objects that were listed, those of the version that the manifest describes, with the manifest itself.

    Raises ObjectChanged if they are of another: a push is on its way.
    """
    found = {file.path: file for file in listed}
    for path, entry in manifest.items():
        file = found.get(path)
        if not file:
            raise ObjectChanged(f"{where} changed while being read: {MANIFEST} names {path}, which is not there")
        if (file.size, file.etag) != (entry.size, entry.etag):
            raise ObjectChanged(
                f"{where} changed while being read: {path} is version {file.etag} of {file.size} bytes, "
                f"{MANIFEST} describes {entry.etag} of {entry.size}"
            )
    return [found[path] for path in sorted([*manifest, MANIFEST])]
