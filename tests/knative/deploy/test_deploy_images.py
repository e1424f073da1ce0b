"""What images are made of and called, as far as it can be told without a container engine; tests/system/test_images.py builds them."""

import itertools
import re
from collections.abc import Iterator

import pytest
import yaml

from knative.deploy import images
from knative.deploy.errors import DeployError
from knative.deploy.render import MANIFESTS
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
