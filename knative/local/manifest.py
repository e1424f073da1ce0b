"""Read manifests: plain YAML in, checked Services, ConfigMaps and Secrets out."""

import base64
import binascii
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from knative.autoscaler import ScaleSpec, SpecError
from knative.autoscaler.config import HPA, KPA
from knative.autoscaler.spec import ANNOTATION_PREFIX
from knative.local.errors import ManifestError
from knative.local.rules import broken_rules
from knative.local.schema import ConfigMap, Container, Metadata, PodSpec, Secret, ServiceObject

# Fields of a Kubernetes pod that somebody may well write here, and what is to be said then.
_NOT_HERE = {
    "grpc": "gRPC probes are not run here; allowed are httpGet, tcpSocket and exec",
    "initContainers": "init containers are not run here; let a container's command do what is to be done first",
    "lifecycle": "Knative refuses lifecycle hooks; let the command do it, and end on SIGTERM",
    "privileged": "Knative refuses privileged containers",
    "replicas": "a Knative Service has no replicas; see the annotations min-scale and max-scale of spec.template.metadata",
    "restartPolicy": "Knative refuses it; containers are always started again",
    "selector": "a Knative Service has no selector; it knows its own pods",
    "terminationGracePeriodSeconds": "Knative refuses it; a pod has timeoutSeconds to end",
}

M = TypeVar("M", bound=BaseModel)

SERVING = "serving.knative.dev/v1"
AUTOSCALER_CONFIG = "config-autoscaler"
# Of use to a cluster only; they may stand in the same file.
_LEFT_ALONE = {
    "ClusterRole",
    "ClusterRoleBinding",
    "DaemonSet",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "PodMonitor",
    "PriorityClass",
    "PrometheusRule",
    "ServiceAccount",
}
# What belongs to another class of autoscaler, which measures what nobody measures here.
_OF_THE_CLASS = ("class", "metric", "target", "target-utilization-percentage")


@dataclass(frozen=True)
class Service:
    """A Knative Service as it stands in a file."""

    file: str
    metadata: Metadata
    spec: PodSpec
    annotations: Mapping[str, str]  # of the template: the revision's
    scale: ScaleSpec
    where: str = ""  # in the file

    @property
    def name(self) -> str:
        """The Service's name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """The Service's namespace."""
        return self.metadata.namespace

    @property
    def example(self) -> str:
        """A request body that its author gave as an example, or a guess."""
        return self.metadata.annotations.get("relight/example") or '{"instances": ["hello"]}'

    @property
    def user_container(self) -> Container:
        """The container that is called: the one with a port, or the only one."""
        return next((c for c in self.spec.containers if c.ports), self.spec.containers[0])


@dataclass
class Manifests:
    """Everything of use in the files that were read."""

    services: list[Service] = field(default_factory=list)
    config_maps: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)  # by (namespace, name)
    secrets: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)

    def mentions(self, text: str) -> bool:
        """Whether `text` stands anywhere in an environment or an argument."""
        values = [value for data in (*self.config_maps.values(), *self.secrets.values()) for value in data.values()]
        for service in self.services:
            for container in service.spec.containers:
                values += [*container.command, *container.args, *(variable.value for variable in container.env)]
        return any(text in value for value in values)


def read_manifests(sources: Sequence[tuple[str, str]]) -> Manifests:
    """The objects in some YAML texts, given as (file name, text). Raises ManifestError for the first mistake."""
    manifests = Manifests()
    pending: list[tuple[str, str, ServiceObject]] = []
    for file, text in sources:
        for number, document in enumerate(_documents(file, text), 1):
            if document is None:
                continue
            where = f"document {number}"
            if not isinstance(document, dict) or not all(isinstance(document.get(field), str) for field in ("apiVersion", "kind")):
                raise ManifestError(file, where, "found no object with apiVersion and kind")
            kind, metadata = document["kind"], document.get("metadata")
            name = metadata.get("name", "") if isinstance(metadata, dict) else ""
            where = f"document {number} ({kind} {name})".replace(" )", ")")
            if not name or not isinstance(name, str):
                raise ManifestError(file, where, "metadata.name: found none; each object needs a name")
            if kind == "Service" and document["apiVersion"] == SERVING:
                pending.append((file, where, _parse(ServiceObject, document, file, where)))
            elif kind == "ConfigMap":
                config_map = _parse(ConfigMap, document, file, where)
                if name == AUTOSCALER_CONFIG:
                    _scale(file, f"{where}: data", {}, 0, config_map.data)
                manifests.config_maps[config_map.metadata.namespace, name] = config_map.data
            elif kind == "Secret":
                secret = _parse(Secret, document, file, where)
                manifests.secrets[secret.metadata.namespace, name] = _decoded(secret, file, where)
            elif kind not in _LEFT_ALONE:
                raise ManifestError(
                    file,
                    where,
                    f"found {document['apiVersion']} {kind}; allowed are {SERVING} Service, v1 ConfigMap and Secret"
                    f" (and, without effect here, {', '.join(sorted(_LEFT_ALONE))})",
                )
    autoscaler_config = next((data for (_, name), data in manifests.config_maps.items() if name == AUTOSCALER_CONFIG), {})
    for file, where, item in pending:
        manifests.services.append(_service(file, where, item, autoscaler_config))
    if not manifests.services:
        raise ManifestError(", ".join(file for file, _ in sources), "", f"found no {SERVING} Service")
    _check_unique(manifests.services)
    return manifests


