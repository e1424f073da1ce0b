"""A container engine for the tests of images: the one that answers, else a dockerd of our own; and what a build needs without a network.

A base image that cannot be pulled is made of Debian's packages, wheels that a build cannot fetch are fetched by our own pip.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from knative.deploy import images
from knative.deploy.errors import DeployError
from tests.support import ROOT, clean_environment, free_port, request, running, wait_until

# The Pythons that a Debian has.
SUITES = {"3.11": "bookworm", "3.13": "trixie"}
OURS = f"{sys.version_info.major}.{sys.version_info.minor}"


class NotHere(Exception):
    """What the tests need cannot be had on this machine; says why."""


@contextlib.contextmanager
def answering(folder: Path) -> Iterator[str]:
    """The path of an engine that answers: one that is running, or docker with a daemon of our own in `folder`. Raises NotHere."""
    try:
        yield images.find_engine()
        return
    except DeployError as error:
        none = str(error)
    docker, dockerd = shutil.which("docker"), shutil.which("dockerd")
    if not docker or not dockerd or os.geteuid() != 0:
        raise NotHere(f"{none}; to start one takes root and docker's daemon")
    socket = folder / "docker.sock"
    # Containers have the host's network or none: nothing is changed on the host.
    options = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", f"--host=unix://{socket}"]
    options += [f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}", f"--pidfile={folder / 'pid'}"]
    before = os.environ.get("DOCKER_HOST")
    with running([dockerd, *options], folder / "dockerd.log", os.environ) as server:
        os.environ["DOCKER_HOST"] = f"unix://{socket}"
        try:
            ask = [docker, "version"]
            wait_until(
                "dockerd", lambda: server.process.poll() is not None or not subprocess.run(ask, capture_output=True, check=False).returncode
            )
            if server.process.poll() is not None:
                raise NotHere(f"{none}; dockerd does not start: {server.said().strip().splitlines()[-1]}")
            driver = subprocess.run([docker, "info", "--format", "{{.Driver}}"], capture_output=True, text=True, check=True).stdout.strip()
            if driver == "vfs":
                raise NotHere("docker has no file system with layers here, and would copy a whole image for each step of a build")
            yield docker
        finally:
            os.environ.pop("DOCKER_HOST")
            os.environ.update({} if before is None else {"DOCKER_HOST": before})
            # It ends its containers and its containerd first.
            server.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(60)
            _unmount(folder)


def build_options(engine: str, folder: Path, url: str, requirements: Sequence[str] = ()) -> str:
    """What a build must be told here. Unless the usual base image and the indexes of packages are reached, it is told of a base image with
    our own Python, and of wheels, which are put into `folder` and found at `url`: of what our images need, and of `requirements`.
    Raises NotHere.
    """
    usual = _base(_default("PYTHON"))
    try:
        _pull(engine, usual)
        if _reaches(engine, usual, "click") and _reaches(engine, usual, "torch", "--index-url", _torch_index()):
            return "--network=host"
    except NotHere:
        pass
    try:
        _pull(engine, _base(OURS))
    except NotHere as error:
        _make(engine, _base(OURS), folder.parent / "base.tar", str(error))
    _fetch_wheels(folder, requirements)
    return f"--network=host --build-arg PYTHON={OURS} --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS={url}"


@contextlib.contextmanager
def served(folder: Path, log: Path) -> Iterator[int]:
    """A folder's files over HTTP; yields the port."""
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(folder), str(port)]
    with running(command, log, clean_environment()):
        wait_until("the server of files", lambda: request(port, "GET", "/"))
        yield port


def _base(python: str) -> str:
    return f"docker.io/library/python:{python}-slim"


def _pull(engine: str, image: str) -> None:
    if subprocess.run([engine, "image", "inspect", image], capture_output=True, check=False).returncode:
        _run([engine, "pull", image], f"{image} cannot be pulled")


def _reaches(engine: str, image: str, package: str, *options: str) -> bool:
    """Whether a build's pip finds a package, where it looks by itself or is told to."""
    pip = ["python", "-m", "pip", "--timeout=20", "--retries=0", "index", "versions", package, *options]
    return not subprocess.run([engine, "run", "--rm", "--network=host", image, *pip], capture_output=True, check=False).returncode


def _make(engine: str, image: str, archive: Path, why: str) -> None:
    if not shutil.which("mmdebstrap") or OURS not in SUITES:
        raise NotHere(f"{why}; to make one takes mmdebstrap and the Python of a Debian ({' or '.join(SUITES)})")
    # As the official image is: `python` is there, and nothing of the standard library is compiled.
    hooks = ['ln -s python3 "$1/usr/bin/python"', 'find "$1/usr/lib/python3."* -name __pycache__ -prune -exec rm -r {} +']
    hook_options = [f"--customize-hook={hook}" for hook in hooks]
    packages = "--include=python3,python3-pip,python3-venv,ca-certificates"
    _run(["mmdebstrap", "--variant=minbase", packages, *hook_options, SUITES[OURS], str(archive)], f"{why}; none can be made")
    _run([engine, "import", str(archive), image], "the base image cannot be imported")
    archive.unlink()


def _fetch_wheels(folder: Path, requirements: Sequence[str]) -> None:
    """What the images install, what makes them, and what else is asked for."""
    recipe = (ROOT / "Containerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = {extra for named in re.findall(r"'\.\[(.+?)\]'", recipe) for extra in named.split(",")}
    needs = [*requirements, *project["build-system"]["requires"], "wheel", *project["project"]["dependencies"]]
    needs += [need for extra in sorted(extras) for need in project["project"]["optional-dependencies"][extra]]
    # torch as it is installed here: another build of the same version may be CUDA's, of several GB.
    needs += [f"cyclonedx-bom=={_default('CYCLONEDX_BOM')}", f"torch=={version('torch')}"]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    _run([*download, *needs], "the builds reach no index, and wheels cannot be fetched for them")


def _default(argument: str) -> str:
    """What the Containerfile has for a build argument."""
    return _stands(rf"(?m)^ARG {argument}=(.+)$")


def _torch_index() -> str:
    """Where the Containerfile has the CPU's torch from."""
    return _stands(r"(?m)^ENV TORCH_INDEX=(.+)$")


def _stands(pattern: str) -> str:
    found = re.search(pattern, (ROOT / "Containerfile").read_text())
    assert found
    return found[1]


def _run(command: list[str], otherwise: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise NotHere(f"{otherwise}: {(done.stderr.strip() or f'{command[0]} ended with status {done.returncode}').splitlines()[-1]}")


def _unmount(folder: Path) -> None:
    """What a daemon that was killed has left mounted, the innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
