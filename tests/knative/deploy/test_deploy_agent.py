"""An agent of one's own on the command line: where what is said of it goes, and what cannot belong together."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from knative.deploy import agent, images, pullable
from knative.deploy.agent import MANIFESTS
from knative.deploy.errors import DeployError, VariableError
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import Object, container, containers, get_env, one_service, pod_spec, set_env
from knative.deploy.render import render, render_cluster
from knative.deploy.variables import Variables
from tests.support import BIN, ROOT, clean_environment

OWN = ["NAME=linear", "IMAGE=r.example.com/linear:1", "WEIGHTS_URI=s3://models/linear", "AGENT=my_model:Linear"]
MINILM = "function.agents.minilm:MiniLM"


def base(name: str = "minilm", **settings: str) -> Object:
    """The base's Service by another name, with more in its function's environment."""
    service: Object = yaml.safe_load((MANIFESTS / "base/service.yaml").read_text())
    service["metadata"]["name"] = name
    for key, value in settings.items():
        set_env(container(service, "function"), key, value)
    return service


def rendered(*words: str) -> list[Object]:
    return render(Variables.parse(words), Kubectl())


def test_all_that_is_said_of_an_agent_is_in_its_service() -> None:
    example = '{"instances": [[1, "a \'b\' $c"]]}'
    words = [*OWN, f"EXAMPLE={example}", "DEVICE=cuda:1", "SET_FUNCTION_TASK=a b='c'", "SET_WEIGHTS_REVALIDATE=before", "SET_MY_PLACE=here"]
    service = one_service(rendered(*words))
    function, sidecar = (container(service, name) for name in ("function", "weights-cache"))
    assert service["metadata"]["annotations"] == {"relight/example": example}
    told = {
        name: get_env(function, name) for name in ("FUNCTION_AGENT", "FUNCTION_MODEL_NAME", "FUNCTION_DEVICE", "FUNCTION_TASK", "MY_PLACE")
    }
    assert list(told.values()) == ["my_model:Linear", "linear", "cuda:1", "a b='c'", "here"]
    assert [get_env(one, "WEIGHTS_REVALIDATE") for one in (function, sidecar)] == ["before", "before"]  # the two read it alike
    assert get_env(sidecar, "MY_PLACE") is None


def test_the_demos_example_stays_with_the_demo() -> None:
    service = base()
    agent.put(Variables(agent=MINILM), service)
    assert service["metadata"]["annotations"]["relight/example"] == agent.demo().example
    agent.put(Variables(agent="my_model:Linear"), service)
    assert service["metadata"]["annotations"] == {}


@pytest.mark.parametrize(
    ("service", "variables", "reason"),
    [
        pytest.param(base("linear"), Variables(), "AGENT: which? linear, with the weights at s3://models/minilm, would be", id="name"),
        pytest.param(base(WEIGHTS_URI="s3://models/linear#" + "0" * 32), Variables(), "the weights at s3://models/linear,", id="weights"),
        pytest.param(
            base(FUNCTION_AGENT="a:B"), Variables(agent="a:B"), "WEIGHTS_URI: which? a:B would get the demo's", id="demo's weights"
        ),
        pytest.param(base(FUNCTION_AGENT="a:B"), Variables(), "the module a cannot be in relight-function, which is Relight's", id="image"),
        pytest.param(
            base(FUNCTION_AGENT="function.agents.transformers:Chat"),
            Variables(agent="function.agents.transformers:Chat", weights_uri="s3://models/minilm"),
            "the libraries of that agent cannot be in relight-function",
            id="libraries",
        ),
        pytest.param(base(), Variables(), None, id="the demo"),
        pytest.param(base("chat"), Variables(agent=MINILM), None, id="the demo's agent by another name, said so"),
        pytest.param(base("chat", FUNCTION_AGENT="function.agents.smollm2:SmolLM2"), Variables(), None, id="another overlay's agent"),
    ],
)
def test_an_agent_that_cannot_have_these_weights_or_be_in_this_image_is_refused(
    service: Object, variables: Variables, reason: str | None
) -> None:
    if reason is None:
        agent.check(variables, [service])
        return
    with pytest.raises(DeployError, match=re.escape(reason)):
        agent.check(variables, [service])


def test_an_agent_without_weights_says_so_and_has_neither_sidecar_nor_cache() -> None:
    words = [*OWN[:2], "AGENT=my_model:Rules", "WEIGHTS_URI=none"]
    objects = rendered(*words)
    notes = agent.check(Variables.parse(words), objects)
    assert notes == ["my_model:Rules has no EXAMPLE='{…}', and the demo's is left out: `make invoke` will need DATA='{…}'"]
    spec = pod_spec(one_service(objects))
    (function,) = spec["containers"]
    assert {one["name"] for one in function["env"]} == {"FUNCTION_AGENT", "FUNCTION_MODEL_NAME", "FUNCTION_DEVICE"}
    assert [one["name"] for one in (*spec["volumes"], *function["volumeMounts"])] == ["tmp", "tmp"]
    assert "weights-cache" not in yaml.safe_dump_all(objects)
    with pytest.raises(VariableError, match="WEIGHTS_URI=none: does not go with node-cache-pvc, which is there for weights"):
        rendered(*words, "COMPONENTS=node-cache-pvc")


def test_images_that_no_cluster_can_pull_are_told_and_placeholders_are_not_deployed() -> None:
    ours = pullable.named(rendered("IMAGE=registry.example.com/flowers:1", "EVENTS=amqp"))
    version = images.version()
    assert ours == [
        ("IMAGE", "registry.example.com/flowers:1"),
        *(("WEIGHTS_IMAGE", f"relight-weights-cache:{version}"), ("QUEUE_IMAGE", f"relight-queue-source:{version}")),
    ]
    assert pullable.notes(ours) == [
        "IMAGE=registry.example.com/flowers:1: registry.example.com is a placeholder, which `make deploy` and `make push` refuse",
        f"WEIGHTS_IMAGE=relight-weights-cache:{version} QUEUE_IMAGE=relight-queue-source:{version}: "
        "without a registry in its name an image is found only where it was loaded into the nodes",
    ]
    with pytest.raises(DeployError, match=r"IMAGE=registry.example.com/flowers:1: registry.example.com is a placeholder; name the image"):
        pullable.check(ours)
    assert pullable.notes([("IMAGE", "ghcr.io/me/flowers:1"), ("WEIGHTS_IMAGE", "me/weights:1")]) == []


def test_in_a_folder_that_is_an_overlay_none_of_ours_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kustomization.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for words in (["ENV=gpu"], []):
        with pytest.raises(VariableError, match=r"names an overlay of Relight's own, which serves the demo, and this folder is an overlay"):
            rendered(*words)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"FUNCTION_MAXBATCH": "8"}, "FUNCTION_MAXBATCH='8': there is no such setting; did you mean FUNCTION_MAX_BATCH?"),
        ({"FUNCTION_MAX_BATCH": "0"}, "FUNCTION_MAX_BATCH='0'"),
        ({"WEIGHTS_REVALIDATE": "never"}, "WEIGHTS_REVALIDATE='never'"),
        ({"FUNCTION_MAX_BATCH": "8", "ELSE": "anything"}, None),
    ],
)
def test_settings_are_judged_by_the_function_before_a_cluster_sees_them(settings: dict[str, str], reason: str | None) -> None:
    service, variables = base(**settings), Variables(environment=settings)
    if reason is None:
        agent.check(variables, [service])
        return
    with pytest.raises(DeployError, match=re.escape(f"the container function: {reason}")):
        agent.check(variables, [service])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("AGENT=my_model", "AGENT=my_model: must be package.module:Class"),
        ("AGENT=my-model:Linear", "must be package.module:Class"),
        ("EXAMPLE={'instances': [1]}", "must be the JSON body of a request: Expecting property name"),
        ("DEVICE=gpu", "must be cpu, cuda or cuda:0"),
        ("COMPONENTS=gpu;warm-pool", "must be names with commas between them"),
        ("AGENT_DIR=/nowhere", "AGENT_DIR=/nowhere: must be a folder"),
        ("SET_9=1", "SET_9=…: a variable's name has letters, digits and _, no digit first"),
        ("SET_FUNCTION_AGENT=a:B", "SET_FUNCTION_AGENT=…: has a variable of its own: AGENT="),
        ("SET_PORT=80", "SET_PORT=…: is Knative's own to set"),
        ("SET_AWS_REGION=eu", "credentials are the sidecar's alone, and are in the Secret weights-store"),
        ("SET_HF_TOKEN=hf_123456", "SET_HF_TOKEN=…: looks like a secret, and whoever may read Services could read it"),
    ],
)
def test_a_word_about_an_agent_that_cannot_be_is_told_with_what_could(word: str, message: str) -> None:
    with pytest.raises(VariableError, match=re.escape(message)):
        Variables.parse([word])


def test_components_are_put_on_top_of_an_overlay_and_follow_the_functions_name(tmp_path: Path) -> None:
    """In a folder of one's own, too, whose Service was never called as the demo is."""
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "default", "resources": ["service.yaml"]}))
    own = {"FUNCTION_AGENT": "agent:Agent", "FUNCTION_MODEL_NAME": "flowers", "WEIGHTS_URI": "s3://models/flowers"}
    service = base("flowers", **own)
    container(service, "function")["env"].insert(0, {"name": "MINE", "value": "first"})  # as people add to lists
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(service))
    words = [f"ENV={tmp_path}", "IMAGE=r.example.com/flowers:1", "NAMESPACE=models", "COMPONENTS=prefetch,node-cache-agent,gpu"]
    variables, kubectl = Variables.parse([*words, "EVENTS=broker"]), Kubectl()
    objects = render(variables, kubectl)
    agent.check(variables, objects)
    assert get_env(container(one_service(objects), "function"), "FUNCTION_DEVICE") == "cuda:0"
    (prefetching,) = [one for one in containers(objects) if one["name"] == "agent"]
    assert get_env(prefetching, "WEIGHTS_PREFETCH") == "flowers=s3://models/flowers"
    (term,) = pod_spec(one_service(objects))["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term["preference"]["matchExpressions"] == [{"key": "weights.relight/flowers", "operator": "Exists"}]
    (trigger,) = [item for item in objects if item["kind"] == "Trigger"]
    assert (trigger["metadata"]["name"], trigger["spec"]["subscriber"]["ref"]["name"]) == ("flowers", "flowers")
    assert "minilm" not in yaml.safe_dump_all(objects)
    needed = {item["metadata"]["name"]: item["data"] for item in render_cluster(variables, kubectl) if item["kind"] == "ConfigMap"}
    assert needed["config-features"]["kubernetes.podspec-runtimeclassname"] == "enabled"
    assert variables.overlay_in_words() == f"ENV={tmp_path} COMPONENTS=prefetch,node-cache-agent,gpu"


def test_a_component_that_there_is_not_is_told_with_the_nearest() -> None:
    with pytest.raises(VariableError, match=re.escape("COMPONENTS=warmpool: there is no such component; did you mean warm-pool?")):
        rendered("COMPONENTS=gpu,warmpool")


def test_quotes_and_spaces_survive_make_and_a_wrong_pair_is_refused_there() -> None:
    """As a person types it, with a shell and make in between."""

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        # `setup` has been done, whatever `make` would think of the files' times.
        command = ["make", "--no-print-directory", "--old-file=.venv/installed", f"BIN={BIN}", "render", *words]
        return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)

    example = {"instances": [{"text": "it's \"5 o'clock\" & later"}]}
    done = make(*OWN, f"EXAMPLE={json.dumps(example)}", 'SET_MY_WORDS=two words; it\'s "so"')
    assert done.returncode == 0, done.stderr
    service = one_service(list(yaml.safe_load_all(done.stdout)))
    assert json.loads(service["metadata"]["annotations"]["relight/example"]) == example
    assert get_env(container(service, "function"), "MY_WORDS") == 'two words; it\'s "so"'
    refused = make(*OWN[:3])
    assert refused.returncode != 0
    assert "name the agent of these weights, as AGENT=package.module:Class" in refused.stderr
