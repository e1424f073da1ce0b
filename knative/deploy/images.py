"""The images, built and pushed by whichever container engine is here."""

import os
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from knative.deploy import pullable
from knative.deploy.errors import DeployError, VariableError
from knative.deploy.variables import Variables

ROOT = Path(__file__).parents[2]  # of our sources, if this is no installed package
CONTAINERFILES = ("Containerfile", "Dockerfile")
REQUIREMENTS = "requirements.txt"
# What is in many a folder with an agent, and no part of its code.
_WEIGHTS = ("weights", *(f"*.{kind}" for kind in ("safetensors", "gguf", "bin", "onnx", "onnx.data", "onnx_data", "pt", "pth", "ckpt")))
_SECRET = ("*.pem", "*.key", "*.p12", "id_rsa", "id_ed25519", "credentials", "credentials.json", "kubeconfig*")
_NO_CODE = (".*", "__pycache__", "*.egg-info", "build", "dist", *_WEIGHTS, *_SECRET)
_IGNORE = (".dockerignore", ".containerignore")  # of an engine
_VENV = "pyvenv.cfg"  # in each virtual environment, whatever its name
_MOST_NAMED = 6
_MOST_FILES, _MOST_BYTES = 20_000, 1 << 30  # of an agent's code
ENGINES = ("docker", "podman")
ANSWER_S = 60.0  # for an engine to say how it is
VARIABLES = {"function": "IMAGE", "weights-cache": "WEIGHTS_IMAGE", "queue-source": "QUEUE_IMAGE"}
SBOM = "/opt/relight/sbom.cdx.json"  # in each image: what is installed in it, as CycloneDX


def version() -> str:
    """Of the sources that images are built from, or of the package where there are none."""
    if not _has_sources():
        return metadata.version("relight")
    number: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return number


def _has_sources() -> bool:
    return (ROOT / "Containerfile").is_file()


def names(variables: Variables) -> dict[str, str]:
    """Each target's image."""
    suffix = "-cuda" if variables.variant == "cuda" else ""
    return {
        "function": variables.image or f"relight-function:{version()}{suffix}",
        "weights-cache": variables.weights_image or f"relight-weights-cache:{version()}",
        "queue-source": variables.queue_image or f"relight-queue-source:{version()}",
    }


def build(variables: Variables, say: Callable[[str], object]) -> None:
    """Ours; with AGENT_DIR the image of the agent in that folder, and what of ours it stands on and is not here yet.

    Raises DeployError if there is no engine, or a build fails, or an SBOM cannot be written.
    """
    if variables.agent_dir:
        _build_agent(variables.agent_dir, variables, say)
        return
    if not _has_sources():
        raise DeployError(f"there are no sources of Relight here to build images from, but those of the installed package: {ROOT}")
    engine = find_engine()
    for target, image in names(variables).items():
        _build(engine, target, image, variables, say)


def _build(engine: str, target: str, image: str, variables: Variables, say: Callable[[str], object]) -> None:
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


def _build_agent(folder: Path, variables: Variables, say: Callable[[str], object]) -> None:
    """The image of an agent, on top of ours."""
    ours = names(replace(variables, image=variables.base_image))
    base = ours["function"]
    if not variables.image or variables.image == base:
        raise VariableError("AGENT_DIR", folder, f"name its image, IMAGE=registry/path:tag, which is another than {base}")
    engine = find_engine()
    if not _is_here(engine, base):
        if variables.base_image:
            say(f"{base} is not here yet; {Path(engine).name} fetches it")
        elif _has_sources():
            _build(engine, "function", base, variables, say)
        else:
            raise DeployError(f"{base} is not here, nor the sources that it is made of: name Relight's function image with BASE_IMAGE=")
    if _has_sources() and not _is_here(engine, ours["weights-cache"]):
        _build(engine, "weights-cache", ours["weights-cache"], variables, say)
    say(f"building {variables.image} from {folder}")
    for note in _notes(folder):
        say(f"note: {note}")
    with _context(folder, base) as arguments:
        own = ["--tag", variables.image, "--build-arg", f"BASE={base}", *shlex.split(variables.options)]
        _run(engine, ["build", *own, *arguments])


@contextmanager
def _context(folder: Path, base: str) -> Iterator[list[str]]:
    """The last words of `build`: a folder's own recipe with the folder, or one made for it with what of the folder is code."""
    for name in CONTAINERFILES:
        if (folder / name).is_file():
            yield ["--file", str(folder / name), str(folder)]
            return
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "agent"
        try:
            _copy_code(folder, copy)
        except OSError as error:
            raise VariableError("AGENT_DIR", folder, f"cannot be copied for the build: {error}") from error
        (copy / CONTAINERFILES[0]).write_text(containerfile(base, has_requirements=(folder / REQUIREMENTS).is_file()))
        yield ["--file", str(copy / CONTAINERFILES[0]), str(copy)]


