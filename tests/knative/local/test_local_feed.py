"""Who watches gets the latest document; nobody watching costs nothing."""

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from knative.local import feed
from knative.local.feed import Feed


class Counted:
    """A document that says how often it was made, and changes when it is told."""

    def __init__(self) -> None:
        self.made = 0
        self.services: list[int] = []

    def __call__(self) -> dict[str, Any]:
        self.made += 1
        return {"now": self.made, "services": list(self.services)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "LOOK_S", 0.001)
    monkeypatch.setattr(feed, "STEADY_S", 3600.0)  # nothing is sent again only because a machine was slow


def test_nothing_is_made_before_anybody_listens_nor_after_the_last_has_gone() -> None:
    async def scenario() -> None:
        document = Counted()
        source = Feed(document)
        await asyncio.sleep(0.01)
        assert document.made == 0
        async with aclosing(source.listen()) as texts:
            assert json.loads(await anext(texts))["services"] == []
        made = document.made
        await asyncio.sleep(0.02)
        assert (document.made, source.listeners) == (made, 0)

    asyncio.run(scenario())


def test_all_listeners_share_one_document_and_get_each_change() -> None:
    async def scenario() -> None:
        document = Counted()
        source = Feed(document)
        async with aclosing(source.listen()) as one, aclosing(source.listen()) as two:
            assert await anext(one) == await anext(two)
            document.services.append(7)
            assert json.loads(await anext(one))["services"] == [7]
            assert json.loads(await anext(two))["services"] == [7]

    asyncio.run(scenario())


def test_one_that_comes_back_gets_nothing_old() -> None:
    async def scenario() -> None:
        document = Counted()
        source = Feed(document)
        async with aclosing(source.listen()) as texts:
            await anext(texts)
        document.services.append(1)
        async with aclosing(source.listen()) as texts:
            assert json.loads(await anext(texts))["services"] == [1]

    asyncio.run(scenario())


def test_a_document_that_stays_the_same_is_sent_again_after_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        document = Counted()
        source = Feed(document)
        async with aclosing(source.listen()) as texts:
            first = json.loads(await anext(texts))
            again = asyncio.ensure_future(anext(texts))
            while document.made < 20:
                await asyncio.sleep(0.001)
            assert not again.done()
            monkeypatch.setattr(feed, "STEADY_S", 0.0)  # it has passed
            second = json.loads(await asyncio.wait_for(again, 60))
            assert second["now"] >= 20 > first["now"]
            assert second["services"] == first["services"]

    asyncio.run(scenario())


def test_a_feed_that_is_closed_sends_everybody_home() -> None:
    async def scenario() -> None:
        source = Feed(Counted())
        async with aclosing(source.listen()) as texts:
            await anext(texts)
            waiting = asyncio.create_task(anext(texts, None))
            await asyncio.sleep(0)
            await source.close()
            assert await asyncio.wait_for(waiting, 60) is None

    asyncio.run(scenario())


def test_a_document_that_cannot_be_made_ends_those_who_listen_and_is_made_again_for_the_next() -> None:
    async def scenario() -> None:
        document = Counted()
        broken = True

        def make() -> dict[str, Any]:
            if broken:
                raise ValueError("no document")
            return document()

        source = Feed(make)

        async def first() -> str:
            async with aclosing(source.listen()) as texts:
                return await anext(texts)

        async with asyncio.timeout(60):
            failed = await asyncio.gather(first(), first(), return_exceptions=True)
            assert [type(failure) for failure in failed] == [RuntimeError, RuntimeError]
            broken = False
            assert json.loads(await first())["services"] == []
            await source.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
