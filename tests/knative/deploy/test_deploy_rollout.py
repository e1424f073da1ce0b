"""`relight cluster` with the real kubectl, against an API that answers as a cluster's does."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from click.testing import CliRunner, Result

from knative.deploy import flags, rollout
from knative.deploy.agent import MANIFESTS
from knative.deploy.cli import cluster as command
from knative.deploy.kubectl import Kubectl
from knative.deploy.progress import held, pods_in_words
from knative.deploy.render import render_cluster
from knative.deploy.variables import Variables
from tests.knative.deploy.cluster import SERVING, Cluster, Object, becomes_ready, configured, pod, revise, serving
from tests.support import BIN, clean_environment, free_port, request, running, wait_until

URI = "s3://models/minilm#0123456789abcdef0123456789abcdef"

# As a registry has them; without one they are told to be nowhere.
IMAGES = ("IMAGE=r.example.com/function:1", "WEIGHTS_IMAGE=r.example.com/weights:1")
MINILM = "AGENT=function.agents.minilm:MiniLM"  # under whatever name

Run = Callable[..., Result]


@pytest.fixture
def cluster() -> Cluster:
    """A stock cluster with Knative, and the flags of the base."""
    found = Cluster()
    for name in ("default", "models"):
        found.add("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    found.config("config-features", multi_container_probing="Enabled")
    found.config("config-autoscaler")
    return found


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """run(words…): a sub-command of `relight cluster` to its end."""
    monkeypatch.setattr(rollout, "POLL_S", 0.05)
    with serving(cluster, tmp_path) as environ:
        yield lambda *words: CliRunner().invoke(command, words, env=environ)


def deploy(run: Run, *words: str) -> Result:
    return run("deploy", f"WEIGHTS_URI={URI}", MINILM, *words)


def test_a_deploy_applies_everything_tells_how_far_it_is_and_prints_the_url(cluster: Cluster, run: Run) -> None:
    def slowly(cluster: Cluster, service: Object, look: int) -> None:
        revision = revise(cluster, service)
        states: list[Object] = [
            {},
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}
                ]
            },
            {"containerStatuses": [{"name": "function", "ready": False, "state": {"waiting": {"reason": "ContainerCreating"}}}]},
            {"containerStatuses": [{"name": "function", "ready": False, "state": {"running": {}}}]},
        ]
        cluster.logs[f"{revision}-pod", "weights-cache"] = "INFO relight.weights: s3://models/minilm: 1200.0 of 16000.0 MB\n"
        if look > 2 * len(states):
            becomes_ready(cluster, service, look)
        else:
            cluster.add("pods", pod(revision, **states[(look - 1) // 2]), "default")

    cluster.controller = slowly
    done = deploy(run, *IMAGES, "NAME=ada")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "ada-00001: ada-00001-pod: waiting for its node",
        "ada-00001: ada-00001-pod has no node: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        "ada-00001: ada-00001-pod: pulling the image of function",
        "ada-00001: ada-00001-pod: weights 1.2 of 16.0 GB",
        "ada: ready at http://ada.default.example.com (ada-00001)",
    ]
    assert set(cluster.applied) == {("ServiceAccount", "relight-function"), ("NetworkPolicy", "relight-function"), ("Service", "ada")}
    assert cluster.dry_runs == 3


def test_of_several_pods_the_one_furthest_behind_is_told() -> None:
    def of(name: str, **function: Any) -> Object:
        return {"metadata": {"name": name}, "status": {"containerStatuses": [{"name": "function", **function}]}}

    ready, starting = of("a", ready=True), of("b", ready=False, state={"running": {}})
    image = of("c", ready=False, state={"waiting": {"reason": "ContainerCreating"}})
    fresh: Object = {"metadata": {"name": "d"}, "status": {}}
    unschedulable = {"type": "PodScheduled", "status": "False", "message": "no GPU is free"}
    homeless = {"metadata": {"name": "e"}, "status": {"conditions": [unschedulable]}}
    assert pods_in_words([], None) == "no pod yet"
    assert pods_in_words([ready], None) == "a: ready"
    assert pods_in_words([ready, starting], None) == "b: started; waiting for its probes"
    assert pods_in_words([starting], "s3://models/minilm: 16000.0 of 16000.0 MB") == "b: weights are there; loading the model"
    assert pods_in_words([starting, image, ready], None) == "c: pulling the image of function"
    assert pods_in_words([image, fresh], None) == "d: waiting for its node"
    assert pods_in_words([fresh, homeless], None) == "e has no node: no GPU is free"


@pytest.mark.parametrize(
    ("traffic", "told"),
    [
        (None, None),
        ([{"latestRevision": True, "percent": 100}], None),
        ([{"revisionName": "ada-00001", "percent": 90}, {"revisionName": "ada-00002", "percent": 10}], None),
        ([{"revisionName": "ada-00001", "percent": 100}, {"latestRevision": True, "percent": 0, "tag": "next"}], "ada-00001"),
    ],
)
def test_traffic_that_does_not_go_to_the_newest_revision_is_told(traffic: list[Object] | None, told: str | None) -> None:
    spec = {} if traffic is None else {"traffic": traffic}
    assert held({"spec": spec, "status": {"latestReadyRevisionName": "ada-00002"}}) == told


def test_a_second_deploy_makes_no_new_revision(cluster: Cluster, run: Run) -> None:
    assert deploy(run).exit_code == 0
    again = deploy(run)
    assert again.exit_code == 0
    assert "nothing has changed since generation 1; no new revision" in again.stdout
    assert cluster.service()["status"]["latestCreatedRevisionName"] == "minilm-00001"
    changed = deploy(run, "MIN_SCALE=1")
    assert (changed.exit_code, cluster.service()["status"]["latestCreatedRevisionName"]) == (0, "minilm-00002")


def test_an_image_that_cannot_be_resolved_is_told_with_the_revisions_condition(cluster: Cluster, run: Run) -> None:
    def unresolved(cluster: Cluster, service: Object, look: int) -> None:
        revision = revise(cluster, service)
        said = f'Revision "{revision}" failed with message: Unable to fetch image "relight-function:0.1.0": not found.'
        service["status"]["conditions"] = [{"type": "Ready", "status": "False", "reason": "RevisionFailed", "message": said}]

    cluster.controller = unresolved
    done = deploy(run)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: minilm is not ready\n  Service minilm: RevisionFailed: Revision")
    assert 'Unable to fetch image "relight-function:0.1.0": not found.' in done.stderr


def test_a_container_that_crashes_is_told_with_events_and_its_last_lines(cluster: Cluster, run: Run) -> None:
    assert deploy(run).exit_code == 0

    def crashing(cluster: Cluster, service: Object, look: int) -> None:
        revision = revise(cluster, service)
        service["status"]["conditions"] = [{"type": "Ready", "status": "Unknown"}]
        waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        status = {"name": "function", "ready": False, "state": waiting, "lastState": ended}
        cluster.add("pods", pod(revision, containerStatuses=[status]), "default")
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e1", "namespace": "default"}, "type": "Warning"}
        event |= {"reason": "BackOff", "message": "Back-off restarting failed container", "involvedObject": {"name": f"{revision}-pod"}}
        cluster.add("events", event, "default")
        cluster.logs[f"{revision}-pod", "function"] = "loading\nout of memory\n"

    cluster.controller = crashing
    done = deploy(run, "TARGET=2")
    assert done.exit_code == 1
    said = done.stderr.splitlines()
    assert "  pod minilm-00002-pod, container function: it ends again and again; back-off 10s; last exit status 137 (OOMKilled)" in said
    assert "  event of minilm-00002-pod: BackOff: Back-off restarting failed container" in said
    assert said[said.index("  last lines of minilm-00002-pod, function:") + 2] == "    out of memory"
    assert said[-1] == "  minilm-00001 goes on serving"


def test_a_revision_that_takes_too_long_is_not_waited_for(cluster: Cluster, run: Run) -> None:
    def idle(cluster: Cluster, service: Object, look: int) -> None:
        revise(cluster, service)

    cluster.controller = idle
    done = deploy(run, "TIMEOUT=1")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: not ready after 1 s\n")


def test_a_flag_that_is_off_is_named_before_anything_is_applied(cluster: Cluster, run: Run) -> None:
    cluster.config("config-features", multi_container_probing="Disabled")
    done = deploy(run)
    assert done.exit_code == 1
    assert "config-features: multi-container-probing must be 'enabled' (a weights sidecar that hangs is restarted)" in done.stderr
    assert done.stderr.endswith("applies it once: make cluster ENV=default | kubectl apply --server-side -f -\n")
    assert (cluster.applied, cluster.dry_runs) == ([], 0)
    assert "make cluster ENV=default GPU=1 | kubectl apply" in deploy(run, "GPU=1").stderr


def test_without_knative_it_says_so(cluster: Cluster, run: Run) -> None:
    del cluster.kinds[SERVING]
    done = deploy(run)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the cluster has no Knative Serving")


@pytest.mark.parametrize("command", ["status", "logs", "invoke", "undeploy"])
def test_all_others_say_so_too(cluster: Cluster, run: Run, command: str) -> None:
    del cluster.kinds[SERVING]
    done = run(command)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the cluster has no Knative Serving")


def test_a_namespace_that_is_not_there_is_told_with_how_to_make_it(cluster: Cluster, run: Run) -> None:
    done = deploy(run, "NAMESPACE=nowhere")
    assert (done.exit_code, done.stderr) == (1, "Error: there is no namespace nowhere: kubectl create namespace nowhere\n")
    assert cluster.applied == []


def test_what_the_webhook_refuses_changes_nothing(cluster: Cluster, run: Run) -> None:
    cluster.webhook = lambda service: "must not set the field(s): spec.template.spec.tolerations"
    done = deploy(run)
    assert done.exit_code == 1
    assert "must not set the field(s): spec.template.spec.tolerations" in done.stderr
    assert not [kind for kind, _ in cluster.applied]


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    environ = configured(tmp_path, f"http://127.0.0.1:{free_port()}")
    for words in (("deploy", f"WEIGHTS_URI={URI}"), ("undeploy",), ("status",), ("logs",), ("invoke",)):
        done = CliRunner().invoke(command, words, env=environ)
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: no cluster can be reached: "), words


def test_without_a_configuration_it_says_that_no_cluster_can_be_reached(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["status"], env={"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)})
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: no cluster can be reached: ")


def test_without_kubectl_it_says_so() -> None:
    done = CliRunner().invoke(command, ["deploy", "KUBECTL=/nowhere/kubectl"])
    assert (done.exit_code, done.stderr.startswith("Error: /nowhere/kubectl is not there: install kubectl")) == (1, True)


def test_weights_that_cannot_be_pinned_stop_the_deploy_and_say_what_to_do(
    cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    done = run("deploy")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: s3://models/minilm cannot be pinned to a snapshot: ")
    assert "PIN=false" in done.stderr
    assert cluster.applied == []
    assert run("deploy", "PIN=false").exit_code == 0


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server that the environment leads to, with a bucket `models`."""
    port = free_port()
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    for name, value in {**env, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    server = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    with running(server, tmp_path / "s3.log", clean_environment()):
        wait_until("the S3 server", lambda: request(port, "GET", "/"))
        client = boto3.client("s3")
        client.create_bucket(Bucket="models")
        yield client


def test_a_revision_is_pinned_to_the_weights_that_the_store_has_and_new_weights_are_a_new_revision(
    cluster: Cluster, run: Run, store: Any
) -> None:
    def pinned() -> str:
        (uri,) = {
            variable["value"]
            for one in cluster.service()["spec"]["template"]["spec"]["containers"]
            for variable in one["env"]
            if variable["name"] == "WEIGHTS_URI"
        }
        return str(uri)

    store.put_object(Bucket="models", Key="minilm/model.safetensors", Body=b"first")
    done = run("deploy", *IMAGES)
    assert (done.exit_code, done.stderr) == (0, "")
    first = pinned()
    assert re.fullmatch(r"s3://models/minilm#[0-9a-f]{32}", first)
    assert done.stdout.splitlines()[0] == f"weights: {first}"
    assert "no new revision" in run("deploy", *IMAGES).stdout

    store.put_object(Bucket="models", Key="minilm/model.safetensors", Body=b"second")
    assert run("deploy").exit_code == 0
    assert (pinned() == first, cluster.service()["status"]["latestCreatedRevisionName"]) == (False, "minilm-00002")


def test_a_store_that_does_not_answer_is_not_waited_for_for_ever(cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "STORE_S", 1.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        done = run("deploy")
    assert done.stderr.startswith("Error: s3://models/minilm cannot be pinned to a snapshot: no answer within 1 s\n")
    assert (done.exit_code, cluster.applied) == (1, [])


def test_undeploy_leaves_what_other_functions_share(cluster: Cluster, run: Run) -> None:
    assert deploy(run).exit_code == 0
    assert deploy(run, "NAME=other").exit_code == 0
    first = run("undeploy", "NAME=other")
    assert (first.exit_code, "left for minilm" in first.stdout) == (0, True)
    assert ("serviceaccounts", "default", "relight-function") in cluster.objects
    assert run("undeploy").exit_code == 0
    assert not [key for key in cluster.objects if key[0] in ("services", "serviceaccounts", "networkpolicies")]


def test_status_tells_of_revisions_and_pods_and_logs_of_their_output(cluster: Cluster, run: Run) -> None:
    missing = run("status")
    assert (missing.exit_code, missing.stderr) == (1, "Error: there is no Service minilm in namespace default: `make deploy` brings it\n")
    assert deploy(run).exit_code == 0
    assert run("logs").stdout == "minilm has no pods, and so no log: at zero\n"
    assert run("status").stdout.splitlines() == [
        "minilm: ready, http://minilm.default.example.com",
        "  100 % to minilm-00001",
        "  no pods: at zero",
    ]


def test_the_log_is_of_the_container_that_is_named_and_goes_on_if_wanted(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    assert deploy(run).exit_code == 0
    cluster.add("pods", pod("minilm-00001", containerStatuses=[]), "default")
    cluster.logs["minilm-00001-pod", "function"] = "ready\n"
    cluster.logs["minilm-00001-pod", "weights-cache"] = "90.9 of 90.9 MB\n"
    assert run("logs").stdout == "[pod/minilm-00001-pod/function] ready\n"
    assert run("logs", "CONTAINER=weights-cache").stdout == "[pod/minilm-00001-pod/weights-cache] 90.9 of 90.9 MB\n"
    with serving(cluster, tmp_path) as environ:
        follow = [str(BIN / "relight"), "cluster", "logs", "FOLLOW=true"]
        done = subprocess.run(follow, env=clean_environment(**environ), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[pod/minilm-00001-pod/function] ready\n", "")


class Gateway:
    """A cluster's, to the test's own function: it keeps what was asked, as (method, path, host, body)."""

    def __init__(self, answer: Callable[[bytes], int] = lambda _: 200, said: bytes = b"the answer") -> None:
        outer = self
        self.asked: list[tuple[str, str, str, bytes]] = []
        self.headers: list[Message] = []  # of each

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.headers.append(self.headers)
                outer.asked.append((self.command, self.path, self.headers["Host"], body))
                self.send_response(answer(body))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"ADDRESS=http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Gateway":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def allow_all_of_gpu(cluster: Cluster) -> None:
    for name, data in flags.shipped(render_cluster(Variables(env="gpu"), Kubectl())).items():
        cluster.add("configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}, "knative-serving")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b'{"error": {"type": "unavailable", "message": "the function cannot start: no objects\\nbelow"}}', "no objects\\nbelow"),
        (b'{"error": "the function cannot start: x"}', "the function cannot start: x"),
        (b"activator request timeout\n", "activator request timeout"),
        (b"", "nothing"),
    ],
)
def test_a_first_call_that_is_not_answered_is_a_deploy_that_failed(cluster: Cluster, run: Run, said: bytes, told: str) -> None:
    allow_all_of_gpu(cluster)

    def ready_and_crashing(cluster: Cluster, service: Object, look: int) -> None:
        becomes_ready(cluster, service, look)
        ended = {"terminated": {"exitCode": 3, "reason": "Error", "message": "loading\n  ERROR relight.function: no weights\n"}}
        status = {"name": "function", "ready": False, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended}
        cluster.add("pods", pod(service["status"]["latestCreatedRevisionName"], containerStatuses=[status]), "default")

    cluster.controller = ready_and_crashing
    with Gateway(lambda _: 503, said) as gateway:
        done = deploy(run, "ENV=gpu", gateway.address)
    assert done.exit_code == 1
    first, second, *others = done.stderr.splitlines()
    assert first.startswith("Error: the first call was answered 503: ")
    assert first.endswith(told)
    assert second == "minilm does not answer"
    assert any(line.endswith("last exit status 3 (Error): ERROR relight.function: no weights") for line in others)


def test_a_roll_out_in_place_ends_with_a_first_call_that_starts_the_new_pod(cluster: Cluster, run: Run) -> None:
    allow_all_of_gpu(cluster)
    with Gateway() as gateway:
        done = deploy(run, "ENV=gpu", gateway.address)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "starting it with a first call"
    assert gateway.asked == [("GET", "/v1/models", "minilm.default.example.com", b"")]
    unreached = deploy(run, "ENV=gpu", gateway.address)  # it has gone
    assert unreached.exit_code == 0
    assert re.search(r"note: http://127.0.0.1:\d+ cannot be reached from here .*; the first caller will start it\n$", unreached.stdout)


def test_invoke_sends_the_example_through_the_gateway_that_is_named(cluster: Cluster, run: Run) -> None:
    assert deploy(run).exit_code == 0
    with Gateway(lambda body: 200 if b"instances" in body else 400) as gateway:
        good, bad = run("invoke", gateway.address), run("invoke", gateway.address, 'DATA={"a": 1}')
        models = run("invoke", gateway.address, "ROUTE=/v1/models")
    assert (good.exit_code, good.stdout) == (0, "the answer\n")
    assert bad.exit_code == 1
    host = "minilm.default.example.com"
    assert gateway.asked[:2] == [
        ("POST", "/", host, b'{"instances": ["A man is eating food."]}'),
        ("POST", "/", host, b'{"a": 1}'),
    ]
    assert (models.exit_code, gateway.asked[2]) == (1, ("GET", "/v1/models", host, b""))


def test_invoke_without_an_example_asks_for_one(cluster: Cluster, run: Run) -> None:
    assert deploy(run, "AGENT=my_model:Linear", *IMAGES).exit_code == 0
    with Gateway() as gateway:
        done = run("invoke", gateway.address)
    assert (done.exit_code, gateway.asked) == (1, [])
    assert "minilm has no example (EXAMPLE= of `make deploy`): say what to send, DATA='{…}'" in done.stderr


def test_invoke_sends_a_header_that_is_given(cluster: Cluster, run: Run) -> None:
    assert deploy(run).exit_code == 0
    with Gateway() as gateway:
        assert run("invoke", gateway.address, "HEADER=Authorization: Bearer a:b").exit_code == 0
        assert gateway.headers[0]["Authorization"] == "Bearer a:b"
        refused = run("invoke", gateway.address, "HEADER=Bearer a-key")
    assert (refused.exit_code, len(gateway.asked)) == (1, 1)
    assert "HEADER=…: must be a header that a caller may choose, as 'Name: value'" in refused.stderr


def test_a_gateway_on_this_machine_is_asked_without_a_proxy(cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deploy(run).exit_code == 0
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Gateway() as gateway, Gateway(lambda _: 502) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address.removeprefix("ADDRESS="))
        monkeypatch.setenv("NO_PROXY", "unrelated.example")
        done = run("invoke", gateway.address)
    assert (done.exit_code, len(proxy.asked)) == (0, 0)


QUEUE_URL = "QUEUE_URL=https://sqs.eu-west-1.amazonaws.com/123456789012/work"
EVENTING = {"sources.knative.dev/v1": [("ContainerSource", "containersources", True)]}


def test_a_queues_source_comes_and_goes_with_its_function(cluster: Cluster, run: Run) -> None:
    cluster.kinds |= EVENTING
    for name in ("ada", "bob"):
        done = deploy(run, f"NAME={name}", QUEUE_URL)
        assert (done.exit_code, done.stderr) == (0, "")
    assert cluster.objects["containersources", "default", "ada-queue"]["spec"]["sink"]["ref"]["name"] == "ada"
    gone = run("undeploy", "NAME=ada", QUEUE_URL)
    assert (gone.exit_code, gone.stderr) == (0, "")
    assert gone.stdout.splitlines()[:2] == ["ContainerSource ada-queue: deleted", "ada: deleted"]
    assert [name for plural, _, name in cluster.objects if plural == "containersources"] == ["bob-queue"]
    assert ("serviceaccounts", "default", "relight-queue-source") in cluster.objects  # bob's too
    assert run("undeploy", "NAME=bob", QUEUE_URL).exit_code == 0
    assert {plural for plural, _, _ in cluster.objects} == {"namespaces", "configmaps", "revisions"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([QUEUE_URL], "the cluster has no ContainerSource (sources.knative.dev/v1): Knative Eventing or one of its extensions brings it"),
        (["EVENTS=sqs-keda", QUEUE_URL], "the cluster has no ScaledObject (keda.sh/v1alpha1): KEDA brings it"),
        (["EVENTS=broker"], "the cluster has no Broker (eventing.knative.dev/v1): Knative Eventing or its Kafka broker brings it"),
        (["EVENTS=kafka"], "the cluster has no KafkaSink (eventing.knative.dev/v1alpha1): Knative Eventing or its Kafka broker brings it"),
    ],
)
def test_a_cluster_that_lacks_a_kind_is_told_which_and_what_brings_it(cluster: Cluster, run: Run, words: list[str], message: str) -> None:
    done = deploy(run, *words)
    assert (done.exit_code, done.stderr.startswith(f"Error: {message}")) == (1, True), done.stderr
    assert (cluster.applied, cluster.dry_runs) == ([], 0)


def test_a_group_that_lacks_just_the_kind_is_no_better(cluster: Cluster, run: Run) -> None:
    cluster.kinds |= {"sources.knative.dev/v1alpha1": [("IntegrationSource", "integrationsources", True)]}
    done = deploy(run, "EVENTS=rabbitmq")
    assert done.stderr.startswith("Error: the cluster has no RabbitmqSource (sources.knative.dev/v1alpha1)")


def test_a_cluster_without_admission_policies_gets_no_agents_that_label_nodes(cluster: Cluster, run: Run) -> None:
    allow_all_of_gpu(cluster)
    del cluster.kinds["admissionregistration.k8s.io/v1"]
    done = deploy(run, "ENV=gpu")
    assert done.exit_code == 1
    assert "Kubernetes 1.30 brings it; leave out the component prefetch" in done.stderr
    assert cluster.applied == []


def test_what_the_cluster_says_of_a_secret_is_told_without_its_values(cluster: Cluster, run: Run, tmp_path: Path) -> None:
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "store"},
        "stringData": {"A": 'gehe"im'},
        "data": {"B": "c2VjcmV0"},
    }
    (tmp_path / "secret.yaml").write_text(yaml.safe_dump(secret))
    overlay = {"resources": [os.path.relpath(MANIFESTS / "overlays/default", tmp_path.resolve()), "secret.yaml"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    cluster.kinds["v1"] = [*cluster.kinds["v1"], ("Secret", "secrets", True)]
    cluster.webhook = lambda service: 'Invalid value: {"stringData":{"A":"gehe\\"im"},"data":{"B":"c2VjcmV0"}} secret http://u:pw@host'
    done = deploy(run, f"ENV={tmp_path}/")
    assert done.exit_code == 1
    assert 'Invalid value: {"stringData":{"A":"***"},"data":{"B":"***"}} *** http://***@host' in done.stderr


def test_what_a_pod_says_moves_no_cursor(cluster: Cluster, run: Run) -> None:
    def failed(cluster: Cluster, service: Object, look: int) -> None:
        revision = revise(cluster, service)
        log = "Container failed with: loading\n  Traceback\nOSError: \x1b[2Jgone\r"
        service["status"]["conditions"] = [
            {"type": "Ready", "status": "False", "reason": "RevisionFailed", "message": f'Revision "r" {log}'}
        ]
        waiting = {"name": "function", "ready": False, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
        cluster.add("pods", pod(revision, containerStatuses=[waiting]), "default")
        cluster.logs[f"{revision}-pod", "function"] = "\x1b]0;title\x07 and\u202e\n"

    cluster.controller = failed
    for done in (deploy(run), run("status"), run("logs")):
        assert done.exit_code in (0, 1)
        assert not set(done.output) & set("\x1b\x07\r\u202e")
    assert '"r" Container failed with: OSError: \\x1b[2Jgone' in run("status").stdout
