"""Read manifests: plain YAML in, checked Services, queue sources, ConfigMaps and Secrets out."""

import base64
import binascii
import datetime
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from knative.autoscaler import ScaleSpec, SpecError
from knative.autoscaler.config import HPA, KPA
from knative.autoscaler.spec import ANNOTATION_PREFIX
from knative.local.code import Code
from knative.local.errors import ManifestError
from knative.local.rules import broken_rules, broken_source_rules
from knative.local.schema import (
    ConfigMap,
    Container,
    ContainerSourceObject,
    ContainerSourceSpec,
    Metadata,
    PodSpec,
    Secret,
    ServiceObject,
    SourcePodSpec,
    Template,
    TrafficTarget,
)
from weights_cache.environment import told

# Fields of a Kubernetes pod that somebody may well write here, and what is to be said then.
_NOT_HERE = {
    "grpc": "gRPC probes are not run here; allowed are httpGet, tcpSocket and exec",
    "initContainers": "init containers are not run here; let a container's command do what is to be done first",
    "lifecycle": "Knative refuses lifecycle hooks in a Service, and they are not run here; let the command do it, and end on SIGTERM",
    "privileged": "Knative refuses privileged containers",
    "replicas": "a Knative Service has no replicas; see the annotations min-scale and max-scale of spec.template.metadata",
    "restartPolicy": "Knative refuses it; containers are always started again",
    "selector": "a Knative Service has no selector; it knows its own pods",
    "terminationGracePeriodSeconds": "Knative refuses it; a pod has timeoutSeconds to end",
}

# Where a value may be somebody's secret, unless it is very short.
_VALUES = {"env", "args", "command", "httpHeaders", "data"}
_SHORT = 5  # characters
_OPTION = re.compile(r"(--?[\w-]+(?:=|\s+))[^\s-]\S*")  # of a command, with its value
_TYPES = ((bool, "true or false"), (int | float, "a number"), (datetime.date, "a date"), (type(None), "nothing"), (str, "text"))

M = TypeVar("M", bound=BaseModel)

SERVING = "serving.knative.dev/v1"
SOURCES = "sources.knative.dev/v1"
# What manifests call the embedded object store and the embedded queues; the real address takes their place.
OBJECT_STORE = "http://object-store.relight.localhost"
QUEUES = "http://queue.relight.localhost"
AUTOSCALER_CONFIG = "config-autoscaler"
FEATURES_CONFIG = "config-features"
EXAMPLE = "relight/example"  # of a Service: a request body
ROLLOUT = "relight/rollout"  # of a Service: what a Deployment calls its strategy
RECREATE = "recreate"
STDIN = Path("-")
MAX_LABEL = 63  # signs, of a part of a host name
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
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
}
# A queue as SQS names it. A cluster knows a Service by the second of these, with the namespace in it.
_QUEUE = re.compile(rf"{re.escape(QUEUES)}/[0-9]{{12}}/([-\w]{{1,75}}(?:\.fifo)?)")
_IN_CLUSTER = re.compile(r"https?://([-a-z0-9]+)\.([-a-z0-9]+)\.svc(?:\.cluster\.local)?(/.*)?")
_QUOTED = re.compile(r": ['\"].*", re.DOTALL)  # what Python says was found
# What belongs to another class of autoscaler, which measures what nobody measures here.
_OF_THE_CLASS = ("class", "metric", "target", "target-utilization-percentage")


class _Named:
    """What has metadata."""

    metadata: Metadata

    @property
    def name(self) -> str:
        """Its name."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return self.metadata.namespace


@dataclass(frozen=True)
class Service(_Named):
    """A Knative Service as it stands in a file."""

    file: str
    where: str  # in the file
    metadata: Metadata
    template: Template
    traffic: Sequence[TrafficTarget]  # never empty
    scale: ScaleSpec
    manifests: "Manifests" = field(repr=False, compare=False)  # what it was read with: its ConfigMaps and Secrets
    code: Code | None = None  # of its agent; see content.with_content
    weights: str = ""  # a stamp of the directory that they come from, if they come from one of this machine

    @property
    def spec(self) -> PodSpec:
        """The pods of a new revision."""
        return self.template.spec

    def runs_as(self, other: "Service") -> bool:
        """Whether a pod of one would be the same as one of the other: by the template, the agent's code and the weights."""
        return (self.template, self.code, self.weights) == (other.template, other.code, other.weights)

    @property
    def recreate(self) -> bool:
        """Whether, in a roll-out, the old pods go before the new ones start: for what this machine has only one of."""
        return self.metadata.annotations.get(ROLLOUT) == RECREATE

    @property
    def example(self) -> str:
        """A request body that its author gave as an example, or a guess."""
        return self.metadata.annotations.get(EXAMPLE) or '{"instances": ["hello"]}'

    @property
    def has_example(self) -> bool:
        """Whether that is no guess."""
        return bool(self.metadata.annotations.get(EXAMPLE))

    @property
    def user_container(self) -> Container:
        """The container that is called: the one with a port, or the only one."""
        return next((c for c in self.spec.containers if c.ports), self.spec.containers[0])


