"""The ways of events: what each has to say, and how a queue and a function's name get into it."""

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.autoscaler import ScaleSpec
from knative.deploy.agent import MANIFESTS
from knative.deploy.errors import DeployError, VariableError
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import Object, containers, get_env, pod_spec
from knative.deploy.render import render
from knative.deploy.variables import Variables
from knative.queue_source.settings import from_environment
from knative.queue_source.source import LAST_S
from tests.knative.deploy import eventing_kinds
from tests.knative.deploy.test_deploy_manifests import EVENTS, QUEUE_URL
from tests.support import ROOT


@functools.cache
def rendering(**variables: Any) -> list[Object]:
    return render(Variables(**variables), Kubectl())


def rendered(**variables: Any) -> dict[str, Object]:
    """The objects by kind; NetworkPolicies and ServiceAccounts by name."""
    objects = copy.deepcopy(rendering(**variables))
    return {
        item["metadata"]["name"] if item["kind"] in ("NetworkPolicy", "ServiceAccount") else item["kind"]: item
        for item in objects
        if item["kind"] != "ConfigMap"
    }


def source(objects: dict[str, Object]) -> Object:
    (found,) = [one for one in containers(objects.values()) if one["name"] == "queue-source"]
    return found


@pytest.mark.parametrize("way", ["sqs", "sqs-keda"])
def test_a_queue_is_all_that_has_to_be_named(way: str) -> None:
    objects = rendered(events=way, queue_url=QUEUE_URL)
    assert get_env(source(objects), "QUEUE_SOURCE_URL") == QUEUE_URL
    assert get_env(source(objects), "AWS_DEFAULT_REGION") == "eu-west-1"
    assert get_env(source(objects), "QUEUE_SOURCE_RESULTS_URL") is None
    if way == "sqs-keda":
        (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
        assert (trigger["metadata"]["queueURL"], trigger["metadata"]["awsRegion"]) == (QUEUE_URL, "eu-west-1")


def test_a_queue_means_the_container_source_unless_something_else_is_said() -> None:
    assert "ContainerSource" in rendered(queue_url=QUEUE_URL)


def test_a_queue_elsewhere_than_in_aws_has_its_own_endpoint() -> None:
    objects = rendered(
        events="sqs-keda", queue_url="http://elasticmq.queues:9324/queue/work", results_url="http://elasticmq.queues:9324/queue/done"
    )
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    assert trigger["metadata"]["awsEndpoint"] == "http://elasticmq.queues:9324"
    assert get_env(source(objects), "QUEUE_SOURCE_RESULTS_URL") == "http://elasticmq.queues:9324/queue/done"
    assert [line for one in objects.values() if one["kind"] == "ScaledObject" for line in eventing_kinds.problems(one)] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["QUEUE_URL=work"], "QUEUE_URL=work: must be the URL of an SQS queue"),
        (["QUEUE_URL=https://user:secret@sqs.us-east-1.amazonaws.com/1/work"], "must be the URL of an SQS queue"),
        (["QUEUE_URL=https://sqs.us-east-1.amazonaws.com/123456789012/"], "must be the URL of an SQS queue"),
        (["QUEUE_URL=https://sqs.us-east-1.amazonaws.com/1/w?x=1"], "must be the URL of an SQS queue"),
        (["EVENTS=sns"], "EVENTS=sns: must be one of sqs, sqs-keda, amqp, broker, kafka, rabbitmq, integration-source"),
        ([f"RESULTS_URL={QUEUE_URL}"], "goes with QUEUE_URL"),
        ([f"RESULTS_URL={QUEUE_URL}", f"QUEUE_URL={QUEUE_URL}"], "must be another queue than QUEUE_URL"),
    ],
)
def test_what_cannot_be_a_queue_is_refused_before_anything_is_called(words: list[str], message: str) -> None:
    with pytest.raises(VariableError, match=re.escape(message)):
        Variables.parse(words)


def test_queue_urls_of_all_kinds_are_taken() -> None:
    for url in (QUEUE_URL, f"{QUEUE_URL}.fifo", "http://127.0.0.1:5000/123456789012/a-b_c", "https://eu-west-1.queue.amazonaws.com/1/x"):
        assert Variables.parse([f"QUEUE_URL={url}"]).queue_url == url


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"events": "sqs"}, "QUEUE_URL: which queue?"),
        ({"events": "sqs-keda"}, "QUEUE_URL: which queue?"),
        ({"events": "amqp", "queue_url": QUEUE_URL}, "EVENTS=amqp has no such queue"),
        ({"events": "broker", "queue_url": QUEUE_URL}, "EVENTS=broker has no such queue"),
        ({"events": "sqs", "queue_url": QUEUE_URL, "env": "keda"}, "the overlay keda has no Knative Service"),
    ],
)
def test_what_does_not_go_together_is_said(variables: dict[str, Any], message: str) -> None:
    with pytest.raises(DeployError, match=re.escape(message)):
        render(Variables(**variables), Kubectl())


