"""Which containers other machines can reach, though their manifests do not say so: told once, as nothing here can close another's port."""

import asyncio
from collections.abc import Callable

from knative.local import procfs
from knative.local.launch import HOSTS, LOOPBACK, Process
from knative.local.pod import Pod
from knative.local.procfs import MARK
from knative.local.tasks import Tasks, describe

PATIENCE_S = 1.0  # after a pod is ready: first it is called, and then looked at


class Exposure:
    """Looks where the containers of each workload listen, when its first pod is ready."""

    def __init__(self, tell: Callable[[str, str], object]) -> None:
        """tell: with the workload's name, and what a person is to know."""
        self._tell = tell
        self._looked: set[str] = set()
        self._tasks = Tasks(lambda what, error: tell("pods", describe(what, error)))

    def watch(self, workload: str, then: Callable[[Pod], object]) -> Callable[[Pod], object]:
        """What a pod of the workload is to call when it changes, so that it is looked at; `then` is what else is called."""

        def changed(pod: Pod) -> None:
            then(pod)
            if pod.phase == "ready" and workload not in self._looked:
                self._looked.add(workload)
                self._tasks.start(self._look(workload, pod), f"the look at where {pod.name} listens")

        return changed

    async def stop(self) -> None:
        """Look no more."""
        await self._tasks.stop()

    async def _look(self, workload: str, pod: Pod) -> None:
        await asyncio.sleep(PATIENCE_S)
        for process in pod.plan.processes:
            if text := await asyncio.to_thread(exposed, process):
                self._tell(workload, text)


def exposed(process: Process) -> str | None:
    """What a person is to be told if other machines can reach a container. Reads /proc, so not in the loop."""
    if any(process.env.get(name, LOOPBACK) != LOOPBACK for name in HOSTS):
        return None  # as its manifest says
    if not (places := procfs.exposed(procfs.marked(process.env[MARK]))):
        return None
    return (
        f"{process.container} listens at {', '.join(places)}, where other machines can reach it; "
        f"have its command say --host {LOOPBACK}, or however its server is told so"
    )
