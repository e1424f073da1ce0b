"""What images are made of and called, as far as it can be told without a container engine; tests/system/test_images.py builds them."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from knative.deploy import images
from knative.deploy.agent import MANIFESTS
from knative.deploy.errors import DeployError
from knative.deploy.variables import Variables
from tests.support import ROOT

CONTAINERFILE = ROOT / "Containerfile"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def stage(target: str, **arguments: str) -> Iterator[str]:
    """The instructions that make a stage: of the stages below it first, arguments in their `FROM` replaced."""
    text = re.sub(r"\\\n", "", CONTAINERFILE.read_text())
    text = re.sub(r"(?m)^#.*\n", "", text)
    for body in re.split(r"(?m)^(?=FROM )", text)[1:]:
        head, *lines = body.strip().splitlines()
        words = re.sub(r"\$\{(\w+)\}", lambda found: arguments.get(found[1], found[0]), head).split()
        if words[3] == target:
            yield from stage(words[1], **arguments)
            yield from filter(None, lines)


@pytest.mark.parametrize(("variant", "index"), [("cpu", CPU_INDEX), ("cuda", "")])
def test_torch_for_the_cpu_has_an_index_of_its_own_and_for_cuda_the_ordinary_one(variant: str, index: str) -> None:
    lines = list(stage("function-packages", VARIANT=variant))
    assert [line for line in lines if "TORCH_INDEX=" in line] == [f"ENV TORCH_INDEX={index}"]
    (install,) = [line for line in lines if '"torch==' in line]
    # Nothing else names an index: without TORCH_INDEX there is no option.
    assert re.findall(r"\S*index-url.*?\}", install) == ['${TORCH_INDEX:+--index-url "${TORCH_INDEX}']


def test_the_version_is_the_projects_and_the_overlays_name_what_make_build_makes() -> None:
    for variant, overlays in {"cpu": ("default", "keda"), "cuda": ("gpu",)}.items():
        made = {image.split(":")[0]: image.split(":")[1] for image in images.names(Variables(variant=variant)).values()}
        assert made["relight-weights-cache"] == images.version()
        for overlay in overlays:
            kustomization = yaml.safe_load((MANIFESTS / "overlays" / overlay / "kustomization.yaml").read_text())
            named = {image["name"]: image["newTag"] for image in kustomization["images"]}
            assert named == {name: tag for name, tag in made.items() if name in named}
            assert {"relight-function", "relight-weights-cache"} <= set(named)


def test_a_build_is_told_its_version_its_revision_and_how_old_its_files_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    arguments = images.build_arguments("function", "example/function:1", Variables(variant="cuda", options="--build-arg 'A=b c'"))
    told = dict(itertools.pairwise(arguments))
    assert (told["--target"], told["--tag"]) == ("function", "example/function:1")
    given = [value for option, value in itertools.pairwise(arguments) if option in ("--build-arg", "--label")]
    revision = [value for value in given if value.startswith("org.opencontainers.image.revision=")]
    assert [value for value in given if value not in revision] == [
        "VARIANT=cuda",
        f"org.opencontainers.image.version={images.version()}",
        "SOURCE_DATE_EPOCH=1700000000",
        "A=b c",
    ]
    assert all(re.fullmatch(r"\S+=[0-9a-f]{40}(-dirty)?", value) for value in revision)
    assert len(revision) == (ROOT / ".git").exists()


def test_an_image_that_there_is_not_has_no_list_of_its_packages() -> None:
    with pytest.raises(DeployError, match="nobody/nothing:1 has no SBOM: "):
        images.sbom("false", "nobody/nothing:1")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the only container engine there is was told: it takes $SECONDS for `info`, ends a `push` with $STATUS, has the images that are
    named in $HAS, and tells what is in a folder that it builds from.
    """
    folder, told = tmp_path / "bin", tmp_path / "told"
    folder.mkdir()
    told.touch()
    lines = [
        "#!/bin/sh",
        f'echo "$*" >> {told}',
        'if [ "$1" = push ]; then exit "${STATUS:-0}"; fi',
        'if [ "$1" = info ]; then exec /bin/sleep "${SECONDS:-0}"; fi',
        'if [ "$1" = image ]; then case " $HAS " in *" $3 "*) exit 0;; *) exit 1;; esac; fi',
        f'if [ "$1" = build ]; then for last; do :; done; echo $(/bin/ls -A "$last") >> {told}; fi',
    ]
    (folder / "docker").write_text("\n".join(lines))
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return told


