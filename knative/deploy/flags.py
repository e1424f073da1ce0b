"""What a rendering asks of the cluster's configuration.

Knative refuses parts of a pod unless a flag in the ConfigMap `config-features` allows them (pkg/apis/serving/fieldmask.go and
k8s_validation.go at knative/serving 98e5ef90aa), and some values unless `config-autoscaler` or `config-defaults` does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knative.autoscaler.spec import ANNOTATION_PREFIX
from knative.deploy.objects import Object, pod_spec, services

FEATURES = "config-features"
AUTOSCALER = "config-autoscaler"
DEFAULTS = "config-defaults"
NAMESPACE = "knative-serving"

MAX_TIMEOUT = "max-revision-timeout-seconds"
MAX_TIMEOUT_S = 600  # Knative's default for it

Config = Mapping[str, Mapping[str, str]]  # ConfigMap -> key -> value


@dataclass(frozen=True)
class Flag:
    """A key of `config-features`, which is off unless somebody sets it to `enabled`."""

    name: str
    allows: str
    why: str
    needed: Callable[[Object], bool]  # by a pod's spec


def _volume(kind: str) -> Callable[[Object], bool]:
    return lambda spec: any(kind in volume for volume in spec.get("volumes", []))


def _field(name: str) -> Callable[[Object], bool]:
    return lambda spec: name in spec


def _writes_claim(spec: Object) -> bool:
    claims = [volume["persistentVolumeClaim"] for volume in spec.get("volumes", []) if "persistentVolumeClaim" in volume]
    return not all(claim.get("readOnly") for claim in claims)


def _probes_sidecar(spec: Object) -> bool:
    return any(not container.get("ports") and any(key.endswith("Probe") for key in container) for container in spec["containers"][1:])


FLAGS = (
    Flag("multi-container-probing", "probes of sidecars", "a weights sidecar that hangs is restarted", _probes_sidecar),
    Flag(
        "kubernetes.podspec-persistent-volume-claim",
        "volumes that are claims",
        "a cache that outlives the pod, without hostPath",
        _volume("persistentVolumeClaim"),
    ),
    Flag("kubernetes.podspec-persistent-volume-write", "claims that a pod writes to", "the sidecar fills that cache", _writes_claim),
    Flag(
        "kubernetes.podspec-securitycontext",
        "a security context of the pod",
        "fsGroup: a new volume belongs to root, and the sidecar is not root",
        _field("securityContext"),
    ),
    Flag(
        "kubernetes.podspec-volumes-hostpath",
        "directories of the node, read-only",
        "pods read the cache that the node's agent fills",
        _volume("hostPath"),
    ),
    Flag("kubernetes.podspec-runtimeclassname", "a runtime class", "NVIDIA's container runtime", _field("runtimeClassName")),
    Flag("kubernetes.podspec-tolerations", "tolerations", "GPU nodes, spot nodes and dedicated nodes have taints", _field("tolerations")),
    Flag(
        "kubernetes.podspec-nodeselector", "a node selector", "realtime and batch functions on nodes of their own", _field("nodeSelector")
    ),
    Flag("kubernetes.podspec-affinity", "node affinity", "nodes that hold the weights already are preferred", _field("affinity")),
    Flag(
        "kubernetes.podspec-priorityclassname",
        "a priority",
        "a function that somebody waits for goes before batch work",
        _field("priorityClassName"),
    ),
    Flag(
        "kubernetes.podspec-topologyspreadconstraints",
        "spreading pods over nodes and zones",
        "not used by our components",
        _field("topologySpreadConstraints"),
    ),
    Flag(
        "kubernetes.podspec-init-containers",
        "init containers",
        "not used by our components: the sidecar works meanwhile",
        _field("initContainers"),
    ),
    Flag(
        "kubernetes.podspec-fieldref",
        "the pod's own fields in its environment",
        "not used by our components",
        lambda spec: any(
            key in variable.get("valueFrom", {})
            for container in spec["containers"]
            for variable in container.get("env", [])
            for key in ("fieldRef", "resourceFieldRef")
        ),
    ),
)


def required(objects: Iterable[Object]) -> dict[str, dict[str, str]]:
    """The settings without which Knative refuses these objects, by ConfigMap and key; a number is the least that will do."""
    found: dict[str, dict[str, str]] = {}
    for service in services(objects):
        spec = pod_spec(service)
        for flag in FLAGS:
            if flag.needed(spec):
                found.setdefault(FEATURES, {})[flag.name] = "enabled"
        annotations = service["spec"]["template"].get("metadata", {}).get("annotations", {})
        if annotations.get(f"{ANNOTATION_PREFIX}initial-scale", annotations.get(f"{ANNOTATION_PREFIX}initialScale")) == "0":
            found.setdefault(AUTOSCALER, {})["allow-zero-initial-scale"] = "true"
        if (timeout_s := spec.get("timeoutSeconds", 0)) > MAX_TIMEOUT_S:
            least = max(timeout_s, int(found.get(DEFAULTS, {}).get(MAX_TIMEOUT, 0)))
            found.setdefault(DEFAULTS, {})[MAX_TIMEOUT] = str(least)
    return found


def missing(needed: Config, cluster: Config) -> dict[str, dict[str, str]]:
    """What of `needed` the cluster's ConfigMaps do not have."""
    found: dict[str, dict[str, str]] = {}
    for name, settings in needed.items():
        for key, value in settings.items():
            if not _suffices(cluster.get(name, {}).get(key, ""), value):
                found.setdefault(name, {})[key] = value
    return found


def _suffices(found: str, needed: str) -> bool:
    if needed.isdigit():
        return found.isdigit() and int(found) >= int(needed)
    return found.lower() == needed


def in_words(lacking: Config) -> Sequence[str]:
    """A line for each setting: what it is, and what for."""
    why = {flag.name: flag.why for flag in FLAGS} | {
        "allow-zero-initial-scale": "a new revision is ready without a pod (rollout-in-place)",
        MAX_TIMEOUT: "timeoutSeconds is longer than Knative's default allows",
    }
    return [f"{name}: {key} must be {value!r} ({why[key]})" for name, settings in lacking.items() for key, value in settings.items()]


def shipped(objects: Iterable[Object]) -> dict[str, dict[str, str]]:
    """The settings in rendered ConfigMaps of Knative."""
    return {item["metadata"]["name"]: dict(item.get("data", {})) for item in objects if item.get("kind") == "ConfigMap" and _is_ours(item)}


def _is_ours(item: Mapping[str, Any]) -> bool:
    return bool(item["metadata"].get("namespace") == NAMESPACE)
