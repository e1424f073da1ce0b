"""docs/your-model.md is true: each of its blocks is typed, in order, in the folders that it names."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from knative.deploy import images
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import container, get_env, one_service
from knative.deploy.render import dump, render, set_weights
from knative.deploy.variables import Variables
from knative.project.init import make_project
from tests.knative.deploy.cluster import Cluster, serving
from tests.support import BIN, ROOT, clean_environment, free_port, request, running, wait_until
from tests.system.walks import Page

PAGE = "docs/your-model.md"
MOST_COMMANDS = 4
# Makes a tiny classifier in a folder, and prints what the library answers to a text.
TINY = """
import json, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, pipeline
folder, text = sys.argv[1:]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "delightful", "film", "."]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
labels = {"id2label": {0: "BAD", 1: "GOOD"}, "label2id": {"BAD": 0, "GOOD": 1}}
BertForSequenceClassification(BertConfig(**sizes, **labels, max_position_embeddings=32)).save_pretrained(folder)
print(json.dumps(pipeline("text-classification", model=folder)([text])))
"""


def commands(page: Page, *markers: str) -> int:
    """How many commands blocks have."""
    return sum(len(page.block(marker).strip().splitlines()) for marker in markers)


def tiny_classifier(folder: Path, text: str) -> list[dict[str, Any]]:
    """The library's own answer to a text, of a model that is made in the folder."""
    done = subprocess.run([sys.executable, "-c", TINY, folder, text], env=clean_environment(), capture_output=True, text=True, check=True)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_a_torch_module_answers_from_an_empty_folder_in_four_commands(tmp_path: Path) -> None:
    page = Page(PAGE, tmp_path / "flowers")
    page.folder.mkdir()
    assert commands(page, "torch: to the first answer", "torch: ask") <= MOST_COMMANDS
    with page.serving("torch: to the first answer", "--no-fork-server") as server:
        answer = json.loads(page.run("torch: ask"))
        tensors = load_file(page.folder / "weights/model.safetensors")
        hidden = np.maximum(tensors["layers.0.weight"] @ np.ones(2, np.float32) + tensors["layers.0.bias"], 0)
        assert answer["predictions"] == pytest.approx(tensors["layers.2.weight"] @ hidden + tensors["layers.2.bias"], rel=1e-5)
        refused = request(server.port, "POST", "/", {"instances": [[1, 2, 3]]})
        assert (refused.status, refused.json()["error"]["message"]) == (400, "each instance must have 2 numbers")


@pytest.mark.soak
def test_a_model_of_transformers_answers_as_the_library_does_in_four_commands(tmp_path: Path) -> None:
    page = Page(PAGE, tmp_path / "films")
    page.folder.mkdir()
    assert commands(page, "transformers: to the first answer", "transformers: ask") <= MOST_COMMANDS
    expected = tiny_classifier(tmp_path / "my-classifier", "A delightful film.")
    with page.serving("transformers: to the first answer"):
        assert json.loads(page.run("transformers: ask")) == {"predictions": expected}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The folder of the torch walk, its weights saved."""
    folder = tmp_path / "flowers"
    make_project(folder, "torch")
    (folder / "weights").mkdir()
    save_file({"a": np.ones(2, np.float32)}, folder / "weights/model.safetensors")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which an S3 server is found that has the bucket."""
    port = free_port()
    with running(
        [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)], tmp_path / "moto.log", clean_environment()
    ):
        wait_until("the S3 server", lambda: request(port, "GET", "/"))
        assert request(port, "PUT", "/models").status == 200
        names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        yield names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A file with what a container engine was told, which is in a folder of programs beside it."""
    told, program = tmp_path / "told", tmp_path / "bin/docker"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" >> {told}\n')
    program.chmod(0o755)
    return told


def set_names(page: Page) -> dict[str, str]:
    """The page's, written into the Makefile as a person does."""
    names = dict(line.split(" ?= ") for line in page.block("names").splitlines())
    makefile = page.folder / "Makefile"
    text = makefile.read_text()
    for name, value in names.items():
        text, count = re.subn(rf"(?m)^({name} \?=).*$", rf"\1 {value}", text)
        assert count == 1, name
    makefile.write_text(text)
    assert names["WEIGHTS_IMAGE"].endswith(f":{images.version()}")
    return names


@pytest.mark.soak
def test_the_rest_of_the_page_brings_a_project_to_a_cluster_and_back(
    project: Path, store: dict[str, str], engine: Path, tmp_path: Path
) -> None:
    cluster = Cluster()
    cluster.add("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}})
    cluster.config("config-autoscaler")
    page = Page(PAGE, project, **store)
    page.environment["PATH"] = f"{engine.parent / 'bin'}:{page.environment['PATH']}"

    recipe = (project / "Containerfile").read_text().splitlines()
    assert [line for line in recipe if not line.startswith(("#", "ARG PIP"))] == page.block("file: Containerfile").splitlines()
    names = set_names(page)
    page.run("build")
    assert f"build --tag {names['IMAGE']} --build-arg BASE=relight-function:" in engine.read_text()

    page.run("render")
    variables = Variables.parse([f"ENV={project}", *(f"{name}={value}" for name, value in names.items())])
    rendered = (project / "rendered.yaml").read_text()
    assert rendered == dump(render(variables, Kubectl()))
    for item in yaml.safe_load_all((project / "cluster.yaml").read_text()):  # all that the cluster allows
        if item["kind"] == "ConfigMap":
            cluster.add("configmaps", item, "knative-serving")

    pushed = page.run("push weights").strip().splitlines()[-1]
    assert re.fullmatch(r"s3://models/flowers#[0-9a-f]{32}", pushed)
    with serving(cluster, tmp_path) as kubeconfig:
        page.environment |= kubeconfig
        said = page.run("deploy")
        assert f"weights: {pushed}" in said
        assert re.search(r"flowers: ready at \S+ \(flowers-00001\)", said)
        expected = one_service(list(yaml.safe_load_all(rendered)))
        set_weights(expected, pushed)
        assert cluster.service("flowers", "models")["spec"]["template"] == expected["spec"]["template"]
        page.run("roll back")
        assert cluster.service("flowers", "models")["spec"]["traffic"] == [{"revisionName": "flowers-00001", "percent": 100}]
        assert "note: callers go to flowers-00001, which spec.traffic names" in page.run(
            "deploy", {"make deploy": "make deploy IMAGE=registry.internal/flowers:2"}
        )
        page.run("roll forward")
        assert cluster.service("flowers", "models")["spec"]["traffic"] == [{"latestRevision": True, "percent": 100}]


def test_an_agent_without_a_project_is_built_and_rendered_from_the_checkout(tmp_path: Path, engine: Path) -> None:
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear/my_model.py").touch()
    page = Page(PAGE, ROOT)
    page.environment["PATH"] = f"{engine.parent / 'bin'}:{page.environment['PATH']}"
    # `setup` has been done, whatever `make` would think of the files' times.
    said = page.run("without a project", {"make ": f"make --old-file=.venv/installed BIN={BIN} ", "../linear": str(tmp_path / "linear")})
    documents = said[said.index("apiVersion:") :]
    service = one_service(list(yaml.safe_load_all(documents)))
    function = container(service, "function")
    assert (get_env(function, "FUNCTION_AGENT"), function["image"]) == ("my_model:Linear", "registry.internal/linear:1")
    assert "build --tag registry.internal/linear:1 --build-arg BASE=relight-function:" in engine.read_text()
