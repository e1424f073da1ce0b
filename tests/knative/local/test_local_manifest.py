"""Manifests as they are written by people: what is understood, and what is said about a mistake."""

import base64
import copy
import io
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.local.errors import ManifestError
from knative.local.manifest import Manifests, Service, Sources, read_manifests
from tests.knative.local.running import manifests, service
from tests.support import BIN, ROOT

FILE = "hello.yaml"
TEMPLATE = ("spec", "template")
SPEC = (*TEMPLATE, "spec")
FUNCTION = (*SPEC, "containers", 0)
ANNOTATIONS = (*TEMPLATE, "metadata", "annotations")
TRAFFIC = ("spec", "traffic")

HELLO: dict[str, Any] = {
    "apiVersion": "serving.knative.dev/v1",
    "kind": "Service",
    "metadata": {"name": "hello"},
    "spec": {
        "traffic": [{"percent": 100}],
        "template": {
            "metadata": {"annotations": {}},
            "spec": {
                "containers": [{"name": "function", "command": ["serve"], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
                "volumes": [{"name": "data", "emptyDir": {}}],
            },
        },
    },
}
SIDECAR = {"name": "sidecar", "command": ["help"]}
PORT = {"containerPort": 8080}


def put(place: Sequence[str | int], value: Any, document: dict[str, Any] = HELLO) -> dict[str, Any]:
    """The document with `value` at `place`."""
    changed = copy.deepcopy(document)
    at: Any = changed
    for part in place[:-1]:
        at = at[part]
    at[place[-1]] = value
    return changed


def read(*documents: Any) -> Manifests:
    return read_manifests([(FILE, yaml.safe_dump_all(documents))])


def read_service(document: dict[str, Any]) -> Service:
    (service,) = read(document).services
    return service


def config_map(name: str, **data: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def secret(**fields: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, **fields}


def mistake(*documents: Any) -> str:
    """What is said about the first mistake; always one line."""
    with pytest.raises(ManifestError) as caught:
        read(*documents)
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


def rendered(overlay: str) -> Manifests:
    folder = ROOT / "knative" / "manifests" / "overlays" / overlay
    text = subprocess.run([BIN / "kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout
    return read_manifests([(overlay, text)])


def test_our_local_overlay_is_a_function_at_zero_with_its_store_and_cache() -> None:
    manifests = rendered("local")
    (minilm,) = manifests.services
    assert (minilm.name, minilm.namespace) == ("minilm", "default")
    assert minilm.user_container.name == "function"
    assert [container.name for container in minilm.spec.containers] == ["function", "weights-cache"]
    assert (minilm.scale.initial_scale, minilm.scale.stable_window_s, minilm.scale.progress_deadline_s) == (0, 10, 120)
    assert manifests.secrets["default", "weights-store"]["AWS_ENDPOINT_URL"] == "http://object-store.relight.localhost"
    assert manifests.mentions("object-store.relight.localhost")
    (source,) = manifests.sources
    assert source.sink == (("default", "minilm"), "")
    assert manifests.queues == ["minilm", "minilm-results"]


def test_our_default_overlay_is_read_too() -> None:
    (minilm,) = rendered("default").services
    assert (minilm.scale.initial_scale, minilm.scale.stable_window_s) == (1, 60)


def test_what_is_not_set_is_as_in_knative() -> None:
    hello = read_service(HELLO)
    assert (hello.namespace, hello.spec.container_concurrency, hello.spec.timeout_seconds) == ("default", 0, 300)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, (300, "timeoutSeconds")),
        ({"timeoutSeconds": 0}, (300, "timeoutSeconds")),
        ({"timeoutSeconds": 20}, (20, "timeoutSeconds")),
        ({"timeoutSeconds": 600}, (300, "responseStartTimeoutSeconds")),
        ({"timeoutSeconds": 600, "responseStartTimeoutSeconds": 0}, (600, "timeoutSeconds")),
        ({"timeoutSeconds": 60, "responseStartTimeoutSeconds": 20, "idleTimeoutSeconds": 30}, (20, "responseStartTimeoutSeconds")),
        ({"timeoutSeconds": 60, "responseStartTimeoutSeconds": 20, "idleTimeoutSeconds": 5}, (5, "idleTimeoutSeconds")),
        ({"timeoutSeconds": 60, "idleTimeoutSeconds": 0}, (60, "timeoutSeconds")),
        ({"timeoutSeconds": 60, "idleTimeoutSeconds": 60}, (60, "timeoutSeconds")),
    ],
)
def test_the_first_byte_is_due_at_the_shortest_limit_that_is_set(limits: dict[str, int], expected: tuple[int, str]) -> None:
    document = HELLO
    for name, seconds in limits.items():
        document = put((*SPEC, name), seconds, document)
    assert read_service(document).spec.first_byte_limit() == expected


def test_the_only_container_is_the_one_that_is_called() -> None:
    assert read_service(HELLO).user_container.name == "function"


def test_of_several_containers_the_one_with_a_port_is_called() -> None:
    document = put((*SPEC, "containers"), [SIDECAR, HELLO["spec"]["template"]["spec"]["containers"][0] | {"ports": [PORT]}])
    assert read_service(document).user_container.name == "function"


def test_what_only_a_cluster_needs_is_left_alone() -> None:
    document = put((*FUNCTION, "securityContext"), {"runAsNonRoot": True})
    document = put((*FUNCTION, "resources"), {"limits": {"nvidia.com/gpu": "1"}}, document)
    document = put((*FUNCTION, "image"), "registry.example/hello@sha256:0", document)
    document = put((*SPEC, "nodeSelector"), {"disk": "ssd"}, document)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "hello"}}
    assert [service.name for service in read(account, document).services] == ["hello"]


