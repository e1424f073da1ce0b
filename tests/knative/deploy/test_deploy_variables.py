"""What may be said on the command line, and where it goes."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.deploy.agent import MANIFESTS
from knative.deploy.errors import DeployError, VariableError
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import Object, container, containers, get_env, one_service, pod_spec
from knative.deploy.render import pin, render
from knative.deploy.variables import Variables

SNAPSHOT = "0123456789abcdef" * 2


def rendered(*words: str) -> list[Object]:
    return render(Variables.parse(words), Kubectl())


def annotations(objects: list[Object]) -> dict[str, str]:
    found: dict[str, str] = one_service(objects)["spec"]["template"]["metadata"]["annotations"]
    return found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ENV=no/$where", "must be the name of an overlay, or a folder with a kustomization.yaml"),
        ("NAME=Minilm", "must be a label: small letters, digits and -, a letter first, at most 63"),
        ("NAME=1st", "must be a label"),
        (f"NAME={'a' * 64}", "must be a label"),
        ("NAME=relight-function", "is, or begins as, the name of what the functions of a namespace share; choose another"),
        ("NAMESPACE=my_space", "must be a label"),
        ("IMAGE=registry.example.com/Function:1", "must be an image: registry/path:tag, or with @sha256: and 64 hex digits"),
        ("IMAGE=function:1@sha256:beef", "must be an image"),
        ("WEIGHTS_IMAGE=a b", "must be an image"),
        ("WEIGHTS_URI=https://models/minilm", "must be s3://bucket/prefix, s3://bucket/prefix#snapshot with the 32 hex digits of one, or"),
        ("WEIGHTS_URI=s3://models", "must be s3://bucket/prefix"),
        ("WEIGHTS_URI=s3://models/minilm#latest", "must be s3://bucket/prefix"),
        ("MIN_SCALE=-1", "must be a whole number from 0 to 1000000"),
        ("MIN_SCALE=1.5", "must be a whole number from 0 to 1000000"),
        ("MAX_SCALE=many", "must be a whole number from 0 to 1000000"),
        ("TARGET=0", "must be a number from 0.01 to 1000"),
        ("TARGET=nan", "must be a number from 0.01 to 1000"),
        ("TARGET=fast", "must be a number from 0.01 to 1000"),
        ("CONCURRENCY=1001", "must be a whole number from 0 to 1000"),
        ("GPU=17", "must be a whole number from 0 to 16"),
        ("PIN=maybe", "must be true or false"),
        ("TIMEOUT=0", "must be a whole number from 1 to 86400"),
        ("ROUTE=predict", "must begin with /"),
        ("ADDRESS=localhost:8080", "must be http://host:port"),
        ("VARIANT=rocm", "must be cpu or cuda"),
    ],
)
def test_a_bad_value_is_told_with_what_is_allowed(word: str, message: str) -> None:
    with pytest.raises(VariableError, match=re.escape(f"{word}: {message}")):
        Variables.parse([word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MINSCALE=1"], "MINSCALE=1: there is no such variable; did you mean MIN_SCALE?"),
        (["COLOUR=red"], "COLOUR=red: there is no such variable; known are ENV, NAME, "),
        (["API_TOKEN=sk-123456"], "API_TOKEN=…: there is no such variable"),
        (["QUEUE_URL=https://user:geheim@sqs/1/a"], "QUEUE_URL=https://***@sqs/1/a: must be the URL of an SQS queue"),
        (["gpu"], "gpu=: variables are given as NAME=value"),
        (["MIN_SCALE=3", "MAX_SCALE=2"], "MAX_SCALE=2: must be at least MIN_SCALE (3), or 0 for no limit"),
    ],
)
def test_a_word_that_cannot_be_is_told_with_what_could_be(words: list[str], message: str) -> None:
    with pytest.raises(VariableError, match=re.escape(message)):
        Variables.parse(words)


@pytest.mark.parametrize(
    "image",
    [
        "function",
        "function:1.0",
        "registry.example.com:5000/team/relight-function:0.1.0-cuda",
        f"registry.example.com/function@sha256:{'0' * 64}",
        f"registry.example.com/function:1@sha256:{'0' * 64}",
    ],
)
def test_images_of_all_kinds_are_taken(image: str) -> None:
    assert Variables.parse([f"IMAGE={image}"]).image == image


def test_no_value_is_none_and_what_belongs_to_the_makefile_is_its_own() -> None:
    assert Variables.parse(["NAME=", "TORCH=anything", "MIN_SCALE=0", "MAX_SCALE=0", "PIN=no"]) == Variables(
        min_scale=0, max_scale=0, pin=False
    )


def test_each_value_is_where_it_belongs() -> None:
    words = ["NAMESPACE=models", "IMAGE=example/function:2", "WEIGHTS_IMAGE=example/weights:3", f"WEIGHTS_URI=s3://b/m#{SNAPSHOT}"]
    words += ["MIN_SCALE=1", "MAX_SCALE=3", "TARGET=2.5", "CONCURRENCY=4", "GPU=2"]
    objects = rendered(*words)
    service = one_service(objects)
    function, sidecar = (container(service, name) for name in ("function", "weights-cache"))
    assert {item["metadata"]["namespace"] for item in objects} == {"models"}
    assert (function["image"], sidecar["image"]) == ("example/function:2", "example/weights:3")
    assert {get_env(one, "WEIGHTS_URI") for one in (function, sidecar)} == {f"s3://b/m#{SNAPSHOT}"}
    scale = {key.partition("/")[2]: value for key, value in annotations(objects).items() if key.startswith("autoscaling.")}
    assert (scale["min-scale"], scale["max-scale"], scale["target"]) == ("1", "3", "2.5")
    assert pod_spec(service)["containerConcurrency"] == 4
    assert function["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert pod_spec(service)["runtimeClassName"] == "nvidia"  # GPU= brought the component


def test_a_gpu_that_is_not_wanted_in_an_overlay_that_has_one_is_refused() -> None:
    with pytest.raises(VariableError, match="GPU=0: the overlay gpu has the component gpu; choose another with ENV="):
        rendered("ENV=gpu", "GPU=0")


def test_an_overlay_that_there_is_not_is_told_with_the_nearest() -> None:
    with pytest.raises(VariableError, match=re.escape("ENV=gpus: there is no such overlay; did you mean gpu?")):
        rendered("ENV=gpus")
    with pytest.raises(VariableError, match=re.escape("known are default, gpu, keda, local")):
        rendered("ENV=production")


def test_a_name_reaches_all_that_goes_by_it() -> None:
    objects = rendered("ENV=gpu", "NAME=ada", "NAMESPACE=models")
    service = one_service(objects)
    assert service["metadata"]["name"] == "ada"
    assert get_env(container(service, "function"), "FUNCTION_MODEL_NAME") == "ada"
    # The agents prefetch under the function's name, and its pods prefer the nodes with that label.
    (agent,) = [one for one in containers(objects) if one["name"] == "agent"]
    assert get_env(agent, "WEIGHTS_PREFETCH") == "ada=s3://models/minilm"
    (term,) = pod_spec(service)["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["preference"]["matchExpressions"] == [{"key": "weights.relight/ada", "operator": "Exists"}]
    paths = {volume["hostPath"]["path"] for item in objects if "template" in item.get("spec", {}) for volume in _on_node(item)}
    assert paths == {"/var/cache/relight/models"}


def test_weights_that_stay_on_a_gpu_are_wanted_by_the_function_and_bounded_by_the_agent(tmp_path: Path) -> None:
    objects = rendered(overlay(tmp_path, "gpu", "node-cache-agent", "gpu-resident"))
    function, agent = (next(one for one in containers(objects) if one["name"] == name) for name in ("function", "agent"))
    assert get_env(function, "WEIGHTS_RESIDENT") == "true"
    assert int(get_env(agent, "WEIGHTS_RESIDENT_BYTES") or 0) > 0
    assert "nvidia.com/gpu" not in agent["resources"]["limits"]  # it keeps descriptors, and needs no GPU


def _on_node(item: Object) -> list[Object]:
    return [volume for volume in pod_spec(item).get("volumes", []) if "hostPath" in volume]


def test_weights_are_pinned_in_the_function_its_sidecar_and_what_is_prefetched() -> None:
    objects = rendered("ENV=gpu", "NAME=ada")
    pin(objects, one_service(objects), f"s3://models/minilm#{SNAPSHOT}")
    assert {get_env(one, "WEIGHTS_URI") for one in pod_spec(one_service(objects))["containers"]} == {f"s3://models/minilm#{SNAPSHOT}"}
    (agent,) = [one for one in containers(objects) if one["name"] == "agent"]
    assert get_env(agent, "WEIGHTS_PREFETCH") == f"ada=s3://models/minilm#{SNAPSHOT}"


# Folders of one's own


def overlay(folder: Path, *components: str, **fields: Any) -> str:
    """A folder with a kustomization on top of the base."""
    here = folder.resolve()
    document = {
        "resources": [os.path.relpath(MANIFESTS / "base", here)],
        "components": [os.path.relpath(MANIFESTS / "components" / name, here) for name in components],
        **fields,
    }
    (here / "kustomization.yaml").write_text(yaml.safe_dump(document))
    return f"ENV={here}"


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            ["node-cache-pvc", "node-cache-agent"],
            "components node-cache-pvc and node-cache-agent exclude each other: at most one cache",
        ),
        (["realtime", "batch"], "the components realtime and batch exclude each other: at most one placement"),
        (["prefetch"], "the component prefetch needs node-cache-agent and gpu too"),
        (["node-cache-agent", "prefetch"], "the component prefetch needs gpu too"),
        (["gpu", "gpu-resident"], "the component gpu-resident needs node-cache-agent too"),
    ],
)
def test_components_that_do_not_go_together_are_named(tmp_path: Path, components: list[str], message: str) -> None:
    with pytest.raises(DeployError, match=re.escape(message)):
        rendered(overlay(tmp_path, *components))


def test_knatives_hpa_keeps_a_pod(tmp_path: Path) -> None:
    env = overlay(tmp_path, "hpa")
    assert annotations(rendered(env))["autoscaling.knative.dev/min-scale"] == "1"
    with pytest.raises(DeployError, match="MIN_SCALE=0: with the component hpa there is at least one pod"):
        rendered(env, "MIN_SCALE=0")


def patched(operation: str) -> dict[str, Any]:
    """A patch of the Service."""
    return {"target": {"group": "serving.knative.dev", "kind": "Service"}, "patch": f"- {operation}"}


def test_an_annotation_in_the_wrong_place_is_told_where_it_belongs(tmp_path: Path) -> None:
    patch = "{op: add, path: /metadata/annotations/autoscaling.knative.dev~1min-scale, value: '1'}"
    with pytest.raises(DeployError, match=re.escape("autoscaling.knative.dev/min-scale: belongs under spec.template.metadata.annotations")):
        rendered(overlay(tmp_path, patches=[patched(patch)]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("min-sclae", "1", "autoscaling.knative.dev/min-sclae"),
        ("target", "0", "autoscaling.knative.dev/target"),
        ("window", "5", "autoscaling.knative.dev/window"),
    ],
)
def test_a_scale_annotation_that_knative_ignores_or_refuses_stops_here(tmp_path: Path, name: str, value: str, message: str) -> None:
    path = f"/spec/template/metadata/annotations/autoscaling.knative.dev~1{name}"
    with pytest.raises(DeployError, match=f"Service minilm: .*{re.escape(message)}"):
        rendered(overlay(tmp_path, patches=[patched(f"{{op: add, path: {path}, value: '{value}'}}")]))


def test_a_folder_that_is_no_yaml_or_does_not_render_is_named(tmp_path: Path) -> None:
    env = overlay(tmp_path, patches=[patched("{op: remove, path: /spec/nothing}")])
    with pytest.raises(DeployError, match=re.escape(f"{tmp_path.resolve()} does not render: ")):
        rendered(env)
    (tmp_path / "kustomization.yaml").write_text("resources: [")
    with pytest.raises(DeployError, match=r"kustomization\.yaml: not YAML: "):
        rendered(env)


def test_an_overlay_without_a_knative_service_says_what_it_cannot_take() -> None:
    with pytest.raises(DeployError, match="NAME, MIN_SCALE: the overlay keda has no Knative Service; edit its files instead"):
        rendered("ENV=keda", "MIN_SCALE=1", "NAME=ada")
