"""The agent of a rendering, and what has to go with it: its weights, its image, its example, its settings."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from knative.deploy import pullable
from knative.deploy.errors import DeployError
from knative.deploy.objects import Object, container, get_env, pod_spec, services, set_env
from knative.deploy.variables import Variables

MANIFESTS = Path(__file__).parents[1] / "manifests"
EXAMPLE = "relight/example"  # an annotation of the Service: a request that shows the agent at work
OUR_IMAGE = "relight-function"
NO_WEIGHTS = "none"  # as WEIGHTS_URI: of an agent that has none
_SIDECAR = "weights-cache"  # the container, and the volume that it fills
# Of our own agents, those whose libraries are not in our image.
_WITH_LIBRARIES = ("function.agents.transformers", "function.agents.onnx")
_OF_BOTH = "WEIGHTS_"  # settings that a function shares with its sidecar
_CHECK_S = 60.0
# A process of its own: what a function's settings are is no part of this package.
_CHECK = """
import sys
from function.settings import SettingsError, from_environment
try:
    from_environment()
except SettingsError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True)
class Demo:
    """What the base serves: its names stand for the function's own wherever a component or a source of events names it."""

    name: str
    agent: str
    weights: str
    example: str


@cache
def demo() -> Demo:
    """As `manifests/base` has it."""
    service = yaml.safe_load((MANIFESTS / "base/service.yaml").read_text())
    function = container(service, "function")
    metadata = service["metadata"]
    agent, weights = (get_env(function, name) or "" for name in ("FUNCTION_AGENT", "WEIGHTS_URI"))
    return Demo(metadata["name"], agent, weights, metadata["annotations"][EXAMPLE])


def put(variables: Variables, service: Object) -> None:
    """What was said of the agent, into its Service. The demo's example does not stay with another agent."""
    function = container(service, "function")
    for name, value in (("FUNCTION_AGENT", variables.agent), ("FUNCTION_DEVICE", variables.device)):
        if value:
            set_env(function, name, value)
    for name, value in variables.environment.items():
        for one in service["spec"]["template"]["spec"]["containers"]:
            if one is function or (name.startswith(_OF_BOTH) and get_env(one, "WEIGHTS_URI") is not None):
                set_env(one, name, value)
    annotations = service["metadata"].setdefault("annotations", {})
    if variables.example:
        annotations[EXAMPLE] = variables.example
    elif get_env(function, "FUNCTION_AGENT") != demo().agent and annotations.get(EXAMPLE) == demo().example:
        del annotations[EXAMPLE]


def without_weights(service: Object) -> None:
    """Take away what brings weights: the sidecar, the cache, and the variables that lead there."""
    spec, function = pod_spec(service), container(service, "function")
    spec["containers"] = [one for one in spec["containers"] if one["name"] != _SIDECAR]
    spec["volumes"] = [one for one in spec.get("volumes", []) if one["name"] != _SIDECAR]
    function["volumeMounts"] = [one for one in function.get("volumeMounts", []) if one["name"] != _SIDECAR]
    function["env"] = [one for one in function.get("env", []) if one["name"] not in ("WEIGHTS_URI", "WEIGHTS_CACHE_DIR")]


def check(variables: Variables, objects: Iterable[Object]) -> list[str]:
    """Raises DeployError for an agent that cannot belong to its weights or is not in its image, and for settings that it would refuse.

    Returns what is no error, and yet to be told.
    """
    objects = list(objects)
    notes = pullable.notes(pullable.named(objects))
    for service in services(objects):
        function = container(service, "function")
        agent = get_env(function, "FUNCTION_AGENT")
        if agent:
            _check_weights(variables, service["metadata"]["name"], agent, get_env(function, "WEIGHTS_URI"))
            _check_image(agent, function.get("image", ""))
        if agent and (variables.environment or "/" in variables.env):  # else there are only our own
            _check_settings(function)
        if variables.agent and EXAMPLE not in service["metadata"].get("annotations", {}):
            notes.append(f"{agent} has no EXAMPLE='{{…}}', and the demo's is left out: `make invoke` will need DATA='{{…}}'")
    return notes


def _check_weights(variables: Variables, name: str, agent: str, uri: str | None) -> None:
    weights = (uri or demo().weights).partition("#")[0]
    if variables.agent and agent != demo().agent and uri == demo().weights and not variables.weights_uri:
        raise DeployError(
            f"WEIGHTS_URI: which? {agent} would get the demo's weights, {uri}\n"
            f"name those of this agent, as WEIGHTS_URI=s3://bucket/prefix; if it has none, say WEIGHTS_URI={NO_WEIGHTS}"
        )
    if variables.agent or agent != demo().agent or (name, weights) == (demo().name, demo().weights):
        return
    raise DeployError(
        f"AGENT: which? {name}, with the weights at {weights}, would be served by the demo's agent, {agent}\n"
        f"name the agent of these weights, as AGENT=package.module:Class EXAMPLE='{{…}}'; if they are {demo().name}'s, say AGENT={agent}"
    )


def _check_image(agent: str, image: str) -> None:
    module = agent.partition(":")[0]
    if re.split("[:@]", image, maxsplit=1)[0] != OUR_IMAGE:
        return
    if module.partition(".")[0] != "function":
        what = f"the module {module}"
    elif module.startswith(_WITH_LIBRARIES):
        what = "the libraries of that agent"
    else:
        return
    raise DeployError(
        f"FUNCTION_AGENT={agent}: {what} cannot be in {image}, which is Relight's own image\n"
        "build one that has it, `make build AGENT_DIR=folder IMAGE=registry/path:tag`, and name it here too, IMAGE=registry/path:tag"
    )


def _check_settings(function: Object) -> None:
    """By the function's own rules, for a container that runs ours."""
    if function.get("command", [])[1:] != ["-m", "function"]:
        return
    ours = {one["name"]: one["value"] for one in function.get("env", []) if isinstance(one.get("value"), str)}
    inherited = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH") if name in os.environ}
    checked = {name: value for name, value in ours.items() if name.startswith(("FUNCTION_", "WEIGHTS_"))}
    asked = subprocess.run(
        [sys.executable, "-P", "-c", _CHECK], env=inherited | checked, capture_output=True, text=True, timeout=_CHECK_S, check=False
    )
    if asked.returncode:
        raise DeployError(f"the container function: {(asked.stderr.strip() or 'its settings cannot be read').splitlines()[-1]}")
