"""Logs of pods by their names, and nothing else on the disk."""

import asyncio
import os
from contextlib import aclosing
from pathlib import Path

import pytest

from knative.local.logs import Logs


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    file = tmp_path / "logs" / "default" / "hello-00001-abc123" / "function.log"
    file.parent.mkdir(parents=True)
    file.write_text("one\ntwo\nthree\n")
    (tmp_path / "logs" / "object-store.log").write_text("not a pod's")
    (tmp_path / "secret.log").write_text("secret")
    (tmp_path / "logs" / "default" / "hello-00001-abc123" / "link.log").symlink_to(tmp_path / "secret.log")
    return Logs(tmp_path / "logs")


def test_a_log_is_found_by_its_names(logs: Logs) -> None:
    assert logs.find("default", "hello-00001-abc123", "function")
    assert {(log["namespace"], log["pod"]) for log in logs.list()} == {("default", "hello-00001-abc123")}


@pytest.mark.parametrize(
    ("namespace", "pod", "container"),
    [
        ("..", ".", "secret"),
        ("default", "..", "object-store"),
        ("default", "hello-00001-abc123", "../../../secret"),
        ("default", "hello-00001-abc123", "link"),
        ("default/hello-00001-abc123", ".", "function"),
        ("", "default/hello-00001-abc123", "function"),
        ("default", "hello-00001-abc123", "function\0"),
        ("default", "hello-00001-abc123", "sidecar"),
    ],
)
def test_nothing_else_is_found(logs: Logs, namespace: str, pod: str, container: str) -> None:
    assert logs.find(namespace, pod, container) is None


@pytest.mark.parametrize(("lines", "expected"), [(0, b""), (1, b"three\n"), (2, b"two\nthree\n"), (99, b"one\ntwo\nthree\n")])
def test_the_last_lines_are_read(logs: Logs, lines: int, expected: bytes) -> None:
    async def scenario() -> bytes:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        return b"".join([piece async for piece in logs.read(path, lines)])

    assert asyncio.run(scenario()) == expected


def read(logs: Logs, lines: int) -> bytes:
    async def scenario() -> bytes:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        return b"".join([piece async for piece in logs.read(path, lines)])

    return asyncio.run(scenario())


def test_a_bar_that_shows_progress_is_one_line_and_a_long_line_is_whole(logs: Logs) -> None:
    path = logs.find("default", "hello-00001-abc123", "function")
    assert path
    bar = b"\r".join(b"%d %%" % number for number in range(101)) + b"\n"
    path.write_bytes(b"before\n" + bar + b"y" * 100_000 + b"\nno end")
    assert read(logs, 1) == b"no end"
    assert read(logs, 2) == b"y" * 100_000 + b"\nno end"
    assert read(logs, 3) == bar + b"y" * 100_000 + b"\nno end"
    path.write_bytes(b"\n\n\n")
    assert read(logs, 2) == b"\n\n"


def test_what_is_no_file_is_not_listed_and_hinders_nothing(logs: Logs) -> None:
    path = logs.find("default", "hello-00001-abc123", "function")
    assert path
    path.with_name("gone.log").symlink_to("/nowhere/at/all")
    os.mkfifo(path.with_name("pipe.log"))
    path.with_name("folder.log").mkdir()
    assert [log["container"] for log in logs.list()] == ["function"]


def test_following_a_log_ends_when_it_is_told_to(logs: Logs) -> None:
    async def scenario() -> None:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        enough = asyncio.Event()
        async with aclosing(logs.read(path, 1, enough)) as pieces:
            assert await anext(pieces) == b"three\n"
            enough.set()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(anext(pieces), 60)

    asyncio.run(scenario())


def test_a_log_that_is_removed_while_it_is_followed_ends(logs: Logs) -> None:
    async def scenario() -> None:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        async with aclosing(logs.read(path, 1, asyncio.Event())) as pieces:
            assert await anext(pieces) == b"three\n"
            path.unlink()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(anext(pieces), 60)

    asyncio.run(scenario())


def test_a_log_that_is_followed_goes_on_with_what_is_added(logs: Logs) -> None:
    async def scenario() -> None:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        async with aclosing(logs.read(path, 1, asyncio.Event())) as pieces:
            assert await anext(pieces) == b"three\n"
            with path.open("a") as file:
                file.write("four\n")
            assert await asyncio.wait_for(anext(pieces), 60) == b"four\n"

    asyncio.run(scenario())


def test_a_log_that_is_followed_goes_on_from_its_beginning_when_it_was_put_aside(logs: Logs) -> None:
    async def scenario() -> None:
        path = logs.find("default", "hello-00001-abc123", "function")
        assert path
        async with aclosing(logs.read(path, 1, asyncio.Event())) as pieces:
            assert await anext(pieces) == b"three\n"
            path.write_text("new\n")
            assert await asyncio.wait_for(anext(pieces), 60) == b"new\n"

    asyncio.run(scenario())