@pytest.mark.parametrize("way", EVENTS)
def test_everything_follows_the_functions_name_and_namespace(way: str) -> None:
    objects = render(Variables(events=way, queue_url=QUEUE_URL if "sqs" in way else None, name="ada", namespace="models"), Kubectl())
    text = yaml.safe_dump([item for item in objects if item["kind"] != "Service"]).replace("s3://models/minilm", "")
    assert "minilm" not in text
    assert {item["metadata"]["namespace"] for item in objects} == {"models"}
    for item in objects:
        for found in (sinks := [item["spec"].get(key, {}).get("ref") for key in ("sink", "subscriber")] if "spec" in item else []):
            assert found is None or (found["kind"], found["name"]) == ("Service", "ada"), sinks


def test_a_folder_of_ones_own_may_name_a_way_and_its_queue(tmp_path: Path) -> None:
    patch = {"op": "replace", "path": "/spec/template/spec/containers/0/env/0/value", "value": QUEUE_URL}
    document: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "default",
        "patches": [{"target": {"kind": "ContainerSource"}, "patch": yaml.safe_dump([patch])}],
    }
    ups = Path(*[".."] * len(tmp_path.resolve().parts[1:]))
    for key, folder in (("resources", "base"), ("components", "eventing/sqs")):
        document[key] = [str(ups / MANIFESTS.resolve().relative_to("/") / folder)]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(document))
    own = str(tmp_path)
    assert get_env(source(rendered(env=own)), "QUEUE_SOURCE_URL") == QUEUE_URL
    assert get_env(source(rendered(env=own, queue_url=f"{QUEUE_URL}2")), "QUEUE_SOURCE_URL") == f"{QUEUE_URL}2"
    with pytest.raises(DeployError, match="sqs and sqs-keda exclude each other"):
        render(Variables(env=own, events="sqs-keda", queue_url=QUEUE_URL), Kubectl())


def test_the_queues_credentials_are_the_sources_alone() -> None:
    for way in ("sqs", "sqs-keda"):
        objects = rendered(events=way, queue_url=QUEUE_URL)
        holders = {
            one["name"]
            for one in containers(objects.values())
            for each in one.get("envFrom", [])
            if each["secretRef"]["name"] == "queue-source"
        }
        assert holders == {"queue-source"}
        made = objects["ContainerSource" if way == "sqs" else "Deployment"]
        assert pod_spec(made)["serviceAccountName"] == "relight-queue-source" != pod_spec(objects["Service"])["serviceAccountName"]
        assert not [variable for variable in source(objects)["env"] if re.search("SECRET|ACCESS_KEY|TOKEN", variable["name"])]


