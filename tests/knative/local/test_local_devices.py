"""Who gets a GPU, who waits for one, and who gives one up."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from knative.local.devices import Devices, found
from knative.local.errors import PlatformError
from tests.knative.local.running import Platform, command, manifests, platform_running, service
from tests.support import clean_environment, free_port, wait_until


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    """A machine with two GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "visible", "names"),
    [
        pytest.param(None, None, ("0", "1"), id="those that the driver shows"),
        pytest.param(None, "1", ("1",), id="the one that we may use"),
        pytest.param(None, "1, 0", ("1", "0"), id="in our environment's order"),
        pytest.param(None, "GPU-5ebe9f43", ("GPU-5ebe9f43",), id="by name"),
        pytest.param(None, "0,7,1", ("0",), id="nothing after one that is not there, as in CUDA"),
        pytest.param(None, "-1", (), id="none that we may use"),
        pytest.param(None, "", (), id="an empty list"),
        pytest.param(3, None, ("0", "1", "2"), id="as many as somebody says"),
        pytest.param(1, "4,5", ("4",), id="the first of those that we may use"),
        pytest.param(0, None, (), id="none at all"),
    ],
)
def test_the_machines_devices_are_found(dev: Path, wanted: int | None, visible: str | None, names: tuple[str, ...]) -> None:
    assert found(wanted, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, dev) == names


def test_more_than_our_environment_lets_us_use_is_a_mistake(dev: Path) -> None:
    with pytest.raises(PlatformError, match=r"--gpus 2: CUDA_VISIBLE_DEVICES is '0', which are only 1"):
        found(2, {"CUDA_VISIBLE_DEVICES": "0"}, dev)


