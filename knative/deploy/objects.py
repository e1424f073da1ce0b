"""Rendered Kubernetes objects, as plain documents."""

from collections.abc import Iterable, Iterator
from typing import Any

from knative.deploy.errors import DeployError

Object = dict[str, Any]
SERVING = "serving.knative.dev/"
MAKE_PODS = ("Service", "Deployment", "DaemonSet", "ContainerSource")
# Which variable names the image of our containers.
IMAGE_VARIABLES = {
    "function": "IMAGE",
    **dict.fromkeys(("weights-cache", "agent", "directory"), "WEIGHTS_IMAGE"),
    "queue-source": "QUEUE_IMAGE",
}


def services(objects: Iterable[Object]) -> list[Object]:
    """The Knative Services among them."""
    return [item for item in objects if item["kind"] == "Service" and item["apiVersion"].startswith(SERVING)]


def one_service(objects: Iterable[Object]) -> Object:
    """The one Knative Service. Raises DeployError if there is none, or more than one."""
    found = services(objects)
    if len(found) != 1:
        names = ", ".join(service["metadata"]["name"] for service in found) or "none"
        raise DeployError(f"found {names}; the overlay must render to exactly one Knative Service")
    return found[0]


def belongs(item: Object, name: str) -> bool:
    """Whether an object is there for the function of that name alone, as its own name says."""
    return bool(item["metadata"]["name"] == name or item["metadata"]["name"].startswith(f"{name}-"))


def pod_spec(item: Object) -> Object:
    """The spec of the pods that an object makes."""
    spec: Object = item["spec"]["template"]["spec"]
    return spec


def containers(objects: Iterable[Object]) -> Iterator[Object]:
    """Every container of every object that makes pods."""
    for item in objects:
        if item["kind"] in MAKE_PODS and "template" in item["spec"]:
            yield from pod_spec(item).get("initContainers", [])
            yield from pod_spec(item)["containers"]


def container(service: Object, name: str) -> Object:
    """A container of a Service by its name, itself and no copy. Raises DeployError if there is none."""
    found: Object | None = next((one for one in pod_spec(service)["containers"] if one["name"] == name), None)
    if found:
        return found
    raise DeployError(f"the Service {service['metadata']['name']} has no container named {name!r}")


def get_env(one: Object, name: str) -> str | None:
    """A container's variable, if it is a plain one."""
    return next((variable.get("value") for variable in one.get("env", []) if variable["name"] == name), None)


def set_env(one: Object, name: str, value: str) -> None:
    """Set a container's variable."""
    variables: list[dict[str, Any]] = one.setdefault("env", [])
    found = next((variable for variable in variables if variable["name"] == name), None)
    if found is None:
        variables.append({"name": name, "value": value})
    else:
        found.clear()
        found |= {"name": name, "value": value}