def read_files(paths: Sequence[Path]) -> Manifests:
    """The objects in some YAML files, `-` being standard input. Raises ManifestError."""
    sources = []
    for path in paths:
        try:
            sources.append(("standard input", sys.stdin.read()) if path == Path("-") else (str(path), path.read_text()))
        except IsADirectoryError as error:
            raise ManifestError(str(path), "", "cannot be read: it is a directory; name the files in it, as DIRECTORY/*.yaml") from error
        except UnicodeDecodeError as error:
            raise ManifestError(str(path), "", f"cannot be read: byte {error.start} is not UTF-8; manifests are text") from error
        except OSError as error:
            raise ManifestError(str(path), "", f"cannot be read: {error.strerror or error}") from error
    return read_manifests(sources)


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: the first one would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice in one object", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _documents(file: str, text: str) -> list[Any]:
    try:
        return list(yaml.load_all(text, _Loader))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ManifestError(file, where, f"not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ManifestError(file, f"line {line}", f"not YAML: {error.reason}") from error
    except ValueError as error:  # e.g. 2026-13-45, which has the form of a date
        raise ManifestError(file, "", f"not YAML: {error}") from error


def _parse(model: type[M], document: dict[str, Any], file: str, where: str) -> M:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = first["input"]
        if first["type"] == "extra_forbidden":
            raise ManifestError(file, f"{where}: {path}", _no_such_field(model, first["loc"])) from error
        shown = "" if first["type"] == "missing" or isinstance(found, dict | list) else f" (found {found!r})"
        raise ManifestError(file, f"{where}: {path}", first["msg"].removeprefix("Value error, ") + shown) from error


def _no_such_field(model: type[BaseModel], path: tuple[int | str, ...]) -> str:
    """What is said of the unknown field at the end of `path` in `model`: which one may be meant, or which there are."""
    for part in path[:-1]:
        if isinstance(part, str):  # a number is a place in a list
            kind = next(field.annotation for field in model.model_fields.values() if field.alias == part)
            # The model in `X`, `X | None` or `list[X]`.
            model = next(item for item in (kind, *get_args(kind)) if isinstance(item, type) and issubclass(item, BaseModel))
    if (name := str(path[-1])) in _NOT_HERE:
        return _NOT_HERE[name]
    known = sorted(str(field.alias) for field in model.model_fields.values())
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return "there is no such field; " + (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}")


def _service(file: str, where: str, item: ServiceObject, autoscaler_config: Mapping[str, str]) -> Service:
    for path, message in broken_rules(item):
        raise ManifestError(file, f"{where}: {path}", message)
    spec = item.spec.template.spec
    annotations = item.spec.template.metadata.annotations
    scale = _scale(file, f"{where}: spec.template.metadata.annotations", annotations, spec.container_concurrency, autoscaler_config)
    return Service(file, item.metadata, spec, annotations, scale, where)


def _scale(file: str, where: str, annotations: Mapping[str, str], container_concurrency: int, config: Mapping[str, str]) -> ScaleSpec:
    try:
        scale = ScaleSpec.parse(annotations, container_concurrency, config)
        if scale.autoscaler_class == HPA:  # by concurrency then, within the same bounds
            ours = {name: value for name, value in annotations.items() if name.removeprefix(ANNOTATION_PREFIX) not in _OF_THE_CLASS}
            scale = ScaleSpec.parse(ours | {"class": KPA}, container_concurrency, config)
    except SpecError as error:
        raise ManifestError(file, where, str(error)) from error
    return scale


def _decoded(item: Secret, file: str, where: str) -> Mapping[str, str]:
    decoded = {}
    for key, value in item.data.items():
        try:
            decoded[key] = base64.b64decode("".join(value.split()), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ManifestError(file, f"{where}: data.{key}", "must be base64 of text; plain text goes under stringData") from error
    return decoded | item.string_data


def _check_unique(services: Sequence[Service]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for service in services:
        key = service.namespace, service.name
        if key in seen:
            raise ManifestError(
                service.file, f"Service {service.name}", f"stands twice in namespace {service.namespace} (first in {seen[key]})"
            )
        seen[key] = service.file