NAMED = Variables(image="r.example.com/function:1", weights_image="r.example.com/weights:1")


def test_what_is_named_is_pushed_and_a_queue_source_only_if_it_is(engine: Path) -> None:
    said: list[str] = []
    images.push(NAMED, said.append)
    assert said == ["pushing r.example.com/function:1", "pushing r.example.com/weights:1"]
    images.push(replace(NAMED, queue_image="r.example.com/queue:1"), said.append)
    pushes = [line for line in engine.read_text().splitlines() if line.startswith("push")]
    assert pushes == [f"push r.example.com/{name}:1" for name in ("function", "weights", "function", "weights", "queue")]


OURS = " ".join(images.names(Variables()).values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An agent and what else is in such a folder."""
    found = tmp_path / "agent"
    for place in (
        "my_model.py",
        "words/__init__.py",
        "weights/model.safetensors",
        ".venv/pyvenv.cfg",
        "env/pyvenv.cfg",
        "tls.key",
        "requirements.txt",
    ):
        (found / place).parent.mkdir(parents=True, exist_ok=True)
        (found / place).touch()
    return found


def builds(engine: Path) -> list[str]:
    """What was built, and below each the files that it was built from."""
    return [line for line in engine.read_text().splitlines() if not line.startswith(("info", "image"))]


def test_an_agents_image_stands_on_ours_and_has_its_code_alone(engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAS", OURS)
    said: list[str] = []
    images.build(Variables(agent_dir=folder, image="example/mine:1", options="--network=host"), said.append)
    assert said == [
        f"building example/mine:1 from {folder}",
        f"note: left out as no code: .venv, env, tls.key, weights; a Containerfile of your own in {folder} can copy them",
    ]
    build, content = builds(engine)
    base = images.names(Variables())["function"]
    assert build.startswith(f"build --tag example/mine:1 --build-arg BASE={base} --network=host --file ")
    assert content.split() == ["Containerfile", "my_model.py", "requirements.txt", "words"]


def test_links_in_an_agents_folder_stay_links_and_lead_nowhere_else(
    engine: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed, two of them to the folder that they are in would make 2^40 folders."""
    monkeypatch.setenv("HAS", OURS)
    variables = Variables(agent_dir=folder, image="example/mine:1")
    for name, target in {"a": ".", "b": ".", "other.py": "my_model.py", "gone": "nowhere"}.items():
        (folder / name).symlink_to(target)
    images.build(variables, print)
    assert builds(engine)[1].split() == ["Containerfile", "a", "b", "my_model.py", "other.py", "requirements.txt", "words"]
    for outside in (tmp_path, "..", folder / "my_model.py"):
        (folder / "a").unlink()
        (folder / "a").symlink_to(outside)
        with pytest.raises(DeployError, match=f"the link a leads to {outside}, which the image will not have"):
            images.build(variables, print)


@pytest.mark.parametrize(("bound", "value"), [("_MOST_FILES", 2), ("_MOST_BYTES", 10)])
def test_more_than_an_agents_code_is_not_copied(
    engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setenv("HAS", OURS)
    monkeypatch.setattr(images, bound, value)
    (folder / "words/__init__.py").write_text("#" * 11)
    with pytest.raises(DeployError, match=r"has more than .* besides weights: is it the folder of an agent"):
        images.build(Variables(agent_dir=folder, image="example/mine:1"), print)
    assert not builds(engine)


def test_a_folders_own_recipe_is_taken_and_the_image_that_it_stands_on_may_be_named(
    engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "Dockerfile").touch()
    monkeypatch.setenv("HAS", OURS)
    said: list[str] = []
    images.build(Variables(agent_dir=folder, image="example/mine:1", base_image="example/function:2"), said.append)
    assert said[0] == "example/function:2 is not here yet; docker fetches it"
    assert said[-1] == (
        f"note: {folder} has no .dockerignore: .venv, env, tls.key, weights go to the engine too, and into the image with a `COPY . …`"
    )
    assert builds(engine)[0] == f"build --tag example/mine:1 --build-arg BASE=example/function:2 --file {folder}/Dockerfile {folder}"
    (folder / ".dockerignore").touch()
    said.clear()
    images.build(Variables(agent_dir=folder, image="example/mine:1", base_image="example/function:2"), said.append)
    assert not [line for line in said if line.startswith("note")]


def test_what_of_ours_is_not_here_yet_is_built_before_an_agents_image(engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAS", "")
    images.build(Variables(agent_dir=folder, image="example/mine:1", variant="cuda"), print)
    made = [re.findall(r"--tag (\S+)", line)[0] for line in builds(engine) if line.startswith("build")]
    assert made == [f"relight-function:{images.version()}-cuda", f"relight-weights-cache:{images.version()}", "example/mine:1"]
    monkeypatch.setattr(images, "ROOT", folder)  # as of a package that was installed
    with pytest.raises(DeployError, match=f"relight-function:{images.version()} is not here, nor the sources .* BASE_IMAGE="):
        images.build(Variables(agent_dir=folder, image="example/mine:1"), print)


def test_an_agents_image_has_a_name_of_its_own(folder: Path) -> None:
    for image in (None, images.names(Variables())["function"]):
        with pytest.raises(
            DeployError, match=r"AGENT_DIR=\S+: name its image, IMAGE=registry/path:tag, which is another than relight-function"
        ):
            images.build(Variables(agent_dir=folder, image=image), print)


def test_a_recipe_without_requirements_installs_nothing_and_ends_as_nobody() -> None:
    without = images.containerfile("base:1", has_requirements=False).splitlines()
    assert [line.split()[0] for line in without if not line.startswith("#")] == ["ARG", "FROM", "USER", "COPY", "RUN", "ENV", "USER"]
    assert (without[-2], without[-1]) == ("ENV FUNCTION_AGENT_PATH=/app", "USER 65532:65532")
    assert set(without) < set(images.containerfile("base:1").splitlines())


def test_with_an_agents_image_a_sidecar_that_is_not_here_is_not_pushed(engine: Path, folder: Path) -> None:
    said: list[str] = []
    images.push(replace(NAMED, agent_dir=folder), said.append)
    assert said == ["pushing r.example.com/function:1", "r.example.com/weights:1 is not here, and so not pushed"]


def test_nothing_is_pushed_while_one_image_names_no_registry(engine: Path) -> None:
    with pytest.raises(DeployError, match=r"relight-weights-cache:\S+ names no registry: say where to, as WEIGHTS_IMAGE="):
        images.push(Variables(image=NAMED.image), print)
    with pytest.raises(DeployError, match=r"QUEUE_IMAGE=registry.example.com/queue:1: registry.example.com is a placeholder"):
        images.push(replace(NAMED, queue_image="registry.example.com/queue:1"), print)
    assert engine.read_text() == ""


def test_a_push_that_fails_is_told(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATUS", "3")
    with pytest.raises(DeployError, match="docker push ended with status 3"):
        images.push(NAMED, print)


def test_without_an_engine_that_answers_each_is_told_with_its_reason(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "ANSWER_S", 0.5)
    monkeypatch.setenv("SECONDS", "60")
    with pytest.raises(DeployError, match=r"no container engine answers: docker: no answer within 0.5 s; podman is not installed"):
        images.find_engine()


def test_there_is_one_base_image_and_its_digest_can_be_said() -> None:
    recipe = CONTAINERFILE.read_text()
    stages = re.findall(r"(?m)^FROM (\S+) AS (\S+)$", recipe)
    names = {name for _, name in stages}
    foreign = {image for image, _ in stages if image.replace("${VARIANT}", "cpu") not in names}
    assert foreign == {"docker.io/library/python:${PYTHON}-slim${PYTHON_DIGEST}"}
    assert re.search(r"(?m)^ARG PYTHON_DIGEST=$", recipe)
