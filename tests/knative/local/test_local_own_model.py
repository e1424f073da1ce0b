"""`relight run` of an agent by its name, and of a project's folder: what is made of the words, and that it answers."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.local.content import function_env
from knative.local.errors import ManifestError, PlatformError
from knative.local.manifest import Sources
from knative.local.own_model import OwnModel
from knative.local.project import choose
from knative.local.seeds import Seed
from tests.knative.local.running import Platform, manifests
from tests.support import BIN, clean_environment, free_port, running, wait_until

# Its answer is what the file in its weights says, after what its module says.
AGENT = """
WORD = "old"

class Reader:
    def load(self, weights, device):
        self.text = WORD if weights.is_empty() else f"{WORD} {weights.path('value.txt').read_text()}"

    def predict(self, inputs):
        return [self.text for _ in inputs]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one, with an agent and saved weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reader.py").write_text(AGENT)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "value.txt").write_text("1")
    return tmp_path


def run(*words: str, seeds: tuple[Seed, ...] = (), **own: Any) -> Any:
    return choose([Path(word) for word in words], seeds, own)


@pytest.mark.parametrize(
    ("agent", "name", "expected"),
    [
        ("reader:Reader", "", "reader"),
        ("reader:MyModel", "", "my-model"),
        ("reader:HTTPModel2", "", "http-model2"),
        ("reader:snake_case", "", "snake-case"),
        ("reader:Reader", "other", "other"),
    ],
)
def test_a_service_is_called_as_its_class_or_as_it_is_said(folder: Path, agent: str, name: str, expected: str) -> None:
    model = OwnModel(agent, name=name)
    assert model.service == expected
    (service,) = model.read().services
    assert (service.name, len(service.spec.containers)) == (expected, 1)
    assert not model.seeds


def test_an_agent_gets_its_weights_its_settings_and_an_example(folder: Path) -> None:
    chosen = run("reader:Reader", weights=Path("weights"), settings={"FUNCTION_TASK": "x"}, example='{"instances": [1]}')
    (service,) = chosen.sources.read().services
    found = function_env(service)
    assert found
    assert found[1] == {
        "FUNCTION_AGENT": "reader:Reader",
        "FUNCTION_MODEL_NAME": "reader",
        "FUNCTION_TASK": "x",
        "WEIGHTS_URI": "s3://models/reader",
        "WEIGHTS_CACHE_DIR": "/var/cache/relight",
    }
    assert [container.name for container in service.spec.containers] == ["function", "weights-cache"]
    assert service.example == '{"instances": [1]}'
    assert chosen.seeds == [Seed(Path("weights"), "s3://models/reader")]
    assert not chosen.notes
    assert run("reader:Reader").notes == ["no --weights DIR: the agent gets none; there is a folder weights here"]
    with pytest.raises(ManifestError, match="found 'PORT', which Knative sets itself"):
        run("reader:Reader", settings={"PORT": "1"}).sources.read()


@pytest.mark.parametrize(
    ("words", "own", "said"),
    [
        (["lost:Reader"], {}, "there is no module 'lost'; looked in {here} and Python's own path"),
        (["reader:Reader"], {"weights": Path("nowhere")}, "--weights nowhere: there is no such directory; save the model's weights there"),
        (["reader:Reader"], {"weights": Path("empty")}, "--weights empty: holds no files"),
        (["reader:Reader"], {"weights": Path("reader.py")}, "--weights reader.py: is a file; name the directory"),
        (["reader:Reader"], {"name": "My_Model"}, "--name 'My_Model' must be small letters, digits and -"),
        (["reader:Größe"], {}, "would be called 'größe'; name it with --name"),
        (["reader:Reader"], {"example": "[1"}, "--example: is not JSON"),
        (["reader:Reader", "x.yaml"], {}, "reader:Reader: an agent is run by itself"),
        (["x.yaml"], {"weights": Path("weights")}, "--weights belongs to an agent, as in `relight run my_model:Linear --weights DIR`"),
        ([], {"settings": {"A": "b"}}, "--set belongs to an agent"),
        ([], {}, "there is no service.yaml in {here}: `relight init NAME` makes a project"),
        (["weights"], {}, "there is no service.yaml in {here}/weights: `relight init NAME` makes a project"),
        (
            ["reader.py"],
            {},
            "reader.py: is Python, and no manifest; an agent is named by its class: `relight run reader:Reader --weights DIR`",
        ),
        (["reader"], {"weights": Path("weights")}, "reader: is Python, and no manifest"),
        (["saved"], {}, "or `relight run function.agents.transformers:Pipeline --weights saved`"),
    ],
)
def test_what_cannot_be_is_said_at_once(folder: Path, words: list[str], own: Mapping[str, Any], said: str) -> None:
    (folder / "empty").mkdir()
    (folder / "saved").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "saved" / name).touch()
    with pytest.raises(PlatformError) as error:
        run(*words, **own)
    assert said.format(here=folder) in str(error.value)


