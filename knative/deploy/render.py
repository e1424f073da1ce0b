"""An overlay and some variables to the objects that a cluster gets."""

import difflib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from knative.autoscaler import ScaleSpec, SpecError
from knative.autoscaler.config import HPA
from knative.autoscaler.spec import ANNOTATION_PREFIX, PROGRESS_DEADLINE
from knative.deploy import agent, flags
from knative.deploy.agent import MANIFESTS
from knative.deploy.errors import DeployError, KubectlError, VariableError
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import IMAGE_VARIABLES, Object, belongs, container, containers, get_env, pod_spec, services, set_env
from knative.deploy.variables import SET, Variables

GROUPS = {  # at most one of each
    "cache": ("node-cache-pvc", "node-cache-agent"),
    "placement": ("realtime", "batch"),
    "source of this name": ("sqs", "sqs-keda", "amqp", "rabbitmq", "integration-source"),
    "owner of the dead letters": ("broker", "kafka"),
}
_FOR_WEIGHTS = ("node-cache-pvc", "node-cache-agent", "prefetch", "gpu-resident")
NEEDS = {"prefetch": ("node-cache-agent", "gpu"), "gpu-resident": ("node-cache-agent", "gpu")}

TELL_FAILURE, TELL_FAILURE_S = "FUNCTION_TELL_FAILURE_S", 10.0
_SCALES = (("initial-scale", "initialScale"), ("max-scale", "maxScale"))
_AGENT = "relight-weights-agent"
_CACHE = Path("/var/cache/relight")
_LABEL = "weights.relight/"
_QUEUE_SOURCES = ("sqs", "sqs-keda")
_NO_QUEUE = ".amazonaws.com/000000000000/"  # in the URL of a queue that is still to be named
_REGION = re.compile(r"https?://(?:sqs\.([a-z0-9-]+)|([a-z0-9-]+)\.queue)\.amazonaws\.com")
_HAVE_SINKS = ("ContainerSource", "SinkBinding", "Trigger", "KafkaSource", "RabbitmqSource", "IntegrationSource")
_OF_THE_CLUSTER = (  # have no namespace
    "ClusterRole",
    "ClusterRoleBinding",
    "PriorityClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
)


def render(variables: Variables, kubectl: Kubectl) -> list[Object]:
    """Every object of the overlay, with the variables put in. Raises DeployError."""
    overlay = _overlay(variables.env)
    named = list(_components(overlay))
    added = [name for name in _wanted(variables) if name not in named]
    if variables.weights_uri == agent.NO_WEIGHTS and (for_weights := [name for name in named + added if name in _FOR_WEIGHTS]):
        raise VariableError("WEIGHTS_URI", agent.NO_WEIGHTS, f"does not go with {', '.join(for_weights)}, which is there for weights")
    if variables.gpu == 0 and "gpu" in named + added:
        raise VariableError("GPU", 0, f"the overlay {variables.env} has the component gpu; choose another with ENV=")
    events = variables.events or ("sqs" if variables.queue_url and not set(_QUEUE_SOURCES) & set(named) else None)
    sources = [events] if events and events not in named else []
    if variables.queue_url and not set(_QUEUE_SOURCES) & {*named, *sources}:
        raise VariableError("QUEUE_URL", variables.queue_url, f"EVENTS={events} has no such queue; its files say where events come from")
    _check(named + added + sources)
    folders = [MANIFESTS / "components" / name for name in added] + [MANIFESTS / "eventing" / name for name in sources]
    objects = _kustomize(kubectl, [overlay], folders)
    _put(variables, objects)
    check_annotations(objects, flags.required(objects))
    return objects


def render_cluster(variables: Variables, kubectl: Kubectl) -> list[Object]:
    """What an administrator applies once for the overlay: just what it needs. Raises DeployError."""
    objects = render(variables, kubectl)
    named = [*_components(_overlay(variables.env)), *_wanted(variables)]
    folders = [MANIFESTS / "cluster" / name for name in dict.fromkeys(named)]
    found = _kustomize(kubectl, [MANIFESTS / "cluster"], [folder for folder in folders if folder.is_dir()])
    for name, settings in flags.missing(flags.required(objects), flags.shipped(found)).items():  # of the overlay's own patches
        _config_map(found, name)["data"] |= settings
    return found


