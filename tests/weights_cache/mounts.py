"""File systems for tests that a command alone sees: a small one, which it can fill, and a read-only view of a folder."""

import functools
import os
import subprocess
from pathlib import Path

import pytest

# In a mount namespace of its own, which ends with it; a user other than root needs a user namespace besides.
_UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
_MEMORY = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def on_small_disk(folder: Path, size: int, command: list[str]) -> list[str]:
    """The command in a mount namespace where `folder` is an empty file system of `size` bytes (whole pages), gone when it ends."""
    return _mounted(_MEMORY, [f"size={size}", str(folder), *command])


def on_large_pages(folder: Path, command: list[str]) -> list[str]:
    """The command in a mount namespace where `folder` is an empty tmpfs that has large pages wherever a file is large enough."""
    return _mounted(_MEMORY, ["huge=always", str(folder), *command])


def on_read_only(folder: Path, command: list[str]) -> list[str]:
    """The command in a mount namespace where nothing below `folder` can be written, not by root either."""
    return _mounted(_READ_ONLY, [str(folder), *command])


def inside(pid: int, path: Path) -> Path:
    """The same path as that process sees it, to look at its disk from here while it runs."""
    return Path(f"/proc/{pid}/root{path.absolute()}")


def _mounted(script: str, arguments: list[str]) -> list[str]:
    if not _can_mount():
        pytest.skip("no mount namespaces here")
    return [*_UNSHARE, "sh", "-c", script, "sh", *arguments]


@functools.cache
def _can_mount() -> bool:
    return subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, check=False).returncode == 0  # noqa: S108