def test_another_class_of_autoscaler_becomes_ours_within_the_same_bounds() -> None:
    annotations = {
        f"autoscaling.knative.dev/{name}": value
        for name, value in {
            "class": "hpa.autoscaling.knative.dev",
            "metric": "cpu",
            "target": "80",
            "min-scale": "1",
            "max-scale": "3",
        }.items()
    }
    scale = read_service(put(ANNOTATIONS, annotations)).scale
    assert (scale.metric, scale.target, scale.min_scale, scale.max_scale) == ("concurrency", 70.0, 1, 3)


def test_the_autoscalers_cluster_settings_come_from_their_config_map() -> None:
    assert read(HELLO, config_map("config-autoscaler", **{"stable-window": "20s"})).services[0].scale.stable_window_s == 20


def test_the_data_of_a_secret_is_base64_and_its_string_data_is_not() -> None:
    encoded = base64.b64encode("schlüssel".encode()).decode()
    held = read(HELLO, secret(data={"KEY": encoded, "BOTH": encoded}, stringData={"PLAIN": "cGxhaW4=", "BOTH": "string wins"})).secrets
    assert held["default", "store"] == {"KEY": "schlüssel", "PLAIN": "cGxhaW4=", "BOTH": "string wins"}


def test_the_base64_of_a_secret_may_be_wrapped() -> None:
    encoded = base64.encodebytes(b"long " * 40).decode()
    assert len(encoded.splitlines()) > 1
    assert read(HELLO, secret(data={"KEY": encoded})).secrets["default", "store"] == {"KEY": "long " * 40}


def test_services_of_one_name_may_live_in_two_namespaces() -> None:
    manifests = read(HELLO, put(("metadata", "namespace"), "other"))
    assert [(service.namespace, service.name) for service in manifests.services] == [("default", "hello"), ("other", "hello")]


def test_services_keep_the_order_of_the_files() -> None:
    sources = [("a.yaml", yaml.safe_dump(put(("metadata", "name"), "zebra"))), ("b.yaml", yaml.safe_dump(HELLO))]
    assert [service.name for service in read_manifests(sources).services] == ["zebra", "hello"]