def _wanted(variables: Variables) -> list[str]:
    """The components that are asked for on top of the overlay's, those that change what others bring behind them."""
    known = sorted(path.parent.name for path in (MANIFESTS / "components").glob("*/kustomization.yaml"))
    for name in variables.components or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise VariableError("COMPONENTS", name, f"there is no such component; {hint}")
    wanted = dict.fromkeys([*(variables.components or ()), *(["gpu"] if variables.gpu else [])])
    return sorted(wanted, key=lambda name: name in NEEDS)


def dump(objects: Iterable[Object]) -> str:
    """As YAML documents."""
    return yaml.safe_dump_all(objects, sort_keys=False, width=140)


def check_annotations(objects: Iterable[Object], settings: flags.Config) -> None:
    """Raises DeployError for a scale annotation with a name that Knative ignores or a value that it refuses."""
    for service in services(objects):
        template = service["spec"]["template"]
        annotations = template.get("metadata", {}).get("annotations", {})
        try:
            concurrency = template["spec"].get("containerConcurrency", 0)
            spec = ScaleSpec.parse(annotations, concurrency, settings.get(flags.AUTOSCALER, {}))
        except SpecError as error:
            raise DeployError(f"Service {service['metadata']['name']}: {error}") from error
        if spec.autoscaler_class == HPA and spec.min_scale < 1:
            raise DeployError("MIN_SCALE=0: with the component hpa there is at least one pod; Knative's own autoscaler alone goes to zero")
        misplaced = [name for name in service["metadata"].get("annotations", {}) if name.startswith(ANNOTATION_PREFIX)]
        if misplaced:
            raise DeployError(f"{misplaced[0]}: belongs under spec.template.metadata.annotations; on the Service it has no effect")


def _overlay(env: str) -> Path:
    folder = Path(env) if "/" in env else MANIFESTS / "overlays" / env
    if "/" not in env and Path("kustomization.yaml").is_file():
        raise VariableError(
            "ENV",
            env,
            "names an overlay of Relight's own, which serves the demo, and this folder is an overlay itself: leave ENV out of `make …`"
            " here (`relight cluster …` takes ENV=./) and say what to add, COMPONENTS=gpu,…; for another overlay of yours name its folder,"
            " with a / in it",
        )
    if (folder / "kustomization.yaml").is_file():
        return folder.resolve()
    known = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
    near = difflib.get_close_matches(env, known, n=1)
    raise VariableError("ENV", env, f"there is no such overlay; {f'did you mean {near[0]}?' if near else 'known are ' + ', '.join(known)}")


def _components(folder: Path) -> Iterator[str]:
    """The names of the components that a kustomization has, and those that it stands on."""
    try:
        document = yaml.safe_load((folder / "kustomization.yaml").read_text()) or {}
    except yaml.YAMLError as error:
        raise DeployError(f"{folder / 'kustomization.yaml'}: not YAML: {error}") from error
    for name in document.get("components") or ():
        yield Path(name).name
    for name in document.get("resources") or ():
        if (folder / name / "kustomization.yaml").is_file():
            yield from _components(folder / name)


def _check(named: list[str]) -> None:
    for group, members in GROUPS.items():
        if len(found := [name for name in named if name in members]) > 1:
            raise DeployError(f"the components {' and '.join(found)} exclude each other: at most one {group}")
    for name, needed in NEEDS.items():
        if name in named and (lacking := [one for one in needed if one not in named]):
            raise DeployError(f"the component {name} needs {' and '.join(lacking)} too")


def _kustomize(kubectl: Kubectl, resources: list[Path], components: list[Path]) -> list[Object]:
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch).resolve()
        document = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(path, here) for path in resources],
            "components": [os.path.relpath(path, here) for path in components],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(document))
        try:
            text = kubectl.run("kustomize", str(here))
        except KubectlError as error:
            raise DeployError(f"{resources[0]} does not render: {error}") from error
    return [item for item in yaml.safe_load_all(text) if item]


