"""A rendering on its way to being ready: apply, wait and tell, explain a failure."""

import base64
import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable

from knative.deploy import agent, preflight, progress, pullable
from knative.deploy.errors import DeployError, KubectlError
from knative.deploy.kubectl import NOT_FOUND, Kubectl
from knative.deploy.objects import Object, belongs, get_env, one_service, pod_spec
from knative.deploy.render import check_annotations, deadline_s, dump, pin, render
from knative.deploy.variables import Variables

POLL_S = 1.0
STORE_S = 120.0  # for the store to say which snapshot it has
LOG_LINES = 20
HIDDEN = "***"
_LEAST_SECRET = 3  # characters; what is shorter stands in many a word
GRACE_S = 60.0  # that Knative has to say that a deadline is over

_KIND = "services.serving.knative.dev"
_OF_REVISION = "serving.knative.dev/revision"
_OF_SERVICE = "serving.knative.dev/service"

Say = Callable[[str], object]


def deploy(variables: Variables, kubectl: Kubectl, say: Say) -> Object:
    """Apply the overlay and wait until it is ready; returns the Service as the cluster has it. Raises DeployError."""
    objects = render(variables, kubectl)
    service = one_service(objects)
    pullable.check(pullable.named(objects))
    notes = agent.check(variables, objects)
    name, namespace = service["metadata"]["name"], service["metadata"].get("namespace", "default")
    for note in notes + preflight.check(kubectl, namespace, objects, variables.overlay_in_words()):
        say(f"note: {note}")
    if variables.pin:
        _pin(objects, service, say)
    before = _find(kubectl, name, namespace)
    _apply(kubectl, _on_trial(objects, service), dry=True)  # the webhook's refusal comes before anything is changed
    _apply(kubectl, objects, dry=False)
    after = _find(kubectl, name, namespace)
    if after is None:
        raise DeployError(f"Service {name} was applied to namespace {namespace}, and is not there")
    if before and before["metadata"].get("generation") == after["metadata"].get("generation"):
        say(f"{name}: nothing has changed since generation {after['metadata']['generation']}; no new revision")
    found = wait(kubectl, name, namespace, variables.timeout or deadline_s(service) + GRACE_S, say)
    if old := progress.held(found):
        say(
            f"note: callers go to {old}, which spec.traffic names; the newest gets them with latestRevision (docs/your-model.md, Roll back)"
        )
    return found


def wait(kubectl: Kubectl, name: str, namespace: str, timeout_s: float, say: Say) -> Object:
    """Until the Service is ready, telling each change. Raises DeployError, with what is wrong, if it fails or takes too long."""
    until = time.monotonic() + timeout_s
    told = ""
    while True:
        service = _find(kubectl, name, namespace)
        if service is None:
            raise DeployError(f"Service {name} was deleted while it was being deployed")
        ready = progress.condition(service)
        revision = service.get("status", {}).get("latestCreatedRevisionName", "")
        if ready.status == "True":
            say(f"{name}: ready at {service['status'].get('url', 'no URL')} ({revision})")
            return service
        pods = _pods(kubectl, namespace, revision)
        if ready.status == "False" or progress.troubles(pods):
            raise DeployError(explain(kubectl, service, revision, pods))
        words = progress.pods_in_words(pods, _weights_line(kubectl, namespace, pods))
        if words != told:
            say(f"{revision or name}: {words}")
            told = words
        if time.monotonic() >= until:
            raise DeployError(f"not ready after {timeout_s:.0f} s\n{explain(kubectl, service, revision, pods)}")
        time.sleep(POLL_S)


def standing(kubectl: Kubectl, service: Object) -> str:
    """How a Service is that was ready and does not answer."""
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    found = _find(kubectl, name, namespace) or service
    revision = found.get("status", {}).get("latestCreatedRevisionName", "")
    return explain(kubectl, found, revision, _pods(kubectl, namespace, revision))


