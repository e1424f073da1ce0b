"""Where a new revision stands, in words, from what the cluster says of it. Pure: documents in, sentences out."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knative.deploy.objects import Object

# Reasons of a waiting container that do not go away by themselves, or not soon.
_BAD = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "InvalidImageName": "its image has an impossible name",
    "CrashLoopBackOff": "it ends again and again",
    "CreateContainerConfigError": "it cannot be configured",
    "CreateContainerError": "it cannot be made",
    "RunContainerError": "it cannot be started",
}
_FAILED = "Container failed with: "
_WEIGHTS = re.compile(r": ([\d.]+) of ([\d.]+) MB\b")


@dataclass(frozen=True)
class Condition:
    """A condition of a Knative object."""

    status: str  # True, False, Unknown
    reason: str
    message: str


def condition(item: Object, kind: str = "Ready") -> Condition:
    """One condition; Unknown if it is not there, or is about an older generation of the object."""
    status = item.get("status", {})
    if status.get("observedGeneration") == item["metadata"].get("generation"):
        for found in status.get("conditions", []):
            if found["type"] == kind:
                return Condition(found["status"], found.get("reason", ""), _reason(found.get("message", "")))
    return Condition("Unknown", "", "")


def _reason(message: str) -> str:
    """What Knative says of a container that has failed is the end of its log; the reason is the last line."""
    head, failed, log = message.partition(_FAILED)
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{head}{failed}{lines[-1]}" if lines else message


def held(service: Object) -> str | None:
    """The revisions that callers go to because `spec.traffic` names them, where none of it is the newest."""
    shares = [one for one in service["spec"].get("traffic", []) if one.get("percent")]
    newest = service.get("status", {}).get("latestReadyRevisionName")
    if not shares or any(one.get("latestRevision") or one.get("revisionName") == newest for one in shares):
        return None
    return " and ".join(one["revisionName"] for one in shares)


def pods_in_words(pods: Iterable[Object], weights: str | None) -> str:
    """What the pods of a revision are doing, the one that is furthest behind. weights: the last line of a sidecar that tells of them."""
    words = [(4, "no pod yet")]  # how near to being ready, and what is said
    for pod in pods:
        status = pod.get("status", {})
        name = pod["metadata"]["name"]
        if unscheduled := _unscheduled(status):
            return f"{name} has no node: {unscheduled}"
        waiting = [one for one in _states(status) if "waiting" in one["state"]]
        if waiting:
            reason = waiting[0]["state"]["waiting"].get("reason", "")
            what = f"pulling the image of {waiting[0]['name']}" if reason == "ContainerCreating" else reason
            words.append((1, f"{name}: {what}"))
        elif not status.get("containerStatuses"):
            words.append((0, f"{name}: waiting for its node"))
        elif not all(one.get("ready") for one in status["containerStatuses"]):
            words.append((2, f"{name}: {_loading(weights)}"))
        else:
            words.append((3, f"{name}: ready"))
    return min(words)[1]


def _loading(line: str | None) -> str:
    if line and (found := _WEIGHTS.search(line)):
        done, total = float(found[1]), float(found[2])
        return f"weights {done / 1000:.1f} of {total / 1000:.1f} GB" if done < total else "weights are there; loading the model"
    return "started; waiting for its probes"


def troubles(pods: Iterable[Object]) -> list[tuple[str, str, str]]:
    """Containers that will not come up by themselves, as (pod, container, what is wrong)."""
    found = []
    for pod in pods:
        for one in _states(pod.get("status", {})):
            waiting = one["state"].get("waiting", {})
            if what := _BAD.get(waiting.get("reason", "")):
                found.append((pod["metadata"]["name"], one["name"], _with(what, waiting.get("message", ""), _ended(one))))
    return found


def standing(pods: Iterable[Object]) -> list[tuple[str, str, str]]:
    """Every container that is not ready, as (pod, container, how it stands)."""
    found = []
    for pod in pods:
        status = pod.get("status", {})
        if reason := _unscheduled(status):
            found.append((pod["metadata"]["name"], "", f"it has no node: {reason}"))
        for one in _states(status):
            if not one.get("ready"):
                waiting = one["state"].get("waiting", {})
                what = _BAD.get(waiting.get("reason", "")) or waiting.get("reason") or "it is not ready"
                found.append((pod["metadata"]["name"], one["name"], _with(what, waiting.get("message", ""), _ended(one))))
    return found


def warnings(events: Iterable[Object], pods: Sequence[Object]) -> list[str]:
    """Warnings about these pods, the latest last, each once."""
    names = {pod["metadata"]["name"] for pod in pods}
    ours = [event for event in events if event.get("type") == "Warning" and event.get("involvedObject", {}).get("name") in names]
    ours.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
    return list(
        dict.fromkeys(f"{event['involvedObject']['name']}: {event.get('reason', '')}: {event.get('message', '')}" for event in ours)
    )


def _states(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"state": {}, **one} for one in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", []))]


def _unscheduled(status: Mapping[str, Any]) -> str:
    return next(
        (
            found.get("message", "")
            for found in status.get("conditions", [])
            if found["type"] == "PodScheduled" and found["status"] == "False"
        ),
        "",
    )


def _ended(one: Mapping[str, Any]) -> str:
    ended = one.get("lastState", {}).get("terminated") or one.get("state", {}).get("terminated")
    if not ended:
        return ""
    said = [line.strip() for line in ended.get("message", "").splitlines() if line.strip()]
    return f"last exit status {ended.get('exitCode')} ({ended.get('reason', '')})" + (f": {said[-1]}" if said else "")


def _with(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