def test_empty_documents_are_passed_over() -> None:
    text = f"---\n---\n{yaml.safe_dump(HELLO)}---\n# nothing\n"
    assert [service.name for service in read_manifests([(FILE, text)]).services] == ["hello"]


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        pytest.param((*SPEC, "containerConcurency"), 1, "did you mean containerConcurrency?", id="misspelt field"),
        pytest.param((*FUNCTION, "comand"), [], "did you mean command?", id="misspelt field in a list"),
        pytest.param((*FUNCTION, "tty"), True, "known are args, command, env, envFrom, image, ", id="unknown field"),
        pytest.param(
            (*SPEC, "volumes", 0, "nfs"),
            {"path": "/"},
            "known are emptyDir, hostPath, name, persistentVolumeClaim",
            id="volume that one machine has not",
        ),
        pytest.param(
            (*FUNCTION, "livenessProbe"), {"httpGet": {"prot": 1}}, "did you mean port?", id="misspelt field below an optional one"
        ),
        pytest.param((*SPEC, "containerConcurrency"), 1001, "less than or equal to 1000 (found 1001)", id="number too large"),
        pytest.param((*SPEC, "timeoutSeconds"), -1, "greater than or equal to 0 (found -1)", id="number too small"),
        pytest.param(
            (*SPEC, "idleTimeoutSeconds"), 301, "found 301; at most timeoutSeconds is allowed, here 300", id="idle longer than the whole"
        ),
        pytest.param(
            (*SPEC, "responseStartTimeoutSeconds"),
            600,
            "found 600; at most timeoutSeconds is allowed, here 300",
            id="a first byte that may come after the last",
        ),
        pytest.param((*SPEC, "timeoutSeconds"), "long", "a valid integer (found 'long')", id="no number"),
        pytest.param((*SPEC, "timeoutSeconds"), "300", "a valid integer (found '300')", id="number in quotes"),
        pytest.param((*SPEC, "timeoutSeconds"), 1.5, "a valid integer (found 1.5)", id="half a second"),
        pytest.param((*FUNCTION, "command"), "serve --fast", "a valid list (found 'serve --fast')", id="command as one word"),
        pytest.param((*FUNCTION, "args"), ["--port", 80], "a valid string (found 80)", id="number among the arguments"),
        pytest.param((*FUNCTION, "env"), [{"name": "WORKERS", "value": 4}], "a valid string (found 4)", id="number in the environment"),
        pytest.param((*FUNCTION, "env"), {"WORKERS": "4"}, "a valid list", id="environment as a mapping"),
        pytest.param((*FUNCTION, "env"), [{"value": "4"}], "Field required", id="variable without a name"),
        pytest.param((*FUNCTION, "env"), [{"name": "A=B"}], "match pattern '^[^=]+$' (found 'A=B')", id="variable with an impossible name"),
        pytest.param(
            (*FUNCTION, "env"),
            [{"name": "A", "value": "1", "valueFrom": {"secretKeyRef": {"name": "store", "key": "a"}}}],
            "variable A has both value and valueFrom; allowed is one of them",
            id="variable with two values",
        ),
        pytest.param(
            (*FUNCTION, "env"),
            [{"name": "A", "valueFrom": {}}],
            "found none; must be one of configMapKeyRef, secretKeyRef",
            id="value from nothing",
        ),
        pytest.param(
            (*FUNCTION, "env"),
            [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "there is no such field; known are configMapKeyRef, secretKeyRef",
            id="value from a field",
        ),
        pytest.param(
            (*FUNCTION, "env"), [{"name": "PORT", "value": "80"}], "found 'PORT', which Knative sets itself", id="variable that is reserved"
        ),
        pytest.param(
            (*FUNCTION, "env"),
            [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],
            "env[1].name: found 'A' twice",
            id="variable that stands twice",
        ),
        pytest.param((*FUNCTION, "envFrom"), [{}], "found none; must be one of configMapRef, secretRef", id="envFrom of nothing"),
        pytest.param((*FUNCTION, "ports"), [PORT, PORT], "at most 1 item", id="two ports"),
        pytest.param((*FUNCTION, "ports"), [{"containerPort": -1}], "greater than or equal to 1 (found -1)", id="negative port"),
        pytest.param((*FUNCTION, "ports"), [{"containerPort": "80"}], "a valid integer (found '80')", id="port in quotes"),
        pytest.param(
            (*FUNCTION, "ports"), [{"containerPort": 8012}], "found 8012; Knative keeps 8008, 8012, 8013, 8022, ", id="reserved port"
        ),
        pytest.param(
            (*FUNCTION, "ports"), [{"containerPort": 80, "protocol": "UDP"}], "should be 'TCP' (found 'UDP')", id="port of another protocol"
        ),
        pytest.param((*FUNCTION, "ports"), [{"containerPort": 70000}], "less than or equal to 65535 (found 70000)", id="port out of range"),
        pytest.param((*FUNCTION, "ports"), [{"containerPort": 80, "name": "web"}], "'', 'http1' or 'h2c' (found 'web')", id="port name"),
        pytest.param(
            (*FUNCTION, "readinessProbe"), {"grpc": {"port": 80}}, "gRPC probes are not run here; allowed are httpGet, ", id="gRPC probe"
        ),
        pytest.param((*FUNCTION, "readinessProbe"), {"exec": {"command": []}}, "at least 1 item", id="probe by no command"),
        pytest.param(
            (*FUNCTION, "readinessProbe"),
            {"httpGet": {"port": "web"}},
            "found 'web'; must be a number",
            id="probe of a port without a name",
        ),
        pytest.param(
            (*FUNCTION, "readinessProbe"), {"tcpSocket": {"port": 70000}}, "must be a number from 0 to 65535", id="probe port out of range"
        ),
        pytest.param(
            (*FUNCTION, "readinessProbe"),
            {"httpGet": {"path": "readyz"}},
            "found 'readyz'; must begin with /",
            id="probe path not absolute",
        ),
        pytest.param(
            (*FUNCTION, "readinessProbe"), {"httpGet": {"scheme": "HTTPS"}}, "should be 'HTTP' (found 'HTTPS')", id="probe by TLS"
        ),
        pytest.param(
            (*FUNCTION, "readinessProbe"), {"tcpSocket": {"host": "example.org"}}, "asks the container itself", id="probe of another host"
        ),
        pytest.param(
            (*FUNCTION, "readinessProbe"),
            {"httpGet": {}, "tcpSocket": {}},
            "found httpGet and tcpSocket; must have one of httpGet, tcpSocket, exec",
            id="probe of two kinds",
        ),
        pytest.param(
            (*FUNCTION, "livenessProbe"), {"periodSeconds": 5}, "found nothing to ask; must have one of httpGet, ", id="probe of none"
        ),
        pytest.param(
            (*FUNCTION, "livenessProbe"), {"httpGet": {}, "successThreshold": 2}, "found 2; must be 1 for a liveness probe", id="well twice"
        ),
        pytest.param(
            (*FUNCTION, "startupProbe"), {"httpGet": {}, "failureThreshold": 0}, "greater than or equal to 1 (found 0)", id="never failing"
        ),
        pytest.param(
            (*SPEC, "containers"),
            [HELLO["spec"]["template"]["spec"]["containers"][0] | {"ports": [PORT]}, SIDECAR | {"livenessProbe": {"httpGet": {}}}],
            "containers[1].livenessProbe.httpGet.port: found none; must be a number",
            id="sidecar's probe without a port",
        ),
        pytest.param(
            (*FUNCTION, "resources"), {"limits": {"memory": "1Gib"}}, "there is no suffix 'Gib'; there are n, u, m, ", id="no unit"
        ),
        pytest.param(
            (*FUNCTION, "resources"), {"limits": {"memory": "-1Gi"}}, "a quantity that is not negative, as 2, 500m", id="negative memory"
        ),
        pytest.param(
            (*FUNCTION, "resources"), {"limits": {"memory": "512m"}}, "0.512 bytes of memory; m is a thousandth", id="millibytes of memory"
        ),
        pytest.param((*FUNCTION, "resources"), {"limits": {"cpu": None}}, "must be a quantity", id="no amount"),
        pytest.param((*FUNCTION, "resources"), {"limits": {"mem": "1Gi"}}, "'mem'; known are cpu, memory, ", id="unknown resource"),
        pytest.param((*FUNCTION, "resources"), {"limits": {"nvidia.com/gpus": 1}}, "did you mean nvidia.com/gpu?", id="misspelt device"),
        pytest.param((*FUNCTION, "resources"), {"limits": {"nvidia.com/gpu": "500m"}}, "must be whole devices", id="half a device"),
        pytest.param((*FUNCTION, "resources"), {"requests": {"nvidia.com/gpu": 1}}, "must be as in limits", id="device without a limit"),
        pytest.param(
            (*FUNCTION, "resources"),
            {"limits": {"cpu": "500m"}, "requests": {"cpu": 1}},
            "requests has 1 of cpu, more than the limit, 0.5",
            id="request above the limit",
        ),
        pytest.param((*FUNCTION, "resources"), {"limit": {"cpu": 1}}, "did you mean limits?", id="misspelt limits"),
        pytest.param((*FUNCTION, "securityContext"), {"privileged": True}, "Knative refuses privileged containers", id="privileged"),
        pytest.param((*FUNCTION, "securityContext"), {"runAsUser": "root"}, "a valid integer (found 'root')", id="user by name"),
        pytest.param((*FUNCTION, "lifecycle"), {}, "Knative refuses lifecycle hooks", id="lifecycle hook"),
        pytest.param((*SPEC, "initContainers"), [], "init containers are not run here", id="init container"),
        pytest.param((*SPEC, "restartPolicy"), "Never", "containers are always started again", id="restart policy"),
        pytest.param((*SPEC, "terminationGracePeriodSeconds"), 30, "a pod has timeoutSeconds to end", id="termination grace"),
        pytest.param(("spec", "replicas"), 2, "see the annotations min-scale and max-scale", id="Deployment's replicas"),
        pytest.param((*FUNCTION, "name"), "queue-proxy", "found 'queue-proxy', which Knative keeps for itself", id="Knative's own name"),
        pytest.param(
            (*FUNCTION, "readinessProbe"),
            {"httpGet": {"httpHeaders": [{"name": "X"}]}},
            "Field required",
            id="probe header without a value",
        ),
        pytest.param(
            (*FUNCTION, "volumeMounts", 0, "mountPath"), "data", "match pattern '^/' (found 'data')", id="mount path not absolute"
        ),
        pytest.param((*FUNCTION, "volumeMounts", 0, "name"), "dada", "found 'dada'; volumes are ['data']", id="mount of no volume"),
        pytest.param(
            (*FUNCTION, "volumeMounts", 0, "mountPath"),
            "/dev",
            "found '/dev'; Knative keeps /, /dev, /dev/log for",
            id="reserved mount path",
        ),
        pytest.param((*FUNCTION, "volumeMounts", 0, "subPath"), "../up", "must be a path inside the volume", id="path out of the volume"),
        pytest.param(
            (*FUNCTION, "volumeMounts"),
            [{"name": "data", "mountPath": "/data"}, {"name": "data", "mountPath": "/data/"}],
            "volumeMounts[1].mountPath: found '/data/' twice",
            id="two mounts at one path",
        ),
        pytest.param(
            (*SPEC, "volumes"),
            [{"name": "data", "emptyDir": {}}, {"name": "data", "emptyDir": {}}],
            "volumes[0].name: found 'data' twice",
            id="two volumes of one name",
        ),
        pytest.param(
            (*SPEC, "volumes"),
            [{"name": "data", "emptyDir": {}}, {"name": "more", "emptyDir": {}}],
            "volumes[1].name: found 'more', which no container mounts",
            id="volume that nobody mounts",
        ),
        pytest.param(
            (*SPEC, "volumes", 0),
            {"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
            "volume 'data' is readOnly, so its mounts must be too",
            id="writing to what is read-only",
        ),
        pytest.param(
            (*SPEC, "volumes", 0), {"name": "data"}, "allowed are emptyDir, persistentVolumeClaim and hostPath", id="volume of no kind"
        ),
        pytest.param((*SPEC, "containers"), [], "at least 1 item", id="no containers"),
        pytest.param((*FUNCTION, "command"), [], "found none; here images are not run", id="no command"),
        pytest.param((*FUNCTION, "name"), "../escape", "found '../escape'", id="container name that leads elsewhere"),
        pytest.param(
            (*SPEC, "containers"),
            [HELLO["spec"]["template"]["spec"]["containers"][0] | {"ports": [PORT]}, SIDECAR | {"ports": [PORT]}],
            "found ports in ['function', 'sidecar']; exactly one container must have them",
            id="two containers with ports",
        ),
        pytest.param(
            (*SPEC, "containers"), [SIDECAR, SIDECAR | {"name": "other"}], "found ports in none; exactly one", id="no ports at all"
        ),
        pytest.param(
            (*ANNOTATIONS, "autoscaling.knative.dev/windw"),
            "6s",
            "windw = '6s', there is no such annotation; did you mean window?",
            id="misspelt annotation",
        ),
        pytest.param(
            (*ANNOTATIONS, "autoscaling.knative.dev/window"), "5s", "window = '5s', must be a duration from 6s to 1h", id="window too short"
        ),
        pytest.param((*ANNOTATIONS, "autoscaling.knative.dev/min-scale"), 1, "a valid string (found 1)", id="annotation not in quotes"),
        pytest.param(
            (*ANNOTATIONS, "autoscaling.knative.dev/initial-scale"),
            "0",
            "allow-zero-initial-scale is false",
            id="initial scale 0 not allowed",
        ),
        pytest.param(
            (*ANNOTATIONS, "autoscaling.knative.dev/class"),
            "vpa.autoscaling.knative.dev",
            "must be kpa.autoscaling.knative.dev",
            id="autoscaler that is not here",
        ),
        pytest.param(
            ("metadata", "annotations"),
            {"autoscaling.knative.dev/min-scale": "1"},
            "autoscaling.knative.dev/min-scale: has no effect here; scale annotations belong under spec.template.metadata.annotations",
            id="scale annotation of the Service itself",
        ),
        pytest.param(
            ANNOTATIONS,
            {"autoscaling.knative.dev/min-scale": "3", "autoscaling.knative.dev/max-scale": "2"},
            "max-scale",
            id="at least more than at most",
        ),
        pytest.param(("metadata", "name"), "Hello", "found 'Hello'", id="name with a capital letter"),
        pytest.param(("metadata", "name"), "hello.world", "found 'hello.world'", id="name that is no host label"),
        pytest.param(("metadata", "namespace"), "../up", "found '../up'", id="namespace that leads elsewhere"),
        pytest.param(("spec", "template"), None, "valid dictionary", id="template left empty"),
        pytest.param(TRAFFIC, {"percent": 100}, "a valid list", id="traffic that is no list"),
        pytest.param(TRAFFIC, [{"percent": 60}, {"percent": 30}], "found percents that sum to 90; they must sum to 100", id="percents"),
        pytest.param((*TRAFFIC,), [{"tag": "next"}], "found percents that sum to 0; they must sum to 100", id="no percent at all"),
        pytest.param((*TRAFFIC, 0, "percent"), 101, "less than or equal to 100 (found 101)", id="percent above 100"),
        pytest.param((*TRAFFIC, 0, "percent"), "half", "a valid integer (found 'half')", id="percent in words"),
        pytest.param((*TRAFFIC, 0, "revision"), "hello-00001", "did you mean revisionName?", id="misspelt field of the traffic"),
        pytest.param(
            (*TRAFFIC, 0, "configurationName"),
            "hello",
            "there is no such field; known are latestRevision, percent, revisionName, tag",
            id="configuration, which a Service has of its own",
        ),
        pytest.param(
            (*TRAFFIC, 0, "latestRevision"), False, "found false without revisionName; give either", id="neither latest nor a name"
        ),
        pytest.param((*TRAFFIC, 0, "tag"), "0new", "found '0new'", id="tag that is no DNS label"),
        pytest.param((*TRAFFIC, 0, "tag"), "a" * 60, "is longer than the 63 signs of a host label", id="tag too long for a host"),
        pytest.param((*TRAFFIC, 0, "revisionName"), "Hello_1", "found 'Hello_1'", id="name that no revision has"),
        pytest.param(
            (*TEMPLATE, "metadata", "name"), "v2", "found 'v2'; the name of a revision must begin with hello- and", id="revision's name"
        ),
    ],
)
def test_a_mistake_in_a_service_is_told_with_file_and_path_and_what_is_allowed(place: tuple[str | int, ...], value: Any, said: str) -> None:
    message = mistake(put(place, value))
    assert message.startswith(f"{FILE}: document 1 (Service ")
    # An annotation's message names the annotation itself.
    path = place[: len(ANNOTATIONS)] if place[: len(ANNOTATIONS)] == ANNOTATIONS else place
    if path[-1] == "volumes" or path == (*SPEC, "volumes", 0):
        path = SPEC  # what is wrong with a volume may be said of who mounts it
    assert "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") in message
    assert said in message


