"""Our manifests: each overlay and each allowed combination of components, by Kubernetes' schemas, Knative's rules and our own policy.

What Knative's own webhook looks at is written down here, since it does not run in these tests; it has judged the same renderings by hand.
"""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from knative.autoscaler import ScaleSpec
from knative.deploy import flags
from knative.deploy.agent import MANIFESTS
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import containers, pod_spec, services
from knative.deploy.render import render, render_cluster
from knative.deploy.variables import Variables
from knative.local.manifest import read_manifests
from knative.project.files import KINDS
from knative.project.init import make_project
from tests.knative.deploy import eventing_kinds
from tests.knative.deploy.combinations import Combination, render_each
from tests.knative.deploy.combinations import combinations as allowed
from tests.knative.deploy.eventing_kinds import KUBERNETES
from tests.support import BIN, ROOT

OVERLAYS = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))
EVENTS = sorted(path.parent.name for path in (MANIFESTS / "eventing").glob("*/kustomization.yaml") if "kind: Component" in path.read_text())
QUEUE_URL = "https://sqs.eu-west-1.amazonaws.com/123456789012/work"
RESERVED_PORTS = {8008, 8012, 8013, 8022, 8112, 9090, 9091}
OF_KNATIVE = ("containerConcurrency", "timeoutSeconds", "responseStartTimeoutSeconds", "idleTimeoutSeconds")
# Kinds that Kubernetes has no schema for, with the fields of their specs that we use: a misspelt one is not silently dropped here.
OTHER_KINDS = {
    "ContainerSource": {"sink", "ceOverrides", "template"},
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "HTTPScaledObject": {"hosts", "scaleTargetRef", "replicas", "scalingMetric", "scaledownPeriod", "timeouts"},
}

Object = dict[str, Any]


@pytest.fixture(scope="module", params=[pytest.param(2, id="each two"), pytest.param(99, id="all", marks=pytest.mark.soak)])
def combinations(request: pytest.FixtureRequest) -> list[Combination]:
    """Of as many choices at most, and those of all choices."""
    return render_each(list(allowed(request.param)))


@pytest.fixture(scope="module")
def functions(combinations: list[Combination], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[Object]]]:
    """Each rendering by its name: the combinations, the overlays, and what `relight init` makes."""
    kubectl = Kubectl()
    overlays = [(f"overlay {name}", render(Variables(env=name), kubectl)) for name in OVERLAYS]
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("project") / f"my-{kind}"
        make_project(folder, kind)
        overlays.append((f"project {kind}", render(Variables(env=str(folder), image="r.example.com/mine:1"), kubectl)))
    return overlays + [(" ".join(one.components) or "base", one.objects + one.cluster) for one in combinations]


@pytest.fixture(scope="module")
def everything(functions: list[tuple[str, list[Object]]]) -> list[tuple[str, list[Object]]]:
    """The same, and each way of events with the overlays that have a Knative Service."""
    kubectl = Kubectl()
    ways = [
        (f"{way} with {overlay}", render(Variables(env=overlay, events=way, queue_url=QUEUE_URL if "sqs" in way else None), kubectl))
        for way in EVENTS
        for overlay in ("default", "gpu")
    ]
    return functions + ways


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """The pod spec of each object that makes pods, by kind."""
    for item in objects:
        if "template" in item.get("spec", {}):
            yield item["kind"], pod_spec(item)