def _config_map(objects: list[Object], name: str) -> Object:
    """A ConfigMap of Knative among the objects, added if it is not there."""
    for item in objects:
        if item["kind"] == "ConfigMap" and item["metadata"]["name"] == name:
            return item
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": flags.NAMESPACE}, "data": {}})
    return objects[-1]


def _put(variables: Variables, objects: list[Object]) -> None:
    """The variables into the objects."""
    found = services(objects)
    _complete(objects)
    if variables.namespace:
        _put_namespace(objects, variables.namespace)
    namespace = next((item["metadata"]["namespace"] for item in objects if "namespace" in item["metadata"]), "default")
    for item in objects:
        if item["kind"] in ("Service", "DaemonSet") and "template" in item["spec"]:
            for volume in pod_spec(item).get("volumes", []):
                if Path(volume.get("hostPath", {}).get("path", "/")).parent == _CACHE:
                    volume["hostPath"]["path"] = str(_CACHE / namespace)  # who can read it can read every model in it
    images = {"IMAGE": variables.image, "WEIGHTS_IMAGE": variables.weights_image, "QUEUE_IMAGE": variables.queue_image}
    for one in containers(objects):
        if image := images.get(IMAGE_VARIABLES.get(one["name"], "")):
            one["image"] = image
    if not found and any(one["kind"] in _HAVE_SINKS for one in objects):
        raise DeployError(f"EVENTS: the overlay {variables.env} has no Knative Service that they could be sent to")
    chosen = [name.upper() for name in _OF_A_SERVICE if getattr(variables, name) is not None]
    chosen += [SET + name for name in variables.environment]
    if not found and chosen:
        raise DeployError(f"{', '.join(chosen)}: the overlay {variables.env} has no Knative Service; edit its files instead")
    for service in found:
        _put_service(variables, service, objects)
    _put_queue(variables, objects)


_OF_A_SERVICE = (
    *("name", "weights_uri", "agent", "example", "device", "components"),
    *("min_scale", "max_scale", "target", "concurrency", "gpu"),
)


def _complete(objects: list[Object]) -> None:
    """Give what was added to an overlay the overlay's namespace; kustomize gives one to kinds that it does not know to have none."""
    namespace = next((item["metadata"]["namespace"] for item in services(objects) if "namespace" in item["metadata"]), None)
    for item in objects:
        if item["kind"] in _OF_THE_CLUSTER:
            item["metadata"].pop("namespace", None)
        elif namespace:
            item["metadata"].setdefault("namespace", namespace)


def _put_namespace(objects: list[Object], namespace: str) -> None:
    for item in objects:
        if item["metadata"].get("namespace") not in (None, flags.NAMESPACE):
            item["metadata"]["namespace"] = namespace
        for subject in item.get("subjects", []):
            subject["namespace"] = namespace


def _put_service(variables: Variables, service: Object, objects: list[Object]) -> None:
    function = container(service, "function")
    old = service["metadata"]["name"]
    name = variables.name or old
    service["metadata"]["name"] = name
    if variables.name:
        set_env(function, "FUNCTION_MODEL_NAME", name)
    agent.put(variables, service)
    # Components and sources of events name the demo, in whichever overlay they are.
    olds = {old, agent.demo().name} - {name}
    if olds:
        _prefer(service, name)
    for item in objects if olds else ():
        for one in olds:
            if item is not service and belongs(item, one):
                item |= _renamed(item, one, name)
    uri = variables.weights_uri or get_env(function, "WEIGHTS_URI")
    if uri == agent.NO_WEIGHTS:
        agent.without_weights(service)
    elif uri:
        set_weights(service, uri)
        _prefetch(objects, olds | {name}, name, uri)
    template = service["spec"]["template"]
    annotations = template.setdefault("metadata", {}).setdefault("annotations", {})
    for key, value in (("min-scale", variables.min_scale), ("max-scale", variables.max_scale), ("target", variables.target)):
        if value is not None:
            annotations[ANNOTATION_PREFIX + key] = f"{value:g}"
    _tell_failures(function, annotations)
    if variables.concurrency is not None:
        template["spec"]["containerConcurrency"] = variables.concurrency
    if variables.gpu:
        function["resources"]["limits"]["nvidia.com/gpu"] = str(variables.gpu)


