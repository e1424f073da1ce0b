"""The images, built and pushed by whichever container engine is here."""

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from knative.deploy.errors import DeployError
from knative.deploy.variables import Variables

ROOT = Path(__file__).parents[2]
ENGINES = ("docker", "podman")
VARIABLES = {"function": "IMAGE", "weights-cache": "WEIGHTS_IMAGE", "queue-source": "QUEUE_IMAGE"}


def names(variables: Variables) -> dict[str, str]:
    """Each target's image."""
    suffix = "-cuda" if variables.variant == "cuda" else ""
    return {
        "function": variables.image or f"relight-function:0.1.0{suffix}",
        "weights-cache": variables.weights_image or "relight-weights-cache:0.1.0",
        "queue-source": variables.queue_image or "relight-queue-source:0.1.0",
    }


def build(variables: Variables, say: Callable[[str], object]) -> None:
    """Raises DeployError if there is no engine, or a build fails."""
    engine = find_engine()
    for target, image in names(variables).items():
        say(f"building {image}")
        arguments = ["build", "--file", str(ROOT / "Containerfile"), "--target", target, "--tag", image]
        _run(engine, [*arguments, "--build-arg", f"VARIANT={variables.variant}", *shlex.split(variables.options), str(ROOT)])


def push(variables: Variables, say: Callable[[str], object]) -> None:
    """Raises DeployError if there is no engine, an image has no registry, or a push fails."""
    engine = find_engine()
    for target, image in names(variables).items():
        if "/" not in image:
            raise DeployError(f"{image} names no registry: say where to, as {VARIABLES[target]}=registry.example.com/{image}")
        say(f"pushing {image}")
        _run(engine, ["push", image])


def find_engine() -> str:
    """The first container engine that answers. Raises DeployError if none does."""
    said = []
    for engine in ENGINES:
        path = shutil.which(engine)
        if not path:
            said.append(f"{engine} is not installed")
            continue
        asked = subprocess.run([path, "info"], capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0:
            return path
        said.append(f"{engine}: {(asked.stderr.strip() or 'does not answer').splitlines()[-1]}")
    raise DeployError(f"no container engine answers: {'; '.join(said)}")


def _run(engine: str, arguments: list[str]) -> None:
    if code := subprocess.run([engine, *arguments], check=False).returncode:
        raise DeployError(f"{engine} {arguments[0]} ended with status {code}")
