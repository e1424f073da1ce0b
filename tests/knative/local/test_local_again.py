"""What is done again and again has an owner that learns of its mistakes, and none of them ends it."""

import asyncio

import pytest

from knative.local import again
from knative.local.again import Again


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "LONGEST_PAUSE_S", 0.005)


async def until(done: asyncio.Event) -> None:
    async with asyncio.timeout(60):
        await done.wait()


def test_a_mistake_is_told_once_and_what_is_done_goes_on() -> None:
    told: list[str] = []

    async def main() -> None:
        times, done = 0, asyncio.Event()

        async def do() -> None:
            nonlocal times
            times += 1
            if times < 5:
                raise ValueError("no such number")
            done.set()

        looking = Again("the look", do, 0.001, told.append)
        looking.start()
        looking.start()
        await until(done)
        await asyncio.sleep(0)
        while looking.problem:
            await asyncio.sleep(0.001)
        await looking.stop()
        assert times >= 5

    asyncio.run(main())
    assert told == ["the look failed: ValueError: no such number", "the look works again"]


def test_another_mistake_is_told_too_and_the_present_one_is_known() -> None:
    told: list[str] = []

    async def main() -> None:
        times, done = 0, asyncio.Event()

        async def do() -> None:
            nonlocal times
            times += 1
            if times == 4:
                done.set()
            raise ValueError("one" if times < 3 else "two")

        looking = Again("the look", do, 0.001, told.append)
        looking.start()
        await until(done)
        while len(told) < 2:
            await asyncio.sleep(0.001)
        assert looking.problem == "the look failed: ValueError: two"
        await looking.stop()

    asyncio.run(main())
    assert told == ["the look failed: ValueError: one", "the look failed: ValueError: two"]


def test_the_end_comes_in_the_middle_of_it() -> None:
    async def main() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def do() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        looking = Again("the look", do, 0.001, print)
        looking.start()
        await until(begun)
        await looking.stop()
        assert ended.is_set()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