@dataclass(frozen=True)
class QueueSource(_Named):
    """A ContainerSource as it stands in a file: a program that turns messages into requests of a Service."""

    # Of two that differ in nothing but these, one is no change of the other.
    file: str = field(compare=False)
    where: str = field(compare=False)  # in the file
    metadata: Metadata = field(compare=False)
    declared: ContainerSourceSpec
    manifests: "Manifests" = field(repr=False, compare=False)  # what it was read with: its ConfigMaps and Secrets

    @property
    def spec(self) -> SourcePodSpec:
        """Its pod."""
        return self.declared.template.spec

    @property
    def sink(self) -> tuple[tuple[str, str] | None, str]:
        """The Service that gets the events, as (namespace, name), with the path there; or None and an address."""
        sink = self.declared.sink
        if sink.ref:
            return (sink.ref.namespace or self.namespace, sink.ref.name), sink.uri or ""
        assert sink.uri
        if found := _IN_CLUSTER.fullmatch(sink.uri):
            return (found[2], found[1]), found[3] or ""
        return None, sink.uri


@dataclass
class Manifests:
    """Everything of use in the files that were read."""

    services: list[Service] = field(default_factory=list)
    sources: list[QueueSource] = field(default_factory=list)
    config_maps: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)  # by (namespace, name)
    secrets: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict, repr=False)

    @property
    def routes_by_header(self) -> bool:
        """Whether the header `Knative-Serving-Tag` chooses a tag, which in Knative is an alpha feature and off."""
        data = next((data for (_, name), data in self.config_maps.items() if name == FEATURES_CONFIG), {})
        return data.get("tag-header-based-routing", "").lower() == "enabled"

    @property
    def workloads(self) -> list[Service | QueueSource]:
        """Whatever has pods."""
        return [*self.services, *self.sources]

    def mentions(self, text: str) -> bool:
        """Whether `text` stands anywhere in an environment or an argument."""
        return any(text in value for value in self._values())

    @property
    def queues(self) -> list[str]:
        """The names of the embedded queues that stand in an environment or an argument."""
        return sorted({name for value in self._values() for name in _QUEUE.findall(value)})

    def _values(self) -> Iterator[str]:
        for data in (*self.config_maps.values(), *self.secrets.values()):
            yield from data.values()
        for workload in self.workloads:
            for container in workload.spec.containers:
                yield from (*container.command, *container.args, *(variable.value for variable in container.env))


def tag_label(tag: str, service: str) -> str:
    """The first label of a tag's host, as Knative's default template has it."""
    return f"{tag}-{service}"


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
            elif kind == "ContainerSource" and document["apiVersion"] == SOURCES:
                manifests.sources.append(_source(file, where, _parse(ContainerSourceObject, document, file, where), manifests))
            elif kind == "ConfigMap":
                config_map = _parse(ConfigMap, document, file, where)
                _check_queues(file, f"{where}: data", config_map.data.items())
                if name == AUTOSCALER_CONFIG:
                    _scale(file, f"{where}: data", {}, 0, config_map.data)
                manifests.config_maps[config_map.metadata.namespace, name] = config_map.data
            elif kind == "Secret":
                secret = _parse(Secret, document, file, where)
                manifests.secrets[secret.metadata.namespace, name] = data = _decoded(secret, file, where)
                _check_queues(file, f"{where}: data", data.items(), is_secret=True)
            elif kind not in _LEFT_ALONE:
                raise ManifestError(
                    file,
                    where,
                    f"found {document['apiVersion']} {kind}; allowed are {SERVING} Service, {SOURCES} ContainerSource, v1 ConfigMap and"
                    f" Secret (and, without effect here, {', '.join(sorted(_LEFT_ALONE))})",
                )
    autoscaler_config = next((data for (_, name), data in manifests.config_maps.items() if name == AUTOSCALER_CONFIG), {})
    for file, where, item in pending:
        manifests.services.append(_service(file, where, item, autoscaler_config, manifests))
    if not manifests.services:
        raise ManifestError(", ".join(file for file, _ in sources), "", f"found no {SERVING} Service")
    _check_unique("Service", manifests.services)
    _check_unique("ContainerSource", manifests.sources)
    _check_hosts(manifests.services)
    for source in manifests.sources:
        _check_sink(source)
    return manifests