@pytest.mark.parametrize(
    ("agent", "architecture", "settings", "has_example"),
    [
        ("function.agents.transformers:Chat", "", {}, True),
        ("function.agents.transformers:Pipeline", "BertForSequenceClassification", {}, True),
        ("function.agents.transformers:Pipeline", "BertForSequenceClassification", {"FUNCTION_TASK": "zero-shot-classification"}, False),
        ("function.agents.transformers:Pipeline", "BertForQuestionAnswering", {}, False),
        ("reader:Reader", "", {}, False),
    ],
)
def test_an_example_is_shown_where_it_is_known_to_be_an_input(
    folder: Path, agent: str, architecture: str, settings: Mapping[str, str], has_example: bool
) -> None:
    (folder / "weights" / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (service,) = run(agent, weights=Path("weights"), settings=settings).sources.read().services
    assert service.has_example is has_example


def project(folder: Path, uri: str = "s3://models/own") -> None:
    """A folder as `relight init` makes it, as far as it matters here: the sidecar's store is in a Secret that is not there."""
    place = [{"name": "WEIGHTS_URI", "value": uri}, {"name": "WEIGHTS_CACHE_DIR", "value": "/cache"}]
    mounts = [{"name": "cache", "mountPath": "/cache"}]
    containers: list[dict[str, Any]] = [
        {
            "name": "function",
            "command": ["python", "-m", "function"],
            "ports": [{"containerPort": 8080}],
            "env": [{"name": "FUNCTION_AGENT", "value": "reader:Reader"}, *place],
            "readinessProbe": {"httpGet": {"path": "/readyz"}},
            "volumeMounts": mounts,
        },
        {
            "name": "weights-cache",
            "command": ["python", "-m", "weights_cache", "serve"],
            "env": place,
            "envFrom": [{"secretRef": {"name": "weights-store", "optional": True}}],
            "volumeMounts": mounts,
        },
    ]
    spec = {"containers": containers, "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}}]}
    service = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "own"}, "spec": {"template": {"spec": spec}}}
    (folder / "service.yaml").write_text(manifests(service))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"kind": "Kustomization", "resources": ["service.yaml"]}))


def test_a_project_has_the_weights_that_are_saved_in_it(folder: Path) -> None:
    project(folder, "s3://models/own#0123456789abcdef0123456789abcdef")
    for words in ([], ["."], [str(folder)]):
        chosen = run(*words)
        assert isinstance(chosen.sources, Sources)
        assert [service.name for service in chosen.sources.read().services] == ["own"]
        assert [(seed.directory.resolve(), seed.uri) for seed in chosen.seeds] == [(folder / "weights", "s3://models/own")]
        assert not chosen.notes
    other = Seed(folder, "s3://models")
    assert run(seeds=(other,)).seeds == (other,)
    (folder / "weights" / "value.txt").unlink()
    unsaved = run()
    assert not unsaved.seeds
    assert "weights: holds no files; save the model's weights there first; without them s3://models/own" in unsaved.notes[0]


@contextmanager
def running_in(folder: Path, *words: str) -> Iterator[Platform]:
    """`relight run` started in a folder."""
    port, admin = free_port(), free_port()
    options = ["--port", str(port), "--admin-port", str(admin), "--no-fork-server"]
    script = ["sh", "-c", 'cd "$0" && exec "$@"', str(folder), str(BIN / "relight"), "run", *words, *options]
    with running(script, folder / "run.log", clean_environment()) as server:
        platform = Platform(server, port, admin, folder / ".relight")
        wait_until("the platform", lambda: server.process.poll() is not None or platform.status())
        yield platform


def answer(platform: Platform, name: str) -> Any:
    return platform.call(name, "/", "POST", {"instances": [0]}).json()["predictions"][0]


def test_an_agent_is_run_without_a_manifest_and_has_the_weights_that_are_there_now(folder: Path) -> None:
    words = ("reader:Reader", "--weights", "weights", "--name", "own", "--reload")
    with running_in(folder, *words) as platform:
        assert answer(platform, "own") == "old 1"
        (folder / "weights" / "value.txt").write_text("2")
        platform.wait_for("own", "the new weights", lambda found: found["revision"] == "own-00002" and not found["rollout"])
        assert answer(platform, "own") == "old 2"
    (folder / "weights" / "value.txt").write_text("3")
    with running_in(folder, *words) as platform:  # whose cache has others, complete
        assert answer(platform, "own") == "old 3"
