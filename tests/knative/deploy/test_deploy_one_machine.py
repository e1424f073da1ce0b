"""What a cluster gets runs under `relight run` as it is, but for the model: the echo, which needs no device."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from knative.deploy.agent import MANIFESTS
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import Object, container, one_service, set_env
from knative.deploy.render import NEEDS, render
from knative.deploy.variables import Variables
from tests.knative.deploy.combinations import render_each
from tests.knative.local.running import platform_running

STORE = {"AWS_ENDPOINT_URL": "http://object-store.relight.localhost", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
SECRET: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "weights-store"}, "stringData": STORE}


EACH = [(name,) for name in sorted(path.name for path in (MANIFESTS / "components").iterdir()) if name not in NEEDS]
TOGETHER = {
    "prefetch": ("gpu", "node-cache-agent", "prefetch"),
    "gpu-resident": ("gpu", "node-cache-agent", "gpu-resident"),
    "together": ("gpu", "warm-pool", "rollout-in-place", "monitoring", "node-cache-pvc", "batch", "hpa"),
}


def renderings() -> dict[str, list[Object]]:
    """The base, each component with what it needs, many at once, and the overlays for a cluster."""
    rendered = [one.objects for one in render_each([(), *EACH, *TOGETHER.values()])]
    found = dict(zip(["base", *(name for (name,) in EACH), *TOGETHER], rendered, strict=True))
    return found | {f"overlay-{name}": render(Variables(env=name), Kubectl()) for name in ("default", "gpu")}


def with_echo(objects: list[Object], name: str) -> list[Object]:
    """The same objects, their Service by another name and with another agent."""
    service = one_service(objects)
    service["metadata"]["name"] = name
    set_env(container(service, "function"), "FUNCTION_AGENT", "function.agents.echo:Echo")
    return objects


def test_the_base_each_component_and_the_overlays_answer_on_one_machine(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))

    found = renderings()
    objects = [item for name, rendered in found.items() for item in with_echo(rendered, name)]
    options = ("--seed", f"{weights}=s3://models/minilm", "--gpus", str(len(found)))
    with platform_running(tmp_path / "state", [SECRET, *objects], *options) as platform, ThreadPoolExecutor(2) as threads:

        def ask(name: str) -> object:
            reply = platform.call(name, "/v1/models/minilm:predict", "POST", {"instances": [name]})
            return reply.json() if reply.status == 200 else (reply.status, reply.body)

        assert dict(zip(found, threads.map(ask, found), strict=True)) == {name: {"predictions": [name]} for name in found}
        for name in found:
            platform.wait_for(name, "the sidecar's weights", lambda service: service["pods"] and service["pods"][0]["weights"]["bytes"])
