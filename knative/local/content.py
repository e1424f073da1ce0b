"""What a Service's pods run besides what its manifest says: its agent's code, and weights of this machine."""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from knative.local.code import Code
from knative.local.launch import AGENT, AGENT_PATH, FUNCTION, WEIGHTS, Places, agent_path, declared_env, rewriter, runs
from knative.local.manifest import Service
from knative.local.seeds import Seeds

_OURS = Path(__file__).parents[2]  # where our own packages are


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
    named = [folder for text in (path, here(env.get("PYTHONPATH", ""))) for folder in text.split(os.pathsep) if folder]
    code = Code.read(env[AGENT], _unique([*named, *_own_folders(env[AGENT])])) if AGENT in env else None
    return replace(service, code=code, weights=seeds.stamp(env.get(WEIGHTS, "")))


def _own_folders(agent: str) -> Iterator[str]:
    """Where else Python finds modules that are not installed but worked on: PYTHONPATH, and packages that were installed as editable."""
    found = list(sys.path)
    module = agent.partition(":")[0].partition(".")[0]
    with suppress(ImportError, ValueError):
        if spec := importlib.util.find_spec(module):  # which does not import it
            found += [str(Path(folder).parent) for folder in spec.submodule_search_locations or ()]
            found += [str(Path(spec.origin).parent)] if spec.origin and not spec.submodule_search_locations else []
    paths = sysconfig.get_paths()
    libraries = [Path(paths[kind]).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    others = [Path(paths["scripts"]).resolve(), _OURS]
    for folder in filter(None, found):
        place = Path(folder).resolve()
        if place.is_dir() and place not in others and not any(place.is_relative_to(library) for library in libraries):
            yield folder


def _unique(folders: Iterable[str]) -> list[Path]:
    return list(dict.fromkeys(Path(folder).absolute() for folder in folders))


def changed_files(before: Service, now: Service) -> list[str]:
    """What has changed of what a Service's pods run, besides its manifest."""
    files = before.code.changed(now.code) if before.code and now.code else []
    return [*files, *(["the weights"] if before.weights != now.weights else [])]
