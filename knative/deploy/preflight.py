"""What has to be there before anything is applied; each thing that is not is one plain sentence."""

import json

from knative.deploy import flags
from knative.deploy.errors import DeployError, KubectlError
from knative.deploy.kubectl import NO_KIND, NOT_FOUND, REFUSED, UNREACHABLE, Kubectl
from knative.deploy.objects import Object

# What not every cluster has, by the group of its kinds.
_OPTIONAL = {
    "admissionregistration.k8s.io": "Kubernetes 1.30 brings it; leave out the component prefetch, whose agents could change all of a node",
    "monitoring.coreos.com": "the Prometheus operator brings it: install that, or leave out the component monitoring",
    "keda.sh": "KEDA brings it: install that, or take EVENTS=sqs, which does without",
    "eventing.knative.dev": "Knative Eventing or its Kafka broker brings it: docs/events.md says what each of EVENTS= needs",
    "sources.knative.dev": "Knative Eventing or one of its extensions brings it: docs/events.md says what each of EVENTS= needs",
}

_NO_KNATIVE = (
    "the cluster has no Knative Serving: an administrator installs it (https://knative.dev/docs/install),"
    " or the overlay keda of Relight's checkout shows how to do without"
)


def check(kubectl: Kubectl, namespace: str, objects: list[Object], chosen: str) -> list[str]:
    """Raises DeployError if the cluster cannot take these objects; returns what could not be found out, to be told.

    chosen: the words that choose the overlay, for whoever has to choose it too.
    """
    try:
        kubectl.run("get", "--raw", "/version")
    except KubectlError as error:
        raise explained(error) from error
    try:
        kubectl.run("get", "--raw", "/apis/serving.knative.dev/v1")
    except KubectlError as error:
        if error.reason in (NO_KIND, NOT_FOUND):
            raise DeployError(_NO_KNATIVE) from error
        raise explained(error) from error
    _check_kinds(kubectl, objects)
    check_namespace(kubectl, namespace)
    return _check_flags(kubectl, flags.required(objects), chosen)


def _check_kinds(kubectl: Kubectl, objects: list[Object]) -> None:
    kinds: dict[str, set[str]] = {}  # by group and version: those that there are
    for item in objects:
        version, kind = item["apiVersion"], item["kind"]
        if (group := version.partition("/")[0]) not in _OPTIONAL:
            continue
        if version not in kinds:
            try:
                kinds[version] = {one["kind"] for one in json.loads(kubectl.run("get", "--raw", f"/apis/{version}"))["resources"]}
            except KubectlError as error:
                if error.reason not in (NO_KIND, NOT_FOUND):
                    raise explained(error) from error
                kinds[version] = set()
        if kind not in kinds[version]:
            raise DeployError(f"the cluster has no {kind} ({version}): {_OPTIONAL[group]}")


def check_namespace(kubectl: Kubectl, namespace: str) -> None:
    """Raises DeployError if there is no such namespace."""
    try:
        kubectl.run("get", "namespace", namespace, "-o", "name")
    except KubectlError as error:
        if error.reason == NOT_FOUND:
            raise DeployError(f"there is no namespace {namespace}: kubectl create namespace {namespace}") from error
        if error.reason != REFUSED:  # who may not look at namespaces may still deploy into one
            raise explained(error) from error


def _check_flags(kubectl: Kubectl, needed: flags.Config, chosen: str) -> list[str]:
    if not needed:
        return []
    try:
        found = {item["metadata"]["name"]: item.get("data", {}) for item in kubectl.items("configmaps", "-n", flags.NAMESPACE)}
    except KubectlError as error:
        if error.reason == REFUSED:
            return [f"whether the cluster allows all this is not known: {flags.NAMESPACE} cannot be read"]
        raise explained(error) from error
    if lacking := flags.missing(needed, found):
        lines = "\n".join(f"  {line}" for line in flags.in_words(lacking))
        raise DeployError(
            f"the cluster does not allow what this overlay uses; in namespace {flags.NAMESPACE},\n{lines}\n"
            f"an administrator applies it once: make cluster {chosen} | kubectl apply --server-side -f -"
        )
    return []


def explained(error: KubectlError) -> DeployError:
    """The same failure in words that say what to do."""
    if error.reason == UNREACHABLE:
        return DeployError(f"no cluster can be reached: {error}\nis the right one chosen (kubectl config current-context), and is it up?")
    if error.reason == REFUSED:
        return DeployError(f"the cluster refuses it: {error}")
    if error.reason == NO_KIND and "serving.knative.dev" in str(error):
        return DeployError(_NO_KNATIVE)
    return error