@pytest.mark.parametrize("way", ["sqs", "sqs-keda", "amqp"])
def test_the_source_takes_its_settings_and_they_fit_the_function_and_the_pod(way: str) -> None:
    objects = rendered(events=way, queue_url=None if way == "amqp" else QUEUE_URL)
    environ = {variable["name"]: variable.get("value", "amqps://u:p@host/%2F/q") for variable in source(objects)["env"]}
    found = from_environment(environ | {"K_SINK": "http://minilm.default.svc.cluster.local", "K_CE_OVERRIDES": ""})
    assert pod_spec(objects["Service"])["timeoutSeconds"] < found.timeout_s
    pod = pod_spec(objects["Deployment" if way == "sqs-keda" else "ContainerSource"])
    assert found.drain_s + found.wait_s + LAST_S < pod["terminationGracePeriodSeconds"]
    ports = {source(objects)[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")}
    assert ports == {found.port} == {port["containerPort"] for port in source(objects)["ports"]}


def test_the_function_is_asked_for_as_much_at_once_as_its_pods_are_for() -> None:
    objects = rendered(queue_url=QUEUE_URL)
    template = objects["Service"]["spec"]["template"]
    spec = ScaleSpec.parse(template["metadata"]["annotations"], template["spec"]["containerConcurrency"])
    wanted = float(get_env(source(objects), "QUEUE_SOURCE_CONCURRENCY") or 0) / spec.target  # utilisation is in it
    assert spec.max_scale - 1 < wanted <= spec.max_scale + 1


@pytest.mark.parametrize("way", ["sqs", "sqs-keda"])
def test_a_source_reaches_the_gateway_and_the_activator_and_they_reach_the_function(way: str) -> None:
    objects = rendered(events=way, queue_url=QUEUE_URL)
    policies = {item["metadata"]["name"]: item for item in rendering(events=way, queue_url=QUEUE_URL) if item["kind"] == "NetworkPolicy"}
    policy = policies["relight-queue-source"]
    made = objects["ContainerSource" if way == "sqs" else "Deployment"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= made["spec"]["template"]["metadata"]["labels"].items()

    def namespaces(rules: list[Object], side: str) -> set[str]:
        return {
            value
            for rule in rules
            for peer in rule.get(side, [])
            for expression in peer.get("namespaceSelector", {}).get("matchExpressions", [])
            for value in expression["values"]
        }

    allowed = namespaces(policies["relight-function"]["spec"]["ingress"], "from")
    assert "knative-serving" in allowed
    assert allowed <= namespaces(policy["spec"]["egress"], "to")


def test_kedas_deployment_is_the_container_sources_pod_and_bound_to_the_function() -> None:
    plain, scaled = (rendered(events=way, queue_url=QUEUE_URL) for way in ("sqs", "sqs-keda"))
    deployment = scaled["Deployment"]
    assert deployment["spec"]["template"] == plain["ContainerSource"]["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert "replicas" not in deployment["spec"]
    name = deployment["metadata"]["name"]
    assert scaled["SinkBinding"]["spec"]["subject"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert scaled["SinkBinding"]["spec"]["sink"] == plain["ContainerSource"]["spec"]["sink"]
    spec = scaled["ScaledObject"]["spec"]
    assert (spec["scaleTargetRef"]["name"], spec["minReplicaCount"]) == (name, 0)
    (trigger,) = spec["triggers"]
    assert trigger["metadata"]["scaleOnInFlight"] == "true"  # what is held counts, or its holder goes
    assert trigger["metadata"]["queueLength"] == get_env(source(scaled), "QUEUE_SOURCE_CONCURRENCY")
    assert trigger["authenticationRef"]["name"] == scaled["TriggerAuthentication"]["metadata"]["name"]


def test_the_broker_keeps_events_and_its_trigger_gives_none_up_in_silence() -> None:
    objects = rendered(events="broker")
    assert objects["Broker"]["metadata"]["annotations"]["eventing.knative.dev/broker.class"] == "Kafka"
    spec = objects["Trigger"]["spec"]
    assert spec["broker"] == objects["Broker"]["metadata"]["name"]
    assert {"retry", "backoffPolicy", "backoffDelay", "deadLetterSink"} <= set(spec["delivery"])
    assert spec["delivery"]["deadLetterSink"]["ref"]["name"] == objects["KafkaSink"]["metadata"]["name"]


def test_replies_are_not_given_to_the_function_again() -> None:
    from function.protocols.cloudevents import REPLY

    assert rendered(events="broker")["Trigger"]["spec"]["filters"] == [{"not": {"suffix": {"type": REPLY}}}]


def test_the_address_of_a_rabbitmq_comes_from_the_secret_and_its_port_is_let_through() -> None:
    objects = render(Variables(events="amqp"), Kubectl())
    (one,) = [one for one in containers(objects) if one["name"] == "queue-source"]
    (address,) = [variable for variable in one["env"] if variable["name"] == "QUEUE_SOURCE_URL"]
    assert address["valueFrom"]["secretKeyRef"]["name"] == one["envFrom"][0]["secretRef"]["name"]
    (policy,) = [item for item in objects if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == "relight-queue-source"]
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
    assert ports == {53, 80, 5671, 5672}


def test_kafkas_source_has_dead_letters_and_rabbitmqs_a_queue_of_ones_own() -> None:
    kafka = rendered(events="kafka")
    assert kafka["KafkaSource"]["spec"]["delivery"]["deadLetterSink"]["ref"]["name"] == kafka["KafkaSink"]["metadata"]["name"]
    assert rendered(events="rabbitmq")["RabbitmqSource"]["spec"]["rabbitmqResourcesConfig"]["predeclared"] is True


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sinks": {}}, "spec.sinks: there is no such field"),
        ({"topics": "minilm"}, "spec.topics: must be a list that is not empty"),
        ({"consumers": "2"}, "spec.consumers: '2' is no int"),
        ({"ordering": "none"}, "spec.ordering: 'none' is none of ('ordered', 'unordered')"),
        ({"delivery": {"backoffDelay": "1s"}}, "spec.delivery.backoffDelay: '1s' is not like"),
        ({"sink": {"ref": {"kind": "Service", "name": "x"}}}, "spec.sink.ref.apiVersion: is missing"),
    ],
)
def test_a_mistake_in_these_kinds_would_be_seen(change: dict[str, Any], problem: str) -> None:
    item = rendered(events="kafka")["KafkaSource"]
    item["spec"] |= change
    (line,) = eventing_kinds.problems(item)
    assert line.startswith(f"KafkaSource minilm-topic: {problem}")


def test_each_way_says_which_versions_it_needs_and_has_a_row_in_the_docs() -> None:
    docs = (ROOT / "docs/events.md").read_text()
    for way in EVENTS:
        text = (MANIFESTS / "eventing" / way / "kustomization.yaml").read_text()
        assert re.search(r"\b[12]\.\d+\b", text), way
        assert re.search(rf"^\| `{way}` \|", docs, re.MULTILINE), way