@pytest.mark.parametrize(
    ("document", "said"),
    [
        pytest.param(["a", "list"], "document 2: found no object with apiVersion and kind", id="no object"),
        pytest.param({"kind": "Service"}, "document 2: found no object with apiVersion and kind", id="no apiVersion"),
        pytest.param(
            {"apiVersion": "v1", "kind": ["Service"]}, "document 2: found no object with apiVersion and kind", id="kind is a list"
        ),
        pytest.param(put(("metadata",), {}), "document 2 (Service): metadata.name: found none", id="no name"),
        pytest.param(put(("metadata",), None), "document 2 (Service): metadata.name: found none", id="no metadata"),
        pytest.param(
            {**HELLO, "apiVersion": "v1"}, "found v1 Service; allowed are serving.knative.dev/v1 Service, sources.", id="core Service"
        ),
        pytest.param(
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "hello"}},
            "document 2 (Deployment hello): found apps/v1 Deployment; allowed are serving.knative.dev/v1 Service",
            id="another kind of object",
        ),
        pytest.param({"apiVersion": "v1\nv2", "kind": "A\nB", "metadata": {"name": "c\nd"}}, "A\\nB c\\nd", id="line breaks in a name"),
        pytest.param(
            config_map("flags", DEBUG=True),
            "document 2 (ConfigMap flags): data.DEBUG: Input should be a valid string",
            id="flag not in quotes",
        ),
        pytest.param(
            config_map("flags") | {"stringData": {}},
            "(ConfigMap flags): stringData: there is no such field",
            id="ConfigMap with a Secret's field",
        ),
        pytest.param(
            secret(data={"KEY": "plain text"}), "document 2 (Secret store): data.KEY: must be base64 of text", id="Secret not in base64"
        ),
        pytest.param(secret(data={"KEY": "//79"}), "data.KEY: must be base64 of text", id="Secret that is not text"),
        pytest.param(
            config_map("config-autoscaler", **{"stable-window": "1s"}),
            "document 2 (ConfigMap config-autoscaler): data: config-autoscaler: stable-window = '1s', must be a duration from 6s to 1h",
            id="cluster setting out of bounds",
        ),
        pytest.param(
            config_map("config-autoscaler", **{"stable-widow": "60s"}),
            "there is no such setting; did you mean stable-window?",
            id="misspelt cluster setting",
        ),
        pytest.param(HELLO, "Service hello: stands twice in namespace default (first in hello.yaml)", id="the same Service again"),
    ],
)
def test_a_mistake_in_another_object_is_told_with_file_and_path_and_what_is_allowed(document: Any, said: str) -> None:
    message = mistake(HELLO, document)
    assert message.startswith(f"{FILE}: ")
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: 1\nb: [1, 2\nc: 3\n", r"^hello\.yaml: line 3: not YAML: ", id="bracket left open"),
        pytest.param("a: 1\n  b: 2\n", r"^hello\.yaml: line 2: not YAML: ", id="indented too far"),
        pytest.param(
            "a:\n  b: 1\n  c: 2\n  b: 3\n",
            r"^hello\.yaml: line 4: not YAML: the key 'b' stands twice in one object$",
            id="key that stands twice",
        ),
        pytest.param("a: *b\n", r"^hello\.yaml: line 1: not YAML: found undefined alias", id="alias of nothing"),
        pytest.param("a: 1\n\tb: 2\n", r"^hello\.yaml: line 2: not YAML: .*'\\t'", id="tab"),
        pytest.param("kind: !!python/object:os.system {}\n", r"^hello\.yaml: line 1: not YAML: ", id="something to run"),
        pytest.param("a: 1\nb: \x00\n", r"^hello\.yaml: line 2: not YAML: .*special characters", id="control character"),
        pytest.param("released: 2026-13-45\n", r"^hello\.yaml: not YAML: month", id="impossible date"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifests([(FILE, text)])
    assert re.search(said, str(caught.value))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "---\n", "# a comment\n", yaml.safe_dump(config_map("flags"))])
