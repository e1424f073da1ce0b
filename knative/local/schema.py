"""The objects that may stand in a manifest, field by field.

Fields that a cluster needs and one machine does not (image, security contexts) are accepted and left alone; a field that no Knative
Service has is an error, because in a manifest a misspelt name is a setting that silently does nothing. Types are strict, as they are in a
cluster: `timeoutSeconds: "300"` would be refused there.
"""

import difflib
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, field_validator, model_validator
from pydantic.alias_generators import to_camel

from knative.local.quantity import parse

T = TypeVar("T")

# As Kubernetes has them; here they become parts of host names and of paths too.
Label = Annotated[str, Field(pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
# A tag and a revision's name are DNS 1035 labels: they begin with a letter.
Name = Annotated[str, Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Subdomain = Annotated[str, Field(pattern="^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)]


DEFAULT_TIMEOUT_S = 300  # of config-defaults: revision-timeout-seconds and revision-response-start-timeout-seconds
CPU, MEMORY, GPU = "cpu", "memory", "nvidia.com/gpu"
_RESOURCES = (CPU, MEMORY, "ephemeral-storage", GPU)


def _port(found: object) -> int | str | None:
    """A probe's port: a number, 0 for the container's own, or the name of that."""
    if isinstance(found, bool) or not isinstance(found, int | str) or (isinstance(found, int) and not 0 <= found <= 65535):
        raise ValueError("must be a number from 0 to 65535, or the name of the container's port")
    return found


Quantity = Annotated[float, BeforeValidator(parse)]
ProbePort = Annotated[int | str | None, PlainValidator(_port)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, frozen=True, strict=True)


class Metadata(_Strict):
    """`metadata`, of an object or a template."""

    name: Subdomain = ""
    namespace: Label = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ServiceMetadata(Metadata):
    """`metadata` of a Service or a source, whose name is part of host names and of paths."""

    name: Label


class KeyRef(_Strict):
    """One key of a ConfigMap or Secret."""

    name: str
    key: str
    optional: bool = False


class EnvSource(_Strict):
    """`valueFrom`."""

    config_map_key_ref: KeyRef | None = None
    secret_key_ref: KeyRef | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        return _just_one(self, "config_map_key_ref", "secret_key_ref")


class EnvVar(_Strict):
    """One item of `env`."""

    name: str = Field(pattern="^[^=]+$")
    value: str = ""
    value_from: EnvSource | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.value and self.value_from:
            raise ValueError(f"variable {self.name} has both value and valueFrom; allowed is one of them")
        return self


class SourceRef(_Strict):
    """A whole ConfigMap or Secret."""

    name: str
    optional: bool = False


class EnvFrom(_Strict):
    """One item of `envFrom`."""

    prefix: str = ""
    config_map_ref: SourceRef | None = None
    secret_ref: SourceRef | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        return _just_one(self, "config_map_ref", "secret_ref")


class ContainerPort(_Strict):
    """The port of the user container."""

    container_port: int = Field(ge=1, le=65535)
    name: Literal["", "http1", "h2c"] = ""
    protocol: Literal["TCP"] = "TCP"


class HttpHeader(_Strict):
    """A header that a probe sends."""

    name: str = Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
    value: str = Field(pattern=r"^[^\x00\r\n]*$")


class HttpGet(_Strict):
    """An HTTP probe; without a port it asks the container's own."""

    path: str = "/"
    port: ProbePort = None
    host: str | None = None
    scheme: Literal["HTTP"] = "HTTP"
    http_headers: list[HttpHeader] = []


class TcpSocket(_Strict):
    """A TCP probe."""

    port: ProbePort = None
    host: str | None = None


class Exec(_Strict):
    """A probe that is a command, run as the container's own are."""

    command: list[str] = Field(min_length=1)


class ProbeSpec(_Strict):
    """A liveness, readiness or startup probe; seconds and counts as in Kubernetes (a period of 0 is Knative's "as often as is useful")."""

    http_get: HttpGet | None = None
    tcp_socket: TcpSocket | None = None
    exec: Exec | None = None
    initial_delay_seconds: int = Field(0, ge=0)
    period_seconds: int = Field(0, ge=0)
    timeout_seconds: int = Field(1, ge=1)
    success_threshold: int = Field(1, ge=1)
    failure_threshold: int = Field(3, ge=1)


class Resources(_Strict):
    """`resources`: what the container may take at most, and what a cluster keeps for it."""

    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for part in ("limits", "requests"):
            amounts: dict[str, float] = getattr(self, part)
            for name, amount in amounts.items():
                if "/" not in name and name not in _RESOURCES and not name.startswith("hugepages-"):
                    raise ValueError(f"{part} has {name!r}; known are {', '.join(_RESOURCES)}{_meant(name)}")
                if "/" in name and name != GPU and (meant := _meant(name)):
                    raise ValueError(f"{part} has {name!r}, which no node offers{meant}")
                if name == GPU and amount != int(amount):
                    raise ValueError(f"{part} has {amount:g} of {GPU}; must be whole devices")
                if name == MEMORY and 0 < amount < 1:
                    raise ValueError(f"{part} has {amount:g} bytes of memory; m is a thousandth, Mi a mebibyte")
        for name, amount in self.requests.items():
            if amount > self.limits.get(name, amount):
                raise ValueError(f"requests has {amount:g} of {name}, more than the limit, {self.limits[name]:g}")
        if self.requests.get(GPU, 0.0) != self.limits.get(GPU, 0.0) and GPU in self.requests:
            raise ValueError(f"requests has {self.requests[GPU]:g} of {GPU}; must be as in limits, which may stand alone")
        return self

    @property
    def gpus(self) -> int:
        """Whole devices that the container has for itself."""
        return int(self.limits.get(GPU, 0))


class SecurityContext(_Strict):
    """What Knative lets a container ask for; processes here are who `relight run` is."""

    allow_privilege_escalation: bool | None = None
    read_only_root_filesystem: bool | None = None
    run_as_non_root: bool | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    capabilities: dict[str, list[str]] = {}
    seccomp_profile: dict[str, str] = {}


class VolumeMount(_Strict):
    """Where a container sees a volume."""

    name: str
    mount_path: str = Field(pattern="^/")
    read_only: bool = False
    sub_path: str = ""


class SourcePort(_Strict):
    """A port of a container that is no function: any number of them, under names of their own."""

    container_port: int = Field(ge=1, le=65535)
    name: str = ""
    protocol: Literal["TCP"] = "TCP"


class _ContainerFields(_Strict):
    name: Label = "user-container"
    image: str = ""
    image_pull_policy: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    env_from: list[EnvFrom] = []
    liveness_probe: ProbeSpec | None = None
    readiness_probe: ProbeSpec | None = None
    startup_probe: ProbeSpec | None = None
    resources: Resources = Resources()
    security_context: SecurityContext = SecurityContext()
    volume_mounts: list[VolumeMount] = []
    working_dir: str | None = None


class Container(_ContainerFields):
    """A container, of which one machine needs the command, its environment, its ports, probes and mounts."""

    ports: list[ContainerPort] = Field([], max_length=1)


class SourceContainer(_ContainerFields):
    """A container of a source, which nobody calls."""

    ports: list[SourcePort] = []


class ClaimSource(_Strict):
    """A persistent volume claim."""

    claim_name: Subdomain
    read_only: bool = False


class HostPathSource(_Strict):
    """A directory of the node, which here is one of the state directory."""

    path: str = Field(pattern=r"^(/[-\w][-\w.]*)+/?$")
    type: str = ""


class Volume(_Strict):
    """A volume: lives as long as the pod (emptyDir) or outlives it (persistentVolumeClaim, hostPath)."""

    name: Label
    empty_dir: dict[str, Any] | None = None
    persistent_volume_claim: ClaimSource | None = None
    host_path: HostPathSource | None = None


class _PodFields(_Strict):
    volumes: list[Volume] = []
    enable_service_links: bool | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool | None = None
    image_pull_secrets: list[dict[str, str]] = []
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    runtime_class_name: str | None = None
    priority_class_name: str | None = None
    security_context: dict[str, Any] = {}


class PodSpec(_PodFields):
    """`spec.template.spec` of a Service.

    Seconds, all three from a request's arrival, its cold start included: timeout to the end of its answer, response_start_timeout to the
    first byte, idle_timeout to the first byte and from one to the next.
    """

    containers: list[Container] = Field(min_length=1)
    container_concurrency: int = Field(0, ge=0, le=1000)
    timeout_seconds: int = Field(DEFAULT_TIMEOUT_S, ge=0, le=600)  # 0 is the default, as in Knative; of the next two it is "none"
    response_start_timeout_seconds: int | None = Field(None, ge=0, le=600)
    idle_timeout_seconds: int | None = Field(None, ge=0, le=600)

    @field_validator("timeout_seconds")
    @classmethod
    def _default(cls, seconds: int) -> int:
        return seconds or DEFAULT_TIMEOUT_S

    def first_byte_limit(self) -> tuple[int, str]:
        """Seconds until the first byte of an answer must be there, and the field that says so; with Knative's defaults."""
        start_s = DEFAULT_TIMEOUT_S if self.response_start_timeout_seconds is None else self.response_start_timeout_seconds
        limits = [(self.timeout_seconds, "timeoutSeconds")]
        limits += [(start_s, "responseStartTimeoutSeconds")] if start_s else []
        limits += [(self.idle_timeout_seconds, "idleTimeoutSeconds")] if self.idle_timeout_seconds else []
        return min(limits, key=lambda limit: limit[0])  # of equal ones the first


class Template(_Strict):
    """`spec.template`."""

    metadata: Metadata = Metadata()
    spec: PodSpec


class TrafficTarget(_Strict):
    """One item of `spec.traffic`: a share of the requests, or a host of its own (tag), for one revision or for the latest that is ready."""

    revision_name: Name | None = None
    latest_revision: bool | None = None
    percent: int | None = Field(None, ge=0, le=100)
    tag: Name | None = None


class ServiceSpec(_Strict):
    """`spec` of a Service."""

    template: Template
    traffic: list[TrafficTarget] = []


class ServiceObject(_Strict):
    """A Knative Service."""

    api_version: Literal["serving.knative.dev/v1"]
    kind: Literal["Service"]
    metadata: ServiceMetadata
    spec: ServiceSpec


class SourcePodSpec(_PodFields):
    """`spec.template.spec` of a source; its pod has so many seconds to end as `terminationGracePeriodSeconds` says."""

    containers: list[SourceContainer] = Field(min_length=1)
    termination_grace_period_seconds: int = Field(30, ge=0)
    restart_policy: Literal["Always"] = "Always"


class SourceTemplate(_Strict):
    """`spec.template` of a source."""

    metadata: Metadata = Metadata()
    spec: SourcePodSpec


class SinkRef(_Strict):
    """Who gets the events, by name."""

    api_version: str
    kind: str
    name: Label
    namespace: Label | None = None


class Sink(_Strict):
    """`spec.sink`: by name, by address, or by name with a path below it."""

    ref: SinkRef | None = None
    uri: str | None = None


class EventOverrides(_Strict):
    """`spec.ceOverrides`: attributes that every event gets."""

    extensions: dict[Annotated[str, Field(pattern="^[a-z0-9]+$")], str] = {}


class ContainerSourceSpec(_Strict):
    """`spec` of a ContainerSource."""

    template: SourceTemplate
    sink: Sink
    ce_overrides: EventOverrides = EventOverrides()


class ContainerSourceObject(_Strict):
    """A Knative ContainerSource: a program that sends events to a sink."""

    api_version: Literal["sources.knative.dev/v1"]
    kind: Literal["ContainerSource"]
    metadata: ServiceMetadata
    spec: ContainerSourceSpec


class ConfigMap(_Strict):
    """A ConfigMap."""

    api_version: Literal["v1"]
    kind: str
    metadata: Metadata
    data: dict[str, str] = {}
    immutable: bool = False


class Secret(ConfigMap):
    """A Secret; its `data` is base64."""

    string_data: dict[str, str] = {}
    type: str = ""


def _just_one(model: T, *fields: str) -> T:
    """The model itself. Raises ValueError unless one of these fields is set, and no other."""
    names = [to_camel(name) for name in fields]
    if (found := [to_camel(name) for name in fields if getattr(model, name) is not None]) and len(found) == 1:
        return model
    raise ValueError(f"found {' and '.join(found) or 'none'}; must be one of {', '.join(names)}")


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, _RESOURCES, n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""