def explain(kubectl: Kubectl, service: Object, revision: str, pods: list[Object]) -> str:
    """What is wrong with a Service: conditions, pods, their events, the last lines of their logs."""
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    lines = [f"{name} does not answer" if progress.condition(service).status == "True" else f"{name} is not ready"]
    for kind, item in (("Service", service), ("Revision", _get_revision(kubectl, namespace, revision))):
        if item and (found := progress.condition(item)).status != "True" and (found.reason or found.message):
            lines.append(f"  {kind} {item['metadata']['name']}: {': '.join(filter(None, (found.reason, found.message)))}")
    for pod, container, what in progress.standing(pods):
        lines.append(f"  pod {pod}{f', container {container}' if container else ''}: {what}")
    lines += [f"  event of {line}" for line in progress.warnings(_soft(kubectl, "events", "-n", namespace), pods)[-5:]]
    for pod, container, _ in progress.standing(pods):
        if container and (log := _log(kubectl, namespace, pod, container)):
            lines.append(f"  last lines of {pod}, {container}:")
            lines += [f"    {line}" for line in log]
    serving = service.get("status", {}).get("latestReadyRevisionName")
    if serving and serving != revision:
        lines.append(f"  {serving} goes on serving")
    return "\n".join(lines)


def undeploy(variables: Variables, kubectl: Kubectl, say: Say) -> None:
    """Delete the Service, and what the functions of its namespace share when it was the last one. Raises DeployError."""
    objects = render(variables, kubectl)
    service = one_service(objects)
    name, namespace = service["metadata"]["name"], service["metadata"].get("namespace", "default")
    try:
        preflight.check_namespace(kubectl, namespace)
        own = [item for item in objects if item is not service and belongs(item, name)]
        if own:  # before the function, so that nobody sends to one that is gone
            kubectl.run("delete", "--ignore-not-found", "-f", "-", text=dump(own))
            said = ", ".join("{kind} {metadata[name]}".format_map(item) for item in own)
            say(f"{said}: deleted")
        kubectl.run("delete", _KIND, name, "-n", namespace, "--ignore-not-found")
        say(f"{name}: deleted")
        others = [item["metadata"]["name"] for item in kubectl.items(_KIND, "-n", namespace)]
        if others:
            say(f"left for {', '.join(others)}: what the functions of namespace {namespace} share")
            return
        kubectl.run(
            "delete", "--ignore-not-found", "-f", "-", text=dump(item for item in objects if item is not service and item not in own)
        )
        say(f"deleted what the functions of namespace {namespace} shared")
    except KubectlError as error:
        raise preflight.explained(error) from error


def find(variables: Variables, kubectl: Kubectl) -> Object:
    """The Service of the overlay, as the cluster has it. Raises DeployError if it is not there."""
    rendered = one_service(render(variables, kubectl))
    name, namespace = rendered["metadata"]["name"], rendered["metadata"].get("namespace", "default")
    service = _find(kubectl, name, namespace)
    if service is None:
        preflight.check_namespace(kubectl, namespace)
        raise DeployError(f"there is no Service {name} in namespace {namespace}: `make deploy` brings it")
    return service


def status_in_words(kubectl: Kubectl, service: Object) -> list[str]:
    """The Service, its revisions and its pods, a line each."""
    name, namespace, status = service["metadata"]["name"], service["metadata"]["namespace"], service.get("status", {})
    ready = progress.condition(service)
    state = {"True": "ready", "False": "failed", "Unknown": "not ready yet"}[ready.status]
    why = f" ({ready.reason}: {ready.message})" if ready.status != "True" and ready.reason else ""
    lines = [f"{name}: {state}{why}, {status.get('url', 'no URL')}"]
    lines += [f"  {one.get('percent', 0)} % to {one.get('revisionName', 'the latest revision')}" for one in status.get("traffic", [])]
    pods = _soft(kubectl, "pods", "-n", namespace, "-l", f"{_OF_SERVICE}={name}")
    lines += [f"  pod {progress.pods_in_words([pod], None)}" for pod in pods] or ["  no pods: at zero"]
    return lines