def _tell_failures(function: Object, annotations: Object) -> None:
    """Have callers told why a pod cannot start, where that is safe.

    It is ready meanwhile. That must not make a revision look as if it had started, which one that has no initial scale never needs to; nor
    take calls away from pods that are well, of which there are none where there is one pod at most.
    """
    scale = {name: annotations.get(f"{ANNOTATION_PREFIX}{name}", annotations.get(f"{ANNOTATION_PREFIX}{old}")) for name, old in _SCALES}
    if scale == {"initial-scale": "0", "max-scale": "1"} and get_env(function, TELL_FAILURE) is None:
        set_env(function, TELL_FAILURE, f"{TELL_FAILURE_S:g}")


def _renamed(value: Any, old: str, new: str) -> Any:
    """The same with every name that is the function's, or begins with it, made to follow the function's new one."""
    if isinstance(value, dict):
        return {key: _renamed(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, old, new) for item in value]
    if isinstance(value, str) and (value == old or value.startswith(f"{old}-")):
        return new + value.removeprefix(old)
    return value


def _put_queue(variables: Variables, objects: list[Object]) -> None:
    """The queue into its source, and into what scales that. Raises DeployError if it was not named."""
    sources = [one for one in containers(objects) if one["name"] == "queue-source"]
    url = variables.queue_url
    found = _REGION.match(url) if url else None
    region = (found[1] or found[2]) if found else None
    for one in sources:
        if url:
            set_env(one, "QUEUE_SOURCE_URL", url)
        elif _NO_QUEUE in (get_env(one, "QUEUE_SOURCE_URL") or ""):
            raise DeployError("QUEUE_URL: which queue? QUEUE_URL=https://sqs.REGION.amazonaws.com/ACCOUNT/NAME")
        if variables.results_url:
            set_env(one, "QUEUE_SOURCE_RESULTS_URL", variables.results_url)
        if region:
            set_env(one, "AWS_DEFAULT_REGION", region)
    for item in objects if url else ():
        for trigger in item["spec"]["triggers"] if item["kind"] == "ScaledObject" else ():
            if trigger["type"] == "aws-sqs-queue":
                trigger["metadata"] |= {"queueURL": url, **({"awsRegion": region} if region else {"awsEndpoint": _endpoint(url or "")})}


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _prefer(service: Object, name: str) -> None:
    affinity = pod_spec(service).get("affinity", {}).get("nodeAffinity", {})
    for term in affinity.get("preferredDuringSchedulingIgnoredDuringExecution", []):
        for expression in term["preference"].get("matchExpressions", []):
            if expression["key"].startswith(_LABEL):
                expression["key"] = _LABEL + name


def _prefetch(objects: list[Object], olds: set[str], name: str, uri: str) -> None:
    """Let the agents bring what the Service is going to ask for, under the Service's name."""
    for item in objects:
        if item["kind"] == "DaemonSet" and item["metadata"]["name"] == _AGENT:
            for one in pod_spec(item)["containers"]:
                listed = (get_env(one, "WEIGHTS_PREFETCH") or "").split()
                changed = [f"{name}={uri}" if entry.partition("=")[0] in olds else entry for entry in listed]
                if listed:
                    set_env(one, "WEIGHTS_PREFETCH", " ".join(changed))


def set_weights(service: Object, uri: str) -> None:
    """The same WEIGHTS_URI for each container that has one."""
    for one in pod_spec(service)["containers"]:
        if get_env(one, "WEIGHTS_URI") is not None:
            set_env(one, "WEIGHTS_URI", uri)


def pin(objects: list[Object], service: Object, uri: str) -> None:
    """Put the weights' URI with its snapshot wherever the one without stands."""
    set_weights(service, uri)
    name = service["metadata"]["name"]
    _prefetch(objects, {name}, name, uri)


def deadline_s(service: Object) -> float:
    """Seconds that a revision may take to become ready."""
    annotations = service["spec"]["template"].get("metadata", {}).get("annotations", {})
    named = {key: value for key, value in annotations.items() if key == PROGRESS_DEADLINE}
    return ScaleSpec.parse(named).progress_deadline_s
