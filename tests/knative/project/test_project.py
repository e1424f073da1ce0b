"""`relight init`: what it writes and what it refuses. That the folders answer is tested with docs/your-model.md."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from knative.deploy import agent
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import container, containers, get_env, one_service
from knative.deploy.render import render
from knative.deploy.variables import Variables
from knative.project.cli import init
from knative.project.example import put_example
from knative.project.files import KINDS
from knative.project.init import make_project
from tests.support import BIN, ROOT, clean_environment
from tests.system.walks import Page

STYLE = ["--isolated", "--line-length", "140", "--select", "B,E,F,SIM,UP,W"]


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of each kind, by the kind's name."""
    folder = tmp_path_factory.mktemp("projects")
    for kind in KINDS:
        make_project(folder / f"my-{kind}", kind)
    return folder


def run(folder: Path, *words: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(init, words)


def test_a_new_folder_has_the_functions_name_everywhere_and_says_what_is_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "wild-flowers", "--from", "transformers", monkeypatch=monkeypatch)
    assert (done.exit_code, done.stdout.splitlines()) == (
        0,
        [
            "wild-flowers: A model of Hugging Face's transformers, served by Relight without code.",
            "  cd wild-flowers",
            "  python save_weights.py NAME-OR-FOLDER   # writes weights/",
            "  relight run                             # serves it at http://127.0.0.1:8080/, and goes to zero when nobody calls",
            "  relight invoke wild-flowers             # in another terminal: the first answer",
            "README.md there has the way to a cluster.",
        ],
    )
    made = {path.relative_to(tmp_path / "wild-flowers"): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"service.yaml", "Containerfile", ".github/workflows/ci.yaml", "test_function.py"} <= {str(path) for path in made}
    for path, text in made.items():
        assert "minilm" not in text.lower(), path
        assert not {"@NAME@", "@VERSION@", "@OUTPUT@", "@SOURCE@"} & set(text.split()), path


def test_without_a_name_this_folder_is_the_project_and_what_is_hidden_in_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flowers"
    (folder / ".git").mkdir(parents=True)
    done = run(folder, monkeypatch=monkeypatch)
    assert (done.exit_code, "cd flowers" in done.stdout) == (0, False)
    assert yaml.safe_load((folder / "service.yaml").read_text())["metadata"]["name"] == "flowers"


@pytest.mark.parametrize(
    ("name", "there", "reason"),
    [
        ("Flowers", None, "NAME=Flowers: must be a label: small letters, digits and -, a letter first, at most 63"),
        ("my/flowers", None, "my/flowers: name the function alone; its folder is made here"),
        ("flowers", "flowers/notes.txt", "is not empty (notes.txt): nothing was written"),
        ("flowers", "flowers/.gitignore", "is not empty (.gitignore): nothing was written"),
        ("flowers", "flowers", "flowers: File exists"),
    ],
)
def test_a_name_that_cannot_be_and_a_folder_with_something_in_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: str | None, reason: str
) -> None:
    if there:
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, name, monkeypatch=monkeypatch)
    assert (done.exit_code, reason in done.stderr) == (1, True), done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_project_is_an_overlay_with_its_own_agent_and_weights(projects: Path) -> None:
    for kind, about in KINDS.items():
        variables = Variables(env=str(projects / f"my-{kind}"), namespace="models", image="r.example.com/mine:1")
        objects = render(variables, Kubectl())
        agent.check(variables, objects)
        service = one_service(objects)
        function, sidecar = (container(service, name) for name in ("function", "weights-cache"))
        assert {item["metadata"]["namespace"] for item in objects} == {"models"}
        assert (get_env(function, "FUNCTION_AGENT"), get_env(function, "FUNCTION_MODEL_NAME")) == (about.agent, f"my-{kind}")
        assert {get_env(one, "WEIGHTS_URI") for one in (function, sidecar)} == {f"s3://models/my-{kind}"}


