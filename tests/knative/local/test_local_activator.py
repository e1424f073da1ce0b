"""The body of a request that waits, without a platform."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import StreamReader
from aiohttp.base_protocol import BaseProtocol

from knative.local import activator
from knative.local.errors import Overloaded


def unread() -> StreamReader:
    loop = asyncio.get_running_loop()
    return StreamReader(BaseProtocol(loop), 65536, loop=loop)


def test_what_came_while_nobody_took_it_comes_first() -> None:
    async def scenario() -> None:
        content = unread()
        body = activator._Body(content)
        for piece in (b"one ", b"two "):
            content.feed_data(piece)
            async with body.read_on():
                await asyncio.sleep(0.01)
        content.feed_data(b"three")
        content.feed_eof()
        assert b"".join([piece async for piece in body]) == b"one two three"
        body.close()

    asyncio.run(scenario())


def test_a_body_that_there_is_no_room_for_is_a_503_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        content = unread()
        content.feed_data(b"some")
        body = activator._Body(content)
        with pytest.raises(Overloaded, match=r"^the body cannot be kept until a pod is ready: No space left on device$"):
            async with body.read_on():
                await asyncio.sleep(0.01)
        body.close()

    with Path("/dev/full").open("w+b", buffering=0) as full:
        monkeypatch.setattr(activator, "TemporaryFile", lambda buffering: full)
        asyncio.run(scenario())
