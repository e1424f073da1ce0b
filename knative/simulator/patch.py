"""Annotations as a patch for kustomize, and the proof that it fits our manifests."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from knative.autoscaler import ScaleSpec, SpecError
from knative.autoscaler.spec import ANNOTATION_PREFIX
from knative.simulator.errors import SimulatorError

BASE = Path(__file__).parents[1] / "manifests" / "base"


class PatchError(SimulatorError):
    """A patch that cannot be used, or not be written."""


def patch(annotations: Mapping[str, str], container_concurrency: int, why: str) -> str:
    """The file. annotations: without their prefix; why: goes into its head, a line or several.

    Raises PatchError where Knative would refuse them.
    """
    named = {ANNOTATION_PREFIX + name: value for name, value in annotations.items()}
    try:
        ScaleSpec.parse(named, container_concurrency)
    except SpecError as err:
        raise PatchError(f"Knative would refuse this: {err}") from err
    lines = [
        *(f"# {line}".rstrip() for line in why.splitlines()),
        "# In a kustomization.yaml:",
        "#   patches:",
        "#     - path: this-file.yaml",
        "#       target: {group: serving.knative.dev, kind: Service}",
        "apiVersion: serving.knative.dev/v1",
        "kind: Service",
        "metadata:",
        "  name: any # the target decides",
        "spec:",
        "  template:",
        "    metadata:",
        "      annotations:",
        *(f"        {name}: {json.dumps(value)}" for name, value in named.items()),
        "    spec:",
        f"      containerConcurrency: {container_concurrency}",
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Write it. Raises PatchError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise PatchError(f"{path}: {err.strerror or err}") from None


def check(text: str) -> str | None:
    """Put the patch on our base with `kubectl kustomize`, and read what comes out as Knative would.

    Returns why that was not possible on this machine, None once it is proved. Raises PatchError if the result is not what was meant.
    """
    try:
        import yaml

        from knative.deploy.errors import KubectlError
        from knative.deploy.kubectl import Kubectl

        kubectl = Kubectl()
    except ImportError as err:
        return f"{err.name} is not installed"
    except KubectlError as err:
        return str(err)
    wanted = yaml.safe_load(text)["spec"]["template"]
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch).resolve()
        document = {
            "resources": [os.path.relpath(BASE, here)],
            "patches": [{"path": "scale.yaml", "target": {"group": "serving.knative.dev", "kind": "Service"}}],
        }
        (here / "kustomization.yaml").write_text(yaml.safe_dump(document))
        (here / "scale.yaml").write_text(text)
        try:
            rendered = list(yaml.safe_load_all(kubectl.run("kustomize", str(here))))
        except KubectlError as err:
            raise PatchError(f"the patch does not render: {err}") from err
    (template,) = (item["spec"]["template"] for item in rendered if item["kind"] == "Service" and "knative" in item["apiVersion"])
    annotations = template["metadata"]["annotations"]
    lost = [name for name, value in wanted["metadata"]["annotations"].items() if annotations.get(name) != value]
    if lost or template["spec"]["containerConcurrency"] != wanted["spec"]["containerConcurrency"]:
        raise PatchError(f"the patch does not take effect on {BASE}: {', '.join(lost) or 'containerConcurrency'}")
    try:
        ScaleSpec.parse(annotations, template["spec"]["containerConcurrency"])
    except SpecError as err:
        raise PatchError(f"with {BASE} Knative would refuse this: {err}") from err
    return None
