import asyncio

from knative.local.tasks import Tasks, describe


def test_tasks_owner_is_told_of_an_exception() -> None:
    async def scenario() -> None:
        told = []
        tasks = Tasks(lambda name, error: told.append((name, str(error))))

        async def fail() -> None:
            raise ValueError("no")

        tasks.start(fail(), "the look")
        while len(tasks):
            await asyncio.sleep(0)
        assert told == [("the look", "no")]

    asyncio.run(scenario())


def test_tasks_owner_is_not_told_of_an_end_or_of_its_own_stop() -> None:
    async def scenario() -> None:
        told = []
        tasks = Tasks(lambda name, error: told.append(name))
        tasks.start(asyncio.sleep(0), "short")
        endless = tasks.start(asyncio.sleep(1000), "endless")
        await tasks.stop()
        assert (told, endless.cancelled(), len(tasks)) == ([], True, 0)

    asyncio.run(scenario())


def test_tasks_begin_nothing_after_the_stop() -> None:
    async def scenario() -> None:
        tasks = Tasks(lambda name, error: None)
        begun = []

        async def begin() -> None:
            begun.append(1)

        await tasks.stop()
        late = tasks.start(begin(), "late")
        await asyncio.wait([late])
        assert (begun, late.cancelled()) == ([], True)

    asyncio.run(scenario())


def test_tasks_stop_waits_for_what_a_task_does_at_its_end() -> None:
    async def scenario() -> None:
        tasks = Tasks(lambda name, error: None)
        done = []

        async def tidy() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(0.01)
                done.append(1)

        tasks.start(tidy(), "tidy")
        await asyncio.sleep(0)
        await tasks.stop()
        assert done == [1]

    asyncio.run(scenario())


def test_tasks_can_be_stopped_by_one_of_them() -> None:
    async def scenario() -> None:
        tasks = Tasks(lambda name, error: None)
        ended = tasks.start(tasks.stop(), "the last")
        await asyncio.wait_for(ended, 5)

    asyncio.run(scenario())


def test_describe_names_the_file_of_an_error_and_the_type_of_one_without_words() -> None:
    assert describe("the start of a pod", FileExistsError(17, "File exists", "/v/c")) == "the start of a pod failed: /v/c: File exists"
    assert describe("the beat", KeyError()) == "the beat failed: KeyError"
    assert describe("the beat", ValueError("odd")) == "the beat failed: ValueError: odd"
