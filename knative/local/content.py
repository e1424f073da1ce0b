"""What a Service's pods run besides what its manifest says: its agent's code, and weights of this machine."""

import os
from dataclasses import replace
from pathlib import Path

from knative.local.code import Code
from knative.local.launch import AGENT, AGENT_PATH, FUNCTION, WEIGHTS, Places, agent_path, declared_env, rewriter, runs
from knative.local.manifest import Service
from knative.local.seeds import Seeds


def function_env(service: Service) -> tuple[int, dict[str, str]] | None:
    """Which container runs our function, and what the manifest says of its environment; None if none does. Raises ManifestError."""
    for index, container in enumerate(service.spec.containers):
        if runs(container, FUNCTION):
            return index, declared_env(service, index, service.manifests)
    return None


def with_content(service: Service, places: Places, seeds: Seeds) -> Service:
    """The Service with its code and a stamp of its weights, as they are now. Reads files, so not in the loop. Raises ManifestError."""
    if (found := function_env(service)) is None:
        return service
    index, env = found
    container = service.spec.containers[index]
    here = rewriter({mount.mount_path.rstrip("/"): places.volume(service, "", mount.name) for mount in container.volume_mounts}, {})
    path = here(env[AGENT_PATH]) if AGENT_PATH in env else agent_path(service, container, here)
    folders = [Path(folder).absolute() for folder in path.split(os.pathsep) if folder]
    code = Code.read(env[AGENT], folders) if AGENT in env else None
    return replace(service, code=code, weights=seeds.stamp(env.get(WEIGHTS, "")))


def changed_files(before: Service, now: Service) -> list[str]:
    """What has changed of what a Service's pods run, besides its manifest."""
    files = before.code.changed(now.code) if before.code and now.code else []
    return [*files, *(["the weights"] if before.weights != now.weights else [])]