def test_an_example_that_fits_the_model_is_put_in_the_place_of_the_first_one_alone(
    projects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = tmp_path / "service.yaml"
    before = (projects / "my-onnx/service.yaml").read_text()
    service.write_text(before)
    put_example({"instances": [["it's", 1]]}, service)
    assert service.read_text() == before.replace("'{\"instances\": [[1.0, 1.0]]}'", "'{\"instances\": [[\"it''s\", 1]]}'")
    assert yaml.safe_load(service.read_text())["metadata"]["annotations"]["relight/example"] == '{"instances": [["it\'s", 1]]}'
    assert capsys.readouterr().out.startswith("its example is in ")
    again = service.read_text()
    put_example({"instances": [["it's", 1]]}, service)
    assert capsys.readouterr().out == ""
    put_example({"instances": [[2]]}, service)
    put_example({"instances": [[2]]}, tmp_path / "none.yaml")
    assert capsys.readouterr().out == 'a request for this model: {"instances": [[2]]}\n' * 2
    assert service.read_text() == again


@pytest.mark.soak
def test_the_agents_test_does_not_know_its_names(tmp_path: Path) -> None:
    """Another class, another width: what says so is service.yaml."""
    folder = tmp_path / "flowers"
    make_project(folder, "torch")
    for name, replaced in {
        "agent.py": {"class Agent": "class Flower", "FEATURES": "WIDTH", "WIDTH = 2": "WIDTH = 3"},
        "service.yaml": {"agent:Agent": "agent:Flower", "[[1.0, 1.0]]": "[[1.0, 2.0, 3.0]]"},
    }.items():
        text = (folder / name).read_text()
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    env = clean_environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    command = [str(BIN / "python"), "-m", "pytest", "-q", "test_agent.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert "4 passed" in done.stdout, done.stdout


def test_a_project_passes_on_what_its_makefile_names_and_refuses_an_overlay_of_ours(projects: Path) -> None:
    folder = projects / "my-torch"

    def make(*words: str) -> "subprocess.CompletedProcess[str]":
        env = clean_environment(PATH=f"{BIN}:/usr/local/bin:/usr/bin:/bin")
        return subprocess.run(["make", "--no-print-directory", *words], cwd=folder, env=env, capture_output=True, text=True, check=False)

    names = ("NAMESPACE=models", "IMAGE=r.example.com/mine:1", "WEIGHTS_IMAGE=r.example.com/weights:1", "QUEUE_IMAGE=r.example.com/queue:1")
    done = make("render", *names, "EVENTS=amqp")
    objects = list(yaml.safe_load_all(done.stdout))
    assert {item["metadata"]["namespace"] for item in objects} == {"models"}
    images = {one["name"]: one["image"] for one in containers(objects)}
    assert (done.stderr, images["queue-source"]) == ("", "r.example.com/queue:1")
    refused = make("render", "ENV=gpu")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "ENV=gpu: names an overlay of Relight's own, which serves the demo" in refused.stderr


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["yamllint", "--strict", "--config-file", str(ROOT / ".yamllint"), "."], id="yamllint"),
        pytest.param(["hadolint", *(f"my-{kind}/Containerfile" for kind in KINDS)], id="hadolint"),
        pytest.param(["ruff", "check", *STYLE, "."], id="ruff"),
        pytest.param(["ruff", "format", "--check", "--isolated", "--line-length", "140", "."], id="format"),
    ],
)
def test_the_linters_have_nothing_to_say(projects: Path, command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=projects, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_ci_calls_what_the_makefile_has(projects: Path) -> None:
    for kind in KINDS:
        folder = projects / f"my-{kind}"
        jobs = yaml.safe_load((folder / ".github/workflows/ci.yaml").read_text())["jobs"]
        commands = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"]).split()
        called = {commands[index + 1] for index, word in enumerate(commands) if word == "make"}
        assert called == {"test", "render", "build", "deploy"}
        subprocess.run(["make", "--dry-run", *sorted(called)], cwd=folder, check=True, capture_output=True)


def test_the_projects_own_test_passes_with_a_fake_agent_and_finds_a_misspelt_setting(projects: Path) -> None:
    """Typed as the page has it."""
    page = Page("docs/your-model.md", projects / "my-transformers", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert "2 passed" in page.run("test")
    manifest = page.folder / "service.yaml"
    manifest.write_text(manifest.read_text().replace("FUNCTION_DEVICE", "FUNCTION_DEVISE"))
    with pytest.raises(AssertionError, match=re.escape("did you mean FUNCTION_DEVICE?")):
        page.run("test")


def test_templates_belong_to_the_package() -> None:
    """What `pip install` brings can make projects, too."""
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["knative"]
    templates = [path for path in (ROOT / "knative/project/templates").rglob("*") if path.is_file()]
    assert {path.suffix for path in templates} == {".txt"}
    assert "project/templates/**/*.txt" in package
