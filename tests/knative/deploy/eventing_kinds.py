"""The fields of the kinds that Knative Eventing, its Kafka and RabbitMQ extensions, and KEDA add to a cluster: those of their specs.

Their own schemas let much pass that means nothing (`x-kubernetes-preserve-unknown-fields`), so these are narrower. Read from
knative/eventing 8cf4c4b67 (config/core/resources, pkg/apis/duck/v1/delivery_types.go), knative-extensions/eventing-kafka-broker 7d8fe89f4
(control-plane/config/eventing-kafka-broker), knative-extensions/eventing-rabbitmq bd1ee997d (config/source, pkg/apis/sources/v1alpha1) and
kedacore/keda 8b4f083ca (config/crd/bases, pkg/scalers/aws_sqs_queue_scaler.go).
"""

import re
from dataclasses import dataclass
from typing import Any

from kubernetes_validate import validate

KUBERNETES = "1.36"


@dataclass(frozen=True)
class Must:
    """A field that has to be there."""

    schema: Any


@dataclass(frozen=True)
class OneOf:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """A string of this form."""

    pattern: str


WHOLE, YES, STRING = int, bool, str
LABELS = {"*": STRING}
DURATION = Text(r"P(?=.)(T(?=.)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?")
SINK = {
    "ref": {"apiVersion": Must(STRING), "kind": Must(STRING), "name": Must(STRING), "namespace": STRING},
    "uri": STRING,
    "CACerts": STRING,
    "audience": STRING,
}
BACK_OFF = {"retry": WHOLE, "backoffPolicy": OneOf(("linear", "exponential")), "backoffDelay": DURATION}
DELIVERY = {**BACK_OFF, "timeout": DURATION, "retryAfterMax": DURATION, "deadLetterSink": SINK}
NAMED = {"apiVersion": Must(STRING), "kind": Must(STRING), "name": Must(STRING), "namespace": STRING}
FILTER: dict[str, Any] = {"exact": LABELS, "prefix": LABELS, "suffix": LABELS, "cesql": STRING}
FILTER |= {"not": FILTER, "all": [FILTER], "any": [FILTER]}
OVERRIDES = {"extensions": LABELS}
FROM_SECRET = {"secretKeyRef": {"name": Must(STRING), "key": Must(STRING), "optional": YES}}

