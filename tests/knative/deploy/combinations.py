"""Every allowed combination of components, rendered."""

import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from knative.deploy.agent import MANIFESTS
from knative.deploy.render import NEEDS
from tests.support import BIN

Object = dict[str, Any]
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

CACHES = (
    (),
    ("node-cache-pvc",),
    ("node-cache-agent",),
    ("node-cache-agent", "prefetch"),
    ("node-cache-agent", "gpu-resident"),
    ("node-cache-agent", "prefetch", "gpu-resident"),
)
PLACEMENTS = ((), ("realtime",), ("batch",))
OTHERS = ("gpu", "warm-pool", "rollout-in-place", "monitoring", "hpa")


def combinations(most: int = 99) -> Iterator[tuple[str, ...]]:
    """All of them, as names of components; with `most`, only those of so many choices, and those in which every choice is made."""
    free = (((), (name,)) for name in OTHERS)
    for choices in itertools.product(CACHES, PLACEMENTS, *free):
        names = tuple(itertools.chain(*choices))
        takes_gpu = any("gpu" in NEEDS.get(name, ()) for name in names)
        made = sum(map(bool, choices)) - takes_gpu
        if (not takes_gpu or "gpu" in names) and (made <= most or all(choices)):
            yield names


@dataclass(frozen=True)
class Combination:
    """What a function with these components gets, and what an administrator applies for it."""

    components: tuple[str, ...]
    objects: list[Object]
    cluster: list[Object]


def render_each(chosen: Sequence[tuple[str, ...]]) -> list[Combination]:
    """One run of kustomize for all, told apart by a prefix of their names: a run for each would take minutes."""
    functions = _render([("base", "components", names) for names in chosen])
    clusters = _render(
        [("cluster", "cluster", tuple(name for name in names if (MANIFESTS / "cluster" / name).is_dir())) for names in chosen]
    )
    return [Combination(names, functions[index], clusters[index]) for index, names in enumerate(chosen)]


def _render(choices: list[tuple[str, str, tuple[str, ...]]]) -> list[list[Object]]:
    with tempfile.TemporaryDirectory() as name:
        scratch, folders = Path(name).resolve(), []
        for index, (base, kind, names) in enumerate(choices):
            folder = scratch / f"c{index:04}"
            folder.mkdir()
            folders.append(folder.name)
            _write(
                folder,
                resources=[os.path.relpath(MANIFESTS / base, folder)],
                components=[os.path.relpath(MANIFESTS / kind / name, folder) for name in names],
                namePrefix=f"{folder.name}-",
            )
        _write(scratch, resources=folders)
        text = subprocess.run([BIN / "kubectl", "kustomize", scratch], capture_output=True, text=True, check=True).stdout
    found: list[list[Object]] = [[] for _ in choices]
    for item in yaml.load_all(text, Loader):
        prefix, _, name = item["metadata"]["name"].partition("-")
        item["metadata"]["name"] = name
        found[int(prefix[1:])].append(item)
    return found


def _write(folder: Path, **fields: Any) -> None:
    document = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **fields}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(document))
