"""The images, built and pushed by whichever container engine is here."""

import os
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

from knative.deploy.errors import DeployError
from knative.deploy.variables import Variables

ROOT = Path(__file__).parents[2]
ENGINES = ("docker", "podman")
ANSWER_S = 60.0  # for an engine to say how it is
VARIABLES = {"function": "IMAGE", "weights-cache": "WEIGHTS_IMAGE", "queue-source": "QUEUE_IMAGE"}
SBOM = "/opt/relight/sbom.cdx.json"  # in each image: what is installed in it, as CycloneDX


def version() -> str:
    """Of the sources that images are built from."""
    number: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return number


def names(variables: Variables) -> dict[str, str]:
    """Each target's image."""
    suffix = "-cuda" if variables.variant == "cuda" else ""
    return {
        "function": variables.image or f"relight-function:{version()}{suffix}",
        "weights-cache": variables.weights_image or f"relight-weights-cache:{version()}",
        "queue-source": variables.queue_image or f"relight-queue-source:{version()}",
    }


def build(variables: Variables, say: Callable[[str], object]) -> None:
    """Raises DeployError if there is no engine, or a build fails, or an SBOM cannot be written."""
    engine = find_engine()
    for target, image in names(variables).items():
        say(f"building {image}")
        _run(engine, build_arguments(target, image, variables))
        if variables.sbom:
            path = variables.sbom / f"{target}.cdx.json"
            try:
                variables.sbom.mkdir(parents=True, exist_ok=True)
                path.write_bytes(sbom(engine, image))
            except OSError as error:
                raise DeployError(f"SBOM={variables.sbom}: {error.strerror}") from error
            say(f"wrote {path}")


def build_arguments(target: str, image: str, variables: Variables) -> list[str]:
    """Of the engine, to build one image. What it is made of and when comes from git, or from SOURCE_DATE_EPOCH, where there is either."""
    arguments = ["build", "--file", str(ROOT / "Containerfile"), "--target", target, "--tag", image]
    arguments += ["--build-arg", f"VARIANT={variables.variant}", "--label", f"org.opencontainers.image.version={version()}"]
    if revision := _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"):
        arguments += ["--label", f"org.opencontainers.image.revision={revision}"]
    if epoch := os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct"):
        arguments += ["--build-arg", f"SOURCE_DATE_EPOCH={epoch}"]
    return [*arguments, *shlex.split(variables.options), str(ROOT)]


def sbom(engine: str, image: str) -> bytes:
    """An image's own list of what is installed in it. Raises DeployError if it has none."""
    done = subprocess.run([engine, "run", "--rm", "--network", "none", image, "cat", SBOM], capture_output=True, check=False)
    if done.returncode:
        raise DeployError(f"{image} has no SBOM: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def push(variables: Variables, say: Callable[[str], object]) -> None:
    """All but a queue source that nobody named. Raises DeployError if there is no engine, an image has no registry, or a push fails."""
    wanted = {target: image for target, image in names(variables).items() if target != "queue-source" or variables.queue_image}
    for target, image in wanted.items():
        if "/" not in image:
            raise DeployError(f"{image} names no registry: say where to, as {VARIABLES[target]}=registry.example.com/{image}")
    engine = find_engine()
    for image in wanted.values():
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
        try:
            asked = subprocess.run([path, "info"], capture_output=True, text=True, timeout=ANSWER_S, check=False)
        except subprocess.TimeoutExpired:
            said.append(f"{engine}: no answer within {ANSWER_S:g} s")
            continue
        if asked.returncode == 0:
            return path
        said.append(f"{engine}: {(asked.stderr.strip() or 'does not answer').splitlines()[-1]}")
    raise DeployError(f"no container engine answers: {'; '.join(said)}")


def _run(engine: str, arguments: list[str]) -> None:
    if code := subprocess.run([engine, *arguments], check=False).returncode:
        raise DeployError(f"{engine} {arguments[0]} ended with status {code}")


def _git(*arguments: str) -> str:
    """What git says of our sources; nothing where they are no checkout, or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