def as_pod(service: Object) -> Object:
    """The pod of a Knative Service, as Kubernetes knows pods."""
    spec = {name: value for name, value in pod_spec(service).items() if name not in OF_KNATIVE}
    metadata = {"name": "pod", **service["spec"]["template"]["metadata"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def test_everything_has_the_fields_that_kubernetes_knows_and_no_others(everything: list[tuple[str, list[Object]]]) -> None:
    seen: set[str] = set()
    for name, objects in everything:
        for item in objects:
            text = json.dumps({key: value for key, value in item.items() if key != "metadata"}, sort_keys=True)
            if text in seen:
                continue
            seen.add(text)
            if (item["apiVersion"], item["kind"]) in eventing_kinds.SPECS:
                assert eventing_kinds.problems(item) == [], name
                continue
            if item["kind"] in OTHER_KINDS:
                assert set(item["spec"]) <= OTHER_KINDS[item["kind"]], name
                continue
            subject = as_pod(item) if item in services([item]) else item
            kubernetes_validate.validate(subject, KUBERNETES, strict=True)


def test_every_flag_that_is_needed_is_shipped_and_no_other(combinations: list[Combination]) -> None:
    for one in combinations:
        assert flags.shipped(one.cluster) == flags.required(one.objects), one.components


def test_what_an_overlay_asks_for_with_patches_of_its_own_is_in_its_cluster_part_too(tmp_path: Path) -> None:
    patch = "- {op: replace, path: /spec/template/spec/timeoutSeconds, value: 1200}"
    document = {
        "resources": [os.path.relpath(MANIFESTS / "overlays/default", tmp_path.resolve())],
        "patches": [{"target": {"group": "serving.knative.dev", "kind": "Service"}, "patch": patch}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(document))
    variables, kubectl = Variables(env=str(tmp_path)), Kubectl()
    needed = flags.required(render(variables, kubectl))
    assert needed["config-defaults"] == {"max-revision-timeout-seconds": "1200"}
    (line,) = flags.in_words(flags.missing(needed, {"config-features": needed["config-features"], "config-defaults": {}}))
    assert line.startswith("config-defaults: max-revision-timeout-seconds must be '1200' (")
    assert flags.missing(needed, {**needed, "config-defaults": {"max-revision-timeout-seconds": "3600"}}) == {}
    assert flags.shipped(render_cluster(variables, kubectl)) == needed
    assert set(flags.shipped(render_cluster(Variables(), kubectl))) == {"config-features"}


def test_the_local_overlay_ships_the_flags_that_it_needs() -> None:
    objects = render(Variables(env="local"), Kubectl())
    assert flags.missing(flags.required(objects), flags.shipped(objects)) == {}


def test_scale_annotations_are_knatives_and_within_its_bounds(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for service in services(objects):
            template = service["spec"]["template"]
            config = flags.required(objects).get(flags.AUTOSCALER, {})
            ScaleSpec.parse(template["metadata"]["annotations"], template["spec"]["containerConcurrency"], config)
            assert not [key for key in service["metadata"]["annotations"] if "autoscaling" in key], name


def test_every_rendering_of_a_service_runs_on_one_machine_too(functions: list[tuple[str, list[Object]]]) -> None:
    for name, objects in functions:
        if services(objects):
            config = [item for item in objects if item["kind"] == "ConfigMap"]
            needed = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": flags.AUTOSCALER}}
            needed["data"] = flags.required(objects).get(flags.AUTOSCALER, {})
            extra = [] if any(item["metadata"]["name"] == flags.AUTOSCALER for item in config) else [needed]
            assert len(read_manifests([(name, yaml.safe_dump_all(objects + extra))]).services) == 1


def test_containers_are_restricted_and_have_bounds(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for one in containers(objects):
            where = f"{name}: {one['name']}"
            context = one["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"]["drop"] == ["ALL"], where
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert not context.get("privileged"), where
            if one["name"] == "directory":  # gives a new directory of the node to the agent, and ends
                assert context["capabilities"]["add"] == ["CHOWN"], where
            else:
                assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 65532), where
                assert "add" not in context["capabilities"], where
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(one["resources"][kind]), where


def test_probes_and_ports_are_numbers_that_knative_leaves_to_us(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for one in containers(objects):
            assert "startupProbe" not in one, f"{name}: a startup probe turns off the activator's fast path"
            asked = [one[key]["httpGet"]["port"] for key in ("livenessProbe", "readinessProbe") if key in one]
            told = [int(variable["value"]) for variable in one.get("env", []) if variable["name"].endswith("_PORT")]
            declared = [port["containerPort"] for port in one.get("ports", [])]
            assert all(isinstance(port, int) for port in asked), name
            assert not RESERVED_PORTS & {*asked, *told, *declared}, name


def test_pods_have_time_to_end_and_know_nothing_of_the_cluster(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for kind, spec in pods(objects):
            assert spec["enableServiceLinks"] is False, name
            assert spec["serviceAccountName"], name
            is_labeller = any(variable["name"] == "WEIGHTS_NODE" for one in spec["containers"] for variable in one.get("env", []))
            assert spec["automountServiceAccountToken"] is is_labeller, name
            seconds = spec["timeoutSeconds"] if kind == "Service" else spec["terminationGracePeriodSeconds"]
            assert seconds >= 60, name


def test_directories_of_the_node_are_only_read_and_one_for_each_namespace(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for kind, spec in pods(objects):
            on_node = {volume["name"]: volume["hostPath"]["path"] for volume in spec.get("volumes", []) if "hostPath" in volume}
            assert set(on_node.values()) <= {"/var/cache/relight/default"}, name
            for one in spec["containers"]:
                for mount in one["volumeMounts"]:
                    if mount["name"] in on_node:
                        assert mount.get("readOnly", False) is (kind == "Service"), f"{name}: {one['name']}"


def test_the_cache_is_for_reading_in_the_function(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for one in containers(objects):
            if one["name"] == "function":
                assert [mount["readOnly"] for mount in one["volumeMounts"] if mount["name"] == "weights-cache"] == [True], name


def test_credentials_are_the_sidecars_alone(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for item in objects:
            if "template" in item.get("spec", {}) and any(one["name"] == "function" for one in pod_spec(item)["containers"]):
                annotations = item["spec"]["template"]["metadata"]["annotations"]
                assert annotations["eks.amazonaws.com/skip-containers"] == "function", name
        for one in containers(objects):
            if one["name"] == "function":
                assert "envFrom" not in one, name
                assert not [variable["name"] for variable in one["env"] if variable["name"].startswith("AWS_")], name


def test_every_volume_is_mounted_and_every_mount_has_a_volume(everything: list[tuple[str, list[Object]]]) -> None:
    for name, objects in everything:
        for _, spec in pods(objects):
            mounted = {mount["name"] for one in (*spec["containers"], *spec.get("initContainers", [])) for mount in one["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}, name


def test_pods_reach_the_same_clouds_whichever_policy_they_have(everything: list[tuple[str, list[Object]]]) -> None:
    """A service on the internet, but not the node's credentials; and where the pod's own come from."""
    blocks = {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}, {"cidr": "::/0", "except": ["fd00:ec2::254/128"]}
    internet = [{"ipBlock": block} for block in blocks]
    identity = {"to": [{"ipBlock": {"cidr": "169.254.170.23/32"}}, {"ipBlock": {"cidr": "fd00:ec2::23/128"}}], "ports": [{"port": 80}]}
    for name, objects in everything:
        for policy in (item for item in objects if item["kind"] == "NetworkPolicy" and "Egress" in item["spec"]["policyTypes"]):
            rules = policy["spec"]["egress"]
            assert identity in rules, f"{name}: {policy['metadata']['name']}"
            outside = [rule for rule in rules if "ipBlock" in rule["to"][0] and rule != identity]
            assert all(rule["to"] == internet for rule in outside), name
            ports = {port["port"] for rule in outside for port in rule["ports"]}
            is_labeller = policy["metadata"]["name"] == "relight-weights-agent" and any(item["kind"] == "ClusterRole" for item in objects)
            assert ports & {443, 5671}, name
            assert (6443 in ports) == is_labeller, name


def test_metrics_of_the_dashboard_and_the_alerts_are_those_that_there_are() -> None:
    texts = [(MANIFESTS / "components/monitoring" / name).read_text() for name in ("dashboard.json", "alerts.yaml")]
    used = set(re.findall(r"\b(?:function|weights_cache)_[a-z_]+\b", " ".join(texts)))
    source = " ".join(path.read_text() for package in ("function", "weights_cache") for path in (ROOT / package).glob("metrics.py"))
    known = set(re.findall(r'"((?:function|weights_cache)_[a-z_]+)"', source))
    known |= {f"weights_cache_{name}" for name in re.findall(r'_counter\("([a-z_]+)"', source)}
    suffixes = ("", "_total", "_bucket", "_sum", "_count")
    assert used
    assert used <= {name + suffix for name in known for suffix in suffixes}


def test_the_table_of_flags_in_the_docs_is_the_codes() -> None:
    table = [line for line in (ROOT / "docs/deploy.md").read_text().splitlines() if re.match(r"\| `(multi-container|kubernetes\.)", line)]
    assert table == [f"| `{flag.name}` | {flag.allows} | {flag.why} |" for flag in flags.FLAGS]


def test_a_flag_that_is_off_is_named_with_what_it_is_for(combinations: list[Combination]) -> None:
    one = next(one for one in combinations if "node-cache-pvc" in one.components)
    config = copy.deepcopy(flags.shipped(one.cluster))
    config[flags.FEATURES]["kubernetes.podspec-securitycontext"] = "disabled"
    (line,) = flags.in_words(flags.missing(flags.required(one.objects), config))
    assert line.startswith("config-features: kubernetes.podspec-securitycontext must be 'enabled' (fsGroup")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["yamllint", "--strict", "--config-file", ".yamllint", "knative/manifests"], id="yamllint"),
        pytest.param(["hadolint", "Containerfile"], id="hadolint"),
        pytest.param(["shellcheck", ".ci/run", "knative/deploy/seal.sh"], id="shellcheck"),
    ],
)
def test_the_linters_have_nothing_to_say(command: list[str]) -> None:
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_manifests_belong_to_the_package(tmp_path: Path) -> None:
    """What `pip install` brings has the manifests, so that `relight cluster` works there."""
    patterns = re.search(r"knative = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert patterns
    suffixes = {path.suffix for path in MANIFESTS.rglob("*") if path.is_file()}
    assert all(f'"manifests/**/*{suffix}"' in patterns[1] for suffix in suffixes), sys.path