def test_files_without_a_service_are_a_mistake(text: str) -> None:
    with pytest.raises(ManifestError, match=r"^a\.yaml, b\.yaml: found no serving\.knative\.dev/v1 Service$"):
        read_manifests([("a.yaml", text), ("b.yaml", "")])


def test_the_file_of_a_mistake_is_named_where_there_are_several() -> None:
    with pytest.raises(ManifestError, match=r"^second\.yaml: Service hello: stands twice in namespace default \(first in first\.yaml\)$"):
        read_manifests([("first.yaml", yaml.safe_dump(HELLO)), ("second.yaml", yaml.safe_dump(HELLO))])


def test_files_and_standard_input_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(yaml.safe_dump(HELLO))
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(put(("metadata", "name"), "piped"))))
    manifests = Sources([tmp_path / FILE, Path("-")]).read()
    assert [(service.file, service.name) for service in manifests.services] == [
        (str(tmp_path / FILE), "hello"),
        ("standard input", "piped"),
    ]


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"name: \xff"), lambda path: None], ids=["not UTF-8", "absent"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: Any) -> None:
    make(tmp_path / FILE)
    with pytest.raises(ManifestError, match=r"cannot be read: (byte 6 is not UTF-8|No such file)") as caught:
        Sources([tmp_path / FILE]).read()
    assert str(caught.value).startswith(f"{tmp_path / FILE}: ")
    assert len(str(caught.value).splitlines()) == 1