class Scene:
    """Some devices, and who has got which."""

    def __init__(self, names: str) -> None:
        self.asked: list[tuple[int, str]] = []
        self.devices = Devices(tuple(names), lambda missing, claimant: self.asked.append((missing, claimant)))
        self.has: dict[str, str] = {}
        self.urgent: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def ask(self, holder: str, count: int = 1, *, urgent: bool = True) -> None:
        if urgent:
            self.urgent.add(holder)
        self._tasks.append(asyncio.create_task(self._take(holder, count)))
        await settle()

    async def _take(self, holder: str, count: int) -> None:
        self.has[holder] = "".join(await self.devices.take(holder, count, lambda: holder in self.urgent))

    async def give_back(self, holder: str) -> None:
        self.devices.give_back(holder)
        self.has.pop(holder, None)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def play(names: str, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        await scene(Scene(names))

    asyncio.run(main())


def test_devices_are_handed_out_whole_and_come_back() -> None:
    async def scene(stage: Scene) -> None:
        await stage.ask("a", 2)
        await stage.ask("b")
        assert stage.has == {"a": "01", "b": "2"}
        await stage.give_back("a")
        await stage.ask("c")
        assert stage.has == {"b": "2", "c": "0"}
        assert stage.devices.status() == [{"name": "0", "holder": "c"}, {"name": "1", "holder": None}, {"name": "2", "holder": "b"}]

    play("012", scene)


def test_who_comes_first_is_served_first() -> None:
    async def scene(stage: Scene) -> None:
        for holder in "abc":
            await stage.ask(holder)
        assert stage.has == {"a": "0"}
        assert stage.devices.reason("b") == "waits for 1 GPU; a holds it"
        await stage.give_back("a")
        assert stage.has == {"b": "0"}
        await stage.give_back("b")
        assert stage.has == {"c": "0"}

    play("0", scene)


def test_nobody_overtakes_one_that_needs_more_than_is_free() -> None:
    async def scene(stage: Scene) -> None:
        await stage.ask("a")
        await stage.ask("large", 2)
        await stage.ask("small")
        assert stage.has == {"a": "0"}
        assert stage.devices.reason("large") == "waits for 2 GPUs; a holds them"
        await stage.give_back("a")
        assert stage.has == {"large": "01"}

    play("01", scene)


def test_who_waits_urgently_makes_others_give_theirs_up_and_goes_before_who_does_not() -> None:
    async def scene(stage: Scene) -> None:
        await stage.ask("a")
        await stage.ask("more", urgent=False)
        assert stage.asked == []
        await stage.ask("b")
        assert stage.asked == [(1, "b")]
        await stage.give_back("a")
        assert stage.has == {"b": "0"}
        await stage.give_back("b")
        assert stage.has == {"more": "0"}

    play("0", scene)


def test_a_need_that_becomes_urgent_is_noticed_when_it_is_looked_at_again() -> None:
    async def scene(stage: Scene) -> None:
        await stage.ask("a")
        await stage.ask("b", urgent=False)
        stage.urgent.add("b")
        stage.devices.look()
        assert stage.asked == [(1, "b")]

    play("0", scene)


def test_who_does_not_wait_any_more_gets_none() -> None:
    async def scene(stage: Scene) -> None:
        await stage.ask("a")
        await stage.ask("b")
        await stage.ask("c")
        await stage.give_back("b")  # a pod that is let go while it is pending
        stage._tasks[2].cancel()
        await settle()
        await stage.give_back("a")
        assert stage.has == {"b": ""}
        assert stage.devices.status() == [{"name": "0", "holder": None}]

    play("0", scene)


def with_gpus(name: str, count: int = 1, **more: object) -> dict[str, object]:
    return service(name, container={"resources": {"limits": {"nvidia.com/gpu": count}}}, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    services = [
        with_gpus("a"),
        with_gpus("b"),
        with_gpus("hasty", spec={"timeoutSeconds": 2}, progress_deadline="1s"),
        service("free"),
    ]
    with platform_running(tmp_path_factory.mktemp("gpus"), services, "--gpus", "1", CUDA_VISIBLE_DEVICES="4") as running:
        yield running


def visible(platform: Platform, name: str) -> str | None:
    reply = platform.call(name, "/environment")
    assert reply.status == 200, reply.body
    found: str | None = reply.json()["env"].get("CUDA_VISIBLE_DEVICES")
    return found


def test_two_functions_take_turns_with_one_device(platform: Platform) -> None:
    for name in ("a", "b", "a", "b"):
        assert visible(platform, name) == "4"
        (device,) = platform.status()["gpus"]
        assert device["holder"].startswith(f"{name}-00001-")
    said = platform.server.said()
    assert "is idle and gives its GPU up, which another function needs" in said
    # The one that gave its device up is not wanted back before somebody calls, though its window is an hour.
    platform.wait_for("a", "no pods", lambda found: not found["pods"])
    assert platform.service("a")["state"] == "zero"


def test_a_pod_without_a_limit_needs_no_device(platform: Platform) -> None:
    assert visible(platform, "a") is not None
    assert platform.call("free").status == 200
    assert platform.status()["gpus"][0]["holder"].startswith("a-00001-")


def test_a_busy_function_keeps_its_device_and_the_next_one_waits_as_long_as_it_is_busy(platform: Platform) -> None:
    with platform.calls("a", 1, "/wait/done") as (busy,):
        platform.wait_for("a", "busy", lambda found: found["pods"] and found["pods"][0]["concurrency"])
        holder = platform.pods("a")[0]["name"]
        with platform.calls("b", 1) as (waiting,):
            found = platform.wait_for("b", "pending", lambda found: found["pods"] and found["pods"][0].get("waits_for"))
            (pod,) = found["pods"]
            assert (pod["phase"], pod["waits_for"]) == ("pending", f"waits for 1 GPU; {holder} holds it")
            assert f"{pod['name']} waits for 1 GPU; {holder} holds it" in platform.server.said().replace("\n", " ")
            # Pending for longer than its timeoutSeconds and its progress deadline, which is not counted meanwhile.
            reply = platform.call("hasty")
            assert (reply.status, reply.json()["error"]["type"]) == (504, "timed_out")
            assert f"waits for 1 GPU; {holder} holds it" in reply.json()["error"]["message"]
            assert platform.service("hasty")["failure"] is None
            assert not busy.done()
            assert not waiting.done()
            platform.note("a", "done")
            assert waiting.result().status == 200
        assert busy.result().status == 200


def test_a_pod_that_min_scale_promises_keeps_its_device(tmp_path: Path) -> None:
    services = [with_gpus("a", scale={"min-scale": "1"}), with_gpus("b", spec={"timeoutSeconds": 2})]
    with platform_running(tmp_path, services, "--gpus", "1") as platform:
        found = platform.wait_for("a", "ready", lambda found: found["state"] == "ready")
        reply = platform.call("b")
        assert reply.status == 504
        assert f"{found['pods'][0]['name']} holds it" in reply.json()["error"]["message"]
        assert [pod["name"] for pod in platform.pods("a")] == [found["pods"][0]["name"]]


def test_a_new_revision_gets_the_device_of_the_old_one_when_that_is_idle(tmp_path: Path) -> None:
    scale = {"initial-scale": "1"}
    with platform_running(tmp_path, [with_gpus("a", scale=scale)], "--gpus", "1") as platform:
        assert visible(platform, "a") == "0"
        platform.rewrite(with_gpus("a", scale=scale, env={"VERSION": "2"}))
        platform.wait_for("a", "the new one", lambda found: found["revision"] == "a-00002" and not found["rollout"])
        assert visible(platform, "a") == "0"
        assert platform.status()["gpus"][0]["holder"].startswith("a-00002-")


def test_devices_are_counted_when_the_manifests_are_read_again(tmp_path: Path) -> None:
    with platform_running(tmp_path, [with_gpus("a")], "--gpus", "1") as platform:
        platform.rewrite(with_gpus("a", 2))
        problem = wait_until("its problem", lambda: platform.status()["manifests"]["problem"])
        assert "a pod needs 2, this machine has 1" in problem
        assert visible(platform, "a") == "0"


def test_two_devices_serve_two_functions_at_once(tmp_path: Path) -> None:
    with platform_running(tmp_path, [with_gpus("a"), with_gpus("b")], "--gpus", "2", CUDA_VISIBLE_DEVICES="3,5") as platform:
        assert {visible(platform, "a"), visible(platform, "b")} == {"3", "5"}
        wait_until("both ready", lambda: [platform.service(name)["state"] for name in "ab"] == ["ready", "ready"])


def test_more_devices_than_there_are_is_a_mistake_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifests.yaml").write_text(manifests(with_gpus("large", 2)))
    ended = subprocess.run(
        command(tmp_path, free_port(), free_port(), "--gpus", "1"), env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    where = "document 1 (Service large): spec.template.spec.containers[0].resources.limits.nvidia.com/gpu"
    assert f"{where}: a pod needs 2, this machine has 1; --gpus says how many there are" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