def _copy_code(folder: Path, copy: Path) -> None:
    """What of a folder is code, links as links. Raises VariableError for a link that leads out of it and for too much, and OSError."""
    root = folder.resolve()
    code = list(_code(folder, root))  # all of it, before anything is written
    copy.mkdir()
    for source in code:
        target = copy / source.relative_to(root)
        if source.is_dir() and not source.is_symlink():
            target.mkdir()
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _code(folder: Path, root: Path) -> Iterator[Path]:
    """The folders, files and links that are code, each behind its folder. A link to nothing is none."""
    files = size = 0
    for at, folders, names in os.walk(root, onerror=_raise):
        place = Path(at)
        left_out = _no_code(place, (*folders, *names))
        folders[:] = sorted(set(folders) - left_out)
        for path in (place / name for name in (*folders, *sorted(set(names) - left_out))):
            if path.is_symlink():
                if not path.exists():
                    continue
                if path.readlink().is_absolute() or not path.resolve().is_relative_to(root):
                    link = f"the link {path.relative_to(root)} leads to {path.readlink()}"
                    raise VariableError("AGENT_DIR", folder, f"{link}, which the image will not have: put a copy in its place")
            elif path.is_file():
                files, size = files + 1, size + path.stat().st_size
                if files > _MOST_FILES or size > _MOST_BYTES:
                    most = f"{_MOST_FILES} files or {_MOST_BYTES >> 20} MiB"
                    raise VariableError("AGENT_DIR", folder, f"has more than {most} besides weights: is it the folder of an agent?")
            elif not path.is_dir():
                continue
            yield path


def _raise(error: OSError) -> NoReturn:
    raise error


def _no_code(folder: Path, names: Iterable[str]) -> set[str]:
    """Those that are no part of an agent's code."""
    others = {name for name in names if any(fnmatch(name, kind) for kind in _NO_CODE) or (folder / name / _VENV).is_file()}
    return others - set(_IGNORE)  # which the engine goes by


def _notes(folder: Path) -> list[str]:
    """What of a folder may be in the image against its owner's will, or is not and might be missed."""
    try:
        odd = sorted(_no_code(folder, (path.name for path in folder.iterdir())) - {"__pycache__"})
    except OSError:
        return []  # the copy will say so
    if not odd:
        return []
    named = ", ".join(odd[:_MOST_NAMED]) + (", …" if len(odd) > _MOST_NAMED else "")
    if any((folder / name).is_file() for name in CONTAINERFILES):
        if any((folder / name).is_file() for name in _IGNORE):
            return []
        return [f"{folder} has no .dockerignore: {named} go to the engine too, and into the image with a `COPY . …`"]
    return [f"left out as no code: {named}; a Containerfile of your own in {folder} can copy them"]


def containerfile(base: str, *, has_requirements: bool = True) -> str:
    """The recipe of an agent's image."""
    packages = f"""\
# Its packages go into the environment that the server runs in, which is root's, and are not fetched again while these files stay the
# same. pip compiles what it installs: nothing can be compiled later, the root is read-only in a cluster.
# An index of your own: make build OPTIONS="--build-arg PIP_INDEX_URL=…"
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
COPY requirements*.txt /tmp/
RUN pip --python /opt/relight/bin/python install --no-cache-dir --root-user-action ignore --requirement /tmp/{REQUIREMENTS}
"""
    return f"""\
# Relight's function with what is in this folder: `make build` makes it.
ARG BASE={base}
FROM ${{BASE}}
USER 0
{packages if has_requirements else ""}\
# Its modules, for everybody to read and compiled too, and where the server looks for them.
COPY . /app
RUN chmod -R a+rX /app && python -m compileall -q --invalidation-mode unchecked-hash /app
ENV FUNCTION_AGENT_PATH=/app
USER 65532:65532
"""


def _is_here(engine: str, image: str) -> bool:
    return not subprocess.run([engine, "image", "inspect", image], capture_output=True, check=False).returncode


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
    """All but a queue source that nobody named; with AGENT_DIR, of what is not the agent's own what is here under the name that was said.

    Raises DeployError if there is no engine, an image has no registry or a placeholder for it, or a push fails.
    """
    wanted = {target: image for target, image in names(variables).items() if target != "queue-source" or variables.queue_image}
    if variables.agent_dir and not variables.weights_image:
        del wanted["weights-cache"]
    pullable.check((VARIABLES[target], image) for target, image in wanted.items())
    for target, image in wanted.items():
        if "/" not in image:
            raise DeployError(f"{image} names no registry: say where to, as {VARIABLES[target]}=registry.example.com/{image}")
    engine = find_engine()
    for target, image in wanted.items():
        if variables.agent_dir and target != "function" and not _is_here(engine, image):
            say(f"{image} is not here, and so not pushed")
            continue
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