def traffic(*targets: dict[str, Any], name: str = "hello") -> dict[str, Any]:
    return put(TRAFFIC, list(targets), put(("metadata", "name"), name))


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        pytest.param(
            [traffic({"percent": 50, "tag": "a"}, {"percent": 50, "tag": "a"})],
            "(Service hello): spec.traffic[1].tag: found 'a' twice (first in traffic[0]); tags must differ",
            id="one tag twice",
        ),
        pytest.param(
            [traffic({"percent": 100, "revisionName": "hello-1", "latestRevision": True})],
            "spec.traffic[0].latestRevision: found true with revisionName; give either latestRevision: true or a revisionName",
            id="both latest and a name",
        ),
        pytest.param(
            [traffic({"percent": 100, "tag": "a"}), traffic({"percent": 100}, name="a-hello")],
            "(Service hello): spec.traffic[0].tag: found 'a'; its host a-hello.default is that of Service a-hello",
            id="the host of another Service",
        ),
        pytest.param(
            [traffic({"percent": 100, "tag": "a"}, name="b-c"), traffic({"percent": 100, "tag": "a-b"}, name="c")],
            "(Service c): spec.traffic[0].tag: found 'a-b'; its host a-b-c.default is that of tag a of Service b-c",
            id="the host of another tag",
        ),
        pytest.param(
            [put(("metadata", "annotations"), {"relight/rollout": "blue-green"})],
            "(Service hello): metadata.annotations: relight/rollout = 'blue-green', must be rolling or recreate",
            id="a kind of roll-out that there is not",
        ),
    ],
)
def test_a_mistake_in_the_traffic_of_a_service_is_told_with_its_place(documents: list[dict[str, Any]], said: str) -> None:
    assert said in mistake(*documents)