class Sources:
    """The files that manifests are read from, again and again; a directory stands for the YAML files in it, `-` for standard input."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._piped: str | None = None  # can be read only once

    @property
    def can_change(self) -> bool:
        """Whether there is anything but standard input."""
        return any(path != STDIN for path in self._paths)

    def read(self) -> Manifests:
        """What they hold now. Raises ManifestError."""
        texts = []
        for path in self._paths:
            if path == STDIN:
                self._piped = sys.stdin.read() if self._piped is None else self._piped
                texts.append(("standard input", self._piped))
                continue
            try:
                files = _files(path)
                if not files:
                    raise ManifestError(str(path), "", "found no .yaml or .yml file in this directory")
                if any(file.stem == "kustomization" for file in files):
                    raise ManifestError(str(path), "", f"is to be rendered first: kubectl kustomize {path} > manifests.yaml")
                texts += [(str(file), file.read_text()) for file in files]
            except UnicodeDecodeError as error:
                raise ManifestError(str(path), "", f"cannot be read: byte {error.start} is not UTF-8; manifests are text") from error
            except OSError as error:
                raise ManifestError(str(path), "", f"cannot be read: {error.strerror or error}") from error
        return read_manifests(texts)

    def stamp(self) -> object:
        """Something that is different once a file was written, replaced, added or removed."""
        try:
            return [(file, _stamp(file)) for path in self._paths if path != STDIN for file in _files(path)]
        except OSError:  # a directory that is gone; to read it says so
            return None


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml")) if path.is_dir() else [path]


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


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
        raise ManifestError(file, where, f"not YAML: {_problem(error.problem)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ManifestError(file, f"line {line}", f"not YAML: {error.reason}") from error
    except ValueError as error:  # e.g. 2026-13-45, which has the form of a date; the value itself is not repeated
        raise ManifestError(file, "", f"not YAML: {_QUOTED.sub('', str(error))}; put it in quotes if it is text") from error


def _problem(said: str | None) -> str:
    """What the parser says, less what it takes for a name: that may be a secret that needs quotes."""
    for mistaken, sign in (("undefined alias", "*"), ("constructor for the tag", "!")):
        if said and mistaken in said:
            return f"{said.partition(mistaken)[0]}{mistaken}; a text that begins with {sign} needs quotes"
    return str(said)


def _parse(model: type[M], document: dict[str, Any], file: str, where: str) -> M:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        found = first["input"]
        if first["type"] == "extra_forbidden":
            raise ManifestError(file, f"{where}: {path}", _no_such_field(model, first["loc"])) from error
        shown = "" if first["type"] == "missing" or isinstance(found, dict | list) else f" (found {_shown(first['loc'], found, model)})"
        raise ManifestError(file, f"{where}: {path}", first["msg"].removeprefix("Value error, ") + shown) from error


def _shown(path: tuple[int | str, ...], found: object, model: type[BaseModel]) -> str:
    """A value as a message repeats it, unless it may be a secret: of what has no quotes, its type is what is wrong."""
    if path[-1] == "command" and isinstance(found, str):  # all in one text
        return told(_OPTION.sub(r"\1***", found))
    if model is Secret or (_VALUES.intersection(path) and len(str(found)) > _SHORT):
        return next((words for kind, words in _TYPES if isinstance(found, kind)), "something else")
    return told(found) if isinstance(found, str) else repr(found)


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


def _service(file: str, where: str, item: ServiceObject, autoscaler_config: Mapping[str, str], manifests: Manifests) -> Service:
    for path, message in broken_rules(item):
        raise ManifestError(file, f"{where}: {path}", message)
    spec = item.spec.template.spec
    annotations = item.spec.template.metadata.annotations
    scale = _scale(file, f"{where}: spec.template.metadata.annotations", annotations, spec.container_concurrency, autoscaler_config)
    rollout = item.metadata.annotations.get(ROLLOUT, "rolling")
    if rollout not in ("rolling", RECREATE):
        raise ManifestError(file, f"{where}: metadata.annotations", f"{ROLLOUT} = {rollout!r}, must be rolling or {RECREATE}")
    revision = item.spec.template.metadata.name
    if revision and not (re.fullmatch(f"{item.metadata.name}-[a-z0-9]([-a-z0-9]*[a-z0-9])?", revision) and len(revision) <= MAX_LABEL):
        raise ManifestError(
            file,
            f"{where}: spec.template.metadata.name",
            f"found {revision!r}; the name of a revision must begin with {item.metadata.name}- and be a label of at most {MAX_LABEL} signs",
        )
    traffic = item.spec.traffic or [TrafficTarget(latestRevision=True, percent=100)]
    _check_traffic(file, f"{where}: spec.traffic", traffic)
    return Service(file, where, item.metadata, item.spec.template, traffic, scale, manifests)


def _source(file: str, where: str, item: ContainerSourceObject, manifests: Manifests) -> QueueSource:
    for path, message in broken_source_rules(item):
        raise ManifestError(file, f"{where}: {path}", message)
    for index, container in enumerate(item.spec.template.spec.containers):
        at = f"{where}: spec.template.spec.containers[{index}].env"
        _check_queues(file, at, ((variable.name, variable.value) for variable in container.env))
    return QueueSource(file, where, item.metadata, item.spec, manifests)


def _check_queues(file: str, where: str, values: Iterable[tuple[str, str]], *, is_secret: bool = False) -> None:
    """Whether what begins as the address of an embedded queue is one."""
    for name, value in values:
        if value.startswith(f"{QUEUES}/") and value != f"{QUEUES}/" and not _QUEUE.fullmatch(value):
            raise ManifestError(
                file,
                f"{where}: {name}",
                f"found {'another address' if is_secret else told(value)}; an embedded queue is {QUEUES}/000000000000/NAME",
            )


def _check_sink(source: QueueSource) -> None:
    target, _ = source.sink
    services = [(service.namespace, service.name) for service in source.manifests.services]
    if target is None or target in services:
        return
    field = "ref" if source.declared.sink.ref else "uri"
    known = ", ".join(name if namespace == source.namespace else f"{namespace}/{name}" for namespace, name in services)
    raise ManifestError(
        source.file,
        f"{source.where}: spec.sink.{field}",
        f"found Service {target[1]!r} of namespace {target[0]!r}, which is in no manifest here; there are {known}",
    )


def _check_traffic(file: str, where: str, traffic: Sequence[TrafficTarget]) -> None:
    """Knative's rules (knative/serving 98e5ef90aa, pkg/apis/serving/v1/route_validation.go)."""
    tags: dict[str, int] = {}
    for number, target in enumerate(traffic):
        here = f"{where}[{number}]"
        if target.latest_revision is not None and target.latest_revision == bool(target.revision_name):
            found = f"found {str(target.latest_revision).lower()} {'with' if target.revision_name else 'without'} revisionName"
            raise ManifestError(file, f"{here}.latestRevision", f"{found}; give either latestRevision: true or a revisionName")
        if target.tag and target.tag in tags:
            raise ManifestError(file, f"{here}.tag", f"found {target.tag!r} twice (first in traffic[{tags[target.tag]}]); tags must differ")
        if target.tag:
            tags[target.tag] = number
    if (total := sum(target.percent or 0 for target in traffic)) != 100:
        raise ManifestError(file, where, f"found percents that sum to {total}; they must sum to 100")


def _check_hosts(services: Sequence[Service]) -> None:
    """A tag makes a host name, which must be possible and nobody else's."""
    owners = {(service.namespace, service.name): f"Service {service.name}" for service in services}
    for service in services:
        for number, target in enumerate(service.traffic):
            if not target.tag:
                continue
            where, label = f"{service.where}: spec.traffic[{number}].tag", tag_label(target.tag, service.name)
            if len(label) > MAX_LABEL:
                raise ManifestError(
                    service.file, where, f"found {target.tag!r}; {label} is longer than the {MAX_LABEL} signs of a host label"
                )
            if owner := owners.get((service.namespace, label)):
                raise ManifestError(service.file, where, f"found {target.tag!r}; its host {label}.{service.namespace} is that of {owner}")
            owners[service.namespace, label] = f"tag {target.tag} of Service {service.name}"


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


def _check_unique(kind: str, found: Sequence[Service | QueueSource]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for item in found:
        key = item.namespace, item.name
        if key in seen:
            raise ManifestError(item.file, f"{kind} {item.name}", f"stands twice in namespace {item.namespace} (first in {seen[key]})")
        seen[key] = item.file