# By apiVersion and kind.
SPECS: dict[tuple[str, str], Any] = {
    ("sources.knative.dev/v1", "ContainerSource"): {"sink": Must(SINK), "ceOverrides": OVERRIDES, "template": Must("pod")},
    ("sources.knative.dev/v1", "SinkBinding"): {
        "sink": Must(SINK),
        "ceOverrides": OVERRIDES,
        "subject": Must(
            {"apiVersion": Must(STRING), "kind": Must(STRING), "name": STRING, "namespace": STRING, "selector": {"matchLabels": LABELS}}
        ),
    },
    ("eventing.knative.dev/v1", "Broker"): {"config": NAMED, "delivery": DELIVERY},
    ("eventing.knative.dev/v1", "Trigger"): {
        "broker": Must(STRING),
        "filter": {"attributes": LABELS},
        "filters": [FILTER],
        "subscriber": Must(SINK),
        "delivery": DELIVERY,
    },
    ("eventing.knative.dev/v1alpha1", "KafkaSink"): {
        "topic": Must(STRING),
        "bootstrapServers": Must([STRING]),
        "numPartitions": WHOLE,
        "replicationFactor": WHOLE,
        "contentMode": OneOf(("binary", "structured")),
        "auth": {"secret": {"ref": {"name": Must(STRING)}}},
    },
    ("sources.knative.dev/v1", "KafkaSource"): {
        "bootstrapServers": Must([STRING]),
        "topics": Must([STRING]),
        "consumerGroup": STRING,
        "consumers": WHOLE,
        "ordering": OneOf(("ordered", "unordered")),
        "initialOffset": OneOf(("earliest", "latest")),
        "sink": Must(SINK),
        "ceOverrides": OVERRIDES,
        "delivery": DELIVERY,
        "net": {
            "sasl": {"enable": YES, "user": FROM_SECRET, "password": FROM_SECRET, "type": FROM_SECRET},
            "tls": {"enable": YES, "cert": FROM_SECRET, "key": FROM_SECRET, "caCert": FROM_SECRET},
        },
    },
    ("sources.knative.dev/v1alpha1", "RabbitmqSource"): {
        "rabbitmqClusterReference": Must({"name": STRING, "namespace": STRING, "connectionSecret": {"name": Must(STRING)}}),
        "rabbitmqResourcesConfig": Must(
            {"queueName": Must(STRING), "exchangeName": STRING, "vhost": STRING, "parallelism": WHOLE, "predeclared": YES}
        ),
        "delivery": BACK_OFF,  # no dead-letter sink: that is the queue's own exchange
        "sink": Must(SINK),
        "serviceAccountName": STRING,
        "adapterContainerName": STRING,
    },
    ("sources.knative.dev/v1alpha1", "IntegrationSource"): {
        "sink": Must(SINK),
        "aws": {
            "sqs": {
                "arn": Must(STRING),
                "region": Must(STRING),
                "deleteAfterRead": YES,
                "autoCreateQueue": YES,
                "host": STRING,
                "protocol": STRING,
                "queueURL": STRING,
                "uriEndpointOverride": STRING,
                "overrideEndpoint": YES,
                "delay": WHOLE,
                "greedy": YES,
                "maxMessagesPerPoll": WHOLE,
                "waitTimeSeconds": WHOLE,
                "visibilityTimeout": WHOLE,
            },
            "auth": Must({"secret": {"ref": {"name": Must(STRING)}}, "serviceAccountName": STRING}),
        },
    },
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "scaleTargetRef": Must({"name": Must(STRING), "apiVersion": STRING, "kind": STRING, "envSourceContainerName": STRING}),
        "minReplicaCount": WHOLE,
        "maxReplicaCount": WHOLE,
        "idleReplicaCount": WHOLE,
        "pollingInterval": WHOLE,
        "cooldownPeriod": WHOLE,
        "initialCooldownPeriod": WHOLE,
        "triggers": Must(
            [
                {
                    "type": Must(OneOf(("aws-sqs-queue",))),
                    "name": STRING,
                    "metricType": STRING,
                    "useCachedMetrics": YES,
                    "authenticationRef": {"name": Must(STRING), "kind": STRING},
                    # All of them strings: a number or a boolean is refused.
                    "metadata": Must(
                        {
                            "queueURL": Must(Text(r"https?://[^/]+/[^/]+/[^/]+")),
                            "awsRegion": Must(STRING),
                            "awsEndpoint": STRING,
                            "queueLength": Text(r"\d+"),
                            "activationQueueLength": Text(r"\d+"),
                            "scaleOnInFlight": OneOf(("true", "false")),
                            "scaleOnDelayed": OneOf(("true", "false")),
                            "identityOwner": STRING,
                        }
                    ),
                }
            ]
        ),
    },
    ("keda.sh/v1alpha1", "TriggerAuthentication"): {
        "podIdentity": {
            "provider": Must(OneOf(("aws", "aws-eks", "azure-workload", "gcp", "none"))),
            "identityOwner": OneOf(("keda", "workload")),
            "roleArn": STRING,
        },
        "secretTargetRef": [{"parameter": Must(STRING), "name": Must(STRING), "key": Must(STRING)}],
    },
}


def problems(item: dict[str, Any]) -> list[str]:
    """What is wrong with an object of one of these kinds; kubernetes_validate's own errors are raised."""
    schema = SPECS[item["apiVersion"], item["kind"]]
    return _problems(item["spec"], schema, f"{item['kind']} {item['metadata']['name']}: spec")


def _problems(value: Any, schema: Any, path: str) -> list[str]:
    if isinstance(schema, Must):
        schema = schema.schema
    if schema == "pod":
        validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **value.get("metadata", {})}, "spec": value["spec"]},
            KUBERNETES,
            strict=True,
        )
        return []
    if isinstance(schema, OneOf):
        return [] if value in schema.words else [f"{path}: {value!r} is none of {schema.words}"]
    if isinstance(schema, Text):
        return [] if isinstance(value, str) and re.fullmatch(schema.pattern, value) else [f"{path}: {value!r} is not like {schema.pattern}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: must be a list that is not empty"]
        return [line for number, one in enumerate(value) for line in _problems(one, schema[0], f"{path}[{number}]")]
    if not isinstance(value, dict):
        return [f"{path}: must be a mapping"]
    found = [f"{path}.{name}: is missing" for name, one in schema.items() if isinstance(one, Must) and name not in value]
    for name, one in value.items():
        known = schema.get(name, schema.get("*"))
        found += [f"{path}.{name}: there is no such field"] if known is None else _problems(one, known, f"{path}.{name}")
    return found