def test_without_traffic_all_of_it_is_for_the_latest_revision() -> None:
    (target,) = read_service(put(TRAFFIC, [])).traffic
    assert (target.revision_name, target.percent, target.tag) == (None, 100, None)


def test_a_tag_may_be_chosen_by_a_header_where_the_cluster_allows_it() -> None:
    assert not read(HELLO).routes_by_header
    assert not read(HELLO, config_map("config-features", **{"tag-header-based-routing": "disabled"})).routes_by_header
    assert read(HELLO, config_map("config-features", **{"tag-header-based-routing": "Enabled"})).routes_by_header


def test_a_directory_stands_for_the_yaml_files_in_it(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"found no \.yaml or \.yml file in this directory$"):
        Sources([tmp_path]).read()
    (tmp_path / "b.yml").write_text(yaml.safe_dump(HELLO))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(put(("metadata", "name"), "first")))
    (tmp_path / "notes.txt").write_text("no YAML: [")
    assert [service.name for service in Sources([tmp_path]).read().services] == ["first", "hello"]
    (tmp_path / "kustomization.yaml").touch()
    with pytest.raises(ManifestError, match=rf"is to be rendered first: kubectl kustomize {tmp_path} > manifests.yaml$"):
        Sources([tmp_path]).read()


def test_what_was_piped_in_is_still_there_when_the_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text(yaml.safe_dump(HELLO))
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(put(("metadata", "name"), "piped"))))
    sources = Sources([tmp_path / FILE, Path("-")])
    assert [len(sources.read().services) for _ in range(2)] == [2, 2]
    assert sources.can_change
    assert not Sources([Path("-")]).can_change


def test_the_stamp_of_files_is_another_when_one_is_written_replaced_added_or_removed(tmp_path: Path) -> None:
    sources = Sources([tmp_path])
    stamps = [sources.stamp()]

    def note() -> None:
        assert sources.stamp() == sources.stamp()
        stamps.append(sources.stamp())

    (tmp_path / FILE).write_text("a")
    note()
    (tmp_path / FILE).write_text("ab")
    note()
    (tmp_path / "new").write_text("ab")
    (tmp_path / "new").replace(tmp_path / FILE)
    note()
    (tmp_path / FILE).unlink()
    note()
    (tmp_path).rmdir()
    note()
    assert [stamps.count(stamp) for stamp in stamps] == [2, 1, 1, 1, 2, 1]  # empty at the beginning, and again


SOURCE: dict[str, Any] = {
    "apiVersion": "sources.knative.dev/v1",
    "kind": "ContainerSource",
    "metadata": {"name": "events"},
    "spec": {
        "sink": {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "hello"}},
        "template": {"spec": {"containers": [{"name": "poll", "command": ["poll"]}]}},
    },
}
SINK = ("spec", "sink")
QUEUE = "http://queue.relight.localhost/000000000000"


def sink(value: dict[str, Any]) -> dict[str, Any]:
    return put(SINK, value, SOURCE)


def variable(name: str, value: str) -> dict[str, Any]:
    return put((*FUNCTION, "env"), [{"name": name, "value": value}], SOURCE)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(SOURCE["spec"]["sink"], (("default", "hello"), ""), id="by name"),
        pytest.param(SOURCE["spec"]["sink"] | {"uri": "/events"}, (("default", "hello"), "/events"), id="by name, with a path"),
        pytest.param({"uri": "http://hello.default.svc.cluster.local/a"}, (("default", "hello"), "/a"), id="by its address in a cluster"),
        pytest.param({"uri": "https://elsewhere.example/a"}, (None, "https://elsewhere.example/a"), id="elsewhere"),
    ],
)
def test_the_sink_of_a_source_is_a_service_or_an_address(value: dict[str, Any], expected: Any) -> None:
    (source,) = read(HELLO, sink(value)).sources
    assert (source.name, source.namespace, source.sink) == ("events", "default", expected)


