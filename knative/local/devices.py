"""The machine's GPUs: whole devices, each a pod's own while it is there.

A pod that asks for some waits until they are free, first come, first served. Who waits urgently, because callers do, makes idle pods of
other functions give theirs up; who would only be one pod more waits behind all of those.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knative.local.errors import ManifestError, PlatformError
from knative.local.manifest import Manifests
from knative.local.schema import GPU

VISIBLE = "CUDA_VISIBLE_DEVICES"  # what a process may use, by number or name


def found(wanted: int | None, environ: Mapping[str, str], folder: Path = Path("/dev")) -> tuple[str, ...]:
    """The devices there are, as CUDA names them: those that the driver shows and that our own environment lets us use.

    wanted: how many somebody has said that there are. Raises PlatformError if our environment lets us use fewer.
    """
    count = len([path for path in folder.glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]) if wanted is None else wanted
    allowed = environ.get(VISIBLE)
    if allowed is None:
        return tuple(str(number) for number in range(count))
    names = []
    for name in (name.strip() for name in allowed.split(",")):
        if not name or name.startswith("-") or (wanted is None and name.isdigit() and int(name) >= count):
            break  # as CUDA does: what follows an invalid one is not there
        names.append(name)
    if wanted is not None and len(names) < wanted:
        raise PlatformError(f"--gpus {wanted}: {VISIBLE} is {allowed!r}, which are only {len(names)}; change one of them")
    return tuple(names[:wanted])


def check(manifests: Manifests, devices: Sequence[str]) -> None:
    """Raises ManifestError for what could never run, as it asks for more devices than there are."""
    for service in manifests.workloads:
        containers = service.spec.containers
        if (wanted := sum(container.resources.gpus for container in containers)) > len(devices):
            index = max(range(len(containers)), key=lambda index: containers[index].resources.gpus)
            raise ManifestError(
                service.file,
                f"{service.where}: spec.template.spec.containers[{index}].resources.limits.{GPU}",
                f"a pod needs {wanted}, this machine has {len(devices) or 'none'}; --gpus says how many there are, if that is wrong",
            )


@dataclass(eq=False)
class Claim:
    """A pod's wish for devices, and what it has got."""

    holder: str
    count: int
    is_urgent: Callable[[], bool]
    granted: asyncio.Future[None]
    devices: tuple[str, ...] = ()


class Devices:
    """Hands devices out. `make_room` is called while somebody waits urgently, with how many more are to be given up and for whom."""

    def __init__(self, names: Sequence[str], make_room: Callable[[int, str], object] = lambda missing, claimant: None) -> None:
        self.names = tuple(names)
        self._make_room = make_room
        self._free = list(names)
        self._held: list[Claim] = []
        self._waiting: list[Claim] = []

    async def take(self, holder: str, count: int, is_urgent: Callable[[], bool] = lambda: True) -> tuple[str, ...]:
        """So many devices, once they are free; none if the claim is dropped meanwhile (`give_back`)."""
        claim = Claim(holder, count, is_urgent, asyncio.get_running_loop().create_future())
        self._waiting.append(claim)
        self.look()
        try:
            await claim.granted
        except asyncio.CancelledError:
            self.give_back(holder)
            raise
        return claim.devices

    def give_back(self, holder: str) -> None:
        """It needs none any more, whether it has some or waits."""
        for claim in [claim for claim in self._held if claim.holder == holder]:
            self._held.remove(claim)
            self._free += claim.devices
            self._free.sort(key=self.names.index)
        for claim in [claim for claim in self._waiting if claim.holder == holder]:
            self._waiting.remove(claim)
            if not claim.granted.done():
                claim.granted.set_result(None)
        self.look()

    def look(self) -> None:
        """See who can be served; to be called whenever a pod has become idle, or somebody begins to wait for one."""
        urgent = [claim for claim in self._waiting if claim.is_urgent()]
        for claim in urgent:
            if not self._serve(claim):
                # Nobody overtakes: the others wait behind this one, even if there were enough for them.
                self._make_room(claim.count - len(self._free), claim.holder)
                return
        for claim in [claim for claim in self._waiting if claim not in urgent]:
            if not self._serve(claim):
                return

    def reason(self, holder: str) -> str | None:
        """What a pod waits for, if it does."""
        claim = next((claim for claim in self._waiting if claim.holder == holder), None)
        if claim is None:
            return None
        holders = [held.holder for held in self._held]
        who = (
            f"{', '.join(holders)} hold{'s' * (len(holders) == 1)} {'it' if claim.count == 1 else 'them'}"
            if holders
            else "others are before it"
        )
        return f"waits for {claim.count} GPU{'s' * (claim.count != 1)}; {who}"

    def status(self) -> list[dict[str, str | None]]:
        """Each device with who holds it."""
        holders = {name: claim.holder for claim in self._held for name in claim.devices}
        return [{"name": name, "holder": holders.get(name)} for name in self.names]

    def _serve(self, claim: Claim) -> bool:
        if claim.count > len(self._free):
            return False
        claim.devices, self._free = tuple(self._free[: claim.count]), self._free[claim.count :]
        self._waiting.remove(claim)
        self._held.append(claim)
        claim.granted.set_result(None)
        return True
