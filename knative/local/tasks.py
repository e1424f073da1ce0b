"""The tasks of one owner: none is lost while it runs, none outlives its owner, and the owner is told of what goes wrong in one."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """Starts tasks and keeps them. Used in one event loop."""

    def __init__(self, failed: Callable[[str, Exception], object]) -> None:
        """failed: told the name of a task that ended with an exception, and the exception; not of one that was cancelled."""
        self._failed = failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_stopped = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Have something done. name: what is done, in words for a person who is told that it failed. After `stop` it is not begun."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._is_stopped:
            task.cancel()
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failed(task.get_name(), error)

    async def stop(self) -> None:
        """Cancel what is still being done, and return once all of it has ended; but for whoever calls this from one of the tasks."""
        self._is_stopped = True
        while rest := self._tasks - {asyncio.current_task()}:
            for task in rest:
                task.cancel()
            await asyncio.wait(rest)


def describe(what: str, error: Exception) -> str:
    """One line about a task that failed, for a person: an error without words is named by its type."""
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{what} failed: {said}"