def test_a_source_may_have_what_a_pod_may_have_and_a_service_may_not() -> None:
    document = put((*FUNCTION, "ports"), [{"name": "metrics", "containerPort": 9090}, {"name": "more", "containerPort": 8012}], SOURCE)
    document = put((*SPEC, "terminationGracePeriodSeconds"), 90, document)
    (source,) = read(HELLO, put((*SPEC, "serviceAccountName"), "reader", document)).sources
    assert source.spec.termination_grace_period_seconds == 90


def test_a_source_that_only_stands_elsewhere_is_the_same() -> None:
    (first,), (second,), (other,) = (read(*found).sources for found in ([HELLO, SOURCE], [SOURCE, HELLO], [HELLO, variable("A", "b")]))
    assert first == second != other


def test_queues_that_stand_anywhere_are_known_by_name() -> None:
    source = variable("QUEUE_SOURCE_URL", f"{QUEUE}/work")
    manifests = read(HELLO, source, config_map("queues", A=f"{QUEUE}/a.fifo"), secret(stringData={"B": f"{QUEUE}/b"}))
    assert manifests.queues == ["a.fifo", "b", "work"]
    assert manifests.mentions("http://queue.relight.localhost")


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        pytest.param([sink({})], "(ContainerSource events): spec.sink: found neither ref nor uri", id="no sink"),
        pytest.param([put(("spec",), {"template": SOURCE["spec"]["template"]}, SOURCE)], "spec.sink: Field required", id="no sink at all"),
        pytest.param([sink({"uri": "/a"})], "spec.sink.uri: found '/a'; must be an http address, or a path with a ref", id="half a sink"),
        pytest.param(
            [sink(SOURCE["spec"]["sink"] | {"uri": "http://a/b"})],
            "spec.sink.uri: found 'http://a/b'; with a ref it must be a path that begins with /",
            id="two sinks",
        ),
        pytest.param(
            [sink({"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "default"}})],
            "spec.sink.ref: found a eventing.knative.dev/v1 Broker; here a sink is a serving.knative.dev/v1 Service, or an address (uri)",
            id="broker",
        ),
        pytest.param(
            [put((*SINK, "ref", "name"), "hallo", SOURCE)],
            "spec.sink.ref: found Service 'hallo' of namespace 'default', which is in no manifest here; there are hello",
            id="nobody's name",
        ),
        pytest.param(
            [sink({"uri": "http://hello.models.svc.cluster.local"})],
            "spec.sink.uri: found Service 'hello' of namespace 'models', which is in no manifest here; there are hello",
            id="address of nobody",
        ),
        pytest.param([put((*SINK, "reff"), {}, SOURCE)], "spec.sink.reff: there is no such field; did you mean ref?", id="misspelt"),
        pytest.param(
            [put((*FUNCTION, "command"), [], SOURCE)], "containers[0].command: found none; here images are not run", id="no command"
        ),
        pytest.param(
            [variable("K_SINK", "http://a")], "containers[0].env[0].name: found 'K_SINK', which Knative sets itself", id="its sink"
        ),
        pytest.param(
            [variable("QUEUE_SOURCE_URL", "http://queue.relight.localhost/work")],
            "env: QUEUE_SOURCE_URL: found 'http://queue.relight.localhost/work'; an embedded queue is "
            "http://queue.relight.localhost/000000000000/NAME",
            id="half a queue",
        ),
        pytest.param(
            [SOURCE, config_map("queues", A=f"{QUEUE}/a b")],
            "(ConfigMap queues): data: A: found 'http://queue.relight.localhost/000000000000/a b'; an embedded queue is ",
            id="queue of no name",
        ),
        pytest.param(
            [put(("spec", "ceOverrides"), {"extensions": {"a-b": "c"}}, SOURCE)], "spec.ceOverrides.extensions.a-b", id="extension"
        ),
        pytest.param(
            [put((*FUNCTION, "livenessProbe"), {"httpGet": {"port": "metrics"}}, SOURCE)],
            "livenessProbe.httpGet.port: found metrics; must be a number, as this container has no ports of its own",
            id="port of no container",
        ),
        pytest.param([SOURCE, SOURCE], "ContainerSource events: stands twice in namespace default (first in hello.yaml)", id="twice"),
        pytest.param(
            [put((*SPEC, "timeoutSeconds"), 3, SOURCE)], "spec.template.spec.timeoutSeconds: there is no such field", id="a Service's"
        ),
    ],
)
def test_a_mistake_in_a_source_is_told_with_its_place(documents: list[dict[str, Any]], said: str) -> None:
    assert said in mistake(HELLO, *documents)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"name": "X-A", "value": "one\nHost: other"}, "value"),
        ({"name": "X A", "value": "one"}, "name"),
        ({"name": "X", "value": "\0"}, "value"),
    ],
    ids=["another line", "no name", "NUL"],
)
def test_a_probes_header_that_no_request_can_have_is_a_mistake_of_the_manifest(header: dict[str, str], field: str) -> None:
    probe = {"readinessProbe": {"httpGet": {"path": "/", "httpHeaders": [header]}}}
    with pytest.raises(ManifestError, match=rf"httpHeaders\[0\]\.{field}"):
        read_manifests([("hello.yaml", manifests(service("hello", container=probe)))])