def _pin(objects: list[Object], service: Object, say: Say) -> None:
    """To the snapshot that the store has now, so that a roll-back brings the weights back too."""
    uri = get_env(next(one for one in service["spec"]["template"]["spec"]["containers"] if one["name"] == "function"), "WEIGHTS_URI")
    if not uri or "#" in uri:
        return
    # A process of its own: what speaks to stores is no part of this package.
    command = [sys.executable, "-m", "weights_cache", "snapshot", uri]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=STORE_S, check=False)
        said = asked.stderr.strip().removeprefix("Error: ").splitlines() if asked.returncode else None
    except subprocess.TimeoutExpired:
        said = [f"no answer within {STORE_S:g} s"]
    if said is not None:
        raise DeployError(
            f"{uri} cannot be pinned to a snapshot: {said[-1] if said else 'the store did not answer'}\n"
            "let the AWS_ variables here lead to the store, give WEIGHTS_URI=…#snapshot, or have each start take the newest: PIN=false"
        )
    pinned = asked.stdout.strip()
    pin(objects, service, pinned)
    check_annotations(objects, {"config-autoscaler": {"allow-zero-initial-scale": "true"}})
    say(f"weights: {pinned}")


def _on_trial(objects: list[Object], service: Object) -> list[Object]:
    """As they can be tried where nothing of them is yet: in a dry run Knative asks for the pods too, which need their service account."""
    account = pod_spec(service).get("serviceAccountName")
    if not any((item["kind"], item["metadata"]["name"]) == ("ServiceAccount", account) for item in objects):
        return objects
    tried = copy.deepcopy(service)
    del pod_spec(tried)["serviceAccountName"]
    return [tried if item is service else item for item in objects]


def _apply(kubectl: Kubectl, objects: list[Object], *, dry: bool) -> None:
    options = ["--dry-run=server"] if dry else []
    try:
        kubectl.run("apply", "--server-side", "--field-manager=relight", "--force-conflicts", *options, "-f", "-", text=dump(objects))
    except KubectlError as error:
        error = KubectlError(_without_secrets(str(error), objects), error.reason)
        if "denied the request" in str(error):
            raise DeployError(f"the cluster refuses it: {error}") from error
        raise preflight.explained(error) from error


def _without_secrets(text: str, objects: list[Object]) -> str:
    """What the API says of objects may repeat them whole, with the values of Secrets."""
    values: set[str] = set()
    for item in objects:
        if item["kind"] == "Secret":
            values |= {str(value) for value in item.get("stringData", {}).values()}
            for value in map(str, item.get("data", {}).values()):
                values.add(value)
                with contextlib.suppress(ValueError):
                    values.add(base64.b64decode(value).decode())
    for value in sorted(values, key=len, reverse=True):
        for form in (value, json.dumps(value)[1:-1]):
            text = text.replace(form, HIDDEN) if len(value) >= _LEAST_SECRET else text
    return text


def _find(kubectl: Kubectl, name: str, namespace: str) -> Object | None:
    try:
        found: Object = kubectl.get(_KIND, name, "-n", namespace)
    except KubectlError as error:
        if error.reason == NOT_FOUND:
            return None
        raise preflight.explained(error) from error
    except json.JSONDecodeError as error:
        raise DeployError(f"kubectl answered something else than JSON: {error}") from error
    return found


def _get_revision(kubectl: Kubectl, namespace: str, revision: str) -> Object | None:
    return next(
        (item for item in _soft(kubectl, "revisions.serving.knative.dev", "-n", namespace) if item["metadata"]["name"] == revision), None
    )


def _pods(kubectl: Kubectl, namespace: str, revision: str) -> list[Object]:
    return _soft(kubectl, "pods", "-n", namespace, "-l", f"{_OF_REVISION}={revision}") if revision else []


def _soft(kubectl: Kubectl, *arguments: str) -> list[Object]:
    """What only helps to tell how things are: without it there is less to tell, and that is no failure."""
    try:
        return kubectl.items(*arguments)
    except (KubectlError, json.JSONDecodeError):
        return []


def _weights_line(kubectl: Kubectl, namespace: str, pods: list[Object]) -> str | None:
    for pod in pods:
        for line in reversed(_log(kubectl, namespace, pod["metadata"]["name"], "weights-cache", lines=3)):
            if " MB" in line:
                return line
    return None


def _log(kubectl: Kubectl, namespace: str, pod: str, container: str, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a container; of the one before it if it has not begun again."""
    for previous in ((), ("--previous",)):
        try:
            if text := kubectl.run("logs", pod, "-n", namespace, "-c", container, f"--tail={lines}", *previous):
                return text.splitlines()
        except KubectlError:
            continue
    return []
